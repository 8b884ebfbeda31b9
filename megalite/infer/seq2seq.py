"""Answers of encoder-decoders: for each source a target, by its likeliest tokens, drawn, or by beam
search.

All sources of a call are a batch, whose rows go on until each has its end. The encoder's states
make keys and values once; the decoder's are kept, so that each further token costs the work of one.
Letters in shapes are those of models/t5.py; C counts the tokens that a row has so far, W beams of a
source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.errors import ConfigError, DataError, NotFinite
from megalite.infer.batch import NOT_FINITE
from megalite.infer.beams import Beams, BeamSearch, check_beams
from megalite.infer.generate import find_model, load_model
from megalite.infer.habits import Habits, read_habits
from megalite.infer.sampling import Sampling, choose
from megalite.kernels.attention import attention
from megalite.kernels.attention_kinds import AttentionKind
from megalite.models import model_config
from megalite.models.layers import SequenceInfo, Source
from megalite.models.t5 import T5, DecoderLayer, buckets

ALL = AttentionKind(scale=1.0, causal=False)
BATCH_TOKENS = 8192
"""Most tokens of a batch's sources, padding included, beams counted."""


class LayerCache(NamedTuple):
    """What a decoder layer keeps: keys and values of the source [B,S,H,K], and of the target
    [B,room,H,K]."""

    source_keys: Tensor
    source_values: Tensor
    keys: Tensor
    values: Tensor

    def of(self, rows: Tensor) -> LayerCache:
        """Return the cache with these rows, [B']."""
        return LayerCache(*(x[rows] for x in self))


