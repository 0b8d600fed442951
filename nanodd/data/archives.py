"""CIFAR, Tiny-ImageNet and ImageNet's subsets: their published class lists, their archives and folders."""
import http.client
import pathlib
import re

import torch

from nanodd import processes
from nanodd.data import imageset
from nanodd.errors import UserError

# ----------------------------------------------------------------------------------------------------
# 1. The published class lists
#
# ImageNet's subsets in their published order, by WordNet id. The folder of a class, and its row in the
# published label table, are looked up by this id and never by a position in a directory.

IMAGENET100 = """
    n02869837 n01749939 n02488291 n02107142 n13037406 n02091831 n04517823 n04589890 n03062245 n01773797
    n01735189 n07831146 n07753275 n03085013 n04485082 n02105505 n01983481 n02788148 n03530642 n04435653
    n02086910 n02859443 n13040303 n03594734 n02085620 n02099849 n01558993 n04493381 n02109047 n04111531
    n02877765 n04429376 n02009229 n01978455 n02106550 n01820546 n01692333 n07714571 n02974003 n02114855
    n03785016 n03764736 n03775546 n02087046 n07836838 n04099969 n04592741 n03891251 n02701002 n03379051
    n02259212 n07715103 n03947888 n04026417 n02326432 n03637318 n01980166 n02113799 n02086240 n03903868
    n02483362 n04127249 n02089973 n03017168 n02093428 n02804414 n02396427 n04418357 n02172182 n01729322
    n02113978 n03787032 n02089867 n02119022 n03777754 n04238763 n02231487 n03032252 n02138441 n02104029
    n03837869 n03494278 n04136333 n03794056 n03492542 n02018207 n04067472 n03930630 n03584829 n02123045
    n04229816 n02100583 n03642806 n04336792 n03259280 n02116738 n02108089 n03424325 n01855672 n02090622
""".split()
SUBSETS = {
    "imagenette": "n01440764 n02102040 n02979186 n03000684 n03028079 n03394916 n03417042 n03425413 n03445777 "
                  "n03888257".split(),
    "imagewoof": "n02096294 n02093754 n02111889 n02088364 n02086240 n02089973 n02087394 n02115641 n02099601 "
                 "n02105641".split(),
    "imageidc": IMAGENET100[:10],                               # ImageNet-10 of Kim et al. 2022 (IDC)
    "imagenet100": IMAGENET100,
    "imagenet": None,                                           # all 1,000, sorted
}
CIFARS = {"cifar10": ("CIFAR10", "CIFAR-10", 10), "cifar100": ("CIFAR100", "CIFAR-100", 100)}


def imagenet_classes():
    """The 1,000 WordNet ids, sorted: row k of the published label tables is class k of this list."""
    from timm.data import ImageNetInfo                          # a slow import: only where it is needed
    return ImageNetInfo().label_names()


def class_list(name):
    """The published class list of an ImageNet subset called `name`; None for any other data set."""
    name = name.removesuffix("-validation")
    return (SUBSETS[name] or imagenet_classes()) if name in SUBSETS else None


# ----------------------------------------------------------------------------------------------------
# 2. CIFAR-10 and CIFAR-100


