"""The judge has the published parameters."""
import pytest
import torch

import convnet
from convnet import ConvNet
from data import UserError


@pytest.mark.parametrize("size, classes, count", [(32, 100, 504_420), (64, 200, 1_938_120)])
def test_convnetd3_has_the_published_parameters(size, classes, count):
    judge = ConvNet(size, 3, classes)
    shapes = {name: tuple(tensor.shape) for name, tensor in judge.state_dict().items()}
    assert sum(p.numel() for p in judge.parameters()) == count
    layers = [f"features.{k}" for k in (0, 1, 4, 5, 8, 9)] + ["classifier"]
    assert list(shapes) == [f"{name}.{kind}" for name in layers for kind in ("weight", "bias")]
    assert shapes["features.0.weight"] == (128, 3, 3, 3) and shapes["features.4.weight"] == (128, 128, 3, 3)
    assert shapes["classifier.weight"] == (classes, 128 * (size // 8) ** 2)


def test_any_depth_and_width():
    assert ConvNet(224, 3, 10, depth=6)(torch.zeros(1, 3, 224, 224)).shape == (1, 10)
    with torch.device("meta"):                                    # ConvNet-6 of Gu et al.
        assert sum(p.numel() for p in ConvNet(224, 3, 10, depth=6).parameters()) == 754_570
    assert ConvNet(8, 1, 2, depth=2, width=4).embed(torch.zeros(3, 1, 8, 8)).shape == (3, 16)
    with pytest.raises(UserError, match="3 poolings leave nothing of 4 pixels"):
        ConvNet(4, 1, 2)


def test_instance_norm_forgets_contrast():
    judge, x = ConvNet(16, 1, 10), torch.randn(2, 1, 16, 16)
    judge.features[0].bias.data.zero_()
    assert torch.allclose(judge(x), judge(3 * x), atol=1e-2)


def test_the_demonstration_counts(capsys):
    convnet.main([])
    assert "504,420" in capsys.readouterr().out
