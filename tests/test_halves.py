"""Two threads with half a batch each: the gradients of the whole batch, and the same bits as one thread."""
import pytest
import torch

import diffusion
from nanodd.data import datasets
from nanodd.networks import halves, training
from nanodd.networks.halves import Halves


def tiny(batch=32, **plan):
    torch.manual_seed(0)
    model = diffusion.DiT("tiny", 8, 2, 1, 10)
    for block in model.blocks:                                  # adaLN-Zero: else no gradient is seen
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=.1)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=.1)
    return training.Trainer(model, training.Plan(5, batch, 1e-3, False, .9, 0, False, **plan))


def test_the_gradients_are_those_of_the_whole_batch():
    """Of an uneven batch, too, through a loss over all images, as the min-max losses are."""
    trainer = tiny()
    x, t, y = torch.randn(33, 1, 8, 8), torch.rand(33) * 999, torch.randint(11, (33,))
    weights = list(trainer.trainable.values())
    found = []
    for predict in (trainer.forward, trainer.halves):
        out = predict(x, t, y)
        loss = (out.flatten(1) @ out.flatten(1).T).max() + out.square().mean()
        found.append((out, *torch.autograd.grad(loss, weights)))
    for whole, split in zip(*found, strict=True):
        assert torch.allclose(whole, split, rtol=1e-4, atol=1e-5 * whole.abs().max().item())


def test_training_gives_the_same_bits_on_one_thread_and_on_two():
    data, results, before = datasets.load(), [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            trainer = tiny()
            loop = diffusion.train(trainer, data.train, torch.arange(11), diffusion.Schedule())
            losses = [step["loss"] for step in loop]
            results.append((losses, trainer.ema))
    finally:
        torch.set_num_threads(before)
    (one, ema), (two, ema_two) = results
    assert one == two and all(torch.equal(ema[name], ema_two[name]) for name in ema)


def test_autocast_reaches_the_threads():
    trainer, kinds = tiny(bf16=True), []
    trainer.model.blocks[0].attn.qkv.register_forward_hook(lambda _, __, out: kinds.append(out.dtype))
    out = trainer.predict(torch.randn(16, 1, 8, 8), torch.zeros(16), torch.zeros(16, dtype=torch.long))
    assert kinds == [torch.bfloat16] * 2 and out.dtype == torch.float32


def test_an_error_in_a_thread_reaches_the_loop():
    def fail(x):
        raise ValueError("in a thread")
    with pytest.raises(ValueError, match="in a thread"):
        Halves(fail, [])(torch.zeros(4, 1))


def test_large_networks_small_batches_and_what_is_compiled_stay_whole():
    assert tiny().halves is not None and tiny(batch=8).halves is None
    model = tiny().model
    assert not halves.pay(diffusion.DiT("XS", 8, 2, 1, 10), 32)
    model.compile()
    assert not halves.pay(model, 32)
