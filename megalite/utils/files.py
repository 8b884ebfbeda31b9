"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalite.utils.resources import fsync


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Give another path to write to, which takes the place of `path` when the block ends; after an
    error it is gone, and what was there stays. With `durable`, it is on disk by then, whenever the
    power goes."""
    # The process id keeps apart a process that was thought dead and still writes.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            fsync(temporary)
        # Atomic on one file system, hence the temporary file beside its target.
        os.replace(temporary, path)
        if durable:
            fsync(path.parent)
    except OSError as error:
        name_full_disk(error, path)
        if error.filename and Path(error.filename) == temporary:
            error.filename = str(path)  # the name that the user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


def name_full_disk(error: OSError, path: Path) -> None:
    """Let the error of a full disk name the file: writing to one that is open fails without."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
        error.filename = str(path)
