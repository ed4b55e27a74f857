"""Where the command reads and writes: files, the standard input and output, named pipes, process substitution."""

import contextlib
import io
import os
import re
import signal
import stat
import subprocess
import sys
import threading

import numpy
import pytest
from command_line import run
from PIL import Image

RGB = numpy.random.default_rng(0).integers(0, 255, (9, 14, 3), numpy.uint8)
HOLES = numpy.zeros((9, 14), numpy.uint8)
HOLES[2:6, 3:11] = 255
PROGRAM = os.path.join(os.path.dirname(sys.executable), "inr-kernels")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Runs each test in its own folder with an image and its mask."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(RGB).save("in.png")
    Image.fromarray(HOLES).save("mask.png")
    return tmp_path


@contextlib.contextmanager
def given(kind, data, monkeypatch):
    """The name under which the command reads these bytes from a source of that kind."""
    if kind == "-":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        yield "-"
    elif kind == "file":
        with open("given.png", "wb") as file:
            file.write(data)
        yield "given.png"
    else:  # /dev/fd/N is what a shell passes for <(...)
        reading = writing = None
        if kind == "pipe":
            os.mkfifo(writing := "given.pipe")
        else:
            reading, writing = os.pipe()

        def feed():
            with contextlib.suppress(BrokenPipeError), open(writing, "wb") as pipe:
                pipe.write(data)

        thread = threading.Thread(target=feed, daemon=True)
        thread.start()
        yield "given.pipe" if reading is None else f"/dev/fd/{reading}"
        thread.join()
        if reading is not None:
            os.close(reading)


KINDS = ["file", "-", "pipe", "/dev/fd"]
ROLES = ["input", "mask"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("content", ["whole", "empty", "cut", "text", "other size"])
def test_sources(capsys, monkeypatch, folder, kind, role, content):
    whole = (folder / {"input": "in.png", "mask": "mask.png"}[role]).read_bytes()
    data = {"whole": whole, "empty": b"", "cut": whole[: len(whole) // 2], "text": b"no picture"}.get(content)
    if data is None:
        file = io.BytesIO()
        Image.fromarray(HOLES[:, 1:]).save(file, "png")
        data = file.getvalue()
    names = {"input": "in.png", "mask": "mask.png"}
    with given(kind, data, monkeypatch) as names[role]:
        status = run("inpaint", names["input"], "--mask", names["mask"], "--model", "in2", "-o", "out.png")
    err = capsys.readouterr().err
    if content == "whole":
        assert (status, err) == (0, "")
        with Image.open("out.png") as image:
            assert numpy.array_equal(numpy.asarray(image)[HOLES == 0], RGB[HOLES == 0])
    else:
        reason = {
            "empty": "the file is empty",
            "cut": ".*(truncated|broken)",
            "text": "not a picture in a format that is read",
            "other size": "must have the input's size",
        }[content]
        blamed = "mask" if content == "other size" else role
        assert status == 1 and not os.path.exists("out.png")
        assert re.fullmatch(rf"inr-kernels: {blamed} {names[blamed]}: {reason}.*\n", err)


@pytest.mark.parametrize("role", ROLES)
def test_a_missing_source(capsys, role):
    names = {"input": "in.png", "mask": "mask.png"} | {role: "none.png"}
    assert run("inpaint", names["input"], "--mask", names["mask"], "-o", "out.png") == 1
    assert capsys.readouterr().err == f"inr-kernels: {role} none.png: No such file or directory\n"


@pytest.mark.parametrize(("words", "kind"), [((), "PNG"), (("--format", "webp"), "WEBP")])
@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_standard_output(capfdbinary, name, words, kind):
    assert run("upscale", "in.png", "--scale", "2", "-o", name, *words) == 0
    with Image.open(io.BytesIO(capfdbinary.readouterr().out)) as image:
        assert (image.format, image.size) == (kind, (28, 18))


@pytest.mark.parametrize(("name", "kind"), [("out", "PNG"), ("out.jpg", "JPEG")])
def test_an_output_that_is_a_pipe(folder, name, kind):
    got = []
    os.mkfifo(name)
    reader = threading.Thread(target=lambda: got.append((folder / name).read_bytes()))
    reader.start()
    assert run("upscale", "in.png", "--scale", "2", "-o", name) == 0
    reader.join()
    assert stat.S_ISFIFO(os.stat(name).st_mode)
    with Image.open(io.BytesIO(got[0])) as image:
        assert image.format == kind


def test_an_output_that_is_a_device():
    assert run("upscale", "in.png", "--scale", "2", "-o", "/dev/null") == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_format_for_a_name_without_a_suffix():
    assert run("upscale", "in.png", "--scale", "2", "-o", "out", "--format", "TIF") == 0
    with Image.open("out") as image:
        assert image.format == "TIFF"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-", "--mask", "-"), "input and mask are both the standard input, which can be read only once"),
        (("/dev/stdin", "--mask", "-"), "input and mask are both the standard input, which can be read only once"),
        (("pipe", "--mask", "pipe"), "input and mask are the same pipe or device, which can be read only once"),
        (("", "--mask", "mask.png"), "the name of the input is empty"),
        (("in.png", "--mask", ""), "the name of the mask is empty"),
        (("in.png", "--mask", "mask.png", "-o", ""), "the name of the output is empty"),
        (("in.png", "--mask", "mask.png", "-o", "out"), "output must end in .png .* got out"),
        (("in.png", "--mask", "mask.png", "--format", "gif"), "argument --format: invalid choice: 'gif'"),
    ],
)
def test_wrong_names(capsys, words, message):
    os.mkfifo("pipe")
    assert run("inpaint", "-o", "out.png", *words) == 2
    assert re.fullmatch(rf"inr-kernels: {message}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("stream", "words", "message"),
    [
        ("stdin", ("-", "-o", "out.png"), "input -: the standard input is closed"),
        ("stdout", ("in.png", "-o", "-"), "the standard output is closed"),
    ],
)
def test_closed_streams(monkeypatch, stream, words, message):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, stream, None)
    assert run("upscale", "--scale", "2", *words) == 1
    assert err.getvalue() == f"inr-kernels: {message}\n"


