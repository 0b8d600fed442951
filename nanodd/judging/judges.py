"""Many judges side by side, each saved while it trains and resumed where it was stopped.

A judge is a classifier trained from scratch on a small set alone. Its training loop is `train` of
train_eval.py, a generator that yields after every epoch. This file does what happens between two epochs:
the accuracy on the test images, the progress bar, and the file from which a stopped judge resumes.

On a CPU several judges train at the same time, in threads, since one small batch does not use two cores
fully; the last one of a row trains beside the first of the next. On a GPU they train one by one.
"""
import collections
import contextlib
import functools
import hashlib
import itertools
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

    folder: where the files are; None saves nothing.
    """

    def __init__(self, folder=None):
        self.folder = folder

    def path(self, run):
        """The file of this judge."""
        return self.folder / f"seed{run.seed}.pt"

    def exists(self, run):
        """Whether a state of this judge was saved here."""
        return self.folder is not None and self.path(run).is_file()

    def save(self, run, epoch, optimizer, accuracies, seconds):
        """Saves the state after epoch number `epoch`, on which all later epochs depend."""
        files.save_state(self.path(run), {
            "epoch": epoch, "accuracies": accuracies, "optimizer": optimizer.state_dict(),
            "judge": run.judge.state_dict(), "rng": run.rng.get_state(), "cpu_rng": run.cpu_rng.get_state(),
            "seconds": seconds})

    def restore(self, run):
        """Loads judge and generators in place: (epochs done, optimizer, accuracies so far, seconds so far).

        (0, None, [], 0.0) where nothing was saved. Raises UserError where the file is damaged.
        """
        if not self.exists(run):
            return 0, None, [], 0.0
        state = files.load_state(self.path(run), STATE)
        with files.reading_state(self.path(run)):
            run.judge.load_state_dict(state["judge"])
            run.rng.set_state(state["rng"])
            run.cpu_rng.set_state(state["cpu_rng"])
            optimizer = torch.optim.SGD(run.judge.parameters(), lr=0.0)     # the saved state has its numbers
            training.load_optimizer(optimizer, state["optimizer"])
        return state["epoch"] + 1, optimizer, state["accuracies"], state["seconds"]

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


def compiled_judge(judge, batch, device):
    """torch.compile of a judge. On a GPU, whole batches of `batch` images replay a CUDA graph.

    There the smaller batch at the end of an epoch is not compiled: each size would take half a minute.
    """
    if device.type != "cuda":
        return torch.compile(judge)
    replayed = torch.compile(judge, mode="reduce-overhead", dynamic=False)
    return lambda x: replayed(x) if len(x) == batch else judge(x)


def train_one(run, test, recipe, epochs, train, accuracy, num_evals, batch, bf16, compiled, checkpoint,
              stop=None):
    """Trains a judge to its last epoch: (accuracies on `test`, in percent, at `num_evals` epochs; seconds).

    The epochs are evenly spread, and the last is one of them. The judge resumes from `checkpoint`, and is
    saved there every files.SAVE_EVERY seconds and at the end. stop: a threading.Event that ends the training.
    """
    began, predict = clock(), predictor(test.images.device, bf16, stop)
    network = compiled_judge(run.judge, batch, test.images.device) if compiled else run.judge
    eval_epochs = {round((i + 1) * epochs / num_evals) - 1 for i in range(num_evals)} | {epochs - 1}
    start, optimizer, accuracies, earlier = checkpoint.restore(run)
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
            checkpoint.save(run, epoch, optimizer, accuracies, earlier + clock() - began)
            saved = clock()
    return accuracies, earlier + clock() - began


# ----------------------------------------------------------------------------------------------------
# 3. Several judges


class Row(NamedTuple):
    """The judges of one row of the table, which are yet to be trained: one for each seed.

    trains: the ImageSet of each judge. name: if given, each finished judge is printed on stderr where there
    is no progress bar. checkpoint: of these judges alone; their seeds must then differ. results.new_row reads
    pda (augmented copies of each image), chosen_in (the seconds in which the images were chosen) and metrics.
    """
    trains: list
    seeds: list
    epochs: int
    name: str = ""
    checkpoint: JudgeCheckpoint = JudgeCheckpoint()
    pda: int = 0
    chosen_in: float = 0.0
    metrics: dict | None = None


def at_a_time(jobs):
    """How many of so many jobs run in threads at once, which share the CPU's threads evenly."""
    threads = torch.get_num_threads()
    return max(n for n in range(1, min(threads, jobs) + 1) if threads % n == 0)


