"""The judges: networks trained on the distilled images alone, tested on the real ones.

    ConvNet: D times [conv 3x3 -> instance norm -> ReLU -> average-pool 2x2], flatten, one linear layer
    ResNet: a stem by the image's size, four stages of residual blocks, global average, one linear layer

ConvNetD3-W128 (depth 3, width 128) is the network of the dataset condensation literature and of the first
dataset distillation challenge (Gidaris & Komodakis 2018; Zhao et al. 2021). Parameter names are those of
the challenge's evaluator. ConvNet-6, ResNetAP-10 and ResNet-18 judge ImageNet's subsets (Kim et al. 2022;
Gu et al. 2024), and "timm:NAME" is any of timm's networks, as an outside judge.

    python convnet.py    # builds each and counts: 504,420 parameters for CIFAR-100; 6 s
"""
import difflib
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state

from nanodd import cli
from nanodd.errors import UserError, exit_on_user_error

# ----------------------------------------------------------------------------------------------------
# 1. Convolutional networks


def norm(channels):
    """Instance norm, as GroupNorm with one channel per group: each map loses its own mean and contrast.

    Brightness alone therefore wins nothing. A scale and a shift per channel follow.
    """
    return nn.GroupNorm(channels, channels)


class ConvNet(nn.Module):
    """ConvNet-D`depth`-W`width`: (B, channels, size, size) float -> (B, classes) logits.

    Raises UserError where `size` does not survive `depth` poolings.
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
                       nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * (size >> depth) ** 2, classes)

    def embed(self, x):
        """The features that herding and k-center measure distances in: (B, C, H, W) -> (B, F)."""
        return self.features(x).flatten(1)

    def forward(self, x):
        return self.classifier(self.embed(x))


# ----------------------------------------------------------------------------------------------------
# 2. Residual networks


class Block(nn.Module):
    """Two convolutions beside a shortcut: (B, C, H, W) -> (B, width, H / stride, W / stride).

    averaged: where others stride, it averages 2x2: after the first ReLU, and in the shortcut.
    """

    def __init__(self, channels, width, stride, averaged):
        super().__init__()
        step = 1 if averaged else stride
        halve = nn.AvgPool2d(2) if averaged and stride == 2 else nn.Identity()
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

    averaged: a ResNetAP, whose stem and blocks average where a ResNet takes strides and maxima.
    The stem leaves images of up to 64 pixels their size, halves those of up to 128, and quarters larger ones.
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
        stages, before = [], 64
        for width in (64, 128, 256, 512):
            for k in range(blocks):
                stages += [Block(before, width, 2 if k == 0 and width > 64 else 1, averaged)]
                before = width
        self.features = nn.Sequential(*stem, *stages)
        self.classifier = nn.Linear(512, classes)
        for layer in self.features.modules():
            if isinstance(layer, nn.Conv2d):                    # variance 2 / (k k out)
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")

    def embed(self, x):
        """The features that herding and k-center measure distances in: (B, C, H, W) -> (B, 512)."""
        return self.features(x).mean(dim=(2, 3))

    def forward(self, x):
        return self.classifier(self.embed(x))


# ----------------------------------------------------------------------------------------------------
# 3. Any judge by its name


class Timm(nn.Module):
    """timm's network `name`, untrained: (B, channels, size, size) float -> (B, classes) logits.

    Raises UserError where timm has no such network, or where it cannot take the images; one is tried.
    """

    def __init__(self, name, size, channels, classes):
        import timm                                             # a second, which the others need not pay
        super().__init__()
        if not timm.is_model(name):
            close = difflib.get_close_matches(name, timm.list_models(), cutoff=0.5)
            raise UserError(f"timm has no network called {name}; "
                            f"{', '.join(close) or 'timm.list_models()'} is what it has")
        try:
            fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
            self.net = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels,
                                         **({"img_size": size} if fixed else {}))
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


JUDGES = {
    "convnet3": ("ConvNetD3-W128", ConvNet),
    "convnet6": ("ConvNet-6", functools.partial(ConvNet, depth=6)),
    "resnetap10": ("ResNetAP-10", functools.partial(ResNet, blocks=1, averaged=True)),
    "resnet18": ("ResNet-18", functools.partial(ResNet, blocks=2)),
}


def judge(net, size, channels, classes):
    """The untrained network `net`, a key of JUDGES or timm:NAME: (B, channels, size, size) -> (B, classes).

    Raises UserError where there is no such network, or where it cannot take images of that size.
    """
    if net.startswith("timm:"):
        return Timm(net.removeprefix("timm:"), size, channels, classes)
    if net not in JUDGES:
        raise UserError(f"there is no judge called {net}: choose {', '.join(JUDGES)} or timm:NAME")
    return JUDGES[net][1](size, channels, classes)


def title(net):
    """What tables call it."""
    return JUDGES[net][0] if net in JUDGES else net


def as_one(judges):
    """n judges of one kind as one network: (its weights, a function of n batches (B, C, S, S) -> (n, B, K)).

    Judge k sees batch k. Of several judges the weights are stacked, (n, ...), and what each judge holds is
    from then on a view of them: who trains the stack trains the judges. Each layer is then one call for all
    (a convolution has n groups): n times fewer for a GPU, which small judges leave waiting between calls.
    Networks with buffers, such as batch norm's, cannot be stacked; those of JUDGES have none.
    """
    if len(judges) == 1:
        return list(judges[0].parameters()), lambda batches: judges[0](batches[0]).unsqueeze(0)
    weights, _ = stack_module_state(judges)                                 # {name: (n, ...)}
    for k, judge in enumerate(judges):
        for name, own in judge.named_parameters():
            own.data = weights[name].data[k]

    def one(weights, x):                                                    # (B, C, S, S) -> (B, K)
        return functional_call(judges[0], weights, (x,))
    return list(weights.values()), lambda batches: torch.vmap(one)(weights, torch.stack(batches))


# ----------------------------------------------------------------------------------------------------
# 4. A demonstration


def main(argv=None):
    parser = cli.new_parser(__doc__)
    parser.parse_args(argv)
    shown = [("digits", "convnet3", 16, 1, 10), ("CIFAR-100", "convnet3", 32, 3, 100),
             ("Tiny-ImageNet", "convnet3", 64, 3, 200)]
    shown += [("ImageWoof", net, 224, 3, 10)
              for net in ("convnet6", "resnetap10", "resnet18", "timm:resnet18")]
    with exit_on_user_error(parser), torch.device("meta"):      # shapes without numbers: nothing to compute
        for name, net, size, channels, classes in shown:
            network = judge(net, size, channels, classes)
            logits = network(torch.zeros(2, channels, size, size))
            print(f"{name:13} | {title(net):14} | {f'{size}x{size}':7} | logits {tuple(logits.shape)} | "
                  f"{sum(p.numel() for p in network.parameters()):,} parameters")
        print("-> python train_eval.py")


if __name__ == "__main__":
    main()
