"""Throughput of training, and model FLOPs utilization (MFU): its share of the chip's peak.

FLOPs are counted as published MFUs count them (PaLM, appendix B, arXiv:2204.02311): what the model
needs, forward and backward, without recomputation, and with attention in full although a causal
mask leaves half of it out.
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
from megalite.models.architecture import CrossSpec
from megalite.utils.resources import configs_dir


def flops_per_token(num_params_without_embedding: float, products: float) -> float:
    """Return the floating-point operations of one training token: 6N + 6P, which is 6N +
    12·L·(H·Q)·T for a model of L layers of full attention over T positions with H heads of Q
    dimensions (PaLM, appendix B).

    N, `num_params_without_embedding`, counts the parameters each token is multiplied with
    (`Weight.used`): the embedding, a look-up, is left out; the output head is counted even when it
    is tied to it. P, `products`, counts its multiplications with other tokens: 2·H·Q·T in a layer
    of full, non-causal attention. 6 = 2 operations a multiply-add × (1 forward + 2 backward)."""
    return 6.0 * num_params_without_embedding + 6.0 * products


def model_flops_per_token(config: Config, seq_length: int | None = None) -> float:
    """Return `flops_per_token` of the model of a config, for sequences of `seq_length`; None: of
    `data.seq_length`.

    A layer with a sliding window attends to no more positions than the window. A frozen weight has
    no weight gradient and counts 4 instead of 6. What stands behind the layers counts for the
    tokens that are predicted; an encoder-decoder's is the mean over the tokens of both stacks."""
    if config.model.architecture.source_layers:
        return _flops_of_stacks(config) / config.sample_tokens
    table = weight_table(config.model, config.lora)
    predictors, predicted = config.model.architecture.predictors, config.objective.predicted()
    used = 0.0
    for weight in table:
        share = predicted if weight.place in ("last", "both") else 1.0
        # The head also predicts the tokens behind the next one, behind norms of their own.
        is_head = weight.place in ("last", "both") and weight.shard == "vocab"
        used += weight.multiplied * share * (1 + len(predictors) if is_head else 1)
    frozen = sum(weight.multiplied for weight in table if weight.frozen)
    mixers = [layer.mixer for layer in (*config.model.architecture.layers, *predictors)]
    length = seq_length or config.data.seq_length
    products = sum(mixer.products(mixer.seen(length)) for mixer in mixers)
    # A frozen matrix lacks the weight-gradient GEMM: 2 of the 6.
    return flops_per_token(used, products) - 2.0 * frozen


def _flops_of_stacks(config: Config) -> float:
    """Return the floating-point operations of training an encoder-decoder on one sample: each
    matrix multiplies the tokens of its stack, and what makes keys and values of the encoder's
    states multiplies these."""
    model, (_, source, target) = config.model, config.lengths
    architecture, hidden = model.architecture, model.hidden_size
    total = target * flops_per_token(model.vocab_size * hidden, 0.0)  # the head
    for number, layer in enumerate(architecture.layers):
        mixer, own = layer.mixer, source if number < architecture.source_layers else target
        elements = mixer.num_elements(hidden) + layer.feed_forward.num_elements(hidden)
        products = mixer.products(mixer.seen(own))
        if isinstance(mixer, CrossSpec):
            of_source = mixer.source_elements(hidden)
            total += source * flops_per_token(of_source, 0.0)
            elements, products = elements - of_source, products + mixer.products(source)
        total += own * flops_per_token(elements, products)
    return total


@cache
def _chips() -> list[dict[str, Any]]:
    return yaml.safe_load((configs_dir() / "chips.yaml").read_text())


def chip_peak(device_name: str, dtype: torch.dtype) -> float | None:
    """Return the dense peak in TFLOP/s of the chip that torch.cuda.get_device_name() calls
    `device_name`.

    None where configs/chips.yaml has no such chip, and for any `dtype` but bf16: the peak of fp32
    depends on whether TF32 is on."""
    chip = chip_row(device_name)
    return float(chip["bf16_tflops"]) if chip and dtype is torch.bfloat16 else None


def chip_row(device_name: str) -> dict[str, Any] | None:
    """Return the line of configs/chips.yaml of the chip that torch.cuda.get_device_name() calls
    `device_name`, if it has one."""
    return next((chip for chip in _chips() if re.fullmatch(chip["name"], device_name)), None)


class HostEvent:
    """Stands in for torch.cuda.Event on the CPU, where work is done when it is called: `record`
    takes the time."""

    def record(self) -> None:
        """Take the time."""
        self._seconds = time.perf_counter()

    def query(self) -> bool:
        """Return True: what was recorded has happened."""
        return True

    def synchronize(self) -> None:
        """Return at once: there is nothing to wait for."""

    def elapsed_time(self, end: HostEvent) -> float:
        """Return the milliseconds from this event to `end`, as torch.cuda.Event does."""
        return (end._seconds - self._seconds) * 1e3


class Meter:
    """Times the steps of one rank.

    Call `start` when the clock should run from now (after an evaluation or a save), `tick` at the
    end of a step. Neither waits for a GPU: they put events in its stream, and the time is when the
    GPU gets there."""

    def __init__(
        self,
        flops_per_token: float,
        world_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        """Take `flops_per_token` of the whole model, which `world_size` chips share.

        `device` and `dtype` give the chip's peak."""
        self.flops_per_token = flops_per_token
        """May change between steps."""
        self._world_size = world_size
        self._cuda = device if device.type == "cuda" else None
        self._peak = chip_peak(torch.cuda.get_device_name(device), dtype) if self._cuda else None
        self.start()

    def start(self) -> None:
        """Begin the next step's time now."""
        self._since = self._now()

    def tick(self, tokens: int) -> Tick:
        """End a step that consumed `tokens` over all ranks, and return it to be read later."""
        since, self._since = self._since, self._now()
        memory = None
        if self._cuda:
            # A number the allocator keeps on the host: asking for it does not wait for the GPU.
            memory = torch.cuda.max_memory_allocated(self._cuda) / 2**30
        flops = self.flops_per_token * tokens / self._world_size
        return Tick(since, self._since, tokens, flops, self._peak, memory)

    def _now(self) -> Any:
        event = HostEvent() if self._cuda is None else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True)
class Tick:
    """Holds a step between the two events `since` and `until`, until its times are read."""

    since: Any
    until: Any
    tokens: int
    """Over all ranks."""
    flops: float
    """Floating-point operations per chip."""
    peak: float | None
    """Peak of the chip in TFLOP/s, if known."""
    memory_gb: float | None
    """Most GiB allocated so far on this rank's GPU."""

    def passed(self) -> bool:
        """Return whether the device has finished the step, and with it all work enqueued before."""
        return self.until.query()

    def read(self) -> dict[str, float]:
        """Wait for the step's end and return its part of the metrics record.

        These are step_time_s, tokens_per_s (all ranks), tflops (TFLOP/s, per chip), mfu (0 to 1,
        known chips only) and memory_gb (CUDA only)."""
        self.until.synchronize()
        seconds = max(self.since.elapsed_time(self.until) / 1e3, 1e-9)  # clocks may stand still
        tflops = self.flops / seconds / 1e12
        record = {
            "step_time_s": seconds,
            "tokens_per_s": self.tokens / seconds,
            "tflops": tflops,
        }
        if self.peak is not None:
            record["mfu"] = tflops / self.peak
        if self.memory_gb is not None:
            record["memory_gb"] = self.memory_gb
        return record
