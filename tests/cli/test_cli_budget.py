"""Reading ahead within --max-memory: `Budget`, and runs over a folder with little memory."""

import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from test_cli_folders import enlarge, fill, folder, noise, save, tree  # noqa: F401, folder runs in each test

from inr_kernels.cli import pictures, upscale
from inr_kernels.cli.budget import Budget


def job(decoding, need):
    return SimpleJob(decoding=decoding, need=need)


class SimpleJob(SimpleNamespace):
    __hash__ = object.__hash__
    __eq__ = object.__eq__


def admitted(budget, one):
    """Whether a picture is admitted at once; its thread goes on waiting if not."""
    thread = threading.Thread(target=budget.admit, args=(one,), daemon=True)
    thread.start()
    thread.join(0.2)
    return not thread.is_alive()


def test_counts_what_waits_and_what_is_computed(monkeypatch):
    monkeypatch.setattr(pictures, "unused_memory", lambda: 1e9)
    budget = Budget(limit=100, workspace=10)
    first, second, third = job(20, 60), job(20, 60), job(21, 60)
    assert admitted(budget, first) and budget.fits([first])
    assert admitted(budget, second), "10 + 2 x 20 decoded, and 30 more to compute one"
    assert budget.fits([first]) and not budget.fits([first, second]), "10 + 2 x 50"
    assert not admitted(budget, third), "10 + 2 x 20 + 21 decoded, and 30 more to compute one"


@pytest.mark.parametrize("large", [True, False])
def test_one_picture_alone_is_always_admitted(large):
    budget = Budget(limit=100, workspace=10)
    assert admitted(budget, job(500 if large else 5, 500))
    assert not admitted(budget, job(500, 500))


def test_the_reader_goes_on_when_there_is_room(monkeypatch):
    monkeypatch.setattr(pictures, "unused_memory", lambda: 1e9)
    budget, reading = Budget(limit=100, workspace=0), Future()
    first, second = job(60, 90), job(60, 90)
    budget.admit(first)
    thread = threading.Thread(target=lambda: reading.set_result(budget.admit(second)))
    thread.start()
    assert not budget.wait(reading), "it waits for memory"
    budget.start([first])
    assert not reading.done()
    budget.remove(first)
    assert budget.wait(reading)
    thread.join()


def test_close_ends_the_waiting(monkeypatch):
    monkeypatch.setattr(pictures, "unused_memory", lambda: 1e9)
    budget, errors = Budget(limit=100, workspace=0), []
    budget.admit(job(90, 90))

    def reader():
        try:
            budget.admit(job(90, 90))
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=reader)
    thread.start()
    budget.close()
    thread.join(20)
    assert errors == ["the run ends"]


@pytest.mark.parametrize(("gigabytes_", "most"), [("16", 7), ("0.0102", 1)])
def test_decoded_pictures_stay_within_the_memory(monkeypatch, gigabytes_, most):
    """Pictures of different sizes wait for others of theirs; with little memory they are computed at once."""
    for index in range(6):
        save(f"many/{index}.png", noise(100 + index, 100))
    decoded, seen = set(), []
    decode, write = upscale.Upscaling.decode, pictures.write

    def watched_decode(self, job):
        decode(self, job)
        decoded.add(job)
        seen.append(len(decoded))

    def watched_write(job, colour):
        write(job, colour)
        decoded.discard(job)

    monkeypatch.setattr(upscale.Upscaling, "decode", watched_decode)
    monkeypatch.setattr(pictures, "write", watched_write)
    words = ["--batch-size", "4", "--workspace", "8", "--max-memory", gigabytes_]
    enlarge("many", "-o", "large", *words)
    assert len(tree("large")) == 6 and max(seen) <= most and (most == 1 or max(seen) > 2)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_ends_a_reader_that_waits(error, monkeypatch):
    for index in range(4):
        save(f"many/{index}.png", noise(100, 100))

    def interrupted(self, group, progress):
        raise error(130)

    monkeypatch.setattr(upscale.Upscaling, "compute", interrupted)
    enlarge("many", "-o", "large", "--workspace", "8", "--max-memory", "0.0102", status=130)
    assert tree("large") == []


def test_crops_wait_until_their_need_is_known(monkeypatch):
    """The memory of a crop depends on the holes, which are read after the picture was admitted."""
    for name in ("a", "b", "c"):
        save(f"many/{name}.png", noise(120, 130))
    holes = noise(120, 130)[..., 0] * 0
    holes[10:100, 10:100] = 255
    save("mask.png", holes)
    admit, admitted_twice = Budget.admit, []

    def watched(self, job):
        admitted_twice.append((job.names.input, job.need))
        admit(self, job)

    monkeypatch.setattr(Budget, "admit", watched)
    fill("many", "--mask", "mask.png", "-o", "out", "--hd-strategy", "crop", "--hd-strategy-crop-trigger-size", "0")
    assert [name for name, _ in admitted_twice] == [f"many/{name}.png" for name in ("a", "a", "b", "b", "c", "c")]
    assert all(
        second > first for (_, first), (_, second) in zip(admitted_twice[::2], admitted_twice[1::2], strict=True)
    )
