"""Accelerated models with torch features: casts, pickles, copies, replicas, threads, compilation."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from upstream_decoders import (
    Decoder,
    StoresFeatures,
    TakesFeatures,
    assert_close,
    is_accelerated,
    one_thread,  # noqa: F401  a fixture
    original,
    problem,
    without_cuda,
)

from inr_kernels import accelerate
from inr_kernels.integrations import restore

BOTH = pytest.mark.parametrize("cls", [StoresFeatures, TakesFeatures])


@BOTH
def test_state_dict_and_casts(cls):
    trained, model, args = cls(), accelerate(cls()), problem()
    model.load_state_dict(trained.state_dict(), strict=True)
    assert_close(model.eval()(*args), original(trained, *args))
    half = model.to(torch.bfloat16)
    half_args = [args[0].bfloat16(), *args[1:]]
    assert_close(half(*half_args), original(trained, *args), 0.05)  # float32 coordinates give a float32 output


def test_half_precision_coordinates_are_computed_in_float32():
    trained, args = TakesFeatures(), problem()
    half = [t.bfloat16() for t in args]
    theirs = original(trained, *(t.float() for t in half))
    ours = accelerate(copy.deepcopy(trained).bfloat16())(*half)
    assert ours.dtype == original(trained.bfloat16(), *half).dtype == torch.bfloat16
    assert (ours - theirs).abs().max() <= 0.03 * theirs.abs().max()


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_returns_the_dtype_of_the_original(cls, dtype):
    model, args = accelerate(cls()), problem()
    with torch.autocast("cpu", dtype):
        theirs = original(model, *args)
        ours = model(*args)
    assert theirs.dtype == torch.float32
    assert_close(ours, theirs, 0.05)
    assert is_accelerated(model, *args)


@BOTH
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_copies_and_pickles(cls, protocol, caplog):
    model, args = accelerate(cls()), problem()
    caplog.clear()
    with torch.no_grad():
        theirs = model(*args)
        for twin in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model, protocol))):
            assert type(twin) is type(model)
            assert_close(twin(*args), theirs)
            assert is_accelerated(twin, *args)
            assert type(restore(twin)) is cls
    with torch.no_grad():
        nn.init.zeros_(twin.imnet.layers[0].weight)
        assert_close(model(*args), theirs)
    assert not caplog.records


@BOTH
def test_torch_save_is_read_by_another_process(cls, tmp_path, run_python):
    model, args = accelerate(cls()), problem()
    with torch.no_grad():
        theirs = model(*args)
        torch.save((model, args), tmp_path / "model.pt")
    code = (
        "import inr_kernels, torch; from inr_kernels.integrations import class_swap\n"
        f"model, args = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert isinstance(model, class_swap.AcceleratedModule)\n"
        f"torch.save(model(*args).detach(), {str(tmp_path / 'out.pt')!r})"
    )
    run_python(code, PYTHONPATH=str(Path(__file__).parents[1] / "support"))
    assert_close(torch.load(tmp_path / "out.pt"), theirs)


def test_unpickling_verifies_again(monkeypatch):
    """The class may have changed since the object was pickled."""
    data = pickle.dumps(accelerate(StoresFeatures()))
    monkeypatch.setattr(Decoder, "mirror", False)
    assert type(pickle.loads(data)) is StoresFeatures


def replicate(model):
    """A replica as nn.DataParallel makes it on each device: with plain tensors instead of parameters."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module.named_children():
            setattr(replica, name, replicas[child])
        for name, parameter in module.named_parameters(recurse=False):
            setattr(replica, name, parameter.view_as(parameter))
    return replicas[model]


@BOTH
@pytest.mark.parametrize("grad", [False, True])
def test_data_parallel_replicas_in_threads(cls, grad):
    model, problems = accelerate(cls()), [problem() for _ in range(8)]
    theirs = [original(model, *args) for args in problems]

    def decode(args):
        with torch.set_grad_enabled(grad):
            return replicate(model)(*args)

    with ThreadPoolExecutor(2) as pool:
        for ours, their in zip(pool.map(decode, problems), theirs, strict=True):
            assert_close(ours, their)
            assert ours.requires_grad == grad
    assert is_accelerated(replicate(model), *problems[0])
    assert is_accelerated(nn.DataParallel(model), *problems[0])


def test_one_decoder_in_two_threads():
    model, problems = accelerate(TakesFeatures()), [problem() for _ in range(8)]
    theirs = [original(model, *args) for args in problems]
    with torch.no_grad(), ThreadPoolExecutor(2) as pool:
        for ours, their in zip(pool.map(lambda args: model(*args), problems), theirs, strict=True):
            assert_close(ours, their)


@BOTH
def test_compiles_without_graph_breaks(cls):
    model, args = accelerate(cls()), problem()
    theirs = model(*args)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*args), theirs)
    torch.compiler.reset()
    model.imnet.layers[2].register_forward_hook(lambda module, args, out: 2 * out)
    with without_cuda():
        assert_close(torch.compile(model, backend="eager")(*args), original(model, *args))


def test_exports():
    model, args = accelerate(TakesFeatures()), problem()
    queries = {1: torch.export.Dim("queries", min=2, max=1000)}
    program = torch.export.export(model, args, dynamic_shapes=[None, queries, queries])
    more = problem(queries=50)
    assert_close(program.module()(*more), original(model, *more))
