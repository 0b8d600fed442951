"""Other judges than ConvNetD3: residual networks for ImageNet's subsets, and any network of timm's.

    ResNet: a stem by the image's size, four stages of residual blocks, global average, one linear layer

Sources: Kim et al. 2022 and Gu et al. 2024 (ResNetAP-10, ResNet-18 with instance norm).
"""
import difflib

import torch
import torch.nn.functional as F
from torch import nn

from nanodd.errors import UserError

# ----------------------------------------------------------------------------------------------------
# 1. Residual networks


def norm(channels):
    """Instance norm, as in convnet.py: GroupNorm with one channel per group."""
    return nn.GroupNorm(channels, channels)


class AvgPool(nn.AvgPool2d):
    """2x2 average pooling, (B, C, H, W) -> (B, C, H // 2, W // 2), for small images on a CPU as a product.

    A matrix of quarters, (2W, W / 2), averages two rows of an image, side by side, to one of half the length:
    the same numbers, forwards and backwards, several times as fast as torch's own (docs/log.md).
    """

    def __init__(self):
        super().__init__(2)

    def forward(self, x):
        B, C, H, W = x.shape
        if x.device.type != "cpu" or H % 2 or W % 2 or W > 64 or torch.compiler.is_compiling():
            return super().forward(x)
        average = torch.eye(W // 2, dtype=x.dtype).repeat_interleave(2, dim=0).repeat(2, 1) / 4  # (2W, W / 2)
        return (x.reshape(-1, 2 * W) @ average).view(B, C, H // 2, W // 2)


class Block(nn.Module):
    """Two convolutions beside a shortcut: (B, C, H, W) -> (B, width, H / stride, W / stride).

    averaged: 2x2 average pooling, after the first ReLU and in the shortcut, in place of strides.
    """

    def __init__(self, channels, width, stride, averaged):
        super().__init__()
        step = 1 if averaged else stride
        halve = AvgPool() if averaged and stride == 2 else nn.Identity()
        self.residual = nn.Sequential(
            nn.Conv2d(channels, width, kernel_size=3, stride=step, padding=1, bias=False), norm(width),
            nn.ReLU(inplace=True), halve,
            nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False), norm(width))
        self.shortcut = nn.Identity() if channels == width and stride == 1 else nn.Sequential(
            nn.Conv2d(channels, width, kernel_size=1, stride=step, bias=False), halve, norm(width))

    def forward(self, x):
        return F.relu(self.residual(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Four stages of `blocks` blocks, 64 to 512 wide: (B, channels, size, size) float -> (B, classes) logits.

    averaged: a ResNetAP, whose stem and blocks have average pooling in place of strides and max pooling.
    The stem keeps the size of images of up to 64 pixels, halves it up to 128, and quarters larger ones.
    Raises UserError below 16 pixels: instance norm turns the 1x1 maps of the last stage into zeros.
    """

    def __init__(self, size, channels, classes, blocks, averaged=False):
        super().__init__()
        if size < 16:
            raise UserError(f"a residual network needs 16 pixels or more, not {size}")
        kernel, stride = (7, 1 if averaged else 2) if size > 128 else (3, 1)
        stem = [nn.Conv2d(channels, 64, kernel, stride, padding=kernel // 2, bias=False), norm(64),
                nn.ReLU(inplace=True)]
        if size > 64:
            stem += [nn.AvgPool2d(4 if size > 128 else 2) if averaged else nn.MaxPool2d(3, 2, padding=1)]
        stages, inputs = [], 64
        for width in (64, 128, 256, 512):
            for k in range(blocks):
                stages += [Block(inputs, width, 2 if k == 0 and width > 64 else 1, averaged)]
                inputs = width
        self.features = nn.Sequential(*stem, *stages)
        self.classifier = nn.Linear(512, classes)
        for layer in self.features.modules():
            if isinstance(layer, nn.Conv2d):                    # variance 2 / (k k out)
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")

    def embed(self, x):
        """The features that herding and k-center measure distances in: (B, C, H, W) -> (B, 512)."""
        return self.features(x).mean(dim=(2, 3))                # (B, 512, h, w) -> (B, 512)

    def forward(self, x):
        return self.classifier(self.embed(x))


# ----------------------------------------------------------------------------------------------------
# 2. Any network of timm's


class Timm(nn.Module):
    """timm's network `name`, untrained: (B, channels, size, size) float -> (B, classes) logits.

    Raises UserError where timm has no such network, or where that cannot take such images (one is tried).
    """

    def __init__(self, name, size, channels, classes):
        import timm                                             # a slow import: only where it is needed
        super().__init__()
        if not timm.is_model(name):
            similar = difflib.get_close_matches(name, timm.list_models(), cutoff=0.5)
            raise UserError(f"timm has no network called {name}; "
                            f"{', '.join(similar) or 'timm.list_models()'} is what it has")
        try:
            needs_size = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
            self.net = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels,
                                         **({"img_size": size} if needs_size else {}))
            with torch.no_grad():
                self.net.eval()(torch.zeros(1, channels, size, size))
            self.net.train()
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise UserError(f"timm's {name} cannot take images of {size} pixels and {channels} channels: "
                            f"{str(error).splitlines()[0]}") from error

    def embed(self, x):
        """The features before its last linear layer: (B, C, H, W) -> (B, F)."""
        return self.net.forward_head(self.net.forward_features(x), pre_logits=True).flatten(1)

    def forward(self, x):
        return self.net(x)
