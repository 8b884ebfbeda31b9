"""Uploads the folder of a model to the Hugging Face hub. The only module that writes there."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path

from megalite.checkpoint import card
from megalite.checkpoint.folder import damage_of, read_manifest, sentence_files, step_of
from megalite.errors import CheckpointError, ConfigError, Unreachable
from megalite.utils.hub import is_name

UPLOADED = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json",
    "README.md", "LICENSE*", "config.yaml", "*.jinja", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.model",
)  # fmt: skip
"""Files of a model. All else of a checkpoint is for a resumed training."""
CLIENTS = ("httpx", "httpcore", "requests", "urllib3")
"""Packages whose errors say that a server does not answer; which it is depends on the hub's
library."""


def push(folder: Path, name: str, public: bool = False, message: str | None = None) -> str:
    """Upload the model in `folder` to the repository `name` ("owner/name") in one commit, and return
    a line that says where it is.

    A repository that is made is private unless `public`. Raise ConfigError for a wrong name, without
    a token, and where the hub refuses; CheckpointError for a damaged file; Unreachable where there is
    no answer."""
    if not is_name(name):
        raise ConfigError(f"{name!r} names no repository: give OWNER/NAME")
    files = files_of(folder)
    try:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    except ImportError:
        raise ConfigError("push needs huggingface_hub; pip install 'megalite[hf]'") from None
    if not get_token():
        raise ConfigError("no token for the hub: run `hf auth login`, or set HF_TOKEN")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        is_private = api.model_info(name).private
        done = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=files,
            commit_message=message or _message(folder),
        )
    except OfflineModeIsEnabled:
        raise ConfigError("HF_HUB_OFFLINE is set, and pushing needs the network") from None
    except HFValidationError as error:
        raise ConfigError(f"{name!r} names no repository: {error}") from None
    except ValueError as error:
        # The hub's library checks what somebody has written in the card. Or a proxy has answered.
        told = " ".join(str(error).split())
        is_card = card.NAME in told
        what = f"refuses {folder / card.NAME}" if is_card else "gives no answer of a hub's"
        raise ConfigError(f"the hub at {api.endpoint} {what}: {told}") from None
    except HfHubHTTPError as error:
        said = error.server_message or str(error)
        raise ConfigError(f"the hub at {api.endpoint} refuses {name}: {said}") from None
    except Exception as error:
        if not (isinstance(error, OSError) or type(error).__module__.startswith(CLIENTS)):
            raise
        raise Unreachable(
            f"the hub at {api.endpoint} cannot be reached: {error or type(error).__name__}"
        ) from None
    size = sum((folder / file).stat().st_size for file in files)
    kind = "private" if is_private else "public"
    return f"{done.commit_url}: {len(files)} files, {size / 1e6:,.1f} MB, in a {kind} repository"


def files_of(folder: Path) -> list[str]:
    """Return the names of a model's files, each compared with the manifest where there is one. Raise
    CheckpointError for a damaged one, and ConfigError for a folder without weights."""
    names = [
        entry.name
        for entry in os.scandir(folder)
        if entry.is_file() and any(fnmatch(entry.name, pattern) for pattern in UPLOADED)
    ]
    names = sorted({*names, *sentence_files(folder)})
    if not any(name.endswith(".safetensors") for name in names):
        raise ConfigError(f"{folder} has no weights (*.safetensors) to upload")
    manifest = read_manifest(folder)
    for name in names:
        # A card may be written in after the run.
        entry = manifest.get(name) if isinstance(manifest, dict) and name != "README.md" else None
        if entry and (damage := damage_of(folder / name, entry)):
            raise CheckpointError(f"{folder / name} {damage.words}: not uploaded")
    return names


def _message(folder: Path) -> str:
    step = step_of(folder)
    return f"Upload {folder.name}" if step is None else f"Upload the checkpoint of step {step:,}"
