"""What surrounds a training loop: the images of a step, optimizer, averaged weights, resuming, log.

The loops themselves are diffusion.train, minimax.tune and turbo.distil. Each is a generator that yields after
every optimizer step, and `fit` runs it to its end: between two yields all state is consistent and can be
saved.
"""
import contextlib
import functools
import json
import math
import pathlib
import time
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from nanodd import files, processes, schema
from nanodd.errors import UserError
from nanodd.networks import checkpoint, halves

# ----------------------------------------------------------------------------------------------------
# 1. Which images a step sees


@functools.lru_cache(maxsize=2)
def shuffled(n, seed, epoch):
    """A permutation of 0..n-1, a function of (seed, epoch)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**32))


@functools.lru_cache(maxsize=1)
def batch_index(n, batch, step, seed):
    """Positions of the images of step number `step`: (batch,) int64 in 0..n-1, each image once an epoch."""
    first = step * batch
    epochs = range(first // n, (first + batch - 1) // n + 1)
    stream = torch.cat([shuffled(n, seed, epoch) for epoch in epochs])
    return stream[first - epochs[0] * n:][:batch]


# ----------------------------------------------------------------------------------------------------
# 2. The optimizer and the averaged weights


class Plan(NamedTuple):
    """How a network is trained: all numbers but those of the network and the data."""
    steps: int
    batch: int                 # images a step, of all processes together
    lr: float                  # AdamW's peak learning rate
    decay: bool                # True: warm-up, then half a cosine to zero; False: constant, after lr_warm
    ema: float                 # decay of the averaged weights
    seed: int
    flip: bool                 # whether training images are mirrored at random
    beta2: float = 0.99        # AdamW's; in short runs the second moment must catch up with the gradients
    beta1: float = 0.9
    weight_decay: float = 0.
    lr_warm: int = 0           # steps of a linear warm-up before a constant rate
    warm: bool = True          # whether the decay of the average warms up: see ema_decay
    # bfloat16 products under autocast, where Gu et al. had float32 (TF32); trained weights stay float32
    bf16: bool = False

    def lr_at(self, step):
        """The learning rate: constant after lr_warm steps; or a twentieth of warm-up, then half a cosine."""
        if not self.decay:
            return self.lr * min(1.0, (step + 1) / max(1, self.lr_warm))
        warm = max(1, self.steps // 20)
        rest = max(0.0, (step - warm) / max(1, self.steps - warm))
        return self.lr * min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * rest))


def by_recipe(recipe):
    """(network size, {field of Plan: number}) of a base model, as the recipe of its data has them."""
    return recipe.network, {"steps": recipe.steps, "batch": recipe.batch, "lr": recipe.lr, "ema": recipe.ema,
                            "decay": True}


def ema_decay(step, decay):
    """The average spans about a tenth of the steps so far, until `decay` is reached (.99: at step 890)."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def ema_update(average, weights, decay):
    """average <- decay * average + (1 - decay) * weights, in place, over two dicts of the same tensors."""
    torch._foreach_lerp_(list(average.values()), [weights[name] for name in average], 1 - decay)


