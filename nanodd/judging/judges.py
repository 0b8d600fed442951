"""Many judges side by side, each saved while it trains and resumed where it was stopped.

A judge is a classifier trained from scratch on a small set alone. Its training loop is `train` of
train_eval.py, a generator that yields after every epoch. This file does what happens between two epochs:
the accuracy on the test images, the progress bar, and the file from which a stopped judge resumes.

On a CPU several judges train at the same time, in threads, since one small batch does not use two cores
fully. On a GPU they train one by one.
"""
import functools
import hashlib
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import torch
from tqdm import tqdm

from nanodd import files, locks, schema
from nanodd.data import imageset
from nanodd.errors import UserError, printable
from nanodd.judging import augment
from nanodd.networks import training

clock = time.monotonic         # seconds; tests replace it

# ----------------------------------------------------------------------------------------------------
# 1. A judge in training, and the file it resumes from


class JudgeRun(NamedTuple):
    """A judge in training: the network, its training set, its seed and its random number generators.

    rng: on the judge's device. cpu_rng: on the CPU, for numbers that Python reads; a GPU would make it
    wait. On a CPU the two are the same generator.
    """
    judge: torch.nn.Module
    images: imageset.ImageSet
    seed: int
    rng: torch.Generator
    cpu_rng: torch.Generator


def new_run(build, images, recipe, seed):
    """An untrained judge for `images`, an ImageSet at the judge's size; `seed` fixes its random numbers.

    build: (net, size, channels, classes) -> untrained network.
    """
    device = images.images.device
    with torch.random.fork_rng(devices=[]):                     # torch's own generator does not change
        torch.manual_seed(seed)
        judge = build(recipe.net, recipe.judge_size, recipe.colours, len(images.classes)).to(device)
    rng = torch.Generator(device).manual_seed(seed)
    cpu_rng = rng if device.type == "cpu" else torch.Generator().manual_seed(seed)
    return JudgeRun(judge, images, seed, rng, cpu_rng)


STATE = {"epoch": schema.between(0, 10**9), "accuracies": [float], "optimizer": dict, "judge": dict,
         "rng": torch.Tensor, "cpu_rng": torch.Tensor, "seconds": float}


class JudgeCheckpoint:
    """The judges of one row of the table while they train: a file for each, named by its seed.

    folder: where the files are; None saves nothing. earlier: seconds spent on the row before it was stopped.
    """

    def __init__(self, folder=None):
        self.folder, self.began, self.earlier = folder, clock(), 0.0

    def path(self, run):
        """The file of this judge."""
        return self.folder / f"seed{run.seed}.pt"

    def exists(self, run):
        """Whether a state of this judge was saved here."""
        return self.folder is not None and self.path(run).is_file()

    def save(self, run, epoch, optimizer, accuracies):
        """Saves the state after epoch number `epoch`, on which all later epochs depend."""
        files.save_state(self.path(run), {
            "epoch": epoch, "accuracies": accuracies, "optimizer": optimizer.state_dict(),
            "judge": run.judge.state_dict(), "rng": run.rng.get_state(), "cpu_rng": run.cpu_rng.get_state(),
            "seconds": self.earlier + clock() - self.began})

    def restore(self, run):
        """Loads judge and generators in place: (epochs done, optimizer, accuracies so far).

        (0, None, []) where nothing was saved. Raises UserError where the file is damaged.
        """
        if not self.exists(run):
            return 0, None, []
        state = files.load_state(self.path(run), STATE)
        with files.reading_state(self.path(run)):
            run.judge.load_state_dict(state["judge"])
            run.rng.set_state(state["rng"])
            run.cpu_rng.set_state(state["cpu_rng"])
            optimizer = torch.optim.SGD(run.judge.parameters(), lr=0.0)     # the saved state has its numbers
            training.load_optimizer(optimizer, state["optimizer"])
        self.earlier = max(self.earlier, state["seconds"])      # judges in threads share their seconds
        return state["epoch"] + 1, optimizer, state["accuracies"]

    def remove(self):
        """Deletes all files, once the row is done."""
        if self.folder is not None and self.folder.is_dir():
            for path in self.folder.glob("seed*.pt"):
                path.unlink()
            files.remove_empty(self.folder)


def checkpoint_of(folder, trains, test, *settings):
    """A JudgeCheckpoint in a subfolder of `folder`, named by a hash of the row's images and settings.

    The kind of device is one of the settings, since another kind draws other random numbers. folder: None
    saves nothing.
    """
    if folder is None:
        return JudgeCheckpoint()
    contents = [imageset.fingerprint(part) for part in (*trains, test)], test.images.device.type, settings
    folder = folder / hashlib.sha256(repr(contents).encode()).hexdigest()[:16]
    locks.remove_leftovers(folder)
    return JudgeCheckpoint(folder)


# ----------------------------------------------------------------------------------------------------
# 2. One judge, from its saved state to its last epoch


class Stopped(Exception):
    """This judge's training was ended because another one failed, or by Ctrl-C."""


