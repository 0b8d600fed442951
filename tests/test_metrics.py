"""The metrics against double loops and closed forms; what each says of sets whose answer is known."""
import json
import math
import time

import numpy as np
import pytest
import scipy.linalg
import torch

from nanodd.judging import metrics


def gaussian(n, features=6, mean=0., std=1., seed=0):
    rng = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(n, features, generator=rng, dtype=torch.float64)


def with_moments(n, mean, covariance, seed=0):
    """n points whose sample mean and covariance (n - 1) are exactly these: whitened, then transformed."""
    x = gaussian(n, len(mean), seed=seed).numpy()
    x = x - x.mean(axis=0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return torch.from_numpy(white @ np.linalg.cholesky(covariance).T + mean)


def classes(n, count=2):
    return torch.arange(n) % count


# ----------------------------------------------------------------------------------------------------
# 1. Oracles: double loops, as the papers write the sums


def distance(x, y):
    return math.sqrt(sum((a - b)**2 for a, b in zip(x, y, strict=True)))


def radius(points, i, k):
    return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]


def share_by_loops(points, centres, k):
    radii = [radius(centres, i, k) for i in range(len(centres))]
    return np.mean([any(distance(x, c) <= r for c, r in zip(centres, radii, strict=True)) for x in points])


def density_coverage_by_loops(real, fake, k):
    inside = [[distance(x, y) <= radius(real, i, k) for y in fake] for i, x in enumerate(real)]
    return np.sum(inside) / (k * len(fake)), np.mean([any(row) for row in inside])


def nearest_by_loops(real, fake):
    return np.mean([min(distance(x, y) for y in fake) for x in real])


def mmd_by_loops(real, fake):
    def mean(x, y, same=False):
        return np.mean([(sum(a * b for a, b in zip(p, q, strict=True)) / len(p) + 1)**3
                        for i, p in enumerate(x) for j, q in enumerate(y) if not (same and i == j)])
    return mean(real, real, True) + mean(fake, fake, True) - 2 * mean(real, fake)


def sets():
    """Pairs of sets: ordinary, of other sizes, far from 0, with duplicates, and on a grid full of ties."""
    real, grid = gaussian(40), torch.randint(0, 3, (40, 3), generator=torch.Generator().manual_seed(0))
    yield real, gaussian(15, mean=.5, seed=1)
    yield gaussian(9, seed=2), gaussian(40, std=2, seed=3)
    yield real / 100 + 1000, gaussian(15, seed=1) / 100 + 1000
    yield torch.cat([real, real[:5], real[:5], real[:5], real[:5], real[:5]]), real[:8]
    yield grid.double() / 8, grid[:12].double() / 8 + 1 / 8                 # in floats without rounding
    yield grid.double() * 0 + 1 / 3, grid.double()[:12] * 0 + 1 / 3


@pytest.mark.parametrize("real, fake", list(sets()))
def test_the_sums_are_the_papers(real, fake):
    x, y = real.tolist(), fake.tolist()
    assert metrics.precision_recall(real, fake) == \
        pytest.approx((share_by_loops(y, x, 3), share_by_loops(x, y, 3)), abs=1e-12)
    assert metrics.density_coverage(real, fake) == \
        pytest.approx(density_coverage_by_loops(x, y, 5), abs=1e-12)
    assert metrics.precision_recall(real, fake, k=1)[0] == pytest.approx(share_by_loops(y, x, 1), abs=1e-12)
    assert metrics.density_coverage(real, fake, k=2) == \
        pytest.approx(density_coverage_by_loops(x, y, 2), abs=1e-12)
    assert metrics.nearest(real, fake) == pytest.approx(nearest_by_loops(x, y), abs=1e-9)
    kernel = (real.square().mean(dim=1).max().item() + 1)**3                # 1e18 in the set far from 0
    assert metrics.mmd(real, fake) == pytest.approx(mmd_by_loops(x, y), abs=1e-13 * kernel, rel=1e-9)


# ----------------------------------------------------------------------------------------------------
# 2. The Frechet distance of Gaussians


def random_covariance(seed, features=4):
    a = gaussian(2 * features, features, seed=seed).numpy()
    return a.T @ a


def test_frechet_of_commuting_covariances_is_in_closed_form():
    """Diagonal ones: |mu_1 - mu_2|^2 + sum (sigma_1 - sigma_2)^2."""
    s_1, s_2 = np.array([1., 2., 3.]), np.array([4., 2., .5])
    real = with_moments(50, np.array([1., 0., 0.]), np.diag(s_1**2))
    fake = with_moments(20, np.array([0., 2., 0.]), np.diag(s_2**2), seed=1)
    assert metrics.frechet(real, fake) == pytest.approx(5 + ((s_1 - s_2)**2).sum(), abs=1e-9)


