"""The page: a picture and its mask on the left, the result on the right."""

import html
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import gradio
import numpy

from inr_kernels._core.text import one_line

from .studio import Choice, Loaded, Made, Request, Stopped, Studio

TITLE = "Fill and enlarge pictures"
HEIGHT = 520  # pixels of the picture and of the result
COLOUR, OPACITY, BRUSH = "rgb(255, 40, 40)", 0.6, 8  # of the brush; its size in pixels of the preview
MAX_SCALE = 8
FAILURES = (OSError, ValueError, RuntimeError, MemoryError)
FILES_AGE = 24 * 3600  # seconds after which copies of files are deleted
LOOK: dict[str, Any] = {
    "theme": gradio.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
    "css": ".hint { text-align: center } footer { display: none !important }",
    # Pictures that are dropped or pasted anywhere on the page.
    "head": """\
<script>
  function load(event, files) {
    if (!files || !files.length) return;
    event.preventDefault();
    event.stopPropagation();
    const input = document.querySelector("#load input[type=file]");
    const chosen = new DataTransfer();
    chosen.items.add(files[0]);
    input.files = chosen.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  }
  addEventListener("dragover", (event) => event.preventDefault(), true);
  addEventListener("drop", (event) => load(event, event.dataTransfer.files), true);
  addEventListener("paste", (event) => load(event, event.clipboardData.files), true);
</script>""",
}


def make_page(studio: Studio) -> gradio.Blocks:
    """Builds the page; one picture is computed at a time, the next ones wait in a queue."""
    return _Page(studio).blocks


