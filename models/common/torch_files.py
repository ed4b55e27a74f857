"""Reads files of torch.save, TorchScript archives and zip files of them as plain data, without running their code.

Two things in such a file could run code: its pickle, and the TorchScript sources of an archive. The pickle is read by
torch's weights-only unpickler, which builds tensors and plain containers. Every other class or function that a pickle
names is replaced by a `Placeholder`, a container without methods, so none is imported or called. Of a TorchScript
archive only the pickle and the tensors are read; its sources and constants are left out before torch sees it.
"""

import contextlib
import errno
import io
import itertools
import pickle
import pickletools
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO, ClassVar, NamedTuple

import torch
from safetensors.torch import load as load_safetensors

StateDict = dict[str, torch.Tensor]

# A zip file whose members are this many times larger than itself is refused: weights do not compress.
COMPRESSION = 8
SUFFIXES = (".ckpt", ".pth", ".pt", ".safetensors")
# Pickles before the object in the stacked format of torch before 1.6: a magic number, a version and the system.
LEGACY_HEADER = 3
# Modules that pickles of protocol 2 call by the names of Python 2.
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# Containers that a pickle fills after it has made them: torch fills only dicts and lists.
CONTAINERS = {"collections.defaultdict": dict, "collections.deque": list}
# torch searches all allowed classes for each object; more searches than this take longer than reading weights.
SEARCHES = 20_000_000
# torch's list of allowed classes belongs to the process: one file at a time extends it.
LOCK = threading.Lock()
BLOCKED = ("os.", "posix.", "nt.", "sys.")  # modules whose functions torch refuses even as placeholders


class Unreadable(ValueError):
    """Why a file is not a checkpoint, in words for a user: what was found in it."""


class Contents(NamedTuple):
    """The contents of a file.

    Attributes:
        texts: the header of a safetensors file; of a zip file the text of its config.yaml.
        data: what torch.save was given, a state dict for safetensors and TorchScript.
        size: bytes of the file.
    """

    texts: dict[str, str]
    data: Any
    size: int


class Placeholder:
    """Replaces an object of a class that torch does not know; the subclass's name is that of the class.

    Attributes:
        attributes: the object's own.
    """

    attributes: ClassVar[dict[str, Any]] = {}

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}  # type: ignore[misc]


def read(file: BinaryIO, size: int, path: str | None) -> Contents:
    """Reads a file that is not safetensors.

    Args:
        file: at its start.
        size: bytes of the file.
        path: of the file; tensors are mapped from the disk where its format allows that. None: copied into memory.

    Raises:
        OSError: it cannot be read.
        Unreadable: it is damaged, of another format, or needs the code of classes.
    """
    try:
        return _read(file, size, path, packed=False)
    except (Unreadable, MemoryError):
        raise
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # zipfile seeks where a damaged file says, even before its start
            raise
        raise Unreadable("it is a damaged or truncated file") from error
    except Exception as error:  # zipfile, zlib, pickletools and safetensors raise many kinds
        raise Unreadable("it is a damaged or truncated file") from error


def _read(file: BinaryIO, size: int, path: str | None, packed: bool) -> Contents:
    """As `read`; packed: whether the file was in a zip file itself."""
    start = file.read(512)
    file.seek(0)
    if start[:4] == b"PK\3\4":
        return _read_zip(file, size, path, packed)
    if start[:1] == b"\x80":
        return Contents({}, _load(file, _legacy_classes(file)), size)
    if start[257:262] == b"ustar":
        raise Unreadable("it is a tar file, torch's format of before 2017, which no LaMa or LIIF was published in")
    raise Unreadable("it is empty" if not start else "it is neither a safetensors file nor one of torch.save")


def _read_zip(file: BinaryIO, size: int, path: str | None, packed: bool) -> Contents:
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise Unreadable("it is a damaged or truncated file of torch.save, or a damaged zip file") from error
    with archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        if (unpacked := sum(member.file_size for member in members)) > COMPRESSION * size + 2**20:
            raise Unreadable(f"it has {size} bytes and would unpack to {unpacked}: weights do not compress like that")
        names = {member.filename: PurePosixPath(member.filename) for member in members}
        root = next((name.parent for name in names.values() if name.name == "data.pkl"), None)
        if root is None:
            return _read_packed(archive, names, size, packed)
        pickled = archive.read(str(root / "data.pkl"))
        if str(root / "constants.pkl") in names:
            pickled = _with_one_class(pickled)
            module = _load(_without_code(archive, names, root, pickled), _classes(io.BytesIO(pickled)))
            return Contents({}, _script_state(module), size)
        classes = _classes(io.BytesIO(pickled))
        file.seek(0)
        # torch maps compressed members as they are, and takes any file of the name *.safetensors for one.
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if path is not None and stored and not path.endswith(".safetensors"):
            return Contents({}, _load(path, classes, mmap=True), size)
        return Contents({}, _load(file, classes), size)