def test_frechet_of_other_covariances_is_the_matrix_roots():
    s_1, s_2 = random_covariance(1), random_covariance(2)
    assert not np.allclose(s_1 @ s_2, s_2 @ s_1)
    real, fake = with_moments(50, np.ones(4), s_1), with_moments(20, np.zeros(4), s_2, seed=1)
    oracle = 4 + np.trace(s_1 + s_2 - 2 * scipy.linalg.sqrtm(s_1 @ s_2).real)
    assert metrics.frechet(real, fake) == pytest.approx(oracle, abs=1e-8)
    assert metrics.frechet(fake, real) == pytest.approx(oracle, abs=1e-8)


def test_frechet_of_fewer_points_than_features_is_right():
    """One axis each: the root is s_1 s_2 |cos| of the angle between them. And a set that does not vary."""
    line = torch.tensor([-1., 0., 1.], dtype=torch.float64)[:, None]         # variance 1
    axis, other = torch.eye(20, dtype=torch.float64)[:2]
    real, fake = 3 * line * axis, 2 * line * (0.6 * axis + 0.8 * other)
    assert metrics.frechet(real, fake) == pytest.approx(9 + 4 - 2 * 3 * 2 * 0.6, abs=1e-12)
    assert metrics.frechet(real, 0 * fake) == pytest.approx(9, abs=1e-12)
    few, wide = gaussian(10, 30), gaussian(100, 30, seed=1)
    a, b = ((x - x.mean(0)).numpy() / math.sqrt(len(x) - 1) for x in (few, wide))
    eigenvalues = np.linalg.eigvalsh(a @ b.T @ b @ a.T).clip(0)              # 9, and a rounding error
    oracle = ((few.mean(0) - wide.mean(0)).square().sum().item() + (a**2).sum() + (b**2).sum()
              - 2 * np.sqrt(eigenvalues).sum())
    assert metrics.frechet(few, wide) == pytest.approx(oracle, abs=1e-6)


def test_frechet_is_biased_upwards_and_mmd_is_not():
    pairs = [(gaussian(200, seed=2 * i), gaussian(20, seed=2 * i + 1)) for i in range(60)]
    assert min(metrics.frechet(*pair) for pair in pairs) > 0.3               # though the truth is 0
    values = [metrics.mmd(*pair) for pair in pairs]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(60) and min(values) < 0 < max(values)


# ----------------------------------------------------------------------------------------------------
# 3. Sets whose answer is known


def test_a_set_has_all_of_itself():
    x = gaussian(50)
    assert metrics.precision_recall(x, x.clone()) == (1, 1)
    assert metrics.density_coverage(x, x.clone())[1] == 1
    assert metrics.nearest(x, x.clone()) == 0
    assert all(0 <= metrics.frechet(y, y.clone()) < 1e-12 for y in (x, gaussian(9, 20), gaussian(30, 20)))
    assert metrics.variance(x, x.clone(), classes(50), classes(50)) == 1


def test_a_collapsed_set_is_precise_and_recalls_nothing():
    real = gaussian(200)
    for std in (0, 1e-3):
        fake = real[:1] + gaussian(50, std=std, seed=1)
        precision, recall = metrics.precision_recall(real, fake)
        density, coverage = metrics.density_coverage(real, fake)
        assert precision == 1 and recall <= 1 / 200 and coverage < 0.1 < density
        assert metrics.variance(real, fake, classes(200), classes(50)) < 1e-5


def test_sets_far_apart_share_nothing():
    real, fake = gaussian(50), gaussian(50, mean=100., seed=1)
    assert metrics.precision_recall(real, fake) == metrics.density_coverage(real, fake) == (0, 0)
    assert metrics.mmd(real, fake) > 1e6 and metrics.frechet(real, fake) > 5e4


def test_a_point_on_the_border_is_inside_and_one_beyond_is_not():
    line = torch.arange(8, dtype=torch.float64)[:, None] + 1 / 3            # an end's 3rd neighbour is 3 away
    for beyond, share in ((0, 1), (1e-5, 0)):
        assert metrics.precision_recall(line, line[:1] - 3 - beyond)[0] == share


def test_one_odd_image_raises_recall_but_not_coverage():
    """A few fake far away on all sides have balls that hold all the real: no variety."""
    real, fake = gaussian(100), 50 * gaussian(10, seed=1)
    assert metrics.precision_recall(real, fake) == (0, 1)
    assert metrics.density_coverage(real, fake) == (0, 0)


