"""A lock on an output folder, of the operating system: one command at a time writes there.

The lock is on the file .nanodd.lock in the folder, and ends with its process, however that ends. The file
says who has the lock, stays there, and by itself locks nothing.
"""
import errno
import os
import pathlib
import re
import sys
import time

from nanodd.errors import UserError, printable

try:
    import fcntl
except ImportError:                                             # Windows
    import msvcrt
    fcntl = None

open_locks = {}                # {folder: its open .nanodd.lock}, of the command that runs


def make_folder(path):
    """Makes a folder, and those above it, where it is missing. Raises UserError where it cannot be made."""
    try:
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from error


def take(folder, advice=", or choose --out ELSEWHERE"):
    """Locks an output folder, which it makes, until `release`; what this command has locked stays locked.

    Temporary files that killed processes left there are removed. On a file system without locks it warns on
    stderr. Raises UserError where another process has the lock (with `advice`) or the folder cannot be made,
    and OSError where .nanodd.lock is a link or a folder.
    """
    make_folder(folder)
    key = os.path.realpath(folder)
    if key in open_locks:
        return
    try:
        # not through a link, behind which a file of the user's may be
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = os.open(os.path.join(folder, ".nanodd.lock"), flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        # it is another user's; or nothing can be written here, and no lock is needed
        return warn(folder, error) if os.access(folder, os.W_OK) else None
    try:
        lock(file)
    except BlockingIOError:
        owner = os.pread(file, 80, 0).decode(errors="replace") if fcntl else ""
        os.close(file)
        who = f"process {owner}" if owner else "another process"
        raise UserError(f"{folder} is in use by {who}: wait until it ends{advice}") from None
    except OSError as error:
        warn(folder, error)
    os.truncate(file, 0)
    os.write(file, f"{os.getpid()} (since {time.strftime('%Y-%m-%d %H:%M:%S')})".encode())
    open_locks[key] = file
    remove_leftovers(folder)


def refuse_link(folder):
    """Raises UserError where a folder or file to write in is a link: what it leads to is not ours."""
    if folder.is_symlink():
        raise UserError(f"{folder} is a link to {folder.readlink()}, and nanoDD writes through no link in "
                        "the folder of its results: remove it, or choose --out ELSEWHERE")


def warn(folder, error):
    """Says on stderr that a folder cannot be locked, and why."""
    print(printable(f"{folder} cannot be locked ({error.strerror}): two commands at once would disturb each "
                    "other there"), file=sys.stderr)


def lock(file):
    """Locks an open file, given by its number. Raises BlockingIOError where another process has it locked."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    os.lseek(file, 2**40, os.SEEK_SET)                          # Windows locks bytes: one behind the contents
    try:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError from error
    os.lseek(file, 0, os.SEEK_SET)


def release():
    """Unlocks all folders, at the end of a command."""
    while open_locks:
        os.close(open_locks.popitem()[1])


def temporary(path):
    """The path under which this process writes the file `path`, until it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}.nanodd.tmp")


def remove_leftovers(folder):
    """Removes the temporary files in `folder` whose process is gone: it was killed.

    It is called before this process writes there, so that its own number means an earlier process.
    """
    for path in pathlib.Path(folder).glob(".*.nanodd.tmp"):
        found = re.fullmatch(r"\..+\.(\d{1,9})\.nanodd\.tmp", path.name)
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
