"""Labels survive every trip; any picture is read; what cannot be read is named."""
import argparse
import errno
import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import dry_run
from nanodd import cli, files, running
from nanodd.data import datasets, imageset
from nanodd.errors import UserError


def test_digits_are_split_once_and_for_all():
    _, _, train, test, *_ = datasets.load("digits")
    assert len(train.labels) == 1257 and len(test.labels) == 540
    assert train.images.dtype == torch.uint8 and train.images.shape[1:] == (1, 8, 8)
    assert train.images.min() == 0 and train.images.max() == 255
    assert train.classes == [str(c) for c in range(10)]
    digest = hashlib.sha256(test.images.numpy().tobytes() + test.labels.numpy().tobytes()).hexdigest()
    assert digest.startswith("1252c8c72559de62")


def test_the_validation_part_never_touches_the_test_split():
    whole, held = datasets.load("digits"), datasets.load("digits", validation=True)
    seen = {bytes(image.numpy().tobytes()) for image in whole.train.images}
    assert len(held.train.labels) + len(held.test.labels) == 1257
    assert all(image.numpy().tobytes() in seen for image in held.test.images)
    assert held.name == "digits-validation"
    assert held.test.labels.bincount().min() >= 20                # every class is there


def test_uint8_survives_the_trip_through_floats():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(imageset.to_uint8(imageset.to_float(every)), every)
    assert imageset.to_float(every).min() == -1 and imageset.to_float(every).max() == 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_a_picture_of_any_mode_is_read(tmp_path, mode):
    grey = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
    deep = mode == "I;16"
    image = Image.fromarray(grey.astype(np.uint16) * 257) if deep else Image.fromarray(grey).convert(mode)
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image.save(path)
    for channels in (1, 3):
        read = imageset.open_image(path, channels=channels)
        assert read.shape == (channels, 16, 16) and read.dtype == torch.uint8
        if mode not in ("1", "CMYK", "P"):
            assert (read[0].float() - torch.from_numpy(grey).float()).abs().max() <= 1
    assert imageset.open_image(path, size=8).shape == (3, 8, 8)


def test_transparent_is_white_and_webp_is_read(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.webp", lossless=True)
    assert (imageset.open_image(tmp_path / "clear.webp") == 255).all()


def test_resizing_keeps_the_centre(tmp_path):
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255                                         # the middle third is white
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (imageset.open_image(tmp_path / "wide.png", size=8) == 255).all()


def test_labels_follow_names_not_positions(pictures):
    found = imageset.read_set(pictures, 8, 3, classes=["bee", "ant"])       # another order than the folders'
    assert found.classes == ["bee", "ant"]
    assert found.images[found.labels == 0].float().mean() > 150   # bees are bright
    assert found.images[found.labels == 1].float().mean() < 100


def test_labels_survive_an_npz(tmp_path):
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=[0, 1, 2, 0, 1, 2], classes=["x", "y", "z"])
    found = imageset.read_set(tmp_path / "set.npz", 8, 3, classes=["z", "x", "y"])
    assert torch.equal(found.images, images) and found.labels.tolist() == [1, 2, 0, 1, 2, 0]


def test_a_missing_or_extra_class_is_an_error(pictures):
    with pytest.raises(UserError, match="missing.*cat.*unexpected.*bee"):
        imageset.read_set(pictures, 8, 3, classes=["ant", "cat"])


def test_a_folder_without_a_split_gets_a_fixed_one(pictures, capsys):
    first, second = datasets.load(str(pictures)), datasets.load(str(pictures))
    assert torch.equal(first.test.images, second.test.images)
    assert first.name == "pictures" and len(first.train.labels) == 16 and len(first.test.labels) == 4
    assert "a fixed fifth" in capsys.readouterr().out


