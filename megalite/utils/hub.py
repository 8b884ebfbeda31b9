"""Models of the Hugging Face hub that are in its cache on this machine. Nothing is downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
KEYS = ("model.hf", "data.tokenizer", "lora.adapter", "objective.teacher")
"""Settings that name folders of models."""


def cache_folder() -> Path:
    """Return the hub's cache, as huggingface_hub finds it."""
    home = os.environ.get("HF_HOME") or Path(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    # Unlike pathlib's it raises nothing for a user without a home, as containers have them.
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")))


def local(path: Path) -> Path:
    """Return the folder that `path` names: itself where it exists, else that of the newest commit of
    `owner/name` in the hub's cache, where there is one, else itself."""
    name = str(path)
    if path.exists() or not _NAME.fullmatch(name):
        return path
    stored = cache_folder() / f"models--{name.replace('/', '--')}"
    try:
        commit = (stored / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return path
    snapshot = stored / "snapshots" / commit
    return snapshot if _COMMIT.fullmatch(commit) and snapshot.is_dir() else path


def is_name(text: str) -> bool:
    """Return whether a text is `owner/name`, as repositories of the hub are called."""
    return _NAME.fullmatch(text) is not None


def name_of(folder: Path) -> str:
    """Return the name on the hub of a folder in its cache; of others the last part of their path."""
    snapshots, stored = folder.parent.name, folder.parent.parent.name
    if snapshots == "snapshots" and stored.startswith("models--"):
        return stored.removeprefix("models--").replace("--", "/", 1)
    return folder.name


def how_to_get(path: Path) -> str:
    """Return what to do where `path` is no folder but may be a model of the hub; else nothing."""
    if path.exists() or not _NAME.fullmatch(str(path)):
        return ""
    return f"; if it is a model of the hub, `hf download {path}` puts it into {cache_folder()}, where it is found"


def with_local_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config with the folders of models that are named as on the hub."""
    found = dict(values)
    for key in KEYS:
        section, _, name = key.partition(".")
        inner = found.get(section)
        if isinstance(inner, dict) and inner.get(name) and isinstance(inner[name], str):
            found[section] = inner | {name: str(local(Path(inner[name])))}
    return found
