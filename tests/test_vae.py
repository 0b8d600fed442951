"""The autoencoder against what is published about it, and against the same network written out by hand."""
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import imagenet as benchmark
from nanodd import files
from nanodd.data import imageset
from nanodd.errors import UserError
from nanodd.networks import autoencoder


@pytest.fixture
def mini(monkeypatch):
    """A narrow autoencoder with every kind of layer that the published one has."""
    monkeypatch.setattr(autoencoder, "WIDTHS", (32, 64, 96, 96))
    vae = autoencoder.Autoencoder().eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return vae


@pytest.fixture
def mini_file(mini, tmp_path):
    path = tmp_path / "mini.safetensors"
    save_file(mini.state_dict(), path)
    return path


def published_shapes():
    """{name: shape} of a published checkpoint, put together from the description of its layers alone."""
    shapes = {}

    def layer(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def resnet(name, inputs, outputs):
        layer(f"{name}.norm1", inputs)
        layer(f"{name}.conv1", outputs, inputs, 3, 3)
        layer(f"{name}.norm2", outputs)
        layer(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            layer(f"{name}.conv_shortcut", outputs, inputs, 1, 1)

    for half, levels, depth, resize in (
            ("encoder", [(128, 128), (128, 256), (256, 512), (512, 512)], 2, "down_blocks.{}.downsamplers"),
            ("decoder", [(512, 512), (512, 512), (512, 256), (256, 128)], 3, "up_blocks.{}.upsamplers")):
        for i, (inputs, outputs) in enumerate(levels):
            for j in range(depth):
                resnet(f"{half}.{resize.split('.')[0]}.{i}.resnets.{j}", outputs if j else inputs, outputs)
            if i < 3:
                layer(f"{half}.{resize.format(i)}.0.conv", outputs, outputs, 3, 3)
        for j in range(2):
            resnet(f"{half}.mid_block.resnets.{j}", 512, 512)
        layer(f"{half}.mid_block.attentions.0.group_norm", 512)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            layer(f"{half}.mid_block.attentions.0.{part}", 512, 512)
    layer("encoder.conv_in", 128, 3, 3, 3)
    layer("encoder.conv_norm_out", 512)
    layer("encoder.conv_out", 8, 512, 3, 3)
    layer("quant_conv", 8, 8, 1, 1)
    layer("post_quant_conv", 4, 4, 1, 1)
    layer("decoder.conv_in", 512, 4, 3, 3)
    layer("decoder.conv_norm_out", 128)
    layer("decoder.conv_out", 3, 128, 3, 3)
    return shapes


def test_the_autoencoder_has_the_published_tensors():
    with torch.device("meta"):
        vae = autoencoder.Autoencoder()
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert set(shapes.items()) == set(published_shapes().items())
    assert sum(map(math.prod, shapes.values())) == 83_653_863
    for part, count in (("encoder", 34_163_592), ("decoder", 49_490_179),
                        ("quant_conv", 72), ("post_quant_conv", 20)):
        assert sum(p.numel() for p in getattr(vae, part).parameters()) == count


# The network once more, as functions of the tensors' names: an independent answer to encode and decode.

def by_hand_conv(w, name, x, **how):
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **how)


def by_hand_norm(w, name, x):
    """GroupNorm, 32 groups: each loses its mean and its deviation over channels and places."""
    groups = x.unflatten(1, (32, -1))
    centred = groups - groups.mean(dim=(2, 3, 4), keepdim=True)
    unit = (centred / (centred.pow(2).mean(dim=(2, 3, 4), keepdim=True) + 1e-6).sqrt()).flatten(1, 2)
    return unit * w[f"{name}.weight"].view(1, -1, 1, 1) + w[f"{name}.bias"].view(1, -1, 1, 1)


def by_hand_resnet(w, name, x):
    h = x
    for k in "12":
        h = by_hand_norm(w, f"{name}.norm{k}", h)
        h = by_hand_conv(w, f"{name}.conv{k}", h * torch.sigmoid(h), padding=1)
    return h + (by_hand_conv(w, f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.bias" in w else x)


def by_hand_attention(w, name, x):
    """One softmax a pixel, over all pixels."""
    def linear(layer, h):
        return h @ w[f"{name}.{layer}.weight"].T + w[f"{name}.{layer}.bias"]
    out = torch.empty_like(x)
    for b in range(len(x)):
        pixels = by_hand_norm(w, f"{name}.group_norm", x)[b].flatten(1).T               # (N, C)
        q, k, v = (linear(layer, pixels) for layer in ("to_q", "to_k", "to_v"))
        for n in range(len(pixels)):
            weights = torch.exp(k @ q[n] / math.sqrt(len(q[n])))
            seen = (weights / weights.sum()) @ v                                        # (C,)
            i, j = divmod(n, x.shape[3])
            out[b, :, i, j] = x[b, :, i, j] + linear("to_out.0", seen)
    return out


def by_hand_middle(w, name, x):
    x = by_hand_attention(w, f"{name}.attentions.0", by_hand_resnet(w, f"{name}.resnets.0", x))
    return by_hand_resnet(w, f"{name}.resnets.1", x)


def by_hand_out(w, name, x):
    x = by_hand_norm(w, f"{name}.conv_norm_out", x)
    return by_hand_conv(w, f"{name}.conv_out", x * torch.sigmoid(x), padding=1)


def test_encoding_and_decoding_are_the_published_chain_of_layers(mini):
    w, x = mini.state_dict(), torch.randn(2, 3, 32, 24)
    h = by_hand_conv(w, "encoder.conv_in", x, padding=1)
    for i in range(4):
        for j in range(2):
            h = by_hand_resnet(w, f"encoder.down_blocks.{i}.resnets.{j}", h)
        if i < 3:
            h = F.pad(h, (0, 1, 0, 1))
            h = by_hand_conv(w, f"encoder.down_blocks.{i}.downsamplers.0.conv", h, stride=2)
    h = by_hand_out(w, "encoder", by_hand_middle(w, "encoder.mid_block", h))
    moments = by_hand_conv(w, "quant_conv", h)
    mean, logvar = mini.encode(x)
    assert torch.allclose(torch.cat([mean, logvar], dim=1), moments, atol=1e-4)

    z = torch.randn(2, 4, 3, 4)
    h = by_hand_conv(w, "decoder.conv_in", by_hand_conv(w, "post_quant_conv", z / 0.18215), padding=1)
    h = by_hand_middle(w, "decoder.mid_block", h)
    for i in range(4):
        for j in range(3):
            h = by_hand_resnet(w, f"decoder.up_blocks.{i}.resnets.{j}", h)
        if i < 3:
            h = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            h = by_hand_conv(w, f"decoder.up_blocks.{i}.upsamplers.0.conv", h, padding=1)
    assert torch.allclose(mini.decode(z), by_hand_out(w, "decoder", h), atol=1e-4)


def test_attention_is_a_softmax_over_all_pixels():
    block, x = autoencoder.AttentionBlock(32), 3 * torch.randn(2, 32, 3, 5)
    with torch.no_grad():
        block.to_q.weight.mul_(9)                                 # weights far from uniform
        w = {f"a.{name}": tensor for name, tensor in block.state_dict().items()}
        assert torch.allclose(block(x), by_hand_attention(w, "a", x), atol=1e-5)


def test_group_norm_divides_by_the_root_of_the_variance_plus_1e_6():
    x, w = 1e-3 * torch.randn(2, 64, 4, 4), {"n.weight": torch.ones(64), "n.bias": torch.zeros(64)}
    assert torch.allclose(autoencoder.norm(64)(x), by_hand_norm(w, "n", x), atol=1e-4)


def test_downsampling_pads_on_the_right_and_below_only():
    down, x = autoencoder.Downsample(1), torch.randn(1, 1, 4, 6)
    kernel, bias = down.conv.weight[0, 0], down.conv.bias[0]
    out = down(x)
    assert out.shape == (1, 1, 2, 3)
    for i in range(2):
        for j in range(3):
            total = bias + sum(kernel[a, b] * x[0, 0, 2 * i + a, 2 * j + b]
                               for a in range(3) for b in range(3) if 2 * i + a < 4 and 2 * j + b < 6)
            assert out[0, 0, i, j].item() == pytest.approx(total.item(), abs=1e-6)


def test_latents_are_an_eighth_as_wide(mini):
    mean, logvar = mini.encode(torch.zeros(2, 3, 40, 16))
    assert mean.shape == logvar.shape == (2, 4, 5, 2) and mean.dtype == torch.float32
    assert mini.decode(mean).shape == (2, 3, 40, 16) and not mean.requires_grad
    with pytest.raises(UserError, match="multiples of 8, not 20x16"):
        mini.encode(torch.zeros(1, 3, 20, 16))


def test_the_mean_comes_first_and_the_log_variance_is_clamped(mini):
    with torch.no_grad():
        mini.quant_conv.weight.zero_()
        mini.quant_conv.bias.copy_(torch.tensor([1., 2., 3., 100., -100., 100., 5., -6.]))
    mean, logvar = mini.encode(torch.randn(1, 3, 8, 8))
    assert mean.flatten().tolist() == [1, 2, 3, 100] and logvar.flatten().tolist() == [-30, 20, 5, -6]


def test_a_sample_has_the_scaled_mean_and_deviation():
    mean, logvar = torch.full((1, 4, 100, 100), 3.), torch.full((1, 4, 100, 100), 2 * math.log(5.))
    assert torch.allclose(autoencoder.draw_latent(mean, logvar, torch.zeros_like(mean)), 0.18215 * mean)
    z = autoencoder.draw_latent(mean, logvar, torch.randn_like(mean))  # 40,000: their mean deviates by 0.005
    assert z.mean().item() == pytest.approx(0.18215 * 3, abs=0.02)
    assert z.std().item() == pytest.approx(0.18215 * 5, rel=0.02)


def test_decoding_in_chunks_is_decoding_at_once(mini):
    z, sizes = torch.randn(5, 4, 2, 3), []
    mini.decoder.register_forward_hook(lambda *hook: sizes.append(len(hook[2])))
    whole = mini.decode(z)
    assert torch.allclose(mini.decode(z, chunk=2), whole, atol=1e-5) and sizes == [5, 2, 2, 1]
    assert not torch.allclose(whole[0], whole[4], atol=1e-3)      # so that the order was tested


def test_bfloat16_is_close_to_float32(mini_file):
    exact, rough = autoencoder.load_autoencoder(mini_file), autoencoder.load_autoencoder(mini_file,
                                                                                         dtype=torch.bfloat16)
    assert rough.decoder.conv_in.weight.dtype == torch.bfloat16
    x, z = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 4, 4)
    for wanted, got in ((exact.encode(x)[0], rough.encode(x)[0]), (exact.decode(z), rough.decode(z))):
        assert got.dtype == torch.float32 and (got - wanted).norm() < 0.05 * wanted.norm()


def test_a_file_comes_back_frozen_and_in_eval_mode(mini, mini_file):
    loaded = autoencoder.load_autoencoder(mini_file)
    assert all(torch.equal(tensor, mini.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("shape", [(96, 96), (96, 96, 1, 1)])
def test_both_generations_of_attention_names_load_to_the_same_outputs(mini, mini_file, shape):
    older = {}
    for name, tensor in load_file(mini_file).items():
        if "attentions" in name and tensor.ndim == 2:
            tensor = tensor.view(shape)
        for today, then in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."),
                            (".to_out.0.", ".proj_attn.")):
            name = name.replace(today, then)
        older[name] = tensor
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in older
    save_file(older, "older.safetensors")
    loaded, x, z = autoencoder.load_autoencoder("older.safetensors"), torch.randn(1, 3, 16,
                                                                                  16), torch.randn(1, 4, 2, 2)
    assert torch.equal(loaded.encode(x)[0], mini.encode(x)[0])
    assert torch.equal(loaded.decode(z), mini.decode(z))
    assert autoencoder.encoder_fingerprint(loaded) == autoencoder.encoder_fingerprint(mini)


def test_the_published_weights_are_fetched_by_name(mini_file, monkeypatch):
    asked = []
    monkeypatch.setattr(files, "fetch", lambda *a: asked.append(a) or mini_file)
    for name in ("ema", "mse"):
        autoencoder.load_autoencoder(name)
    assert asked == [(f"https://huggingface.co/stabilityai/sd-vae-ft-{name}/resolve/main/"
                      "diffusion_pytorch_model.safetensors", f"sd-vae-ft-{name}.safetensors", "--vae")
                     for name in ("ema", "mse")]


def test_two_decoders_of_one_encoder_have_the_same_encoder_print(mini):
    before = autoencoder.encoder_fingerprint(mini)
    with torch.no_grad():
        mini.decoder.conv_in.weight.add_(1)
        mini.post_quant_conv.bias.add_(1)
    assert autoencoder.encoder_fingerprint(mini) == before
    with torch.no_grad():
        mini.quant_conv.bias.add_(1)
    assert autoencoder.encoder_fingerprint(mini) != before


@pytest.mark.parametrize("change, said", [
    (lambda tensors: tensors.pop("decoder.conv_in.bias"), "decoder.conv_in.bias is missing"),
    (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra is unexpected"),
    (lambda tensors: tensors.update({"quant_conv.bias": torch.zeros(3)}),
     r"quant_conv.bias has shape \(3,\) instead of \(8,\)")])
def test_a_file_that_does_not_fit_names_its_first_tensor(mini_file, change, said):
    tensors = load_file(mini_file)
    change(tensors)
    save_file(tensors, "wrong.safetensors")
    with pytest.raises(UserError, match=f"wrong.safetensors does not fit the autoencoder: {said}"):
        autoencoder.load_autoencoder("wrong.safetensors")


def there_and_back(argv):
    """python benchmarks/imagenet.py --picture ..."""
    benchmark.main(["--picture", "red.png", "--device", "cpu", *argv])


def test_absent_and_damaged_files_are_a_sentence(mini_file, sentence, tmp_path):
    Image.new("RGB", (50, 40), (200, 30, 90)).save("red.png")
    assert "there is no file gone.safetensors" in sentence(there_and_back, "--vae", "gone.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "half.safetensors").write_bytes(mini_file.read_bytes()[:100_000])
    for name in ("text", "half"):
        assert f"{name}.safetensors is damaged" in sentence(there_and_back, "--vae", f"{name}.safetensors")
    assert "--size must be at least 8" in sentence(there_and_back, "--vae", mini_file, "--size", 0)
    assert "multiples of 8, not 20x20" in sentence(there_and_back, "--vae", mini_file, "--size", 20)


def test_psnr_is_20_dB_less_for_ten_times_the_error():
    black = torch.zeros(3, 8, 8, dtype=torch.uint8)
    assert benchmark.psnr(black, black + 255) == 0 and benchmark.psnr(black, black) == math.inf
    assert benchmark.psnr(black, black + 10) == pytest.approx(20 * math.log10(25.5))
    assert benchmark.psnr(black + 1, black) - benchmark.psnr(black, black + 10) == pytest.approx(20)


def test_a_picture_and_its_reconstruction_are_written_side_by_side(mini_file, capsys):
    Image.new("RGB", (50, 40), (200, 30, 90)).save("red.png")
    there_and_back(["--vae", str(mini_file), "--size", "32", "--bf16"])
    said = capsys.readouterr().out
    assert " dB | out/vae.png" in said and "(3, 32, 32) -> (4, 4, 4)" in said
    both = imageset.open_image("out/vae.png")
    assert both.shape == (3, 32, 64) and (both[:, 5, 5] == torch.tensor([200, 30, 90])).all()
