"""The judges' protocol for ImageNet's subsets: Kim et al. 2022's augmentations with Gu et al. 2024's numbers.

x (B, C, S, S) is square, and in [0, 1] until it is normalised. rng: a generator on its device; cpu_rng: one
on the CPU, for numbers that Python reads (a GPU would make it wait).
Sources: Kim et al. 2022, Gu et al. 2024, Yun et al. 2019 (CutMix), Krizhevsky et al. 2012 (lighting).
"""
import math

import torch
import torch.nn.functional as F

from nanodd.judging import augment

# ----------------------------------------------------------------------------------------------------
# 1. Augmentation


def random_boxes(B, S, rng):
    """The boxes of torchvision's RandomResizedCrop: a half to all of the area, ratio 3/4 to 4/3, log-uniform.

    Returns, in pixels, corners (2, B), tops and lefts, and sides (2, B), heights and widths: for each image
    the first of ten tries that fits into it, or the whole image.
    """
    u = torch.rand(2, 10, B, generator=rng, device=rng.device)
    area, ratio = S * S * (0.5 + 0.5 * u[0]), (4 / 3) ** (2 * u[1] - 1)     # (10, B)
    sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()]).round()
    sides = F.pad(sides, (0, 0, 0, 1), value=S)                             # (2, 11, B), the whole at the end
    fits = (sides <= S).all(dim=0).int().argmax(dim=0)                      # (B,): the first that does
    sides = sides.gather(1, fits.expand(2, 1, B)).squeeze(1)                # (2, B)
    return (torch.rand(2, B, generator=rng, device=rng.device) * (S - sides + 1)).floor(), sides


def crop_and_resize(x, corners, sides):
    """Resizes the box of each image to the image's size, bilinear; pixels outside of it do not contribute."""
    S = x.shape[-1]
    along = (torch.arange(S, device=x.device) + 0.5) * (sides / S)[:, :, None] - 0.5  # (2, B, S)
    along = corners[:, :, None] + along.clamp(min=0).minimum(sides[:, :, None] - 1)  # in pixels
    rows, columns = (2 * along + 1) / S - 1                                 # in grid_sample's units
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=3)  # (B, S, S, 2)
    return F.grid_sample(x, grid, align_corners=False)                      # (B, C, S, S)


def color_jitter(x, rng, cpu_rng):
    """Brightness, contrast and saturation: blends x with black, with its mean grey, and with its grey image.

    Each blend has the weight alpha in [-.4, .4], drawn for each image; a negative one moves x away
    from the other image. The order of the three is drawn for the whole batch, by cpu_rng.
    """
    from torchvision.transforms.functional import rgb_to_grayscale  # a slow import: only where it is needed
    alpha = torch.rand(3, len(x), 1, 1, 1, generator=rng, device=x.device) * 0.8 - 0.4  # (3, B, 1, 1, 1)
    targets = (torch.zeros_like, lambda x: rgb_to_grayscale(x).mean(dim=(1, 2, 3), keepdim=True),
               rgb_to_grayscale)
    for k in torch.randperm(3, generator=cpu_rng).tolist():
        x = x.lerp(targets[k](x), alpha[k])
    return x


# columns: ImageNet's principal colours, each times its eigenvalue (Krizhevsky et al. 2012)
PRINCIPAL = torch.tensor([[-0.5675, 0.7192, 0.4009],
                          [-0.5808, -0.0045, -0.8140],
                          [-0.5836, -0.6948, 0.4203]]) * torch.tensor([0.2175, 0.0188, 0.0045])


def lighting(x, rng):
    """Adds one colour to the whole image: N(0, .1^2) times each principal one. Grey images do not change."""
    if x.shape[1] != 3:
        return x
    alpha = 0.1 * torch.randn(len(x), 1, 3, generator=rng, device=x.device)
    return x + (augment.constant(PRINCIPAL, x.device) * alpha).sum(dim=2)[:, :, None, None]  # (B, 3, 1, 1)


def cutmix(x, rng):
    """Replaces one box, the same for the whole batch, by that of another image (Yun et al. 2019).

    Its area is 1 - lam of the image's, lam ~ U(0, 1), less the part of the box that falls outside.
    Returns (mixed x, partner (B,): the index of the other image, own: the share of the image's own area).
    """
    B, _, H, W = x.shape
    partner = torch.randperm(B, generator=rng, device=x.device)             # (B,)
    u = torch.rand(3, generator=rng, device=x.device)
    cut_ratio = (1 - u[0]).sqrt()
    half_h, half_w = (H * cut_ratio).long() // 2, (W * cut_ratio).long() // 2
    cy, cx = (H * u[1]).long(), (W * u[2]).long()
    rows, columns = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
    in_rows = (rows >= cy - half_h) & (rows < cy + half_h)                  # (H,)
    in_columns = (columns >= cx - half_w) & (columns < cx + half_w)         # (W,)
    box = in_rows[:, None] & in_columns                                     # (H, W)
    return torch.where(box, x[partner], x), partner, 1 - box.float().mean()


def augment_and_mix(images, labels, recipe, rng, cpu_rng):
    """Crop, mirror, colour, lighting, CutMix: images (B, C, S, S) uint8, labels (B,) -> (x, targets).

    targets: the two labels of each mixed image, each with its share of the area, [(labels (B,), share)].
    """
    x = images.float() / 255                                                # (B, C, S, S)
    x = crop_and_resize(x, *random_boxes(len(x), x.shape[-1], rng))
    x = augment.flip(x, rng) if recipe.flip else x
    x = augment.standardise(lighting(color_jitter(x, rng, cpu_rng), rng), recipe)
    x, partner, own = cutmix(x, rng)
    return x, [(labels, own), (labels[partner], 1 - own)]


# ----------------------------------------------------------------------------------------------------
# 2. Epochs and learning rate


def epochs(recipe, images, classes):
    """The epochs, by images a class; for 100 classes two thirds, in hundreds (Gu et al. 2024, Table 6)."""
    table = ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500), (math.inf, 300))
    count = next(count for most, count in table if images // classes <= most)
    return 2 * count // 300 * 100 if classes == 100 else count


def rate(epoch, epochs):
    """The learning rate: 0.01, a fifth of it after two thirds, a fifth of that after five sixths."""
    return 0.01 * 0.2 ** ((epoch >= 2 * epochs // 3) + (epoch >= 5 * epochs // 6))
