"""Whether plain data that was read from a file, JSON or a saved state, has the expected form.

A schema is a type (int does not mean bool; float takes a finite int, too), a function that says whether the
value is right, [schema] for a list, or {key: schema} for a dict: keys that end in "?" may be missing, and
further keys are allowed.
"""
import errno
import math
import os
from collections import Counter
from contextlib import contextmanager

from nanodd.errors import UserError, in_words, is_out_of_memory

# ----------------------------------------------------------------------------------------------------
# 1. Forms


def mismatch(value, schema, name="it"):
    """Where the value does not have the form of the schema, in words; None where it has."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return f"{name} is {shown(value)}, not a dict"
        wanted = {key.removesuffix("?"): part for key, part in schema.items() if not
                  (key.endswith("?") and key[:-1] not in value)}
        missing = [key for key in wanted if key not in value]
        if missing:
            return f"{name} lacks {missing[0]}"
        found = [mismatch(value[key], part, key) for key, part in wanted.items()]
        return next(filter(None, found), None)
    if isinstance(schema, list):
        if not isinstance(value, list):
            return f"{name} is {shown(value)}, not a list"
        found = (mismatch(part, schema[0], f"an entry of {name}") for part in value)
        return next(filter(None, found), None)
    if isinstance(schema, type):
        fits = isinstance(value, (int, float) if schema is float else schema)
        fits = fits and (schema is bool or not isinstance(value, bool))
        fits = fits and (schema is not float or abs(value) < math.inf)
        return None if fits else f"{name} is {shown(value)}, not of the type {schema.__name__}"
    return None if schema(value) else f"{name} is {shown(value)}"


def require(value, schema):
    """Returns the value. Raises ValueError where it does not have the form of the schema."""
    wrong = mismatch(value, schema)
    if wrong:
        raise ValueError(wrong)
    return value


def shown(value):
    """A value in a few words, for a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def between(low, high, kind=int):
    """The schema of a number (of the type `kind`) from low to high."""
    return lambda value: mismatch(value, kind) is None and low <= value <= high


def is_plain(value):
    """Whether a value is plain data, as JSON has it, without tensors, which == would not compare."""
    if isinstance(value, (list, tuple, dict)):
        return all(map(is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, (str, int, float))


def are_settings(value):
    """Whether a value is a dict of plain data."""
    return isinstance(value, dict) and is_plain(value)


def is_name(text):
    """Whether a class name can name a folder here: one plain path component of at most 255 bytes."""
    if not isinstance(text, str) or text in ("", ".", "..") or set(text) & {os.sep, os.altsep, "\0"}:
        return False
    try:
        return len(os.fsencode(text)) <= 255
    except UnicodeEncodeError:                                  # half of a surrogate pair
        return False


def are_names(classes):
    """Whether `classes` is a list of different names, each of which can name a folder."""
    return (isinstance(classes, list) and len(classes) > 0 and all(map(is_name, classes))
            and len(set(classes)) == len(classes))


def check_names(classes, path):
    """Raises UserError where class names that were read from `path` cannot name folders, or occur twice.

    A name such as "../photos" would make sample.py write outside of --out.
    """
    bad = [name for name in classes if not is_name(name)]
    if bad:
        raise UserError(f"{path} has a class called {shown(bad[0])}, which cannot be the name of a folder")
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice or not classes:
        raise UserError(f"{path} has the class {twice[0]} twice" if twice else f"{path} has no classes")


# ----------------------------------------------------------------------------------------------------
# 2. Reading


@contextmanager
def reading(path, kind, advice=""):
    """Turns what goes wrong in the block that reads the file `path` into a UserError: the file is damaged.

    kind: what it should be, "nanoDD checkpoint". advice: how to go on. A full memory, a disk that fails and a
    file that may not be read are not converted.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(f"{path} is not a file")                # a pipe would never end
    try:
        yield
    except Exception as error:                                  # a damaged file may raise anything
        is_ours = isinstance(error, (UserError, PermissionError)) or getattr(error, "errno", 0) == errno.EIO
        if is_ours or is_out_of_memory(error):
            raise
        raise UserError(f"{path} is damaged, or is not a {kind} ({in_words(error)}){advice}") from error
