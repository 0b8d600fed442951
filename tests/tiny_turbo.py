"""A tiny SDXL-Turbo: the published layout, six files and all kinds of layers, at sizes that take a blink."""
import functools
import hashlib
import json

import safetensors.torch
import torch

from nanodd.networks import autoencoder
from nanodd.networks.sdxl import generator, text, unet, weights

UNET = {"channels": (32, 64, 64), "depths": (0, 1, 2), "context": 192, "pooled": 128, "head": 32}
TEXT = {"text_encoder": (64, 2, False), "text_encoder_2": (128, 3, True)}
BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
# every character is a token, and so is every character at the end of a word; there are no merges
VOCABULARY = [*BYTES, *(f"{character}</w>" for character in BYTES), "<|startoftext|>", "<|endoftext|>"]


def shrink(monkeypatch):
    """Makes the modules build the tiny networks, for latents of 4x4 cells."""
    monkeypatch.setattr(text, "SIZES", TEXT)
    monkeypatch.setattr(text, "TOKENS", len(VOCABULARY))
    monkeypatch.setattr(unet, "UNet", functools.partial(unet.UNet, **UNET))
    monkeypatch.setattr(autoencoder, "WIDTHS", (32, 32, 64, 64))
    monkeypatch.setitem(generator.HEADER, "config", {"channels": 4, "size": 4})


def write(folder, monkeypatch):
    """Writes the six files with random weights into `folder`, whose sizes and hashes become the published."""
    shrink(monkeypatch)
    networks = {weights.UNET: unet.UNet(), weights.VAE: autoencoder.Autoencoder(),
                **{weights.TEXT.format(which): text.TextEncoder(which) for which in TEXT}}
    for name, network in networks.items():
        (folder / name).parent.mkdir(parents=True)
        tensors = {key: tensor.half().contiguous() for key, tensor in network.state_dict().items()}
        safetensors.torch.save_file(tensors, folder / name, {"format": "pt"})
    (folder / "tokenizer").mkdir()
    ids = {piece: k for k, piece in enumerate(VOCABULARY)}
    (folder / "tokenizer/vocab.json").write_text(json.dumps(ids))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    measure(folder, monkeypatch)
    return folder


def measure(folder, monkeypatch):
    """Declares the files in `folder` to be the published ones."""
    contents = {name: (folder / name).read_bytes() for name in weights.FILES}
    monkeypatch.setattr(weights, "FILES", {name: (len(data), hashlib.sha256(data).hexdigest())
                                           for name, data in contents.items()})


def random_weights(network, deviation=0.05):
    """The network with all parameters moved at random, so that none is 0 or 1; its {name: tensor}."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(deviation * torch.randn_like(parameter))
    return network.eval(), dict(network.state_dict())