@pytest.mark.parametrize("n, m", [(100, 100), (100, 20)])
def test_density_and_coverage_of_two_samples_are_as_expected(n, m):
    found = [metrics.density_coverage(gaussian(n, seed=2 * i), gaussian(m, seed=2 * i + 1))
             for i in range(200)]
    coverage = 1 - math.prod((n - 1 - i) / (n + m - 1 - i) for i in range(5))
    assert np.mean(found, axis=0) == pytest.approx((1, coverage), abs=0.03)


def test_half_the_deviation_is_a_quarter_of_the_variance():
    x, labels = gaussian(60), classes(60, 3)
    shifted = x / 2 + 100 * labels[:, None]                                 # between classes does not count
    assert metrics.variance(x, shifted, labels, labels) == pytest.approx(1 / 4)
    assert metrics.variance(0 * x, x, labels, labels) is None
    by_class = [np.trace(np.cov(x[labels == c][:4].T)) / 3 for c in range(3)]
    whole = [np.trace(np.cov(x[labels == c].T)) / 3 for c in range(3)]
    assert metrics.variance(x, x[:12], labels, labels[:12]) == pytest.approx(sum(by_class) / sum(whole))


def test_a_perfect_judge_names_all():
    labels = classes(12, 3)
    logits = torch.eye(3)[labels]
    assert metrics.recognised(logits, labels) == 1
    assert metrics.recognised(logits, torch.where(torch.arange(12) < 3, 2, labels)) == pytest.approx(10 / 12)


# ----------------------------------------------------------------------------------------------------
# 4. All numbers of a set


def compared(n=40, m=15, features=6, dtype=torch.float32, count=2):
    real, fake = gaussian(n, features).to(dtype), gaussian(m, features, seed=1).to(dtype)
    real_labels, fake_labels = classes(n, count), classes(m, count)
    return metrics.compare(real, fake, real_labels, fake_labels, torch.eye(count)[fake_labels])


def test_compare_has_all_numbers_as_json():
    row = compared()
    assert set(row) == {"real", "images", "precision", "recall", "density", "coverage", "frechet", "mmd",
                        "nearest", "variance", "recognised"}
    assert (row["real"], row["images"], row["recognised"]) == (40, 15, 1)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    real, fake = gaussian(40).float(), gaussian(15, seed=1).float()
    assert row["frechet"] == pytest.approx(metrics.frechet(real, fake), rel=1e-4)
    assert row["mmd"] == pytest.approx(metrics.mmd(real, fake), rel=1e-4)
    assert row["nearest"] == round(metrics.nearest(real, fake), 4)
    assert all(math.isfinite(x) for dtype in (torch.float16, torch.bfloat16)
               for x in compared(dtype=dtype).values())


def test_sets_too_small_for_a_metric_have_none():
    def missing(n, m, count=2):
        return {name for name, x in compared(n, m, count=count).items() if x is None}
    assert missing(6, 4) == set()
    assert missing(6, 3) == {"recall", "variance"}                          # 3 images: one class has only one
    assert missing(5, 4) == {"density", "coverage"}
    assert missing(6, 2, count=1) == {"recall"}
    assert missing(6, 1) == {"recall", "variance", "frechet", "mmd"}
    assert missing(3, 4) == {"precision", "density", "coverage", "variance"}


@pytest.mark.parametrize("pairs", [1, 16, 100, 2**30])
def test_blocks_change_no_number(pairs, monkeypatch):
    usual = compared()
    monkeypatch.setattr(metrics, "PAIRS", pairs)
    assert compared() == usual


def test_no_block_has_more_pairs_than_allowed(monkeypatch):
    monkeypatch.setattr(metrics, "PAIRS", 100)
    x, y = gaussian(50), gaussian(30, seed=1)
    blocks = list(metrics.squared_distances(x, y))
    assert max(block.numel() for block in blocks) <= 100
    assert torch.allclose(torch.cat(blocks).sqrt(), torch.cdist(x, y), atol=1e-12)


def test_features_of_a_network_leave_no_graph():
    x = gaussian(20).requires_grad_()
    assert metrics.compare(x, x, classes(20), classes(20), torch.eye(2)[classes(20)])["precision"] == 1
    assert not any(part.requires_grad for part in [*metrics.doubles(x, x), *metrics.centred(x, x)])


def test_1257_vectors_of_512_features_take_under_three_seconds():
    def seconds():
        start = time.process_time()                             # of all threads: other programs do not count
        compared(1257, 1257, 512, count=10)
        return time.process_time() - start
    assert min(seconds() for _ in range(2)) < 3
