"""Distances between the features of real images, real (N, F), and of a set's images, fake (M, F).

    B_k(x)     = the ball around x as far as its k-th nearest neighbour in x's own set, x itself excluded
    precision  = the share of fake images in any B_3(real)    recall = the share of real ones in any B_3(fake)
    density    = the number of pairs of a fake image and a B_5(real) around it, divided by 5 M
    coverage   = the share of real images whose B_5 contains a fake one
    nearest    = the mean distance from a real image to the nearest fake one
    variance   = the variance of the features within a class, the fake images' divided by the real ones'
    recognised = the share of fake images that a judge (a classifier) of the real ones puts in their own class
    frechet    = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), means and covariances of the two sets
    mmd        = mean k(real, real') + mean k(fake, fake') - 2 mean k(real, fake),  k(x, y) = (x.y / F + 1)^3,
                 where real' and fake' are other images of the same set

The measure of a distilled set stays the judge's accuracy. These numbers do not see what a network learns from
an image; they help to explain an accuracy: whether images are typical (precision, density, recognised) or
varied (recall, coverage, variance). Precision, recall, coverage, nearest and frechet change with N and M even
where the two distributions do not, and a distilled set is small (M << N), far from the papers' 10,000 or
50,000 images: only rows of the same N and M can be compared.

Features in, numbers out: tensors of any float dtype, on one device; all is computed in float64, about PAIRS
pairs at a time, but at least one row. Sources: Kynkaanniemi et al. 2019 (precision, recall; k = 3), Naeem et
al. 2020 (density, coverage; k = 5), Heusel et al. 2017 (FID), Binkowski et al. 2018 (KID).
"""
import torch

PAIRS = 2**22                   # pairs of points at a time: 32 MiB as float64, whatever N and M
ROUNDING = 1e-12                # of |x|^2: more than float64 loses in a squared distance (section 2)

# ----------------------------------------------------------------------------------------------------
# 1. Pairs of points, a block of rows at a time


def doubles(real, fake):
    """Both sets in float64, without a graph; on the CPU where they are on MPS, which has no float64."""
    return [(x.cpu() if x.device.type == "mps" else x).detach().double() for x in (real, fake)]


def centred(real, fake):
    """Both sets about the mean of the real: distances stay the same, norms and their rounding errors fall."""
    real, fake = doubles(real, fake)
    return real - real.mean(dim=0), fake - real.mean(dim=0)


