"""What encoders are asked: the tokens that fill the gaps of a text, and a vector for a text."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.errors import ConfigError, DataError, NotFinite
from megalite.infer.batch import NOT_FINITE
from megalite.infer.generate import find_model, load_model
from megalite.models import model_config, read_hf_config
from megalite.models.layers import Decoder, SequenceInfo
from megalite.utils.files import replacing
from megalite.utils.outside import read_json, read_object, shown

BATCH_TOKENS = 8192
"""Most tokens of a batch, padding included."""
MASK = "[MASK]"
"""Stands for the mask token in a text, whatever the tokenizer calls it."""
Pooling = Literal["mean", "cls"]


class Filling(NamedTuple):
    """One guess of what stands in a gap."""

    text: str
    probability: float


def is_encoder(folder: Path) -> bool:
    """Return whether a folder holds an encoder. Raise ConfigError."""
    return model_config({"hf": str(folder)}).PREDICTS == "masked"


class Encoder:
    """An encoder with its tokenizer, on one device."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, folder: Path):
        """Take a loaded `model`; `folder` is read for how sentence-transformers pools."""
        self.model, self.tokenizer, self.folder = model, tokenizer, folder
        self.device = next(model.parameters()).device
        self.max_positions: int = model.config.max_positions
        if tokenizer.begin_id is None or tokenizer.eod_id is None:
            raise DataError(
                f"{folder}: an encoder's texts are put between two tokens, of which its tokenizer names "
                f"{'none' if tokenizer.eod_id is None else 'the second only'}; tokenizer_config.json needs a cls_token "
                "and a sep_token"
            )
        self._begin, self._end = tokenizer.begin_id, tokenizer.eod_id

    @classmethod
    def open(cls, path: Path, fills: bool = False) -> Encoder:
        """Load a run, a checkpoint or a Hugging Face folder. Raise ConfigError for another model
        than an encoder, and for one without a head for masked tokens where it is to fill
        (`fills`)."""
        folder = find_model(path)
        config = model_config({"hf": str(folder)})
        if not is_encoder(folder):
            raise ConfigError(
                f"{folder} holds a decoder ({config.family}), which goes on with texts; `megalite generate` asks it"
            )
        kind = str((read_hf_config(folder).get("architectures") or [""])[0])
        # transformers writes "BertModel" for a body alone, "BertForMaskedLM" for one with this
        # head.
        if fills and (config.task != "masked" or kind.endswith("Model")):
            raise ConfigError(f"{folder} holds a {kind}, which has no head to fill gaps")
        tokenizer = load_tokenizer(folder)
        # Embedding needs no head: one that the folder lacks is drawn, and never used.
        return cls(load_model(folder, seed=None if fills else 0), tokenizer, folder)

    def fill(self, texts: Sequence[str], top_k: int = 5) -> list[list[list[Filling]]]:
        """Return for each text, and for each `[MASK]` in it, the `top_k` likeliest tokens. Raise
        ConfigError for a text without a gap, or one that is too long."""
        mask = self.tokenizer.mask_id
        if mask is None:
            raise DataError(f"{self.folder}: the tokenizer names no mask_token")
        own = self.tokenizer.decode([mask])
        rows = [self._row(self.tokenizer.encode(text.replace(MASK, own))) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if mask not in row:
                raise ConfigError(f"{shown(text)} has no {MASK} to fill")
            if len(row) > self.max_positions:
                raise ConfigError(
                    f"{shown(text)} has {len(row):,} tokens, but the model's max_positions = {self.max_positions:,}"
                )
        found: list[list[list[Filling]]] = [[] for _ in rows]
        for numbers, tokens_BT, x_BTD in state_batches(self.model, rows):
            # [B, T] bool; indexing by it lists the gaps row by row, in the order of `nonzero`.
            at = tokens_BT == mask
            logits = logits_of(self.model, x_BTD)[at]
            best = logits.softmax(-1).topk(min(top_k, logits.shape[-1]))
            gaps = at.nonzero()[:, 0].tolist()
            for row, tokens, shares in zip(
                gaps, best.indices.tolist(), best.values.tolist(), strict=True
            ):
                texts = [self.tokenizer.decode([token]) for token in tokens]
                found[numbers[row]].append(list(map(Filling, texts, shares)))
        return found

    def embed(
        self, texts: Sequence[str], pooling: Pooling | None = None, normalize: bool | None = None
    ) -> npt.NDArray[np.float32]:
        """Return a vector for each text, [n, D]: the mean of its tokens' final hidden states, or
        that of its first token (`pooling`). `normalize` scales it to length 1. What is not given is
        as the folder of sentence-transformers says, or else the mean, of any length. Texts are cut
        at the length given there, or at max_positions."""
        return self.embed_rows(self.rows(texts, self.longest), pooling, normalize)

    @property
    def longest(self) -> int:
        """Return the most tokens of a text to embed, the two around it included."""
        return min(self.max_positions, self.pooling.longest or self.max_positions)

    @property
    def pooling(self) -> PoolingConfig:
        """Return how the folder's vectors are made. Raise ConfigError; see `read_pooling`."""
        return read_pooling(self.folder)

    def rows(self, texts: Sequence[str], longest: int | None = None) -> list[list[int]]:
        """Return the tokens of texts, between the two that an encoder's texts have around them; cut
        at `longest`."""
        # Room for the two tokens that `_row` puts around a text.
        ends = None if longest is None else longest - 2
        return [self._row(ids[:ends]) for ids in self.tokenizer.encode_batch(texts)]

    def embed_rows(
        self,
        rows: Sequence[list[int]],
        pooling: Pooling | None = None,
        normalize: bool | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return what `embed` does, of rows of tokens. Raise NotFinite for vectors that are NaN or
        infinite."""
        usual = self.pooling
        pooling = pooling or usual.pooling
        normalize = usual.normalize if normalize is None else normalize
        vectors = np.zeros((len(rows), self.model.config.hidden_size), np.float32)
        for numbers, tokens_BT, x_BTD in state_batches(self.model, rows):
            x_BTD = self.model.final_states(x_BTD).float()
            lengths_B1 = torch.tensor(
                [len(rows[number]) for number in numbers], device=self.device
            )[:, None]
            here_BT = torch.arange(tokens_BT.shape[1], device=self.device) < lengths_B1
            # The mean includes the two tokens around a text, as sentence-transformers has it.
            found_BD = (
                (x_BTD * here_BT[..., None]).sum(1) / lengths_B1
                if pooling == "mean"
                else x_BTD[:, 0]
            )
            vectors[numbers] = (F.normalize(found_BD) if normalize else found_BD).cpu().numpy()
        if not np.isfinite(vectors).all():
            raise NotFinite(NOT_FINITE)
        return vectors

    @property
    def scores_pairs(self) -> bool:
        """Return whether the model tells one number of two texts (a cross-encoder)."""
        return self.model.config.task == "classification" and len(self.model.config.labels) == 1

    def scores(self, query: str, texts: Sequence[str]) -> tuple[npt.NDArray[np.float32], int]:
        """Return how well each text goes with a query by a model that `scores_pairs`, [n] between 0
        and 1, and how many tokens these are. Texts are cut where the two together are longer than
        `longest`."""
        asked = [self._begin, *self.tokenizer.encode(query), *self.tokenizer.between_ids]
        first = asked[: self.longest - 1]
        room = self.longest - len(first) - 1
        seconds = self.tokenizer.encode_batch(texts)
        rows = [[*first, *ids[:room], self._end] for ids in seconds]
        begins = [len(first)] * len(rows) if self.model.config.has_token_types else None
        logits = np.zeros(len(rows), np.float32)
        for numbers, _, x_BTD in state_batches(self.model, rows, begins):
            logits_B11 = logits_of(self.model, x_BTD[:, :1])
            logits[numbers] = logits_B11[:, 0, 0].cpu().numpy()
        # As sentence-transformers has it for models of one label: a logistic function.
        shares = np.asarray(1 / (1 + np.exp(-logits)), np.float32)
        return shares, sum(map(len, rows))

    def _row(self, ids: Sequence[int]) -> list[int]:
        return [self._begin, *ids, self._end]


@torch.no_grad()
def state_batches(
    model: Decoder, rows: Sequence[list[int]], seconds: Sequence[int] | None = None
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield the numbers of some rows, their tokens [B,T] and the states behind the last layer
    [B,T,D]. Rows of a batch are of like length, padded behind with their last token. Each row's
    second text begins at its number in `seconds`."""
    device, is_encoder = next(model.parameters()).device, model.config.PREDICTS == "masked"
    # Longest first: the first of a batch is its width.
    left = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
    while left:
        width = len(rows[left[0]])
        count = max(1, BATCH_TOKENS // width)
        numbers, left = left[:count], left[count:]
        # With a token of the row's own: any is hidden, and each must be one of the vocabulary.
        padded = [row + row[-1:] * (width - len(row)) for row in (rows[n] for n in numbers)]
        tokens_BT, index_T = torch.tensor(padded, device=device), torch.arange(width, device=device)
        lengths_B1 = torch.tensor([len(rows[n]) for n in numbers], device=device)[:, None]
        places = SequenceInfo(index_T[None], index_T[None])
        if is_encoder:
            # Document 0 is the text, 1 the padding, to which no token of the text attends.
            places = replace(places, document_BT=(index_T >= lengths_B1).long())
        else:  # for RoPE that is scaled by the length: each row's own
            places = replace(places, whole_length=lengths_B1[..., None])
        if seconds is not None:
            starts_B1 = torch.tensor([seconds[n] for n in numbers], device=device)[:, None]
            places = replace(places, type_BT=(index_T >= starts_B1).long())
        yield numbers, tokens_BT, model.run_layers(model.embed(tokens_BT, places), places)


def logits_of(model: Decoder, x_BTD: Tensor) -> Tensor:
    """Return the logits [B,T,V] in fp32 of states behind the last layer. Raise NotFinite for some
    that are NaN or infinite: a class, a word and an answer would be told all the same, the first of
    each."""
    logits_BTV = model.project(model.finish(x_BTD)).float()
    if not logits_BTV.isfinite().all():
        raise NotFinite(NOT_FINITE)
    return logits_BTV


class PoolingConfig(NamedTuple):
    """How a folder's vectors are made of its hidden states."""

    pooling: Pooling = "mean"
    normalize: bool = False
    longest: int | None = None
    """Most tokens of a text, the two around it included."""


def read_pooling(folder: Path) -> PoolingConfig:
    """Return what the files of sentence-transformers in `folder` say, of any version. Raise
    ConfigError for another way to pool than by the mean or the first token."""
    if not (folder / "modules.json").is_file():
        return PoolingConfig()
    modules = read_json(folder / "modules.json", ConfigError)
    if not isinstance(modules, list) or not all(isinstance(each, dict) for each in modules):
        raise ConfigError(f"{folder / 'modules.json'} is no list of modules")
    # A type is a class with its modules, as in "sentence_transformers.models.Pooling".
    kinds = {str(each.get("type")).rpartition(".")[2]: str(each.get("path")) for each in modules}
    if others := kinds.keys() - {"Transformer", "Pooling", "Normalize"}:
        raise ConfigError(
            f"{folder / 'modules.json'} has {', '.join(sorted(others))}, which are not known"
        )
    file = folder / kinds.get("Pooling", "1_Pooling") / "config.json"
    values = read_object(file, ConfigError)
    # Before version 6 each way had a key of its own.
    if "pooling_mode" in values:
        ways = [values["pooling_mode"]]
    else:
        keys = [key for key, value in values.items() if value is True]
        old = [key.removeprefix("pooling_mode_") for key in keys if key.startswith("pooling_mode_")]
        ways = [way.removesuffix("_tokens").removesuffix("_token") for way in old]
    if ways not in (["mean"], ["cls"]):
        raise ConfigError(
            f"{file} pools by {', '.join(map(str, ways)) or 'nothing'}; known are mean and cls"
        )
    length = folder / "sentence_bert_config.json"
    longest = read_object(length, ConfigError).get("max_seq_length") if length.is_file() else None
    # The two tokens around a text count, and something must be left of it.
    if longest is not None and (not isinstance(longest, int) or longest < 3):
        raise ConfigError(f"{length}: max_seq_length = {shown(longest)} is no number of at least 3")
    return PoolingConfig("mean" if ways == ["mean"] else "cls", "Normalize" in kinds, longest)


def read_texts(files: Sequence[Path], key: str = "text") -> list[str]:
    """Return the texts in files: the lines of each, or of the objects in a .jsonl what stands under
    `key`. Raise DataError that names the file and the line."""
    texts = []
    for where, line, found in read_lines(files):
        text = found.get(key) if isinstance(found, dict) else found
        if not isinstance(text, str):
            raise DataError(f"{where}: {shown(line)} is no object with a text under {key!r}")
        texts.append(text)
    return texts


def read_lines(files: Sequence[Path]) -> Iterator[tuple[str, str, Any]]:
    """Yield where each line of files is, the line, and what it holds: itself, or in a .jsonl its
    object; None where there is none. Raise DataError for a file that cannot be read, or is empty."""
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file} is not UTF-8 (byte 0x{error.object[error.start]:02x} at position {error.start:,}): convert "
                "it, as by `iconv -f latin1 -t utf-8`"
            ) from None
        except OSError as error:
            raise DataError(f"{file}: {error.strerror or error}") from None
        if not text:
            raise DataError(f"{file} is empty")
        is_json = file.suffix in (".jsonl", ".ndjson")
        # Not `splitlines`, which also splits at characters that stand within a JSON text.
        for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
            found: Any = line
            if is_json:
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError):  # the latter: lists in lists without an end
                    found = None
            is_known = isinstance(found, dict) or not is_json
            yield f"{file}, line {number}", line, found if is_known else None


def write_vectors(
    output: Path | None, texts: Sequence[str], vectors: npt.NDArray[np.float32]
) -> None:
    """Write vectors [n, D] of `texts` to a .npy, or as JSON lines with their texts to a .jsonl, or
    to the console. Raise DataError where the file cannot be written."""
    if output and output.suffix == ".npy":
        held = io.BytesIO()
        np.save(held, vectors)
        data = held.getvalue()
    else:
        both = zip(texts, vectors, strict=True)
        lines = [
            json.dumps({"text": text, "embedding": vector.tolist()}) + "\n" for text, vector in both
        ]
        data = "".join(lines).encode()
    if output is None:
        print(data.decode(), end="")
        return
    try:
        # Whole or not at all: half of an array of vectors would be read as fewer texts.
        with replacing(output) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise DataError(f"{output}: {error.strerror or error}") from None
