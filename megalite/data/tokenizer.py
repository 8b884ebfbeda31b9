"""One small interface to Hugging Face tokenizers and SentencePiece models, without importing
transformers or torch."""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orjson
import tokenizers

from megalite.data.sentencepiece_json import NotConvertible, converted
from megalite.data.tokenizer_files import (
    CONFIG,
    add_named,
    check_added,
    copy_files,
    read_object,
    settings_of,
    special_tokens,
    tokenizer_file,
)
from megalite.errors import DataError
from megalite.registry import tokenizer_readers
from megalite.utils.hub import how_to_get, local
from megalite.utils.outside import check_regular, reading
from megalite.utils.spelling import instead_of

# Names of the end-of-document token in models without a tokenizer_config.json.
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
SUFFIXES = {".json": "tokenizer.json", ".model": "tokenizer.model"}
"""By the suffix of a file that may have any name: the usual name of its kind."""
FINGERPRINT = "2-"  # prefix of fingerprints in the present scheme
PROBE = (
    "def f(x):\n\treturn  {'a': 12345, \"é\": '日本語'}  # it's 😀 naïve…\r\n\n    <|endoftext|>"
)


class Tokenizer(ABC):
    """Converts text to ids and back. `vocab_size` is the largest id + 1, `eod_id` ends a document
    (None if unknown), `begin_id` begins a text and `mask_id` stands for a token to predict (None if
    there is no such token)."""

    vocab_size: int
    eod_id: int | None
    begin_id: int | None = None
    mask_id: int | None = None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without added special tokens."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens included."""

    def decode_plain(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens."""
        return self.decode(ids)

    @abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """Return every token and its id, added tokens included."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write what `transformers.AutoTokenizer.from_pretrained(folder)` and
        `load_tokenizer(folder)` need."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without added special tokens."""
        return self.encode_batch([text])[0]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts that are pretraining data.

        To a SentencePiece model, `</s>` in such a text is text; to other tokenizers it is the
        token, as in transformers."""
        return self.encode_batch(texts)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text that a model continues, preceded by whatever the tokenizer
        begins every text with."""
        return self.encode(text)

    @property
    def begin_ids(self) -> list[int]:
        """Return the ids that the tokenizer begins every text with."""
        return []

    @property
    def end_ids(self) -> list[int]:
        """Return the ids that the tokenizer ends every text with, unless a model is to go on with
        it."""
        return []

    @property
    def between_ids(self) -> list[int]:
        """Return the ids that the tokenizer puts between two texts."""
        return []

    @property
    def special_ids(self) -> frozenset[int]:
        """Return the ids of special tokens, which stand for no text."""
        return frozenset()

    def fingerprint(self) -> str:
        """Return a name for everything that the ids of a text, and the end of a document, depend
        on. A SentencePiece model and the equivalent tokenizer.json have the same name."""
        return self.older_fingerprint()

    def has_kept_ids(self, tokenized_by: str) -> bool:
        """Return whether token files of older versions with this tokenizer's `older_fingerprint`,
        made by the library `tokenized_by`, certainly have its ids."""
        return True

    def older_fingerprint(self) -> str:
        """Return the name in older versions' scheme: that of the vocabulary and of the ids of a
        probe text."""
        facts = [
            sorted(self.vocabulary().items()),
            self.eod_id,
            self.encode_batch(PROBE.splitlines(keepends=True)[:3]),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def other_tokenizer(note: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """Return why token files with this `note` may not belong to `tokenizer`, as part of a sentence;
    empty if they do, or if the note does not say."""
    made_by = note.get("tokenizer_fingerprint")
    if not made_by or made_by == tokenizer.fingerprint():
        return ""
    if made_by != tokenizer.older_fingerprint():
        return "was made with another tokenizer than"
    if tokenizer.has_kept_ids(note.get("tokenized_by", "")):
        return ""
    return (
        "was made by an older version of megalite, whose tokenizer.json of a SentencePiece model could give other ids "
        "than the model; tokenize the text again (or, if you know that the ids are the same, delete "
        "tokenizer_fingerprint from the .json beside the token file), or train on it without"
    )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a folder with tokenizer.json or tokenizer.model, a tokenizer.json, a SentencePiece
    .model file, what a plugin reads, or that of a model in the hub's cache. Raise DataError."""
    path = local(Path(path))
    file = tokenizer_file(path) if path.is_dir() else path
    if file is not None and file.is_file():
        name = file.name if file.name in tokenizer_readers else SUFFIXES.get(file.suffix)
        if name is not None:
            return tokenizer_readers.get(name)(file)
    raise DataError(
        f"{path} holds no tokenizer; accepted are a folder with tokenizer.json (any Hugging Face model that has a fast "
        "tokenizer) or tokenizer.model, a tokenizer.json file, or a SentencePiece .model file"
        + "".join(
            f", or {name} of a plugin"
            for name in tokenizer_readers.names()
            if name not in tokenizer_readers.own
        )
        + (how_to_get(path) or ("" if path.exists() else instead_of(path)))
    )


class HuggingFaceTokenizer(Tokenizer):
    """Wraps a tokenizer.json and the configuration files beside it. Special tokens in a text are
    recognised, as in transformers by default; but not in documents if a SentencePiece model lies
    beside it too."""

    def __init__(self, file: Path) -> None:
        """Open `file`. Raise DataError."""
        check_regular(file, DataError)
        with reading(file, DataError):  # the library may panic on a damaged file
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        # Some models' files ask for truncation and padding, but documents need neither.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._file = file
        settings = settings_of(file.parent)
        with reading(file.with_name(CONFIG), DataError):
            add_named(self._tokenizer, file, settings)
        vocabulary = self.vocabulary()
        if not vocabulary:
            raise DataError(f"{file} has no tokens")
        self.vocab_size = max(vocabulary.values()) + 1
        named = special_tokens(settings)
        # BERT's have no EOS and BOS tokens, but [SEP] and [CLS].
        end, begin = (
            named.get("eos_token", named.get("sep_token")),
            named.get("bos_token", named.get("cls_token")),
        )
        ends = END_OF_DOCUMENT if end is None else (end,)
        # Guessed only where the settings name none: an end that is named counts, or there is none.
        self.eod_id = next((vocabulary[name] for name in ends if name in vocabulary), None)
        self.begin_id, self.mask_id = (
            vocabulary.get(name or "") for name in (begin, named.get("mask_token"))
        )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # The "fast" variant skips character offsets, which are not needed here.
        return [
            e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            e.ids
            for e in self._for_documents.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    @cached_property
    def _for_documents(self) -> tokenizers.Tokenizer:
        """Return the tokenizer that leaves special tokens in documents as text, if a SentencePiece
        model lies beside."""
        if not self._file.with_name("tokenizer.model").is_file():
            return self._tokenizer
        description = orjson.loads(self.to_json())
        kept = [token for token in description["added_tokens"] if not token["special"]]
        changed = {**description, "added_tokens": kept, "post_processor": None}
        return tokenizers.Tokenizer.from_str(orjson.dumps(changed).decode())

    def encode_prompt(self, text: str) -> list[int]:
        ids, whole = self.encode(text), self._tokenizer.encode(text).ids
        if not ids:  # an empty text does not show where begin tokens end
            return [token for token in whole[:1] if token == self.begin_id]
        # The tokens that end every text are left out, because the model continues this one.
        for stop in range(len(ids), len(whole) + 1):
            if whole[stop - len(ids) : stop] == ids:
                return whole[:stop]
        return ids

    @cached_property
    def begin_ids(self) -> list[int]:
        """Return the ids that the tokenizer begins every text with."""
        return self.encode_prompt("a")[: -len(self.encode("a")) or None]

    @cached_property
    def end_ids(self) -> list[int]:
        """Return the ids that the tokenizer ends every text with, unless a model is to go on with
        it."""
        return self._tokenizer.encode("a").ids[len(self.encode_prompt("a")) :]

    @cached_property
    def between_ids(self) -> list[int]:
        """Return the ids that the tokenizer puts between two texts."""
        # Nothing tells what a post-processor puts there but a pair that it has processed.
        first, ids = self.encode("a"), self._tokenizer.encode("a", "a").ids
        return ids[len(self.begin_ids) + len(first) : len(ids) - len(first) - len(self.end_ids)]

    def encode_with_offsets(
        self, texts: Sequence[str]
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return for each text its ids, without added special tokens, and the characters [start,
        stop) of each."""
        return [
            (e.ids, e.offsets)
            for e in self._with_places.encode_batch(list(texts), add_special_tokens=False)
        ]

    @cached_property
    def _with_places(self) -> tokenizers.Tokenizer:
        """Return the tokenizer without post-processor: some would exclude white space from the
        offsets of tokens that begin with it."""
        plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        plain.post_processor = None
        return plain

    def control_tokens(self) -> list[str]:
        """Return the special tokens, which never occur in ordinary text."""
        return [
            token.content
            for token in self._tokenizer.get_added_tokens_decoder().values()
            if token.special
        ]

    @property
    def special_ids(self) -> frozenset[int]:
        """Return the ids of special tokens, which stand for no text."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    def added_tokens(self) -> list[str]:
        """Return the tokens that are matched whole in a text before anything else: special tokens,
        and others."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    @cached_property
    def landmarks(self) -> dict[int, str]:
        """Return the added tokens, by id, that every occurrence of their text becomes, whatever
        surrounds it: the text after one has the same ids as in a text that begins with it."""
        added = self._tokenizer.get_added_tokens_decoder()
        plain = {
            i: t.content
            for i, t in added.items()
            if not (t.lstrip or t.rstrip or t.single_word or t.normalized)
        }
        texts = [token.content for token in added.values()]
        return {i: text for i, text in plain.items() if sum(text in other for other in texts) == 1}

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_plain(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def fingerprint(self) -> str:
        return _name_of(self.to_json(), self.eod_id)

    def has_kept_ids(self, tokenized_by: str) -> bool:
        """Return whether older token files certainly have these ids; see `Tokenizer`. Only
        byte-fallback and unigram models are in doubt."""
        model = orjson.loads(self.to_json())["model"]
        if model["type"] != "Unigram" and not model.get("byte_fallback"):
            return True
        # This tokenizer.json may be its equivalent.
        beside = self._file.with_name("tokenizer.model")
        is_equal = (
            beside.is_file() and SentencePieceTokenizer(beside).fingerprint() == self.fingerprint()
        )
        return is_equal and tokenized_by == "sentencepiece"

    def to_json(self) -> str:
        """Return the content of a tokenizer.json, in the library's current spelling."""
        return self._tokenizer.to_str()

    def save(self, folder: str | Path) -> None:
        folder, source = Path(folder), self._file.parent
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() == source.resolve():
            return
        copy_files([source], folder)
        # The source file may have another name.
        shutil.copyfile(self._file, folder / "tokenizer.json")
        if not (folder / CONFIG).is_file():
            write_tokenizer_config(
                folder, None if self.eod_id is None else self._tokenizer.id_to_token(self.eod_id)
            )


class SentencePieceTokenizer(Tokenizer):
    """Wraps a SentencePiece .model alone. Control tokens spelled out in a text stay text."""

    def __init__(self, file: Path) -> None:
        """Open `file`. Raise DataError."""
        try:
            import sentencepiece
        except ImportError:
            raise DataError(
                f"{file}: a .model file needs sentencepiece; pip install 'megalite[data]'"
            ) from None
        check_regular(file, DataError)
        with reading(file, DataError):
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        self._file = file
        self.vocab_size = self._processor.get_piece_size()
        self.eod_id = end if (end := self._processor.eos_id()) >= 0 else None
        if file.name == "tokenizer.model":
            settings, vocabulary = settings_of(file.parent), self.vocabulary()
            with reading(file.with_name(CONFIG), DataError):
                check_added(file, settings, vocabulary)
            self.eod_id = vocabulary.get(special_tokens(settings).get("eos_token", ""), self.eod_id)
        self.begin_id = begin if (begin := self._processor.bos_id()) >= 0 else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        # A model's vocabulary may be larger; Hugging Face's tokenizers skip such ids too.
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    def vocabulary(self) -> dict[str, int]:
        return {self._processor.id_to_piece(i): i for i in range(self.vocab_size)}

    @cached_property
    def _converted(self) -> tokenizers.Tokenizer | NotConvertible:
        """Return the equivalent tokenizer.json, or the reason why there is none."""
        from sentencepiece import sentencepiece_model_pb2 as proto

        try:
            return converted(proto.ModelProto.FromString(self._file.read_bytes()))
        except NotConvertible as why:
            return why

    @property
    def why_alone(self) -> str:
        """Return why there is no equivalent tokenizer.json; empty if there is one."""
        return str(self._converted) if isinstance(self._converted, NotConvertible) else ""

    def fingerprint(self) -> str:
        if isinstance(self._converted, NotConvertible):
            facts = self._file.read_bytes() + str(self.eod_id).encode()
            return f"{FINGERPRINT}{hashlib.sha256(facts).hexdigest()[:32]}"
        return _name_of(self._converted.to_str(), self.eod_id)

    def has_kept_ids(self, tokenized_by: str) -> bool:
        return tokenized_by == "sentencepiece"

    def save(self, folder: str | Path) -> None:
        """Write the model and the equivalent tokenizer.json. Without one, whoever opens the folder
        uses the model itself."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        source, is_whole = self._file.parent, self._file.name == "tokenizer.model"
        if folder.resolve() != source.resolve() and is_whole:
            copy_files([source], folder)
        elif not is_whole:
            shutil.copyfile(self._file, folder / "tokenizer.model")
        if isinstance(self._converted, NotConvertible):
            return
        self._converted.save(str(folder / "tokenizer.json"))
        end, begin = (
            None if i is None else self._processor.id_to_piece(i)
            for i in (self.eod_id, self.begin_id)
        )
        template = read_object(source / CONFIG).get("chat_template") if is_whole else None
        write_tokenizer_config(folder, end, begin, template)


def write_tokenizer_config(
    folder: Path,
    end: str | None,
    begin: str | None = None,
    template: Any = None,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write a tokenizer_config.json to `folder` that makes transformers use tokenizer.json as it
    is, and clean up nothing on decoding. `end` and `begin` are the EOS and BOS tokens, `template`
    the chat template; `more` are other settings."""
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
    }
    values |= more
    values |= {"bos_token": begin} if begin is not None else {}
    values |= {"chat_template": template} if template is not None else {}
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _name_of(description: str, eod_id: int | None) -> str:
    """Return the fingerprint of a tokenizer.json. Decoder, padding and post-processor change no id
    of a text and are left out; a setting that is off counts as absent, so that a library with a new
    setting changes no fingerprint."""
    values = orjson.loads(description)
    facts = [
        _without_defaults(values[name])
        for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")
    ]
    data = orjson.dumps([*facts, eod_id], option=orjson.OPT_SORT_KEYS)
    return f"{FINGERPRINT}{hashlib.sha256(data).hexdigest()[:32]}"


def _without_defaults(values: Any) -> Any:
    """Return `values` without settings that are off, and without empty sequences."""
    if isinstance(values, list):
        return [_without_defaults(value) for value in values]
    if not isinstance(values, dict):
        return values
    kept = {
        key: value if key in ("vocab", "merges") else _without_defaults(value)
        for key, value in values.items()
        if value is not None and value is not False and value not in ("", [], {})
    }
    return kept if kept.get("type") != "Sequence" or len(kept) > 1 else None
