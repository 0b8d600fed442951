"""What surrounds every command: a sentence for each mistake, safe output, several processes, locks."""
import re
import sys
from contextlib import contextmanager, redirect_stdout

from nanodd import locks, processes
from nanodd.errors import UserError, printable


class SafeOutput:
    """sys.stdout, whose text passes errors.printable."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return self.stream.write(printable(text, self.stream.encoding or "utf-8"))

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextmanager
def command(parser, args=None, again="the same command resumes", many=True):
    """Runs a command in the block: a mistake, a full disk or memory, or Ctrl-C is one line on stderr.

    The exit code is then 2. Any other exception is a bug of nanoDD and keeps its traceback. Folders that were
    locked are released in the end. args: the parsed flags, which must be the same on all processes of
    torchrun. again: what to do after Ctrl-C. many: whether several processes share the work; else they are
    refused.
    """
    with redirect_stdout(SafeOutput(sys.stdout)):
        try:
            settings = vars(args) if args else {}
            check_integers(settings)
            if not many:
                processes.refuse_several(parser.prog)
            with processes.process_group(settings):
                yield
        except (Exception, KeyboardInterrupt) as error:
            sentence = explained(error, parser, again)
            if not sentence and not processes.is_broken_connection(error):
                processes.speaks_first()                        # the others need not say that this one ended
                raise
            if processes.speaks_first():
                sys.stderr.write(printable(f"{parser.prog}: {sentence}\n", sys.stderr.encoding or "utf-8"))
            parser.exit(2)
        finally:
            locks.release()


def check_integers(settings):
    """Raises UserError where the whole number of a flag is too large for torch, whose seeds have 64 bits."""
    for name, value in settings.items():
        if isinstance(value, int) and abs(value) > 10**15:      # a judge's seed is a thousand times as large
            raise UserError(f"--{name.replace('_', '-')} {value} is too large a number")


def explained(error, parser, again):
    """An exception in a sentence; None for a bug."""
    if isinstance(error, KeyboardInterrupt):
        return f"\nstopped by Ctrl-C; what was finished is kept, and {again}"
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, (RuntimeError, MemoryError)):          # torch has its own class for GPUs only
        if re.search("^$|out of memory|can't allocate memory|overflow", str(error)):
            return f"out of memory; what helps: {remedies(parser)} (a smaller number where it takes one)"
        if processes.is_broken_connection(error):
            return (f"another process ended, or did not answer: what was finished is kept, and {again}")
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return (f"cannot read or write: {error.strerror or error}{where}; what was there before is kept, and "
                f"{again}")
    return None


def remedies(parser):
    """The flags of a command that need less memory, for a message."""
    help_text = parser.format_help()
    flags = [flag for flag in ("--recompute", "--batch", "--bf16", "--size")
             if re.search(rf"^ +{flag}\b", help_text, re.MULTILINE)]
    return " or ".join(flags) or "a smaller set"
