"""From a stored image to a judge's input; and post data augmentation, done once to a finished set.

x is (B, C, H, W) float, and rng a generator on its device, with new random numbers for each image.
Sources: Su et al. 2024 (post data augmentation).
"""
import functools
import math

import torch
import torch.nn.functional as F

from nanodd.data import imageset

# ----------------------------------------------------------------------------------------------------
# 1. Geometry that the protocols' augmentations share


def flip(x, rng):
    """Mirrors half of the images."""
    mirrored = torch.rand(len(x), 1, 1, 1, generator=rng, device=x.device) < 0.5
    return torch.where(mirrored, x.flip(3), x)


def warp(x, matrix, outside="zeros"):
    """x, bilinearly sampled at matrix (B, 2, 2) times the coordinates from its centre, which are in [-1, 1].

    outside: grid_sample's padding_mode, which fills the pixels outside of the image.
    """
    theta = torch.cat([matrix, torch.zeros_like(matrix[:, :, :1])], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)         # (B, H, W, 2)
    return F.grid_sample(x, grid, padding_mode=outside, align_corners=False)


def rotate_by(x, angle, outside="zeros"):
    """Rotates each image by its own angle (B,), in radians."""
    c, s = angle.cos(), angle.sin()
    return warp(x, torch.stack([torch.stack([c, -s], 1), torch.stack([s, c], 1)], 1), outside)


# ----------------------------------------------------------------------------------------------------
# 2. Size and normalisation


@functools.cache
def constant(numbers, device):
    """A tensor of `numbers` (a tuple or a tensor), copied to the device once: copying makes a GPU wait."""
    return torch.as_tensor(numbers, device=device)


def resized(images, size):
    """uint8 (N, C, H, W), square -> uint8 (N, C, size, size), bicubic."""
    if images.shape[-1] == size:
        return images
    from torchvision.transforms.functional import InterpolationMode, resize
    return torch.cat([resize(part, size, InterpolationMode.BICUBIC) for part in images.split(1024)])


def standardise(x, recipe):
    """(B, C, H, W) in [0, 1] -> (x - mean) / std."""
    mean, std = (constant(v, x.device).view(1, -1, 1, 1) for v in (recipe.mean, recipe.std))
    return (x - mean) / std


def unstandardise(x, recipe):
    """The inverse of standardise: (B, C, H, W) -> in [0, 1]."""
    mean, std = (constant(v, x.device).view(1, -1, 1, 1) for v in (recipe.mean, recipe.std))
    return x * std + mean


def normalise(images, recipe):
    """uint8 (N, C, H, W) -> float (N, C, judge_size, judge_size), (pixel / 255 - mean) / std."""
    return standardise(resized(images, recipe.judge_size).float() / 255, recipe)


# ----------------------------------------------------------------------------------------------------
# 3. Post data augmentation: once, to a finished set


def post_augment(images, recipe, rng):
    """An augmented copy of each image (Su et al. 2024): (N, C, H, W) uint8 -> uint8. rng: on the CPU.

    Each image is mirrored with probability .8; its contrast and brightness change by up to .2 with
    probability .5; it is rotated by up to 60 degrees with .8, and raised to a power in [.8, 1.2] with .5
    (albumentations' defaults). Where recipe.flip is false, no image is mirrored, or rotated by more than 15
    degrees: a 6 that is rotated far is a 9. Su et al. also flip .8 of the images upside down, which is left
    out, since no test image is upside down. The corners that a rotation uncovers are filled by reflection, as
    theirs are: black ones would mark the copies.
    """
    u = torch.rand(8, len(images), 1, 1, 1, generator=rng).to(images.device)  # (8, N, 1, 1, 1)
    x = images.float() / 255
    if recipe.flip:
        x = torch.where(u[0] < 0.8, x.flip(3), x)
    brighter = (x * (0.8 + 0.4 * u[2]) + 0.4 * u[3] - 0.2).clamp(0, 1)
    x = torch.where(u[1] < 0.5, brighter, x)
    limit = math.radians(60 if recipe.flip else 15)
    x = rotate_by(x, ((u[4] < 0.8) * limit * (2 * u[5] - 1)).flatten(), "reflection")
    x = torch.where(u[6] < 0.5, x ** (0.8 + 0.4 * u[7]), x)
    return (255 * x).round().to(torch.uint8)


def with_copies(train, copies, recipe, rng):
    """An ImageSet followed by `copies` augmented copies of each image, with the labels in the same order."""
    parts = [post_augment(part, recipe, rng) for _ in range(copies) for part in train.images.split(1024)]
    return imageset.ImageSet(torch.cat([train.images, *parts]), train.labels.repeat(1 + copies),
                             train.classes)
