"""ImageNet's subsets from end to end: pictures, latent cache, published weights, fine-tuning, judging."""
import argparse
import json
import pathlib
import shutil

import pytest
import safetensors.torch
import torch

import diffusion
import imagenet as benchmark
import minimax
import sample
import train_eval
from conftest import NARROW, shrink
from nanodd import cli, files, recipes
from nanodd.data import archives, datasets, imageset
from nanodd.errors import UserError
from nanodd.networks import autoencoder, checkpoint, latents, models, published, training

# Section 2.5 of the method's facts: class, and its row in the published weights' label table
ROWS = {"imagewoof": [193, 182, 258, 162, 155, 167, 159, 273, 207, 229],
        "imagenette": [0, 217, 482, 491, 497, 566, 569, 571, 574, 701],
        "imageidc": [452, 64, 374, 236, 993, 176, 882, 904, 503, 74]}


def tune(imagenet, *more):
    """Imports the weights and fine-tunes for two steps."""
    diffusion.main(["--weights", str(imagenet.weights)])
    minimax.main(["--data", "imagewoof", "--root", str(imagenet.root), "--vae", str(imagenet.vae), "--steps",
                  "2", *map(str, more)])


@pytest.fixture(scope="module")
def woof_files(imagenet_files, tmp_path_factory):
    """A folder where tune was run once, on the pictures that all tests share."""
    home = tmp_path_factory.mktemp("woof")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for where, name, value in shrink():
            patch.setitem(where, name, value)
        patch.setattr(autoencoder, "WIDTHS", NARROW)
        tune(imagenet_files)
    return home


@pytest.fixture
def woof(woof_files, imagenet_files, workplace, monkeypatch):
    """imagenet_files, to be read only, and the test's own copy of what tune wrote of them."""
    monkeypatch.setattr(autoencoder, "WIDTHS", NARROW)
    shutil.copytree(woof_files / "out", "out")
    return imagenet_files


@pytest.mark.parametrize("name", ROWS)
def test_a_class_has_its_published_row_whatever_lies_beside_it(name):
    header = {"classes": archives.imagenet_classes(), "rows": list(range(1001)), "data": "imagenet"}
    assert checkpoint.rows_of(header, archives.class_list(name), "file") == [*ROWS[name], 1000]


def test_the_class_lists_are_whole():
    everything = archives.imagenet_classes()
    assert len(everything) == 1000 and everything == sorted(everything)
    assert archives.class_list("imagenet") == everything and archives.class_list("digits") is None
    hundred = archives.SUBSETS["imagenet100"]
    assert len(set(hundred)) == 100 and set(hundred) <= set(everything)
    assert archives.class_list("imageidc-validation") == archives.SUBSETS["imagenet100"][:10]


def test_pictures_to_judged_set(imagenet, capsys):
    tune(imagenet)
    said = capsys.readouterr().out
    assert "ImageNet's own split, 20 images to train on, 10 to test" in said
    assert "encoding the pictures of 10 of 10 classes" in said
    header = files.read_header("out/imagewoof/minimax.safetensors")
    assert header["rows"] == [*ROWS["imagewoof"], 1000] and header["classes"] == archives.SUBSETS["imagewoof"]
    assert header["cut"].startswith("ImageNet's own split") and header["latents"]
    assert header["config"]["learned_variance"] and header["config"]["difffit"]
    model, _ = models.load_model("out/imagewoof/minimax.safetensors")
    tuned = files.load_tensors("out/imagewoof/minimax.safetensors")         # what was tuned, alone
    assert set(tuned) == set(models.difffit_parameters(model)) < set(dict(model.named_parameters()))
    assert "python sample.py --sampler ddpm --grid uniform --steps 50 --cfg-channels 3" in said
    sample.main(["--data", "imagewoof", "--steps", "2", "--sampler", "ddpm", "--grid", "uniform", "--ipc",
                 "1", "--cfg-channels", "3", "--vae", str(imagenet.vae), "--no-bf16"])
    assert "-> python train_eval.py --data imagewoof --root DIR\n" in capsys.readouterr().out
    record = json.loads(pathlib.Path("out/imagewoof/distilled.json").read_text())
    assert record["classes"] == archives.SUBSETS["imagewoof"] and record["settings"]["guidance"] == 4
    drawn = imageset.read_set("out/imagewoof/distilled", classes=archives.SUBSETS["imagewoof"])
    assert drawn.images.shape == (10, 3, 64, 64) and sorted(drawn.labels.tolist()) == list(range(10))
    train_eval.main(["--data", "imagewoof", "--root", str(imagenet.root), "--runs", "1", "--epochs", "2"])
    rows = [json.loads(line) for line in open("out/imagewoof/results.jsonl")]
    assert [row["train"] for row in rows] == ["out/imagewoof/distilled", "random"]
    assert all(row["judge"] == "ResNetAP-10" and row["protocol"] == "gu" for row in rows)


