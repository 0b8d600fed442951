"""How fast the parts are, as shares of what this machine's matrix product reaches in the same run.

    python benchmarks/throughput.py        # some 8 minutes on two CPU cores

Operations are those of the products, counted by torch's flop counter, to which the CPU's attention is added.
Prints a line each for the matrix product; the tiny DiT's training step; the min-max losses' share of a step
of fine-tuning (of all weights); a sampling step; augmentation's share of a judge's step; five judges side by
side against one by one; and the forward passes of CIFAR-100's DiT-S/2 and U-ViT-S/2, in bfloat16 where the
machine gains from it. Then, on a CPU, each speed-up of docs/log.md: the time without it, the time with it,
and their ratio, measured in turns.
"""
import functools
import math
import pathlib
import statistics
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import nanodd  # noqa: F401 (before torch: it sets how long waiting CPU threads spin)
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from convnet import ConvNet
import diffusion
import memory
from diffusion import DiT, Schedule
from minimax import MinMax, tune
from nanodd import cli, running
from nanodd.data import datasets
from nanodd.judging import augment, judges
from nanodd.networks import training, uvit
from sample import guided, image_noise, sampler_of
from train_eval import dsa, train_judges, train_rows


def seconds(work, device, rounds=7, least=0.3):
    """The median time of a call of `work`, over rounds of at least `least` seconds each, after a warm-up."""
    def wait():
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
    work()
    times, calls = [], 1
    while len(times) < rounds:
        wait()
        began = time.perf_counter()
        for _ in range(calls):
            work()
        wait()
        spent = time.perf_counter() - began
        if spent < least:
            calls *= 2
        else:
            times.append(spent / calls)
    return statistics.median(times)


# The operations of attention on a CPU, which torch's counter leaves out; q (B, h, N, d), k (B, h, M, d).
# Forwards two products, Q K^T and its softmax times V. Backwards five: the gradients of Q, K, V and of the
# softmax, and Q K^T once more, which is not kept. torch counts the attention of GPUs by the same rule.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, *_, **__: 2 * 2 * math.prod(q) * k[2],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, *_, **__: 5 * 2 * math.prod(q) * k[2]}


def flops(work):
    """Operations of one call of `work`, forward and backward, a multiply-add being two."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        work()
    return counter.get_total_flops()


def matrix_rate(device, dtype=torch.float32, width=2048):
    """Operations a second of a matrix product: what the others are a share of."""
    a, b = torch.randn(2, width, width, device=device).to(dtype)
    return 2 * width**3 / seconds(lambda: a @ b, device)


def main(argv=None):
    parser = cli.new_parser(__doc__)
    parser.add_argument("--device", default="auto",
                        help="cpu, cuda, cuda:N or mps (default: the fastest here)")
    args = parser.parse_args(argv)
    with running.command(parser, args):
        device = cli.device_named(args.device)
        measure(device)


def measure(device):
    torch.manual_seed(0)
    _, recipe, train, *_ = datasets.load()
    train, rows = train.to(device), torch.arange(11, device=device)
    product = matrix_rate(device)
    print(f"matrix product, 2048 wide, fp32 | {product / 1e9:.0f} GFLOP/s | "
          f"device {device}, {torch.get_num_threads()} threads")
    diffusing(recipe, train, rows, product, device)
    judging(recipe, train, device)
    forwards(device)
    if device.type == "cpu":
        before_and_after(recipe, train, rows)


def tiny(recipe, device):
    """The digits' network, its schedule and its plan."""
    plan = training.Plan(steps=10**6, batch=recipe.batch, lr=1e-4, decay=False, ema=recipe.ema, seed=0,
                         flip=False)
    return DiT(recipe.network, recipe.size, recipe.patch, 1, 10).to(device), Schedule(device), plan


