"""A tiny network's training step on a CPU: two threads, of which each computes half of the batch.

Threads that share every product of a tiny network wait for each other thousands of times a second, and wait
long where another program wants a core. Here they meet twice a step, after the forward and the backward pass
(docs/log.md). Each works with one thread, so that the bits are the same however many threads torch has.
"""
from concurrent.futures import ThreadPoolExecutor

import torch

PARAMETERS, BATCH = 4e6, 16    # networks of up to so many, and batches from this size on, gain


def pay(model, batch):
    """Whether two threads are faster with half a batch each: on a CPU, where a network is tiny."""
    parameters = list(model.parameters())
    tiny = sum(p.numel() for p in parameters) <= PARAMETERS and model._compiled_call_impl is None
    return tiny and batch >= BATCH and parameters[0].device.type == "cpu"


class Halves:
    """call(*inputs) with both halves of a batch at once: tensors (B, ...) -> (B, ...).

    call: a function that treats each image by itself. parameters: all tensors whose gradients are wanted.
    Until `close`, products in other threads may also have one thread only, since that number is process-wide.
    """

    def __init__(self, call, parameters):
        self.call, self.parameters, self.before = call, tuple(parameters), torch.get_num_threads()
        self.threads = ThreadPoolExecutor(min(2, torch.get_num_threads()),
                                          initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, *inputs):
        return _Halves.apply(self, inputs, *self.parameters)

    def close(self):
        """Ends the two threads."""
        self.threads.shutdown()
        torch.set_num_threads(self.before)


class _Halves(torch.autograd.Function):
    """The forward pass keeps a graph for each half, and the backward pass adds the two gradients."""

    @staticmethod
    def forward(ctx, halves, inputs, *parameters):
        def half(part):
            with torch.enable_grad():
                return halves.call(*part)
        ctx.halves, parts = halves, zip(*(tensor.chunk(2) for tensor in inputs), strict=True)
        ctx.outputs = list(halves.threads.map(half, parts))                 # 2 of (B / 2, ...)
        return torch.cat([output.detach() for output in ctx.outputs])

    @staticmethod
    def backward(ctx, gradient):
        def half(output, part):
            return torch.autograd.grad(output, ctx.halves.parameters, part)
        first, second = ctx.halves.threads.map(half, ctx.outputs, gradient.chunk(2))
        return None, None, *torch._foreach_add(first, second)
