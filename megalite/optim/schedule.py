"""Learning rate as a function of the step."""

from __future__ import annotations

import math

from megalite.config import OptimizerConfig


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of optimizer step `step`, counted from 1, of a run of `num_steps`.

    The warmup rises linearly and reaches the peak at its last step; without a warmup step 1 has the peak. The decay
    would come to `min_lr` one step after the last, so that no step is wasted at rate 0, not even the only one of a run.
    Megatron-LM (OptimizerParamScheduler) and transformers end in the same way, but give the first step of a warmup rate
    0; torchtitan has this warmup, and a virtual last step. wsd (warmup, stable, decay; Hu et al. 2024) holds the peak
    and falls linearly over the last `decay_steps`."""
    schedule, peak, low = config.schedule, config.lr, config.schedule.min_lr
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    after_peak = num_steps - max(schedule.warmup_steps, 1)
    wanted = (schedule.decay_steps or max(1, num_steps // 10)) if schedule.name == "wsd" else after_peak
    decay_steps = max(0, min(wanted, after_peak))  # all below the peak
    done = min(max(0.0, (step - (num_steps - decay_steps)) / (decay_steps + 1)), 1.0)
    share = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule.name == "cosine" else 1.0 - done
    return low + (peak - low) * share
