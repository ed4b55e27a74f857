"""`inr-kernels upscale` and `inpaint` of folders."""

import os
import re
import threading

import numpy
import pytest
import torch
from command_line import run
from PIL import Image

from inr_kernels.cli import folders, inpaint, pictures, upscale
from inr_kernels.models import DEAR, IN2, LIIF, LIIFConfig
from inr_kernels.models.common.surroundings import fill_surroundings
from inr_kernels.models.data import images

SIDES = {"a.png": (9, 14), "b.jpg": (12, 10), "c.gif": (9, 14), "sub/a.PNG": (10, 11)}  # height, width


def noise(*sides):
    return numpy.random.default_rng(sum(sides)).integers(60, 190, (*sides, 3), numpy.uint8)


def save(name, samples):
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    Image.fromarray(samples).save(name)


def holes(height, width):
    mask = numpy.zeros((height, width), numpy.uint8)
    mask[2:6, 3:8] = 255
    return mask


def pixels(path):
    with Image.open(path) as image:
        return numpy.asarray(image.convert("RGB"))


def tree(folder):
    return sorted(os.path.relpath(os.path.join(at, name), folder) for at, _, names in os.walk(folder) for name in names)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Runs each test in its own folder with pictures, masks and a small LIIF."""
    monkeypatch.chdir(tmp_path)
    for name, sides in SIDES.items():
        save(f"photos/{name}", noise(*sides))
    for stem, sides in (("a", (9, 14)), ("b", (12, 10)), ("c", (9, 14))):
        save(f"masks/{stem}.png", holes(*sides))
    (tmp_path / "photos/.hidden.png").write_bytes(b"no picture")
    (tmp_path / "photos/notes.txt").touch()
    LIIF(LIIFConfig(blocks=1, features=4, hidden=(8,))).save("liif.safetensors")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path


def enlarge(*words, status=0):
    assert run("upscale", *words, "--scale", "2", "--model", "liif.safetensors") == status


def fill(*words, status=0):
    assert run("inpaint", *words, "--model", "in2") == status


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["photos"], ["a.png", "b.jpg", "c.png"]),
        (["photos", "--recursive"], ["a.png", "b.jpg", "c.png", "sub/a.PNG"]),
        (["photos/*.[jg]*"], ["b.jpg", "c.png"]),
        (["photos/**/a.*"], ["a.png", "sub/a.PNG"]),
        (["photos/a.png", "photos/b.jpg"], ["a.png", "b.jpg"]),
        (["photos/sub", "photos/b.jpg"], ["a.PNG", "b.jpg"]),
        (["photos/a.png"], ["a.png"]),
        (["photos", "--format", "webp", "--suffix", "_x2"], ["a_x2.webp", "b_x2.webp", "c_x2.webp"]),
    ],
)
def test_outputs(words, expected, capsys):
    enlarge(*words, "-o", "new/large/")
    assert tree("new/large") == expected
    assert capsys.readouterr().err == f"inr-kernels: new/large/: {len(expected)} written\n"


def test_equals_single_files():
    enlarge("photos", "--recursive", "-o", "large")
    for name in SIDES:
        kept = name.replace(".gif", ".png")
        enlarge(f"photos/{name}", "-o", "one" + os.path.splitext(kept)[1].lower())
        assert numpy.array_equal(pixels(f"large/{kept}"), pixels("one" + os.path.splitext(kept)[1].lower()))


def test_masks_by_name(capsys, folder):
    os.rename("masks/b.png", "masks/b_mask000.png")
    fill("photos", "--mask", "masks", "-o", "filled", "--format", "png")
    assert tree("filled") == ["a.png", "b.png", "c.png"]
    for stem, name in (("a", "a.png"), ("b", "b.jpg"), ("c", "c.gif")):
        known = holes(*SIDES[name]) == 0
        had, out = pixels(f"photos/{name}"), pixels(f"filled/{stem}.png")
        assert (had[known] == out[known]).all() and (had[~known] != out[~known]).mean() > 0.9
    capsys.readouterr()
    save("masks/a_mask001.png", holes(9, 14))
    os.remove("masks/c.png")
    fill("photos", "--mask", "masks/*", "-o", "again", status=1)
    assert tree("again") == ["b.jpg"]
    assert capsys.readouterr().err.splitlines() == [
        "inr-kernels: photos/a.png: has several masks: masks/a.png, masks/a_mask001.png",
        "inr-kernels: photos/c.gif: has no mask in masks/*",
        "inr-kernels: again: 1 written, 2 failed",
    ]


def test_masks_beside_their_pictures():
    save("photos/a_mask.png", holes(9, 14))
    save("photos/b_mask000.png", holes(12, 10))
    save("photos/c_mask.png", holes(9, 14))
    fill("photos", "--mask", "photos", "-o", "filled")
    assert tree("filled") == ["a.png", "b.jpg", "c.png"]


def test_one_mask_for_all_and_failures(capsys, folder):
    """Failures are listed at the end; the rest is done."""
    whole = (folder / "photos/a.png").read_bytes()
    (folder / "photos/cut.png").write_bytes(whole[: len(whole) // 2])
    fill("photos", "--mask", "masks/a.png", "-o", "filled", status=1)
    assert tree("filled") == ["a.png", "c.png"]
    first, second, last = capsys.readouterr().err.splitlines()
    assert first == "inr-kernels: photos/b.jpg: mask masks/a.png: must have the input's size 10x12; got 14x9"
    assert second.startswith("inr-kernels: photos/cut.png: ") and ("truncated" in second or "broken" in second)
    assert last == "inr-kernels: filled: 2 written, 2 failed"


def test_finished_files_are_skipped(capsys, folder):
    save("large/a.png", noise(3, 3))
    enlarge("photos", "-o", "large")
    assert capsys.readouterr().err == "inr-kernels: large: 2 written, 1 skipped\n"
    assert pixels("large/a.png").shape == (3, 3, 3)
    enlarge("photos", "-o", "large", "--overwrite")
    assert pixels("large/a.png").shape == (18, 28, 3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_continues(error, monkeypatch):
    """What was computed is written; the next start makes the rest."""
    compute, made = upscale.Upscaling.compute, []

    def interrupted(self, group, progress):
        if len(made) == 2:
            raise error(130)
        made.extend(job.names.input for job in group)
        return compute(self, group, progress)

    monkeypatch.setattr(upscale.Upscaling, "compute", interrupted)
    enlarge("photos", "-o", "large", status=130)
    assert tree("large") == ["a.png", "b.jpg"]
    monkeypatch.setattr(upscale.Upscaling, "compute", compute)
    times = [os.stat(f"large/{name}").st_mtime_ns for name in tree("large")]
    enlarge("photos", "-o", "large")
    assert tree("large") == ["a.png", "b.jpg", "c.png"]
    assert times == [os.stat(f"large/{name}").st_mtime_ns for name in ("a.png", "b.jpg")]


def test_a_full_disk_ends_the_run(monkeypatch, capsys):
    def replace(path, data):
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(pictures, "replace_file", replace)
    enlarge("photos", "-o", "large", status=1)
    assert capsys.readouterr().err == "inr-kernels: large/a.png: No space left on device\n"


def test_processes_share_the_pictures(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, made in enumerate((["a.png", "c.png"], ["a.png", "b.jpg", "c.png", "sub/a.PNG"])):
        monkeypatch.setenv("RANK", str(rank))
        enlarge("photos", "--recursive", "-o", "large")
        assert tree("large") == made
    monkeypatch.setenv("RANK", "2")
    enlarge("photos", "-o", "large", status=1)


def test_the_first_process_reports_for_all(monkeypatch, capsys):
    """Under torchrun, which ends all processes as soon as one fails: each waits for the others before it exits."""
    results = []

    def gather(gathered, own):
        results.append(own)
        gathered[:] = [*results] * (len(gathered) // len(results))

    monkeypatch.setattr(folders.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(folders.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(folders.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(folders.dist, "all_gather_object", gather)
    monkeypatch.setenv("WORLD_SIZE", "2")
    os.rename("masks/b.png", "masks/none.png")
    save("masks/c.png", holes(8, 8))
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        fill("photos", "--mask", "masks", "-o", "filled", status=int(rank == "0"))
        if rank == "1":
            assert capsys.readouterr().err == ""
    assert capsys.readouterr().err.splitlines() == [
        "inr-kernels: photos/c.gif: mask masks/c.png: must have the input's size 14x9; got 8x8",
        "inr-kernels: photos/b.jpg: has no mask in masks",
        "inr-kernels: filled: 1 written, 2 failed",
    ]


@pytest.mark.parametrize(("size", "groups"), [(1, [1] * 5), (2, [2, 1, 2]), (3, [3, 2]), (9, [3, 2])])
def test_batches_of_equal_size(monkeypatch, size, groups):
    save("photos/d.png", noise(9, 14))
    save("photos/e.png", noise(12, 10))
    compute, seen = upscale.Upscaling.compute, []

    def watched(self, group, progress):
        seen.append(len(group))
        return compute(self, group, progress)

    enlarge("photos", "-o", "one")
    monkeypatch.setattr(upscale.Upscaling, "compute", watched)
    enlarge("photos", "-o", "large", "--batch-size", size)
    assert sorted(seen) == sorted(groups) and tree("large") == tree("one")
    for name in tree("one"):
        assert abs(pixels(f"large/{name}").astype(int) - pixels(f"one/{name}")).max() <= 1


@pytest.mark.parametrize("broken", [False, True])
def test_a_batch_that_fails_is_computed_one_by_one(monkeypatch, capsys, broken):
    compute = inpaint.Inpainting.compute

    def failing(self, group, progress):
        if len(group) > 1 or (broken and group[0].names.input == "photos/c.gif"):
            raise RuntimeError("out of memory")
        return compute(self, group, progress)

    monkeypatch.setattr(inpaint.Inpainting, "compute", failing)
    fill("photos", "--mask", "masks", "-o", "filled", "--batch-size", "2", status=int(broken))
    assert tree("filled") == ["a.png", "b.jpg"] + ["c.png"] * (not broken)
    assert ("photos/c.gif: out of memory" in capsys.readouterr().err) == broken


def test_reading_computing_and_writing_overlap(monkeypatch):
    """The second picture is decoded before the first is computed, which is written while the second is computed."""
    decoded, computing, written = threading.Event(), threading.Event(), threading.Event()
    decode, compute, write = upscale.Upscaling.decode, upscale.Upscaling.compute, pictures.write

    def watched_decode(self, job):
        decode(self, job)
        if job.names.input == "photos/b.jpg":
            decoded.set()

    def watched_compute(self, group, progress):
        if group[0].names.input == "photos/a.png":
            assert decoded.wait(20)
        if group[0].names.input == "photos/b.jpg":
            computing.set()
            assert written.wait(20)
        return compute(self, group, progress)

    def watched_write(job, colour):
        assert computing.wait(20)
        write(job, colour)
        written.set()

    monkeypatch.setattr(upscale.Upscaling, "decode", watched_decode)
    monkeypatch.setattr(upscale.Upscaling, "compute", watched_compute)
    monkeypatch.setattr(pictures, "write", watched_write)
    enlarge("photos", "-o", "large")
    assert tree("large") == ["a.png", "b.jpg", "c.png"]


def test_the_bar_covers_the_folder(monkeypatch, folder):
    (folder / "photos/cut.png").write_bytes(b"no picture")
    seen, texts = [], []

    class Bar(folders.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": False})

        def update(self, n=1):
            super().update(n)
            seen.append(self.n)
            texts.append(str(self))

    monkeypatch.setattr(folders, "tqdm", Bar)
    enlarge("photos", "-o", "large", status=1)
    assert seen == sorted(seen) and seen[-1] == 4 and len(seen) > 8
    assert "0 of 4 pictures" in texts[0] and texts[-1].startswith("100%") and "4 of 4 pictures" in texts[-1]


def test_too_large_pictures_fail_alone(capsys):
    save("photos/large.png", noise(400, 500))
    enlarge("photos", "-o", "large", "--max-memory", "0.01", "--workspace", "1", status=1)
    assert tree("large") == ["a.png", "b.jpg", "c.png"]
    assert "photos/large.png: an output of 1000x800 from an input of 500x400 needs" in capsys.readouterr().err


def test_the_same_folder_needs_a_suffix(capsys):
    enlarge("photos", "-o", "photos", status=2)
    enlarge("photos", "-o", "photos/../photos", "--format", "png", status=2)
    before = tree("photos")
    for _ in range(2):  # outputs of the first run are no inputs of the second
        enlarge("photos", "-o", "photos", "--suffix", "_x2")
        assert tree("photos") == sorted([*before, "a_x2.png", "b_x2.jpg", "c_x2.png"])
    assert "skipped" in capsys.readouterr().err.splitlines()[-1]
    enlarge("photos", "--recursive", "-o", "photos/large", "--suffix", "_x4")
    assert len(tree("photos/large")) == 7
    enlarge("photos", "--recursive", "-o", "photos/large", "--suffix", "_x4")  # whose outputs are no inputs, either
    assert len(tree("photos/large")) == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos", "-o", "out.png"], "output must be a folder for a folder or several pictures; got out.png"),
        (["photos", "-o", "liif.safetensors"], "output must be a folder .* got liif.safetensors"),
        (["photos", "-o", "-"], "output must be a folder .* got -"),
        (["photos", "-"], "input must be files or a folder where the output is a folder; got -"),
        (["photos", "photos/sub"], "photos/a.png and photos/sub/a.PNG would have one output, new/a.webp"),
        (["photos", "--suffix", "a/b"], "argument --suffix: must be a part of a name, e.g. _large; got a/b .*"),
        (["photos", "--suffix", ".png"], "argument --suffix: .* got .png [(]--format sets the format[)]"),
        (["photos", "none"], "input none: No such file or directory"),
        (["none*.png"], "input none[*].png: no file has this pattern"),
        (["masks/.."], "masks/..: holds no pictures; --recursive searches subfolders"),
        (["photos", "--batch-size", "0"], "argument --batch-size: must be a positive integer; got 0"),
        (["photos", ""], "the name of the input is empty"),
    ],
)
def test_mistakes(words, message, capsys):
    before = tree(".")
    assert run("upscale", "-o", "new", "--format", "webp", "--scale", "2", "--model", "liif.safetensors", *words) > 0
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"inr-kernels: {message}", line)
    assert tree(".") == before


def test_outputs_do_not_replace_masks(capsys):
    before = tree(".")
    fill("photos", "--mask", "masks", "-o", "masks", "--format", "png", "--overwrite", status=2)
    assert "output must be another folder than the masks'; got masks" in capsys.readouterr().err
    assert tree(".") == before


def test_crops():
    """Of a large picture with small holes the network sees their surroundings only."""
    picture, mask = noise(40, 90), numpy.zeros((40, 90), numpy.uint8)
    mask[10:14, 10:20] = mask[30:34, 70:80] = 255
    save("large/p.png", picture)
    save("holes.png", mask)
    words = ["--mask", "holes.png", "--hd-strategy", "crop", "--hd-strategy-crop-margin", "9"]
    fill("large", *words, "--hd-strategy-crop-trigger-size", "89", "-o", "cropped")
    fill("large/p.png", *words, "--hd-strategy-crop-trigger-size", "89", "-o", "cropped.png")
    fill("large", *words, "--hd-strategy-crop-trigger-size", "90", "-o", "whole")
    model, image = IN2.pretrained(), images.read("large/p.png", 1e6).colour
    holes_ = torch.from_numpy(mask / 255).float()[None, None]
    expected = fill_surroundings(lambda *part: model.inpaint(*part[:2]), image, holes_, 9)
    for name in ("cropped/p.png", "cropped.png"):
        torch.testing.assert_close(images.read(name, 1e6).colour, expected, rtol=0, atol=0.51 / 255)
    whole = images.read("whole/p.png", 1e6).colour
    torch.testing.assert_close(whole, model.inpaint(image, holes_), rtol=0, atol=0.51 / 255)
    assert not torch.equal(whole, images.read("cropped.png", 1e6).colour)


def test_crops_need_less_memory(capsys):
    save("large.png", noise(300, 900))
    mask = numpy.zeros((300, 900), numpy.uint8)
    mask[100:104, 100:104] = 255
    save("holes.png", mask)
    words = ["large.png", "--mask", "holes.png", "-o", "out.png", "--workspace", "1", "--max-memory", "0.04"]
    fill(*words, status=1)
    assert "more than the limit of 0.04 GB" in capsys.readouterr().err
    fill(*words, "--hd-strategy", "crop", "--hd-strategy-crop-margin", "32")


def test_says_that_a_whole_picture_takes_long(capsys, monkeypatch):
    """DEAR's attention: once in a folder, and not of crops."""
    monkeypatch.setattr(DEAR, "inpaint", lambda self, image, *_, **__: image)
    save("large/a.png", noise(600, 900))
    save("large/b.png", noise(600, 900))
    save("holes.png", numpy.pad(holes(9, 14), ((0, 591), (0, 886))))
    assert run("inpaint", "large", "--mask", "holes.png", "-o", "out") == 0
    first, last = capsys.readouterr().err.splitlines()
    assert "large/a.png: takes about 28 times as long as with --tile 32" in first and last.endswith("2 written")
    assert run("inpaint", "large", "--mask", "holes.png", "-o", "new", "--hd-strategy", "crop") == 0
    assert "takes about" not in capsys.readouterr().err
