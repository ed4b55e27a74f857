"""The layout of the repository: which module imports which, what every op consists of, what is published."""

import ast
import re
from importlib.metadata import requires

import pytest
import torch
from tree import LIBRARY, OPS, ROOT, files, module_name

import inr_kernels
from bench.report import PAGES, render
from inr_kernels import cli
from inr_kernels._core import dispatch

README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
MODULES = {module_name(file) for file in LIBRARY} | {"inr_kernels._C"}
NETWORKS = {path.parent.name for path in ROOT.glob("models/*/network.py")} - {"common"}

# From the lowest to the highest: a module imports modules of lower layers only. <op>, inr_kernels and models are
# the __init__ of an op, of the package and of models/; models.training is what the recipes of the networks share.
OP_LAYERS = ["arguments", "triton_kernels", "reference", "op", "functional", "problems", "module", "<op>"]
# integrations.spandrel brings the networks to another project: it stands above them, and nothing imports it.
LAYERS = ["_C", "_core", *OP_LAYERS, "integrations", "inr_kernels", "models.common", "<network>", "models"]
LAYERS += ["integrations.spandrel"]
LAYERS += ["models.data", "models.evaluation", "models.training", "<recipe>", "app", "cli", "__main__"]
# Layers that not every higher layer may import.
IMPORTERS = {"_C": {"_core", "op"}, "triton_kernels": {"op"}, "reference": {"op", "functional"}}
IMPORTERS["integrations.spandrel"] = set()


def imports(file):
    """Every module that the file imports, at its top or inside a function."""
    package = module_name(file).split(".")
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the folder of the file, which for an __init__ is the module itself.
            above = node.level - file.endswith("__init__.py")
            base = package[: len(package) - above] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base


def location(module):
    """The layer of one of our modules, and the op or network that it belongs to, or ""."""
    first, second, third = [*module.split(".")[1:], "", "", ""][:3]
    if first in OPS:
        return second or "<op>", first
    if (first, second) == ("integrations", "spandrel"):
        return "integrations.spandrel", ""
    if first != "models":
        return first or "inr_kernels", ""
    if second in NETWORKS:
        return "<network>", second
    if second == "training" and third in NETWORKS:
        return "<recipe>", third
    shared = f"models.{second}"
    return shared if shared in LAYERS else "models", ""  # models/__init__.py and the aliases of moved modules


def allowed(importer, imported):
    """Whether a module of the one location may import a module of the other."""
    (upper, ours), (lower, theirs) = importer, imported
    if importer == imported:
        return True
    if upper in OP_LAYERS and lower in OP_LAYERS and ours != theirs:
        return False
    return upper in IMPORTERS.get(lower, {upper}) and LAYERS.index(upper) > LAYERS.index(lower)


@pytest.mark.parametrize("file", LIBRARY)
def test_imports_go_one_way(file):
    here = location(module_name(file))
    assert here[0] in LAYERS, f"{file} belongs to no layer"
    ours = [name for name in imports(file) if name.split(".")[0] == "inr_kernels"]
    wrong = [name for name in ours if not allowed(here, location(name))]
    assert not wrong, f"{file} must not import {wrong}"


def test_every_layer_has_modules():
    assert {location(module)[0] for module in MODULES} == set(LAYERS)


@pytest.mark.parametrize(
    ("importer", "imported", "expected"),
    [
        ("fourier_unit.op", "fourier_unit.triton_kernels", True),
        ("fourier_unit.functional", "fourier_unit.triton_kernels", False),
        ("fourier_unit.op", "fourier_unit.functional", False),
        ("fourier_unit.module", "unmask_attention.functional", False),
        ("fourier_unit.problems", "fourier_unit.functional", True),
        ("fourier_unit.problems", "fourier_unit.triton_kernels", False),
        ("_core.proof.problems", "fourier_unit.problems", False),
        ("integrations.liif", "local_implicit.op", True),
        ("integrations.liif", "models.liif.network", False),
        ("integrations.spandrel", "models.liif.network", True),
        ("integrations", "integrations.spandrel", False),
        ("models.dear.network", "models.common.graphs", True),
        ("models.dear.network", "models.data.masks", False),
        ("models.dear.network", "models.lama.ffc", False),
        ("models.in2.blocks", "models.lama.ffc", False),
        ("models.data.images", "models.evaluation.metrics", False),
        ("models.training.dear", "models.training.loop", True),
        ("models.training.dear", "models.training.in2", False),
        ("models.training.loop", "models.training.in2", False),
        ("cli.demo", "models.evaluation.metrics", True),
        ("cli.app", "app.page", True),
        ("app.page", "cli.pictures", False),
        ("models", "cli", False),
    ],
)
def test_the_rule_for_imports(importer, imported, expected):
    assert allowed(location(f"inr_kernels.{importer}"), location(f"inr_kernels.{imported}")) == expected


@pytest.mark.parametrize("file", LIBRARY)
def test_library_imports_only_installed_packages(file):
    heads = {name.split(".")[0] for name in imports(file)}
    assert not heads & {"models", "bench", "tests"}, "these exist in a checkout only"


