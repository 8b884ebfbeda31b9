"""The folder of a run, in which everything lies that the run writes."""

from __future__ import annotations

import os
from pathlib import Path

from megalite.errors import ConfigError


def check_run_folder(folder: Path) -> None:
    """Before anything is written. Raises ConfigError where a link in it leads elsewhere: whoever may write to a folder
    that others share could make the run write, and delete, in its owner's name."""
    for path in (*folder.glob("*"), *folder.glob("checkpoints/*")):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{path} is a link to {path.resolve()}, but a run writes into its own folder only; remove the link, "
                "and let run.dir name the disk that is meant"
            )


def open_run_folder(folder: Path, config_yaml: str) -> None:
    """Make it, and write the config into it. Raises ConfigError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The one that is there is not lost where the disk is full.
        temporary = folder / "config.yaml.tmp"
        temporary.write_text(config_yaml)
        temporary.replace(folder / "config.yaml")
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(
            f"run.dir: {folder} cannot be written: {reason}; make room, or let run.dir name another disk"
        ) from None
