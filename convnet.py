"""The judges: classifiers that are trained from scratch on a small set alone, and tested on the real images.

    ConvNet: D times [conv 3x3 -> instance norm -> ReLU -> average-pool 2x2], flatten, one linear layer

    python convnet.py    # prints the parameters of each judge: 504,420 for CIFAR-100; 3 s on two CPU cores

ConvNetD3-W128 (depth 3, width 128) is the network of the dataset condensation literature and of the first
dataset distillation challenge (Gidaris & Komodakis 2018; Zhao et al. 2021); parameter names are those of its
evaluator. ConvNet-6, ResNetAP-10 and ResNet-18 judge ImageNet's subsets (Kim et al. 2022; Gu et al. 2024),
and "timm:NAME" is any of timm's networks: nanodd/judging/classifiers.py has those that are no ConvNet.
"""
import functools

import torch
from torch import nn

from nanodd import cli, running
from nanodd.errors import UserError
from nanodd.judging import classifiers

# ----------------------------------------------------------------------------------------------------
# 1. ConvNet


def norm(channels):
    """Instance norm, (B, C, H, W) -> (B, C, H, W): GroupNorm with one channel per group.

    Each feature map is set to mean 0 and deviation 1, so that a judge sees little of an image's brightness
    and contrast. A scale and a shift per channel follow.
    """
    return nn.GroupNorm(channels, channels)


class ConvNet(nn.Module):
    """ConvNet-D`depth`-W`width`: (B, channels, size, size) float -> (B, classes) logits.

    Raises UserError where size < 2**depth: nothing would be left after `depth` poolings.
    """

    def __init__(self, size, channels, classes, depth=3, width=128):
        super().__init__()
        if size >> depth < 1:
            raise UserError(f"{depth} poolings leave nothing of {size} pixels")
        layers = []
        for i in range(depth):
            layers += [nn.Conv2d(channels if i == 0 else width, width, kernel_size=3, padding=1),
                       norm(width),
                       nn.ReLU(inplace=True),
                       classifiers.AvgPool()]                               # (B, width, size / 2, size / 2)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * (size >> depth) ** 2, classes)

    def embed(self, x):
        """The features that herding and k-center measure distances in: (B, C, H, W) -> (B, F)."""
        return self.features(x).flatten(1)

    def forward(self, x):
        return self.classifier(self.embed(x))


# ----------------------------------------------------------------------------------------------------
# 2. Any judge by its name

JUDGES = {                     # {--net: (title in tables, (size, channels, classes) -> network)}
    "convnet3": ("ConvNetD3-W128", ConvNet),
    "convnet6": ("ConvNet-6", functools.partial(ConvNet, depth=6)),
    "resnetap10": ("ResNetAP-10", functools.partial(classifiers.ResNet, blocks=1, averaged=True)),
    "resnet18": ("ResNet-18", functools.partial(classifiers.ResNet, blocks=2)),
}


def judge(net, size, channels, classes):
    """The untrained network `net`, a key of JUDGES or timm:NAME: (B, channels, size, size) -> (B, classes).

    Raises UserError where there is no such network, or where it cannot take images of that size.
    """
    if net.startswith("timm:"):
        return classifiers.Timm(net.removeprefix("timm:"), size, channels, classes)
    if net not in JUDGES:
        raise UserError(f"there is no judge called {net}: choose {', '.join(JUDGES)} or timm:NAME")
    return JUDGES[net][1](size, channels, classes)


def title(net):
    """What tables call the network `net`: "ConvNetD3-W128" for convnet3."""
    return JUDGES[net][0] if net in JUDGES else net


# ----------------------------------------------------------------------------------------------------
# 3. A demonstration: every judge, its shapes and its parameters


def main(argv=None):
    parser = cli.new_parser(__doc__)
    args = parser.parse_args(argv)
    nets = "convnet6", "resnetap10", "resnet18"
    shown = [("digits", "convnet3", 16, 1, 10), ("CIFAR-100", "convnet3", 32, 3, 100),
             ("Tiny-ImageNet", "convnet3", 64, 3, 200), *(("ImageWoof", net, 224, 3, 10) for net in nets)]
    with running.command(parser, args), torch.no_grad():
        for name, net, size, channels, classes in shown:
            network = judge(net, size, channels, classes)
            logits = network(torch.zeros(2, channels, size, size))
            print(f"{name:13} | {title(net):14} | {f'{size}x{size}':7} | logits {tuple(logits.shape)} | "
                  f"{sum(p.numel() for p in network.parameters()):,} parameters")
        print("-> python train_eval.py")


if __name__ == "__main__":
    main()