def test_the_unfinetuned_model_draws_the_subsets_classes(imagenet, sentence):
    diffusion.main(["--weights", str(imagenet.weights)])
    base = published.published_base(recipes.RECIPES["imagenet"])
    sample.main(["--data", "imageidc", "--checkpoint", str(base), "--steps", "1", "--ipc", "1",
                 "--vae", str(imagenet.vae)])
    assert sorted(path.name for path in pathlib.Path("out/imageidc/distilled").iterdir()) == \
        sorted(archives.SUBSETS["imageidc"])
    assert "is of the data set imagenet, not digits" in sentence(sample.main, "--checkpoint", base)


def test_the_weights_are_taken_as_they_are_and_of_training_checkpoints_the_average(tmp_path):
    tensors = diffusion.DiT("S", 8, 2, 4, 1000, learned_variance=True).state_dict()
    torch.save(tensors, tmp_path / "DiT-S.pt")
    diffusion.main(["--weights", str(tmp_path / "DiT-S.pt")])
    model, header = models.load_model("out/DiT-wide-2-64x64/base.safetensors")
    assert header["data"] == "imagenet" and header["config"]["network"] == "S" and len(header["rows"]) == 1001
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    torch.save({"model": {"wrong": torch.zeros(1)}, "ema": tensors, "opt": {},
                "args": argparse.Namespace(lr=1)}, tmp_path / "0050000.pt")
    found, config = published.read_published(tmp_path / "0050000.pt", published.dit_config, "DiT")
    assert found.keys() == tensors.keys() and config == header["config"]


def test_weights_that_do_not_fit_are_refused(imagenet, sentence, tmp_path):
    tensors = torch.load(imagenet.weights)
    lost = dict(tensors)
    del lost["blocks.1.attn.qkv.bias"]
    torch.save(lost, tmp_path / "lost.pt")
    assert "blocks.1.attn.qkv.bias" in sentence(diffusion.main, "--weights", tmp_path / "lost.pt")
    torch.save({**tensors, "extra": torch.zeros(1)}, tmp_path / "more.pt")
    assert "extra" in sentence(diffusion.main, "--weights", tmp_path / "more.pt")
    said = sentence(diffusion.main, "--weights", imagenet.weights, "--recipe", "imagenet512")
    assert "size 8, not 64" in said
    (tmp_path / "junk.pt").write_bytes(b"junk")
    assert "holds no DiT weights" in sentence(diffusion.main, "--weights", tmp_path / "junk.pt")
    assert "there is no file" in sentence(diffusion.main, "--weights", tmp_path / "none.pt")
    said = sentence(diffusion.main, "--weights", imagenet.weights, "--steps", 5)
    assert "leave --out, --steps and --network out" in said


