"""What the min-max losses remember: a few detached embeddings per class, and a rule for which to drop.

    fifo    drops the oldest entry                                               (Gu et al. 2024)
    max     drops the entry most similar to all the others, argmax_j sum_k cos(m_j, m_k), one by one until
            the rest fits                                  (Li et al. 2025, self-adaptive memory, eq. 7, 8)
    min     drops the least similar entry: the other strategy of their ablation               (their Table 3)

Fine-tuning pulls the model's predictions towards a memory of real images, and away from a memory of earlier
predictions. The rule therefore decides which images stand for the data set: fifo holds those of the latest
batches; max covers all images so far, but drops none for its age, so that an outlier stays for good. An
embedding is a flattened image x_0 in [-1, 1] (its latent, in the papers) or a one-step prediction of x_0.

    python memory.py           # prints how many entries of a rare mode each rule holds at the end; 3 s
"""
import math

import torch

from nanodd import cli, running
from nanodd.errors import UserError, at_least

# ----------------------------------------------------------------------------------------------------
# 1. The rules: which of the m entries of a class stay, as their positions (min(m, slots),), oldest first
#
# cosines(): the cosine similarities of all pairs of entries, (m, m) float64. seen: how many entries of the
# class were ever pushed. rng: a torch.Generator on the CPU, new for every push. No rule here reads the last
# two; the rule in docs/change_one_thing/random.diff does.


def keep_newest(m, slots, cosines, seen, rng):
    """Keeps the newest entries: first in, first out. slots >= 1."""
    return torch.arange(max(0, m - slots), m)


def drop_by_similarity(m, slots, cosines, most):
    """Drops entries of the largest (most=True) or smallest summed cosine to the others until `slots` remain.

    The sums are computed anew after each drop; otherwise both of two equal entries would be dropped. They are
    rounded, so that equal entries tie in spite of rounding errors, and of a tie the oldest entry is dropped.
    """
    if m <= slots:
        return torch.arange(m)
    similarity = cosines()                                                  # (m, m)
    dropped = torch.zeros(m, dtype=torch.bool, device=similarity.device)
    for _ in range(m - slots):                                  # no .item(), which would wait for a GPU
        degree = (similarity * ~dropped).sum(dim=1).round(decimals=9)       # (m,)
        degree = (degree if most else -degree).masked_fill(dropped, -math.inf)
        dropped.index_fill_(0, degree.argmax(dim=0, keepdim=True), True)    # of a tie the first, the oldest
    return dropped.int().argsort(stable=True)[:slots]           # where False, in order of arrival


RULES = {
    "fifo": keep_newest,
    "max": lambda m, slots, cosines, seen, rng: drop_by_similarity(m, slots, cosines, most=True),
    "min": lambda m, slots, cosines, seen, rng: drop_by_similarity(m, slots, cosines, most=False),
}


def rule_pair(name):
    """Reads --memory: (rule of the real memory, rule of the generated one), keys of RULES.

    "fifo"; "adaptive" (Li et al.: max, max); one rule for both; or "max,min". UserError for other words.
    """
    real, _, generated = ("max" if name == "adaptive" else name).partition(",")
    pair = real, generated or real
    if not set(pair) <= set(RULES):
        raise UserError(f"--memory {name} is none of fifo, adaptive, or REAL,GENERATED out of "
                        f"{', '.join(RULES)}")
    return pair


# ----------------------------------------------------------------------------------------------------
# 2. The memory


class Memory:
    """Holds, for each class label, at most `slots` >= 1 detached embeddings (D,), in order of arrival."""

    def __init__(self, slots, rule, seed=0):
        self.slots, self.keep, self.seed = slots, RULES[rule], seed
        self.entries, self.seen = {}, {}                        # {label: (m, D)}, {label: pushed so far}
        self.products = {}                                      # {label: (m, m)}, where a rule asked for it

    def get(self, label):
        """(m, D), m <= slots, or None where nothing of the class was ever pushed."""
        return self.entries.get(label)

    def push(self, label, items):
        """Appends items (n, D), then drops entries by the rule, which may drop a new entry first."""
        items, earlier = items.detach(), self.get(label)
        entries = items if earlier is None else torch.cat([earlier, items])             # (m + n, D)
        self.seen[label] = seen = self.seen.get(label, 0) + len(items)
        seed = (self.seed * 1_000_003 + label) * 1_000_003 + seen
        rng = torch.Generator().manual_seed(seed % 2**32)       # so that a resumed run draws the same numbers
        kept = self.keep(len(entries), self.slots, lambda: self.cosines(label, entries), seen, rng)
        self.entries[label] = entries.index_select(0, kept.to(entries.device))
        if label in self.products:
            self.products[label] = self.products[label][kept][:, kept]

    def cosines(self, label, entries):
        """The cosines of all pairs of entries (m, D): (m, m) float64; products of earlier ones are known."""
        x = (entries.cpu() if entries.device.type == "mps" else entries).double()   # MPS has no float64
        known = self.products.get(label, x.new_empty(0, 0))                 # (k, k)
        new = x[len(known):] @ x.T                                          # (m - k, m)
        self.products[label] = products = torch.cat([torch.cat([known, new[:, :len(known)].T], dim=1), new])
        norm = products.diagonal().sqrt().clamp(min=1e-12)                  # (m,)
        return products / (norm[:, None] * norm)

    def state_dict(self):
        return {"entries": dict(self.entries), "seen": dict(self.seen)}

    def load_state_dict(self, state):
        self.entries, self.seen, self.products = dict(state["entries"]), dict(state["seen"]), {}


# ----------------------------------------------------------------------------------------------------
# 3. A demonstration


def main(argv=None):
    parser = cli.new_parser(__doc__)
    parser.add_argument("--slots", type=int, default=64, help="entries per class (default: %(default)s)")
    args = parser.parse_args(argv)
    with running.command(parser, args):
        at_least(1, slots=args.slots)
        rng = torch.Generator().manual_seed(0)
        memories = {rule: Memory(args.slots, rule) for rule in RULES}
        for _ in range(50):                                     # 50 batches of 8, a tenth of the rare mode
            rare = torch.rand(8, generator=rng) < 0.1           # (8,)
            items = torch.randn(8, 16, generator=rng)           # (8, 16)
            items[:, 0] += torch.where(rare, -6.0, 6.0)         # the two modes differ in the first number
            for memory in memories.values():
                memory.push(0, items)
        for rule, memory in memories.items():
            count = int((memory.get(0)[:, 0] < 0).sum())        # of (slots, 16)
            print(f"{rule:4} | {count:2} of {args.slots} entries are of the rare mode, a tenth of the stream")
        print("-> python minimax.py")


if __name__ == "__main__":
    main()
