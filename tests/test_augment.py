"""What all protocols' augmentations share, and post data augmentation, have the stated ranges."""
import torch

from nanodd import recipes
from nanodd.data import datasets
from nanodd.judging import augment


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_flip_mirrors_half():
    x = torch.randn(2000, 1, 4, 4)
    out = augment.flip(x, generator())
    same, mirrored = ((out == z).flatten(1).all(1) for z in (x, x.flip(3)))
    assert (same | mirrored).all() and 0.45 < mirrored.float().mean() < 0.55


def test_copies_follow_the_images_and_keep_their_labels():
    train, recipe = datasets.load("digits").train.pick(torch.arange(50)), recipes.RECIPES["digits"]
    more = augment.with_copies(train, 3, recipe, generator())
    assert more.images.shape == (200, 1, 8, 8) and more.images.dtype == torch.uint8
    assert torch.equal(more.labels, train.labels.repeat(4)) and torch.equal(more.images[:50], train.images)
    again, other = (augment.with_copies(train, 3, recipe, generator(seed)) for seed in (0, 1))
    assert torch.equal(more.images, again.images) and not torch.equal(more.images, other.images)
    copies = more.images[50:].view(3, 50, 1, 8, 8).float()
    assert (copies[0] != copies[1]).any() and (copies - train.images.float()).abs().mean() < 40


def test_post_augmentation_has_its_ranges_and_mirrors_only_where_the_recipe_does():
    axis = torch.linspace(40, 215, 65)
    ramp = axis.expand(3000, 1, 65, 65).round().to(torch.uint8)   # brighter to the right
    for name, limit, share in (("digits", 15, 0), ("folder", 60, 0.8)):
        out = augment.post_augment(ramp, recipes.RECIPES[name], generator()).float()[:, 0]
        right, down = out[:, 32, 36] - out[:, 32, 28], out[:, 36, 32] - out[:, 28, 32]
        angle = torch.atan2(down, right.abs()).rad2deg()
        assert abs(float((right < 0).float().mean()) - share) < 0.03
        assert limit - 1.5 < angle.abs().max() < limit + 3        # of whole grey levels
        assert 0.18 < (angle == 0).float().mean() < 0.32          # a fifth is not turned, and some hardly
        level, slope = out[:, 32, 32], torch.hypot(right, down) / (axis[36] - axis[28])
        assert 0.2 < ((level == 128) & (slope > 0.95) & (slope < 1.05)).float().mean() < 0.3
        lowest, highest = (255 * (128 / 255 * (1 - k) - k) for k in (0.2, -0.2))
        assert 255 * (lowest / 255) ** 1.2 - 2 < level.min() < 50 and 190 < level.max() < highest + 15