class Trainer:
    """Everything that an optimizer step changes: the trainable weights, their average, the optimizer.

    model: on its device; what requires a gradient is trained. Under torchrun gradients are averaged over the
    processes. Raises UserError where plan.batch does not divide over the processes.
    """

    def __init__(self, model, plan):
        processes.batch_share(plan.batch)                       # raises where it does not divide
        self.model, self.plan = model.train(), plan
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.ema = {name: p.detach().clone() for name, p in self.trainable.items()}
        self.optimizer = torch.optim.AdamW(self.trainable.values(), lr=plan.lr,
                                           betas=(plan.beta1, plan.beta2), weight_decay=plan.weight_decay,
                                           fused=True)
        if plan.bf16:                                           # cast the frozen weights once, which autocast
            for p in model.parameters():                        # would do each step; pos_embed is only added
                if not p.requires_grad and p is not model.pos_embed:
                    p.data = p.data.bfloat16()
        self.network = model if processes.world() == 1 else DistributedDataParallel(model)
        self.halves = None
        if processes.world() == 1 and halves.pay(model, plan.batch):
            self.halves = halves.Halves(self.forward, self.trainable.values())

    def predict(self, x, t, y):
        """The network on float32 images, with a float32 output; of a tiny one two threads, side by side."""
        return self.forward(x, t, y) if self.halves is None else self.halves(x, t, y)

    def forward(self, x, t, y):
        """The same in this thread, whatever the precision in between."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.plan.bf16):
            return self.network(x, t, y).float()

    def close(self):
        """Ends the threads of `predict`: the training is over."""
        if self.halves is not None:
            self.halves.close()

    def step(self, step):
        """Makes step number `step`: AdamW at the plan's rate, then the averaged weights follow."""
        plan = self.plan
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr_at(step)
        self.optimizer.step()
        ema_update(self.ema, self.trainable, ema_decay(step, plan.ema) if plan.warm else plan.ema)

    def state_dict(self):
        """The state to save: weights, averaged weights and optimizer."""
        return {"tuned": {name: p.detach() for name, p in self.trainable.items()}, "average": self.ema,
                "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Loads what state_dict returned, in place."""
        for tensors, saved in ((self.trainable, state["tuned"]), (self.ema, state["average"])):
            for name, tensor in tensors.items():
                tensor.copy_(saved[name])
        load_optimizer(self.optimizer, state["optimizer"])


ENTRIES = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "SGD": {"momentum_buffer"}}     # of each parameter


def load_optimizer(optimizer, state):
    """Loads the state of an AdamW or SGD of the same parameters, in place.

    Raises ValueError where it is of others, which torch may notice late, or as a segmentation fault.
    """
    own, saved = ([group["params"] for group in groups["param_groups"]]
                  for groups in (optimizer.state_dict(), state))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if own != saved:
        raise ValueError("the optimizer's state is of other parameters")
    for index, entries in state["state"].items():
        tensors = [value for value in entries.values() if value is not None]
        if set(entries) != ENTRIES[type(optimizer).__name__] or not all(
                value.shape in ((), parameters[index].shape) for value in tensors):
            raise ValueError(f"the optimizer's state does not fit parameter {index}")
    optimizer.load_state_dict(state)


# ----------------------------------------------------------------------------------------------------
# 3. Running a loop to its end


STATE = {"step": schema.between(1, math.inf), "seconds": schema.between(0, 10**9, float),
         "settings": schema.are_settings, "log": [checkpoint.LINE],
         "sums": lambda sums: all(isinstance(value, (float, torch.Tensor)) for value in sums.values()),
         "trainer": {"tuned": dict, "average": dict, "optimizer": dict}}


