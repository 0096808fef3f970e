"""The one exception that a user is meant to read."""

from __future__ import annotations

import errno


class UserError(Exception):
    """Bad input or an unusable environment, told in one line: what is wrong, where, and what to do about it.

    The command line prints the message alone and exits with code 2; every other exception is a fault of the
    program. Ray hands it back from workers and tasks unchanged, so it must survive pickling: one string argument.
    """


class StorageError(UserError):
    """A file or store could not be read or written; it may be there again in a moment, so tasks try again."""


class SharedError(UserError):
    """Raised by every rank of a job at the same point, so that no rank waits for another in a collective."""


def one_line(error: BaseException) -> str:
    """The first line of an exception's text, or its type where it has none."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0])


def printable(text: str, limit: int = 2000) -> str:
    """A text as one line: control characters escaped, the middle left out where it is long.

    File names may hold line breaks, escape sequences for the terminal, or bytes that are no text.
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= limit else f"{line[: limit * 2 // 3]} ... {line[-limit // 3 :]}"


def io_error(error: OSError, url: str, doing: str) -> StorageError:
    """Turns an operating-system error met while `doing` something with `url` into a message with its remedy."""
    remedies = {
        errno.ENOSPC: "the disk is full: free some space or choose another folder",
        errno.EDQUOT: "the disk quota is used up: free some space or choose another folder",
        errno.ENOENT: "no such file or folder: check the path",
        errno.EACCES: "permission denied: choose a place that you may use",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.ENOTDIR: "a part of the path is a file, not a folder: check the path",
        errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
        errno.EISDIR: "this is a folder where a file was expected: check the path",
    }
    reason = remedies.get(error.errno or 0) or error.strerror or one_line(error)
    return StorageError(f"cannot {doing} {url}: {reason}")
