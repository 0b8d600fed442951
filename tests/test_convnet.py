"""The judges have the published parameters, and compute what is published."""
import copy
import functools
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

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


@pytest.mark.parametrize("net, kernel, stride, pool", [("resnetap10", 7, 1, nn.AvgPool2d),
                                                       ("resnet18", 7, 2, nn.MaxPool2d)])
def test_the_stem_goes_by_the_images_size(net, kernel, stride, pool):
    for size, wide, step, side, pools in ((64, 3, 1, 64, 0), (65, 3, 1, 32 + (net == "resnet18"), 1),
                                          (128, 3, 1, 64, 1), (132, kernel, stride, 33, 1)):
        with torch.device("meta"):
            layers = judge(net, size, 3, 10).features
            stem = nn.Sequential(*(layer for layer in layers if not isinstance(layer, convnet.Block)))
            assert stem(torch.zeros(1, 3, size, size)).shape == (1, 64, side, side)
        assert stem[0].kernel_size == (wide, wide) and stem[0].stride == (step, step)
        assert sum(isinstance(layer, pool) for layer in stem) == pools == len(stem) - 3


def test_resnet18_computes_what_timms_does_with_instance_norm():
    """An independent network of the same layers, its parameters in the same order."""
    mine, x = judge("resnet18", 136, 3, 5), torch.randn(2, 3, 136, 136)
    other = timm.create_model("resnet18", num_classes=5,
                              norm_layer=functools.partial(nn.InstanceNorm2d, affine=True))
    for p, q in zip(mine.parameters(), other.parameters(), strict=True):
        q.data.copy_(p.data)
    assert torch.allclose(mine(x), other(x), atol=1e-4)


def test_resnetap10_computes_its_layers():
    mine, x = judge("resnetap10", 136, 3, 5), torch.randn(2, 3, 136, 136)
    for p in mine.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    weights = iter(mine.parameters())
    conv = lambda x, padding: F.conv2d(x, next(weights), padding=padding)
    norm = lambda x: F.instance_norm(x, weight=next(weights), bias=next(weights))
    h = F.avg_pool2d(norm(conv(x, 3)).relu(), 4)
    for k in range(4):
        halve = (lambda x: F.avg_pool2d(x, 2)) if k else (lambda x: x)
        inner = norm(conv(halve(norm(conv(h, 1)).relu()), 1))
        h = (inner + (norm(halve(conv(h, 0))) if k else h)).relu()
    out = h.mean((2, 3)) @ next(weights).T + next(weights)
    assert torch.allclose(mine(x), out, rtol=1e-4, atol=1e-4) and next(weights, None) is None


def test_residual_networks_start_by_the_size_of_their_outputs():
    for layer in judge("resnetap10", 224, 3, 10).features.modules():
        if isinstance(layer, nn.Conv2d):
            std = math.sqrt(2 / (layer.kernel_size[0] ** 2 * layer.out_channels))
            assert layer.weight.detach().std() == pytest.approx(std, rel=0.05) and layer.bias is None
        if isinstance(layer, nn.GroupNorm):
            assert (layer.weight == 1).all() and (layer.bias == 0).all()


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


@pytest.mark.parametrize("net", ["convnet3", "resnetap10", "resnet18"])
def test_judges_as_one_network_compute_and_learn_what_each_does_alone(net):
    """In float64, where only a mistake is large."""
    apart = [judge(net, 16, 1, 4).double() for _ in range(3)]
    stacked = [copy.deepcopy(single) for single in apart]
    batches = [torch.randn(2, 1, 16, 16, dtype=torch.float64) for _ in apart]
    weights, network = convnet.as_one(stacked)
    logits, alone = network(batches), [single(x) for single, x in zip(apart, batches, strict=True)]
    assert logits.shape == (3, 2, 4) and torch.allclose(logits, torch.stack(alone), rtol=1e-9, atol=1e-9)
    for out, parameters in ((logits, weights), (alone, [p for single in apart for p in single.parameters()])):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        sum(one.square().mean() for one in out).backward()
        optimizer.step()
    for one, single in zip(stacked, apart, strict=True):          # the stacked judges have learned along
        assert all(torch.allclose(p, q, rtol=1e-9, atol=1e-9)
                   for p, q in zip(one.parameters(), single.parameters(), strict=True))


def test_one_judge_as_one_network_is_itself():
    single, x = judge("convnet3", 16, 1, 4), torch.randn(2, 1, 16, 16)
    weights, network = convnet.as_one([single])
    assert all(p is q for p, q in zip(weights, single.parameters(), strict=True))
    assert torch.equal(network([x]), single(x).unsqueeze(0))


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
