"""Which files are pictures, and one of them as a PIL image, whatever program wrote it.

A picture that cannot be read is a UserError that names the file. Damaged metadata is no reason to refuse a
picture whose pixels can be read.
"""
import os
import pathlib
import threading
import warnings
from contextlib import contextmanager, nullcontext

from PIL import ExifTags, Image, UnidentifiedImageError

from nanodd import files
from nanodd.errors import UserError, in_words, is_out_of_memory

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PASSED_OVER = (".gif", ".tif", ".tiff", ".heic", ".avif")       # of pictures, too, but they are not read
LARGE = 89_478_485             # pixels of which Pillow warns; it refuses twice as many, 178,956,970
ONE_LARGE = threading.Lock()   # one such picture takes 0.7 GB, and a pool would decode one on each core
AVERAGED = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")          # modes whose values can be averaged
TRANSPOSE = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
             4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
             6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}

# Pillow warns of large pictures and of damaged metadata, but both are read here. The filter is not set around
# each picture, because warnings.catch_warnings is not safe in the threads that decode.
for category in (Image.DecompressionBombWarning, UserWarning):
    warnings.filterwarnings("ignore", category=category, module=r"PIL\.")

# ----------------------------------------------------------------------------------------------------
# 1. Which files are pictures


def image_files(folder):
    """The images in `folder` and its subfolders, and the pictures that are passed over: two sorted lists.

    Links to files are followed, links to folders (which may form a loop) are not.
    """
    found, passed_over, folders = [], [], [folder] if folder.is_dir() else []
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                file = pathlib.Path(entry)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(file)
                elif entry.name.startswith(".") or file.suffix.lower() not in SUFFIXES + PASSED_OVER:
                    continue
                elif file.suffix.lower() in SUFFIXES and file.is_file():
                    found.append(file)
                elif not file.is_dir():
                    passed_over.append(file)
    return sorted(found), sorted(passed_over)


# ----------------------------------------------------------------------------------------------------
# 2. One picture


@contextmanager
def decoded(path, size=None):
    """Yields the picture in `path`, decoded and upright; a large one may be shrunk to 4 times `size`.

    Raises UserError, naming the file, where the picture cannot be read, or where the block cannot convert it.
    MemoryError passes.
    """
    try:
        with Image.open(path) as image, ONE_LARGE if is_large(image) else nullcontext():
            if image.format == "EPS":                           # Pillow would let Ghostscript run it
                raise UserError(f"cannot read the image {path}: it is an EPS program, and pixels are wanted")
            yield upright(image, size if is_large(image) else None)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"cannot read the image {path}: {too_large(error)}; shrink it, for example with "
                        "Pillow's Image.thumbnail or ImageMagick's mogrify -resize") from error
    except UnidentifiedImageError as error:
        raise UserError(f"cannot read the image {path}: {files.foreign(path) or 'it is not a picture'}; a "
                        "picture that Pillow reads, such as a PNG or JPEG, is wanted") from error
    except Exception as error:                                  # a damaged file may raise anything
        if is_out_of_memory(error):
            raise
        raise UserError(f"cannot read the image {path}: {in_words(error)}") from error


def is_large(image):
    """Whether an image has so many pixels that it is decoded alone."""
    return image.width * image.height > LARGE


def too_large(error):
    """What Pillow's error says of the number of pixels, in words; some formats do not tell the number."""
    numbers = [int(word) for word in str(error).replace("(", " ").split() if word.isdigit()]
    if len(numbers) == 2:
        return f"it has {numbers[0]:,} pixels, and at most {numbers[1]:,} are read"
    return f"it has more than the {2 * LARGE:,} pixels that are read"


def upright(image, size=None):
    """The image, decoded and turned as its orientation tag says; with `size`, shrunk where it is much larger.

    The rest of the metadata is not touched: ImageOps.exif_transpose would write it anew, and fails where it
    is damaged.
    """
    width, height = image.size
    scale = 4 * size / min(width, height) if size else 1
    if size:
        image.draft(None, (4 * size, 4 * size))                 # a JPEG is decoded at 1/2, 1/4 or 1/8
    image.load()                                                # a TIFF is turned here, by Pillow
    turned = TRANSPOSE.get(orientation(image))
    if scale < 1 and image.mode in AVERAGED and "transparency" not in image.info:
        smaller = round(width * scale), round(height * scale)
        image = image.resize(smaller, Image.Resampling.BOX, reducing_gap=2)
    return image.transpose(turned) if turned is not None else image


def orientation(image):
    """The orientation tag of an image, 1 (upright) where the metadata is too damaged to say."""
    try:
        tag = image.getexif().get(ExifTags.Base.Orientation, 1)
        return tag if tag in TRANSPOSE else 1
    except Exception:                                           # damaged metadata may raise anything
        return 1