def test_train_and_test_folders_are_taken_as_they_are(pictures, tmp_path):
    root = tmp_path / "own"
    root.mkdir()
    pictures.rename(root / "train")
    with pytest.raises(UserError, match="needs .*test or .*val"):
        datasets.load("folder", str(root))
    for name in ("ant", "bee"):
        (root / "val" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(root / "val" / name / "0.png")
    assert len(datasets.load("folder", str(root)).test.labels) == 2
    (root / "val" / "bee" / "0.png").unlink()
    with pytest.raises(UserError, match="val/bee holds no images"):
        datasets.load("folder", str(root))


def test_what_cannot_be_read_is_named(pictures, tmp_path, sentence):
    assert "neither a folder nor" in sentence(dry_run, "--data", "nowhere")
    assert "there is no folder" in sentence(dry_run, "--data", "folder", "--root", "nowhere")
    assert "leave --root out" in sentence(dry_run, "--root", pictures)
    (tmp_path / "empty").mkdir()
    assert "holds no class folders" in sentence(dry_run, "--data", tmp_path / "empty")
    (pictures / "ant" / "3.png").write_bytes(b"not a picture")
    assert "ant/3.png" in sentence(dry_run, "--data", pictures)
    for broken in pictures.glob("ant/*"):
        broken.unlink()
    assert "ant holds no images" in sentence(dry_run, "--data", pictures)
    (pictures / "ant").rmdir()
    assert "one class only (bee)" in sentence(dry_run, "--data", pictures)


@pytest.mark.parametrize("error, words", [
    (OSError(errno.ENOSPC, "No space left on device", "out/x"), "No space left on device"),
    (KeyboardInterrupt(), "stopped by Ctrl-C")])
def test_a_full_disk_and_ctrl_c_leave_what_was_there(tmp_path, capsys, error, words):
    kept = tmp_path / "kept"
    kept.write_text("good")
    with pytest.raises(SystemExit) as stop, running.command(cli.new_parser(""), argparse.Namespace()), \
            files.atomic_write(kept) as temporary:
        temporary.write_text("half")
        raise error
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert kept.read_text() == "good" and list(tmp_path.iterdir()) == [kept]


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError), running.command(cli.new_parser(""), argparse.Namespace()):
        raise ValueError("ours")


def test_a_download_that_fails_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "weights.bin").write_bytes(bytes(10))
    url = (tmp_path / "weights.bin").as_uri()
    assert files.fetch(url, "whole.bin", "--flag").read_bytes() == bytes(10)
    with pytest.raises(UserError, match="cannot fetch .* point --flag at the file"):
        files.fetch(url + "gone", "gone.bin", "--flag")
    assert [path.name for path in (tmp_path / "hub/checkpoints").iterdir()] == ["whole.bin"]


def test_out_of_memory_is_a_sentence_on_a_cpu_too(capsys):
    for full in (lambda: torch.empty(10**15), lambda: bytes(10**15)):
        with pytest.raises(SystemExit), running.command(cli.new_parser("a test"), argparse.Namespace()):
            full()
        assert "out of memory" in capsys.readouterr().err


def test_a_renamed_class_is_another_data_set():
    whole = datasets.load("digits").train
    renamed = whole._replace(classes=[*whole.classes[:9], "nine"])
    assert imageset.fingerprint(whole) != imageset.fingerprint(renamed)


def test_digits_are_no_latents(sentence):
    assert "drawn as pixels" in sentence(dry_run, "--recipe", "imagenet")


def test_kept_commands_hold_no_absolute_path(tmp_path):
    assert cli.command_line_of("/x/sample.py",
                               [f"--out={tmp_path}/a", str(tmp_path / "b"), "--ipc", "1"]) == \
        "python sample.py --out=a b --ipc 1"


def test_an_absent_device_is_refused(sentence):
    import diffusion
    if not torch.cuda.is_available():
        assert "there is none here" in sentence(diffusion.main, "--device", "cuda")
    assert "none of auto, cpu" in sentence(diffusion.main, "--device", "tpu")


def test_a_split_keeps_the_shares_of_the_classes():
    labels = torch.tensor([0] * 80 + [1] * 20)
    kept, held = datasets.split(imageset.ImageSet(torch.zeros(100, 1, 8, 8, dtype=torch.uint8), labels,
                                                  ["a", "b"]), .2)
    assert held.labels.bincount().tolist() == [16, 4] and kept.labels.bincount().tolist() == [64, 16]
