"""The command export."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from PIL import Image

from inr_kernels.cli import main
from inr_kernels.models import LIIF, LaMa, LaMaConfig


def test_writes_a_network_of_one_size(tmp_path, capsys):
    model = LaMa(LaMaConfig(features=8, blocks=1, downsamplings=2)).eval()
    model.save(tmp_path / "lama.safetensors")
    out = tmp_path / "lama.onnx"
    main(["export", "--model", str(tmp_path / "lama.safetensors"), "-o", str(out), "--size", "32x24"])
    err = capsys.readouterr().err.replace(f"inr-kernels: {out}: ", "").splitlines()
    assert err == ["exporting LaMa, which takes up to some minutes", f"written, {out.stat().st_size / 1e6:.1f} MB"]
    session = onnxruntime.InferenceSession(out)
    assert session.get_inputs()[0].shape == [1, 3, 24, 32]
    image, mask = torch.rand(1, 3, 24, 32), (torch.rand(1, 1, 24, 32) < 0.3).float()
    (filled,) = session.run(None, {"image": image.numpy(), "mask": mask.numpy()})
    torch.testing.assert_close(torch.from_numpy(filled), model.inpaint(image, mask), rtol=0, atol=1e-4)


@pytest.mark.parametrize("command", [("export",), ("upscale", "in.png", "--scale", "2", "--format", "png")])
def test_the_checkpoint_is_not_overwritten(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (5, 4)).save("in.png")
    path = Path("liif.pt")
    path.write_bytes(LIIF.PRETRAINED.read_bytes())
    with pytest.raises(SystemExit):
        main([*command, "--model", str(path), "-o", str(path)])
    assert "output must be another file than the checkpoint; got liif.pt" in capsys.readouterr().err
    assert path.read_bytes() == LIIF.PRETRAINED.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--model", "lama"), "must be liif, dear, in2 or the path of a checkpoint; got lama (the weights"),
        (("-o", "missing/out.onnx"), "missing/out.onnx: the folder of the output does not exist"),
        (("-o", "-"), "argument -o/--output: must be the name of a file; got -"),
        (("--model", "in2", "--size", "2x40"), "size must have sides of at least 3; got (40, 2)"),
    ],
)
def test_errors(arguments, error, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["export", "-o", "out.onnx", *arguments])
    assert error in capsys.readouterr().err and not any(tmp_path.iterdir())
