"""The ablations of IN²'s and DEAR's papers: parameters as documented, kernels against plain PyTorch, checkpoints."""

import dataclasses

import pytest
import torch
from tree import ROOT

from inr_kernels.models import DEAR, IN2, DEARConfig, IN2Config

# Per network, a small config, and the parameters of the paper's config with each change.
NETWORKS = {
    IN2: (
        IN2Config(channels=(16, 16, 32), groups=1, blocks=1, heads=4, squeeze=4, hidden=(16, 16)),
        [
            ({}, 15_501_919),
            ({"encoder": "strided"}, 13_841_155),
            ({"encoder": "lama"}, 15_423_571),
            ({"body": "ffc"}, 15_035_295),
            ({"channel_attention": False}, 9_926_499),
            ({"alpha": 1.0}, 15_501_919),
            ({"pyramid": False}, 15_137_695),
            ({"encoder": "lama", "body": "ffc", "pyramid": False}, 14_592_723),
        ],
    ),
    DEAR: (
        DEARConfig(channels=16, features=6, blocks=2, filter_blocks=1, hidden=(12, 10)),
        [
            ({}, 21_962_206),
            ({"dse": False}, 21_370_078),
            ({"use": False}, 21_945_822),
            ({"pim": False}, 21_690_435),
            ({"use": False, "pim": False}, 21_674_051),
            ({"dse": False, "use": False, "pim": False}, 10_976_387),
        ],
    ),
}
CASES = [(network, *case) for network, (_, cases) in NETWORKS.items() for case in cases]
every_case = pytest.mark.parametrize(("network", "changes", "parameters"), CASES)


@every_case
def test_parameters_are_the_documented_ones(network, changes, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in network(network.CONFIG(**changes)).parameters()) == parameters
    fields = ", ".join(f"{name}={value!r}" for name, value in changes.items()).replace("'", '"')
    assert f"| `{network.NETWORK}Config({fields})` | {parameters:,} |" in (ROOT / "docs/networks.md").read_text()


@every_case
@torch.no_grad()
def test_each_is_a_network(network, changes, parameters, tmp_path):
    """Like its twin in plain PyTorch, on the shortest image; progress, memory, checkpoints."""
    model = network(dataclasses.replace(NETWORKS[network][0], **changes)).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    image, mask, done = torch.rand(2, 3, model.min_side, 14), torch.rand(2, 1, model.min_side, 14) < 0.5, []
    out = model.inpaint(image, mask, progress=lambda *share: done.append(share))
    assert done[-1][0] == done[-1][1] and len(done) > 4 and model.bytes_per_pixel() > 0
    model.save(tmp_path / "net.safetensors")
    assert torch.equal(network.from_checkpoint(tmp_path / "net.safetensors").inpaint(image, mask), out)
    plain = network.from_checkpoint(tmp_path / "net.safetensors", eager=True)
    torch.testing.assert_close(plain.predict(image, mask), model.predict(image, mask), rtol=1e-4, atol=1e-5)


def test_a_dear_without_kernels_does_not_reconstruct():
    model, image, mask = (
        DEAR(dataclasses.replace(NETWORKS[DEAR][0], pim=False)),
        torch.rand(2, 3, 9, 14),
        torch.zeros(2, 9, 14),
    )
    _, kernels, _ = model.encode(image, mask)
    assert kernels.shape == (2, 0, 9, 14)
    with pytest.raises(ValueError, match="pim must be True in the config to reconstruct; got False"):
        model.reconstruct(image, mask, kernels)


@pytest.mark.parametrize("network", NETWORKS)
def test_older_checkpoints_have_all_parts(network):
    """The shipped ones were saved before these fields existed."""
    changed = {name for changes, _ in NETWORKS[network][1] for name in changes} - {"alpha"}
    config = network.pretrained().config
    assert all(getattr(config, name) == getattr(network.CONFIG(), name) for name in changed)