def predictor(device, bf16, stop):
    """predict(network, x (B, C, S, S)) -> logits (B, K) float32. It raises Stopped once `stop` is set.

    bf16: bfloat16 for the network alone; the augmentation's coordinates must stay in float32.
    """
    def predict(network, x):
        if stop is not None and stop.is_set():
            raise Stopped
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            return network(x).float()
    return predict


def train_one(run, test, recipe, epochs, train, accuracy, num_evals, bf16, compiled, checkpoint, stop=None):
    """Trains a judge to its last epoch: its accuracies on `test`, in percent, at `num_evals` epochs.

    The epochs are evenly spread, and the last is one of them. The judge resumes from `checkpoint`, and is
    saved there every files.SAVE_EVERY seconds and at the end. stop: a threading.Event that ends the training.
    """
    predict = predictor(test.images.device, bf16, stop)
    network = torch.compile(run.judge) if compiled else run.judge
    eval_epochs = {round((i + 1) * epochs / num_evals) - 1 for i in range(num_evals)} | {epochs - 1}
    start, optimizer, accuracies = checkpoint.restore(run)
    loop = train(run.judge, run.images, recipe, epochs, functools.partial(predict, network),
                 run.rng, run.cpu_rng, start, optimizer)
    saved = clock()
    for epoch, optimizer, loss in tqdm(loop, initial=start, total=epochs, disable=None, leave=False):
        if epoch in eval_epochs:
            if not loss.isfinite():
                raise UserError(f"a judge's loss is not finite in epoch {epoch + 1}: another --net, or "
                                "--no-bf16, may help")
            predict_test = functools.partial(predict, run.judge.eval())
            accuracies.append(accuracy(predict_test, test.images, test.labels, recipe))
        if checkpoint.folder and (epoch == epochs - 1 or clock() - saved >= files.SAVE_EVERY):
            checkpoint.save(run, epoch, optimizer, accuracies)
            saved = clock()
    return accuracies


# ----------------------------------------------------------------------------------------------------
# 3. Several judges


def in_threads(work, jobs):
    """[work(job, stop) for each of the jobs], several at a time, which share the CPU's threads evenly.

    stop: a threading.Event, set by the first error and by Ctrl-C; work has to check it often.
    """
    threads, stop = torch.get_num_threads(), threading.Event()
    workers = max(n for n in range(1, min(threads, len(jobs)) + 1) if threads % n == 0)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads,
                                initargs=(threads // workers,)) as pool:
            try:                                                # Ctrl-C may come while threads are started
                futures = [pool.submit(work, job, stop) for job in jobs]
                for future in as_completed(futures):
                    future.result()                             # the first error, as soon as it is raised
            finally:
                stop.set()
        return [future.result() for future in futures]
    finally:
        torch.set_num_threads(threads)                          # the workers' number is process-wide, too


def side_by_side(trains, test, recipe, epochs, seeds, *, build, train, accuracy, num_evals, bf16=False,
                 compiled=False, name="", checkpoint=None):
    """Trains untrained judges recipe.net, one for each seed and set of `trains`: [(judge, accuracies)].

    trains: ImageSets, `test` too, all on one device. build: see new_run. train: the generator that trains one
    judge, (judge, images, recipe, epochs, predict, rng, cpu_rng, start, optimizer), which yields (epoch,
    optimizer, loss) after every epoch. accuracy: (predict, images, labels, recipe) -> percent, called at
    `num_evals` epochs. name: if given, each finished judge is printed on stderr where there is no progress
    bar. checkpoint: a JudgeCheckpoint of these judges alone; their seeds must then differ.
    Raises UserError where a loss is not finite.
    """
    device, size = test.images.device, recipe.judge_size
    # Resized once, as uint8: as floats, 9,025 images of 224 pixels would be 5 GB. Judges share their sets.
    sized = {id(part): part._replace(images=augment.resized(part.images, size)) for part in (*trains, test)}
    runs = [new_run(build, sized[id(part)], recipe, seed) for part, seed in zip(trains, seeds, strict=True)]
    checkpoint = checkpoint or JudgeCheckpoint()

    def work(run, stop=None):
        accuracies = train_one(run, sized[id(test)], recipe, epochs, train, accuracy, num_evals, bf16,
                               compiled, checkpoint, stop)
        if name and not sys.stderr.isatty():
            print(printable(f"{name} | a judge of {len(runs)} | {accuracies[-1]:.2f} %"), file=sys.stderr,
                  flush=True)
        return accuracies
    if device.type != "cpu" or len(runs) == 1:
        curves = [work(run) for run in runs]
    else:
        curves = in_threads(work, runs)
    return [(run.judge, curve) for run, curve in zip(runs, curves, strict=True)]


def compiles(build, recipe, classes, device):
    """Whether torch.compile works here, tried on an untrained judge; prints why where it does not."""
    network = build(recipe.net, recipe.judge_size, recipe.colours, classes).to(device)
    batch = torch.zeros(2, recipe.colours, recipe.judge_size, recipe.judge_size, device=device)
    try:
        torch.compile(network)(batch).sum().backward()
    except RuntimeError as error:                               # no compiler, an unsupported Python, ...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"--compile does nothing here, as torch.compile fails: {reason}")
        return False
    return True
