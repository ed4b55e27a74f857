"""Every op at the edges of its arguments: sizes of 0, tensors without data, not dense, and torch.jit.trace."""

import inspect
import warnings

import pytest
import torch
from op_backends import backends_of
from public_calls import CASES

from inr_kernels import (
    ElementwiseFilter,
    FourierUnit,
    LocalImplicitDecoder,
    NeighborhoodAttention2D,
    UnmaskAttention,
    explain,
    local_implicit_decode,
)
from inr_kernels import backend as on_backend
from inr_kernels._core.dispatch import OPS
from inr_kernels.fourier_unit import SpectralTransform

# The options of a case that are no dimensions of its tensors.
OPTIONS = {"coefficients", "kernel_size", "dilation", "stride", "upscale", "groups"}


def empty_problems():
    """Parameters: op, the options of its case with one dimension of 0."""
    for op, case in CASES.items():
        for name, parameter in inspect.signature(case).parameters.items():
            default = parameter.default
            if name in OPTIONS or isinstance(default, bool):
                continue
            if isinstance(default, int):
                yield pytest.param(op, {name: 0}, id=f"{op}-{name}")
            elif isinstance(default, tuple):
                for i in range(len(default)):
                    yield pytest.param(op, {name: (*default[:i], 0, *default[i + 1 :])}, id=f"{op}-{name}-{i}")


def outcome(case, backend):
    """The results and gradients, or the error."""
    try:
        return case.run(torch.float32, backend)
    except (TypeError, ValueError) as error:
        return str(error)


@pytest.mark.parametrize(("op", "options"), list(empty_problems()))
def test_backends_agree_on_dimensions_of_0(op, options):
    case = CASES[op](**options)
    expected = outcome(case, "reference")
    for backend in [None, *backends_of(op)]:
        if isinstance(expected, str):
            assert outcome(case, backend) == expected
            assert " must " in expected
        else:
            torch.testing.assert_close(outcome(case, backend), expected, rtol=1e-4, atol=1e-5)
            assert all(t.isfinite().all() for t in expected)


def test_a_batch_of_0_has_a_result():
    for op, case in CASES.items():
        batch = {"shape": (0, 8, 5, 7)} if op == "unmask_attention" else {"batch": 0}
        out, *_ = case(**batch).run(torch.float32, None)
        assert len(out) == 0


TENSORS = {
    "elementwise_filter": {"x": (1, 4, 5, 6), "kernel": (1, 36, 5, 6)},
    "unmask_attention": {"feat": (1, 4, 5, 6), "mask": (1, 1, 5, 6)},
    "neighborhood_attention": dict.fromkeys(("query", "key", "value"), (1, 5, 6, 2, 4)),
    "conv2d": {"x": (1, 4, 5, 6), "weight": (2, 4, 3, 3)},
    "conv3x3": {"x": (1, 4, 5, 6), "weight": (2, 4, 3, 3)},
    "fourier_unit": {
        "x": (1, 4, 5, 6),
        "weight": (8, 8),
        **dict.fromkeys(("bn_weight", "bn_bias", "running_mean", "running_var"), (8,)),
    },
    "local_implicit": {
        "feat": (1, 8, 5, 7),
        "coord": (1, 10, 2),
        "weights": [(16, 74), (3, 16)],
        "biases": [(16,), (3,)],
    },
    "mlp": {"x": (1, 4, 6), "weights": [(9, 6), (3, 9)], "biases": [(9,), (3,)]},
    "local_texture": {
        "coef": (1, 8, 5, 7),
        "freq": (1, 8, 5, 7),
        "coord": (1, 10, 2),
        "cell": (1, 2),
        "phase_weight": (4, 2),
        "weights": [(16, 8), (3, 16)],
        "biases": [(16,), (3,)],
    },
}
REST = {
    "elementwise_filter": {"kernel_size": 3},
    "neighborhood_attention": {"kernel_size": 3},
    "local_implicit": {"cell": None},
}


