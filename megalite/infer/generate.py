"""Continuing a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from megalite.checkpoint.folder import complete_steps, step_folder
from megalite.checkpoint.load import from_hf
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.errors import ConfigError
from megalite.infer.ranks import load_on_ranks
from megalite.mesh import ALONE, Launch
from megalite.models import build_model, model_config, set_parameters, weight_table
from megalite.models.peft import is_adapter


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have at least this probability (Holtzman et al. 2020)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature {self.temperature} and top-k {self.top_k} must be at least 0, "
                f"top-p {self.top_p} above 0 and at most 1"
            )


def find_model(path: Path) -> Path:
    """The folder of a Hugging Face model, or of an adapter for one, that is meant by a run (its newest checkpoint), a
    checkpoint, or such a folder itself."""
    if (path / "config.json").exists() or is_adapter(path):
        return path
    steps = complete_steps(path / "checkpoints")
    if not steps:
        raise ConfigError(f"{path} is neither a run with a checkpoint nor a Hugging Face folder with a config.json")
    return step_folder(path / "checkpoints", steps[-1])


def open_model(path: Path, launch: Launch, tensor: int = 1, pipeline: int = 1) -> tuple[nn.Module, Tokenizer]:
    """The model in evaluation mode and the precision it is stored in, and its tokenizer: on one device, or over ranks
    that all call this. Raises ConfigError or CheckpointError."""
    folder = find_model(path)
    if launch.world_size == tensor == pipeline == 1:
        return load_model(folder), load_tokenizer(folder)
    return load_on_ranks(folder, launch, tensor, pipeline, None), load_tokenizer(folder)


def load_model(folder: Path, dtype: torch.dtype | None = None, device: torch.device | None = None) -> nn.Module:
    """A clean model with the weights of a Hugging Face folder. Raises ConfigError or CheckpointError."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = model_config({"hf": str(folder)})
    weights, model = weight_table(config), build_model(config)
    read = from_hf(folder, weights, config, ALONE)
    tensors = {weight.name: read(weight, "weight", 0, weight.numel).view(weight.shape) for weight in weights}
    set_parameters(model, {name: nn.Parameter(tensor.to(device, dtype)) for name, tensor in tensors.items()})
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def generate(
    model: nn.Module, prompt: list[int], max_tokens: int, sampling: Sampling, end: int | None
) -> Iterator[int]:
    """Token ids, one at a time, until `end` or `max_tokens`. The model sees at most its `max_positions` last tokens."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    tokens = list(prompt)
    window: int = model.config.max_positions  # type: ignore
    for _ in range(max_tokens):
        logits_V = model(torch.tensor([tokens[-window:]], device=device))[0, -1].float()
        token = int(sample(logits_V, sampling, generator))
        if token == end:
            return
        tokens.append(token)
        yield token


def sample(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token id from fp32 logits."""
    if sampling.temperature == 0:
        return logits_V.argmax()
    logits_V = logits_V / sampling.temperature
    if sampling.top_k and sampling.top_k < len(logits_V):
        best = logits_V.topk(sampling.top_k)
        logits_V = torch.full_like(logits_V, -torch.inf).scatter(0, best.indices, best.values)
    if sampling.top_p < 1:
        ordered, order = logits_V.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # the token that crosses top_p is still in
        logits_V = logits_V.index_fill(0, order[before >= sampling.top_p], -torch.inf)
    return torch.multinomial(logits_V.softmax(-1), 1, generator=generator)[0]


def generate_text(
    model: nn.Module, tokenizer: Tokenizer, prompt: str, max_tokens: int, sampling: Sampling
) -> Iterator[str]:
    """The continuation as text, piece by piece; a piece never ends inside a character."""
    start = tokenizer.encode(prompt) or ([tokenizer.eod_id] if tokenizer.eod_id is not None else [])
    if not start:
        raise ConfigError("an empty prompt needs a tokenizer that has an end-of-document token")
    # Decoded together with the tokens before them, for the space that some tokenizers put between two words, but not
    # with all of them, or each token would cost more than the one before.
    ids, shown, decoded = list(start), 0, len(start)
    before = tokenizer.decode(ids)
    text = before
    for token in generate(model, start, max_tokens, sampling, tokenizer.eod_id):
        ids.append(token)
        text = tokenizer.decode(ids[shown:])
        if not text.endswith("\ufffd"):
            yield text[len(before) :]
            shown, decoded = decoded, len(ids)
            before = text = tokenizer.decode(ids[shown:])
    if len(text) > len(before):
        yield text[len(before) :]
