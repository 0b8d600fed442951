"""Memories forget by their rule, and by nothing else."""
from collections import deque

import pytest
import torch

import memory
from memory import Memory, rule_pair
from nanodd.errors import UserError


def test_memory_forgets_the_oldest_first():
    kept, reference = Memory(5, "fifo"), deque(maxlen=5)
    for _ in range(9):
        items = torch.randn(int(torch.randint(1, 8, ())), 4)
        kept.push(3, items)
        reference.extend(items)
        assert torch.equal(kept.get(3), torch.stack(list(reference)))
    assert kept.get(0) is None                                    # other classes are other memories


def brute_force(entries, slots, most):
    """The rule of the self-adaptive memory, item by item (double loops, plain Python)."""
    entries = [entry.double() for entry in entries]
    while len(entries) > slots:
        degrees = [round(sum(float(a @ b / (a.norm() * b.norm())) for b in entries), 9) for a in entries]
        entries.pop(degrees.index(max(degrees) if most else min(degrees)))
    return torch.stack(entries).float()


@pytest.mark.parametrize("policy", ["max", "min"])
def test_self_adaptive_memory_drops_the_most_similar(policy):
    kept, reference = Memory(6, policy), torch.empty(0, 5)
    for _ in range(6):
        items = torch.randn(4, 5)
        kept.push(0, items)
        reference = brute_force([*reference, *items], 6, policy == "max")
        assert torch.equal(kept.get(0), reference)


def test_known_products_are_those_of_the_entries_after_hundreds_of_pushes():
    kept, labels = Memory(64, "max"), torch.randint(3, (260,)).tolist()
    for label in labels:
        kept.push(label, torch.randn(int(torch.randint(1, 9, ())), 16))
    for label in set(labels):
        entries = kept.get(label).double()
        assert torch.allclose(kept.products[label], entries @ entries.T, atol=1e-9)
    again = Memory(64, "max")
    again.load_state_dict(kept.state_dict())                      # which has no products
    assert not again.products and set(kept.state_dict()) == {"entries", "seen"}
    for memory_of in (kept, again):
        memory_of.push(labels[0], torch.ones(5, 16).cumsum(0))
    assert torch.equal(kept.get(labels[0]), again.get(labels[0]))


def test_of_two_equal_entries_the_older_goes():
    kept = Memory(3, "max")
    kept.push(0, torch.tensor([[-1., 0.], [1., 0.], [.1, 0.], [0., 1.]]))  # summed cosines -1, 1, 1, 1
    assert torch.allclose(kept.get(0), torch.tensor([[-1., 0.], [.1, 0.], [0., 1.]]))


def test_similarities_are_taken_anew_after_each_drop():
    entries = torch.tensor([[1., 0.], [1., 0.], [1., .1], [0., 1.]])
    kept = Memory(2, "max")
    kept.push(0, entries)
    assert [0., 1.] in kept.get(0).tolist()                       # the outlier stays, with one of the cluster


def test_memory_holds_no_gradients_and_survives_a_save(tmp_path):
    kept = Memory(4, "max")
    kept.push(1, torch.randn(3, 2, requires_grad=True))
    assert not kept.get(1).requires_grad
    torch.save(kept.state_dict(), tmp_path / "m.pt")
    again = Memory(4, "max")
    again.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    assert torch.equal(again.get(1), kept.get(1))


def test_a_rule_gets_what_was_ever_pushed_and_random_numbers_that_resume(monkeypatch):
    calls = []

    def spy(m, slots, cosines, seen, rng):
        calls.append((m, seen, int(torch.randint(10**9, (), generator=rng))))
        return torch.arange(min(m, slots))
    monkeypatch.setitem(memory.RULES, "spy", spy)
    whole, cut = Memory(3, "spy", seed=1), Memory(3, "spy", seed=1)
    for _ in range(4):
        whole.push(5, torch.zeros(2, 1))
    cut.push(5, torch.zeros(2, 1))
    resumed = Memory(3, "spy", seed=1)
    resumed.load_state_dict(cut.state_dict())
    for _ in range(3):
        resumed.push(5, torch.zeros(2, 1))
    assert [call[:2] for call in calls[:4]] == [(2, 2), (4, 4), (5, 6), (5, 8)]
    assert calls[:4] == calls[4:] and len({drawn for _, _, drawn in calls}) == 4
    Memory(3, "spy", seed=1).push(6, torch.zeros(2, 1))           # another class, other numbers
    Memory(3, "spy", seed=2).push(5, torch.zeros(2, 1))           # another seed
    assert len({drawn for _, _, drawn in calls}) == 6


def test_adaptive_is_the_papers_pair():
    assert rule_pair("adaptive") == ("max", "max") and rule_pair("fifo") == ("fifo", "fifo")
    assert rule_pair("max,min") == ("max", "min") and rule_pair("max") == ("max", "max")
    with pytest.raises(UserError, match="REAL,GENERATED"):
        rule_pair("newest")


def test_the_demonstration_shows_the_rare_mode_kept(capsys, sentence):
    memory.main([])
    rare = {line.split()[0]: int(line.split("| ")[1].split()[0])
            for line in capsys.readouterr().out.splitlines() if "rare" in line}
    assert rare["max"] > 2 * rare["fifo"]
    assert "--slots" in sentence(memory.main, "--slots", 0)
