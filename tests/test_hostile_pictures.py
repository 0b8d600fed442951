"""Pictures with damaged metadata are read; what cannot be read is a sentence; nothing takes gigabytes."""
import io
import os
import pathlib
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from conftest import ROOT, dry_run
from nanodd.data import datasets, imageset, pictures
from nanodd.errors import UserError, printable

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest undoes the filter of pictures.py
SHADES = np.random.default_rng(0).integers(0, 255, (32, 40, 3), dtype=np.uint8)
PICTURE = Image.fromarray(SHADES)


def in_bytes(image=PICTURE, kind="JPEG", **how):
    """An image as a file of that kind."""
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def exif(orientation=6):
    """Metadata with an orientation, a maker and a resolution."""
    tags = Image.Exif()
    tags[0x0112], tags[0x010F], tags[0x011A] = orientation, "maker", 72.0
    return tags


def read(data, size=None, channels=3, name="x.png"):
    """What open_image makes of a file of these bytes."""
    pathlib.Path(name).write_bytes(data)
    return imageset.open_image(pathlib.Path(name), size, channels)


def refusal(data, name="x.png"):
    """The sentence with which a file of these bytes is refused."""
    with pytest.raises(UserError, match=name) as refused:
        read(data, 8, name=name)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ----------------------------------------------------------------------------------------------------
# 1. Metadata


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_a_picture_is_turned_as_its_orientation_says(kind, orientation):
    data = in_bytes(kind=kind, exif=exif(orientation))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert torch.equal(read(data), torch.from_numpy(upright.copy()).permute(2, 0, 1))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_an_orientation_in_xmp_counts_too(kind):
    assert read(in_bytes(kind=kind, xmp=b'<x:xmpmeta tiff:Orientation="6"/>')).shape == (3, 40, 32)


def with_app1(block):
    """A JPEG with one block more of metadata."""
    plain = in_bytes()
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:]


def ifd(*entries):
    """An EXIF block of entries (tag, type, count, value or offset)."""
    table = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHLL", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<L", 8) + table + bytes(68)


TURNED = (0x0112, 3, 1, 6)                                      # the orientation tag: 16-bit, one value, 6


@pytest.mark.parametrize("block, turned", [
    (b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta title='\xa8\xb0'/>", False),
    (ifd(TURNED, (0x011A, 5, 1, 40), (0x9204, 10, 1, 40)), True),           # 0 / 0
    (ifd(TURNED, (0x0128, 5, 1, 38), (0x8769, 4, 1, 8)), True),             # a loop of tables
    (ifd(TURNED, (0x011A, 5, 1, 9999)), True),                              # beyond the end
    (ifd((0x0112, 2, 4, 0x00363636)), False),                               # the text "666"
    (ifd((0x0112, 5, 1, 9999)), False),
    (ifd(TURNED)[:18], False), (ifd(TURNED)[:30], True), (b"Exif\0\0no tables", False)])
def test_damaged_metadata_is_no_reason_to_refuse_a_picture(block, turned):
    plain, found = read(in_bytes()), read(with_app1(block))
    assert torch.equal(found, plain.transpose(1, 2).flip(2) if turned else plain)


def test_a_png_is_read_whatever_its_metadata_holds():
    chunk = b"eXIf" + b"no tables"
    plain = in_bytes(kind="PNG")
    data = plain[:33] + struct.pack(">L", len(chunk) - 4) + chunk + struct.pack(">L", zlib.crc32(chunk)) + \
        plain[33:]
    assert torch.equal(read(data), read(plain))


# ----------------------------------------------------------------------------------------------------
# 2. What is no picture


@pytest.mark.parametrize("data, words", [
    (b"", "it is empty"), (b"not a picture", "it is not a picture"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    (b"<!DOCTYPE html><html>", "web page"),
    (in_bytes()[:-300], "truncated"), (in_bytes(kind="EPS"), "EPS program"),
    (in_bytes(Image.new("1", (14_000, 14_000)), "PNG"), "196,000,000 pixels")])
def test_what_is_no_picture_is_said_to_be_what_it_is(data, words):
    assert words in refusal(data)


def test_a_picture_beyond_the_limit_is_to_be_shrunk():
    assert "shrink it" in refusal(in_bytes(Image.new("1", (20_000, 20_000)), "PNG"))


def fuzzed():
    """(kind, a sound file) of eleven kinds that folders hold, some under a wrong suffix."""
    grey16 = Image.fromarray((np.arange(1280, dtype=np.uint16) * 50).reshape(32, 40))
    few = PICTURE.quantize(16)
    return {"jpg": in_bytes(exif=exif()), "cmyk.jpg": in_bytes(PICTURE.convert("CMYK")),
            "xmp.jpg": in_bytes(xmp=b'<x:xmpmeta tiff:Orientation="6"/>'),
            "png": in_bytes(kind="PNG", exif=exif()), "palette.png": in_bytes(few, "PNG", transparency=3),
            "deep.png": in_bytes(grey16, "PNG"), "webp": in_bytes(kind="WEBP", exif=exif()),
            "bmp": in_bytes(kind="BMP"), "palette.bmp": in_bytes(few, "BMP"),
            "gif.png": in_bytes(kind="GIF", save_all=True, append_images=[PICTURE.rotate(90)]),
            "tiff.png": in_bytes(kind="TIFF", exif=exif())}


@pytest.mark.parametrize("kind", fuzzed())
def test_any_damage_is_a_sentence_or_a_picture(kind):
    whole, chance = fuzzed()[kind], random.Random(0)
    for _ in range(60):
        broken = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8))):            # mostly in the head: sizes, tags and chunks
            at = chance.randrange(min(len(broken), chance.choice((64, 200, len(broken)))))
            broken[at] = chance.choice((0, 255, chance.randrange(256)))
        if chance.random() < .2:
            broken = broken[:chance.randrange(len(broken))]
        try:
            assert read(broken, 32, name=f"x.{kind}").shape == (3, 32, 32)
        except UserError as error:
            assert f"x.{kind}" in str(error)