def row_blocks(x, y):
    """The rows of x (N, F) in blocks of n, where n rows have at most PAIRS pairs with those of y (M, F)."""
    return x.split(max(1, PAIRS // len(y)))


def squared_distances(x, y):
    """Yields |x|^2 + |y|^2 - 2 x.y of x (N, F) and y (M, F): (n, M) for each block of n rows of x."""
    norms = y.square().sum(dim=1)                                           # (M,)
    for block in row_blocks(x, y):
        yield torch.addmm(block.square().sum(dim=1, keepdim=True) + norms, block, y.T, alpha=-2)


# ----------------------------------------------------------------------------------------------------
# 2. Balls around the points of one set: which of the other set's are inside


def squared_radii(x, k):
    """The squared radii of B_k(x), x (N, F) with N > k: (N,).

    A point exactly on the border is inside, and so is a duplicate in a ball of radius 0. The radii grow by
    ROUNDING, since the distance to such a point may come out larger than the radius.
    """
    radii = torch.cat([block.kthvalue(k + 1, dim=1).values                  # the first is x itself
                       for block in squared_distances(x, x)])
    return radii + ROUNDING * (radii + x.square().sum(dim=1))


def share_inside(points, centres, k):
    """The share of the points (P, F) in any B_k(centres), centres (Q, F); None where Q <= k."""
    if len(centres) <= k:
        return None
    radii = squared_radii(centres, k)                                       # (Q,)
    inside = torch.cat([(block <= radii).any(dim=1) for block in squared_distances(points, centres)])
    return inside.double().mean().item()


def precision_recall(real, fake, k=3):
    """(precision, recall), each in [0, 1] (Kynkaanniemi et al. 2019, eq. 1 and 2).

    A few fake far apart have large balls, so that their recall is high: see the module on N and M. Precision
    is None where N <= k, recall where M <= k.
    """
    real, fake = centred(real, fake)
    return share_inside(fake, real, k), share_inside(real, fake, k)


def density_coverage(real, fake, k=5):
    """(density, at least 0 and not bounded by 1; coverage, in [0, 1]) (Naeem et al. 2020, sec. 3).

    Only the real have balls: a single odd fake cannot raise them. Two samples of one distribution have an
    expected density of 1, and a coverage of 1 - prod_{i<k} (N - 1 - i) / (N + M - 1 - i), which is small
    where M is. Both are None where N <= k.
    """
    real, fake = centred(real, fake)
    if len(real) <= k:
        return None, None
    radii, count = squared_radii(real, k), 0                                # (N,)
    covered = torch.zeros_like(radii, dtype=torch.bool)
    for block in squared_distances(fake, real):
        inside = block <= radii                                             # (m, N)
        count += inside.sum().item()
        covered |= inside.any(dim=0)
    return count / (k * len(fake)), covered.double().mean().item()


def nearest(real, fake):
    """The mean over the real of the distance to the nearest fake: how well a small set stands for them."""
    real, fake = centred(real, fake)
    closest = torch.cat([block.argmin(dim=1) for block in squared_distances(real, fake)])       # (N,)
    return (real - fake[closest]).norm(dim=1).mean().item()                 # exactly 0 for a duplicate


# ----------------------------------------------------------------------------------------------------
# 3. Moments and kernels


def frechet(real, fake):
    """|mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), of two Gaussians (Heusel et al. 2017, eq. 6).

    With covariances S = A^T A (divisor N - 1), S_1 S_2 has the nonzero eigenvalues of B B^T, B = A_1 A_2^T:
    the trace of its root is the sum of B's singular values. This loses no digits where the covariances are
    singular (M <= F), since no root of a rounding error is taken. Biased upwards, the more the smaller N and
    M are: write both beside it. None where N or M is below 2.
    """
    if min(len(real), len(fake)) < 2:
        return None
    real, fake = doubles(real, fake)
    a_1, a_2 = (torch.linalg.qr((x - x.mean(dim=0)) / (len(x) - 1)**0.5, mode="r").R        # (min(N, F), F)
                for x in (real, fake))
    means = (real.mean(dim=0) - fake.mean(dim=0)).square().sum()
    traces = a_1.square().sum() + a_2.square().sum() - 2 * torch.linalg.svdvals(a_1 @ a_2.T).sum()
    return (means + traces.clamp(min=0)).item()                 # equal sets: rounding may leave -1e-14


def kernel_sum(x, y):
    """The sum over all pairs of k(x, y) = (x.y / F + 1)^3."""
    return sum((block @ y.T / x.shape[1] + 1).pow(3).sum().item() for block in row_blocks(x, y))


def mmd(real, fake):
    """The unbiased squared maximum mean discrepancy with KID's cubic kernel (Binkowski et al. 2018).

    Its expected value is 0 for two samples of one distribution, at any N and M, so that it is sometimes
    negative; the means within a set leave out the pairs of a point and itself. None where N or M is below 2.
    """
    if min(len(real), len(fake)) < 2:
        return None
    real, fake = doubles(real, fake)
    result = -2 * kernel_sum(real, fake) / (len(real) * len(fake))
    for x in (real, fake):
        itself = (x.square().sum(dim=1) / x.shape[1] + 1).pow(3).sum().item()
        result += (kernel_sum(x, x) - itself) / (len(x) * (len(x) - 1))
    return result


# ----------------------------------------------------------------------------------------------------
# 4. Numbers that need labels, and all numbers of a set


def variance(real, fake, real_labels, fake_labels):
    """The variance within a class, of the fake as a share of the real's: 1 is as varied, 0 is no variety.

    It is the trace of the covariance of a class's features, with divisor n - 1, as a mean over the classes of
    real_labels. The share is the ratio of the two means. None where a class has fewer than two images of
    either set, or the real do not vary.
    """
    within = []
    for x, labels in zip(doubles(real, fake), (real_labels, fake_labels), strict=True):
        members = [x[(labels == c).to(x.device)] for c in real_labels.unique().tolist()]
        if min(map(len, members)) < 2:
            return None
        within.append(sum(part.var(dim=0).sum().item() for part in members))
    return within[1] / within[0] if within[0] else None


def recognised(logits, labels):
    """The share of images that a judge puts in their own class: logits (M, K), labels (M,)."""
    return (logits.argmax(dim=1) == labels).sum().item() / len(labels)


def compare(real, fake, real_labels, fake_labels, logits):
    """{name: number}: N as "real", M as "images", and all metrics, rounded; None where one is undefined.

    logits: of the fake, by a judge trained on all real images, (M, K). N and M are at least 1. A set of one
    image a class has no variance, and M <= 3 no recall, N <= 3 no precision, N <= 5 no density and coverage,
    N or M = 1 no frechet and mmd.
    """
    precision, recall = precision_recall(real, fake)
    density, coverage = density_coverage(real, fake)
    shares = {"precision": precision, "recall": recall, "density": density, "coverage": coverage,
              "nearest": nearest(real, fake), "variance": variance(real, fake, real_labels, fake_labels),
              "recognised": recognised(logits, fake_labels)}
    scales = {"frechet": frechet(real, fake), "mmd": mmd(real, fake)}       # of any order of magnitude
    return {"real": len(real), "images": len(fake),
            **{name: None if x is None else round(x, 4) for name, x in shares.items()},
            **{name: None if x is None else float(f"{x:.5g}") for name, x in scales.items()}}