def fit(trainer, loop, path, header, overwrite=False, memories=None, show=None):
    """Runs a training loop to the plan's end and writes the averaged weights to `path`; resumes.

    loop: start=k -> a generator that makes the optimizer steps from number k on, and yields {name: scalar
    tensor} after each. memories: what else the loop changes (with state_dict, load_state_dict), or None.
    show: None, or called on the first process after line k = 1, 2, ... of the log: show(k, is it the last).
    NAME.resume.pt has the state until the end, saved every files.SAVE_EVERY seconds or, where that is longer,
    20 times as long as saving takes; NAME.log.jsonl has the losses, means since the line before.
    Raises UserError as restored, where a loss is not finite (the saved state is then removed), and where
    torchrun has ended.
    """
    path, steps = pathlib.Path(path), trainer.plan.steps
    resume = path.with_suffix(".resume.pt")
    start, seconds, logged = restored(trainer, memories, resume, header["settings"], overwrite)
    log = Log(path, steps, start, seconds, logged)
    last_save, save_cost = time.monotonic(), 0.0
    with contextlib.closing(trainer), tqdm(total=steps, initial=start, leave=False, unit="step",
                                           disable=processes.rank() > 0 or None) as bar:
        for done, losses in enumerate(loop(start=start), start + 1):
            log.add(losses)
            bar.update()
            now = time.monotonic()
            line_due = done % log.every == 0 or done == steps
            ended = processes.orphaned.is_set()
            save_due = ended or now - last_save > max(files.SAVE_EVERY, 20 * save_cost)
            save_due = save_due and done < steps and processes.rank() == 0
            if line_due or save_due:
                if not log.is_finite(line_due):
                    resume.unlink(missing_ok=True)
                    raise UserError(
                        f"the loss is not finite between steps {max(0, done - log.every)} and {done}: "
                        "lower the recipe's learning rate (nanodd/recipes.py), or the lambdas; "
                        f"{path} is untouched")
            if line_due:
                bar.write(log.line(done, now))
                if show is not None:
                    processes.on_first_process(lambda done=done: show(len(log.lines), done == steps))
            if save_due:
                state = {**trainer.state_dict(), "extra": memories and memories.state_dict()}
                files.save_state(resume, {"step": done, "seconds": now - log.began,
                                          "settings": header["settings"], "sums": log.sums,
                                          "log": log.lines, "trainer": state})
                last_save = time.monotonic()
                save_cost = last_save - now
                if ended:
                    raise UserError(f"torchrun has ended: step {done} is saved, and the same command resumes")
    if processes.rank() == 0:
        tensors = trainer.ema if "base" in header else {**trainer.model.state_dict(), **trainer.ema}
        checkpoint.save_checkpoint(path, tensors, {**header, "step": steps})
        resume.unlink(missing_ok=True)
    processes.barrier()                                         # no process reads the file before it is there


def restored(trainer, memories, resume, settings, overwrite):
    """Loads the saved state of a run into the trainer: (steps done, seconds, (sums, lines) of the log).

    Nothing is loaded where there is no file `resume`, or where it has other settings and may be overwritten.
    Raises UserError where it has other settings and may not, or is damaged.
    """
    beginning = 0, 0.0, ({}, [])
    if not resume.exists():
        return beginning
    state = files.load_state(resume, STATE, next(trainer.model.parameters()).device)
    if state["settings"] != settings:
        if not overwrite:
            checkpoint.check_settings(state["settings"], settings, resume)
        return beginning
    with files.reading_state(resume):
        trainer.load_state_dict(state["trainer"])
        if memories is not None:
            memories.load_state_dict(state["trainer"]["extra"])
    print(f"resuming from step {state['step']}")
    return state["step"], state["seconds"], (state["sums"], state["log"])


class Log:
    """Means of the losses over each tenth of the steps: a line on the screen, and one in NAME.log.jsonl."""

    def __init__(self, path, steps, start, seconds, before):
        self.path, self.steps, self.start, self.seconds = path, steps, start, seconds
        self.sums, self.lines = before
        self.every, self.began = max(1, steps // 10), time.monotonic() - seconds

    def add(self, losses):
        """Adds a step's {name: scalar tensor} to the sums, without waiting for a GPU."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def is_finite(self, line_due):
        """Whether all sums are finite. Where a line is due, they are averaged over all processes first."""
        if line_due and processes.world() > 1:
            self.sums = processes.all_reduce_mean(self.sums)
        return all(math.isfinite(float(value)) for value in self.sums.values())

    def line(self, done, now):
        """Adds the means since the last entry to the file, and returns the line for the screen."""
        count = done % self.every or self.every
        means = {name: float(value) / count for name, value in self.sums.items()}
        self.lines.append({"step": done, **means, "seconds": now - self.began})
        self.sums = {}
        if processes.rank() == 0:
            with files.atomic_write(self.path.with_suffix(".log.jsonl")) as temporary:
                temporary.write_text("".join(json.dumps(entry) + "\n" for entry in self.lines))
        speed = (done - self.start) / (now - self.began - self.seconds)
        return (f"step {done}/{self.steps} | "
                + " | ".join(f"{name} {mean:.4f}" for name, mean in means.items())
                + f" | {speed:.1f} it/s | eta {(self.steps - done) / speed:.0f}s")
