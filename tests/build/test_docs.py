"""The documentation: its code blocks run, its links and commands exist, the site builds."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import numpy
import pytest
import tree
import yaml
from PIL import Image
from sybil import Document
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

import inr_kernels
from inr_kernels import cli
from inr_kernels._core import dispatch
from inr_kernels.cli.arguments import make_parser
from inr_kernels.integrations.class_swap import LOG
from inr_kernels.models.data import images

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/*.md")])
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()
EXTRAS = set(re.findall(r"^(\w+) = \[", PROJECT.split("[project.optional-dependencies]")[1], re.MULTILINE))
# A block in one of these languages runs or its commands are checked; a `text` block is not code.
LANGUAGES = {"python", "sh", "text"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of the code blocks, with the files that they read; their log level does not stay."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LOG, "level", LOG.level)
    photo = numpy.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=numpy.uint8)
    Image.fromarray(photo).save("photo.jpg")
    mask = numpy.zeros((20, 24), numpy.uint8)
    mask[5:9, 3:20] = 255
    Image.fromarray(mask).save("mask.png")
    for name, pixels in (("photos", photo), ("filled", photo), ("masks", mask)):  # for `inr-kernels evaluate`
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(f"{name}/photo.png")
    return tmp_path


def check_make(args):
    """Targets and variables are the Makefile's."""
    for arg in args:
        name, is_variable, _ = arg.partition("=")
        assert re.search(rf"\$\({name}\)" if is_variable else rf"^{name}:", MAKEFILE, re.MULTILINE), f"make {arg}"


def check_pip(args):
    """Extras of this package are the project's."""
    for arg in args:
        extras = re.fullmatch(r"\.\[(.+)\]", arg)
        assert not extras or set(extras[1].split(",")) <= EXTRAS, arg


def check_module(args, monkeypatch, capsys):
    """`-m MODULE`: it knows the options."""
    _, module, *args = args
    if module == "pip":
        return check_pip(args)
    monkeypatch.delitem(sys.modules, module, raising=False)  # which another test may have imported
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        runpy.run_module(module, run_name="__main__")
    text = capsys.readouterr().out
    assert not [arg for arg in args if arg.startswith("--") and arg not in text], module


def check_paths(args):
    """Arguments that look like paths are in the repository; so are options of a script."""
    assert not [arg for arg in args if "/" in arg and not (ROOT / arg).exists()]


@pytest.fixture
def commands(folder, monkeypatch, capsys):
    """The evaluator of `sh` blocks: inr-kernels runs, the arguments of other programs are checked."""

    def check(example):
        for line in example.parsed.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            variables = list(takewhile(lambda word: re.match(r"[A-Z_]+=", word), words))
            program, *args = words[len(variables) :] or [":"]
            with monkeypatch.context() as patch:
                for variable in variables:
                    patch.setenv(*variable.split("=", 1))
                match Path(program).name:
                    case "inr-kernels" if args[0] == "app":  # it would not end
                        make_parser().parse_args(args)
                    case "inr-kernels":
                        cli.main(args)  # exits if the command fails
                    case "make":
                        check_make(args)
                    case "pip":
                        check_pip(args)
                    case "python":
                        check_module(args, patch, capsys)
                    case "pytest":
                        check_paths(args)
                    case "gpu_record.sh":
                        assert os.access(ROOT / program, os.X_OK)
                        text = (ROOT / program).read_text()
                        assert not [arg for arg in args if arg.startswith("--") and arg not in text]
                    case name:
                        assert name in (":", "cd", "git", "pre-commit", "source"), f"unchecked: {line}"

    return check


@each_page
def test_code_blocks(page, commands):
    for example in Document.parse(str(page), PythonCodeBlockParser(), CodeBlockParser("sh", commands)):
        example.evaluate()


def prose(text):
    """A page without its code blocks, the hidden ones too."""
    return re.sub(r"^```.*?^```$|^<!---.*?^--->$", "", text, flags=re.MULTILINE | re.DOTALL)


@each_page
def test_every_code_block_has_a_checked_language(page):
    text = page.read_text()
    fences = re.findall(r"^```(.*)$", text, re.MULTILINE)
    assert set(fences[::2]) <= LANGUAGES
    assert set(fences[1::2]) <= {""}
    assert "```" not in prose(text)
    assert not re.findall(r"^\n {4}.+", prose(text), re.MULTILINE), "an indented block has no language"


@each_page
def test_links(page):
    links = re.findall(r"\]\(([^)#\s]+)", prose(page.read_text()))
    outside = [link for link in links if not link.startswith("https://")]
    assert not [link for link in outside if not (page.parent / link).exists()]


