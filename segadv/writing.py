"""Files are written whole or not at all; and what a killed process leaves is found again."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_write", "explained", "is_leftover", "own_folder", "remove_leftovers", "write_text"]

_FAILED = "could not be written: "
_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space there") | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), "make the folder writable"
)
_LASTING = (errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOTDIR)
"""What the same command would meet again."""


@contextmanager
def explained(path: Path, *, of_run: bool = False) -> Iterator[None]:
    """An OSError of the block says that `path` could not be written, and what to do; one about another file stays as
    it is.

    Args:
        of_run: the file is one of a training run, which the same command continues.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error.__cause__, OSError) and _FAILED in (error.strerror or ""):
            error = error.__cause__  # explained, of what was to become this file
        if not _is_about(error, path):
            raise
        advice = [_REMEDIES[error.errno]] if error.errno in _REMEDIES else []
        if of_run and error.errno not in _LASTING:
            checkpoint = (path if os.path.isdir(path) else path.parent) / "last.pt"  # unlike Path's, it never raises
            left = f": it continues from {checkpoint}, which is whole" if os.path.isfile(checkpoint) else ""
            advice.append(f"give the same command again{left}")
        told = f"; {' and '.join(advice)}" if advice else ""
        raise OSError(error.errno or errno.EIO, f"{path} {_FAILED}{error.strerror or error}{told}") from error


def _is_about(error: OSError, path: Path) -> bool:
    """Whether it names the file, a folder above or, of a folder, a file in it, or what `atomic_write` gives."""
    if not isinstance(error.filename, str):
        return True
    named = Path(error.filename)
    return named == path or named in path.parents or path in named.parents or is_leftover(named)


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, durable: bool = False, of_run: bool = False) -> Iterator[Path]:
    """Gives a temporary path in the same folder, made where it is missing, which replaces `path` when the block ends
    without error.

    At any moment `path` is the previous file or the new one, each whole; with `durable` also after a loss of power. An
    OSError is `explained`, which takes `of_run`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}.segadv{path.suffix}")
    with explained(path, of_run=of_run):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if durable:
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, *, of_run: bool = False) -> None:
    with atomic_write(path, of_run=of_run) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_leftover(path: Path) -> bool:
    """Whether it is what an `atomic_write` leaves that was killed."""
    return re.fullmatch(r"\..+\.\d+\.\d+\.segadv(\.\w+)?", path.name) is not None


def own_folder(out: Path, record: Path, whose: str) -> None:
    """Makes a folder in which everything is a command's own, or clears the one of a killed run.

    Args:
        record: the file by which the command knows its folder again.
        whose: "an earlier demo's", for the message.

    Raises:
        FileExistsError: it holds something else.
    """
    if not record.exists() and out.exists() and (not out.is_dir() or not all(map(is_leftover, out.iterdir()))):
        raise FileExistsError(f"out must be a new or empty folder or {whose}; {out} is neither")
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)


def remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if is_leftover(path) and path.is_file():
            path.unlink()
