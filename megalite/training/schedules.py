"""Learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from megalite.config import OptimizerConfig, ScheduleConfig


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of optimizer step `step`, counted from 1, of a run of `num_steps`,
    as `config` sets it.

    The warmup rises linearly and reaches the peak at its last step; without a warmup step 1 has the
    peak. The decay would reach `min_lr` one step after the last, so that no step is wasted at rate
    0, not even the only one of a run. Megatron-LM (OptimizerParamScheduler) and transformers end in
    the same way, but give the first step of a warmup rate 0; torchtitan has this warmup, and a
    virtual last step."""
    schedule = config.schedule
    warmup = schedule.warmup(num_steps)
    # step / warmup, so that step 1 is above 0 and step `warmup` is the peak.
    if step <= warmup:
        return config.lr * step / warmup
    return schedule.after_warmup(step, num_steps, config.lr)


def share_decayed(step: int, num_steps: int, decay_steps: int) -> float:
    """Return which share of a decay over the last `decay_steps` of `num_steps` is over at `step`: 0
    before it, 1 one step after the last."""
    # Divided by one more than there are steps: the last step is not at 1 yet.
    return min(max(0.0, (step - (num_steps - decay_steps)) / (decay_steps + 1)), 1.0)


class Constant(ScheduleConfig):
    """Stay at the peak from the end of the warmup on."""

    name: Literal["constant"] = "constant"

    def after_warmup(self, step: int, num_steps: int, peak: float) -> float:
        """Return `peak`, whatever `step` and `num_steps` are."""
        return peak


class Linear(ScheduleConfig):
    """Decay in a straight line from the peak to `min_lr`."""

    name: Literal["linear"] = "linear"

    def after_warmup(self, step: int, num_steps: int, peak: float) -> float:
        """Return the learning rate of step `step` of `num_steps`, between `peak` and `min_lr`."""
        decayed = share_decayed(step, num_steps, self.steps_below_peak(num_steps))
        return self.min_lr + (peak - self.min_lr) * self.shape(decayed)

    def shape(self, decayed: float) -> float:
        """Return the share of the way from `min_lr` to the peak when `decayed` of the decay is
        over."""
        return 1.0 - decayed

    def steps_below_peak(self, num_steps: int) -> int:
        """Return how many steps follow the one that has the peak: the last of the warmup, or the
        first of all."""
        return max(0, num_steps - max(self.warmup(num_steps), 1))


class Cosine(Linear):
    """Decay along half a cosine from the peak to `min_lr` (Loshchilov and Hutter 2017)."""

    name: Literal["cosine"] = "cosine"  # type: ignore[assignment]

    def shape(self, decayed: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * decayed))


class Polynomial(Linear):
    """Decay to `min_lr` along a power of the share of steps that are left."""

    name: Literal["polynomial"] = "polynomial"  # type: ignore[assignment]
    power: float = Field(
        1.0, gt=0, description="Above 1 the rate falls fast at first, below 1 at last."
    )

    def shape(self, decayed: float) -> float:
        return (1.0 - decayed) ** self.power


class Exponential(Linear):
    """Decay to `min_lr` by the same factor in every step."""

    name: Literal["exponential"] = "exponential"  # type: ignore[assignment]
    min_lr: float = Field(gt=0, description="Learning rate at the end of the decay.")

    def after_warmup(self, step: int, num_steps: int, peak: float) -> float:
        decayed = share_decayed(step, num_steps, self.steps_below_peak(num_steps))
        # A line in the logarithm of the rate.
        return peak * (self.min_lr / peak) ** decayed


class RangeTest(ScheduleConfig):
    """Rise from `start_lr` at the first step to the peak at the last one by the same factor in every
    step, to find out which rates are too large (Smith 2017)."""

    name: Literal["range_test"] = "range_test"
    warmup_steps: Literal[0] = Field(0, description="None: the rate rises all the time.")
    start_lr: float = Field(gt=0, description="Learning rate of the first step.")

    def after_warmup(self, step: int, num_steps: int, peak: float) -> float:
        """Return the learning rate of step `step` of `num_steps`, between `start_lr` and `peak`."""
        share = (step - 1) / max(1, num_steps - 1)
        return self.start_lr * (peak / self.start_lr) ** share


class InverseSquareRoot(ScheduleConfig):
    """Decay with the inverse square root of the step, whatever the length of the run (Vaswani et
    al. 2017)."""

    name: Literal["inverse_sqrt"] = "inverse_sqrt"
    timescale: int | None = Field(
        None,
        gt=0,
        description="Steps until the rate is √½ of the peak. Those of the warmup, or 10,000 without one.",
    )

    def after_warmup(self, step: int, num_steps: int, peak: float) -> float:
        warmup = self.warmup(num_steps)
        timescale = self.timescale or warmup or 10_000
        # Without a warmup step 1 has the peak.
        return max(self.min_lr, peak * math.sqrt(timescale / (timescale + step - max(warmup, 1))))


class WarmupStableDecay(Linear):
    """Stay at the peak, and decay to `min_lr` over the last `decay_steps` (Hu et al. 2024)."""

    name: Literal["wsd"] = "wsd"  # type: ignore[assignment]
    decay_steps: int | None = Field(
        None, gt=0, description="Steps of the final decay. Defaults to a tenth of the run."
    )
    decay: Literal["linear", "sqrt"] = Field(
        "linear",
        description="A straight line, or 1 - √ of the share of the decay that is over (Hägele et al. 2024).",
    )

    def shape(self, decayed: float) -> float:
        return 1.0 - (math.sqrt(decayed) if self.decay == "sqrt" else decayed)

    def steps_below_peak(self, num_steps: int) -> int:
        wanted = self.decay_steps or max(1, num_steps // 10)
        # The decay begins behind the warmup, however long it was asked to be.
        return min(wanted, super().steps_below_peak(num_steps))

    def check(self, num_steps: int) -> None:
        after_warmup = num_steps - self.warmup(num_steps)
        if (self.decay_steps or 0) > max(after_warmup, 0):
            raise ValueError(
                f"optimizer.schedule.decay_steps {self.decay_steps} is more than the {after_warmup} steps that "
                "follow the warmup"
            )
