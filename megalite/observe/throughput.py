"""How fast training goes, and what share of the chip's peak that is (MFU).

The count is the one published MFUs use (PaLM, appendix B, arXiv:2204.02311): the operations the model needs, forward
and backward, whatever recomputation adds, with attention counted in full although a causal mask leaves half of it out.
"""

from __future__ import annotations

import re
import time
from functools import cache
from typing import Any

import torch
import yaml

from megalite.config import Config
from megalite.models import weight_table
from megalite.resources import configs_dir


def flops_per_token(
    num_params_without_embedding: int, num_layers: int, hidden_size_of_attention: int, seq_length: int
) -> float:
    """Floating-point operations one training token costs: 6N + 12·L·(H·Q)·T (PaLM, appendix B).

    N counts the parameters each token is multiplied with: the embedding, a look-up, is left out, the output head is
    counted even when it is tied to it. 6 = 2 operations a multiply-add × (1 forward + 2 backward). The second term is
    the two products of full, non-causal attention over T positions, H heads of Q dimensions."""
    return 6.0 * num_params_without_embedding + 12.0 * num_layers * hidden_size_of_attention * seq_length


def model_flops_per_token(config: Config) -> float:
    """`flops_per_token` of the model and sequence length of a config."""
    model: Any = config.model
    # The embeddings only look up; the head multiplies, tied or not.
    matrices = sum(w.numel for w in weight_table(model) if w.name not in ("embedding.weight", "positions.weight"))
    head = model.vocab_size * model.hidden_size if model.tie_embeddings else 0
    attention_width = model.num_attention_heads * model.head_size
    return flops_per_token(matrices + head, model.num_layers, attention_width, config.data.seq_length)


@cache
def _chips() -> list[dict[str, Any]]:
    return yaml.safe_load((configs_dir() / "chips.yaml").read_text())


def chip_peak(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense peak in TFLOP/s of the chip torch.cuda.get_device_name() names; None where configs/chips.yaml has none.

    The table holds bf16 only: fp32's peak depends on whether TF32 is on, so it has no MFU."""
    if dtype is not torch.bfloat16:
        return None
    return next((float(chip["bf16_tflops"]) for chip in _chips() if re.fullmatch(chip["name"], device_name)), None)


class Meter:
    """Times the steps of one rank. `start` when the clock should run from now (after an evaluation or a save), `tick`
    once the step's loss has been read: CUDA runs behind the host, and reading a number waits for it."""

    def __init__(self, flops_per_token: float, world_size: int, device: torch.device, dtype: torch.dtype):
        self._flops_per_token = flops_per_token
        self._world_size = world_size
        self._cuda = device if device.type == "cuda" else None
        self._peak = chip_peak(torch.cuda.get_device_name(device), dtype) if self._cuda else None
        self.start()

    def start(self) -> None:
        self._since = time.perf_counter()

    def tick(self, tokens: int) -> dict[str, float]:
        """What to record of a step that consumed `tokens` over all ranks: step_time_s, tokens_per_s (all ranks), tflops
        (TFLOP/s, per chip), mfu (0 to 1, known chips only), memory_gb (CUDA only: most GiB allocated on this rank)."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        tflops = self._flops_per_token * tokens / seconds / self._world_size / 1e12
        record = {"step_time_s": seconds, "tokens_per_s": tokens / seconds, "tflops": tflops}
        if self._peak is not None:
            record["mfu"] = tflops / self._peak
        if self._cuda is not None:
            record["memory_gb"] = torch.cuda.max_memory_allocated(self._cuda) / 2**30
        return record
