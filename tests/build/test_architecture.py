"""The rules of the house: who may import whom, what every op brings, how long a file may be."""

import ast
import re
from importlib.metadata import requires
from pathlib import Path

import pytest

import inr_kernels
from bench.report import PAGES, render
from inr_kernels import cli

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ["csrc", "inr_kernels", "models", "bench", "tests"]
CODE = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"}
TEXT = CODE | {".json", ".md", ".svg", ".toml", ".txt"}
README = (ROOT / "README.md").read_text()

# An op is a folder with an op.py, or with an op/ once that file has grown long.
OPS = sorted({path.parent.name for stem in ("op", "op.py") for path in ROOT.glob(f"inr_kernels/*/{stem}")})
SLICE = ["arguments", "functional", "reference", "op", "triton_kernels", "module"]

# Lowest first; a layer imports only what stands below it. An op's own name is its __init__,
# inr_kernels is the public names.
LAYERS = ["_C", "_core", "arguments", "triton_kernels", "reference", "op", "functional", "module", "<op>"]
LAYERS += ["integrations", "inr_kernels", "models", "cli"]
# What is closer kept than the arrow asks.
READERS = {
    "_C": {"_core", "op"},
    "triton_kernels": {"op"},
    "reference": {"op", "functional"},
}


def files(*rooms, suffixes=CODE):
    """The files of the rooms, relative to the root: readable test ids."""
    found = [path for room in rooms for path in (ROOT / room).rglob("*")]
    return [str(path.relative_to(ROOT)) for path in sorted(found) if path.suffix in suffixes]


def module_name(file):
    """inr_kernels/_core/checks.py -> inr_kernels._core.checks; models/ is a part of the package."""
    parts = Path(file).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "inr_kernels" else ("inr_kernels", *parts))


LIBRARY = files("inr_kernels", "models", suffixes={".py"})
MODULES = {module_name(file) for file in LIBRARY} | {"inr_kernels._C"}


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


def place(module):
    """The layer of one of our modules, and the op it belongs to, if any."""
    _, *rest = module.split(".")
    op = rest[0] if rest and rest[0] in OPS else None
    return (rest[1:] or ["<op>"] if op else rest or ["inr_kernels"])[0], op


def allowed(importer, imported):
    """Whether the arrow lets one place import the other."""
    (upper, ours), (lower, theirs) = importer, imported
    if importer == imported:
        return True
    if (ours and theirs and ours != theirs) or upper not in READERS.get(lower, {upper}):
        return False
    return LAYERS.index(upper) > LAYERS.index(lower)


@pytest.mark.parametrize("file", LIBRARY)
def test_arrow(file):
    here = place(module_name(file))
    assert here[0] in LAYERS, f"design.md has no room for {file}"
    ours = [name for name in imports(file) if name.split(".")[0] == "inr_kernels"]
    against = [name for name in ours if not allowed(here, place(name))]
    assert not against, f"{file} imports {against} against the arrow"


@pytest.mark.parametrize("file", LIBRARY)
def test_library_imports_no_checkout_folder(file):
    heads = {name.split(".")[0] for name in imports(file)}
    assert not heads & {"models", "bench", "tests"}, "these exist in a checkout only"


@pytest.mark.parametrize("op", OPS)
def test_slice(op):
    rooms = [f"inr_kernels/{op}/{stem}" for stem in SLICE]
    rooms += [f"tests/ops/test_{op}", f"bench/bench_{op}"]
    assert not [room for room in rooms if not list(ROOT.glob(f"{room}.py")) + list(ROOT.glob(room))]


def test_public_names():
    names = {"LocalImplicitDecoder", "local_implicit_decode", "accelerate", "explain", "backend"}
    names |= {"ElementwiseFilter", "elementwise_filter", "pixelwise_reconstruct", "UnmaskAttention", "unmask_attention"}
    names |= {"NeighborhoodAttention2D", "neighborhood_attention_2d", "neighborhood_attention_2d_packed"}
    names |= {"FourierUnit", "fourier_unit", "release_memory"}
    assert set(inr_kernels.__all__) == names | {"__version__"}
    assert not [name for name in inr_kernels.__all__ if not hasattr(inr_kernels, name)]


@pytest.mark.parametrize("file", files("csrc"))
def test_csrc_knows_neither_torch_nor_python(file):
    included = re.findall(r'#\s*include\s*[<"]([^>"]+)', (ROOT / file).read_text())
    foreign = r"(torch|ATen|c10)/" + ("" if file == "csrc/bindings.cpp" else r"|pybind11/|Python\.h")
    assert not [header for header in included if re.match(foreign, header)]


@pytest.mark.parametrize("file", files(*ROOMS))
def test_file_is_short(file):
    assert len((ROOT / file).read_text().splitlines()) <= 400, "make it a folder of its name"


@pytest.mark.parametrize("file", LIBRARY)
def test_docstrings(file):
    tree = ast.parse((ROOT / file).read_text())
    spoken = [tree]
    if place(module_name(file))[1]:  # in an op, every public name too
        kinds = (ast.FunctionDef, ast.ClassDef)
        spoken += [node for node in tree.body if isinstance(node, kinds) and node.name[0] != "_"]
    assert not [getattr(node, "name", file) for node in spoken if not ast.get_docstring(node)]


def test_nothing_is_called_utils():
    assert not [file for file in files(*ROOMS) if Path(file).stem == "utils"]


@pytest.mark.parametrize("file", [file for file in LIBRARY if "triton" in file])
def test_no_kernel_is_tuned_by_trial(file):
    """A first call compiles one kernel: block sizes follow a rule."""
    names = {node.attr for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.Attribute)}
    assert not names & {"autotune", "heuristics", "Config"}


def test_setup_needs_no_torch():
    assert "torch" not in {name.split(".")[0] for name in imports("setup.py")}


def test_no_machine_in_any_file():
    """No absolute path of one machine, no package index: a clone works anywhere."""
    machine = re.compile(
        r"(?<![\w.])/(?:home|root|work|opt|Users)/\w|file:/{3}"
        r"|pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org"
    )
    top = [path.name for path in ROOT.iterdir() if path.suffix in TEXT or path.name == "Makefile"]
    checked = [*files(*ROOMS, suffixes=TEXT), *top, ".ci/run"]
    assert not [file for file in checked if machine.search((ROOT / file).read_text())]


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