def test_a_standard_output_without_a_descriptor(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert run("upscale", "in.png", "--scale", "2", "-o", "-") == 1
    assert "the standard output is an object without a file descriptor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stream", "words", "message"),
    [("stdin", ("-", "-o", "out.png"), "the standard input is a terminal"), ("stdout", ("in.png", "-o", "-"), "the")],
)
def test_terminals(capsys, monkeypatch, stream, words, message):
    monkeypatch.setattr(getattr(sys, stream), "isatty", lambda: True, raising=False)
    assert run("upscale", "--scale", "2", *words) in (1, 2)
    assert f"the standard {'input' if stream == 'stdin' else 'output'} is a terminal" in capsys.readouterr().err


def test_in_a_shell(folder):
    """A pipeline, process substitution, and a reader that stops early: one line, no traceback."""
    line = f"""
        cat in.png | {PROGRAM} inpaint - --mask <(cat mask.png) --model in2 -o >(cat > filled.png)
        cat in.png | {PROGRAM} upscale /dev/stdin --scale 60 -o - --format bmp | head -c 2 > head
        echo ${{PIPESTATUS[1]}}
    """
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n" and (folder / "head").read_bytes() == b"BM"
    assert done.stderr == "inr-kernels: the standard output: Broken pipe\n"
    with Image.open("filled.png") as image:
        assert numpy.array_equal(numpy.asarray(image)[HOLES == 0], RGB[HOLES == 0])


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ((), 0),
        (("--help",), 0),
        (("--version",), 0),
        (("inpaint", "--help"), 0),
        (("info", "--help"), 0),
        (("upscale", "--bad"), 2),
        (("upscale", "none.png", "--scale", "2", "-o", "out.png"), 1),
        (("upscale", "in.png", "--scale", "2", "-o", "none/out.png"), 1),
        (("inpaint", "in.png", "--mask", "none.png", "-o", "out.png"), 1),
        (("inpaint", "in.png", "--mask", "mask.png", "-o", "out.xyz"), 2),
        (("export", "--model", "none.pt", "-o", "out.onnx"), 1),
        (("demo", "-o", "none/demo.png"), 1),
        (("evaluate", "--data", "none", "--masks", "thin"), 1),
        (("evaluate", "--data", ".", "--pred", "none"), 1),
        (("evaluate", "--data", ".", "--masks", "dots"), 2),
        (("evaluate", "--data", ".", "--masks", "thin", "-o", "in.png"), 1),
        (("train", "in2_small", "out=none", "data=none"), 1),
        (("train", "in2_small", "out=none", "masks=[.,none]"), 1),
        (("train", "in2_small", "out=."), 1),
        (("train", "in2_small", "out=none", "--resume"), 1),
        (("train", "none.yaml", "out=none"), 1),
    ],
)
@pytest.mark.parametrize("start", ["inr-kernels", "-m"])
def test_starts_without_torch(words, status, start):
    if start == "-m":
        command = [sys.executable, "-X", "importtime", "-m", "inr_kernels", *words]
    else:
        command = [sys.executable, "-X", "importtime", PROGRAM, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "inr_kernels.cli.arguments" in imported and not imported & {"torch", "numpy", "PIL", "tqdm"}
    assert done.returncode == status


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", ["--help", "--version", "info"])
def test_text_that_cannot_be_written(words, unbuffered):
    """A full disk is an error; a reader that stops early is none, but no success."""
    line = f"{PROGRAM} {words} > /dev/full; echo $? >&2; {PROGRAM} {words} | true; echo ${{PIPESTATUS[0]}} >&2"
    variables = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["bash", "-c", line], stderr=subprocess.PIPE, text=True, env=variables, check=True)
    full, status, *others = done.stderr.splitlines()
    assert full == "inr-kernels: the standard output: No space left on device"
    assert status == "1" and others in (["141"], ["0"])  # 0 if it has written all before `true` ends


def test_the_package_is_whole_everywhere_else(run_python):
    """Its names and torch.ops; and, in the command's process, after the first use of a name."""
    code = "import sys, inr_kernels; sys.argv = ['inr-kernels']; import torch; torch.ops.inr_kernels.conv3x3"
    run_python(code)
    code = "import sys; sys.argv = ['inr-kernels']; import inr_kernels; assert 'torch' not in sys.modules; "
    code += "inr_kernels.accelerate; import torch; torch.ops.inr_kernels.conv3x3; "
    code += "assert all(callable(getattr(inr_kernels, n)) for n in inr_kernels.__all__ if n != '__version__'); "
    code += "print(hasattr(inr_kernels, 'none'))"
    assert run_python(code) == "False\n"


@pytest.mark.parametrize(
    ("module", "caught"), [("inr_kernels.cli.arguments", ()), ("torch", ()), ("numpy", KeyboardInterrupt)]
)
def test_interrupted_while_importing(module, caught):
    """Ctrl-C while a module is imported: one line, no traceback, even where an importing module catches everything."""
    code = f"""
import contextlib, importlib.abc, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process of a shell ignores it
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            with contextlib.suppress({caught.__name__ if caught else ""}):
                signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["inr-kernels", "upscale", "in.png", "--scale", "2", "-o", "out.png"]
from inr_kernels.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "inr-kernels: interrupted\n")
