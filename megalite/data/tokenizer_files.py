"""Files in a tokenizer's folder, and what its settings say about tokens, read as transformers reads
them."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from megalite.errors import DataError
from megalite.registry import tokenizer_readers
from megalite.utils import outside
from megalite.utils.outside import shown

CONFIG = "tokenizer_config.json"
LEGACY = "added_tokens.json"
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
TEMPLATES = "additional_chat_templates"
"""A folder of chat templates for special occasions, such as tool_use.jinja."""
# All other files that AutoTokenizer may look for in a folder; a checkpoint gets a copy of those
# that exist.
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    CONFIG,
    "special_tokens_map.json",
    LEGACY,
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def tokenizer_file(folder: Path) -> Path | None:
    """Return the file in a folder that a reader of tokenizers opens. Plugins are imported only
    where there is none of megalite's own."""
    own = next(filter(Path.is_file, (folder / name for name in tokenizer_readers.own)), None)
    return own or next(
        filter(Path.is_file, (folder / name for name in tokenizer_readers.names())), None
    )


def files_in(folder: Path) -> list[str]:
    """Return the files of a tokenizer's folder that AutoTokenizer or a plugin reads, as relative
    paths."""
    named = sorted(path for path in (folder / TEMPLATES).glob("*.jinja") if path.is_file())
    file = tokenizer_file(folder)
    known = FILES if file is None else dict.fromkeys((*FILES, file.name))
    return [
        *(name for name in known if (folder / name).is_file()),
        *(f"{TEMPLATES}/{path.name}" for path in named),
    ]


def copy_files(sources: Sequence[Path], target: Path, *more: str) -> None:
    """Copy the files that AutoTokenizer reads, and those named in `more`, from the folders
    `sources` to the existing folder `target`. A file that several have comes from the first."""
    for name in dict.fromkeys([*more, *(name for source in sources for name in files_in(source))]):
        if source := next((source / name for source in sources if (source / name).is_file()), None):
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target / name)


def settings_of(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, with the special tokens of special_tokens_map.json if
    transformers uses these. Raise DataError."""
    settings = read_object(folder / CONFIG)
    # Only older versions use the second file: a newer one has everything in the first, and the
    # second may be stale.
    is_newer = "added_tokens_decoder" in settings
    return settings if is_newer else settings | read_object(folder / "special_tokens_map.json")


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that the settings name, by role, such as eos_token."""
    tokens = {key: text_of(value) for key, value in settings.items() if key.endswith("_token")}
    return {key: text for key, text in tokens.items() if text}


def add_named(tokenizer: tokenizers.Tokenizer, file: Path, settings: Mapping[str, Any]) -> None:
    """Let `tokenizer` (of the tokenizer.json `file`) match whole the tokens that the `settings`
    beside it add, as transformers does: tokens that it has with other flags, and pieces of its
    vocabulary. Raise as `check_added` does."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    check_added(file, settings, vocabulary)
    there = {token.content: repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    added = list(_added_by(file.parent, settings))
    # tokenizer_config.json says the last word on flags; added_tokens.json, which is older, has none.
    flagged = [
        token for name, token in added if name == CONFIG and there.get(token.content) != repr(token)
    ]
    listed = [*(token for _, token in added), *_named_by(settings)]
    others = [token for token in listed if token.content not in there]
    tokenizer.add_tokens([token for token in [*flagged, *others] if token.content in vocabulary])


def check_added(file: Path, settings: Mapping[str, Any], vocabulary: Collection[str]) -> None:
    """Raise DataError if the `settings` beside a tokenizer's `file` add a token, or name an EOS
    token, that its `vocabulary` lacks, since transformers would give it a new id. Padding tokens
    are exempt."""
    mend = "have AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), of transformers, write tokenizer.json"
    for name, token in _added_by(file.parent, settings):
        # Many published tokenizers name a padding token that they do not have. No text holds it.
        if token.content not in vocabulary and token.content.strip("<|[]>").lower() != "pad":
            raise DataError(
                f"{file.with_name(name)} adds the token {token.content!r}, which {file.name} does not have; {mend}"
            )
    if (given := settings.get("eos_token")) is not None and not text_of(given):
        raise DataError(f"{file.with_name(CONFIG)}: eos_token = {shown(given)} is no token")
    if (end := special_tokens(settings).get("eos_token")) is not None and end not in vocabulary:
        raise DataError(
            f"{file.with_name(CONFIG)} names the eos_token {end!r}, which {file.name} does not have; name one that is "
            f"there, or {mend}"
        )


def _added_by(
    folder: Path, settings: Mapping[str, Any]
) -> Iterator[tuple[str, tokenizers.AddedToken]]:
    """Yield the tokens that the settings add to a vocabulary, each with the file that says so."""
    if (added := settings.get("added_tokens_decoder")) is not None:
        for number in sorted(added, key=int):
            yield CONFIG, _token(added[number])
        return
    special = {token.content for token in _named_by(settings)}
    for text in read_object(folder / LEGACY):
        yield (
            LEGACY,
            tokenizers.AddedToken(text, special=text in special, normalized=text not in special),
        )


def _named_by(settings: Mapping[str, Any]) -> list[tokenizers.AddedToken]:
    """Return the tokens that the settings name by role or in lists."""
    found = [settings[f"{role}_token"] for role in ROLES if settings.get(f"{role}_token")]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        some = settings.get(name)
        # Newer versions of transformers may have an object there instead, of roles of one's own.
        if isinstance(some, list):
            found += some
    return [_token(token) for token in found]


def _token(given: Any) -> tokenizers.AddedToken:
    """Return a token with its flags; special and not normalized unless they say otherwise."""
    flags = {"special": True, "normalized": False}
    if isinstance(given, dict):
        flags |= {name: bool(given[name]) for name in FLAGS if name in given}
    return tokenizers.AddedToken(text_of(given) or "", **flags)


def text_of(token: Any) -> str | None:
    """Return the text of a token given as text, or as an object with its flags; None for anything
    else."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def read_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty if there is no file. Raise DataError."""
    return outside.read_object(file, DataError) if file.exists() else {}
