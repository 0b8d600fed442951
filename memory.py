"""What the min-max losses remember: a few detached embeddings per class, and a rule for which to forget.

    fifo    the oldest goes                                                      (Gu et al. 2024)
    max     the entry most similar to all the others goes: argmax_j sum_k cos(m_j, m_k), again and again,
            until the rest fits                            (Li et al. 2025, self-adaptive memory, eq. 7, 8)
    min     the least similar one goes; only there to show that it is worse                   (their Table 3)

A generator learns to stay close to the real memory and away from its own. What is forgotten therefore decides
what "the data" is: first-in-first-out drifts with the batches, "max" spreads over all that was ever seen,
but never ages: an outlier stays for good. An embedding is the flattened x_0 that the model learns: the
picture in [-1, 1], or, as in the papers, its latent.

    python memory.py           # a rare mode in a stream: how many of its entries each rule keeps; 3 s
"""
import math

import torch
import torch.nn.functional as F

from nanodd import cli
from nanodd.errors import UserError, exit_on_user_error

# ----------------------------------------------------------------------------------------------------
# 1. Which entries stay: (m, D) and M -> (min(m, M), D), the order of arrival kept


def keep_newest(entries, slots):
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
    for _ in range(len(entries) - slots):                       # without asking a GPU what it found
        degree = (similarity * ~gone).sum(dim=1).round(decimals=9)          # (m,)
        degree = (degree if most else -degree).masked_fill(gone, -math.inf)
        gone.index_fill_(0, degree.argmax(dim=0, keepdim=True), True)       # the first of equals
    kept = gone.int().argsort(stable=True)[:slots]              # (slots,), in order of arrival
    return entries[kept.to(entries.device)]


POLICIES = {
    "fifo": keep_newest,
    "max": lambda entries, slots: drop_by_similarity(entries, slots, most=True),
    "min": lambda entries, slots: drop_by_similarity(entries, slots, most=False),
}


def policies(name):
    """--memory's word -> (rule for the real memory, rule for the generated one).

    "fifo", "adaptive" (the paper's pair: max, max), or two rules with a comma between: "max,min".
    """
    pair = {"fifo": ("fifo", "fifo"), "adaptive": ("max", "max")}.get(name) or tuple(name.split(","))
    if len(pair) != 2 or any(rule not in POLICIES for rule in pair):
        raise UserError(f"--memory {name} is none of fifo, adaptive, or REAL,GENERATED out of "
                        f"{', '.join(POLICIES)}")
    return pair


# ----------------------------------------------------------------------------------------------------
# 2. The memory


class Memory:
    """For each class label at most `slots` detached embeddings of D numbers, in order of arrival."""

    def __init__(self, slots, policy):
        self.slots, self.keep, self.entries = slots, POLICIES[policy], {}

    def get(self, label):
        """(m, D), m <= slots, or None where nothing of the class was ever pushed."""
        return self.entries.get(label)

    def push(self, label, items):
        """Appends items (n, D), then forgets by the policy: a newcomer may be the first to go."""
        items = items.detach()
        held = self.get(label)
        grown = items if held is None else torch.cat([held, items])         # (m + n, D)
        self.entries[label] = self.keep(grown, self.slots).clone()    # a view would keep `grown`

    def state_dict(self):
        return dict(self.entries)

    def load_state_dict(self, state):
        self.entries = dict(state)


# ----------------------------------------------------------------------------------------------------
# 3. A demonstration


def main(argv=None):
    parser = cli.new_parser(__doc__)
    parser.add_argument("--slots", type=int, default=64, help="entries per class (default: %(default)s)")
    args = parser.parse_args(argv)
    with exit_on_user_error(parser):
        if args.slots < 1:
            raise UserError(f"--slots must be at least 1, not {args.slots}")
        generator = torch.Generator().manual_seed(0)
        memories = {name: Memory(args.slots, name) for name in POLICIES}
        for _ in range(50):                                     # 50 batches of 8, a tenth of the rare mode
            rare = torch.rand(8, generator=generator) < 0.1
            items = torch.randn(8, 16, generator=generator)
            items[:, 0] += torch.where(rare, -6.0, 6.0)
            for memory in memories.values():
                memory.push(0, items)
        for name, memory in memories.items():
            held = memory.get(0)
            print(f"{name:4} | {len(held)} slots | {int((held[:, 0] < 0).sum()):2} of the rare mode, "
                  f"which is a tenth of the stream")
        print("-> python minimax.py")


if __name__ == "__main__":
    main()
