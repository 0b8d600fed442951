"""Foreign, damaged and hostile .npz files are refused with one sentence that says how to convert them."""
import io
import pathlib
import re
import struct
import zipfile

import numpy as np
import pytest
import torch

import train_eval
from nanodd.data import imageset
from nanodd.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 255, (4, 3, 8, 8), dtype=np.uint8)
LABELS, CLASSES = np.array([0, 0, 1, 1]), ["cat", "dog"]
ONE_HOT = np.eye(2, dtype=np.int64)[LABELS]


def saved(**change):
    """The path of an .npz of four images, with one of its arrays changed, or left out where it is None."""
    arrays = {"images": IMAGES, "labels": LABELS, "classes": CLASSES, **change}
    np.savez("set.npz", **{name: array for name, array in arrays.items() if array is not None})
    return pathlib.Path("set.npz")


def packed(member, header, body=b"", how=zipfile.ZIP_STORED):
    """The same, with the array `member` in bytes: the header that numpy reads, and what follows it."""
    whole = zipfile.ZipFile(saved())
    with zipfile.ZipFile("packed.npz", "w", how) as archive:
        for name in whole.namelist():
            array = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + body
            archive.writestr(name, array if name == f"{member}.npy" else whole.read(name))
    return pathlib.Path("packed.npz")


