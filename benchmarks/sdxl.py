"""How fast SDXL-Turbo is, from random weights of the published shapes; or whether fetched files are right.

    python benchmarks/sdxl.py                      # 2.6 minutes on two CPU cores, with 7 GB
    python benchmarks/sdxl.py --batch 8            # on a GPU
    python benchmarks/sdxl.py --hash DIR           # compares the files in DIR with the published sha256

Prints the matrix product, the seconds to encode a prompt with both text encoders, and to draw pictures of 512
pixels in one step, decoded and made smaller for CIFAR-100; what share of the matrix product's rate each part
reaches; and the peak memory of the process (on a GPU, of drawing alone). Appends a row to --out.
"""
import json
import pathlib
import resource
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from nanodd import cli, running
from nanodd.data import imageset
from nanodd.networks import autoencoder
from nanodd.networks.sdxl import generator, text, unet, weights
from sample import guided, sampler_of
from throughput import flops, matrix_rate, seconds


def randomised(build, device, dtype):
    """The network build() with small random weights, without the time that an initialisation takes."""
    with torch.device("meta"):
        network = build()
    network = network.to(dtype).to_empty(device=device)
    pattern = 0.02 * torch.randn(2**20, device=device).to(dtype)
    for parameter in network.parameters():
        flat = parameter.data.view(-1)
        for part in flat.split(len(pattern)):
            part.copy_(pattern[:len(part)])
    return network.eval().requires_grad_(False)


def encoding(device):
    """Seconds to encode a prompt with both encoders, in float32 as sample.py does."""
    ids, spent = torch.randint(49_000, (4, 77), device=device), 0.0
    for which in text.SIZES:
        encoder = randomised(lambda which=which: text.TextEncoder(which), device, torch.float32)
        spent += seconds(lambda encoder=encoder: encoder(ids), device, rounds=3, least=0) / len(ids)
        del encoder
    return spent


def drawing(device, batch, dtype, half):
    """{part: (seconds, operations)} of `batch` pictures: UNet, decoder, and all from noise to 32 pixels.

    dtype: the decoder's. half: the UNet's.
    """
    network = randomised(unet.UNet, device, half)
    vae = randomised(lambda: autoencoder.Autoencoder(generator.SCALE), device, dtype)
    context = torch.randn(batch, 77, 2048, device=device).to(half)
    pooled = torch.randn(batch, 1280, device=device).to(half)
    model, rows = generator.Turbo(network, context, pooled), torch.arange(batch, device=device)
    noise = torch.randn(batch, 4, 64, 64, device=device)
    predict = guided(model, rows, -1, 1.0)
    sampler = sampler_of("turbo", 1, schedule=generator.Schedule())

    @torch.no_grad()
    def draw():
        z = sampler(predict, lambda k: noise)
        z = z.nan_to_num().clamp(-1, 1)                         # random weights draw no latents
        return imageset.to_uint8(generator.decode(vae, 32, 3, z)).cpu()
    parts = {"unet": torch.no_grad()(lambda: predict(noise, 999)), "decoder": lambda: vae.decode(noise),
             "all": draw}
    return {name: (seconds(part, device, rounds=3, least=0), flops(part)) for name, part in parts.items()}


def main(argv=None):
    parser = cli.new_parser(__doc__)
    cli.add_flags(parser, "device bf16")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once (default: %(default)s)")
    parser.add_argument("--hash", type=pathlib.Path, metavar="DIR", help="measure nothing: check these files")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/sdxl-speed.jsonl"),
                        metavar="FILE", help="where the row goes (default: %(default)s)")
    args = parser.parse_args(argv)
    with running.command(parser, args):
        if args.hash:
            for name in weights.FILES:
                weights.check_size(args.hash, name)
                weights.check_hash(args.hash, name)
                print(f"{name}: as published" if weights.FILES[name][1] else f"{name}: of the published size")
            return
        measure(args, cli.device_named(args.device))


def measure(args, device):
    """Prints and appends a row of results/sdxl-speed.jsonl."""
    bf16 = cli.gains_from_bf16(device) if args.bf16 is None else args.bf16
    dtype = torch.bfloat16 if bf16 else torch.float32
    half = torch.float16 if bf16 and device.type == "cuda" else dtype
    product, prompt = matrix_rate(device, half), encoding(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    parts = drawing(device, args.batch, dtype, half)
    peak = (torch.cuda.max_memory_allocated() if device.type == "cuda" else
            1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)      # KiB on Linux
    where = (torch.cuda.get_device_name() if device.type == "cuda" else
             f"{torch.get_num_threads()} CPU cores")
    row = {"device": where, "torch": torch.__version__, "batch": args.batch, "unet": str(half),
           "decoder": str(dtype), "matrix_tflops": product / 1e12, "prompt_seconds": prompt,
           "peak_gb": peak / 1e9, "parts": {name: {"seconds": spent, "tflop": done / 1e12,
                                                   "share": done / spent / product}
                                            for name, (spent, done) in parts.items()}}
    print(f"matrix product, {half} | {product / 1e12:.2f} TFLOP/s | {where}")
    print(f"encoding a prompt, float32 | {prompt:.2f} s")
    for name, part in row["parts"].items():
        print(f"{name}, {args.batch} pictures of 512 pixels | {part['seconds']:.2f} s | "
              f"{part['tflop']:.2f} TFLOP, {100 * part['share']:.0f} % of the matrix product's rate")
    print(f"peak memory | {row['peak_gb']:.1f} GB")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
