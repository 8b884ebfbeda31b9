"""Learning rate as a function of the step."""

from __future__ import annotations

import math

from megalite.config import OptimizerConfig


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Rate of optimizer step `step`, counted from 1, of `num_steps`: linear warmup, then the schedule.

    wsd (warmup, stable, decay; Hu et al. 2024) holds the peak and falls linearly over the last `decay_steps`."""
    schedule, peak, low = config.schedule, config.lr, config.schedule.min_lr
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    done = (step - schedule.warmup_steps) / max(1, num_steps - schedule.warmup_steps)
    if schedule.name == "constant":
        return peak
    if schedule.name == "cosine":
        return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
    if schedule.name == "wsd":
        decay_steps = schedule.decay_steps or num_steps // 10
        decay_steps = max(1, min(decay_steps, num_steps - schedule.warmup_steps))
        done = max(0.0, (step - (num_steps - decay_steps)) / decay_steps)
    return low + (peak - low) * (1.0 - min(done, 1.0))
