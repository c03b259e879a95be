"""Files that are there whole or not at all: written aside, flushed to the disk, renamed; read without trust."""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

from funcghost.errors import StoreError

Buffer = bytes | memoryview
MOST_BYTES = 1 << 31
"""Of a file that is read whole."""

CANNOT_RESERVE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
PIECE = 1 << 24


def write_whole(aside: Path, path: Path, content: Buffer) -> None:
    """Puts a file in its place once all of it is on the disk; `aside` is where it is written, on the same file system.

    Room is reserved first. Whatever happens, `path` holds what it held before or all of the content.

    Raises:
        StoreError: it cannot be written; nothing is left aside.
    """
    try:
        with open(aside, "wb", buffering=0) as file:
            _reserve(file.fileno(), len(content))
            view = memoryview(content).cast("B")
            while view:
                view = view[file.write(view[:PIECE]) :]
            os.fsync(file.fileno())
        os.replace(aside, path)
        flush_folder(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise cannot_write(path, error, len(content)) from error


def cannot_write(path: Path, error: OSError, size: int = 0) -> StoreError:
    """The error that says what was needed and what there is."""
    free = shutil.disk_usage(nearest_folder(path)).free
    return StoreError(
        f"{path}: cannot be written: {error.strerror}. It takes {size} bytes, {free} are free there. "
        "What was finished before is kept: make room, or mend the cause, and run again to go on from it."
    )


def nearest_folder(path: Path) -> Path:
    """The innermost folder on the way to the path that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def _reserve(descriptor: int, size: int) -> None:
    """Takes the room, so that a full disk is an error before anything is written."""
    if not size:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in CANNOT_RESERVE:
            raise


def flush_folder(folder: Path) -> None:
    """Has the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Makes a folder, and those it lies in.

    Raises:
        StoreError: it cannot be made, or is something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    check_folder(folder)


def check_folder(folder: Path) -> None:
    """A folder must be one and lie where its name says: a link might lead anywhere.

    Raises:
        StoreError: it is not.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise StoreError(f"{folder}: must be a folder of this store, found a link, a file or nothing. Copy it whole.")


def listed(folder: Path) -> list[str]:
    """The names in a folder.

    Raises:
        StoreError: it cannot be read.
    """
    try:
        return os.listdir(folder)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be read: {error.strerror}.") from error


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """The descriptor of a regular file that is no link.

    Raises:
        StoreError: it is a link, a device, a pipe, or cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}.") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StoreError(f"{path}: must be a file, found something else.")
        yield descriptor
    finally:
        os.close(descriptor)


def read_whole(path: Path, most: int = MOST_BYTES) -> bytes:
    """All bytes of a file.

    Raises:
        StoreError: there are more than `most`, or it is no file that can be read.
    """
    with opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > most:
            raise StoreError(f"{path}: has {size} bytes, more than the {most} that are read at once.")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(size)


def checksum(content: Buffer) -> str:
    """The CRC-32 of the content, eight hexadecimal digits: for damage, not against forgery."""
    return f"{crc32(content):08x}"


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds a lock while the body runs; the system lets go of it when the process ends, however it ends.

    Raises:
        StoreError: another process holds it.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(f"{path.parent}: another process is writing {what}. Wait for it, or end it.") from error
        yield
    finally:
        os.close(descriptor)