def in_threads(work, jobs):
    """Yields work(job, stop) for each of the jobs, in their order, with at_a_time(len(jobs)) at work.

    stop: a threading.Event, set by the first error and by Ctrl-C; work has to check it often.
    """
    threads, workers, stop = torch.get_num_threads(), at_a_time(len(jobs)), threading.Event()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads,
                                initargs=(threads // workers,)) as pool:
            try:                                                # Ctrl-C may come while threads are started
                futures = [pool.submit(work, job, stop) for job in jobs]
                waiting = collections.deque(futures)
                for future in as_completed(futures):
                    future.result()                             # the first error, as soon as it is raised
                    while waiting and waiting[0].done():
                        yield waiting.popleft().result()
            finally:
                stop.set()
    finally:
        torch.set_num_threads(threads)                          # the workers' number is process-wide, too


def side_by_side(rows, test, recipe, *, build, train, accuracy, num_evals, batch, bf16=False, compiled=False):
    """Trains the judges recipe.net of all `rows`; yields, for each Row, ([(judge, accuracies)], seconds).

    test: an ImageSet on the device of the rows' sets. build: see new_run. train: the generator that trains
    one judge, (judge, images, recipe, epochs, predict, rng, cpu_rng, start, optimizer), which yields (epoch,
    optimizer, loss) after every epoch. accuracy: (predict, images, labels, recipe) -> percent, called at
    `num_evals` epochs. batch: images a step. seconds: of the row's judges, divided by how many train at once.
    Raises UserError where a loss is not finite.
    """
    size, sets = recipe.judge_size, [*itertools.chain(*(row.trains for row in rows)), test]
    # Resized once, as uint8: as floats, 9,025 images of 224 pixels would be 5 GB. Judges share their sets.
    sized = {id(part): part._replace(images=augment.resized(part.images, size)) for part in sets}
    jobs = [(row, new_run(build, sized[id(part)], recipe, seed))
            for row in rows for part, seed in zip(row.trains, row.seeds, strict=True)]

    def work(job, stop=None):
        row, run = job
        accuracies, seconds = train_one(run, sized[id(test)], recipe, row.epochs, train, accuracy, num_evals,
                                        batch, bf16, compiled, row.checkpoint, stop)
        if row.name and not sys.stderr.isatty():
            print(printable(f"{row.name} | a judge of {len(row.seeds)} | {accuracies[-1]:.2f} %"),
                  file=sys.stderr, flush=True)
        return run.judge, accuracies, seconds
    if test.images.device.type == "cpu" and len(jobs) > 1:
        finished, workers = in_threads(work, jobs), at_a_time(len(jobs))
    else:
        finished, workers = (work(job) for job in jobs), 1
    with contextlib.closing(finished):                          # ends the threads, whatever happens
        for row in rows:
            done = list(itertools.islice(finished, len(row.seeds)))
            yield ([(judge, accuracies) for judge, accuracies, _ in done],
                   sum(seconds for _, _, seconds in done) / workers)


PAYS = {"cpu": 2e8, "cuda": 3e9}    # judges x epochs x images x pixels of an image (docs/log.md)


def compiles(asked, rows, recipe, build, device, batch, bf16):
    """Whether the judges of `rows` are compiled: as asked, or where that is None, where it pays.

    It pays for ConvNets, from PAYS on; elsewhere that is not measured. On a GPU only whole batches count.
    Tried on an untrained judge first; prints what was decided, or why torch.compile does not work here.
    """
    on_gpu = device.type == "cuda"
    unit = batch if on_gpu else 1
    views = sum(row.epochs * (len(part.labels) // unit * unit) for row in rows for part in row.trains)
    measured = device.type in PAYS and recipe.net.startswith("convnet")
    pays = measured and views * recipe.judge_size**2 >= PAYS[device.type]
    if not (pays if asked is None else asked) or views == 0:
        return False
    network = build(recipe.net, recipe.judge_size, recipe.colours, len(rows[0].trains[0].classes)).to(device)
    size, predict = recipe.judge_size, predictor(device, bf16, None)
    images = torch.zeros(batch if on_gpu else 2, recipe.colours, size, size, device=device)
    try:
        compiled = compiled_judge(network, batch, device)
        for _ in range(3 if on_gpu else 1):                     # a graph is recorded, then replayed
            predict(compiled, images).sum().backward()
    except RuntimeError as error:                               # no compiler, an unsupported Python, ...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"judges are not compiled, as torch.compile fails here: {reason}", file=sys.stderr)
        return False
    print(f"judges are compiled, as they will see {views:,} images (--no-compile: they are not)",
          file=sys.stderr)
    return True
