"""Mistakes that a sentence can explain: one line on stderr and exit code 2, in place of a traceback."""
import errno
import re
from contextlib import contextmanager


class UserError(ValueError):
    """An error that the user can correct; its message is a sentence that says how."""


def at_least(least, **values):
    """Raises UserError, naming the flag, where one of the values (None is skipped) is below `least`."""
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


@contextmanager
def exit_on_user_error(parser, again="the same command resumes"):
    """Turns a UserError, a full disk or memory, or Ctrl-C in the block into one line on stderr, exit code 2.

    Any other exception is a bug of nanoDD and keeps its traceback. again: what to do after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        parser.exit(2, f"\n{parser.prog}: stopped by Ctrl-C; what was finished is kept, "
                       f"and {again}\n")
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except (RuntimeError, MemoryError) as error:                # torch has its own class for GPUs only
        if not re.search("^$|out of memory|can't allocate memory", str(error)):
            raise
        help_text = parser.format_help()
        flags = [flag for flag in ("--recompute", "--batch", "--bf16", "--size")
                 if re.search(rf"^ +{flag}\b", help_text, re.MULTILINE)]
        parser.exit(2, f"{parser.prog}: out of memory; what helps: {' or '.join(flags) or 'a smaller set'} "
                       "(a smaller number where it takes one)\n")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS,
                               errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise
        where = f" ({error.filename})" if error.filename else ""
        parser.exit(2, f"{parser.prog}: cannot read or write: {error.strerror}{where}; "
                       "what was there before is kept\n")