def test_without_a_network_a_sentence_says_where_the_weights_are(imagenet, sentence, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    said = sentence(minimax.main, "--data", "imagewoof", "--root", imagenet.root)
    assert "DiT-wide-2-64x64.pt" in said and "diffusion.py --weights" in said
    picture = next(imagenet.root.rglob("*.JPEG"))
    said = sentence(benchmark.main, "--picture", picture, "--vae", "mse")
    assert "sd-vae-ft-mse" in said and "--vae" in said


def test_a_cache_is_made_once_and_again_where_pictures_changed(imagenet, capsys, monkeypatch):
    tune(imagenet)
    capsys.readouterr()

    def never(*_):
        raise AssertionError("nothing is to be encoded")
    with monkeypatch.context() as patch:
        patch.setattr(latents, "encode_with_mirror", never)
        minimax.main(["--data", "imagewoof", "--root", str(imagenet.root), "--vae", str(imagenet.vae),
                      "--steps", "1", "--out", "out/elsewhere"])
    assert "encoding" not in capsys.readouterr().out
    wnid = archives.SUBSETS["imagewoof"][4]
    picture = imagenet.root / "train" / wnid / f"{wnid}_1.JPEG"
    picture.write_bytes(picture.read_bytes() + b"\0")
    minimax.main(["--data", "imagewoof", "--root", str(imagenet.root), "--vae", str(imagenet.vae), "--steps",
                  "1", "--overwrite"])
    assert "encoding the pictures of 1 of 10 classes" in capsys.readouterr().out


def test_a_cache_of_another_autoencoder_is_refused(woof, sentence, tmp_path, capsys):
    tensors = safetensors.torch.load_file(woof.vae)
    decoder_only = {**tensors, "decoder.conv_out.bias": tensors["decoder.conv_out.bias"] + 1}
    safetensors.torch.save_file(decoder_only, tmp_path / "decoder.safetensors")
    words = ["--data", "imagewoof", "--root", str(woof.root), "--steps", "1", "--vae"]
    words[-1:-1] = ["--out", "out/two"]
    minimax.main([*words, str(tmp_path / "decoder.safetensors")])  # the same encoder
    assert "encoding" not in capsys.readouterr().out
    safetensors.torch.save_file({**tensors, "quant_conv.bias": tensors["quant_conv.bias"] + 1},
                                tmp_path / "encoder.safetensors")
    words[-2] = "out/three"
    assert "none.safetensors" in sentence(minimax.main, *words, tmp_path / "none.safetensors")
    said = sentence(minimax.main, *words, tmp_path / "encoder.safetensors")
    assert "another autoencoder" in said and "--overwrite" in said
    minimax.main([*words, str(tmp_path / "encoder.safetensors"), "--overwrite"])
    assert "encoding the pictures of 10 of 10 classes" in capsys.readouterr().out
    said = sentence(minimax.main, *words, tmp_path / "decoder.safetensors")  # a finished run of another
    assert "encoder 'encoder.safetensors' there" in said


def test_both_flips_are_cached_and_each_step_draws_its_own_latent(woof):
    whole = datasets.load("imagewoof", woof.root)
    run = cli.Run("python minimax.py", torch.device("cpu"), 0, False, None, False, False, str(woof.vae))
    encoded = latents.prepared(whole, run)
    assert encoded.moments.shape == (20, 2, 8, 8, 8) and encoded.moments.dtype == torch.float16
    picture = imageset.to_float(whole.train.pick(torch.tensor([3])).read().images)
    vae = autoencoder.load_autoencoder(str(woof.vae))
    for side, x in enumerate((picture, picture.flip(3))):
        moments = torch.cat(vae.encode(x), dim=1)[0]
        assert (encoded.moments[3, side].float() - moments).abs().max() < 0.02
    index, mirrored = torch.tensor([3, 3]), torch.tensor([False, True])
    one = encoded.examples(index, mirrored, torch.Generator().manual_seed(1))
    two = encoded.examples(index, mirrored, torch.Generator().manual_seed(2))
    mean = encoded.moments[3, :, :4].float()
    assert one.shape == (2, 4, 8, 8) and not torch.equal(one, two)
    many = torch.stack([encoded.examples(index, mirrored, torch.Generator().manual_seed(k))
                        for k in range(400)])
    deviation = 0.18215 * torch.exp(encoded.moments[3, :, 4:].float() / 2)
    assert ((many.mean(dim=0) - 0.18215 * mean) / deviation).abs().max() < 0.3  # six standard errors


def test_each_precision_has_a_cache_of_its_own(woof, capsys):
    data, found = datasets.load("imagewoof", woof.root), {}
    for bf16 in (True, False, None):                            # None: so narrow an encoder gains nothing
        run = cli.Run("", torch.device("cpu"), 0, False, bf16, False, False, str(woof.vae))
        found[bf16] = latents.prepared(data, run).moments.float()
        assert ("encoding" in capsys.readouterr().out) == (bf16 is True)    # woof has the other one
    assert torch.equal(found[False], found[None])
    error = (found[True] - found[False]).pow(2).mean().sqrt() / found[False].std()
    assert 1e-4 < error < 0.03                                  # float16, in which they are kept, adds 3e-4
    rough, exact = (next(pathlib.Path("out/imagewoof").glob(f"latents-64-{end}"))
                    for end in ("*-bf16", "????????"))
    name = f"{archives.SUBSETS['imagewoof'][0]}.safetensors"
    headers = [files.read_header(cache / name) for cache in (rough, exact)]
    assert [header["source"] for header in headers] == [f"{woof.vae.name} in bfloat16", woof.vae.name]
    shutil.copy(rough / name, exact / name)
    with pytest.raises(UserError, match="another autoencoder"):
        latents.prepared(data, run)


def test_latents_have_modes_and_pictures_are_chosen(woof, monkeypatch):
    """Modes are centres of latents; of two pictures a class its latents' mean is the only one."""
    monkeypatch.setattr(train_eval, "count_epochs", lambda *_: 1)
    words = ["--data", "imagewoof", "--root", str(woof.root), "--vae", str(woof.vae), "--steps", "2"]
    sample.main([*words, "--modes", "1", "--ipc", "1", "--oversample", "2", "--out", "out/kept"])
    found = files.load_tensors("out/imagewoof/modes-1-seed0.safetensors")["modes"]
    assert found.shape == (10, 1, 4, 8, 8)
    run = cli.Run("python sample.py", torch.device("cpu"), 0, False, None, False, False, str(woof.vae))
    encoded = latents.prepared(datasets.load("imagewoof", woof.root), run)
    mean, logvar = encoded.moments[:, 0].float().chunk(2, dim=1)            # 2 of (20, 4, 8, 8), two a class
    means = 0.18215 * mean.view(10, 2, 4, 8, 8).mean(1)         # of a class's two latents; each is sampled
    deviations = 0.18215 * logvar.view(10, 2, 4, 8, 8).exp().sum(1).sqrt() / 2
    assert ((found[:, 0] - means) / deviations).std() == pytest.approx(1, abs=0.06)
    assert len(list(pathlib.Path("out/kept/distilled").glob("*/*.png"))) == 10
    assert len(list(pathlib.Path("out/kept/pool/distilled").glob("*/*.png"))) == 20


def test_phases_are_tuned_apart_and_drawn_together(imagenet, capsys, sentence):
    tune(imagenet, "--phases", 4)
    names = ["minimax-0-3", "minimax-4-7", "minimax-8-9"]
    assert all(pathlib.Path(f"out/imagewoof/{name}.safetensors").is_file() for name in names)
    words = ["--data", "imagewoof", "--steps", "1", "--ipc", "1", "--vae", str(imagenet.vae)]
    sample.main([*words, "--out", "out/together"])
    whole = imageset.read_set("out/together/distilled", classes=archives.SUBSETS["imagewoof"])
    sample.main([*words, "--out", "out/alone", "--checkpoint", f"out/imagewoof/{names[1]}.safetensors"])
    alone = imageset.read_set("out/alone/distilled", classes=archives.SUBSETS["imagewoof"][4:8])
    for c in range(4):                                          # each class by its own phase
        pair = [found.images[found.labels == label].int() for found, label in ((whole, 4 + c), (alone, c))]
        assert (pair[0] - pair[1]).abs().max() <= 1
    pathlib.Path(f"out/imagewoof/{names[1]}.safetensors").unlink()
    said = sentence(sample.main, *words, "--out", "out/hole")
    assert "8-9" in said and "4 should come next" in said
    pathlib.Path(f"out/imagewoof/{names[2]}.safetensors").unlink()
    assert "no phase has the classes 4-9" in sentence(sample.main, *words, "--out", "out/hole")
    minimax.main(["--data", "imagewoof", "--root", str(imagenet.root), "--vae", str(imagenet.vae), "--steps",
                  "2", "--classes", "4-9"])
    sample.main([*words, "--out", "out/whole"])


def test_what_is_wrong_with_the_pictures_is_said(imagenet, sentence, capsys):
    diffusion.main(["--weights", str(imagenet.weights)])
    words = ["--data", "imagewoof", "--root", imagenet.root, "--vae", imagenet.vae, "--steps", "1"]
    said = sentence(minimax.main, *words[:3], imagenet.root / "train", *words[4:])
    assert "there is no ImageNet at" in said
    assert "--root" in sentence(minimax.main, "--data", "imagewoof")
    wnid = archives.SUBSETS["imagewoof"][2]
    (imagenet.root / "train" / wnid / f"{wnid}_3.JPEG").write_bytes(b"\xff\xd8 no picture")
    said = sentence(minimax.main, *words)
    assert f"{wnid}_3.JPEG" in said and "1 of 3 images" in said and "--skip-broken" in said
    minimax.main([*map(str, words), "--skip-broken"])
    assert f"left out: cannot read the image {imagenet.root}/train/{wnid}/{wnid}_3.JPEG" in \
        capsys.readouterr().err
    assert "1 of 3 images" in sentence(minimax.main, *words, "--out", "out/again")   # not silently, later on
    (imagenet.root / "train" / wnid).rename(imagenet.root / "elsewhere")
    said = sentence(minimax.main, *words)
    assert wnid in said and "1 of the 10 classes" in said
    said = sentence(minimax.main, "--data", "imagenet100", "--root", imagenet.root)
    assert "of the 100 classes of imagenet100" in said


def test_fastais_cut_is_told_from_imagenets_own(imagenet):
    for wnid in archives.SUBSETS["imagewoof"]:
        (imagenet.root / "val" / wnid / f"{wnid}_9.JPEG").write_bytes(
            next((imagenet.root / "train" / wnid).iterdir()).read_bytes())
    assert datasets.load("imagewoof",
                         imagenet.root).cut.startswith("fastai's re-split, 20 images to train on, 20")


def test_out_of_memory_names_the_flag_that_helps(imagenet, sentence, monkeypatch):
    diffusion.main(["--weights", str(imagenet.weights)])

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(training.Trainer, "step", full)
    said = sentence(minimax.main, "--data", "imagewoof", "--root", imagenet.root, "--vae", imagenet.vae)
    assert "out of memory" in said and "--recompute" in said and "--batch" in said


def test_a_batch_larger_than_the_data_is_refused(imagenet, sentence):
    diffusion.main(["--weights", str(imagenet.weights)])
    said = sentence(minimax.main, "--data", "imagewoof", "--root", imagenet.root, "--vae", imagenet.vae,
                    "--batch", 64)
    assert "20 images make no batch of 64" in said