def _read_packed(archive: zipfile.ZipFile, names: dict[str, PurePosixPath], size: int, packed: bool) -> Contents:
    """Reads the checkpoint in a zip file such as LaMa's, of config.yaml and models/best.ckpt."""
    found = [name for name, path in names.items() if path.suffix in SUFFIXES and "__MACOSX" not in path.parts]
    found = [name for name in found if names[name].name == "best.ckpt"] or found
    if len(found) != 1 or packed:
        raise Unreadable(f"it is a zip file with {len(found)} checkpoints in it, not one")
    texts = {path.name: archive.read(name).decode() for name, path in names.items() if path.name == "config.yaml"}
    data = archive.read(found[0])
    if names[found[0]].suffix == ".safetensors":
        return Contents(texts, load_safetensors(data), size)
    return _read(io.BytesIO(data), size, None, packed=True)._replace(texts=texts)


def _with_one_class(pickled: bytes) -> bytes:
    """The pickle of a TorchScript archive, which has a class for each layer, with one class instead."""
    parts, copied = [], 0
    for (opcode, argument, start), (_, _, end) in itertools.pairwise(pickletools.genops(pickled)):
        if opcode.name == "GLOBAL" and str(argument).startswith("__torch__") and start is not None:
            parts += [pickled[copied:start], b"c__torch__\nPlaceholder\n"]
            copied = end or 0
    return b"".join([*parts, pickled[copied:]])


def _without_code(
    archive: zipfile.ZipFile, names: dict[str, PurePosixPath], root: PurePosixPath, pickled: bytes
) -> BinaryIO:
    """The pickle and the tensors of a TorchScript archive, as a file of torch.save."""
    copied = io.BytesIO()
    with zipfile.ZipFile(copied, "w", zipfile.ZIP_STORED) as target:
        target.writestr(str(root / "data.pkl"), pickled)
        for name, path in names.items():
            if path.parent == root / "data" or path in (root / "version", root / "byteorder"):
                target.writestr(name, archive.read(name))
    copied.seek(0)
    return copied


def _script_state(module: Any) -> StateDict:
    """The state dict of a TorchScript module that was read as placeholders."""
    state: StateDict = {}
    seen = set()

    def visit(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            state[name] = value
        elif isinstance(value, Placeholder) and id(value) not in seen:
            seen.add(id(value))
            for part, inner in value.attributes.items():
                visit(inner, f"{name}.{part}" if name else part)

    visit(module, "")
    if not state:
        raise Unreadable("it is a TorchScript archive without parameters (those of a frozen module are in its code)")
    return state


def _load(file: Any, classes: list[str], **options: Any) -> Any:
    """torch.load without code: every class that the pickle names and torch does not allow is a placeholder."""
    known: list[tuple[Any, str]] = [(type(name, (Placeholder,), {}), name) for name in classes]
    known += [(_maker(kind), name) for name, kind in CONTAINERS.items()]
    try:
        with _allowed(known), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols other than 2
            return torch.load(file, map_location="cpu", weights_only=True, **options)
    except pickle.UnpicklingError:  # its text advises to load the file with weights_only=False
        unknown = [name for name in classes if not name.startswith(("torch.", "collections.", "_codecs."))]
        unknown = [name for name in unknown if name.startswith(BLOCKED)] or unknown
        if not unknown:
            raise Unreadable("it is no file of torch.save, or one of an unknown pickle protocol") from None
        listed = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} others" if len(unknown) > 3 else "")
        raise Unreadable(f"it cannot be read without running code of {listed}") from None
    except (MemoryError, OSError):
        raise
    except Exception:
        raise Unreadable("it is a damaged or truncated file of torch.save") from None


@contextlib.contextmanager
def _allowed(known: list[tuple[Any, str]]) -> Iterator[None]:
    """In the block, torch.load makes these objects for these names.

    Classes of `torch.serialization.add_safe_globals` stay allowed, for other threads that load files of their own; but
    those of the same names do not: torch would take either of two entries of one name.
    """
    names = {name for _, name in known}
    with LOCK:
        callers = torch.serialization.get_safe_globals()
        hidden = [entry for entry in callers if _full_name(entry) in names]
        if hidden:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals([entry for entry in callers if entry not in hidden])
        try:
            with torch.serialization.safe_globals(known):  # type: ignore[arg-type]
                yield
        finally:
            torch.serialization.add_safe_globals(hidden)


def _full_name(entry: Any) -> str:
    """The name by which pickles call an entry of torch's list of allowed classes and functions."""
    return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


def _maker(kind: type) -> Callable[..., Any]:
    """A function that makes an empty container, whatever its arguments."""
    return lambda *_: kind()


def _legacy_classes(file: BinaryIO) -> list[str]:
    """The classes in a file of torch before 1.6; the file is at its start again afterwards."""
    try:
        for _ in range(LEGACY_HEADER):
            _classes(file)
        return _classes(file)
    except Unreadable:
        raise
    except ValueError:
        raise Unreadable("it is a damaged pickle, or not one of torch.save") from None
    finally:
        file.seek(0)


def _classes(file: BinaryIO) -> list[str]:
    """The names of all classes and functions in a pickle, which is read to its end but not executed."""
    found, calls = set(), 0
    for opcode, argument, _ in pickletools.genops(file):
        calls += opcode.name in ("REDUCE", "NEWOBJ", "BUILD")
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            found.add(f"{PYTHON_2.get(module, module)}.{name}")
    if len(found) * calls > SEARCHES:
        raise Unreadable(f"it has {calls} objects of {len(found)} classes beside its weights")
    return sorted(found - CONTAINERS.keys())
