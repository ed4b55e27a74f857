"""Folders of pictures: which files they hold, and which of two folders belong together."""

import glob
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".jp2", ".ppm", ".tga", ".heic"}
_MASK = re.compile(r"_mask\d*$")  # LaMa's names: a_mask000.png is a mask of a.png


def files(place: str | os.PathLike[str], recursive: bool = True) -> dict[str, Path]:
    """Returns picture files, sorted, by their path below the folder, or below the part of a pattern before its first *.

    Hidden files, and files in hidden folders, are left out. Links that lead nowhere are not: reading them fails.

    Args:
        place: a folder, a pattern such as photos/*.jpg (** stands for any folders), or a file of any name.
        recursive: whether subfolders of a folder are searched.
    """
    root = searched(place)
    if root is None:
        return {Path(place).name: Path(place)}
    if os.path.isdir(place):
        found: Iterable[Path] = root.rglob("*") if recursive else root.glob("*")
    else:
        found = map(Path, glob.iglob(os.fspath(place), recursive=True))
    return {path.relative_to(root).as_posix(): path for path in sorted(found) if _is_picture(path, root)}


def searched(place: str | os.PathLike[str]) -> Path | None:
    """Returns the folder that `files` searches: the place, or a pattern up to its first *; None for a file."""
    if os.path.isfile(place):
        return None
    if os.path.isdir(place):
        return Path(place)
    return Path(*takewhile(lambda part: not glob.has_magic(part), Path(place).parts))


def _is_picture(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    is_file = path.is_file() or (path.is_symlink() and not path.exists())
    return not hidden and path.suffix.lower() in SUFFIXES and is_file


def pictures(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Returns the picture files below a folder, sorted, by their path in it without the suffix.

    Raises:
        NotADirectoryError: it is no folder.
        ValueError: it has no picture, or two that differ in the suffix only.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotADirectoryError(f"{root}: must be a folder of pictures")
    found: dict[str, Path] = {}
    for relative, path in files(root).items():
        name = Path(relative).with_suffix("").as_posix()
        if name in found:
            raise ValueError(f"{found[name]} and {path.name}: must differ in more than the suffix")
        found[name] = path
    if not found:
        raise ValueError(f"{root}: must have pictures, with a suffix of {' '.join(sorted(SUFFIXES))}")
    return found


def is_mask(name: str) -> bool:
    """Whether the name is one of a mask beside its picture, as LaMa has them: it ends in _mask and digits."""
    return _MASK.search(name) is not None


def masks_by_picture(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups names of masks by the picture that they belong to: of the same name, or without _mask and digits.

    Example:
        >>> dict(masks_by_picture(["a_mask000", "a_mask001", "b"]))
        {'a': ['a_mask000', 'a_mask001'], 'b': ['b']}
    """
    groups = defaultdict(list)
    for name in names:
        groups[_MASK.sub("", name)].append(name)
    return groups
