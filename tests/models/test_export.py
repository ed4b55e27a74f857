"""Networks exported by torch.export and to ONNX: the same images at every size, without this package's ops."""

import contextlib

import onnx
import onnxruntime
import pytest
import torch
from exported import ops

import inr_kernels
from inr_kernels.models import DEAR, IN2, LIIF, LTE, DEARConfig, IN2Config, LaMa, LaMaConfig, LIIFConfig, LTEConfig
from inr_kernels.models.common import smooth
from inr_kernels.models.export import export_onnx, export_program
from inr_kernels.models.liif.upscaler import Upscaler

NETWORKS = {
    "LIIF": lambda: LIIF(LIIFConfig(blocks=1, features=8, hidden=(16, 16))),
    "LTE": lambda: LTE(LTEConfig(blocks=1, features=8, hidden=(16, 16), hidden_dim=16)),
    "DEAR": lambda: DEAR(DEARConfig(channels=16, features=8, blocks=1, filter_blocks=1, hidden=(16,), fill="smooth")),
    "IN2": lambda: IN2(IN2Config(channels=(16, 16), blocks=1, groups=1, heads=2, window=3, hidden=(16, 16))),
    "LaMa": lambda: LaMa(LaMaConfig(features=8, blocks=1, downsamplings=2)),
}
SIZES = [(33, 41), (48, 40), (9, 70)]  # odd; the multiples of what networks pad to; less than IN2's window
SMALL = [(13, 15), (16, 12), (9, 10)]  # for DEAR, whose pyramid then has four levels: an export of seven takes a minute


def network(name):
    """A network whose output depends on every layer."""
    made = NETWORKS[name]().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made


def inputs(made, size):
    """The inputs of the exported graph for an image of this size, and the output of the network itself."""
    image, mask = torch.rand(1, 3, *size), (torch.rand(1, 1, *size) < 0.3).float()
    if isinstance(made, Upscaler):
        target = torch.tensor([2 * size[0] + 1, 5 * size[1]])  # also beyond LTE's largest scale
        return (image, target), made.upscale(image, size=tuple(target.tolist()))
    return (image, mask), made.inpaint(image, mask)


@pytest.mark.parametrize("name", ["LIIF", "LTE", "LaMa"])  # the others' are part of the next test
def test_program_has_open_sizes_and_no_op_of_this_package(name):
    made = network(name)
    program = export_program(made)
    found = ops(program)
    assert "aten.relu.default" in found and not any("inr_kernels" in op for op in found)
    for size in SIZES:
        given, expected = inputs(made, size)
        torch.testing.assert_close(program.module()(*given), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_equals_the_network_at_three_sizes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(smooth, "OPEN_LEVELS", 4)
    made, path = network(name), tmp_path / "network.onnx"
    export_onnx(made, path)
    model = onnx.load(path)
    assert not model.functions and [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
    assert {node.domain for node in model.graph.node} == {""}
    session = onnxruntime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()]
    assert names == ["image", "size" if isinstance(made, Upscaler) else "mask"]
    for size in SMALL if name == "DEAR" else SIZES:
        given, expected = inputs(made, size)
        (out,) = session.run(None, dict(zip(names, (x.numpy() for x in given), strict=True)))
        torch.testing.assert_close(torch.from_numpy(out), expected, rtol=0, atol=1e-4)


def test_onnx_of_one_size_and_two_images(tmp_path):
    made, path = network("LaMa"), tmp_path / "network.onnx"
    export_onnx(made, path, dynamic=False, size=(24, 32), batch=2)
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == [2, 3, 24, 32]
    image, mask = torch.rand(2, 3, 24, 32), (torch.rand(2, 1, 24, 32) < 0.3).float()
    (out,) = session.run(None, {"image": image.numpy(), "mask": mask.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), made.inpaint(image, mask), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_torch_export_of_one_size(name):
    """By torch's own function in its default mode: with this package's ops, without them under the reference."""
    made, size = network(name), (24, 32)

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = made

        def forward(self, image, mask):
            if isinstance(made, Upscaler):
                return self.network.render(self.network.encoder(image), (50, 61))
            return self.network(image, mask)

    module, given = Module(), (torch.rand(1, 3, *size), (torch.rand(1, 1, *size) < 0.3).float())
    cases = [(contextlib.nullcontext(), True), (inr_kernels.backend("reference"), False)]
    for backend, some in cases[: 1 if name in ("IN2", "DEAR") else 2]:  # whose graphs without ops take long
        with torch.no_grad(), backend:
            program = torch.export.export(module, given)
            torch.testing.assert_close(program.module()(*given), module(*given), rtol=0, atol=1e-5)
        assert any("inr_kernels" in op for op in ops(program)) == some


class Render(torch.nn.Module):
    """Renders at a size."""

    def __init__(self, made, size):
        super().__init__()
        self.network, self.size = made, size

    def forward(self, image):
        return self.network.render(self.network.encoder(image), self.size)


def test_bad_arguments(tmp_path):
    path = tmp_path / "network.onnx"
    with pytest.raises(
        TypeError, match="network must be a DEAR, IN2, ImplicitAutoencoder, LaMa, LIIF or LTE; got Linear"
    ):
        export_onnx(torch.nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"network must be in float32: network.float\(\); got torch.float64"):
        export_onnx(network("LIIF").double(), path)
    with pytest.raises(ValueError, match=r"size must have sides of at least 5; got \(4, 32\)"):
        export_onnx(network("LaMa"), path, size=(4, 32))
    with pytest.raises(ValueError, match=r"size must be two positive integers \(H, W\); got \(0, 3\)"):
        export_program(network("LIIF"), size=(0, 3))
    for size in ((9,), (9, 9, 9), (-9, 9)):  # in the program that is exported, too
        with pytest.raises(ValueError, match="size must be two positive integers"):
            torch.export.export(Render(network("LIIF"), size), (torch.zeros(1, 3, 9, 9),))
    with pytest.raises(ValueError, match=r"size must have sides of at least 2; got \(1, 9\)"):
        export_program(network("LIIF"), size=(1, 9))
    with pytest.raises(ValueError, match="batch must be a positive integer; got 0"):
        export_program(network("LIIF"), batch=0)
    with pytest.raises(FileNotFoundError):
        export_onnx(network("LIIF"), tmp_path / "missing" / "network.onnx")
    assert not path.exists()
