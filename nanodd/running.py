"""What surrounds every command: a sentence for each mistake, safe output, several processes, locks."""
import re
import sys
from contextlib import contextmanager, redirect_stdout

from nanodd import cli, locks, processes
from nanodd.errors import UserError, in_words, is_out_of_memory, printable


class SafeOutput:
    """sys.stdout, whose text passes errors.printable."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return self.stream.write(printable(text, self.stream.encoding or "utf-8"))

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextmanager
def command(parser, args, again="the same command resumes", many=True):
    """Runs a command in the block: a mistake, a full disk or memory, or Ctrl-C is one line on stderr.

    The exit code is then 2. Any other exception is a bug of nanoDD and keeps its traceback. Folders that were
    locked are released at the end. args: the parsed flags, which must be the same on all processes of
    torchrun. again: what to do after Ctrl-C. many: whether several processes share the work; else they are
    refused.
    """
    with redirect_stdout(SafeOutput(sys.stdout)):
        try:
            if not many:
                processes.refuse_several(parser.prog)
            with processes.process_group(vars(args)):
                cli.check(args)
                yield
        except (Exception, KeyboardInterrupt) as error:
            sentence, first = explained(error, parser, again), processes.is_first_to_report()
            if not sentence:
                raise
            if first:                                           # of all processes
                line = f"{parser.prog}: {sentence}".replace("\n", "\\n")      # a name may have one
                line = "\n" * isinstance(error, KeyboardInterrupt) + line      # the terminal shows ^C
                sys.stderr.write(printable(line, sys.stderr.encoding or "utf-8") + "\n")
            parser.exit(2)
        finally:
            locks.release()


def explained(error, parser, again):
    """An exception in a sentence; None for a bug."""
    if isinstance(error, KeyboardInterrupt):
        return f"stopped by Ctrl-C; what was finished is kept, and {again}"
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return f"out of memory; what helps: {remedies(parser)} (a smaller number where it takes one)"
    if isinstance(error, RuntimeError) and processes.is_broken_connection(error):
        return (f"another process ended, or did not answer ({in_words(error)}); what was finished is kept, "
                f"and {again}")
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
