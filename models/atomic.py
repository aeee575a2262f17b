"""Files that are whole or not there: they are written beside their name, and get it at the end."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO


@contextmanager
def renamed(path: str | os.PathLike[str], part: str = "") -> Iterator[str]:
    """The name under which something is made in the block; at its end it gets the name `path`.

    part: that name, for what is so large that a killed process shall not leave one after another; else it is this
    process's own.  If the block fails, there is what was there before.  OSError: it names `path`, and before the block
    if nothing can take that name.
    """
    part = part or f"{os.fspath(path)}.{os.getpid()}.new"
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a folder; or a device, which would be lost
            raise OSError(errno.EISDIR if os.path.isdir(path) else errno.EINVAL, "Not a regular file")
        with suppress(FileNotFoundError):
            os.unlink(part)
        yield part
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(part)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


@contextmanager
def replacing(
    path: str | os.PathLike[str], mode: int = 0o666, *, part: str = "", durable: bool = False
) -> Iterator[BinaryIO]:
    """A file to be written in the block, as `renamed` has it; a link at `path` stays, and leads to it.

    mode: the rights of the file, less the umask.  durable: the disk has it when the block has ended.
    """
    path = os.path.realpath(path)
    with renamed(path, part) as new:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
    if durable:
        sync(os.path.dirname(path))


@contextmanager
def creating(path: str | os.PathLike[str], mode: int = 0o666) -> Iterator[BinaryIO]:
    """As `replacing`, where nothing is replaced: FileExistsError, if there is something of that name."""
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with renamed(path) as new, open(os.open(new, flags, mode), "wb") as file:
        yield file


def sync(folder: str | os.PathLike[str]) -> None:
    """Waits until the disk has the names of a folder."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
