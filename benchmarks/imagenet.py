"""How fast the ImageNet-sized parts are, from random weights of the published shapes, pictures of 256 pixels.

    python benchmarks/imagenet.py                          # DiT-S/2 on two CPU cores: 3 minutes
    python benchmarks/imagenet.py --network XL --batch 100 --compile      # DiT-XL/2 on a GPU
    python benchmarks/imagenet.py --picture PICTURE --vae ema       # the autoencoder's PSNR; not measured

Prints the matrix product; sampling with guidance at 10 and 50 steps, decoding included; a fine-tuning step
from the latent cache and with the autoencoder in the loop, what the min-max losses cost of it, on a GPU the
peak memory, and what the cache itself costs. Operations are counted as in throughput.py (with --recompute the
repeated ones, too). What is not in the sampling figure: the PNG files. Appends a row to --out. With --picture
it measures how well the published autoencoder reproduces a picture, in place of speed, and writes both to
out/vae.png.
"""
import json
import pathlib
import sys
import time
from dataclasses import replace

import torch
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from diffusion import SIZES, Denoised, DiT, Schedule
from minimax import MinMax, tune
from nanodd import cli, recipes, running
from nanodd.data import imageset
from nanodd.errors import at_least
from nanodd.networks import autoencoder, latents, models, training
from sample import guided, image_noise, sampler_of
from throughput import flops, matrix_rate, seconds

K = 10                                                          # classes


def network(name, recipe, device, **more):
    """A DiT of ImageNet's 1,000 rows, its zeros filled, as published weights would be."""
    model = DiT(name, recipe.size, recipe.patch, recipe.channels, 1000, learned_variance=True, **more)
    for layer in (model.final_layer.linear, *(block.adaLN_modulation[1] for block in model.blocks)):
        torch.nn.init.normal_(layer.weight, std=0.01)
    return model.to(device)


def sampling(args, recipe, device, vae, product, bf16):
    """Rows of sampling: images a second, and the share of the matrix product's rate."""
    model, B = network(args.network, recipe, device), args.batch
    model = model.eval().to(torch.bfloat16 if bf16 else torch.float32)
    if args.compile:
        model.compile()
    predict = guided(model, torch.arange(B, device=device) % K, 1000, recipe.guidance)
    shape = recipe.channels, recipe.size, recipe.size
    decode = lambda x: vae.decode(x / x.std())          # random weights overflow what is not unit
    x = torch.randn(B, *shape, device=device)
    with torch.no_grad():
        call, pictures = flops(lambda: predict(x, 500)), flops(lambda: decode(x))
    found = {}
    for steps in args.steps:
        def draw(steps=steps):
            noise = image_noise(0, [("class", i) for i in range(B)], shape, device)
            return imageset.to_uint8(decode(sampler_of("ddpm", steps, "uniform")(predict, noise))).cpu()
        spent = seconds(draw, device, rounds=3, least=0)
        rate = (steps * call + pictures) / spent
        found[f"{steps} steps"] = {"images_per_second": B / spent, "share": rate / product}
        print(f"sampling, {steps} DDPM steps, batch {B}, guidance, decoded | {B / spent:.2f} images/s | "
              f"{rate / 1e12:.2f} TFLOP/s, {100 * rate / product:.0f} % of the matrix product")
    decoding = seconds(lambda: decode(x), device, rounds=3)
    print(f"decoding alone | {B / decoding:.2f} images/s | {pictures / decoding / 1e12:.2f} TFLOP/s")
    return {**found, "decoded_per_second": B / decoding}


