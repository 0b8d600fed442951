"""SDXL-Turbo's networks against what is published about them, and against the same written out by hand."""
import json
import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import sample
import tiny_turbo
from nanodd.networks import autoencoder
from nanodd.networks.sdxl import generator, text, unet, weights

# ----------------------------------------------------------------------------------------------------
# 1. The published tensors


def unet_shapes():
    """{name: shape} of the published UNet, put together from the description of its layers alone."""
    shapes = {}

    def layer(name, *shape, bias=True):
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    def resnet(name, inputs, outputs):
        layer(f"{name}.norm1", inputs)
        layer(f"{name}.conv1", outputs, inputs, 3, 3)
        layer(f"{name}.time_emb_proj", outputs, 1280)
        layer(f"{name}.norm2", outputs)
        layer(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            layer(f"{name}.conv_shortcut", outputs, inputs, 1, 1)

    def transformer(name, d, depth):
        layer(f"{name}.norm", d)
        layer(f"{name}.proj_in", d, d)
        layer(f"{name}.proj_out", d, d)
        for k in range(depth):
            block = f"{name}.transformer_blocks.{k}"
            for norm in ("norm1", "norm2", "norm3"):
                layer(f"{block}.{norm}", d)
            for attn, width in (("attn1", d), ("attn2", 2048)):
                layer(f"{block}.{attn}.to_q", d, d, bias=False)
                layer(f"{block}.{attn}.to_k", d, width, bias=False)
                layer(f"{block}.{attn}.to_v", d, width, bias=False)
                layer(f"{block}.{attn}.to_out.0", d, d)
            layer(f"{block}.ff.net.0.proj", 8 * d, d)
            layer(f"{block}.ff.net.2", d, 4 * d)

    layer("conv_in", 320, 4, 3, 3)
    for name, inputs in (("time_embedding", 320), ("add_embedding", 2816)):
        layer(f"{name}.linear_1", 1280, inputs)
        layer(f"{name}.linear_2", 1280, 1280)
    for part, levels in (("down_blocks", [[(320, 320), (320, 320)], [(320, 640), (640, 640)],
                                          [(640, 1280), (1280, 1280)]]),
                         ("up_blocks", [[(2560, 1280), (2560, 1280), (1920, 1280)],
                                        [(1920, 640), (1280, 640), (960, 640)],
                                        [(960, 320), (640, 320), (640, 320)]])):
        for i, blocks in enumerate(levels):
            for j, (inputs, outputs) in enumerate(blocks):
                resnet(f"{part}.{i}.resnets.{j}", inputs, outputs)
    for level, count, d, depth in (("down_blocks.1", 2, 640, 2), ("down_blocks.2", 2, 1280, 10),
                                   ("mid_block", 1, 1280, 10), ("up_blocks.0", 3, 1280, 10),
                                   ("up_blocks.1", 3, 640, 2)):
        for j in range(count):
            transformer(f"{level}.attentions.{j}", d, depth)
    for j in range(2):
        resnet(f"mid_block.resnets.{j}", 1280, 1280)
    for name, d in (("down_blocks.0.downsamplers", 320), ("down_blocks.1.downsamplers", 640),
                    ("up_blocks.0.upsamplers", 1280), ("up_blocks.1.upsamplers", 640)):
        layer(f"{name}.0.conv", d, d, 3, 3)
    layer("conv_norm_out", 320)
    layer("conv_out", 4, 320, 3, 3)
    return shapes


def text_shapes(d, layers, projection):
    """{name: shape} of a published text encoder of width d, from the description of its layers alone."""
    shapes = {"text_model.embeddings.token_embedding.weight": (49408, d),
              "text_model.embeddings.position_embedding.weight": (77, d),
              "text_model.final_layer_norm.weight": (d,), "text_model.final_layer_norm.bias": (d,)}
    for i in range(layers):
        for name, shape in [("layer_norm1", (d,)), ("layer_norm2", (d,)), ("mlp.fc1", (4 * d, d)),
                            ("mlp.fc2", (d, 4 * d)),
                            *((f"self_attn.{part}_proj", (d, d)) for part in ("q", "k", "v", "out"))]:
            shapes[f"text_model.encoder.layers.{i}.{name}.weight"] = shape
            shapes[f"text_model.encoder.layers.{i}.{name}.bias"] = shape[:1]
    return {**shapes, "text_projection.weight": (d, d)} if projection else shapes


PUBLISHED = {                  # file: how the network is built, its shapes, parameters, tensors
    weights.UNET: (unet.UNet, unet_shapes(), 2_567_463_684, 1680),
    weights.TEXT.format("text_encoder"):
        (lambda: text.TextEncoder("text_encoder"), text_shapes(768, 12, False), 123_060_480, 196),
    weights.TEXT.format("text_encoder_2"):
        (lambda: text.TextEncoder("text_encoder_2"), text_shapes(1280, 32, True), 694_659_840, 517),
}


@pytest.mark.parametrize("file", PUBLISHED)
def test_the_networks_have_the_published_tensors(file):
    build, expected, parameters, tensors = PUBLISHED[file]
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    assert shapes == expected and len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == parameters


def file_size(shapes):
    """Bytes of a .safetensors file of float16: 8, a JSON header padded to a multiple of 8, the tensors."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(shapes):
        start, end = end, end + 2 * math.prod(shapes[name])
        header[name] = {"dtype": "F16", "shape": shapes[name], "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + 8 * math.ceil(length / 8) + end


def test_the_published_files_have_the_sizes_of_these_tensors(tmp_path):
    tensors = {"b": torch.zeros(2, 3).half(), "a.weight": torch.zeros(5).half()}
    safetensors.torch.save_file(tensors, tmp_path / "two.safetensors", {"format": "pt"})
    assert file_size({"a.weight": (5,), "b": (2, 3)}) == (tmp_path / "two.safetensors").stat().st_size
    with torch.device("meta"):
        vae = {name: tensor.shape for name, tensor in autoencoder.Autoencoder().state_dict().items()}
    shapes = {**{file: shapes for file, (_, shapes, _, _) in PUBLISHED.items()}, weights.VAE: vae}
    assert {file: file_size(shapes[file]) for file in shapes} == {
        "unet/diffusion_pytorch_model.fp16.safetensors": 5_135_149_760,
        "text_encoder/model.fp16.safetensors": 246_144_152,
        "text_encoder_2/model.fp16.safetensors": 1_389_382_176,
        "vae/diffusion_pytorch_model.fp16.safetensors": 167_335_342}
    assert all(weights.FILES[file][0] == file_size(shapes[file]) for file in shapes)


# ----------------------------------------------------------------------------------------------------
# 2. The UNet once more, as functions of the tensors' names


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def conv(w, name, x, **how):
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **how)


def group_norm(w, name, x, eps):
    return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps)


def layer_norm(w, name, x):
    """A layer norm by hand: eps 1e-5."""
    x = x - x.mean(dim=-1, keepdim=True)
    x = x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def heads_by_hand(q, k, v, head, causal=False):
    """Attention of q (B, N, D) to k, v (B, M, D), one head, picture and query at a time: (B, N, D)."""
    out = torch.empty_like(q)
    for b in range(len(q)):
        for n in range(q.shape[1]):
            for part in (slice(h, h + head) for h in range(0, q.shape[2], head)):
                seen = slice(n + 1 if causal else None)
                scores = k[b, seen, part] @ q[b, n, part] / math.sqrt(head)
                out[b, n, part] = torch.exp(scores) / torch.exp(scores).sum() @ v[b, seen, part]
    return out


def waves_by_hand(number, dim):
    frequencies = [10000 ** (-i / (dim / 2)) for i in range(dim // 2)]
    return [math.cos(number * f) for f in frequencies] + [math.sin(number * f) for f in frequencies]


def two_layers(w, name, x):
    return linear(w, f"{name}.linear_2", F.silu(linear(w, f"{name}.linear_1", x)))


def resnet(w, name, x, e):
    h = conv(w, f"{name}.conv1", F.silu(group_norm(w, f"{name}.norm1", x, 1e-5)), padding=1)
    h = h + linear(w, f"{name}.time_emb_proj", F.silu(e)).view(*h.shape[:2], 1, 1)
    h = conv(w, f"{name}.conv2", F.silu(group_norm(w, f"{name}.norm2", h, 1e-5)), padding=1)
    return h + (conv(w, f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.bias" in w else x)


def transformer(w, name, x, context, head=32):
    """One token a cell, row by row; the input itself where the level has no transformer."""
    if f"{name}.norm.weight" not in w:
        return x
    h = group_norm(w, f"{name}.norm", x, 1e-6)
    h = torch.stack([h[:, :, i, j] for i in range(x.shape[2]) for j in range(x.shape[3])], dim=1)
    h, k = linear(w, f"{name}.proj_in", h), 0                   # (B, N, D)
    while f"{name}.transformer_blocks.{k}.norm1.weight" in w:
        block = f"{name}.transformer_blocks.{k}"
        for attn, norm in (("attn1", "norm1"), ("attn2", "norm2")):
            queries = layer_norm(w, f"{block}.{norm}", h)
            keys = queries if attn == "attn1" else context
            q, k_, v = (linear(w, f"{block}.{attn}.to_{part}", source)
                        for part, source in (("q", queries), ("k", keys), ("v", keys)))
            h = h + linear(w, f"{block}.{attn}.to_out.0", heads_by_hand(q, k_, v, head))
        inner = linear(w, f"{block}.ff.net.0.proj", layer_norm(w, f"{block}.norm3", h))
        first, second = inner[..., :inner.shape[2] // 2], inner[..., inner.shape[2] // 2:]
        gelu = second * (1 + torch.erf(second / math.sqrt(2))) / 2
        h, k = h + linear(w, f"{block}.ff.net.2", first * gelu), k + 1
    return x + linear(w, f"{name}.proj_out", h).transpose(1, 2).reshape(x.shape)


def unet_by_hand(w, x, t, context, pooled):
    H, W = 8 * x.shape[2], 8 * x.shape[3]
    width = len(w["conv_in.bias"])
    time = two_layers(w, "time_embedding", torch.tensor([waves_by_hand(float(s), width) for s in t]))
    ids = torch.tensor(sum((waves_by_hand(number, 256) for number in (H, W, 0, 0, H, W)), []))
    e = time + two_layers(w, "add_embedding", torch.cat([pooled, ids.repeat(len(x), 1)], dim=1))
    x = conv(w, "conv_in", x, padding=1)
    skips = [x]
    for i in range(3):
        for j in range(2):
            x = resnet(w, f"down_blocks.{i}.resnets.{j}", x, e)
            x = transformer(w, f"down_blocks.{i}.attentions.{j}", x, context)
            skips.append(x)
        if i < 2:
            x = conv(w, f"down_blocks.{i}.downsamplers.0.conv", x, stride=2, padding=1)
            skips.append(x)
    assert len(skips) == 9
    x = resnet(w, "mid_block.resnets.0", x, e)
    x = resnet(w, "mid_block.resnets.1", transformer(w, "mid_block.attentions.0", x, context), e)
    for i in range(3):
        for j in range(3):
            x = resnet(w, f"up_blocks.{i}.resnets.{j}", torch.cat([x, skips.pop()], dim=1), e)
            x = transformer(w, f"up_blocks.{i}.attentions.{j}", x, context)
        if i < 2:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = conv(w, f"up_blocks.{i}.upsamplers.0.conv", x, padding=1)
    return conv(w, "conv_out", F.silu(group_norm(w, "conv_norm_out", x, 1e-5)), padding=1)


@pytest.fixture
def tiny(monkeypatch):
    tiny_turbo.shrink(monkeypatch)
    return tiny_turbo.random_weights(unet.UNet())


def prompt_of(count):
    return torch.randn(count, 77, tiny_turbo.UNET["context"]), torch.randn(count, tiny_turbo.UNET["pooled"])


@torch.no_grad()
def test_the_unet_is_the_published_chain_of_layers(tiny):
    network, w = tiny
    x, t = torch.randn(2, 4, 8, 4), torch.tensor([999., 37.])
    wanted, got = unet_by_hand(w, x, t, *(prompt := prompt_of(2))), network(x, t, *prompt)
    assert got.shape == x.shape and torch.allclose(got, wanted, atol=1e-4)
    assert not torch.allclose(wanted[0], wanted[1], atol=0.1)     # so that the numbers are of some size


@torch.no_grad()
def test_the_norms_of_transformers_have_a_smaller_eps(tiny):
    """Small inputs tell 1e-5 from 1e-6."""
    network, w = tiny
    x, e, context = 1e-3 * torch.randn(1, 64, 4, 4), torch.randn(1, 128), torch.randn(1, 77, 192)
    level, name = network.mid_block, "mid_block"
    assert torch.allclose(level.resnets[0](x, e), resnet(w, f"{name}.resnets.0", x, e), atol=1e-4)
    assert torch.allclose(level.attentions[0](x, context), transformer(w, f"{name}.attentions.0", x, context),
                          atol=1e-4)


@torch.no_grad()
def test_time_prompt_pooled_and_size_all_matter(tiny):
    network, (context, pooled) = tiny[0], prompt_of(1)
    x, t = torch.randn(1, 4, 4, 4), torch.tensor([500.])
    base = network(x, t, context, pooled)
    for other in (network(x, t + 9, context, pooled), network(x, t, context, -pooled),
                  network(x, t, torch.cat([context[:, :76], -context[:, 76:]], dim=1), pooled)):
        assert (other - base).abs().max() > 1e-4                 # the last of the 77 tokens, too
    square, wide = network.embed(t, pooled, 32, 32), network.embed(t, pooled, 32, 64)
    assert not torch.allclose(square, wide) and not torch.allclose(wide, network.embed(t, pooled, 64, 32))


@torch.no_grad()
def test_bfloat16_is_close_to_float32(tiny):
    network, (x, t, prompt) = tiny[0], (torch.randn(2, 4, 8, 8), torch.tensor([999., 37.]), prompt_of(2))
    exact = network(x, t, *prompt)
    rough = network.to(torch.bfloat16)(x, t, *prompt)
    assert rough.dtype == torch.bfloat16 and (rough.float() - exact).norm() < 0.05 * exact.norm()


# ----------------------------------------------------------------------------------------------------
# 3. The text encoders once more


def text_by_hand(w, ids, layers, quick):
    """The inputs of the last layer, and its outputs after the final norm."""
    x = w["text_model.embeddings.token_embedding.weight"][ids]
    x = x + w["text_model.embeddings.position_embedding.weight"]
    for i in range(layers):
        hidden, name = x, f"text_model.encoder.layers.{i}"
        h = layer_norm(w, f"{name}.layer_norm1", x)
        q, k, v = (linear(w, f"{name}.self_attn.{part}_proj", h) for part in ("q", "k", "v"))
        x = x + linear(w, f"{name}.self_attn.out_proj", heads_by_hand(q, k, v, 64, causal=True))
        h = linear(w, f"{name}.mlp.fc1", layer_norm(w, f"{name}.layer_norm2", x))
        h = h / (1 + torch.exp(-1.702 * h)) if quick else h * (1 + torch.erf(h / math.sqrt(2))) / 2
        x = x + linear(w, f"{name}.mlp.fc2", h)
    return hidden, layer_norm(w, "text_model.final_layer_norm", x)


def prompt_ids():
    """Three prompts; the end token, 513, stands at 5, 9 and 76, followed by 0 or by itself."""
    ids = torch.randint(1, 512, (3, 77))
    ids[0, 5], ids[0, 6:], ids[1, 9:], ids[2, 76] = 513, 0, 513, 513
    return ids


@pytest.mark.parametrize("which, quick", [("text_encoder", True), ("text_encoder_2", False)])
def test_the_text_encoders_are_the_published_chain_of_layers(monkeypatch, which, quick):
    tiny_turbo.shrink(monkeypatch)
    encoder, w = tiny_turbo.random_weights(text.TextEncoder(which), 0.1)
    ids = prompt_ids()
    wanted, last = text_by_hand(w, ids, tiny_turbo.TEXT[which][1], quick)
    hidden, pooled = encoder(ids)
    assert torch.allclose(hidden, wanted, atol=1e-4)
    assert not hidden.requires_grad
    if which == "text_encoder":
        assert pooled is None
    else:                                                       # at the first end token of each
        rows = torch.stack([last[0, 5], last[1, 9], last[2, 76]])
        assert torch.allclose(pooled, rows @ w["text_projection.weight"].T, atol=1e-4)


def test_a_token_sees_those_before_it_and_no_later_one(monkeypatch):
    tiny_turbo.shrink(monkeypatch)
    encoder, ids = tiny_turbo.random_weights(text.TextEncoder("text_encoder_2"), 0.1)[0], prompt_ids()
    other = ids.clone()
    other[:, 40] = 7
    change = (encoder(ids)[0] - encoder(other)[0]).abs().amax(dim=(0, 2))        # (77,)
    assert (change[:40] < 1e-6).all() and (change[40:] > 1e-4).all()             # padding is not masked


# ----------------------------------------------------------------------------------------------------
# 4. The schedule, and the sampler

SIGMAS = {                     # steps: trailing times, and sigma there
    1: ([999], [14.6146]), 2: ([999, 499], [14.6146, 1.6129]),
    3: ([999, 666, 332], [14.6146, 2.9183, .9292]),
    4: ([999, 749, 499, 249], [14.6146, 4.0817, 1.6129, .6932]),
    8: ([999, 874, 749, 624, 499, 374, 249, 124], None)}


def sigma_at(t):
    abar = generator.Schedule().abar_at(t)
    return math.sqrt((1 - abar) / abar)


@pytest.mark.parametrize("steps", SIGMAS)
def test_the_trailing_times_have_the_published_sigmas(steps):
    times, sigmas = SIGMAS[steps]
    assert sample.timesteps(steps, "trailing") == times
    assert sigmas is None or [sigma_at(t) for t in times] == pytest.approx(sigmas, abs=5e-5)


def test_the_schedule_grows_linearly_in_the_root_of_beta():
    schedule, product = generator.Schedule(), 1.0
    for k in range(1000):
        product *= 1 - (math.sqrt(.00085) + k / 999 * (math.sqrt(.012) - math.sqrt(.00085)))**2
        assert schedule.abar_at(k) == pytest.approx(product, rel=1e-9)
    assert schedule.abar_at(0) == pytest.approx(0.99915)
    assert schedule.abar_at(999) == pytest.approx(.00466, abs=1e-5)
    assert sigma_at(999) == pytest.approx(14.614641, abs=1e-6)
    assert schedule.abar_at(500) < schedule.abar_at(499.5) < schedule.abar_at(499) and schedule.end(4) == 0


def euler_ancestral(predict, noise, times):
    """The published sampler in its own form, z = x_0 + sigma eps, with a noise for the last step, too."""
    sigmas = [*map(sigma_at, times), 0.0]
    z = sigmas[0] * noise(0)
    for k, t in enumerate(times):
        s, u = sigmas[k], sigmas[k + 1]
        up = math.sqrt(u**2 * (s**2 - u**2) / s**2)
        down = math.sqrt(u**2 - up**2)
        z = z + predict(z / math.sqrt(s**2 + 1), t)[0] * (down - s) + noise(k + 1) * up
    return z


@torch.no_grad()
@pytest.mark.parametrize("steps", SIGMAS)
def test_the_samplers_two_forms_agree_and_are_ddim_with_eta_1(tiny, steps):
    prompt, schedule = prompt_of(2), generator.Schedule()
    noises = torch.randn(steps + 1, 2, 4, 4, 4)

    def predict(x, t):
        return tiny[0](x, torch.full((2,), float(t)), *prompt), None
    x = sample.sampler_of("turbo", steps, schedule=schedule)(predict, lambda k: noises[k])
    assert torch.allclose(x, euler_ancestral(predict, lambda k: noises[k], SIGMAS[steps][0]), atol=1e-3)
    ddim = sample.Sampler(sample.ddim, schedule, SIGMAS[steps][0], 1.0)
    start = math.sqrt(1 - schedule.abar_at(999))
    assert start == pytest.approx(.99767, abs=1e-5)
    assert torch.allclose(x, ddim(predict, lambda k: noises[k] * (start if k == 0 else 1)), atol=1e-3)
    assert x.std() > 5                                          # untrained: no picture, but no zero either


def test_one_step_is_sigma_times_what_the_network_missed_of_the_noise():
    schedule, noise, e = generator.Schedule(), torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    x = sample.sampler_of("turbo", 1, schedule=schedule)(lambda x, t: (e, None), lambda k: noise)
    assert torch.allclose(x, sigma_at(999) * (noise - e), atol=1e-4)


def test_the_last_step_adds_no_noise():
    asked, schedule = [], generator.Schedule()
    sampler = sample.Sampler(sample.ddim, schedule, [999, 499], 1.0)
    sampler(lambda x, t: (x, None), lambda k: asked.append(k) or torch.ones(1, 4, 2, 2))
    assert asked == [0, 1]                                      # the start and the first step's
