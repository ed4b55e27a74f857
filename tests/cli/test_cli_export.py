"""The command export."""

import onnxruntime
import pytest
import torch

from inr_kernels.cli import main
from inr_kernels.models import LaMa, LaMaConfig


def test_writes_a_network_of_one_size(tmp_path):
    model = LaMa(LaMaConfig(features=8, blocks=1, downsamplings=2)).eval()
    model.save(tmp_path / "lama.safetensors")
    out = tmp_path / "lama.onnx"
    main(["export", "--model", str(tmp_path / "lama.safetensors"), "-o", str(out), "--size", "32x24"])
    session = onnxruntime.InferenceSession(out)
    assert session.get_inputs()[0].shape == [1, 3, 24, 32]
    image, mask = torch.rand(1, 3, 24, 32), (torch.rand(1, 1, 24, 32) < 0.3).float()
    (filled,) = session.run(None, {"image": image.numpy(), "mask": mask.numpy()})
    torch.testing.assert_close(torch.from_numpy(filled), model.inpaint(image, mask), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--model", "lama"), "must be liif, dear, in2 or the path of a checkpoint; got lama"),
        (("-o", "missing/out.onnx"), "missing/out.onnx: the folder of the output does not exist"),
        (("--model", "in2", "--size", "8x40"), "image must have shape [B, 3, H, W] with sides of at least 9"),
    ],
)
def test_errors(arguments, error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["export", "-o", "out.onnx", *arguments])
    assert error in capsys.readouterr().err and not any(tmp_path.iterdir())