def tuning(args, recipe, device, vae, product, bf16):
    """A row of fine-tuning: steps a second from the cache and from pictures, the losses' share, memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = network(args.network, recipe, device, difffit=True)
    names, B = set(models.difffit_parameters(model)), recipe.tune_batch
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    model.recompute = args.recompute
    if args.compile:
        model.compile()
    moments = torch.randn(100 * K, 2, 2 * recipe.channels, recipe.size, recipe.size, device=device).half()
    encoded = latents.Latents(moments, torch.arange(100 * K, device=device) % K, [str(c) for c in range(K)])
    losses = MinMax(recipe.lambda_r, recipe.lambda_d)
    for c in range(K):
        for memory in (losses.real, losses.generated):
            memory.push(c, torch.randn(64, recipe.channels * recipe.size**2, device=device))
    plan = training.Plan(steps=10**6, batch=B, lr=1e-4, decay=False, ema=recipe.tune_ema, seed=0, flip=True,
                         warm=False, beta2=.999, bf16=bf16)
    loop = tune(training.Trainer(model, plan), encoded, torch.arange(K + 1, device=device), Schedule(device),
                losses)
    cached = seconds(lambda: next(loop), device, rounds=5, least=1.)
    done = flops(lambda: next(loop))
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None

    x0 = encoded.examples(torch.arange(B, device=device), None, None)
    labels = torch.randint(K, (B,), generator=torch.Generator().manual_seed(0)).tolist()
    x0_hat = torch.randn_like(x0).requires_grad_()

    def both_losses():                                          # forwards, backwards to x0_hat, both memories
        total, _ = losses(Denoised(None, x0, x0, x0_hat), x0, labels)
        total.backward()
    added = seconds(both_losses, device)
    pictures = torch.randn(B, 3, recipe.pixels, recipe.pixels, device=device)

    def with_pictures():
        vae.encode(pictures)
        next(loop)
    slow = seconds(with_pictures, device, rounds=3, least=1.)
    as_read = torch.randint(256, (B, 3, recipe.pixels, recipe.pixels), dtype=torch.uint8)
    encoding = seconds(lambda: latents.encode_with_mirror(vae, as_read, tqdm(disable=True)), device,
                       rounds=3, least=1.) / B                  # a picture and its mirror image, once
    with_cache, without = encoding + recipe.tune_epochs * cached / B, recipe.tune_epochs * slow / B
    print(f"fine-tuning, batch {B}, from the cache | {1 / cached:.2f} steps/s | "
          f"{done / cached / 1e12:.2f} TFLOP/s, {100 * done / cached / product:.0f} % of the matrix product"
          + (f" | peak memory {peak:.1f} GiB" if peak else ""))
    print(f"the min-max losses | {1e3 * added:.1f} ms, {100 * added / cached:.1f} % of a step "
          f"({len(set(labels))} classes in the batch)")
    print(f"the autoencoder in the loop, as precise as fine-tuning | {1 / slow:.2f} steps/s: "
          f"the cache is {slow / cached:.1f} times faster")
    print(f"making the cache | {encoding:.3f} s a picture, both flips | with it, {recipe.tune_epochs} epochs "
          f"take {with_cache:.2f} s a picture in place of {without:.2f}: "
          f"{without / with_cache:.1f} times faster")
    return {"steps_per_second": 1 / cached, "share": done / cached / product, "losses_share": added / cached,
            "cache_gain": slow / cached, "encoding_seconds": encoding, "run_gain": without / with_cache,
            "peak_gib": peak}


def psnr(a, b):
    """The peak signal-to-noise ratio in dB of two uint8 images: 10 log10(255^2 / mean (a - b)^2).

    Infinite where they are equal.
    """
    return (10 * torch.log10(255**2 / (a.double() - b.double()).pow(2).mean())).item()


def there_and_back(args, device):
    """Encodes and decodes one picture: prints the times and the PSNR, writes both pictures to out/vae.png."""
    at_least(8, size=args.size)
    picture = imageset.open_image(args.picture, args.size)                  # (3, size, size)
    vae = autoencoder.load_autoencoder(args.vae, device, torch.bfloat16 if args.bf16 else torch.float32)
    start = time.perf_counter()
    mean, _ = vae.encode(imageset.to_float(picture)[None].to(device))       # (1, 4, size/8, size/8)
    mean = mean.cpu()                                           # waits for the device
    encoded = time.perf_counter()
    decoded = vae.decode(autoencoder.SCALE * mean.to(device)).cpu()         # of the posterior's mean
    spent = encoded - start, time.perf_counter() - encoded
    back = imageset.to_uint8(decoded)[0]                                    # (3, size, size)
    print(f"encode | {tuple(picture.shape)} -> {tuple(mean.shape[1:])} | {spent[0]:.2f} s")
    print(f"decode | {tuple(mean.shape[1:])} -> {tuple(back.shape)} | {spent[1]:.2f} s")
    imageset.write_png("out/vae.png", torch.cat([picture, back], dim=2))
    print(f"PSNR {psnr(picture, back):.1f} dB | out/vae.png: the picture, and what came back")


def main(argv=None):
    parser = cli.new_parser(__doc__)
    parser.add_argument("--network", default="S", choices=("S", "B", "L", "XL"),
                        help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="images drawn at once (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50], help="(default: 10 50)")
    cli.add_flags(parser, "device compile bf16 recompute vae")
    parser.add_argument("--picture", metavar="PICTURE", help="an image file: measure the autoencoder on it")
    parser.add_argument("--size", type=int, default=256,
                        help="pixels to bring the picture to, a multiple of 8 (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, help="a .jsonl file to append the figures to")
    args = parser.parse_args(argv)
    with running.command(parser, args):
        device = cli.device_named(args.device)
        recipe = replace(recipes.RECIPES["imagenet"], network=args.network)
        if args.picture:
            return there_and_back(args, device)
        width = SIZES[args.network][1]
        bf16 = cli.gains_from_bf16(device) and width >= 192 if args.bf16 is None else args.bf16
        torch.manual_seed(0)
        width = 8192 if device.type == "cuda" else 2048
        kind = torch.bfloat16 if bf16 else torch.float32
        product = matrix_rate(device, kind, width)
        cores = f"{torch.get_num_threads()} CPU cores"
        where = torch.cuda.get_device_name() if device.type == "cuda" else cores
        print(f"matrix product, {width} wide, {'bf16' if bf16 else 'fp32'} | {product / 1e12:.2f} TFLOP/s | "
              f"{where}, torch {torch.__version__}")
        vae = autoencoder.Autoencoder().to(device, kind).eval()
        row = {"network": args.network, "batch": args.batch, "bf16": bf16, "compile": args.compile,
               "recompute": args.recompute, "device": where,
               "torch": torch.__version__, "matrix_tflops": product / 1e12,
               "sampling": sampling(args, recipe, device, vae, product, bf16),
               "tuning": tuning(args, recipe, device, vae, product, bf16)}
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
