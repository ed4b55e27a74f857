"""Checks the file names on a command line before torch is imported, so that a mistake is reported at once."""

import argparse
import contextlib
import errno
import glob
import os
import stat
import sys
from pathlib import Path
from typing import NamedTuple

from inr_kernels._core.files import check_folder, check_run, check_writable

from .arguments import FORMATS, MASKS, NETWORKS
from .parsing import UsageError

# The options of each command that name pictures to read. Other commands name no files, or check them themselves.
INPUTS: dict[str, tuple[str, ...]] = {"upscale": ("input",), "inpaint": ("input", "mask"), "export": (), "demo": ()}
STDIN, STDOUT = ("-", "/dev/stdin"), ("-", "/dev/stdout")
SUFFIXES = tuple(f".{name}" for name in FORMATS)


class Names(NamedTuple):
    """The files of a picture.

    Attributes:
        input, output: their names.
        mask: its name, or "".
        extension: the output's format, such as ".png".
    """

    input: str
    mask: str
    output: str
    extension: str


def kept_suffix(name: str) -> str:
    """The suffix of an output in the input's format: the input's own if that can be written, else .png."""
    suffix = Path(name).suffix
    return suffix if suffix.lower() in SUFFIXES else ".png"


def check(args: argparse.Namespace) -> None:
    """Checks the names of all files of a command.

    The inputs and the checkpoint must exist; the output must be writable and none of them. Sets `args.extension`, the
    output's format; of commands that take folders `args.is_folder`, and if it is False, `args.names`.

    Raises:
        OSError: a file cannot be read or written.
        UsageError: a name that is empty, or does not fit the others.
        ValueError: a standard stream is closed.
    """
    if args.command == "evaluate":
        _check_evaluate(args)
    if args.command == "train" and not args.print_config:
        _check_train(args)
    if args.command not in INPUTS:
        return
    if "inputs" in args:
        args.is_folder = _is_folder(args)
        if args.is_folder:
            _check_folder(args)
            return
        (args.input,) = args.inputs
        _check_single(args)
    inputs = {what: getattr(args, what) for what in INPUTS[args.command]}
    for what, name in (inputs | {"output": args.output}).items():
        if not name:
            raise UsageError(f"the name of the {what} is empty")
    _check_distinct(inputs)
    files = dict(inputs)
    if "model" in args and args.model not in NETWORKS[args.command]:
        files["checkpoint"] = args.model
    for what, name in files.items():
        _check_readable(what, name)
    _check_output(args, files)
    if "inputs" in args:
        args.names = Names(args.input, getattr(args, "mask", ""), args.output, args.extension)


def _check_evaluate(args):
    """The folders and files of `evaluate`."""
    for folder in (args.data, *args.pred):
        if not os.path.isdir(folder):
            raise NotADirectoryError(f"{folder}: must be a folder of pictures")
    if args.masks and not os.path.isdir(args.masks) and args.masks.split(":")[0] not in MASKS:
        rule = f"must be a folder or the kind of masks to draw; kind must be one of {', '.join(MASKS)}"
        raise UsageError(f"argument --masks: {rule}; got {args.masks!r}")
    models = (name for name in args.model if name not in NETWORKS["evaluate"])
    for what, name in [*(("checkpoint", name) for name in models), ("LPIPS", args.lpips), ("FID", args.fid)]:
        if name:
            _check_readable(what, name)
    if args.output:
        check_folder(args.output)


def _check_train(args):
    """The folders and files that the command line of `train` names; those in a config are checked later."""
    if "." in args.config:
        _check_readable("CONFIG", args.config)
    given = {name: value.strip("'\"") for name, _, value in (text.partition("=") for text in args.options)}
    for name in ("data", "masks", "validate", "loss.vgg", *([] if args.resume else ["start"])):
        value = given.get(name, "")
        for place in value[1:-1].split(",") if value.startswith("[") else [value]:
            place = place.strip(" '\"")
            if place and not (name == "masks" and place.split(":")[0] in (*MASKS, "free-form")):
                os.stat(place)
    if given.get("out"):
        check_run(given["out"], args.resume)


