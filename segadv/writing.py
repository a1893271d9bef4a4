"""Files are written whole or not at all; and what a killed process leaves is found again."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_write", "explained", "is_leftover", "remove_leftovers", "write_text"]

_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space there and ") | dict.fromkeys(
    (errno.EACCES, errno.EPERM, errno.EROFS), "make the folder writable and "
)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """An OSError of the block says which file it was about, what is left, and what to do."""
    try:
        yield
    except OSError as error:
        cause = f"{error.strerror or error}"
        remedy = _REMEDIES.get(error.errno or 0, "")
        checkpoint = (path if os.path.isdir(path) else path.parent) / "last.pt"  # unlike Path's, it never raises
        left = f": it continues from {checkpoint}, which is whole" if os.path.isfile(checkpoint) else ""
        raise type(error)(
            error.errno or errno.EIO,
            f"{path} could not be written: {cause}; {remedy}give the same command again{left}",
        ) from error


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[Path]:
    """Gives a temporary path in the same folder, made where it is missing, which replaces `path` when the block ends
    without error.

    At any moment `path` is the previous file or the new one, each whole; with `durable` also after a loss of power. An
    OSError is `explained`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}.segadv{path.suffix}")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if durable:
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_leftover(path: Path) -> bool:
    """Whether it is what an `atomic_write` leaves that was killed."""
    return re.fullmatch(r"\..+\.\d+\.\d+\.segadv(\.\w+)?", path.name) is not None


def remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if is_leftover(path) and path.is_file():
            path.unlink()
