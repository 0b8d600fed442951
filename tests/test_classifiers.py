"""The residual networks compute what is published."""
import functools
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from convnet import judge
from nanodd.judging import classifiers


@pytest.mark.parametrize("net, kernel, stride, pool", [("resnetap10", 7, 1, nn.AvgPool2d),
                                                       ("resnet18", 7, 2, nn.MaxPool2d)])
def test_the_stem_goes_by_the_images_size(net, kernel, stride, pool):
    for size, wide, step, side, pools in ((64, 3, 1, 64, 0), (65, 3, 1, 32 + (net == "resnet18"), 1),
                                          (128, 3, 1, 64, 1), (132, kernel, stride, 33, 1)):
        with torch.device("meta"):
            layers = judge(net, size, 3, 10).features
            stem = nn.Sequential(*(layer for layer in layers if not isinstance(layer, classifiers.Block)))
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