class Decoding:
    """Targets of a batch of sources, as far as they have come."""

    def __init__(
        self,
        model: T5,
        sources: Sequence[Sequence[int]],
        room: int,
        check: Callable[[], None] = lambda: None,
    ):
        """Encode the `sources`. There is room for so many tokens of each target. `check` is called
        before each of them, and may raise to end all."""
        self.model, self.length, self._check = model, 0, check
        device = model.embedding.weight.device
        width, start = max(map(len, sources)), model.config.START_TOKEN
        tokens_BS = torch.tensor(
            [[*row, *[start] * (width - len(row))] for row in sources], device=device
        )
        index_S = torch.arange(width, device=device)
        # Padding is a document of its own, to which no token attends.
        lengths_B1 = torch.tensor([len(row) for row in sources], device=device)[:, None]
        self.document_BS = (index_S >= lengths_B1).long()
        places = SequenceInfo(index_S[None], index_S[None], self.document_BS)
        memory_BSD = model.encode(Source(tokens_BS, places))
        self.table_NH, self._undropped = model.bias(), SequenceInfo.whole(1, device)
        self.layers = [layer for layer in model.layers.values() if isinstance(layer, DecoderLayer)]
        self.caches = [self._cache(layer, memory_BSD, room) for layer in self.layers]

    def _cache(self, layer: DecoderLayer, memory_BSD: Tensor, room: int) -> LayerCache:
        size = layer.cross.head_size
        keys, values = layer.cross.kv(memory_BSD).unflatten(-1, (-1, size)).chunk(2, dim=2)
        empty = keys.new_zeros(len(keys), room, *keys.shape[2:])
        return LayerCache(keys, values, empty, empty.clone())

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone, in this order; a row may come several times."""
        self.document_BS = self.document_BS[rows]
        self.caches = [cache.of(rows) for cache in self.caches]

    def step(self, tokens_B: Tensor) -> Tensor:
        """Take the next token of each row, and return the logits of the one behind it, fp32
        [B,V]."""
        self._check()
        model, config, at = self.model, self.model.config, self.length
        # Of the new token's position alone, to all before it and itself.
        index_C = torch.arange(at + 1, device=tokens_B.device)
        found_1C = buckets(
            index_C[-1:], index_C, False, config.relative_buckets, config.relative_distance
        )
        bias = F.embedding(found_1C, self.table_NH).permute(2, 0, 1)[None]
        own_B1 = torch.zeros_like(tokens_B)[:, None]
        x = model.embedding(tokens_B[:, None])
        for layer, cache in zip(self.layers, self.caches, strict=True):
            mixer, cross = layer.attention, layer.cross
            heads = mixer.qkv(layer.attention_norm(x)).unflatten(-1, (-1, mixer.head_size))
            q, k, v = heads.chunk(3, dim=2)
            # In place, into room made once: what grows by a token a step would be copied a step.
            cache.keys[:, at], cache.values[:, at] = k[:, 0], v[:, 0]
            attended = attention(
                q, cache.keys[:, : at + 1], cache.values[:, : at + 1], kind=ALL, bias=bias
            )
            normed, x = layer.cross_norm(mixer.out(attended), x)
            q = cross.q(normed).unflatten(-1, (-1, cross.head_size))
            attended = attention(
                q, cache.source_keys, cache.source_values, own_B1, ALL, self.document_BS
            )
            normed, x = layer.mlp_norm(cross.out(attended), x)
            x = x + layer.mlp(normed, self._undropped)
        self.length += 1
        logits_BV = model.project(model.finish(model.norm(x)))[:, 0].float()
        if not logits_BV.amax(-1).isfinite().all():
            raise NotFinite(NOT_FINITE)
        return logits_BV


class TargetGenerator:
    """An encoder-decoder with its tokenizer, on one device."""

    def __init__(self, model: T5, tokenizer: Tokenizer, habits: Habits, folder: Path | None = None):
        """Take a loaded `model`; `habits` say what is not asked for, and which tokens end a
        target; `folder` is where it was read from."""
        self.model, self.tokenizer, self.habits = model, tokenizer, habits
        self.folder = folder
        self.ends = habits.ends
        self.max_positions: int = model.config.max_positions

    @classmethod
    def open(cls, path: Path) -> TargetGenerator:
        """Load a run, a checkpoint or a Hugging Face folder. Raise ConfigError for another model
        than an encoder-decoder."""
        folder = find_model(path)
        config = model_config({"hf": str(folder)})
        if config.task != "seq2seq":
            raise ConfigError(
                f"{folder} holds no encoder-decoder, but a model of model.task: {config.task}"
            )
        tokenizer = load_tokenizer(folder)
        if tokenizer.eod_id is None:
            raise DataError(f"{folder}: its tokenizer names no eos_token, with which sources end")
        model = load_model(folder)
        assert isinstance(model, T5)
        return cls(model, tokenizer, read_habits(folder, tokenizer), folder)

    def source_ids(self, text: str) -> list[int]:
        """Return the token ids of a source, with the end token behind it."""
        assert self.tokenizer.eod_id is not None
        return [*self.tokenizer.begin_ids, *self.tokenizer.encode(text), self.tokenizer.eod_id]

    def answer(
        self,
        texts: Sequence[str],
        max_tokens: int,
        sampling: Sampling | None = None,
        beams: Beams | None = None,
        num_answers: int = 1,
    ) -> list[str]:
        """Return the target of each source, or several, as `generate` does. Raise ConfigError for a
        source that is too long."""
        sources = [self.source_ids(text) for text in texts]
        found = self.generate(sources, max_tokens, sampling, beams, num_answers)
        return [self.tokenizer.decode_plain(ids) for ids in found]

    def generate(
        self,
        sources: Sequence[Sequence[int]],
        max_tokens: int,
        sampling: Sampling | None = None,
        beams: Beams | None = None,
        num_answers: int = 1,
        check: Callable[[], None] = lambda: None,
    ) -> list[list[int]]:
        """Return the tokens of each source's target, at most `max_tokens`, without the start and
        the end: by `beams`, or as `sampling` says, by default as the model's folder does. Of
        `sampling` beams follow what restricts, and draw nothing.

        With `num_answers` there are so many rows for each source, one behind another: the best
        beams, or drawn ones. Row n of a call draws with the seed and n. `check` is called before
        every step, and may raise.

        Raise ConfigError for a source without tokens, one that is longer than the model's
        max_positions, or token ids that it does not know."""
        for source in sources:
            if not 0 < len(source) <= self.max_positions:
                raise ConfigError(
                    f"a source has {len(source):,} tokens; it must have at least one, and at most the model's "
                    f"max_positions = {self.max_positions:,}"
                )
            last = self.model.config.vocab_size - 1
            unknown = next((token for token in source if not 0 <= token <= last), None)
            if unknown is not None:
                raise ConfigError(
                    f"a source has the token {unknown}, but the model knows those from 0 to {last}"
                )
        room, sampling = min(max_tokens, self.max_positions), sampling or self.habits.sampling
        if beams:
            check_beams(beams, num_answers)
        else:
            sources = [source for source in sources for _ in range(num_answers)]
        found: dict[int, list[list[int]]] = {}
        # Like lengths together, for little padding; each row keeps its number, which seeds it.
        left = sorted(range(len(sources)), key=lambda number: -len(sources[number]))
        while left and room > 0:
            count = max(1, BATCH_TOKENS // (len(sources[left[0]]) * (beams.width if beams else 1)))
            some, left = left[:count], left[count:]
            with torch.inference_mode():
                decoding = Decoding(self.model, [sources[number] for number in some], room, check)
                targets = (
                    _by_beams(decoding, beams, sampling, room, self.ends)
                    if beams
                    else _one_by_one(decoding, sampling, some, room, self.ends)
                )
            found |= zip(some, targets, strict=True)
        num_each = num_answers if beams else 1
        nothing: list[list[int]] = [[]] * num_each
        return [
            target
            for number in range(len(sources))
            for target in found.get(number, nothing)[:num_each]
        ]


def _one_by_one(
    decoding: Decoding, sampling: Sampling, numbers: Sequence[int], room: int, ends: frozenset[int]
) -> list[list[list[int]]]:
    """Return the target of each row of a batch, alone in a list, by choosing one token after
    another. `numbers` are those of the rows in the call."""
    device, start = decoding.document_BS.device, decoding.model.config.START_TOKEN
    targets: list[list[int]] = [[] for _ in numbers]
    running = list(range(len(numbers)))
    tokens_B = torch.full((len(numbers),), start, device=device)
    settings = [replace(sampling, seed=(sampling.seed + number) % 2**63) for number in numbers]
    for length in range(room):
        logits_BV = decoding.step(tokens_B)
        some = [[start, *targets[row]] for row in running]
        chosen = choose(
            logits_BV,
            [settings[row] for row in running],
            some,
            [length] * len(running),
            [ends] * len(running),
        ).tolist()
        going = []
        # A row's place in the batch changes as others end; its number in `targets` stays.
        for place, (row, token) in enumerate(zip(running, chosen, strict=True)):
            if token not in ends:
                targets[row].append(token)
                going.append(place)
        if not going:
            break
        if len(going) < len(running):
            decoding.keep(torch.tensor(going, device=device))
        running = [running[place] for place in going]
        tokens_B = torch.tensor([targets[row][-1] for row in running], device=device)
    return [[target] for target in targets]


def _by_beams(
    decoding: Decoding, beams: Beams, sampling: Sampling, room: int, ends: frozenset[int]
) -> list[list[list[int]]]:
    """Return for each source of a batch as many targets as there are `beams`, the best first."""
    device, start = decoding.document_BS.device, decoding.model.config.START_TOKEN
    num_rows = len(decoding.document_BS)
    search = BeamSearch(num_rows, beams, room, ends, device)
    rows = torch.arange(num_rows, device=device).repeat_interleave(beams.width)
    tokens = torch.full((len(rows),), start, device=device)
    while True:
        decoding.keep(rows)
        rows = search.advance(decoding.step(tokens), sampling, [[start]] * num_rows)
        if search.is_done:
            return [[each.tokens for each in found] for found in search.found()]
        tokens = search.tokens
