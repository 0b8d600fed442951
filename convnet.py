"""The judge: a small convolutional network, trained on the distilled images alone, tested on the real ones.

    D times [conv 3x3 -> instance norm -> ReLU -> average-pool 2x2], flatten, one linear layer

ConvNetD3-W128 (depth 3, width 128) is the network of the dataset condensation literature and of the first
dataset distillation challenge (Gidaris & Komodakis 2018; Zhao et al. 2021). Parameter names are those of
the challenge's evaluator.

    python convnet.py        # builds it at three sizes and counts: 504,420 parameters for CIFAR-100; 2 s
"""
import torch
from torch import nn

from data import UserError, new_parser, one_sentence

# ----------------------------------------------------------------------------------------------------
# 1. The network


class ConvNet(nn.Module):
    """ConvNet-D`depth`-W`width`: (B, channels, size, size) float -> (B, classes) logits.

    "Instance norm" is GroupNorm with one channel per group: each feature map loses its own mean and contrast,
    so that brightness alone wins nothing. Raises UserError where `size` does not survive `depth` poolings.
    """

    def __init__(self, size, channels, classes, depth=3, width=128):
        super().__init__()
        if size >> depth < 1:
            raise UserError(f"{depth} poolings leave nothing of {size} pixels")
        layers = []
        for i in range(depth):
            layers += [nn.Conv2d(channels if i == 0 else width, width, kernel_size=3, padding=1),
                       nn.GroupNorm(width, width),
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
# 2. A demonstration


def main(argv=None):
    parser = new_parser(__doc__)
    parser.parse_args(argv)
    with one_sentence(parser):
        for name, size, channels, classes in (("digits", 16, 1, 10), ("CIFAR-100", 32, 3, 100),
                                              ("Tiny-ImageNet", 64, 3, 200)):
            net = ConvNet(size, channels, classes)
            logits = net(torch.zeros(2, channels, size, size))
            print(f"{name:13} | ConvNetD3-W128 | {size}x{size} | logits {tuple(logits.shape)} | "
                  f"{sum(p.numel() for p in net.parameters()):,} parameters")
        print("-> python train_eval.py")


if __name__ == "__main__":
    main()
