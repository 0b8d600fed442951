"""What the min-max losses remember: a few detached embeddings per class, and a rule for which to forget.

    fifo    the oldest goes                                                      (Gu et al. 2024)
    max     the entry most similar to all the others goes: argmax_j sum_k cos(m_j, m_k), again and again,
            until the rest fits                            (Li et al. 2025, self-adaptive memory, eq. 7, 8)
    min     the least similar one goes; only there to show that it is worse                   (their Table 3)

A generator learns to stay close to the memory of real images and away from the memory of its own. The rule
therefore decides what "the data" is: first-in-first-out drifts with the batches, "max" spreads over all that
was ever seen but never ages, so that an outlier stays for good. An embedding is the flattened x_0 that the
diffusion model learns: the picture in [-1, 1] or, as in the papers, its latent.

    python memory.py           # a rare mode in a stream: how many of its entries each rule keeps; 3 s
"""
import math

import torch
import torch.nn.functional as F

from nanodd import cli
from nanodd.errors import UserError, at_least, exit_on_user_error

# ----------------------------------------------------------------------------------------------------
# 1. The rules: which of m entries stay, (m, D) -> (min(m, slots), D), in order of arrival
#
# seen: how many entries were ever pushed. rng: a torch.Generator on the CPU, seeded anew for every push.


def keep_newest(entries, slots, seen, rng):
    """First in, first out."""
    return entries[-slots:]


def drop_by_similarity(entries, slots, most):
    """While over `slots`, drops the entry of the largest (most=True) or smallest summed cosine to the others.

    The sums are taken anew after each drop, or a pair of twins would go together. They are rounded, so that
    equal entries tie in spite of the last digit, and the oldest of a tie goes.
    """
    if len(entries) <= slots:
        return entries
    wide = entries if entries.device.type != "mps" else entries.cpu()       # which has no float64
    unit = F.normalize(wide.double(), dim=1)                                # (m, D)
    similarity = unit @ unit.T                                              # (m, m)
    gone = torch.zeros(len(entries), dtype=torch.bool, device=unit.device)
    for _ in range(len(entries) - slots):                       # without waiting for a GPU's answer
        degree = (similarity * ~gone).sum(dim=1).round(decimals=9)          # (m,)
        degree = (degree if most else -degree).masked_fill(gone, -math.inf)
        gone.index_fill_(0, degree.argmax(dim=0, keepdim=True), True)       # the first of equals
    stays = gone.int().argsort(stable=True)[:slots]             # (slots,), in order of arrival
    return entries[stays.to(entries.device)]


RULES = {
    "fifo": keep_newest,
    "max": lambda entries, slots, seen, rng: drop_by_similarity(entries, slots, most=True),
    "min": lambda entries, slots, seen, rng: drop_by_similarity(entries, slots, most=False),
}


def rules(name):
    """--memory's word -> (rule of the real memory, rule of the generated one), keys of RULES.

    "fifo", "adaptive" (the paper's pair: max, max), a rule for both, or two with a comma between: "max,min".
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
    """For each class label at most `slots` detached embeddings of D numbers, in order of arrival."""

    def __init__(self, slots, rule, seed=0):
        self.slots, self.keep, self.seed = slots, RULES[rule], seed
        self.entries, self.seen = {}, {}                        # {label: (m, D)}, {label: pushed so far}

    def get(self, label):
        """(m, D), m <= slots, or None where nothing of the class was ever pushed."""
        return self.entries.get(label)

    def push(self, label, items):
        """Appends items (n, D), then forgets by the rule: a new entry may be the first to go."""
        items, before = items.detach(), self.get(label)
        grown = items if before is None else torch.cat([before, items])     # (m + n, D)
        self.seen[label] = self.seen.get(label, 0) + len(items)
        # a function of (seed, class, entries so far), so that a resumed run draws the same numbers
        rng = torch.Generator().manual_seed((self.seed * 1_000_003 + label) * 1_000_003 + self.seen[label])
        self.entries[label] = self.keep(grown, self.slots, self.seen[label], rng).clone()  # not a view

    def state_dict(self):
        return {"entries": dict(self.entries), "seen": dict(self.seen)}

    def load_state_dict(self, state):
        self.entries, self.seen = dict(state["entries"]), dict(state["seen"])


# ----------------------------------------------------------------------------------------------------
# 3. A demonstration


def main(argv=None):
    parser = cli.new_parser(__doc__)
    parser.add_argument("--slots", type=int, default=64, help="entries per class (default: %(default)s)")
    args = parser.parse_args(argv)
    with exit_on_user_error(parser):
        at_least(1, slots=args.slots)
        rng = torch.Generator().manual_seed(0)
        memories = {rule: Memory(args.slots, rule) for rule in RULES}
        for _ in range(50):                                     # 50 batches of 8, a tenth of the rare mode
            rare = torch.rand(8, generator=rng) < 0.1           # (8,)
            items = torch.randn(8, 16, generator=rng)           # (8, 16)
            items[:, 0] += torch.where(rare, -6.0, 6.0)
            for memory in memories.values():
                memory.push(0, items)
        for rule, memory in memories.items():
            rare = int((memory.get(0)[:, 0] < 0).sum())         # of (slots, 16)
            print(f"{rule:4} | {args.slots} slots | {rare:2} of the rare mode, a tenth of the stream")
        print("-> python minimax.py")


if __name__ == "__main__":
    main()