def _check_single(args):
    """Checks that no option for folders is given, and that the mask is none."""
    batch_size = args.batch_size if args.batch_size > 1 else ""
    for option, value in (("suffix", args.suffix), ("batch-size", batch_size), ("recursive", args.recursive)):
        if value:
            raise UsageError(f"argument --{option}: applies where the output is a folder; got {value}")
    if "mask" in args and (os.path.isdir(args.mask) or _is_pattern(args.mask)):
        raise UsageError(f"mask must be a file where the output is one; got {args.mask}")


def _is_folder(args):
    """Whether the command is to make a folder of pictures."""
    many = len(args.inputs) > 1 or os.path.isdir(args.inputs[0]) or _is_pattern(args.inputs[0])
    return many or os.path.isdir(args.output) or args.output.endswith(("/", os.sep))


def _is_pattern(name):
    return glob.has_magic(name) and not os.path.lexists(name)


def _check_folder(args):
    """As `check`, where the output is a folder. Which pictures there are is found later."""
    places = {"input": args.inputs, "mask": [args.mask] if "mask" in args else []}
    for what, name in [(what, name) for what, names in places.items() for name in names] + [("output", args.output)]:
        if not name:
            raise UsageError(f"the name of the {what} is empty")
        if what != "output" and name in STDIN:
            raise UsageError(f"{what} must be files or a folder where the output is a folder; got {name}")
    exists, named = os.path.exists(args.output), Path(args.output).suffix.lower() in SUFFIXES
    if args.output in STDOUT or (not os.path.isdir(args.output) and (exists or named)):
        raise UsageError(f"output must be a folder for a folder or several pictures; got {args.output}")
    for what, name in [(what, name) for what, names in places.items() for name in names]:
        if _is_pattern(name):
            if not any(glob.iglob(name, recursive=True)):
                raise FileNotFoundError(errno.ENOENT, "no file has this pattern", f"{what} {name}")
        elif not os.path.isdir(name):
            _check_readable(what, name)
    if args.model not in NETWORKS[args.command]:
        _check_readable("checkpoint", args.model)


def _check_distinct(inputs):
    if len(inputs) < 2:
        return
    both = " and ".join(inputs)
    if all(name in STDIN for name in inputs.values()):
        raise UsageError(f"{both} are both the standard input, which can be read only once")
    with contextlib.suppress(OSError):
        if os.path.samefile(*inputs.values()) and not os.path.isfile(next(iter(inputs.values()))):
            raise UsageError(f"{both} are the same pipe or device, which can be read only once")


def _check_readable(what, name):
    try:
        if what != "checkpoint" and name in STDIN:
            _check_standard_input()
        elif stat.S_ISREG(mode := os.stat(name).st_mode):
            open(name, "rb").close()
        elif stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"{what} {name}") from error


def _check_standard_input():
    if sys.stdin is None:
        raise OSError(errno.EBADF, "the standard input is closed")
    if sys.stdin.isatty():
        raise OSError(errno.EINVAL, "the standard input is a terminal; redirect it from a picture or a pipe")


def _check_output(args, files):
    name, suffix = args.output, Path(args.output).suffix.lower()
    takes_stdout = "format" in args
    if name == "-" and not takes_stdout:
        raise UsageError("argument -o/--output: must be the name of a file; got -")
    if takes_stdout and name in STDOUT:
        _check_standard_output()
    else:
        check_writable(name)
        for what, path in files.items():
            if os.path.isfile(name) and os.path.exists(path) and os.path.samefile(path, name):
                raise UsageError(f"output must be another file than the {what}; got {name}")
    if args.command == "export":
        return
    given = getattr(args, "format", None)
    if given is None and suffix not in SUFFIXES:
        if not takes_stdout or (name not in STDOUT and (os.path.isfile(name) or not os.path.exists(name))):
            unless = " unless --format is given" if takes_stdout else ""
            raise UsageError(f"output must end in {' '.join(SUFFIXES)}{unless}; got {name}")
        suffix = ".png"
    args.extension = suffix if given is None else f".{given}"


def _check_standard_output():
    if sys.stdout is None:
        raise ValueError("the standard output is closed")
    if sys.stdout.isatty():
        raise UsageError("the standard output is a terminal, which shows no picture; redirect it")
    try:
        sys.stdout.fileno()
    except (OSError, AttributeError):
        raise ValueError("the standard output is an object without a file descriptor; write to a file") from None
