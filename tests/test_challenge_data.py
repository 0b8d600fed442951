"""CIFAR and Tiny-ImageNet: every label goes by its class's name, from whatever files it comes."""
import hashlib
import io
import pickle
import tarfile
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from conftest import dry_run
from nanodd import cli, processes, recipes
from nanodd.data import datasets, imageset

FINE = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
    shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
    telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
""".split()
# The 20 superclasses of five, as the authors' page lists them.
BY_SUPERCLASS = """
    beaver dolphin otter seal whale                     aquarium_fish flatfish ray shark trout
    orchid poppy rose sunflower tulip                   bottle bowl can cup plate
    apple mushroom orange pear sweet_pepper             clock keyboard lamp telephone television
    bed chair couch table wardrobe                      bee beetle butterfly caterpillar cockroach
    bear leopard lion tiger wolf                        bridge castle house road skyscraper
    cloud forest mountain plain sea                     camel cattle chimpanzee elephant kangaroo
    fox porcupine possum raccoon skunk                  crab lobster snail spider worm
    baby boy girl man woman                             crocodile dinosaur lizard snake turtle
    hamster mouse rabbit shrew squirrel                 maple_tree oak_tree palm_tree pine_tree willow_tree
    bicycle bus motorcycle pickup_truck train           lawn_mower rocket streetcar tank tractor
