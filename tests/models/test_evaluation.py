"""Evaluation on folders: pairs, settings, input processing, tables."""

import math

import numpy
import pytest
import torch
from PIL import Image

from inr_kernels.models import DEAR, LIIF, DEARConfig, LIIFConfig
from inr_kernels.models.data import folders
from inr_kernels.models.evaluation import report
from inr_kernels.models.evaluation.baselines import baselines, mean_fill
from inr_kernels.models.evaluation.fitting import FITS, fitted
from inr_kernels.models.evaluation.metrics import CONVENTIONS, compare
from inr_kernels.models.evaluation.run import Options, Results, Row, evaluate, method_of
from inr_kernels.models.evaluation.samples import PRESETS, Case, Item, load, middle, pair


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*names, size=(16, 20), value=None):
    """Writes pictures of random pixels, or of one value; size: (height, width)."""
    for name in names:
        path = folders.Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = numpy.random.default_rng(len(path.name))
        shape = (*size, 3) if value is None else size
        pixels = rng.integers(0, 256, shape, dtype=numpy.uint8)
        Image.fromarray(pixels if value is None else numpy.full(shape, value, numpy.uint8)).save(path)


def pairs(*args, **options):
    messages = []
    items = pair(*args, report=messages.append, **options)
    return [(item.name, item.mask, *item.predictions.values()) for item in items], messages


def test_pictures_of_a_folder():
    write("in/b.png", "in/sub/a.jpg")
    for other in ("in/note.txt", "in/.hidden.png"):
        folders.Path(other).write_text("")
    found = folders.pictures("in")
    assert [(name, str(path)) for name, path in found.items()] == [("b", "in/b.png"), ("sub/a", "in/sub/a.jpg")]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ([], NotADirectoryError, "in: must be a folder of pictures"),
        (["in/sub/a.txt"], ValueError, "in: must have pictures, with a suffix of"),
        (["in/a.png", "in/a.jpg"], ValueError, r"in/a.jpg and a.png: must differ in more than the suffix"),
    ],
)
def test_folders_that_do_not_fit(names, error, message):
    for name in names:
        folders.Path(name).parent.mkdir(parents=True, exist_ok=True)
        folders.Path(name).write_text("")
    with pytest.raises(error, match=message):
        folders.pictures("in")


def test_pairs_by_name():
    write(
        "in/a.png", "in/b.png", "in/c.png", "masks/a.jpg", "masks/b_mask000.png", "masks/b_mask001.png", "masks/d.png"
    )
    write("out/a.png", "out/b.png", "out/b_mask001.png", "out/e.png")
    found, messages = pairs("in", "masks", predictions={"ours": "out"})
    path = folders.Path
    assert found == [
        ("a", path("masks/a.jpg"), path("out/a.png")),
        ("b_mask000", path("masks/b_mask000.png"), path("out/b.png")),
        ("b_mask001", path("masks/b_mask001.png"), path("out/b_mask001.png")),
    ]
    assert messages == [
        "in/c.png: has no mask",
        "masks/d.png: belongs to no picture",
        "out/e.png: belongs to no picture",
    ]
    assert pairs("in", predictions={"ours": "out"})[1][0] == "in/c.png: has no partner in ours"


def test_masks_beside_their_pictures():
    """As LaMa has them."""
    write("in/a_crop000.png", "in/a_crop000_mask000.png", "in/b.png")
    found, messages = pairs("in", "in")
    assert found == [("a_crop000_mask000", folders.Path("in/a_crop000_mask000.png"))]
    assert messages == ["in/b.png: has no mask"]


def test_no_pairs():
    write("in/a.png", "masks/b.png")
    with pytest.raises(ValueError, match="in: no picture has a partner of its name"):
        pair("in", "masks")


@pytest.mark.parametrize(
    ("case", "image", "target"),
    [
        (Case(), (33, 40), (33, 40)),
        (Case.of_size((24, 18)), (24, 18), (24, 18)),
        (Case.of_scale(3.5), (9, 11), (32, 38)),
    ],
)
@pytest.mark.parametrize("kind", [None, "strokes", "file"])
def test_samples(case, image, target, kind):
    write("a.png", size=(33, 40))
    write("mask.png", size=(33, 40), value=255)
    mask = folders.Path("mask.png") if kind == "file" else kind
    sample, again = (load(Item("a", folders.Path("a.png"), mask), case, 0, 1e6) for _ in range(2))
    assert sample.image.shape == (1, 3, *image) and sample.target.shape == (1, 3, *target)
    if kind is None:
        assert sample.mask is None
        return
    assert sample.mask.shape == (1, 1, *image) and torch.equal(sample.mask, again.mask)
    assert not sample.image[sample.mask.expand_as(sample.image) > 0].any(), "no method sees what is missing"
    assert sample.mask.mean() > 0.15 and (kind == "strokes" or sample.mask.all())


