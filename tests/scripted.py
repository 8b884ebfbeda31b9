"""A tokenizer of bytes, and a model that says what a script has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megalite.data.tokenizer import Tokenizer
from megalite.infer.cache import CachedSequenceInfo
from megalite.models.layers import SequenceInfo

MORE = {256: b"", 257: "né".encode()[:2], 258: "é".encode()[1:] + b"!", 259: "🙂".encode()[:3]}


class Bytes(Tokenizer):
    """Token i < 256 is a byte; more tokens stand for several bytes, also such as end inside a
    character."""

    eod_id: int | None = 256
    vocab_size = 260

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(MORE[i] if i in MORE else bytes([i]) for i in ids).decode(errors="replace")

    def vocabulary(self) -> dict[str, int]:
        return {str(i): i for i in range(self.vocab_size)}

    def save(self, folder: str | Path) -> None:
        raise NotImplementedError


class Scripted:
    """A `Predictor` that says the tokens of a script, one after the other, whatever it is given."""

    num_slots, capacity, turning_points, device = 2, 10_000, range(0), torch.device("cpu")

    def __init__(self, script: Sequence[int], prompt: int = 1, vocab_size: int = 512):
        self.script, self.prompt, self.vocab_size = script, prompt, vocab_size

    def predict(self, tokens_BT: Tensor, places: CachedSequenceInfo, last_B: Tensor) -> Tensor:
        logits_BV = torch.zeros(len(tokens_BT), self.vocab_size)
        for row, last in enumerate(last_B.tolist()):
            place = int(places.position_BT[row, last]) + 1 - self.prompt
            logits_BV[row, self.script[place % len(self.script)]] = 1.0
        return logits_BV

    def logits(self, tokens_BT: Tensor, places: SequenceInfo) -> Tensor:
        raise NotImplementedError