""".split()
TEN = "airplane automobile bird cat deer dog frog horse ship truck".split()
WNIDS = ["n04067472", "n02124075", "n04540053"]                 # not sorted, as in the archive
OURS = {name: recipes.RECIPES[name] for name in ("cifar10", "cifar100", "tiny-imagenet")}


def write_cifar(home, source, names, patch):
    """The archive's layout in `home`, five pictures a class to train on and one to test, in no order.

    Returns {train: (images (N, 3, 32, 32) uint8, labels (N,))}. Its checksums become those of `source`.
    """
    here, random, written = home / source.base_folder, np.random.default_rng(0), {True: [], False: []}
    here.mkdir(parents=True)
    key, fine = ("labels", "label_names") if source is CIFAR10 else ("fine_labels", "fine_label_names")

    def save(name, content):
        (here / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((here / name).read_bytes()).hexdigest()]
    for part, each in (("train_list", 5), ("test_list", 1)):
        sums, files = [], getattr(source, part)
        for (name, _), labels in zip(files, np.array_split(random.permutation(len(names) * each), len(files)),
                                     strict=True):
            labels = labels % len(names)
            images = random.integers(0, 256, (len(labels), 3, 32, 32)).astype(np.uint8)
            # A row of the file is 1024 reds, 1024 greens, 1024 blues.
            sums.append(save(name, {"data": images.reshape(len(labels), 3072), key: labels.tolist()}))
            written[part == "train_list"].append((torch.from_numpy(images), torch.from_numpy(labels)))
        patch.setattr(source, part, sums)
    name, found = save(source.meta["filename"], {fine: names, "coarse_label_names": ["unused"]})
    patch.setattr(source, "meta", {"filename": name, "key": fine, "md5": found})
    return {part: [torch.cat(tensors) for tensors in zip(*found, strict=True)]
            for part, found in written.items()}


def write_folders(root, parts, names, held="test"):
    """The same as root/train/<class>/*.png and root/test/<class>/*.png."""
    for train, (images, labels) in parts.items():
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / ("train" if train else held) / names[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            imageset.write_png(path, image)


def write_tiny(root, wnids=WNIDS, each=5):
    """Tiny-ImageNet's layout: `each` pictures a class to train on, two to test; class k is of grey 40 * k."""
    (root / "val" / "images").mkdir(parents=True)
    (root / "test" / "images").mkdir(parents=True)              # the archive's, without labels
    Image.new("RGB", (64, 64)).save(root / "test" / "images" / "test_0.JPEG")
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in wnids))
    lines = []
    for k, wnid in enumerate(sorted(wnids)):
        grey = 40 * k % 256
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        (folder.parent / f"{wnid}_boxes.txt").write_text("")
        for i in range(each):                                   # some of the real ones are grey, too
            picture = Image.new("L", (64, 64), grey).convert("L" if i == 0 else "RGB")
            picture.save(folder / f"{wnid}_{i}.JPEG")
        for i in (k, k + len(wnids)):
            Image.new("RGB", (64, 64), (grey,) * 3).save(root / "val" / "images" / f"val_{i}.JPEG")
            lines.append(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    return root


@pytest.fixture(autouse=True)
def whole_recipes(workplace, monkeypatch):
    """The recipes themselves, at the pictures' own size, whatever the other tests shrink."""
    for name, recipe in OURS.items():
        monkeypatch.setitem(recipes.RECIPES, name, recipe)


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """(its home, what was written)"""
    return tmp_path / "files", write_cifar(tmp_path / "files", CIFAR100, FINE, monkeypatch)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and an empty hub cache."""
    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.mark.parametrize("name, source, names, title", [("cifar10", CIFAR10, TEN, "CIFAR-10"),
                                                        ("cifar100", CIFAR100, FINE, "CIFAR-100")])
def test_the_archive_is_read_as_it_was_written(tmp_path, monkeypatch, offline, name, source, names, title):
    parts = write_cifar(tmp_path / "hub" / "datasets", source, names, monkeypatch)
    found = datasets.load(name)                                 # no --root: torch's hub cache
    for part, train in ((found.train, True), (found.test, False)):
        assert torch.equal(part.images, parts[train][0]) and torch.equal(part.labels, parts[train][1])
        assert part.images.dtype == torch.uint8 and part.labels.dtype == torch.int64
    assert found.train.classes == found.test.classes == names
    assert found.name == name and found.recipe is recipes.RECIPES[name]
    assert found.cut == f"{title}'s own split, {5 * len(names)} images to train on, {len(names)} to test"


def test_labels_are_in_alphabetical_order_and_not_by_superclass(cifar100):
    home, _ = cifar100
    classes = datasets.load("cifar100", str(home)).train.classes
    assert classes == FINE == sorted(FINE) and sorted(BY_SUPERCLASS) == FINE
    # A generator that takes label k for the k-th of the authors' list draws snakes right, and nothing else.
    same = [k for k in range(100) if classes[k] == BY_SUPERCLASS[k]]
    assert same == [78] and classes[78] == "snake"


@pytest.mark.parametrize("held", ["test", "val"])
def test_class_folders_give_the_same_labels_as_the_archive(cifar100, tmp_path, offline, held):
    home, parts = cifar100
    write_folders(tmp_path / "folders", parts, FINE, held)
    archive, folders = datasets.load("cifar100", home), datasets.load("cifar100", tmp_path / "folders")
    assert folders.train.classes == archive.train.classes and folders.cut == archive.cut
    for one, two in ((archive.train, folders.train), (archive.test, folders.test)):
        pairs = [{(bytes(image.numpy()), int(label)) for image, label in zip(part.images, part.labels,
                                                                             strict=True)}
                 for part in (one, two)]
        assert pairs[0] == pairs[1] and len(pairs[0]) == len(one.labels)


def test_class_folders_must_be_the_data_sets_own(cifar100, tmp_path, offline, sentence):
    home, parts = cifar100
    root = tmp_path / "folders"
    write_folders(root, parts, FINE)
    said = sentence(dry_run, "--data", "cifar10", "--root", root)
    assert "has 100 class folders, but CIFAR-10 10 classes" in said
    for path in (root / "test").rglob("*.png"):
        Image.new("RGB", (64, 64)).save(path)
    said = sentence(dry_run, "--data", "cifar100", "--root", root)
    assert "test/apple" in said and "not 32x32, as CIFAR-100 is" in said
    (root / "test").rename(tmp_path / "elsewhere")
    assert "needs" in sentence(dry_run, "--data", "cifar100", "--root", root)
    said = sentence(dry_run, "--data", "cifar100", "--root", root / "train")
    assert "train/train needs" in said                          # a class of CIFAR-100: trains
    (root / "train" / "train").rename(tmp_path / "trains")
    said = sentence(dry_run, "--data", "cifar100", "--root", root / "train")
    assert "holds class folders, but they should lie in" in said and "fetched" not in said


class Answer(io.BytesIO):
    """What urlopen returns of a server that has the archive."""
    url, length = CIFAR100.url, None


def test_the_archive_is_fetched_again_only_where_it_was_damaged(cifar100, tmp_path, monkeypatch, sentence):
    home, parts = cifar100
    with tarfile.open(tmp_path / "archive", "w:gz") as tar:
        tar.add(home / CIFAR100.base_folder, CIFAR100.base_folder)
    whole, fetched = (tmp_path / "archive").read_bytes(), []

    def serve(sent):
        def urlopen(request):
            fetched.append(request.full_url)
            return Answer(sent)
        return urlopen
    monkeypatch.setattr("urllib.request.urlopen", serve(whole))
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(whole).hexdigest())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for _ in range(2):
        assert torch.equal(datasets.load("cifar100").train.images, parts[True][0])
        assert set(fetched) == {CIFAR100.url} and len(fetched) == 2  # one looks for a redirection
    here = tmp_path / "hub" / "datasets"
    (here / CIFAR100.base_folder / "train").write_bytes(b"cut off")
    # unpacked again
    assert torch.equal(datasets.load("cifar100").train.images, parts[True][0]) and len(fetched) == 2
    (here / CIFAR100.base_folder / "train").write_bytes(b"cut off")
    (here / CIFAR100.filename).write_bytes(whole[:-9])
    assert torch.equal(datasets.load("cifar100").train.images, parts[True][0]) and len(fetched) == 4
    (here / CIFAR100.base_folder / "train").write_bytes(b"cut off")
    (here / CIFAR100.filename).unlink()
    monkeypatch.setattr("urllib.request.urlopen", serve(whole[:-9]))
    said = sentence(dry_run, "--data", "cifar100")
    assert "is missing or damaged" in said and "point --root at the folder that holds" in said


@pytest.mark.parametrize("words", [[], ["--root", "nowhere"]])
def test_without_a_network_a_sentence_says_where_cifar_is(offline, sentence, words):
    said = sentence(dry_run, "--data", "cifar100", *words)
    assert "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz" in said and "no route to host" in said
    assert "point --root at the folder that holds cifar-100-python" in said


def test_only_the_first_process_fetches(cifar100, tmp_path, monkeypatch, offline):
    home, parts = cifar100
    hidden = home.rename(tmp_path / "hidden")
    monkeypatch.setattr(processes, "rank", lambda: 1)
    monkeypatch.setattr(processes, "world", lambda: 2)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list",
                        lambda _, **group: hidden.rename(home))
    assert torch.equal(datasets.load("cifar100", home).train.images, parts[True][0])


def test_cifar_takes_any_recipe_of_pixels(cifar100, sentence, capsys):
    home, parts = cifar100
    small = datasets.load("cifar100", home, "digits")
    assert small.recipe is recipes.RECIPES["digits"] and small.train.images.shape == (500, 1, 8, 8)
    words = ["--data", "cifar100", "--root", str(home)]
    assert "drawn as pixels" in sentence(dry_run, *words, "--recipe", "imagenet")
    held = datasets.load("cifar100", home, validation=True)
    seen = {bytes(image.numpy()) for image in parts[True][0]}
    assert held.name == "cifar100-validation" and held.test.labels.bincount().tolist() == [1] * 100
    assert all(bytes(image.numpy()) in seen for image in held.test.images)
    dry_run(words)
    assert "cifar100 | CIFAR-100's own split, 500 images" in capsys.readouterr().out


def test_tiny_imagenets_labels_are_sorted_wordnet_ids(tmp_path, capsys):
    root = write_tiny(tmp_path / "tiny")
    assert (root / "wnids.txt").read_text().split() != sorted(WNIDS)
    found = datasets.load("tiny-imagenet", root)
    assert found.train.classes == sorted(WNIDS) and found.name == "tiny-imagenet"
    assert found.cut == "Tiny-ImageNet's own split, 15 images to train on, 6 to test"
    for part, each in ((found.train, 5), (found.test, 2)):
        assert part.images.shape == (3 * each, 3, 64, 64) and part.labels.bincount().tolist() == [each] * 3
        grey = part.images.float().mean(dim=(1, 2, 3))          # 40 * k in class k
        assert torch.equal((grey / 40).round().long(), part.labels)
    (root / "wnids.txt").write_text("\n".join(sorted(WNIDS)))   # another order, the same data set
    assert imageset.fingerprint(datasets.load("tiny-imagenet",
                                              root).train) == imageset.fingerprint(found.train)
    assert datasets.load("tiny-imagenet", root, "cifar100").train.images.shape == (15, 3, 32, 32)
    held = datasets.load("tiny-imagenet", root, validation=True)
    assert (held.name, len(held.train.labels), len(held.test.labels)) == ("tiny-imagenet-validation", 12, 3)
    dry_run(["--data", "tiny-imagenet", "--root", str(root)])
    assert "train | (15, 3, 64, 64) torch.uint8 | 5 to 5 images a class" in capsys.readouterr().out


def test_tiny_imagenet_is_read_from_class_folders_too(tmp_path, sentence):
    wnids = [f"n{k:08}" for k in range(200)]
    root = write_tiny(tmp_path / "tiny", wnids, each=1)
    heap = root / "val" / "images"
    for k, wnid in enumerate(wnids):                            # as many scripts sort the heap
        (root / "val" / wnid).mkdir()
        (heap / f"val_{k}.JPEG").rename(root / "val" / wnid / f"val_{k}.JPEG")
        (heap / f"val_{k + 200}.JPEG").unlink()
    heap.rmdir()
    found = datasets.load("tiny-imagenet", root)                # val/ and not test/, which has no labels
    assert found.train.classes == found.test.classes == wnids
    assert found.train.labels.tolist() == found.test.labels.tolist() == list(range(200))
    (root / "train" / wnids[7]).rename(tmp_path / "elsewhere")
    said = sentence(dry_run, "--data", "tiny-imagenet", "--root", root)
    assert "has 199 class folders, but Tiny-ImageNet 200 classes" in said


def test_what_is_wrong_with_tiny_imagenet_is_said(tmp_path, sentence, capsys):
    assert "needs --root DIR" in sentence(dry_run, "--data", "tiny-imagenet")
    (tmp_path / "empty").mkdir()
    said = sentence(dry_run, "--data", "tiny-imagenet", "--root", tmp_path / "empty")
    assert "should hold wnids.txt, train/ and val/" in said and "empty/train is missing" in said
    root = write_tiny(tmp_path / "tiny")
    words, ids, notes = ["--data", "tiny-imagenet", "--root", root], root / "wnids.txt", \
        root / "val" / "val_annotations.txt"
    ids.rename(tmp_path / "ids")
    said = sentence(dry_run, *words)
    assert "wnids.txt is missing, and" in said and "val has no class folders" in said
    (tmp_path / "ids").rename(ids)
    lines = notes.read_text()
    notes.write_text("".join(line for line in lines.splitlines(True) if WNIDS[0] not in line))
    said = sentence(dry_run, *words)
    assert "val_2.JPEG" not in said and "val_1.JPEG has no line" in said and "2 of 6 pictures" in said
    notes.write_text(lines.replace(WNIDS[0], "n00000001"))
    assert "names n00000001, which is no class of wnids.txt" in sentence(dry_run, *words)
    notes.write_text(lines.replace(WNIDS[0], WNIDS[1]))
    said = sentence(dry_run, *words)
    assert f"has no picture of {WNIDS[0]} (1 of 3 classes have none)" in said
    notes.write_text(lines + f"val_99.JPEG\t{WNIDS[0]}\t0\t0\t9\t9\n")
    assert "val_99.JPEG is missing (1 of the 7 pictures" in sentence(dry_run, *words)
    notes.unlink()
    assert "val_annotations.txt is missing" in sentence(dry_run, *words)
    notes.write_text(lines)
    (root / "val" / "images" / "val_0.JPEG").write_bytes(b"no picture")
    assert "val_0.JPEG" in (said := sentence(dry_run, *words)) and "--skip-broken" in said
    assert len(datasets.load("tiny-imagenet", root, skip_broken=True).test.labels) == 5
    assert "left out: cannot read the image" in capsys.readouterr().err
    (root / "train" / WNIDS[2]).rename(tmp_path / "elsewhere")
    said = sentence(dry_run, *words)
    assert f"{WNIDS[2]} is missing, and 1 of the 3 classes of Tiny-ImageNet" in said
    (root / "train").rename(tmp_path / "train")
    assert "train is missing" in sentence(dry_run, *words)


@pytest.mark.parametrize("name", recipes.BUILT_IN)
def test_no_folder_shares_the_name_of_a_built_in_data_set(tmp_path, pictures, sentence, name):
    pictures.rename(tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / name)
    said = sentence(dry_run, "--data", tmp_path / name)
    assert f"would share out/{name} with a built-in data set" in said
    assert (f"--data {name} --root" in said) == (name != "digits")


def test_own_pictures_borrow_the_challenges_recipes(pictures):
    found = datasets.load(str(pictures), recipe="cifar100")
    assert found.recipe is recipes.RECIPES["cifar100"] and found.train.images.shape == (16, 3, 32, 32)
    assert datasets.load(str(pictures), recipe="tiny-imagenet").train.images.shape == (16, 3, 64, 64)


def test_the_recipes_have_the_challenges_constants():
    cifar, tiny = recipes.RECIPES["cifar100"], recipes.RECIPES["tiny-imagenet"]
    assert (cifar.mean, cifar.std) == ((.5071, .4866, .4409), (.2673, .2564, .2762))
    assert (tiny.mean, tiny.std) == ((.485, .456, .406), (.229, .224, .225))
    for name, recipe in OURS.items():
        assert (recipe.size // recipe.patch) ** 2 == 256 and recipe.judge_size == recipe.size
        assert (recipe.name, recipe.protocol, recipe.augment) == (name, "challenge", "")
        assert recipes.own_recipe(name) == name
    assert recipes.RECIPES["digits"].protocol == recipes.RECIPES["folder"].protocol == "short"


def test_the_next_command_asks_for_the_root_where_one_is_needed():
    parser = cli.new_parser("")
    cli.add_flags(parser, "data root validation")
    for words, said in (("", ""), ("--data cifar10", " --data cifar10"),
                        ("--data tiny-imagenet", " --data tiny-imagenet --root DIR"),
                        ("--data cifar100 --root x", " --data cifar100 --root x")):
        assert cli.data_flags(parser.parse_args(words.split())) == said