class _Page:
    """The components, and what happens when they are used."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self.choices = {choice.name: choice for choice in studio.choices}
        self.stops: dict[str, threading.Event] = {}  # of each session's work
        self.worker = ThreadPoolExecutor(1)  # one thread for all work: OpenMP keeps threads for each that computes
        with gradio.Blocks(
            title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, FILES_AGE)
        ) as self.blocks:
            self._lay_out()
            self._connect()
        self.blocks.queue(max_size=32)

    def _lay_out(self) -> None:
        first = self.studio.choices[0]
        self.picture = gradio.State(None, delete_callback=lambda picture: picture and picture.remove())
        with gradio.Row():
            with gradio.Column(scale=2, min_width=180, elem_id="load"):
                self.load = gradio.UploadButton("Load a picture")
                gradio.Markdown("or drop or paste one", elem_classes="hint")
            with gradio.Column(scale=3, min_width=220):
                networks = [(choice.label, choice.name) for choice in self.studio.choices]
                self.model = gradio.Dropdown(networks, value=first.name, label="Network", elem_id="model")
            with gradio.Column(scale=3, min_width=220):
                self.scale = gradio.Slider(1, MAX_SCALE, value=1, step=0.1, label="Enlarge by", elem_id="scale")
            with gradio.Column(scale=3, min_width=220):
                self.fast = gradio.Checkbox(True, label="Fast: look near the mask only", elem_id="fast")
                self.refine = gradio.Checkbox(False, label="Refine: slow, for large holes", elem_id="refine")
            with gradio.Column(scale=2, min_width=140):
                self.run = gradio.Button(_verb(first), variant="primary", elem_id="run")
                self.stop = gradio.Button("Stop", interactive=False, elem_id="stop")
        with gradio.Row():
            with gradio.Column(min_width=400):
                self.editor = gradio.ImageEditor(
                    label="Paint over what is to be filled",
                    type="numpy",
                    sources=(),
                    transforms=(),
                    layers=False,
                    buttons=[],
                    brush=gradio.Brush(colors=[(COLOUR, OPACITY)], color_mode="fixed", default_size=BRUSH),
                    height=HEIGHT,
                    elem_id="editor",
                )
            with gradio.Column(min_width=400):
                self.slider = gradio.ImageSlider(
                    label="Before and after",
                    height=HEIGHT,
                    max_height=HEIGHT,
                    buttons=["fullscreen"],
                    interactive=False,
                    elem_id="slider",
                )
        with gradio.Row():
            with gradio.Column(min_width=400):
                self.status = gradio.Markdown("Load a picture.", elem_id="status")
            with gradio.Column(min_width=400), gradio.Row():
                self.download = gradio.DownloadButton("Download", interactive=False, min_width=120, elem_id="download")
                self.mask = gradio.DownloadButton("Download mask", interactive=False, min_width=120, elem_id="mask")
                self.resume = gradio.Button("Continue with it", interactive=False, min_width=120, elem_id="resume")
        self.result = gradio.State(None)

    def _connect(self) -> None:
        alone: Any = {"concurrency_limit": 1, "concurrency_id": "picture", "api_visibility": "private"}
        quick: Any = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        shown = [self.picture, self.editor, self.status]
        results = [self.slider, self.download, self.mask, self.resume, self.result]
        # Not on the editor: Gradio reads the editor's drawing before each change of the progress shown there. That
        # takes longer for a large old drawing, so that "pending" can arrive after "complete", and "processing" stays.
        loading: Any = {"show_progress_on": self.status, "api_visibility": "private"}
        self.load.upload(self.on_load, [self.load, self.picture], [*shown, *results], **loading)
        self.resume.click(self.on_load, [self.result, self.picture], [*shown, *results], **loading)
        self.editor.clear(lambda picture: _editable(picture), self.picture, self.editor, **quick)
        self.model.change(self.on_model, self.model, [self.run, self.scale, self.fast, self.refine], **quick)
        buttons = [self.run, self.stop]
        started = self.run.click(self.on_start, None, buttons, **quick)
        options = [self.picture, self.editor, self.model, self.scale, self.refine, self.fast]
        done = started.success(self.on_run, options, [*results, self.status], show_progress_on=self.slider, **alone)
        done.then(lambda: (gradio.Button(interactive=True), gradio.Button(interactive=False)), None, buttons, **quick)
        self.stop.click(self.on_stop, None, None, **quick)
        self.blocks.unload(self.on_stop)

    def on_load(self, file: str, before: Loaded | None) -> list[Any]:
        """Shows another picture, and removes the files of the last one."""
        try:
            picture = self.studio.load(Path(file))
        except FAILURES as error:
            return _refused(error, 8)
        if before:
            before.remove()
        height, width = picture.size
        text = "\n\n".join([f"`{picture.file.name}`, {width} × {height} pixels.", *map(html.escape, picture.notes)])
        downloads = [gradio.DownloadButton(value=None, interactive=False) for _ in range(2)]
        cleared = [None, *downloads, gradio.Button(interactive=False)]
        return [picture, _editable(picture), text, *cleared, None]

    def on_model(self, model: str) -> list[Any]:
        """Offers what the network can do."""
        choice = self.choices[model]
        return [
            gradio.Button(_verb(choice)),
            gradio.Slider(value=1 if choice.fills else 2, interactive=choice.any_size),
            gradio.Checkbox(interactive=choice.fills),
            gradio.Checkbox(interactive=choice.fills),
        ]

    def on_start(self, request: gradio.Request) -> list[Any]:
        """Begins work that `on_stop` can stop, also while it waits for others'."""
        self.stops[_session(request)] = threading.Event()
        return [gradio.Button(interactive=False), gradio.Button(interactive=True)]

    def on_stop(self, request: gradio.Request) -> None:
        """Stops the session's work, when it next reports progress."""
        if stop := self.stops.get(_session(request)):
            stop.set()

    def on_run(
        self,
        picture: Loaded | None,
        drawn: dict[str, Any],
        model: str,
        scale: float,
        refine: bool,
        fast: bool,
        request: gradio.Request,
        progress: gradio.Progress = gradio.Progress(),  # noqa: B008
    ) -> list[Any]:
        """Computes the result, in the worker's thread."""
        if picture is None:
            return _refused("Load a picture first.", 6)
        choice, stop = self.choices[model], self.stops[_session(request)]
        mask = _mask(drawn) if choice.fills else None
        if choice.fills and (mask is None or not mask.any()):
            return _refused("Paint over what is to be filled first.", 6)
        wanted = Request(model, mask, scale, refine and choice.fills, fast and choice.fills)

        def report(done: float, total: float) -> None:
            if stop.is_set():
                raise Stopped
            progress(done / total, desc=_verb(choice))

        def work() -> Made:
            report(0, 1)
            return self.studio.make(picture, wanted, report)

        try:
            made = self.worker.submit(copy_context().run, work).result()
        except Stopped:
            return [gradio.skip()] * 5 + ["Stopped."]
        except FAILURES as error:
            return _refused(error, 6)
        facts = [f"**{made.seconds:.1f} s** on {made.backend}", *map(html.escape, made.notes)]
        return [
            (str(made.before), str(made.after)),
            gradio.DownloadButton(value=str(made.file), interactive=True),
            gradio.DownloadButton(value=str(made.mask) if made.mask else None, interactive=made.mask is not None),
            gradio.Button(interactive=True),
            str(made.file),
            "\n\n".join([*facts, f"The same on the command line: `{made.command}`"]),
        ]


def _verb(choice: Choice) -> str:
    return "Fill" if choice.fills else "Enlarge"


def _session(request: gradio.Request) -> str:
    return request.session_hash or ""


def _editable(picture: Loaded | None) -> dict[str, Any] | None:
    """The editor's value: a picture without a mask."""
    if picture is None:
        return None
    return {"background": str(picture.preview), "layers": [], "composite": str(picture.preview)}


def _mask(drawn: dict[str, Any]) -> numpy.ndarray | None:
    """Where the brush painted."""
    layers = [layer[..., 3] >= 255 * OPACITY / 2 for layer in drawn["layers"]]
    return numpy.any(layers, 0) if layers else None


def _refused(reason: str | Exception, outputs: int) -> list[Any]:
    """Shows an error until it is closed, and leaves that many outputs as they are."""
    message = reason if isinstance(reason, str) else one_line(reason)
    gradio.Warning(html.escape(message), duration=None, title="Error")
    return [gradio.skip()] * outputs