def diffusing(recipe, examples, rows, product, device):
    """The digits' network: a training step, the min-max losses, a sampling step."""
    model, schedule, plan = tiny(recipe, device)
    state = examples, rows, schedule
    trainer = training.Trainer(model, plan)
    loop = diffusion.train(trainer, *state)
    step = seconds(lambda: next(loop), device)
    trainer.close()
    trainer.halves = None                                       # the counter sees this thread alone
    done = flops(lambda: next(loop))
    print(f"DiT-tiny training step, batch {plan.batch} | {step * 1e3:.1f} ms | "
          f"{plan.batch / step:.0f} images/s | {done / step / 1e9:.0f} GFLOP/s, "
          f"{100 * done / step / product:.0f} % of the matrix product")

    plan = plan._replace(batch=recipe.tune_batch)
    losses = MinMax(recipe.lambda_r, recipe.lambda_d)
    for k in range(100):                                        # fills the memories
        x0, y, t, eps = diffusion.training_batch(examples, plan, k, *state[1:])
        labels = examples.labels[training.batch_index(len(examples.labels), plan.batch, k, 0).to(device)]
        with torch.no_grad():
            losses(diffusion.denoising_loss(model, schedule, x0, y, t, eps), x0, labels.tolist())
    trainers = [training.Trainer(model, plan) for _ in range(2)]
    plain, full = diffusion.train(trainers[0], *state), tune(trainers[1], *state, losses)
    without, with_losses = seconds(lambda: next(plain), device), seconds(lambda: next(full), device)
    added = with_losses - without
    for trainer in trainers:
        trainer.close()
    print(f"min-max losses, FIFO of 64, batch {plan.batch} | {added * 1e3:.1f} ms | "
          f"{100 * added / with_losses:.0f} % of a fine-tuning step of {with_losses * 1e3:.1f} ms")

    x = torch.randn(100, 1, recipe.size, recipe.size, device=device)
    labels = torch.arange(100, device=device) % 10
    predict = torch.no_grad()(guided(model.eval(), labels, 10, recipe.guidance))
    call = seconds(lambda: predict(x, 500), device)
    done = flops(lambda: predict(x, 500))
    print(f"sampling step with guidance, 100 images | {call * 1e3:.1f} ms | "
          f"{100 / call / 10:.0f} images/s at 10 steps | {done / call / 1e9:.0f} GFLOP/s, "
          f"{100 * done / call / product:.0f} % of the matrix product")


def judging(recipe, train, device):
    """The digits' judge: its step, and five of them at once."""
    judge, g = ConvNet(recipe.judge_size, 1, 10).to(device), torch.Generator(device).manual_seed(0)
    host = torch.Generator()
    optimizer = torch.optim.SGD(judge.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    batch = augment.normalise(train.images[:256], recipe)

    def learn(x):
        optimizer.zero_grad()
        F.cross_entropy(judge(x), train.labels[:256]).backward()
        optimizer.step()
    bare = seconds(lambda: learn(batch), device)
    augmenting = seconds(lambda: dsa(batch, recipe.augment.split("_"), g, host), device)
    whole = bare + augmenting
    print(f"judge's step, batch 256 | {whole * 1e3:.1f} ms | {256 / whole:.0f} images/s | "
          f"augmentation {100 * augmenting / whole:.1f} % of it")

    few = train.pick(torch.arange(100, device=device))
    apart = seconds(lambda: [train_judges([few], few, recipe, 20, [seed], num_evals=1) for seed in range(5)],
                    device,
                    rounds=3)
    at_once = seconds(lambda: train_judges([few] * 5, few, recipe, 20, range(5), num_evals=1), device,
                      rounds=3)
    print(f"5 judges, 20 epochs of 100 images | {at_once:.2f} s side by side | {apart:.2f} s one by one | "
          f"{apart / at_once:.1f} times as fast")


def forwards(device):
    """CIFAR-100's networks."""
    bf16 = cli.gains_from_bf16(device)
    dtype = torch.bfloat16 if bf16 else torch.float32
    product = matrix_rate(device, dtype)
    x, t = torch.randn(16, 3, 32, 32, device=device), torch.full((16,), 500.0, device=device)
    y = torch.arange(16, device=device)
    for name, network in (("DiT-S/2", DiT("S", 32, 2, 3, 100)), ("U-ViT-S/2", uvit.UViT("S", 32, 2, 3, 100))):
        forward = torch.no_grad()(functools.partial(network.to(device, dtype).eval(), x, t, y))
        call, done = seconds(forward, device, rounds=3), flops(forward)
        print(f"{name} forward, 16 images of 32 pixels{', bf16' * bf16} | {16 / call:.1f} images/s | "
              f"{done / call / 1e9:.0f} of {product / 1e9:.0f} GFLOP/s, {100 * done / call / product:.0f} % "
              "of the matrix product")


# ----------------------------------------------------------------------------------------------------
# Each speed-up: without it, with it


def in_turns(title, without, with_it, unit="ms", rounds=7, least=0.3):
    """Prints the median times of two functions, called in turns, and the median ratio of a turn."""
    cpu, ratios, times = torch.device("cpu"), [], ([], [])
    for _ in range(rounds):
        for kept, work in zip(times, (without, with_it), strict=True):
            kept.append(seconds(work, cpu, rounds=1, least=least))
        ratios.append(times[0][-1] / times[1][-1])
    before, after = (statistics.median(kept) * (1e3 if unit == "ms" else 1) for kept in times)
    print(f"{title} | before {before:.2f} {unit} | after {after:.2f} {unit} | "
          f"{statistics.median(ratios):.2f} times as fast")


def before_and_after(recipe, examples, rows):
    """One line for each speed-up."""
    def start(module):
        return lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True,
                                      cwd=pathlib.Path(__file__).parents[1])
    everything = "sample, timm.layers, torchvision, sklearn.datasets, torch._dynamo"
    in_turns("start-up of sample.py, before: with all that other commands import", start(everything),
             start("sample"), "s", rounds=5, least=0.)
    in_turns("torch's own import, and that of sample.py", start("torch"), start("sample"), "s", rounds=5,
             least=0.)
    training_steps(recipe, examples, rows)
    remembering()
    pooling(recipe)
    compiling(recipe)
    sets = [examples.pick(torch.arange(k, 100 + k)) for k in range(4)]
    some = [judges.Row([part] * 5, range(5), 10) for part in sets]
    train = functools.partial(train_rows, test=sets[0], recipe=recipe, num_evals=1)
    in_turns("20 judges, row by row and all together", lambda: [list(train([row])) for row in some],
             lambda: list(train(some)), "s", rounds=3)
    blocks(recipe)


