"""How the files are written: their length, docstrings, type hints and words."""

import ast
import re
from pathlib import Path

import pytest
from tree import FOLDERS, LIBRARY, ROOT, files, texts

# Words of docs/contributing that a reader would have to look up, or that say nothing; matched within names, too.
BANNED = [
    "w[i]sh(es|ed)?", "anew", "lest", "no matter", r"for [\w' ]+ sake", "of (its|their) own accord", "foreign", "house",
    "arrows?", "(gives?|gave) way", "to be had", "(is|are|was) held against", "what is asked for", "deserves?",
]  # fmt: skip
BANNED = re.compile(rf"(?<![a-z])({'|'.join(BANNED)})(?![a-z])".replace(" ", r"[ _\s#]+"), re.IGNORECASE)


def functions(tree, public=True):
    """(name, node) of every function, class and method of a module whose name, and whose class's, is public."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and (node.name[0] != "_" or node.name == "__init__"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                yield from ((f"{node.name}.{name}", inner) for name, inner in functions(node))


def unannotated(function):
    """Whether an argument of the function, but self or cls, or its result lacks a type; of __init__ only arguments."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    named = [argument for argument in named if argument and argument.arg not in ("self", "cls")]
    result = function.name == "__init__" or function.returns
    return not result or not all(argument.annotation for argument in named)


def is_triton(function):
    """Whether Triton compiles it: its arguments are pointers, numbers and constants of the kernel language."""
    return any("triton" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.parametrize("file", files(*FOLDERS))
def test_file_is_short(file):
    assert len((ROOT / file).read_text().splitlines()) <= 400, "split it into a folder of the same name"


@pytest.mark.parametrize("file", LIBRARY)
def test_docstrings(file):
    """Of the module, and of its public functions and classes."""
    tree = ast.parse((ROOT / file).read_text())
    documented = [(file, tree), *((name, node) for name, node in functions(tree) if "." not in name)]
    assert not [name for name, node in documented if not ast.get_docstring(node)]


@pytest.mark.parametrize("file", LIBRARY)
def test_type_hints(file):
    defined = functions(ast.parse((ROOT / file).read_text()))
    checked = [(name, node) for name, node in defined if isinstance(node, ast.FunctionDef) and not is_triton(node)]
    assert not [name for name, node in checked if unannotated(node)]


def test_nothing_is_called_utils():
    assert not [file for file in files(*FOLDERS) if Path(file).stem == "utils"]


@pytest.mark.parametrize("file", sorted({*texts()} - {"tests/build/test_style.py"}))
def test_plain_words(file):
    text = (ROOT / file).read_text()
    assert not [f"{text.count(chr(10), 0, found.start()) + 1}: {found[0]}" for found in BANNED.finditer(text)]


@pytest.mark.parametrize("file", texts())
def test_no_path_of_a_machine(file):
    """No absolute path and no package index: a clone works anywhere."""
    machine = re.compile(
        r"(?<![\w.])/(?:home|root|work|opt|Users)/\w|file:/{3}"
        r"|pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org"
    )
    assert not machine.search((ROOT / file).read_text())


def test_slow_tests_exist():
    """`make quick` leaves out the tests of this list: it is recorded, and the files in it exist."""
    names = (ROOT / "tests/slow_tests.txt").read_text().splitlines()
    assert names, "record it with pytest --record-slow"
    assert not [name for name in names if not (ROOT / name.partition("::")[0]).is_file()]
