"""Proofs on a made-up GPU: bad backends, verdicts, the choice of the default, processes, and the file."""

import dataclasses
import itertools
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import made_up
import platformdirs
import pytest
import torch
from made_up.functional import OP

import inr_kernels
from inr_kernels._core import devices, dispatch, proof, verdicts
from inr_kernels._core.dispatch import OPS, Facts
from inr_kernels._core.proof import processes
from inr_kernels._core.verdicts import Verdict
from inr_kernels._core.verdicts import file as user_file

ALL = dict(OPS)
CPU, OTHER = torch.device("cpu"), torch.device("cpu", 1)
FACTS = Facts(CPU, torch.float32)


@pytest.fixture(autouse=True)
def gpu(tmp_path, monkeypatch):
    """CPU tensors are on a made-up GPU, without verdicts."""
    monkeypatch.setattr(verdicts, "file", lambda: tmp_path / "verdicts.json")
    monkeypatch.setattr(verdicts, "_tables", {})
    monkeypatch.setattr(verdicts, "_unsaved", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(proof, "_background", [])
    monkeypatch.delenv("INR_KERNELS_PROVE", raising=False)
    torch.set_float32_matmul_precision("highest")
    with made_up.installed():
        yield devices.find(CPU)


@pytest.fixture(scope="module")
def proven(tmp_path_factory):
    """The verdicts on all backends, in float32."""
    path = tmp_path_factory.mktemp("proof") / "verdicts.json"
    with pytest.MonkeyPatch.context() as patch, made_up.installed(), made_up.fast_processes() as command:
        patch.setattr(verdicts, "file", lambda: path)
        patch.setattr(processes, "COMMAND", command)
        patch.setattr(proof, "LIMIT", 2.0)
        made = inr_kernels.prove(dtype="float32", device="cpu", quiet=True)
        assert [v for found in verdicts.stored().values() for v in found] == made
    return {verdict.backend: verdict for verdict in made}


EXPECTED = {
    "right": "on",
    "megabytes": "on|forward on|backward on|off: not faster",  # printing takes time
    "slow": "off: not faster",
    "slow backward": "forward on; backward off: not faster",
    "wrong": "off: wrong: output 0 has an error of",
    "wrong gradient": "off: wrong: gradient 0 has an error of",
    "nan": "off: wrong: output 0 has an error of nan",
    "unwritten": "off: wrong: output 0 has an error of nan",
    "once in two": "off: wrong: output 0 differs between two runs",
    "segfault": "off: crashes: SIGSEGV",
    "memory": "off: out of memory",
    "raising": "off: raises SyntaxError: raises at import",
    "raising at import": "off: raises RuntimeError: at import",
    "hang": "off: hangs: ended after 2 s",
}


@pytest.mark.parametrize("backend", EXPECTED)
def test_every_backend_has_the_right_verdict(proven, backend):
    assert re.match(EXPECTED[backend], proven[backend].state)


def test_what_is_proven(proven):
    """Not the reference, nor what cannot run here or is for comparison."""
    assert set(proven) == set(EXPECTED)


def verdict(backend, reason="", kernel=(1e-3, 1e-3), dtype="float32", form="any"):
    return Verdict("made_up", backend, dtype, form, reason, kernel, (2e-3, 2e-3))


def chosen(facts=FACTS, **options):
    """The name of the default."""
    backend = OP.choose(None, facts, **options)
    return next(name for name, known in OP.backends.items() if known is backend)


def test_the_fastest_that_is_right_is_the_default(gpu):
    made = [verdict("wrong", "wrong", (1e-9, 1e-9)), verdict("slow", kernel=(1e-3, 3e-3))]
    verdicts.save(gpu.key, [*made, verdict("right", kernel=(5e-4, 1e-3)), verdict("gone", kernel=(1e-9, 1e-9))])
    assert chosen() == "right"
    verdicts.save(gpu.key, [verdict("right", kernel=(1.5e-3, 1e-3))])
    assert chosen() == "right"  # a process reads the verdicts once
    verdicts.reread()
    assert (
        chosen() == "slow" and chosen(backward=True) == "reference"
    )  # never another kernel's: it reads what slow saves
    assert OP.choose("wrong", FACTS) is OP.backends["wrong"]  # a request has precedence
    with inr_kernels.backend("nan"):
        assert OP.choose("nan", FACTS) is OP.backends["nan"]


def test_a_backend_that_cannot_run_is_not_chosen(gpu):
    verdicts.save(gpu.key, [verdict("other device"), verdict("right", kernel=(1.5e-3, 1e-3))])
    assert chosen() == "right"


def test_without_a_verdict_the_reference_runs_and_one_warning_names_the_command(gpu):
    with pytest.warns(UserWarning, match=r"Run `inr-kernels prove` \(about \d+ minutes\).* for Made-up 9000") as caught:
        assert chosen() == chosen() == chosen(Facts(CPU, torch.float16)) == "reference"
    assert len(caught) == 1


def test_no_warning_where_the_kernel_is_off_or_the_call_is_not_known(gpu):
    verdicts.save(gpu.key, [verdict("wrong", "wrong")])
    assert chosen() == "reference"
    unknown = inr_kernels.local_implicit.op.Facts(CPU, torch.float32)
    assert inr_kernels.local_implicit.op.OP.choose(None, unknown)


def test_verdicts_of_another_dtype_precision_or_form_do_not_count(gpu):
    verdicts.save(gpu.key, [verdict("right"), verdict("right", dtype="bfloat16")])
    assert chosen() == chosen(Facts(CPU, torch.bfloat16)) == "right"
    torch.set_float32_matmul_precision("high")
    with pytest.warns(UserWarning, match="not proven"):
        assert chosen() == "reference"
    torch.set_float32_matmul_precision("highest")
    verdicts.reread()
    verdicts.forget(lambda key, v: True)
    verdicts.save(gpu.key, [verdict("right", form="another")])
    assert chosen() == "reference"


def test_different_cards(gpu):
    """Verdicts of one card do not hold for another."""
    assert devices.find(OTHER).key != gpu.key
    verdicts.save(gpu.key, [verdict("right")])
    with pytest.warns(UserWarning, match="Made-up 5000"):
        assert (chosen(), chosen(Facts(OTHER, torch.float32))) == ("right", "reference")


def test_the_capture_of_a_graph_reads_only_memory(gpu, monkeypatch):
    verdicts.save(gpu.key, [verdict("right")])
    monkeypatch.setattr(made_up.MadeUp, "capturing", True)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("stored", "_read", "file"):
            patch.setattr(verdicts, name, None)
        patch.setattr(made_up.MadeUp, "name", None)
        assert chosen() == "reference"  # without a warning, which would read files
        patch.setattr(made_up.MadeUp, "capturing", False)
    monkeypatch.setattr(made_up.MadeUp, "capturing", False)
    assert chosen() == "right"
    monkeypatch.setattr(made_up.MadeUp, "capturing", True)
    monkeypatch.setattr(verdicts, "stored", None)
    assert chosen() == "right"


def test_explain(gpu, capsys, monkeypatch):
    monkeypatch.delitem(OP.backends, "raising at import")
    call = inr_kernels.explain, "made_up", torch.zeros(3)
    assert "right      runs; not proven: run `inr-kernels prove`\n" in call[0](*call[1:])
    verdicts.reread()
    verdicts.save(gpu.key, [verdict("right"), verdict("wrong", "wrong: by 1"), verdict("right", form="other")])
    text = call[0](*call[1:])
    assert "  right      runs; proof: on in 2 of 2 forms\n" in text and "default" not in text  # by the call
    text = inr_kernels.explain("made_up", x=torch.zeros(3), backend=None)
    assert "  right      runs; proof: on (2.0×, 2.0×)  <- default\n" in text
    assert "  wrong      runs; proof: off: wrong: by 1 (2.0×, 2.0×)\n" in text


@pytest.mark.parametrize("place", ["a file as its folder", "no home"])
def test_without_a_place_for_the_file_verdicts_stay_in_memory(gpu, tmp_path, monkeypatch, place):
    """A read-only home raises the same kind of error as a folder that is a file."""
    (tmp_path / "occupied").write_text("")
    path = None if place == "no home" else tmp_path / "occupied" / "verdicts.json"
    monkeypatch.setattr(verdicts, "file", lambda: path)
    with verdicts.proving(gpu, pytest.fail), pytest.warns(UserWarning, match="hold for this process only"):
        verdicts.save(gpu.key, [verdict("right")])
    verdicts.save(gpu.key, [verdict("slow")])  # without a second warning
    if path is None:
        assert chosen() == "right"
        assert verdicts.stored() == {gpu.key: [verdict("right"), verdict("slow")]}
    assert not verdicts.is_proving(gpu)


def test_a_home_that_is_missing(monkeypatch):
    assert user_file().is_absolute()
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_, **__: Path("~/.cache/inr-kernels"))
    assert user_file() is None

    def unknown(*_, **__):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr(platformdirs, "user_cache_path", unknown)
    assert user_file() is None