def call(op, change=lambda tensor: tensor, only=None, **options):
    """Calls an op's function with these tensors, all of them or `only` one changed."""

    def tensors(name, shapes):
        if isinstance(shapes, list):
            return [tensors(name, shape) for shape in shapes]
        return change(torch.rand(shapes)) if only in (None, name) else torch.rand(shapes)

    arguments = {name: tensors(name, shapes) for name, shapes in TENSORS[op].items()}
    return OPS[op].function(**arguments, **REST.get(op, {}), **options)


def test_every_op_is_called():
    assert TENSORS.keys() == OPS.keys()


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_have_shapes_only(op):
    assert call(op, lambda tensor: tensor.to("meta")).shape == call(op).shape


KINDS = {
    "sparse": (torch.Tensor.to_sparse, "torch.sparse_coo"),
    "mkldnn": (torch.Tensor.to_mkldnn, "torch._mkldnn"),
    "nested": (lambda tensor: torch.nested.nested_tensor([tensor]), "nested"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, tensors in TENSORS.items() for name in tensors])
def test_other_tensors_are_refused(op, name, kind):
    change, got = KINDS[kind]
    with pytest.raises(TypeError, match=rf"{name}(\[0\])? must be a dense tensor; got {got}"):
        call(op, change, only=name)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", [3, True, b"cpu"])
def test_a_backend_is_a_name(op, backend):
    with pytest.raises(TypeError, match=f"backend must be a name or None; got {backend!r}"):
        call(op, backend=backend)


@pytest.mark.parametrize("name", ["weights", "biases"])
def test_a_decoder_needs_lists_of_tensors(name):
    good = {"weights": [torch.rand(16, 74), torch.rand(3, 16)], "biases": [torch.rand(16), torch.rand(3)]}
    with pytest.raises(TypeError, match=f"{name} must be a list of tensors; got NoneType"):
        local_implicit_decode(torch.rand(1, 8, 5, 7), torch.rand(1, 9, 2), None, **good | {name: None})


def test_explain_names_what_it_got():
    with pytest.raises(ValueError, match=r"op must be one of .*, or its function; got a module, UnmaskAttention"):
        explain(UnmaskAttention())
    with pytest.raises(TypeError, match=r"args must be those of unmask_attention, first a torch.Tensor; got ndarray"):
        explain("unmask_attention", torch.rand(1, 3, 4, 4).numpy())


MODULES = {
    "ElementwiseFilter": (lambda: ElementwiseFilter(3), [(1, 4, 5, 6), (1, 36, 5, 6)]),
    "UnmaskAttention": (UnmaskAttention, [(1, 4, 5, 6), (1, 1, 5, 6)]),
    "NeighborhoodAttention2D": (lambda: NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True), [(1, 5, 6, 8)]),
    "a small map": (
        lambda: NeighborhoodAttention2D(8, 2, 7, pad_small_inputs=True),
        [(1, 5, 6, 8)],
    ),
    "FourierUnit": (lambda: FourierUnit(4, 6), [(1, 4, 5, 6)]),
    "SpectralTransform": (lambda: SpectralTransform(4, 8, enable_lfu=False), [(1, 4, 5, 6)]),
    "LocalImplicitDecoder": (lambda: LocalImplicitDecoder(8, hidden=(16,)), [(1, 8, 5, 6), (1, 9, 2), (1, 9, 2)]),
}


@pytest.mark.parametrize("name", MODULES)
def test_traces(name):
    """torch.jit.trace, which passes sizes as tensors, gives the same results for the traced sizes."""
    build, shapes = MODULES[name]
    module, inputs, others = build().eval(), *([torch.rand(shape) for shape in shapes] for _ in range(2))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sizes become constants, and that torch.jit is deprecated
        traced = torch.jit.trace(module, tuple(inputs))
        for values in (inputs, others):
            torch.testing.assert_close(traced(*values), module(*values))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_modules_take_a_batch_of_0(name, backend):
    build, shapes = MODULES[name]
    module = build().eval()
    with on_backend(backend):
        out = module(*(torch.rand(0, *shape[1:]) for shape in shapes))
    assert len(out) == 0 and out.shape[1:] == module(*map(torch.rand, shapes)).shape[1:]
