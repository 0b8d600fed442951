"""One command at a time writes to an output folder: an operating system's lock, which ends with its process.

The lock is on the file .lock in the folder. The file says who has the lock, stays there, and by itself locks
nothing.
"""
import errno
import os
import pathlib
import re
import sys
import time

from nanodd import files
from nanodd.errors import UserError, printable

try:
    import fcntl
except ImportError:                                             # Windows
    import msvcrt
    fcntl = None

held = {}                      # {folder: its open .lock}, of the command that runs


def take(folder):
    """Locks an output folder, which it makes, until `release`; what this command has locked is left so.

    Temporary files that killed processes left there are removed. Raises UserError where another process has
    the lock, or the folder cannot be made. On a file system without locks it warns on stderr.
    """
    files.make_folder(folder)
    key = os.path.realpath(folder)
    if key in held:
        return
    try:
        # not through a link, behind which a file of the user's may be
        file = os.open(os.path.join(folder, ".lock"), os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0))
    except OSError as error:
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            return                                              # nothing can be written there: no need
        raise
    try:
        lock(file)
    except BlockingIOError:
        owner = os.pread(file, 80, 0).decode(errors="replace") if fcntl else ""
        os.close(file)
        raise UserError(f"{folder} is in use by process {printable(owner) or 'N'}: wait, or choose --out "
                        "ELSEWHERE") from None
    except OSError as error:
        print(f"{folder} cannot be locked ({error.strerror}): two commands at once would disturb each other "
              "there", file=sys.stderr)
    os.truncate(file, 0)
    os.write(file, f"{os.getpid()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})".encode())
    held[key] = file
    remove_leftovers(folder)


def lock(file):
    """Locks an open file, given by its number. Raises BlockingIOError where another process has it locked."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    os.lseek(file, 2**20, os.SEEK_SET)                          # Windows locks bytes: one behind the text
    try:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError from error
    os.lseek(file, 0, os.SEEK_SET)


def release():
    """Unlocks all folders, at the end of a command."""
    while held:
        os.close(held.popitem()[1])


def remove_leftovers(folder):
    """Removes the temporary files of atomic_write in `folder` whose process is gone: it was killed."""
    for path in pathlib.Path(folder).glob(".*.tmp"):
        found = re.fullmatch(r"\..+\.(\d{1,9})\.tmp", path.name)
        if found and path.is_file() and (int(found[1]) == os.getpid() or not is_running(int(found[1]))):
            path.unlink(missing_ok=True)


def is_running(pid):
    """Whether there is a process of this number."""
    if not fcntl:                                               # Windows would end it: the lock must do
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
