"""How fast training goes, and what share of the chip's peak that is (MFU).

The count is the one published MFUs use (PaLM, appendix B, arXiv:2204.02311): the operations the model needs, forward
and backward, whatever recomputation adds, with attention counted in full although a causal mask leaves half of it out.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import yaml

from megalite.config import Config
from megalite.models import weight_table
from megalite.resources import configs_dir


def flops_per_token(
    num_params_without_embedding: float, num_layers: int, hidden_size_of_attention: int, seq_length: float
) -> float:
    """Floating-point operations one training token costs: 6N + 12·L·(H·Q)·T (PaLM, appendix B).

    N counts the parameters each token is multiplied with (`Weight.used`): the embedding, a look-up, is left out, the
    output head is counted even when it is tied to it. 6 = 2 operations a multiply-add × (1 forward + 2
    backward). The second term is the two products of full, non-causal attention over T positions, H heads of Q
    dimensions."""
    return 6.0 * num_params_without_embedding + 12.0 * num_layers * hidden_size_of_attention * seq_length


def model_flops_per_token(config: Config) -> float:
    """`flops_per_token` of the model and sequence length of a config. A layer with a sliding window has no more
    positions than the window; a frozen weight has no gradient, and counts 4 of its 6."""
    model: Any = config.model
    length = config.data.seq_length
    attended = sum(min(model.window(layer) or length, length) for layer in range(model.num_layers))
    table = weight_table(model, config.lora)
    used = sum(weight.numel * weight.used for weight in table)
    frozen = sum(weight.numel * weight.used for weight in table if weight.frozen)
    attention_width = model.num_attention_heads * model.head_size
    return flops_per_token(used, model.num_layers, attention_width, attended / model.num_layers) - 2.0 * frozen


@cache
def _chips() -> list[dict[str, Any]]:
    return yaml.safe_load((configs_dir() / "chips.yaml").read_text())


def chip_peak(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense peak in TFLOP/s of the chip torch.cuda.get_device_name() names; None where configs/chips.yaml has none.

    The table holds bf16 only: fp32's peak depends on whether TF32 is on, so it has no MFU."""
    if dtype is not torch.bfloat16:
        return None
    return next((float(chip["bf16_tflops"]) for chip in _chips() if re.fullmatch(chip["name"], device_name)), None)


class HostEvent:
    """What torch.cuda.Event is in the stream of a GPU, for the CPU: it does its work where it is asked to."""

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostEvent) -> float:
        return (end._seconds - self._seconds) * 1e3


class Meter:
    """Times the steps of one rank. `start` when the clock should run from now (after an evaluation or a save), `tick`
    at the end of a step. A GPU runs behind the host: what is timed there is when it comes to these two calls, and
    neither waits for it."""

    def __init__(self, flops_per_token: float, world_size: int, device: torch.device, dtype: torch.dtype):
        self._flops_per_token = flops_per_token
        self._world_size = world_size
        self._cuda = device if device.type == "cuda" else None
        self._peak = chip_peak(torch.cuda.get_device_name(device), dtype) if self._cuda else None
        self.start()

    def start(self) -> None:
        self._since = self._now()

    def tick(self, tokens: int) -> Tick:
        """The end of a step that consumed `tokens` over all ranks."""
        since, self._since = self._since, self._now()
        memory = torch.cuda.max_memory_allocated(self._cuda) / 2**30 if self._cuda else None
        flops = self._flops_per_token * tokens / self._world_size
        return Tick(since, self._since, tokens, flops, self._peak, memory)

    def _now(self) -> Any:
        event = HostEvent() if self._cuda is None else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class Tick:
    """A step between two events: from when, until when."""

    since: Any
    until: Any
    tokens: int
    flops: float
    """Per chip."""
    peak: float | None
    memory_gb: float | None

    def passed(self) -> bool:
        """Whether the device has come to the end of the step, and with it to all that was asked of it before."""
        return self.until.query()

    def read(self) -> dict[str, float]:
        """What to record of the step: step_time_s, tokens_per_s (all ranks), tflops (TFLOP/s, per chip), mfu (0 to 1,
        known chips only), memory_gb (CUDA only: most GiB allocated on this rank). Waits for its end."""
        self.until.synchronize()
        seconds = self.since.elapsed_time(self.until) / 1e3
        tflops = self.flops / seconds / 1e12
        record = {"step_time_s": seconds, "tokens_per_s": self.tokens / seconds, "tflops": tflops}
        if self.peak is not None:
            record["mfu"] = tflops / self.peak
        if self.memory_gb is not None:
            record["memory_gb"] = self.memory_gb
        return record