def training_steps(recipe, examples, rows):
    """The tiny DiT's step, with whole batches and with halves."""
    model, schedule, plan = tiny(recipe, torch.device("cpu"))
    whole, halved = (training.Trainer(model, plan) for _ in range(2))
    whole.halves = None
    loops = [diffusion.train(trainer, examples, rows, schedule) for trainer in (whole, halved)]
    in_turns("DiT-tiny training step, whole and in halves",
             *(functools.partial(next, loop) for loop in loops))
    halved.close()


def remembering():
    """A push to the self-adaptive memory: all cosines, and those of the new entry."""
    def all_cosines(_, entries):
        unit = F.normalize(entries.double(), dim=1)
        return unit @ unit.T
    anew, known = (memory.Memory(64, "max") for _ in range(2))
    anew.cosines, item = all_cosines, torch.randn(1, 4096)
    for kept in (anew, known):
        kept.push(0, torch.randn(64, 4096))
    in_turns("self-adaptive memory, 64 entries of 4,096 numbers", lambda: anew.push(0, item),
             lambda: known.push(0, item))


def judge_step(recipe, size, colours, bf16, pool=None, compiled=False):
    """A function that makes a step of a ConvNet judge: 100 images of `size` pixels, one thread's work."""
    judge, labels = ConvNet(size, colours, 10), torch.arange(100) % 10
    for k, layer in enumerate(judge.features):
        if pool and isinstance(layer, torch.nn.AvgPool2d):
            judge.features[k] = pool
    optimizer = torch.optim.SGD(judge.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    x, network = torch.randn(100, colours, size, size), torch.compile(judge) if compiled else judge

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = network(x).float()
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    return step


JUDGES = (("digits", 16, 1), ("CIFAR's", 32, 3))                # pixels, colours


def pooling(recipe):
    """A judge's step with torch's average pooling and with ours."""
    own = torch.nn.AvgPool2d(2)
    for name, size, colours in JUDGES:
        for bf16 in {False, cli.gains_from_bf16(torch.device("cpu"))}:
            in_turns(f"average pooling in a step of the {name} judge{', bf16' * bf16}",
                     judge_step(recipe, size, colours, bf16, own), judge_step(recipe, size, colours, bf16),
                     rounds=5)


def compiling(recipe):
    """A judge's step, compiled and not, and how long the first one takes."""
    for name, size, colours in JUDGES:
        bf16 = size == 16 and cli.gains_from_bf16(torch.device("cpu"))
        step = judge_step(recipe, size, colours, bf16, compiled=True)
        began = time.perf_counter()
        try:
            step()
        except RuntimeError:                                    # no compiler, ...
            print("torch.compile fails here")
            return
        took = time.perf_counter() - began
        in_turns(f"compiling the {name} judge{', bf16' * bf16}, in {took:.0f} s",
                 judge_step(recipe, size, colours, bf16), step, rounds=5)


def blocks(recipe):
    """The digits' sampling, 10 steps: milliseconds an image, by the size of a block."""
    model, *_ = tiny(recipe, torch.device("cpu"))
    sampler, times = sampler_of("ddim", 10), []
    for batch in (10, 25, 50, 100, 200, 400):
        noise = image_noise(0, [("0", k) for k in range(batch)], (1, recipe.size, recipe.size), "cpu")
        predict = guided(model.eval(), torch.arange(batch) % 10, 10, 1.0)
        spent = seconds(functools.partial(sampler, predict, noise), torch.device("cpu"), rounds=5)
        times.append(f"{batch}: {spent / batch * 1e3:.2f}")
    print("sampling in 10 steps without guidance, ms an image by --batch | " + " | ".join(times))


if __name__ == "__main__":
    main()