def test_masks_depend_on_the_name_and_the_seed():
    write("a.png", size=(33, 40))
    arguments = [("a", 0), ("b", 0), ("a", 1)]
    drawn = [load(Item(name, folders.Path("a.png"), "noise"), Case(), seed, 1e6).mask for name, seed in arguments]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_the_middle_keeps_the_aspect_ratio():
    photo = Image.linear_gradient("L").crop((0, 0, 256, 128))
    wide, square = middle(photo, (64, 128)), middle(photo, (64, 64))
    assert numpy.array_equal(numpy.asarray(wide)[:, 32:96], numpy.asarray(square))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(13, 21), (40, 30)])
def test_fits(fit, size):
    """The network sees a valid size, the known pixels stay, and the holes get what it gave, at their places."""
    image, mask = torch.rand(1, 3, *size), torch.zeros(1, 1, *size)
    mask[..., 3:7, 5:9] = 1
    seen = []

    def network(picture, holes, shape):
        seen.append(shape)
        assert picture.shape[2:] == holes.shape[2:] == torch.Size(shape)
        assert holes.any() and set(holes.unique().tolist()) == {0, 1}
        return picture * (1 - holes) + 0.7 * holes

    out = fitted(network, fit, 24)(image, mask, size)
    expected = {"origin": size, "modulo": tuple(-(-n // 8) * 8 for n in size)}.get(fit, (24, 24))
    assert seen == [expected] and out.shape == image.shape
    assert torch.equal(out[..., 10:, :], image[..., 10:, :])
    assert (out[..., 4:6, 6:8] - 0.7).abs().max() < (1e-6 if fit in ("origin", "modulo") else 0.15)


def test_padding_of_lama():
    """numpy's mode "symmetric"."""
    image = torch.arange(3 * 5 * 9.0).view(1, 3, 5, 9) / 200
    seen = {}
    fitted(lambda picture, holes, size: seen.update(picture=picture) or picture, "modulo")(image, image[:, :1], (5, 9))
    expected = numpy.pad(image.numpy(), [(0, 0), (0, 0), (0, 3), (0, 7)], mode="symmetric")
    assert numpy.array_equal(seen["picture"].numpy(), expected)


def test_fits_are_for_filling():
    with pytest.raises(ValueError, match="fit must be origin for images that are enlarged; got resize"):
        fitted(lambda *_: None, "resize")(torch.rand(1, 3, 8, 8), None, (16, 16))
    with pytest.raises(ValueError, match="fit must be one of origin, modulo"):
        fitted(lambda *_: None, "crop")


@pytest.mark.parametrize(
    ("fill", "larger", "names"),
    [
        (True, False, ["mean colour", "smooth fill", "Telea"]),
        (False, True, ["bicubic", "nearest"]),
        (True, True, [*(f"{n}, bicubic" for n in ("mean colour", "smooth fill", "Telea")), "smooth fill, nearest"]),
        (False, False, []),
    ],
)
def test_baselines(fill, larger, names):
    methods = baselines(fill, larger)
    assert [*methods] == names
    assert not any("Telea" in name for name in baselines(fill, larger, ["Telea"]))
    size = (24, 36) if larger else (12, 18)
    mask = torch.zeros(1, 1, 12, 18)
    mask[..., 4:6, 3:9] = 1
    for method in methods.values():
        image = torch.full((1, 3, 12, 18), 0.4)
        out = method(image * (1 - mask), mask, size) if fill else method(image, None, size)
        assert out.shape == (1, 3, *size) and (out - 0.4).abs().max() < 0.01


def test_mean_of_nothing_is_black():
    assert not mean_fill(torch.rand(1, 3, 4, 4), torch.ones(1, 1, 4, 4)).any()


def test_evaluate():
    """A damaged picture and an output of another size are named, and the rest goes on; a fill of the original's
    pixels is exact.
    """
    write("in/a.png", "in/b.png", "out/a.png")
    write("out/b.png", size=(9, 9))
    folders.Path("in/c.png").write_bytes(b"")
    folders.Path("out/c.png").write_bytes(b"")
    messages, done = [], []
    items = pair("in", kind="strokes", predictions={"theirs": "out"})
    methods = {"black": lambda image, mask, size: image}
    results = evaluate(items, methods, Options(), messages.append, lambda: done.append(1))
    assert messages == [
        "b, theirs: the output must have the target's size 20x16; got 9x9",
        "in/c.png: the file is empty",
    ]
    assert len(done) == 3
    lines = {line.method: line for line in report.overall(results)}
    assert [(name, line.pictures) for name, line in lines.items()] == [
        ("theirs", 1), ("black", 2), ("mean colour", 2), ("smooth fill", 2), ("Telea", 2)
    ]  # fmt: skip
    assert lines["theirs"].values["psnr"] == math.inf
    sample = load(items[0], Case(), 0, 1e6)
    assert results.rows[1].values == compare(sample.image, sample.target, sample.mask)
    assert evaluate(items, {}, Options(without=None)).rows == [results.rows[0]]


def test_cases_and_borders():
    """A network that enlarges, without masks, and one that does both; LIIF's convention leaves out the scale."""
    write("in/a.png", size=(48, 40))
    liif = LIIF(LIIFConfig(blocks=1, features=8, hidden=(16,))).eval()
    dear = DEAR(DEARConfig(channels=16, features=8, blocks=1, filter_blocks=1, hidden=(16,))).eval()
    options = Options([Case.of_scale(2), Case.of_scale(3)], CONVENTIONS["liif"])
    methods = {"liif": method_of(liif), "dear": method_of(dear)}
    results = evaluate(pair("in"), methods, options)
    assert [(line.case, line.method) for line in report.overall(results)] == [
        (f"×{scale}", name) for scale in (2, 3) for name in ("liif", "dear", "bicubic", "nearest")
    ]
    sample = load(pair("in")[0], Case.of_scale(3), 0, 1e6)
    output = liif.upscale(sample.image, size=(48, 39))
    assert results.rows[4].values == compare(output, sample.target, None, CONVENTIONS["liif"], 3)
    messages = []
    filled = evaluate(pair("in", kind="strokes"), methods, options, messages.append)
    assert messages == ["a, liif: LIIF does not fill holes"]
    assert "psnr_holes" in filled.rows[0].values and filled.rows[0].method == "dear"


def test_perceptual_metrics_are_added():
    """With simple functions in place of the networks; FID compares each method with all originals."""
    write("in/a.png", "in/bb.png", "in/ccc.png")
    options = Options(
        lpips=lambda x, y: (x - y).abs().amax((1, 2, 3)),
        inception=lambda x: x.mean((2, 3)),
        convention=CONVENTIONS["dear"],
    )
    methods = {"same": lambda image, mask, size: image, "dark": lambda image, mask, size: image - 0.1}
    results = evaluate(pair("in"), methods, options)
    assert results.fid["", "same"] == pytest.approx(0, abs=1e-9)
    assert results.fid["", "dark"] > 0.01
    assert [line.values["lpips"] for line in report.overall(results)] == [0, pytest.approx(0.1, abs=1e-6)]
    assert math.isnan(evaluate(pair("in")[:1], methods, options).fid["", "dark"])


def test_presets_are_the_papers():
    assert [case.name for case in PRESETS["in2"]][3:6] == ["1024 × 576", "1024 × 1024", "443 × 591"]
    assert [case.size for case in PRESETS["in2"]][3] == (1024, 576) and len(PRESETS["in2"]) == 8
    assert [case.scale for case in PRESETS["dear"]] == [1.5, 2, 3.5, 4, 5.5, 6, 7.5, 8]


ROWS = [
    Row("", "a", "x", 0.05, {"psnr": 20.0, "psnr_holes": 10.0, "l1": 0.1}),
    Row("", "a", "y", 0.251, {"psnr": 30.0, "psnr_holes": math.nan, "l1": 0.3}),
    Row("", "b|c", "y", 1.0, {"psnr": math.inf, "psnr_holes": 12.0, "l1": 0.0}),
]


def test_tables():
    results = Results(ROWS, {("", "a"): 7.0})
    text = report.document(results, ["About."], 4)
    assert text == (
        "About.\n\n"
        "| method | PSNR, dB ↑ | PSNR in holes, dB ↑ |   L1 ↓ | FID ↓ | pictures |\n"
        "|--------|-----------:|--------------------:|-------:|------:|---------:|\n"
        "| a      |      25.00 |               10.00 | 0.2000 |  7.00 |        2 |\n"
        "| b\\|c   |        inf |               12.00 | 0.0000 |     – |        1 |\n\n"
        "| missing  | method | PSNR, dB ↑ | PSNR in holes, dB ↑ |   L1 ↓ | pictures |\n"
        "|----------|--------|-----------:|--------------------:|-------:|---------:|\n"
        "| 0–25 %   | a      |      20.00 |               10.00 | 0.1000 |        1 |\n"
        "| 25–50 %  | a      |      30.00 |                   – | 0.3000 |        1 |\n"
        "| 75–100 % | b\\|c   |        inf |               12.00 | 0.0000 |        1 |\n"
    )
    assert report.pictures_csv(results).splitlines()[:3] == [
        "case,method,picture,share,psnr,psnr_holes,l1", ",a,x,0.05,20,10,0.1", ",a,y,0.251,30,,0.3"
    ]  # fmt: skip
    assert report.table_csv(report.overall(results)).splitlines()[1] == ",,a,2,25,10,0.2,7"


@pytest.mark.parametrize(
    "rows",
    [ROWS, ROWS[:1], [row._replace(case=case) for case in ("×2", "×3") for row in ROWS]],
    ids=["areas", "pictures", "cases"],
)
def test_the_plot_is_a_picture(rows):
    data = report.plot(Results(rows), 4)
    with Image.open(report.io.BytesIO(data)) as image:
        image.load()
        assert image.format == "PNG" and image.size == (1200, 675)
        assert len(image.getcolors(1 << 20)) > 20