def test_every_op_is_registered():
    """A folder may define several ops: fourier_unit has conv3x3 and conv2d too, local_implicit has local_texture."""
    assert set(OPS) <= set(dispatch.OPS)
    assert {op.function.__module__.split(".")[1] for op in dispatch.OPS.values()} == set(OPS)


def test_opcheck_runs_on_every_op():
    """Of forwards and of backwards; the backward of conv3x3 and conv2d consists of ops that have their own."""
    kinds = ("", "_backward", "_weight_gradient")
    names = {f"{op}{kind}" for op in dispatch.OPS for kind in kinds if hasattr(torch.ops.inr_kernels, f"{op}{kind}")}
    tests = "".join(path.read_text() for path in ROOT.glob("tests/ops/test_*.py"))
    assert set(re.findall(r"opcheck\(torch\.ops\.inr_kernels\.(\w+)\.default", tests)) == names


# Ops whose C++ kernels have other files.
SOURCES = {
    "fourier_unit": [
        "spectrum_product.cpp",
        "conv3x3.cpp",
        "weight_gradient.cpp",
        "conv2d.cpp",
        "strided.cpp",
        "pointwise.cpp",
    ]
}


def files_of(op):
    """The op's own files as CONTRIBUTING.md lists them; in a row, a name is in the folder of the row's first path."""
    for row in re.findall(r"^\| (`[^|]*<op>[^|]*) \|", CONTRIBUTING, re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", row.replace("<op>", op))
        folder = first.rpartition("/")[0]
        names = [first, *(f"{folder}/{name}" for name in others)]
        yield from (
            (f"{folder}/{name}" for name in SOURCES[op]) if folder == f"csrc/cpu/{op}" and op in SOURCES else names
        )


def test_files_of_an_op():
    """The table is found, with every kind of file."""
    folders = {name.rpartition("/")[0] for name in files_of("x")}
    assert folders == {"inr_kernels/x", "csrc/cpu/x", "tests/support", "tests/ops", "bench", "docs/ops"}
    assert {"csrc/cpu/x/backward.cpp", "inr_kernels/x/__init__.py", "tests/ops/test_x_contract.py"} <= {*files_of("x")}


@pytest.mark.parametrize("op", OPS)
def test_op_is_complete(op):
    """A module may be a folder of its name."""
    missing = [name for name in files_of(op) if not (ROOT / name).exists()]
    assert not [name for name in missing if not (ROOT / name).with_suffix("").is_dir()]


def test_public_names():
    names = {"LocalImplicitDecoder", "local_implicit_decode", "accelerate", "explain", "backend"}
    names |= {"LocalTextureDecoder", "local_texture_decode"}
    names |= {"ElementwiseFilter", "elementwise_filter", "pixelwise_reconstruct", "UnmaskAttention", "unmask_attention"}
    names |= {"NeighborhoodAttention1D", "NeighborhoodAttention2D", "merge_attentions", "neighborhood_attention_1d"}
    names |= {"neighborhood_attention_2d", "neighborhood_attention_2d_packed"}
    names |= {"NeighborhoodAttention3D", "neighborhood_attention_3d"}
    names |= {"FourierUnit", "fourier_unit", "release_memory", "prove"}
    assert set(inr_kernels.__all__) == names | {"__version__"}
    assert not [name for name in inr_kernels.__all__ if not hasattr(inr_kernels, name)]


@pytest.mark.parametrize("file", files("csrc"))
def test_csrc_includes_neither_torch_nor_python(file):
    included = re.findall(r'#\s*include\s*[<"]([^>"]+)', (ROOT / file).read_text())
    forbidden = r"(torch|ATen|c10)/" + (
        "" if file in ("csrc/bindings.cpp", "csrc/bindings.h") else r"|pybind11/|Python\.h"
    )
    assert not [header for header in included if re.match(forbidden, header)]


@pytest.mark.parametrize("file", files("csrc/cpu", suffixes={".cpp"}))
def test_cpu_kernels_are_in_the_folder_of_their_op(file):
    assert file.split("/")[2] in {*OPS, "common"}  # common: of several ops


@pytest.mark.parametrize("file", [file for file in LIBRARY if "triton" in file])
def test_no_autotuning(file):
    """A first call compiles one kernel: block sizes follow a rule."""
    names = {node.attr for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.Attribute)}
    assert not names & {"autotune", "heuristics", "Config"}


def test_setup_needs_no_torch():
    assert "torch" not in {name.split(".")[0] for name in imports("setup.py")}


def test_every_requirement_is_pinned():
    pinned = re.findall(r"^[\w-]+(?===)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    needed = {re.match(r"[\w-]+", requirement)[0] for requirement in requires("inr-kernels")}
    assert needed - {"inr-kernels"} <= set(pinned)


def test_one_version(capsys):
    assert f'\nversion = "{inr_kernels.__version__}"\n' in (ROOT / "pyproject.toml").read_text()
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"inr-kernels {inr_kernels.__version__}\n"


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_pages_show_the_committed_numbers(page):
    assert render(page.read_text()) == page.read_text(), "python -m bench.report writes them"


def test_every_benchmark_has_its_table():
    shown = set(re.findall(r"<!-- bench:(\w+) -->", PAGES[1].read_text()))
    assert shown == {path.stem.removeprefix("bench_") for path in ROOT.glob("bench/bench_*.py")}