def refusal(path):
    """The sentence with which the file is refused; it names the file, and nothing else is raised."""
    with pytest.raises(UserError, match=path.name) as refused:
        imageset.read_set(path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 500
    return str(refused.value)


@pytest.mark.parametrize("change", [
    {"labels": LABELS[:, None]}, {"labels": LABELS.astype(">i4")}, {"labels": LABELS.astype(np.uint8)},
    {"images": np.asfortranarray(IMAGES)}, {"images": IMAGES[:, ::-1][:, ::-1]},
    {"classes": np.array([b"cat", b"dog"])}])
def test_sound_sets_are_read_however_numpy_saved_them(change):
    found = imageset.read_set(saved(**change))
    assert torch.equal(found.images, torch.from_numpy(IMAGES))
    assert found.labels.tolist() == [0, 0, 1, 1] and found.labels.dtype == torch.int64
    assert found.classes == ["cat", "dog"]


@pytest.mark.parametrize("how", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packed_sets_are_read(how):
    with zipfile.ZipFile(saved()) as whole, zipfile.ZipFile("packed.npz", "w", how) as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
    assert torch.equal(imageset.read_set("packed.npz").images, torch.from_numpy(IMAGES))


def test_numbers_are_class_names_in_decimal_and_bytes_are_utf8():
    assert imageset.read_set(saved(classes=[0, 11])).classes == ["0", "11"]
    assert imageset.read_set(saved(classes=[b"a", "ö".encode()])).classes == ["a", "ö"]


@pytest.mark.parametrize("change, found, wanted", [
    ({"labels": ["cat", "cat", "dog", "dog"]}, "text (4,)", "list(classes).index(name)"),
    ({"labels": ONE_HOT}, "int64 (4, 2)", "labels.argmax(1)"),
    ({"labels": ONE_HOT.astype(np.float32)}, "float32 (4, 2)", "labels.argmax(1)"),
    ({"labels": LABELS * .6}, "float64 (4,)", "must be integers"),
    ({"labels": LABELS == 1}, "bool (4,)", "must be integers"),
    ({"labels": LABELS.astype(object)}, "Python objects (4,)", "must be integers"),
    ({"labels": np.int64(0)}, "a single value", "each of the 4 images"),
    ({"labels": LABELS[:3]}, "int64 (3,)", "each of the 4 images"),
    ({"labels": LABELS - 1}, "-1..0", "0..1"),
    ({"labels": LABELS.astype(np.uint64) * 2**63}, "0..9223372036854775808", "0..1"),
    ({"images": IMAGES / np.float32(255)}, "float32", "(images * 255).round().astype(np.uint8)"),
    ({"images": IMAGES.astype(np.int64)}, "int64", "images.astype(np.uint8)"),
    ({"images": IMAGES.transpose(0, 2, 3, 1)}, "uint8 (4, 8, 8, 3)", "images.transpose(0, 3, 1, 2)"),
    ({"images": IMAGES[:, 0]}, "uint8 (4, 8, 8)", "images[:, None]"),
    ({"images": IMAGES[:, [0, 1, 2, 0]]}, "uint8 (4, 4, 8, 8)", "1 or 3 channels"),
    ({"images": np.array(["a", "b", "c", "d"])}, "text", "uint8"),
    ({"images": np.zeros(4, [("r", "u1"), ("g", "u1")])}, "records", "uint8"),
    ({"images": IMAGES.astype(object)}, "Python objects", "uint8"),
    ({"images": IMAGES[:, :, :0]}, "uint8 (4, 3, 0, 8)", "must be at least 1"),
    ({"images": IMAGES[:0], "labels": LABELS[:0]}, "uint8 (0, 3, 8, 8)", "must be at least 1"),
    ({"classes": "cat"}, "a single value", "one name for each class"),
    ({"classes": ["cat", "cat"]}, "the class cat twice", ""),
    ({"classes": ["cat", "../dog"]}, "'../dog'", "name of a folder"),
    ({"classes": np.array(CLASSES, object)}, "Python objects", "np.array(classes, dtype=str)"),
    ({"classes": [.5, 1]}, "float64", "np.array(classes, dtype=str)"),
    ({"classes": [b"cat", b"\xff"]}, r"b'\xff'", "UTF-8"),
    ({"classes": None}, "holds 'images', 'labels'", "classes (K,) names"),
    ({"images": None, "train_images": IMAGES}, "'train_images'", "images (N, C, H, W) uint8")])
def test_what_is_found_is_said_beside_what_is_wanted(change, found, wanted):
    said = refusal(saved(**change))
    assert found in said and wanted in said


def damage(start, new):
    data = bytearray(saved().read_bytes())
    data[start:start + len(new)] = new
    return bytes(data)


def encrypted():
    """The flag that says so, in the zip's list of its members."""
    data = bytearray(saved().read_bytes())
    for at in re.finditer(b"PK\1\2", data):
        data[at.start() + 8] |= 1
    return bytes(data)


@pytest.mark.parametrize("make, words", [
    (lambda: b"", "it is empty"),
    (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    (lambda: b"<!DOCTYPE html><html>", "web page"),
    (lambda: zipfile.ZipFile(saved()).read("images.npy"), "single array (.npy)"),
    (lambda: saved().read_bytes()[:900], "cut off"),
    (lambda: b"images", "not a zip archive"),
    (lambda: damage(600, b"\1\2\3\4"), "damaged"),
    (encrypted, "encrypted")])
def test_a_file_that_is_no_sound_npz_is_said_to_be_what_it_is(make, words):
    pathlib.Path("broken.npz").write_bytes(make())
    assert words in refusal(pathlib.Path("broken.npz"))


def test_a_folder_and_a_missing_file_are_no_npz():
    pathlib.Path("folder.npz").mkdir()
    assert "is not a file" in refusal(pathlib.Path("folder.npz"))
    assert "there is no" in refusal(pathlib.Path("nowhere.npz"))


@pytest.mark.parametrize("header", [
    b"-" * 9000 + b"1", b"(" * 9000, b"{'a':" * 1500 + b"1" + b"}" * 1500, b"\xff" * 50, b"",
    b"{'descr': '|u1', 'fortran_order': False, 'shape': (10000000, 3, 1000, 1000), }",
    b"{'descr': '|u1', 'fortran_order': False, 'shape': (-4, -3, 8, 8), }",
    b"{'descr': '|u1', 'fortran_order': False, 'shape': (4., 3, 8, 8), }",
    b"{'descr': '|u1', 'fortran_order': False, 'shape': (" + b"9" * 4000 + b",), }",
    b"{'descr': '|V9999999999', 'fortran_order': False, 'shape': (4, 3, 8, 8), }",
    b"{'descr': '|O', 'fortran_order': False, 'shape': (4, 3, 8, 8), }"],
    ids=lambda header: str(header[:60]))
def test_a_header_that_lies_or_is_none_is_refused(header):
    refusal(packed("images", header, IMAGES.tobytes()))


def test_a_billion_empty_class_names_are_refused():
    """They take no bytes in the file, and tens of gigabytes as Python's texts."""
    for empty in (b"<U0", b"|S0"):
        header = b"{'descr': '%s', 'fortran_order': False, 'shape': (1000000000,), }" % empty
        refusal(packed("classes", header))


def test_class_names_beyond_unicode_are_refused():
    refusal(packed("classes", b"{'descr': '<U2', 'fortran_order': False, 'shape': (2,), }", b"\xff" * 16))


def test_class_names_of_invalid_utf8_come_back():
    names = ["\udc80a", "b\udcff"]                              # as Python reads such names of folders
    assert imageset.read_set(saved(classes=names)).classes == names


def test_an_array_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(monkeypatch):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False,
                                                "shape": (4, 3, 500, 500)})
    with zipfile.ZipFile("bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", head.getvalue() + bytes(3_000_000))
        for name, array in (("labels", LABELS), ("classes", CLASSES)):
            file = io.BytesIO()
            np.save(file, array)
            archive.writestr(f"{name}.npy", file.getvalue())
    assert len(imageset.read_set("bomb.npz").images) == 4       # it is small enough
    monkeypatch.setattr(imageset.npz, "BOMB", (2_000_000, 100))
    monkeypatch.setattr(imageset.npz, "unpacked", None)
    assert "unpack from" in refusal(pathlib.Path("bomb.npz"))


def test_a_packed_size_beyond_the_file_is_refused():
    data = bytearray(saved().read_bytes())
    at = data.find(b"PK\1\2")                                   # the entry of the images
    data[at + 20:at + 24] = struct.pack("<L", 10**9)
    pathlib.Path("large.npz").write_bytes(data)
    assert "damaged" in refusal(pathlib.Path("large.npz"))


def test_any_damage_is_a_sentence_or_does_no_harm():
    whole, random = saved().read_bytes(), np.random.default_rng(0)
    for _ in range(400):
        broken = bytearray(whole)
        for _ in range(random.choice((1, 2, 8))):
            broken[random.integers(len(broken))] = random.integers(256)
        pathlib.Path("broken.npz").write_bytes(broken[:random.choice((len(broken), len(broken), 900))])
        try:
            found = imageset.read_set("broken.npz")
        except UserError:
            continue
        assert found.images.shape == (4, 3, 8, 8) and set(found.labels.tolist()) == {0, 1}


def test_a_strip_of_pixels_is_cut_before_it_is_enlarged():
    strip = np.full((4, 3, 1, 60_000), 77, np.uint8)
    assert (imageset.read_set(saved(images=strip), 64).images == 77).all()


def test_train_eval_says_what_is_wrong_with_an_npz(sentence, pictures):
    path = saved(images=IMAGES.transpose(0, 2, 3, 1))
    assert "images.transpose(0, 3, 1, 2)" in sentence(train_eval.main, path, "--data", pictures)
