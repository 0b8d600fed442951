"""Mistakes that a sentence can explain, and text that is safe to print."""
import re


class UserError(ValueError):
    """An error that the user can correct; its message is a sentence that says how."""


def at_least(least, **values):
    """Raises UserError, naming the flag, where one of the values (None is skipped) is below `least`."""
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


def in_words(error):
    """What an exception says, on one line of at most 120 characters; its class where it says nothing."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def is_out_of_memory(error):
    """Whether an exception says that memory is full; on a CPU torch raises a plain RuntimeError for it."""
    words = "out of memory|can't allocate memory|Storage size calculation overflow"
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError)
                                              and re.search(words, str(error)) is not None)


def printable(text, encoding="utf-8"):
    """The text with escapes, such as \\x1b, for what a terminal would obey or what `encoding` cannot say.

    Class names, headers and file names come from other people's files. Newlines and tabs stay.
    """
    text = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)
