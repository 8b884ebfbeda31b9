"""One small face over Hugging Face tokenizers and SentencePiece models; neither transformers nor torch is imported."""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from megalite.errors import DataError

# All that AutoTokenizer may look for in a folder; a checkpoint takes along what is there.
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# How models without a tokenizer_config.json spell the end of a document.
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
PROBE = "def f(x):\n\treturn  {'a': 12345, \"é\": '日本語'}  # it's 😀 naïve…\r\n\n    <|endoftext|>"


class Tokenizer(ABC):
    """Text to ids and back. `vocab_size` is the largest id + 1, `eod_id` what ends a document (None if unknown),
    `begin_id` what begins a text (None if there is no such token)."""

    vocab_size: int
    eod_id: int | None
    begin_id: int | None = None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with no special token added."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included."""

    def decode_plain(self, ids: Sequence[int]) -> str:
        """Text of the ids, without special tokens."""
        return self.decode(ids)

    @abstractmethod
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id, added tokens included."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write what `transformers.AutoTokenizer.from_pretrained(folder)` and `load_tokenizer(folder)` need."""

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that a model goes on with, and before them what the tokenizer has begin every text."""
        return self.encode(text)

    def fingerprint(self) -> str:
        """Hex name of what the tokenizer does: its vocabulary, its end of document and its ids for a probe text.

        Not of its files, so that a SentencePiece model and its tokenizer.json have one name."""
        facts = [sorted(self.vocabulary().items()), self.eod_id, self.encode_batch(PROBE.splitlines(keepends=True)[:3])]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a folder with tokenizer.json or tokenizer.model, a tokenizer.json, or a SentencePiece .model file.

    Raises DataError."""
    path = Path(path)
    candidates = [path / "tokenizer.json", path / "tokenizer.model"] if path.is_dir() else [path]
    file = next((file for file in candidates if file.is_file()), None)
    if file is None or file.suffix not in (".json", ".model"):
        raise DataError(
            f"{path} holds no tokenizer; accepted are a folder with tokenizer.json (any Hugging Face model that has a "
            "fast tokenizer) or tokenizer.model, a tokenizer.json file, or a SentencePiece .model file"
        )
    return HuggingFaceTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, with the configuration files that lie beside it. Special tokens in a text are recognised, as
    transformers does by default."""

    def __init__(self, file: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more specific
            raise DataError(f"{file} is not a tokenizer.json that tokenizers can read: {error}") from None
        # Some models' files ask for these; a document must neither be cut nor filled up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._file = file
        vocabulary = self.vocabulary()
        self.vocab_size = max(vocabulary.values()) + 1
        names = [*self._configured("eos_token"), *END_OF_DOCUMENT]
        self.eod_id = next((vocabulary[name] for name in names if name in vocabulary), None)
        self.begin_id = next((vocabulary[name] for name in self._configured("bos_token") if name in vocabulary), None)

    def _configured(self, role: str) -> list[str]:
        names = []
        for path in (self._file.with_name("tokenizer_config.json"), self._file.with_name("special_tokens_map.json")):
            if path.is_file():
                try:
                    token = json.loads(path.read_text(encoding="utf-8")).get(role)
                except (ValueError, AttributeError) as error:
                    raise DataError(f"{path} is not a JSON object: {error}") from None
                token = token.get("content") if isinstance(token, dict) else token
                names += [token] if isinstance(token, str) else []
        return names

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # "fast" leaves out the character offsets, which nobody needs here.
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_prompt(self, text: str) -> list[int]:
        ids, whole = self.encode(text), self._tokenizer.encode(text).ids
        if not ids:  # where the text stands among what begins and ends it cannot be told
            return [token for token in whole[:1] if token == self.begin_id]
        # What it has end every text is left out: the text goes on.
        starts = range(len(whole) - len(ids) + 1)
        return next((whole[: start + len(ids)] for start in starts if whole[start : start + len(ids)] == ids), ids)

    @cached_property
    def begin_ids(self) -> list[int]:
        """What it has begin every text."""
        return self.encode_prompt("a")[: -len(self.encode("a")) or None]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids of each text, with no special token added, and the characters [start, stop) that each is made of."""
        return [(e.ids, e.offsets) for e in self._with_places.encode_batch(list(texts), add_special_tokens=False)]

    @cached_property
    def _with_places(self) -> tokenizers.Tokenizer:
        """Without what comes last in some: it takes white space out of the places of tokens that begin with it."""
        plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        plain.post_processor = None
        return plain

    def control_tokens(self) -> list[str]:
        """What no text holds: its special tokens."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]

    def added_tokens(self) -> list[str]:
        """Return what is matched whole in a text before anything else: special tokens, and others."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    @cached_property
    def landmarks(self) -> dict[int, str]:
        """Return the added tokens, by id, that every occurrence of their text becomes, whatever stands around it: what
        follows one has the same ids as in a text that begins with it."""
        added = self._tokenizer.get_added_tokens_decoder()
        plain = {i: t.content for i, t in added.items() if not (t.lstrip or t.rstrip or t.single_word or t.normalized)}
        texts = [token.content for token in added.values()]
        return {i: text for i, text in plain.items() if sum(text in other for other in texts) == 1}

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_plain(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def vocabulary(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def to_json(self) -> str:
        """As a tokenizer.json has it, in the library's current spelling."""
        return self._tokenizer.to_str()

    def save(self, folder: str | Path) -> None:
        folder, source = Path(folder), self._file.parent
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() == source.resolve():
            return
        shutil.copyfile(self._file, folder / "tokenizer.json")
        for name in FILES:
            if name != "tokenizer.json" and (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if not (folder / "tokenizer_config.json").is_file():
            end = None if self.eod_id is None else self._tokenizer.id_to_token(self.eod_id)
            write_tokenizer_config(folder, end)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model on its own. Control tokens spelled out in a text stay text."""

    def __init__(self, file: Path) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise DataError(f"{file}: a .model file needs sentencepiece; pip install 'megalite[data]'") from None
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{file} is not a SentencePiece model: {error}") from None
        self._file = file
        self.vocab_size = self._processor.get_piece_size()
        self.eod_id = end if (end := self._processor.eos_id()) >= 0 else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        # A model may have more tokens, which Hugging Face's tokenizers leave out too.
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    def vocabulary(self) -> dict[str, int]:
        return {self._processor.id_to_piece(i): i for i in range(self.vocab_size)}

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() != self._file.parent.resolve() or self._file.name != "tokenizer.model":
            shutil.copyfile(self._file, folder / "tokenizer.model")
        converted_from_sentencepiece(self._file).save(str(folder / "tokenizer.json"))
        write_tokenizer_config(folder, None if self.eod_id is None else self._processor.id_to_piece(self.eod_id))


def write_tokenizer_config(folder: Path, end: str | None) -> None:
    """A tokenizer_config.json that has transformers take tokenizer.json as it is and tidy up nothing on decoding."""
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def converted_from_sentencepiece(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer.json of a BPE or unigram model: the same ids, for texts that spell out no
    control or user-defined token.

    (Where unigram segmentations score the same, rounding decides: SentencePiece sums in fp32, tokenizers in fp64. The
    models megalite trains have scores whose sums are exact in both.)
    Raises DataError for other model types."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto.FromString(file.read_bytes())
    kinds = proto.ModelProto.SentencePiece
    if model.trainer_spec.model_type == proto.TrainerSpec.BPE:
        core: Any = _bpe(model, merged={kinds.NORMAL})
    elif model.trainer_spec.model_type == proto.TrainerSpec.UNIGRAM:
        pieces = [(p.piece, p.score) for p in model.pieces]
        core = models.Unigram(pieces, model.trainer_spec.unk_id, model.trainer_spec.byte_fallback)
    else:
        raise DataError(f"{file}: only BPE and unigram SentencePiece models can be converted to tokenizer.json")
    tokenizer = tokenizers.Tokenizer(core)
    tokenizer.normalizer = _normalizer(model.normalizer_spec)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    for piece in model.pieces:  # in the order of their ids, which they keep since the vocabulary has them already
        if piece.type in (kinds.CONTROL, kinds.UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == kinds.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=False)])
    return tokenizer


def _bpe(model: Any, merged: set[int]) -> models.BPE:
    """SentencePiece keeps scores, not merges: any two pieces may join whose sum is a piece, the best sum first."""
    normal = {p.piece: p.score for p in model.pieces if p.type in merged}
    merges = [
        (-score, len(piece) - cut, piece[:cut], piece[cut:])
        for piece, score in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return models.BPE(
        vocab={p.piece: i for i, p in enumerate(model.pieces)},
        merges=[(left, right) for _, _, left, right in sorted(merges)],
        unk_token=model.pieces[model.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
