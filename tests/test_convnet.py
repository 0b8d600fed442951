"""The judges have the published parameters; each of them learns, embeds and has a name."""
import pytest
import torch
import torch.nn.functional as F

import convnet
from convnet import ConvNet, judge
from nanodd.errors import UserError


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
    assert ConvNet(8, 1, 2, depth=2, width=4).embed(torch.zeros(3, 1, 8, 8)).shape == (3, 16)
    with pytest.raises(UserError, match="3 poolings leave nothing of 4 pixels"):
        ConvNet(4, 1, 2)


def test_instance_norm_forgets_contrast():
    judge, x = ConvNet(16, 1, 10), torch.randn(2, 1, 16, 16)
    judge.features[0].bias.data.zero_()
    assert torch.allclose(judge(x), judge(3 * x), atol=1e-2)


def test_the_demonstration_counts(capsys):
    convnet.main([])
    said = capsys.readouterr().out
    assert all(count in said for count in ("504,420", "754,570", "4,910,922", "11,181,642"))


@pytest.mark.parametrize("net, size, count", [("convnet6", 224, 754_570), ("convnet6", 256, 763_530),
                                              ("resnetap10", 224, 4_910_922), ("resnet18", 224, 11_181_642)])
def test_the_judges_of_imagenet_have_the_published_parameters(net, size, count):
    with torch.device("meta"):
        network = judge(net, size, 3, 10)
        assert sum(p.numel() for p in network.parameters()) == count
        assert network(torch.zeros(2, 3, size, size)).shape == (2, 10)


@pytest.mark.parametrize("net, size, channels", [
    ("convnet3", 16, 1), ("convnet6", 64, 3), ("resnetap10", 16, 1), ("resnet18", 16, 3),
    ("timm:test_resnet", 32, 1), ("timm:test_vit", 48, 3)])
def test_every_judge_learns_and_embeds(net, size, channels):
    network, x, y = judge(net, size, channels, 4), torch.randn(8, channels, size, size), torch.arange(8) % 4
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in network.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    network.eval()
    last = network.net.get_classifier() if net.startswith("timm:") else network.classifier
    assert network.embed(x).ndim == 2
    assert torch.allclose(last(network.embed(x)), network(x), atol=1e-5)


def test_a_net_that_is_not_there_or_cannot_take_the_size_is_refused():
    for net, size, words in (("alexnet", 32, "choose convnet3, convnet6, resnetap10, resnet18 or timm:NAME"),
                             ("timm:resnt18", 32, "timm has no network called resnt18; resnet18, "),
                             ("timm:???", 32, r"timm.list_models\(\) is what it has"),
                             ("timm:test_resnet.nobody", 32, "Invalid pretrained tag"),
                             ("timm:test_vit", 40, "timm's test_vit cannot take images of 40 pixels"),
                             ("convnet6", 32, "6 poolings leave nothing of 32 pixels"),
                             ("resnetap10", 15, "needs 16 pixels or more, not 15")):
        with pytest.raises(UserError, match=words):
            judge(net, size, 3, 10)


def test_tables_call_the_judges_by_their_names():
    assert [convnet.title(net) for net in (*convnet.JUDGES, "timm:resnet18")] == \
        ["ConvNetD3-W128", "ConvNet-6", "ResNetAP-10", "ResNet-18", "timm:resnet18"]
