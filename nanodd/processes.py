"""Many processes, as torchrun starts them: which one this is, what its share is, and what all agree on.

Without torchrun there is one process, of rank 0, and everything here is the identity.
"""
import datetime
import os
import sys
from contextlib import contextmanager, redirect_stdout

import torch
import torch.distributed as dist

from nanodd.errors import UserError


def rank():
    """This process's number among all that torchrun started; 0 without it."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes torchrun started; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Waits until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def process_group():
    """Joins the processes that torchrun started, if it did; only the first of them prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    gpus = torch.cuda.device_count()
    if 0 < gpus < int(os.environ["LOCAL_WORLD_SIZE"]):
        raise UserError(f"{os.environ['LOCAL_WORLD_SIZE']} processes are too many for {gpus} GPUs: lower "
                        "--nproc-per-node")
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                            timeout=datetime.timedelta(hours=2))            # some wait while one encodes
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
            yield
    finally:
        dist.destroy_process_group()


def batch_share(batch):
    """How many images of a batch are this process's. Raises UserError where it does not divide."""
    if batch % world():
        raise UserError(f"a batch of {batch} does not divide over {world()} processes: take a multiple")
    return batch // world()


def own_share(*tensors):
    """The rows of each tensor (B, ...) that are this process's share of the batch: (B / processes, ...)."""
    share = batch_share(len(tensors[0]))
    return tuple(tensor[rank() * share:][:share] for tensor in tensors)


def all_reduce_mean(sums):
    """{name: scalar tensor} -> the same, averaged over all processes."""
    values = torch.stack(list(sums.values()))
    dist.all_reduce(values)
    return dict(zip(sums, values / world(), strict=True))


def all_gather(x):
    """x (B / processes, ...) of every process, in the order of their ranks, detached: (B, ...)."""
    if world() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def max_over_processes(value):
    """The largest of all processes' numbers, or whether it is true of any: the same answer everywhere."""
    if world() == 1:
        return value
    values = [None] * world()
    dist.all_gather_object(values, value)
    return max(values)


def on_first_process(make):
    """What make() returns on the first process, on all; its UserError is raised on all, too."""
    found = [None, None]
    if rank() == 0:
        try:
            found[0] = make()
        except UserError as error:
            found[1] = str(error)
    if world() > 1:
        dist.broadcast_object_list(found)
    if found[1]:
        raise UserError(found[1])
    return found[0]