def test_a_backward_is_on_only_with_its_forward():
    """A kernel's backward reads what its forward saves, which was proven together."""
    for forward, backward in itertools.product((0.5, 2.0), repeat=2):
        made = dataclasses.replace(verdict("right"), reason="", kernel=(1.0, 1.0), reference=(forward, backward))
        assert made.is_on() == (forward > 1)
        assert made.is_on(backward=True) == (forward > 1 and backward > 1)


def fork(run):
    """A forked child that runs this; it touches files only, so torch's threads do not matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def test_two_processes_save_at_once(gpu):
    def save(name):
        for form in range(20):
            verdicts.save(gpu.key, [verdict(name, form=str(form))])

    children = [fork(lambda name=name: save(name)) for name in ("right", "slow")]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert len(verdicts.stored()[gpu.key]) == 40


def test_one_process_proves_on_a_device_at_a_time(gpu, tmp_path):
    ready, go = os.pipe(), os.pipe()

    def hold():
        with verdicts.proving(gpu, lambda: os._exit(2)):
            os.write(ready[1], b".")
            os.read(go[0], 1)

    child = fork(hold)
    os.read(ready[0], 1)
    assert verdicts.is_proving(gpu) and not verdicts.is_proving(devices.find(OTHER))
    with verdicts.proving(gpu, lambda: os.write(go[1], b".")):  # told to end while we wait
        assert os.waitpid(child, 0)[1] == 0
    assert not verdicts.is_proving(gpu)
    for end in (*ready, *go):
        os.close(end)


@pytest.fixture
def started(monkeypatch):
    """The command lines of the processes that were started, none of which runs."""
    commands = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: commands.append((command, options["env"])))
    return commands


def test_prove_in_the_background(gpu, monkeypatch, started):
    monkeypatch.setenv("INR_KERNELS_PROVE", "auto")
    with pytest.warns(UserWarning, match="proven in the background"):
        assert chosen() == chosen() == "reference"
    ((command, environment),) = started
    assert command[1:] == ["-m", "inr_kernels", "prove", "--missing", "--device", "cpu"]
    assert not environment["INR_KERNELS_PROVE"]


def test_only_one_rank_of_a_job_proves_in_the_background(gpu, monkeypatch, started):
    monkeypatch.setenv("INR_KERNELS_PROVE", "auto")
    monkeypatch.setattr(verdicts, "is_proving", lambda device: True)
    with pytest.warns(UserWarning, match="background"):
        chosen()
    assert not started


def test_missing_proves_the_rest_only(gpu, monkeypatch):
    ran = []

    def run(job):
        ran.append((job.backend, job.dtype))
        return verdict(job.backend, dtype=job.dtype)

    monkeypatch.setattr(processes, "run", run)
    verdicts.save(gpu.key, [verdict(name, kernel=(1.5e-3, 1e-3)) for name in EXPECTED if name != "right"])
    generation = verdicts.generation()
    assert inr_kernels.prove(dtype=["float32"], device="cpu", missing=True) == [verdict("right")]
    assert set(ran) == {("right", "float32")} and verdicts.generation() == generation + 1 and chosen() == "right"
    inr_kernels.prove(OP.function, device="cpu", quick=True)
    assert {dtype for _, dtype in ran} == set(proof.DTYPES)


def test_an_interruption_loses_no_verdict(gpu, monkeypatch):
    def run(job):
        if job.backend == "slow":
            raise KeyboardInterrupt
        return verdict(job.backend)

    monkeypatch.setattr(processes, "run", run)
    monkeypatch.setattr(made_up.MadeUp, "workers", lambda device: 1)
    with pytest.raises(KeyboardInterrupt):
        inr_kernels.prove(device="cpu", dtype="float32")
    assert verdicts.stored() == {gpu.key: [verdict("right")]}


def test_an_interruption_ends_the_processes(gpu, monkeypatch):
    monkeypatch.setattr(processes, "COMMAND", [sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    started, popen = [], subprocess.Popen

    def start(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            inr_kernels.prove(device="cpu", dtype="float32")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert started and {process.poll() for process in started} == {-signal.SIGKILL}
    assert not verdicts.stored()


def test_a_lack_of_memory_beside_other_processes_is_tried_again_alone(gpu, monkeypatch):
    def run(job):
        return verdict(job.backend, proof.OUT_OF_MEMORY if job.stage == "check" else "")

    monkeypatch.setattr(processes, "run", run)
    assert all(v.is_on() for v in inr_kernels.prove(device="cpu", dtype="float32"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"op": "foo"}, "op must be one of made_up; got 'foo'"),
        ({"op": print}, "op must be one of made_up; got 'print'"),
        ({"dtype": "int8"}, "dtype must be one of float32, tf32, .*; got 'int8'"),
        ({"device": 3}, "device must be 'cpu' or a GPU that torch sees.*; got 3"),
        ({"device": "cuda:9"}, "device must be 'cpu' or a GPU.*; got 'cuda:9'"),
        ({"device": "foo"}, "device must be 'cpu' or a GPU.*; got 'foo'"),
        ({"device": "meta"}, "device must be 'cpu' or a GPU.*; got 'meta'"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        inr_kernels.prove(**({"device": "cpu"} | arguments))


def test_the_forms_of_a_gpus_driver(tmp_path, monkeypatch):
    path = tmp_path / "version"
    monkeypatch.setattr(devices, "_DRIVER", path)
    for text, version in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86  Release Build", "570.86"),
    ):
        path.write_text(text)
        assert devices._driver() == version


@pytest.mark.parametrize("name", ALL)
def test_problems_of_every_op(name):
    """On a GPU and a CPU, an op has the same forms, and each call is one that the public function takes."""
    op = ALL[name]
    small, large = (proof.forms(op, CPU, size) for size in (False, True))
    assert list(small) == list(large) and "" not in small
    for _, problems in small.values():
        assert len({problem.name for problem in problems}) == len(problems) >= 3
        for problem in problems:
            arguments, options = problem.build(torch.device("meta"))
            (problem.function or op.function)(*arguments, **options)
