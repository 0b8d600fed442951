"""Several processes, as torchrun starts them: the rank of this one, its share of a batch, communication.

Without torchrun there is one process, of rank 0: its share is the whole batch, and nothing is communicated.
"""
import datetime
import os
import sys
from contextlib import contextmanager, redirect_stdout

import torch
import torch.distributed as dist

from nanodd.errors import UserError

# ----------------------------------------------------------------------------------------------------
# 1. The group of processes


def rank():
    """The number of this process, from 0 to world() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes torchrun started; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Waits until all processes have reached this call."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def process_group():
    """Joins the processes that torchrun started, if it did, for the length of the block; only rank 0 prints.

    Raises UserError where there are more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    gpus = torch.cuda.device_count()
    if 0 < gpus < int(os.environ["LOCAL_WORLD_SIZE"]):
        raise UserError(f"{os.environ['LOCAL_WORLD_SIZE']} processes are too many for {gpus} GPUs: lower "
                        "--nproc-per-node")
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                            timeout=datetime.timedelta(hours=2))            # some wait while others encode
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
            yield
    finally:
        dist.destroy_process_group()


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

    An error of the first process is raised there as it is, and on the others as a UserError, so that none of
    them waits for it.
    """
    outcome, failure = [None, None], None
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:                              # whatever it is, the others must know
            failure = error
            outcome[1] = str(error) or type(error).__name__
    if world() > 1:
        dist.broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if outcome[1]:
        raise UserError(outcome[1])
    return outcome[0]
