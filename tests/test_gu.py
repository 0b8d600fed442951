"""Gu et al.'s protocol: its boxes are torchvision's, its colours, CutMix, epochs, rates as published."""
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from nanodd import recipes
from nanodd.data import datasets
from nanodd.judging import augment, gu
from train_eval import count_epochs, mixed_loss

GU = dataclasses.replace(recipes.RECIPES["digits"], protocol="gu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_gu_judges_train_by_their_table_of_epochs():
    count = lambda ipc, classes=10: count_epochs(GU, ipc * classes, classes)
    assert [count(ipc) for ipc in (1, 2, 10, 11, 50, 51, 200, 201, 500, 501, 1245)] == \
        [3000, 2000, 2000, 1500, 1500, 1000, 1000, 500, 500, 300, 300]
    assert [count(ipc, 100) for ipc in (1, 10, 20, 50, 100, 1300)] == [2000, 1300, 1000, 1000, 600, 200]


def test_the_gu_rate_falls_by_a_fifth_at_two_thirds_and_five_sixths():
    """As MultiStepLR does, without a fresh optimizer."""
    for epochs in (3000, 1300, 7):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
        fall = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2 * epochs // 3, 5 * epochs // 6], gamma=0.2)
        for epoch in range(epochs):
            assert gu.rate(epoch, epochs) == pytest.approx(fall.get_last_lr()[0])
            optimizer.step()
            fall.step()


def test_random_boxes_are_torchvisions():
    corners, sides = gu.random_boxes(4000, 224, generator())
    inner = sides < 224
    assert corners[inner].min() == 0 and (corners + sides)[inner].max() == 224 == (corners + sides).max()
    assert all(torch.equal(part, part.round()) for part in (corners, sides))
    draw = lambda: RandomResizedCrop.get_params(torch.zeros(3, 224, 224), (0.5, 1), (3 / 4, 4 / 3))
    theirs = torch.tensor([draw() for _ in range(4000)])
    mine = torch.cat([corners, sides]).T                          # top, left, height, width
    assert torch.allclose(mine.mean(0), theirs.float().mean(0), atol=4)
    assert torch.allclose(mine.std(0), theirs.float().std(0), atol=2)
    share, ratio = sides.prod(0) / 224**2, sides[1] / sides[0]
    assert 0.495 < share.min() < 0.51 and 0.99 < share.max() <= 1
    assert 0.74 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.35


def test_a_box_that_never_fits_is_the_whole(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: torch.full(shape, 1 - 1e-6))  # all of it, 4 to 3
    corners, sides = gu.random_boxes(2, 32, generator())
    assert (corners == 0).all() and (sides == 32).all()


def test_enlarged_boxes_are_torchvisions():
    x = torch.rand(20, 3, 32, 32)
    corners, sides = gu.random_boxes(20, 32, generator())
    out = gu.crop_and_resize(x, corners, sides)
    for i in range(20):
        box = [int(number) for number in (*corners[:, i], *sides[:, i])]
        for antialias in (True, False):                           # the same, since nothing shrinks
            assert torch.allclose(out[i:i + 1], TF.resized_crop(x[i:i + 1], *box, [32, 32],
                                                                antialias=antialias), atol=1e-5)
    whole = gu.crop_and_resize(x, torch.zeros(2, 20), torch.full((2, 20), 32.))
    assert torch.allclose(whole, x, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_scales_brightness_contrast_and_saturation_by_up_to_two_fifths(channels):
    x = torch.rand(4000, channels, 6, 6)
    out = gu.color_jitter(x, generator(), generator(1))
    mean = lambda z: TF.rgb_to_grayscale(z).mean(dim=(1, 2, 3))   # the other two keep it, in any order
    brightness = mean(out) / mean(x)
    spread = lambda z: TF.rgb_to_grayscale(z).std(dim=(1, 2, 3))
    contrast = spread(out) / spread(x) / brightness
    chroma = lambda z: (z - TF.rgb_to_grayscale(z)).std(dim=(1, 2, 3))
    factors = [brightness, contrast] + [chroma(out) / chroma(x) / brightness / contrast] * (channels == 3)
    for factor in factors:
        assert 0.598 <= factor.min() < 0.61 and 1.39 < factor.max() <= 1.402 and abs(factor.mean() - 1) < 0.02
    assert torch.corrcoef(torch.stack(factors)).fill_diagonal_(0).abs().max() < 0.05
    if channels == 1:
        expected = (x - mean(x).view(-1, 1, 1, 1)) * (brightness * contrast).view(-1, 1, 1, 1)
        assert torch.allclose(out - mean(out).view(-1, 1, 1, 1), expected, atol=1e-5)


def test_lighting_adds_one_colour_to_the_whole_image():
    x = torch.rand(20_000, 3, 2, 2)
    added = gu.lighting(x, generator()) - x
    colour = added[:, :, 0, 0]
    assert torch.allclose(added, colour[:, :, None, None].expand_as(added), atol=1e-6)
    vectors = gu.PRINCIPAL / gu.PRINCIPAL.norm(dim=0)
    assert torch.allclose(vectors.T @ vectors, torch.eye(3), atol=1e-3)
    along = (colour @ vectors).std(dim=0) / torch.tensor([0.2175, 0.0188, 0.0045])
    assert torch.allclose(along, torch.full((3,), 0.1), rtol=0.03)
    assert colour.mean(0).abs().max() < 1e-3
    assert torch.equal(gu.lighting(x[:, :1], generator()), x[:, :1])


def test_cutmix_pastes_a_box_of_the_partner_and_tells_its_area():
    """Against plain integers: the box of Yun et al., cut off at the border."""
    x = torch.arange(5.).view(5, 1, 1, 1).expand(5, 2, 24, 32) + 10      # each image has a value of its own
    shares = []
    for seed in range(300):
        mixed, partner, own = gu.cutmix(x, generator(seed))
        again = generator(seed)
        assert torch.equal(partner, torch.randperm(5, generator=again))
        lam, cy, cx = torch.rand(3, generator=again)
        h, w = int(24 * torch.sqrt(1 - lam)), int(32 * torch.sqrt(1 - lam))
        top, left = int(24 * cy) - h // 2, int(32 * cx) - w // 2
        bottom, right = min(24, top + h // 2 * 2), min(32, left + w // 2 * 2)
        expected = x.clone()
        expected[:, :, max(0, top):bottom, max(0, left):right] = \
            x[partner][:, :, max(0, top):bottom, max(0, left):right]
        assert torch.equal(mixed, expected)
        area = (bottom - max(0, top)) * (right - max(0, left))
        assert float(own) == pytest.approx(1 - area / (24 * 32), abs=1e-6)
        shares.append(float(own))
    assert min(shares) < 0.25 and max(shares) > 0.98


def test_the_mixed_loss_is_that_of_soft_labels(monkeypatch):
    seen, real = [], gu.cutmix
    monkeypatch.setattr(gu, "cutmix", lambda x, rng: seen.append(real(x, rng)) or seen[0])
    logits, few = torch.randn(6, 10), datasets.load("digits").train.pick(torch.arange(6))
    x, targets = gu.augment_and_mix(augment.resized(few.images, 16), few.labels, GU, *[generator()] * 2)
    loss = mixed_loss(logits, targets)
    mixed, partner, own = seen[0]
    labels = F.one_hot(few.labels, 10).float()
    assert x is mixed
    assert loss == pytest.approx(float(F.cross_entropy(logits, own * labels + (1 - own) * labels[partner])))


def test_gu_mirrors_only_where_the_recipe_does(monkeypatch):
    seen = []
    monkeypatch.setattr(augment, "flip", lambda x, rng: seen.append(1) or x)
    for flip in (False, True):
        gu.augment_and_mix(torch.zeros(2, 1, 16, 16, dtype=torch.uint8), torch.tensor([0, 1]),
                           dataclasses.replace(GU, flip=flip), generator(), generator())
        assert len(seen) == flip
