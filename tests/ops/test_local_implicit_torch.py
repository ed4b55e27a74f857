"""local_implicit inside torch: opcheck, torch.compile, torch.export."""

import pytest
import torch
from local_implicit_cases import Case

import inr_kernels
from inr_kernels import LocalImplicitDecoder
from inr_kernels.local_implicit.functional import Form, hoist_features


def op_arguments(gradients, after="last", cell_decode=True):
    """The arguments of torch.ops.inr_kernels.local_implicit."""
    case = Case(ensemble_after=after, cell_decode=cell_decode)
    feat, coord, cell, weights, biases = case.cast(torch.float32)
    hoisted = hoist_features(feat, weights[0], biases[0], Form(ensemble_after=after))
    position = weights[0][:, 45:].clone()
    for leaf in (hoisted, position, *weights[1:], *biases[1:]):
        leaf.requires_grad_(gradients)
    y, x = (t.unsqueeze(1) for t in coord.unbind(-1))
    cell = None if cell is None else cell[:, None]
    return hoisted, y, x, cell, position, weights[1:], biases[1:], 6, 0, True, after == "first", ""


@pytest.mark.parametrize("cell", [True, False])
@pytest.mark.parametrize("after", ["last", "first"])
@pytest.mark.parametrize("gradients", [False, True])
def test_opcheck_forward(gradients, after, cell):
    torch.library.opcheck(torch.ops.inr_kernels.local_implicit.default, op_arguments(gradients, after, cell))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_opcheck_backward(needs):
    args = op_arguments(False)
    grad = torch.randn(*args[1].shape, 3)
    torch.library.opcheck(torch.ops.inr_kernels.local_implicit_backward.default, (grad, *args, *needs))


class Model(torch.nn.Module):
    """An encoder and a decoder, as people train them."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Conv2d(3, 6, 3, padding=1)
        self.decoder = LocalImplicitDecoder(6, hidden=(20, 17))

    def forward(self, image, coord, cell):
        return self.decoder(self.encoder(image), coord, cell)


def inputs(queries=11):
    return torch.randn(2, 3, 6, 7), torch.rand(2, queries, 2) * 2 - 1, torch.full((2, 2), 0.1)


def test_compile_trains():
    model, args = Model(), inputs()
    compiled = torch.compile(model, fullgraph=True)
    runs = []
    for run in (model, compiled):
        out = run(*args)
        runs.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    for eager, fused in zip(*runs, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-5, atol=1e-6)


def test_compile_infers_with_other_shapes():
    model = Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for queries in (5, 11, 12):
            args = inputs(queries)
            torch.testing.assert_close(compiled(*args), model(*args), rtol=1e-5, atol=1e-6)


def test_compile_renders():
    decoder, feat = LocalImplicitDecoder(6, hidden=(20, 17)), torch.randn(2, 6, 6, 7)
    compiled = torch.compile(lambda f: decoder.render(f, (15, 16)), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(feat), decoder.render(feat, (15, 16)), rtol=1e-5, atol=1e-6)


def test_compiled_graph_obeys_the_context(monkeypatch):
    decoder, (_, coord, cell), feat = LocalImplicitDecoder(6, hidden=(20, 17)), inputs(), torch.randn(2, 6, 6, 7)
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(feat, coord, cell)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with inr_kernels.backend("triton"), pytest.raises(RuntimeError, match="cannot run local_implicit"):
            compiled(feat, coord, cell)


@pytest.mark.parametrize("strict", [True, False])
def test_export_with_any_number_of_queries(strict):
    model, queries = Model(), torch.export.Dim("queries", min=2, max=100_000)
    static = torch.export.Dim.STATIC
    shapes = ({0: static}, {0: static, 1: queries}, {0: static})
    program = torch.export.export(model, inputs(), dynamic_shapes=shapes, strict=strict)
    args = inputs(33)
    torch.testing.assert_close(program.module()(*args), model(*args), rtol=1e-5, atol=1e-6)
