"""What the page needs from whoever computes the pictures."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy


class Stopped(Exception):
    """The user stopped the work."""


class Choice(NamedTuple):
    """A network that the user can choose.

    Attributes:
        name: of the network or the path of its file.
        label: what the page shows.
        fills: whether it fills holes; else it enlarges only.
        any_size: whether it can enlarge.
    """

    name: str
    label: str
    fills: bool
    any_size: bool


@dataclass
class Loaded:
    """A picture that was read and checked.

    Attributes:
        folder: its own folder, for files made of it.
        file: the picture's, in that folder.
        preview: a file that browsers show, perhaps of a smaller size.
        size: (height, width) of the picture.
        notes: what reading it changed or dropped.
    """

    folder: Path
    file: Path
    preview: Path
    size: tuple[int, int]
    notes: list[str]

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Request(NamedTuple):
    """What the user asks for.

    Attributes:
        model: the `Choice.name` of the network.
        mask: [h, w], bool, of the preview's size or None.
        scale: of the output.
        refine: whether to refine features.
        fast: whether to compute only what is near the holes, with another result.
    """

    model: str
    mask: numpy.ndarray | None
    scale: float
    refine: bool
    fast: bool


class Made(NamedTuple):
    """What was made of a picture.

    Attributes:
        file: the output, in the input's format.
        mask: the mask's file, if there is one.
        before, after: files of one size that browsers show.
        seconds: that the computation took.
        backend: what it ran on.
        command: the command line that writes the same file.
        notes: what the output's format cannot hold, and the like.
    """

    file: Path
    mask: Path | None
    before: Path
    after: Path
    seconds: float
    backend: str
    command: str
    notes: list[str]


class Studio(ABC):
    """Loads and computes pictures for the page. Errors that users can cause are OSError, ValueError, RuntimeError or
    MemoryError, with a message for them."""

    choices: list[Choice]

    @abstractmethod
    def load(self, file: Path) -> Loaded:
        """Reads and checks a picture, in a folder of its own."""

    @abstractmethod
    def make(self, picture: Loaded, request: Request, progress: Callable[[float, float], object]) -> Made:
        """Computes the output. What `progress` raises ends the work."""