def test_a_full_memory_is_not_the_pictures_fault(monkeypatch):
    def full(*how):
        raise MemoryError
    monkeypatch.setattr("torchvision.transforms.functional.resize", full)
    with pytest.raises(MemoryError):
        read(in_bytes(), 8)


# ----------------------------------------------------------------------------------------------------
# 3. Large pictures


def test_a_picture_of_92_megapixels_is_read_without_a_word(pictures):
    Image.new("1", (10_000, 9_200), 1).save(pictures / "ant" / "large.png")
    code = ("import pathlib\nfrom nanodd.data import imageset\n"
            f"assert (imageset.open_image(pathlib.Path({str(pictures)!r}, 'ant/large.png'), 8) == 255).all()")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("kind, mode", [
    ("JPEG", "L"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "L"), ("PNG", "RGB"), ("PNG", "RGBA"),
    ("PNG", "P"), ("PNG", "I;16"), ("TIFF", "RGB")])
def test_a_large_picture_is_shrunk_before_it_is_converted(monkeypatch, kind, mode):
    ramp = np.tile(np.linspace(0, 255, 601).astype(np.uint8), (403, 1))
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else \
        Image.fromarray(ramp).convert(mode)
    data = in_bytes(image, kind, exif=exif())
    whole = read(data, 16)
    monkeypatch.setattr(pictures, "LARGE", 1000)
    assert (read(data, 16).int() - whole.int()).abs().max() <= 3
    assert read(data).shape == (3, 601, 403)                    # its size stays where none is asked for


def test_a_strip_of_pixels_is_cut_before_it_is_enlarged():
    """Enlarged whole, 60000x1 pixels would be 15 million by 256: 16 GB."""
    for size in ((60_000, 1), (1, 60_000)):
        assert (read(in_bytes(Image.new("L", size, 77), "PNG"), 256) == 77).all()
    wide = Image.fromarray(np.tile(np.arange(160, dtype=np.uint8), (10, 1)))
    assert read(in_bytes(wide, "PNG"), 10, 1)[0, 0].tolist() == list(range(75, 85))


# ----------------------------------------------------------------------------------------------------
# 4. Folders


def test_pictures_of_other_formats_are_counted_and_other_files_are_not(pictures, capsys):
    for name in ("x.gif", "y.TIF", "z.heic", "README.md", "labels.csv", ".w.gif"):
        (pictures / "bee" / name).write_bytes(b"")
    assert len(imageset.list_folder(pictures, 8, 3).files) == 20
    assert "skipped 3 files in" in (said := capsys.readouterr().out) and "bee/x.gif" in said
    (pictures / "ant" / "lost.png").symlink_to("nowhere.png")
    (pictures / "ant" / "circle.png").symlink_to("circle.png")
    assert len(imageset.list_folder(pictures, 8, 3).files) == 20
    assert "skipped 5 files in" in (said := capsys.readouterr().out) and "ant/circle.png" in said


def test_links_to_pictures_are_followed_and_loops_of_folders_are_not(pictures):
    (pictures / "ant" / "loop").symlink_to(pictures / "ant", target_is_directory=True)
    (pictures / "ant" / "self").symlink_to("self")
    (pictures / "ant" / "more").mkdir()
    (pictures / "ant" / "more" / "again.png").symlink_to(pictures / "bee" / "0.png")
    files = imageset.list_folder(pictures, 8, 3).files
    assert len(files) == 21 and pictures / "ant" / "more" / "again.png" in files and files == sorted(files)


def test_a_folder_that_cannot_be_listed_is_named(pictures, monkeypatch, sentence):
    def denied(folder):
        raise PermissionError(13, "Permission denied", str(folder))
    monkeypatch.setattr(os, "scandir", denied)
    assert f"cannot list {pictures}/ant: Permission denied" in sentence(dry_run, "--data", pictures)


def test_a_class_name_of_invalid_utf8_is_a_class_name(pictures, capsys):
    os.rename(pictures / "ant", os.fsencode(pictures) + b"/ant\xff")
    data = datasets.load(str(pictures))
    assert data.train.classes == ["ant\udcff", "bee"]
    for part in (data.train, imageset.list_folder(pictures, 8, 3)):
        assert imageset.fingerprint(part).endswith(r" ant\udcff bee")
    dry_run(["--data", str(pictures)])
    assert r"ant\udcff, bee" in capsys.readouterr().out


def test_what_a_terminal_would_obey_is_printed_as_escapes(pictures, capsys):
    (pictures / "ant" / "\x1b[2J.png").write_bytes(b"")
    imageset.read_set(pictures, 8, 3, skip_broken=True)
    assert r"\x1b[2J.png" in (said := capsys.readouterr().err) and "\x1b" not in said
    assert printable("é\udcff\n") == "é\\udcff\n" and printable("é", "ascii") == r"\xe9"


def test_a_command_says_which_picture_it_cannot_read(pictures, sentence):
    (pictures / "ant" / "3.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    said = sentence(dry_run, "--data", pictures)
    assert "ant/3.png" in said and "Git LFS pointer" in said and "1 of 20 images" in said
