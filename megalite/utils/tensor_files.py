"""Files of tensors, whose permissions and errors are those of other files."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

STATUS = Path("/proc/self/status")


def save_file(
    tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file, which may be read and written by whom the umask says:
    safetensors lets only the owner read what it writes, and a team cannot open the checkpoint.

    Raises OSError where the disk refuses it, as other writes do."""
    try:
        safetensors.torch.save_file(tensors, path, dict(metadata) if metadata else None)
    except SafetensorError as error:
        # The library has an error of its own for a full disk, and its number only in the text.
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(found[1])
            raise OSError(number, os.strerror(number), str(path)) from None
        raise
    # On a file system that knows no permissions the file stays as it is.
    with contextlib.suppress(OSError):
        path.chmod(0o666 & ~umask())


def umask() -> int:
    """Return the process's umask, which only setting it tells otherwise, for all threads at once."""
    with contextlib.suppress(OSError, ValueError):
        for line in STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o077
