"""The command inr-kernels app, its page in a browser, compared with what the other commands write."""

import base64
import socket
import sys
import urllib.error
import urllib.request

import numpy
import pytest
from browser import Page, app, chromium
from command_line import assert_refused, run
from PIL import Image

from inr_kernels.models.data import images

MAX_UPLOAD, MAX_MEGAPIXELS = 1, 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With pictures: a JPEG, a PNG with 16 bits, one with too many pixels, one that is a text, and one too large."""
    folder = tmp_path_factory.mktemp("app")
    y, x = numpy.mgrid[:90, :120]
    colours = numpy.stack((2 * x, 2 * y, 255 - x - y), -1).astype(numpy.uint8)
    Image.fromarray(colours).save(folder / "photo.jpg", exif=Image.Exif())
    Image.fromarray(colours[..., 0].astype(numpy.uint16) * 257).save(folder / "grey.png")
    Image.fromarray(colours).resize((640, 480)).save(folder / "large.jpg")
    Image.new("L", (1000, 600)).save(folder / "wide.png")
    (folder / "letter.jpg").write_text("Dear reader, this is <b>no picture</b>.")
    (folder / "long.bmp").write_bytes(bytes(MAX_UPLOAD + 1 << 20))
    return folder


@pytest.fixture(scope="module")
def address(folder):
    """Of the command, which in all tests asks nothing of other machines."""
    limits = ("--max-upload", MAX_UPLOAD, "--max-megapixels", MAX_MEGAPIXELS)
    with app(folder / "outside.txt", *limits) as address:
        yield address
    assert not (folder / "outside.txt").exists(), (folder / "outside.txt").read_text()


@pytest.fixture(scope="module")
def page(folder, address):
    """The page, which in all tests asks nothing of other machines."""
    with chromium(folder) as (browser, downloads):
        page = Page(browser, address, downloads)
        yield page
        asked = page.requests()
        assert any(url.startswith(address) for url in asked)
        assert not [url for url in asked if not url.startswith((address, "data:", "blob:", "chrome:"))]


def by_command(page, picture):
    """Runs the command line that the page shows on the picture, with the page's mask; returns its words and output."""
    words = page.wait_for("The same on the command line:").rpartition("inr-kernels ")[2].split()
    assert words[1] == picture.name
    words[1] = picture
    if "--mask" in words:
        words[words.index("--mask") + 1] = page.download("mask")
    output = picture.with_name(f"by_command_{words[-1]}")
    assert run(*words[:-1], output) == 0
    return words, output.read_bytes()


def test_what_the_page_makes_equals_what_the_commands_write(page, folder):
    """Bit for bit; three pictures and three networks, without loading the page again."""
    picture = page.show(folder / "photo.jpg")
    page.fill((60, 20), (-20, 30))
    words, expected = by_command(page, picture)
    assert words[0] == "inpaint" and "dear" in words and "--tile" in words
    made = page.download("download")
    assert made.name == f"{picture.stem}_filled.jpg" and made.read_bytes() == expected
    mask = numpy.asarray(Image.open(words[words.index("--mask") + 1]))
    assert mask.shape == (90, 120) and {*numpy.unique(mask)} == {0, 255} and 0.001 < (mask > 0).mean() < 0.5

    picture = page.show(folder / "grey.png")
    assert not page.all("#download:enabled")
    page.choose("IN2")
    page.fill((30, 0))
    words, expected = by_command(page, picture)
    filled = page.download("download")
    assert "in2" in words and filled.read_bytes() == expected
    assert images.read(filled, 1e6).depth == 16

    page.press("resume")
    page.wait_for("Fill", "#run")
    page.wait(lambda: not page.all("#download:enabled"), "the result as the picture")
    page.choose("LIIF")
    page.wait_for("Enlarge", "#run")
    page.press("run")
    words, expected = by_command(page, filled)
    assert words[0] == "upscale" and words[-4:-2] == ["--scale", "2"]
    made = page.download("download")
    with Image.open(made) as large:
        assert made.read_bytes() == expected and large.size == (240, 180)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("letter.jpg", "input letter.jpg: not a picture in a format that is read: PNG, JPEG"),
        ("wide.png", "input wide.png: 1000 x 600 pixels are more than the limit of 0.5 megapixels"),
        ("long.bmp", "exceed the maximum allowed size of 1.0 Mb"),
    ],
    ids=["letter", "wide", "long"],
)
def test_a_file_that_cannot_be_used_is_an_error_on_the_page(page, folder, file, message):
    """The picture that was loaded before stays."""
    picture = page.show(folder / "photo.jpg")
    page.load(folder / file)
    assert message in page.error()
    assert picture.name in page.all("#status")[0].text


def test_work_without_a_mask_is_an_error_on_the_page(page, folder):
    page.show(folder / "photo.jpg")
    page.choose("DEAR")
    page.wait_for("Fill", "#run")
    page.paint((30, 10))
    page.all("#editor [aria-label='Clear canvas']")[0].click()
    page.press("run")
    assert "Paint over what is to be filled" in page.error()
    assert page.all("#run:enabled")


def test_work_is_stopped_and_waits_for_other_work(page, folder, address):
    """In two windows: what the first one computes is stopped, then the second one's turn comes."""
    browser = page.driver
    page.show(folder / "large.jpg")
    page.all("#fast input")[0].click()  # the whole picture, which takes minutes
    page.fill((60, 20))
    page.wait_for("%", "#slider")
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    other = Page(browser, address, page.downloads)
    other.show(folder / "photo.jpg")
    other.fill((60, 20))
    other.wait_for("queue: 1/1", "#slider")
    second = browser.current_window_handle
    browser.switch_to.window(first)
    page.press("stop")
    page.wait_for("Stopped.")
    assert page.all("#run:enabled") and not page.all("#stop:enabled")
    browser.switch_to.window(second)
    other.wait_for("The same on the command line:")
    browser.close()
    browser.switch_to.window(first)
    page.all("#fast input")[0].click()


def test_pictures_are_pasted_and_dropped(page, folder):
    """By events as a browser sends them, with a file in them."""
    page.show(folder / "photo.jpg")
    script = """
        const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
        const files = new DataTransfer();
        files.items.add(new File([bytes], arguments[1], { type: "image/png" }));
        const options = { bubbles: true, cancelable: true, clipboardData: files, dataTransfer: files };
        document.body.dispatchEvent(new (arguments[2] == "drop" ? DragEvent : ClipboardEvent)(arguments[2], options));
    """
    contents = base64.b64encode((folder / "grey.png").read_bytes()).decode()
    for event in ("paste", "drop"):
        page.driver.execute_script(script, contents, f"{event}.png", event)
        page.wait_for(f"{event}.png")


def test_only_this_machine_reaches_the_page(address):
    """By its own name only: a site that gives this machine a name of its own cannot use the page."""
    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))
    request = urllib.request.Request(address, headers={"Host": f"site.example:{port}"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)


def test_errors_of_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")  # so that what the command sets does not stay
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(capsys, 1, f"127.0.0.1:{port}: Address already in use", "app", "--port", port)
    assert_refused(capsys, 1, "none.pt: No such file or directory", "app", "--model", "none.pt", "--port", 0)
    assert_refused(capsys, 2, "argument --port: must be at most 65535; got 70000", "app", "--port", 70000)
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("inr_kernels.app.page", "inr_kernels.app.server"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert_refused(capsys, 1, r"app needs gradio: pip install 'inr-kernels\[app\]'", "app")
