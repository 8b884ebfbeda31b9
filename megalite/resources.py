"""Where the files that come with megalite lie."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def configs_dir() -> Path:
    """The folder of shipped configs: beside the package in a checkout, inside it in an installed wheel.

    Raises FileNotFoundError."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "configs", package / "configs"):
        # chips.yaml tells ours from another project's `configs` that happens to lie in site-packages.
        if (folder / "chips.yaml").is_file():
            return folder
    raise FileNotFoundError(f"megalite's configs are neither beside nor inside {package}; reinstall the package")
