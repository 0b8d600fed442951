"""Several processes, as torchrun starts them: the rank of this one, its share of a batch, communication.

Without torchrun there is one process, of rank 0: its share is the whole batch, and nothing is communicated.
"""
import datetime
import hashlib
import os
import pathlib
import re
import sys
import threading
import time
from contextlib import contextmanager, redirect_stdout

import torch
import torch.distributed as dist

from nanodd.errors import UserError

PARENT_EVERY, GRACE = 5, 20    # seconds between two looks for torchrun, and from its end to that of a process

# ----------------------------------------------------------------------------------------------------
# 1. The group of processes

shared = {}                    # "store": torchrun's; "patient": the group for long waits
orphaned = threading.Event()   # set once torchrun is gone


def rank():
    """The number of this process, from 0 to world() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes torchrun started; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier(patient=False):
    """Waits until all processes have reached this call; ten minutes, or two hours where it is patient."""
    if dist.is_initialized():
        dist.barrier(group=shared["patient"] if patient else None)


def refuse_several(program):
    """Raises UserError where torchrun started several processes of a command that is for one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{program} runs in one process: start it without torchrun")


@contextmanager
def process_group(settings=None):
    """Joins the processes that torchrun started, if it did, for the length of the block; only rank 0 prints.

    settings: a dict of this process's; all must have the same, and the same code. The others end if a process
    does not answer for ten minutes; for two hours where they wait for one that encodes pictures, downloads or
    trains a judge. Raises UserError where processes differ, or are more than the GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    if "RANK" not in os.environ:
        raise UserError("WORLD_SIZE is set, but RANK is not: start with torchrun, or unset WORLD_SIZE")
    gpus, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if 0 < gpus < here:
        raise UserError(f"{here} processes are too many for {gpus} GPUs: lower --nproc-per-node")
    store, number, count = next(dist.rendezvous("env://"))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store,
                            rank=number, world_size=count, timeout=datetime.timedelta(minutes=10))
    shared.update(store=store, patient=dist.new_group(timeout=datetime.timedelta(hours=2), backend="gloo"))
    if "TORCHELASTIC_RUN_ID" in os.environ:                     # else the parent may be a script that ends
        threading.Thread(target=watch_parent, args=[os.getppid()], daemon=True).start()
    try:
        check_same(settings or {})
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
            yield
    except (Exception, KeyboardInterrupt):
        is_first_to_report()                                    # before the others see a broken connection
        raise
    finally:
        dist.destroy_process_group()


def check_same(settings):
    """Raises UserError, on all processes, where they have other settings or another code than the first."""
    folder, digest = pathlib.Path(__file__).parents[1], hashlib.sha256()
    for path in sorted([*folder.glob("*.py"), *folder.glob("nanodd/**/*.py")]):
        digest.update(path.read_bytes())
    facts = [None] * world()
    dist.all_gather_object(facts, {**{name: repr(value) for name, value in settings.items()},
                                   "code": digest.hexdigest()[:8]})
    for number, other in enumerate(facts):
        names = [name for name in facts[0] if other.get(name) != facts[0][name]]
        if names:
            raise UserError(f"the processes differ in {names[0]}: {facts[0][names[0]]} on process 0, "
                            f"{other.get(names[0])} on process {number}: start all with the same flags and "
                            "the same code")


def is_first_to_report():
    """Whether no other process has said yet why it ends: of many that fail, one alone prints a sentence."""
    if "store" not in shared:                                   # not joined yet: all of a machine fail alike
        return os.environ.get("LOCAL_RANK", "0") == "0"
    if "first" not in shared:
        try:
            shared["first"] = shared["store"].add("nanodd/failed", 1) == 1
        except RuntimeError:                                    # torchrun, which holds the store, has ended
            shared["first"] = True
    return shared["first"]


def is_broken_connection(error):
    """Whether a RuntimeError of a collective call means that another process ended or does not answer."""
    words = r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Tt]imed out|[Tt]imeout"
    return "store" in shared and (isinstance(error, dist.DistError) or bool(re.search(words, str(error))))


def watch_parent(parent):
    """Ends this process a while after torchrun, its parent, is gone: nobody would end it, nor the others.

    training.fit sees `orphaned` earlier, and saves.
    """
    while os.getppid() == parent:
        time.sleep(PARENT_EVERY)
    orphaned.set()
    time.sleep(GRACE)
    print("torchrun has ended: so does this process; what was finished is kept, and the same command resumes",
          file=sys.stderr, flush=True)
    os._exit(2)                                                 # the main thread may wait for another process


# ----------------------------------------------------------------------------------------------------
# 2. A process's share of a batch


def batch_share(batch):
    """The number of images of a batch that each process takes. Raises UserError where it is not whole."""
    if batch % world():
        raise UserError(f"a batch of {batch} does not divide over {world()} processes: take a multiple")
    return batch // world()


def own_share(*tensors):
    """The rows of each tensor (B, ...) that are this process's share of the batch: (B / processes, ...)."""
    share = batch_share(len(tensors[0]))
    return tuple(tensor[rank() * share:][:share] for tensor in tensors)


# ----------------------------------------------------------------------------------------------------
# 3. Values that all processes share


def all_reduce_mean(sums):
    """{name: scalar tensor} -> {name: its mean over all processes}."""
    values = torch.stack(list(sums.values()))
    dist.all_reduce(values)
    return dict(zip(sums, values / world(), strict=True))


def average_gradients(parameters):
    """Replaces the gradient of each parameter by its mean over all processes."""
    for parameter in parameters if world() > 1 else ():
        dist.all_reduce(parameter.grad)
        parameter.grad /= world()


def all_gather(x):
    """Joins x (B / processes, ...) of all processes in the order of their ranks: (B, ...), detached."""
    if world() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def max_over_processes(value):
    """The maximum of `value` over all processes, returned on each; of booleans, whether any is true."""
    if world() == 1:
        return value
    values = [None] * world()
    dist.all_gather_object(values, value)
    return max(values)


def on_first_process(make):
    """Calls make() on the first process alone, and returns its result on all.

    make may call this function again, in which the others then do not take part. An error of the first
    process is raised there as it is, and on the others as a UserError, so that none of them waits for it.
    """
    if shared.get("alone"):
        return make()
    outcome, failure = [None, None], None
    if rank() == 0:
        shared["alone"] = True
        try:
            outcome[0] = make()
        except Exception as error:                              # whatever it is, the others must know
            failure = error
            outcome[1] = str(error) or type(error).__name__
            is_first_to_report()                                # they do not say it
        finally:
            shared["alone"] = False
    if world() > 1:
        dist.broadcast_object_list(outcome, group=shared.get("patient"))  # it may take long
    if failure is not None:
        raise failure
    if outcome[1]:
        raise UserError(outcome[1])
    return outcome[0]
