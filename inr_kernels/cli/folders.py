"""Runs a command for a picture, or for a folder of pictures: reads and writes while it computes."""

import datetime
import errno
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from inr_kernels._core.checks import require
from inr_kernels._core.files import check_writable
from inr_kernels._core.text import one_line

from . import pictures
from .jobs import Task
from .listing import listing
from .names import Names
from .pictures import Job, say

T = TypeVar("T")
R = TypeVar("R")

FAILURES = (OSError, ValueError, RuntimeError, MemoryError)  # of one picture; the others are done
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # nothing else could be written, either
BAR = "{percentage:3.0f}%|{bar}| {desc}, {elapsed}, {remaining} left"


def run(task: Task) -> None:
    """Runs a command for the picture or the folder of pictures that its arguments name."""
    args = task.args
    if args.is_folder:
        _run_folder(task)
        return
    pictures.prepare_computation(args)
    job = task.read(args.names)
    task.open()
    task.check(job)
    task.decode(job)
    with pictures.computing(args) as progress:
        colour = task.compute([job], progress)
    pictures.write(job, colour)


class Result(NamedTuple):
    """What a process did: the pictures written and skipped, and why others failed, by their names."""

    written: int
    skipped: int
    failures: dict[str, str]


def _run_folder(task: Task) -> None:
    """Runs a command for a folder; with torchrun, each process does its share, and the first one reports.

    Raises SystemExit with status 1 if a picture failed.
    """
    args, (rank, processes) = task.args, _rank()
    names, failures = listing(args)
    names = names[rank::processes]  # of all pictures: which ones are finished changes while other processes work
    todo = [one for one in names if args.overwrite or not os.path.isfile(one.output)]
    args.quiet = True if rank else args.quiet
    if args.device == "cuda" and processes > 1:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', rank)}"
    pictures.prepare_computation(args)
    os.makedirs(args.output, exist_ok=True)
    if todo:
        _check_folder(args.output)
    task.open()
    with tqdm(total=len(todo), bar_format=BAR, disable=args.quiet) as bar:
        run = _Run(task, bar)
        run.all(todo)
    written = len(todo) - len(run.failures)
    result = Result(written, len(names) - len(todo), run.failures | ({} if rank else failures))
    results = _gathered(result, rank, processes)
    if results:
        _report(args.output, results)
    if any(result.failures for result in results):
        raise SystemExit(1)


def _check_folder(folder: str) -> None:
    """Raises the OSError, with the folder's name, of a folder in which no file can be made."""
    try:
        check_writable(os.path.join(folder, ".inr-kernels"))
    except OSError as error:
        raise type(error)(error.errno, error.strerror, folder) from error


def _rank() -> tuple[int, int]:
    """The number of this process and of all, as torchrun sets them; (0, 1) without it."""
    values = {name: os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    for name, value in values.items():
        require(value.isdecimal(), f"the environment variable {name}", "be a number", value)
    rank, processes = map(int, values.values())
    require(rank < processes, "the environment variable RANK", f"be less than WORLD_SIZE = {processes}", rank)
    return rank, processes


def _gathered(result: Result, rank: int, processes: int) -> list[Result]:
    """With torchrun, the results of all processes in the first one, and none in the others; else this process's.

    All wait for each other: when one exits with an error, torchrun ends the others.
    """
    if processes == 1 or not dist.is_torchelastic_launched():
        return [result]
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=365))
    results = [result] * processes
    dist.all_gather_object(results, result)
    dist.destroy_process_group()
    return [] if rank else results


def _report(output: str, results: list[Result]) -> None:
    """Prints a line for each failure, and one with the numbers."""
    failures = {name: message for result in results for name, message in result.failures.items()}
    for name, message in failures.items():
        say(name, message)
    skipped = sum(result.skipped for result in results)
    counts = {"written": sum(result.written for result in results), "skipped": skipped, "failed": len(failures)}
    say(output, ", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "written"))


class _Run:
    """The work on the pictures of a folder.

    One thread reads the next pictures and one writes the last ones, while the caller's computes. Pictures of one size
    wait for each other until they are `--batch-size`. There is one reader, as reading changes settings of Pillow.
    """

    def __init__(self, task: Task, bar: tqdm):
        self.task, self.args, self.bar = task, task.args, bar
        self.failures: dict[str, str] = {}
        self.writing: deque[tuple[Job, Future[None]]] = deque()

    def all(self, names: list[Names]) -> None:
        """Computes and writes all pictures."""
        batch, waiting = self.args.batch_size, defaultdict[object, list[Job]](list)
        self.show(0)
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as self.writer:
            for one, reading in _ahead(reader, self.task.load, names, batch):
                job = self.attempt(one, reading.result)
                if job is None:
                    self.show(self.bar.n + 1)
                    continue
                key = job.source.size, job.size
                waiting[key].append(job)
                if len(waiting[key]) == batch:
                    self.compute(waiting.pop(key))
                elif sum(map(len, waiting.values())) >= 2 * batch:
                    self.compute(waiting.pop(next(iter(waiting))))  # the group that began first
            for group in waiting.values():
                self.compute(group)
            self.finish_writing(0)

    def compute(self, group: list[Job]) -> None:
        """Computes pictures of one size and has them written; one by one if they fail together, or lack memory."""
        before = self.bar.n
        need = sum(job.need for job in group) - (len(group) - 1) * self.args.workspace
        if need + sum(job.need for job, _ in self.writing) > self.room():
            self.finish_writing(0)
        if len(group) == 1:
            colours = self.attempt(group[0].names, lambda: self.colours(group))
        else:
            try:
                colours = self.colours(group) if need <= self.room() else None
            except FAILURES:
                colours = None
            if colours is None:
                self.show(before)
                for job in group:
                    self.compute([job])
                return
        self.show(before + len(group))
        if colours is not None:
            for job, colour in zip(group, colours, strict=True):
                self.writing.append((job, self.writer.submit(self.write, job, colour[None])))
        self.finish_writing(len(group))

    def colours(self, group: list[Job]) -> torch.Tensor:
        """The colours of a group; shows the progress."""
        before = self.bar.n
        with pictures.memory_options(self.args):
            return self.task.compute(group, lambda done, total: self.show(before + len(group) * done / total))

    def write(self, job: Job, colour: torch.Tensor) -> None:
        """Writes a picture, in the thread that writes; in a subfolder if it was in one."""
        os.makedirs(os.path.dirname(job.names.output), exist_ok=True)
        pictures.write(job, colour)

    def room(self) -> float:
        """Bytes that the work may need."""
        return min(self.args.max_memory, pictures.unused_memory())

    def finish_writing(self, left: int) -> None:
        """Waits until at most `left` pictures are being written."""
        while len(self.writing) > left:
            job, future = self.writing.popleft()
            self.attempt(job.names, future.result)

    def attempt(self, names: Names, call: Callable[[], R]) -> R | None:
        """Returns the result of a call for a picture; notes its failure, and returns None.

        Raises:
            OSError: the disk is full.
        """
        try:
            return call()
        except FAILURES as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            self.failures[names.input] = one_line(error).removeprefix(f"input {names.input}: ")
            return None

    def show(self, done: float) -> None:
        """Moves the bar; done: in pictures."""
        self.bar.desc = f"{int(done + 1e-9)} of {self.bar.total} pictures"
        self.bar.update(done - self.bar.n)


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], count: int
) -> Iterator[tuple[T, Future[R]]]:
    """Yields each item with a call of the function for it, which the pool has begun for `count` items in advance."""
    begun: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        begun.append((item, pool.submit(function, item)))
        if len(begun) > count:
            yield begun.popleft()
    yield from begun