def test_site_builds(tmp_path):
    """mkdocs finds every page, link and documented object."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    html = {path: path.read_text() for path in tmp_path.rglob("*.html")}
    assert len(html) > len(list(ROOT.glob("docs/**/*.md")))
    loaded = r"""<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="?https?:"""
    assert not [path for path, text in html.items() if re.search(loaded, text)], "the site loads only its own files"


def edits(heading):
    """The files of a table of CONTRIBUTING.md."""
    section = re.search(rf"^{heading}[^\n]*:\n\n(.+?)\n\n", CONTRIBUTING, re.DOTALL | re.MULTILINE)[1]
    return re.findall(r"^\| `(.+?)` \|", section, re.MULTILINE)


def without_underscores(path):
    return path.read_text().replace("_", "").lower()


# What names an op because it uses it: networks, adapters and their tests, examples, and tests of something else.
USERS = ["models", "inr_kernels/integrations", "tests/models", "tests/integrations"]
USERS += ["inr_kernels/_core/dispatch.py", "csrc/common/memory.h", "docs/backends.md", "CONTRIBUTING.md"]
USERS += [
    "tests/build/test_docs.py",
    "tests/build/test_estimate.py",
    "tests/build/test_launches.py",
    "tests/support/instruction_sets.py",
    "tests/support/launch_triton.py",
    "tests/ops/test_edges.py",
    "tests/ops/test_on_gpu.py",
    "tests/ops/test_tensor_cores.py",
    "tests/slow_tests.txt",
]


def test_edits_for_a_new_op():
    """CONTRIBUTING.md lists all files that name the op which it takes as the pattern; each of them names other ops."""
    code, prose = edits("Edits of code that exists"), edits("Prose and records")
    assert 0 < len(code) <= 8 and len(prose) > 0
    listed = {str(path.relative_to(ROOT)) for name in code + prose for path in ROOT.glob(name)}
    texts = {name: without_underscores(ROOT / name) for name in listed | {*tree.texts()}}
    for op in ("localimplicit", "elementwisefilter", "unmaskattention"):
        # A machine's results may be those of one op.
        assert not [name for name in listed if op not in texts[name] and not name.startswith("bench/results/")]
    naming = {name for name, text in texts.items() if "unmaskattention" in text and "unmask_attention" not in name}
    unlisted = {name for name in naming - listed if not any(Path(name).is_relative_to(user) for user in USERS)}
    assert not unlisted, "list them in CONTRIBUTING.md, or here if they only use the op"


def table(page, first):
    """The cells of the page's table, whose header begins with `first`: the header, then the rows."""
    lines = re.search(rf"(?:^\| {first} \|.*\n)(?:^\|.*\n)+", (ROOT / page).read_text(), re.MULTILINE)[0].splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return header, rows


def test_table_of_what_each_format_keeps():
    (_, *header), rows = table("docs/pictures.md", "of the picture")
    kinds = [kind.replace(" ", "") for kind in header]
    kept = {kind: {name for name, *cells in rows if cells[i] != "–"} for i, kind in enumerate(kinds)}
    assert {kind: names - {"transparency", "16 bits"} for kind, names in kept.items()} == images.KEEPS
    assert {kind for kind, names in kept.items() if "transparency" not in names} == images.OPAQUE


def test_tables_of_ops():
    """Each has a row per op; they name its function, its layers, and whether it has a CUDA C++ kernel."""
    ops = {name: dispatch.OPS[name] for name in tree.OPS}
    (_, readme), (_, start), (_, gpus) = (table(page, "op") for page in ("README.md", "docs/index.md", "docs/gpu.md"))
    assert {name for name, *_ in readme} == {f"[`{op}`](docs/ops/{op}.md)" for op in ops}
    assert {name for name, *_ in start} == {f"[`{op.function.__name__}`](ops/{name}.md)" for name, op in ops.items()}
    layers = {name for name in inr_kernels.__all__ if isinstance(getattr(inr_kernels, name), type)}
    named = {name for _, cell, _ in start for name in re.findall(r"`([A-Z]\w+)`", cell)}
    assert named & {*inr_kernels.__all__} == layers
    assert {name: cuda != "–" for name, _, cuda in gpus} == {f"`{n}`": "cuda" in op.backends for n, op in ops.items()}


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == inr_kernels.__version__
    assert f'license = "{citation["license"]}"' in PROJECT
    for paper in citation["references"]:
        assert paper.keys() >= {"type", "title", "authors", "year"}


def test_pre_commit_runs_the_linters_of_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"], "hooks need no network"
    entries = {hook["entry"] for hook in hooks[0]["hooks"]}
    targets, recipe = re.search(r"^lint: \S+(.*)\n((?:\t.+\n)+)", MAKEFILE, re.MULTILINE).groups()
    commands = {line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()}
    assert entries == commands | {f"make {target}" for target in targets.split()}
