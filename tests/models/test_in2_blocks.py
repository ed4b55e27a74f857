"""Changed layers of IN2's blocks, which have fused forms for the layers that they are built with."""

import pytest
import torch
from torch import nn

from inr_kernels.models import IN2, IN2Config

PARTS = ["attention.qkv", "attention.proj", "attention", "mlp.0", "mlp.1", "mlp", "norm2"]
PARTS += ["channel_attention", "channel_attention.cab", "channel_attention.cab.3", "channel_attention.cab.3.attention"]


def tiny():
    """A network with one block, and an image to fill."""
    model = IN2(IN2Config(channels=(16, 16), groups=1, blocks=1, heads=2, hidden=(8, 8), alpha=1.0)).eval()
    return model, torch.rand(1, 3, 72, 72), torch.ones(1, 1, 72, 72)


@pytest.mark.parametrize("name", PARTS)
def test_hooks_are_called(name):
    """They see what the layer returns: the fused forms are used without hooks only."""
    model, image, mask = tiny()
    called = []
    with torch.no_grad():
        expected = model.predict(image, mask)
        model.body[0].blocks[0].get_submodule(name).register_forward_hook(lambda *_: called.append(name))
        torch.testing.assert_close(model.predict(image, mask), expected)
    assert called


CHANGES = {
    "mlp.1": nn.GELU("tanh"),
    "norm2": nn.LayerNorm(16, elementwise_affine=False),
    "mlp": nn.Sequential(nn.Linear(16, 16), nn.ReLU()),
    "attention": nn.Linear(16, 16),
    "channel_attention": nn.Conv2d(16, 16, 1),
    "channel_attention.cab.3": nn.Conv2d(16, 16, 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_replaced_layers_are_called(name):
    model, image, mask = tiny()
    block = model.body[0].blocks[0]
    block.set_submodule(name, CHANGES[name])
    x = torch.randn(1, 18, 18, 16)
    with torch.no_grad():
        n = block.norm1(x)
        mixed = x + block.attention(n) + block.channel_attention(n.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        torch.testing.assert_close(block(x), mixed + block.mlp(block.norm2(mixed)))
        assert model.predict(image, mask).isfinite().all()
