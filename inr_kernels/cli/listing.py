"""Which pictures of a folder a command takes, with their masks and outputs."""

import os
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from inr_kernels.models.data import folders

from .names import Names, kept_suffix
from .parsing import UsageError


class Listing(NamedTuple):
    """What a command does in a folder.

    Attributes:
        names: the files of each picture, sorted.
        failures: why other pictures and places cannot be used, by their names.
        taken: pictures that are left out, because they have the name of another's output.
    """

    names: list[Names]
    failures: dict[str, str]
    taken: list[str]


def listing(args: Namespace) -> Listing:
    """Finds the pictures that `args.inputs` name, with their masks and outputs.

    Outputs are in the folder `args.output`, in subfolders as the pictures. A picture that is the output of another, as
    of an earlier run with --suffix in the same folder, is left out; so is what lies in the output's folder, if that is
    inside the folder that is searched.

    Raises:
        UsageError: an output would replace a picture or a mask, or that of another picture.
        ValueError: there is no picture.
    """
    found, failures = _pictures(args)
    outputs = {path: _output(args, relative, path) for path, relative in found.items()}
    made = {os.path.realpath(output) for output, _ in outputs.values()}
    for path in found:
        if os.path.realpath(outputs[path][0]) == os.path.realpath(path):
            rule = "output must be another folder than the input's, unless --suffix is given"
            raise UsageError(f"{rule}; got {args.output}")
    taken = [path for path in found if os.path.realpath(path) in made]
    found = {path: relative for path, relative in found.items() if path not in taken}
    masks, without = _masks(args, found)
    failures |= without
    names: dict[str, Names] = {}
    for path in (path for path in found if path not in failures):
        output, extension = outputs[path]
        if output in names:
            raise UsageError(f"{names[output].input} and {path} would have one output, {output}")
        names[output] = Names(path, masks.get(path, ""), output, extension)
    for mask in masks.values():
        if os.path.realpath(mask) in made:
            raise UsageError(f"output must be another folder than the masks'; got {args.output}")
    return Listing([names[output] for output in sorted(names)], failures, taken)


def _pictures(args: Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """The pictures' paths, with their paths in the folder or pattern that holds them; and places without any."""
    output, found, empty = Path(os.path.realpath(args.output)), {}, {}
    message = "holds no pictures" + "; --recursive searches subfolders" * (not args.recursive)
    for place in args.inputs:
        root = folders.searched(place)
        inside = root is not None and Path(os.path.realpath(root)) in output.parents
        here = folders.files(place, args.recursive)
        if not here:
            empty[place] = message
        for relative, path in here.items():
            if not (inside and output in Path(os.path.realpath(path)).parents):
                found[str(path)] = relative
    if not found:
        raise ValueError(f"{' '.join(args.inputs)}: {message}")
    return found, empty


def _masks(args: Namespace, found: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The mask of each picture, and why others have none, by the picture; removes masks from `found`."""
    if "mask" not in args:
        return {}, {}
    drawn = {str(path): relative for relative, path in folders.files(args.mask, args.recursive).items()}
    files = {os.path.realpath(path): path for path in found}
    if os.path.isfile(args.mask):
        found.pop(files.get(os.path.realpath(args.mask), ""), None)
        return dict.fromkeys(found, args.mask), {}
    if any(os.path.realpath(path) in files for path in drawn):  # pictures and masks in one folder
        drawn = {path: relative for path, relative in drawn.items() if folders.is_mask(_stem(relative))}
        for path in drawn:
            found.pop(files.get(os.path.realpath(path), ""), None)
    by_stem: dict[str, list[str]] = {}
    for path, relative in drawn.items():
        (stem,) = folders.masks_by_picture([_stem(relative)])
        by_stem.setdefault(stem, []).append(path)
    masks, failures = {}, {}
    for path, relative in found.items():
        match by_stem.get(_stem(relative), []):
            case [mask]:
                masks[path] = mask
            case []:
                failures[path] = f"has no mask in {args.mask}"
            case several:
                failures[path] = f"has several masks: {', '.join(several)}"
    return masks, failures


def _stem(relative: str) -> str:
    return Path(relative).with_suffix("").as_posix()


def _output(args: Namespace, relative: str, path: str) -> tuple[str, str]:
    """The output's name and format: --format, else the picture's own if it can be written, else PNG."""
    extension = f".{args.format}" if args.format else kept_suffix(path)
    return os.path.join(args.output, f"{_stem(relative)}{args.suffix}{extension}"), extension.lower()