def cifar(name, root, recipe, skip_broken=False):
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009): 50,000 pictures of 32x32 to train on, 10,000 to test.

    They are read from class folders in ROOT/train and ROOT/test (or ROOT/val), else from the authors'
    archive. Either way the classes are in alphabetical order, and CIFAR-100's are the 100 fine ones.
    Returns (train, test, the split in words): two ImageSets of the recipe's size and channels. Raises
    UserError as cifar_archive and imageset.split_folders, or where images in folders are not 32x32.
    """
    from torchvision import datasets                            # a slow import: only where it is needed
    source, title, count = CIFARS[name]
    source = getattr(datasets, source)
    home = pathlib.Path(root or pathlib.Path(torch.hub.get_dir(), "datasets"))
    home = home.parent if home.name == source.base_folder else home
    if (home / "train").is_dir():
        listed = imageset.split_folders(home, imageset.test_folder(home), None, 3, title, count)
        train, test = (part._replace(skip_broken=skip_broken).read() for part in listed)
        for paths, part in zip(listed, (train, test), strict=True):
            if part.images.shape[2:] != (32, 32):               # resized images are another data set
                raise UserError(f"{paths.files[0]} and those beside it are not 32x32, as {title} is")
    else:
        train, test = cifar_archive(source, home)
    train, test = (part._replace(images=imageset.resize_and_crop(part.images, recipe.size, recipe.channels))
                   for part in (train, test))
    return train, test, f"{title}'s own split, "


def cifar_archive(source, home):
    """The archive of torchvision's class `source`, unpacked in `home`, and downloaded where it is missing.

    Returns (train, test), ImageSets of (N, 3, 32, 32). torchvision compares the files' checksums, so that
    half a download is fetched again. Raises UserError where the download fails, or where `home` holds class
    folders.
    """
    unpacked = home / source.base_folder
    if not unpacked.is_dir() and any(file.suffix.lower() in imageset.SUFFIXES for file in home.glob("*/*")):
        raise UserError(f"{home} holds class folders, but they should lie in {home}/train and {home}/test")

    def download():
        try:
            source(home, train=False, download=True)
        except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: the checksum
            raise UserError(f"{unpacked} is missing or damaged, and {source.url} cannot be fetched "
                            f"({error}): download and unpack it elsewhere, and point --root at the folder "
                            f"that holds {source.base_folder}") from error
    processes.on_first_process(download)

    def part(train):
        source_part = source(home, train=train)
        images = torch.from_numpy(source_part.data).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
        return imageset.ImageSet(images, torch.tensor(source_part.targets), list(source_part.classes))
    return part(True), part(False)


# ----------------------------------------------------------------------------------------------------
# 3. Tiny-ImageNet


def tiny_imagenet(root, recipe):
    """Tiny-ImageNet (Le & Yang 2015): 200 of ImageNet's classes at 64x64, 500 pictures each, and 50 to test.

    They are read from the archive, whose val/ is one folder of images with a list of labels, or from class
    folders in ROOT/train and ROOT/val (or ROOT/test). The classes are the sorted WordNet ids, as in folders;
    the order of wnids.txt is another one and is not used.
    Returns (train, test, the split in words), with ImageFiles. Raises UserError where a part is missing.
    """
    if root is None:
        raise UserError("--data tiny-imagenet needs --root DIR, a folder with the archive's train/ and val/ "
                        "in it")
    root = pathlib.Path(root)
    image_dir, ids = root / "val" / "images", root / "wnids.txt"
    contents = "wnids.txt, train/ and val/ of the archive, or class folders in train/ and val/"
    if not (root / "train").is_dir():
        raise UserError(f"there is no Tiny-ImageNet at {root}: it should hold {contents}, and {root}/train "
                        "is missing")
    if not any(image_dir.glob("*")):                            # somebody sorted it into class folders
        test_dir = imageset.test_folder(root, ("val", "test"))  # the archive's test/ has no labels
        parts = imageset.split_folders(root, test_dir, recipe.pixels, recipe.colours, "Tiny-ImageNet", 200)
        return *parts, "Tiny-ImageNet's own split, "
    if not ids.is_file():
        raise UserError(f"{ids} is missing, and {root}/val has no class folders: {root} should hold "
                        f"{contents}")
    classes = sorted(ids.read_text().split())
    imageset.check_folders(root / "train", classes, "Tiny-ImageNet")
    train = imageset.list_folder(root / "train", recipe.pixels, recipe.colours, classes)
    test = labelled_images(image_dir, root / "val" / "val_annotations.txt", train)
    return train, test, "Tiny-ImageNet's own split, "


def labelled_images(image_dir, annotations, train):
    """The images in the folder `image_dir`, labelled by lines "file, wnid, box" of the file `annotations`.

    train: ImageFiles, whose classes, size and channels the returned ImageFiles share.
    Raises UserError where files, lines and classes do not fit together.
    """
    if not annotations.is_file():
        raise UserError(f"{annotations} is missing: it says which class each picture of {image_dir} shows")
    wnids = dict(re.findall(r"^(\S+)[ \t]+(\S+)", annotations.read_text(), re.MULTILINE))
    unknown_ids = sorted(set(wnids.values()) - set(train.classes))
    if unknown_ids:
        raise UserError(f"{annotations} names {unknown_ids[0]}, which is no class of wnids.txt "
                        f"({len(unknown_ids)} such names in all)")
    paths = sorted(file for file in image_dir.glob("[!.]*") if file.suffix.lower() in imageset.SUFFIXES)
    unlabelled = [file for file in paths if file.name not in wnids]
    if unlabelled:
        raise UserError(f"{unlabelled[0]} has no line in {annotations.name} ({len(unlabelled)} of "
                        f"{len(paths)} pictures have none)")
    missing = sorted(set(wnids) - {file.name for file in paths})
    if missing:
        raise UserError(f"{image_dir}/{missing[0]} is missing ({len(missing)} of the {len(wnids)} pictures "
                        f"in {annotations.name} are)")
    empty_classes = sorted(set(train.classes) - {wnids[file.name] for file in paths})
    if empty_classes:
        raise UserError(f"{image_dir} has no picture of {empty_classes[0]} ({len(empty_classes)} of "
                        f"{len(train.classes)} classes have none)")
    labels = torch.tensor([train.classes.index(wnids[file.name]) for file in paths])
    return train._replace(files=paths, labels=labels)


# ----------------------------------------------------------------------------------------------------
# 4. ImageNet and its subsets


def imagenet(name, root, recipe):
    """ImageNet's folders, or fastai's archive of a subset: ROOT/train/<wnid>/*.JPEG, ROOT/val/<wnid>/*.JPEG.

    Returns (train, test, the split in words), with ImageFiles of the subset's classes; other folders are not
    read. The two sources are different data sets: ImageWoof has 12,454 training images in ImageNet, and 9,025
    in fastai's archive, which mixes ImageNet's two splits and divides them anew.
    Raises UserError where a class folder is missing.
    """
    if root is None:
        raise UserError(f"--data {name} needs --root DIR, a folder with ImageNet's train/ and val/ in it")
    parts, classes = [], class_list(name)
    for part in ("train", "val"):
        path = pathlib.Path(root, part)
        if not path.is_dir():
            raise UserError(f"there is no ImageNet at {root}: it should hold train/ and val/, and {path} is "
                            "missing")
        hint = " (the validation images must be sorted into class folders)" * (part == "val")
        imageset.check_folders(path, classes, name, hint)
        parts.append(imageset.list_folder(path, recipe.pixels, recipe.colours, classes))
    train, test = parts
    from_fastai = any(re.match(r"n\d{8}_", file.name) for file in test.files)  # a name of the training split
    return train, test, "fastai's re-split, " if from_fastai else "ImageNet's own split, "
