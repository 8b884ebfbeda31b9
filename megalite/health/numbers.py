"""Finds bad numbers: losses and gradients that are not finite, and spikes of the loss or of the
gradient norm.

The device finds them and refuses the update of such a step, without a synchronization; the host
learns of it two steps later (late.py). All ranks judge the same numbers, so all come to the same
decision.

A spike is a number more than `health.spike_sigmas` standard deviations above the mean of the last
WINDOW steps (after OLMo's SkipStepOptimizer). It enters the window clipped to the limit: one spike
does not hide the next, and a level that has risen for good soon stops being a spike. Numbers that
are not finite do not enter.

A step without a single label is not bad, but reported: its loss is NaN and its gradient exactly 0
(parts.py), a pair that no other NaN comes with.

A refused update leaves weights and moments as they are. The step counts for the learning rate and
its data is used up, but it does not count for Adam's bias correction (as in Megatron-LM). After a
step that ends or rewinds the run all updates are refused: the device keeps the state from before it
until the host knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megalite.config import HealthConfig, Policy
from megalite.health.late import Late
from megalite.observe.steps import Record

WINDOW = 128
"""Number of recent steps that a loss or gradient norm is compared with."""

ENOUGH = 64
"""Lower bound of steps in the window before anything counts as a spike."""

SMALLEST = 1e-3
"""Lower bound of the standard deviation, as a fraction of the mean."""

KINDS = ("not_finite", "loss_spike", "grad_norm_spike")
"""Kinds of bad steps. Each has a policy in `config.health` and a flag in the step's record."""

NO_LABELS = "no_labels"
"""Flag of a step without a label. The step counts, and no policy applies."""

STEPS_PER_WORD = 100
"""One in this many steps without labels is reported."""

SEVERITY: tuple[Policy, ...] = ("report", "skip", "rewind", "stop")
"""Policies, the mildest first."""


@dataclass(frozen=True)
class BadStep:
    """Describes a step with bad numbers, or one without labels."""

    step: int
    samples: int
    """Samples the run had trained on before the step."""
    kinds: tuple[str, ...]
    policy: Policy
    """The severest policy of its kinds."""
    in_a_row: int
    """Number of steps skipped in a row, this one included."""
    text: str
    """What was found, for a person."""


class Numbers:
    """Judges every step of a run. Every rank has one, and all come to the same judgements."""

    def __init__(self, health: HealthConfig, device: torch.device):
        """Keep the window on `device`. `health` gives a policy for each kind, and
        `spike_sigmas`."""
        self._policies: dict[str, Policy] = {kind: getattr(health, kind) for kind in KINDS}
        severity = [SEVERITY.index(policy) for policy in self._policies.values()]
        self._sigmas = health.spike_sigmas
        # [2, WINDOW]: losses and gradient norms, a ring buffer in which step i stands at i %
        # WINDOW.
        self._window = torch.zeros(2, WINDOW, dtype=torch.float64, device=device)
        self._entered = torch.tensor(0, device=device)
        self._places = torch.arange(WINDOW, device=device)
        self._severity = torch.tensor(severity, device=device)
        self._ended = torch.tensor(False, device=device)
        self._late: Late[tuple[int, int]] = Late(device)
        # Of the host, which judges the same steps again from the numbers it reads later.
        self.in_a_row = 0
        """Steps in a row that were skipped, up to the last one that `look` has judged."""
        self._over = False
        self._num_unlabelled = 0

    # --- on the device ----------------------------------------------------------------------------

    def update_gate(self, loss: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the update gate of a step with this `loss` (fp32 []), for `Engine.step`.

        The gate takes the gradient norm (fp32 []) and returns whether the step may update the
        weights (bool []). It is called once a step, and remembers the step in the window."""
        return partial(self._judge, loss)

    @torch.no_grad()
    def _judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Judge a step by its loss and gradient norm, fp32 [], and enter them in the window.

        Everything stays on the device: a branch on a number would make the host wait for it."""
        values = torch.stack([loss, norm]).double()
        count = self._entered.clamp(max=WINDOW)
        # [2], as all that follows: of losses, and of gradient norms. Empty places of the window are
        # 0.
        mean = self._window.sum(1) / count.clamp(min=1)
        # Places of the window that are still empty do not deviate.
        distance = torch.where(self._places < count, self._window - mean[:, None], 0.0)
        variance = distance.square().sum(1) / (count - 1).clamp(min=1)
        deviation = variance.sqrt()
        # Without a lower bound, a loss that has long been constant would make a spike of any
        # rounding error.
        highest = mean + self._sigmas * torch.maximum(deviation, SMALLEST * mean.abs())
        unlabelled = values[0].isnan() & (values[1] == 0)
        finite = values.isfinite().all() | unlabelled
        spikes = (values > highest) & finite & (count >= ENOUGH)
        bad = torch.cat([~finite[None], spikes])  # [3], in the order of KINDS
        severity = (self._severity * bad).max()  # 0, the mildest, where nothing is bad
        refused = self._ended | (severity >= SEVERITY.index("skip"))
        self._ended = self._ended | (severity >= SEVERITY.index("rewind"))
        # Once the run has ended the window stays as it was, like the weights it is saved with.
        enters = finite & ~unlabelled & ~self._ended
        place = (self._entered % WINDOW).expand(2, 1)
        clipped = torch.where(spikes, highest, values)[:, None]
        before = self._window.gather(1, place)
        self._window.scatter_(1, place, torch.where(enters, clipped, before))
        self._entered = self._entered + enters
        # The record takes the flags at once; the host reads the report some steps later.
        self._found = torch.cat([bad, unlabelled[None], refused[None]])
        self._report = torch.cat([bad, unlabelled[None], values, mean])
        return ~refused

    def record(self) -> Record:
        """Return the flags of the step just judged, bool [] on the device, for its metrics
        record."""
        return dict(zip((*KINDS, NO_LABELS, "skipped"), self._found.unbind(), strict=True))

    # --- on the host ------------------------------------------------------------------------------

    def note(self, step: int, samples: int) -> None:
        """Note that the step just judged is `step`, before which the run had trained on
        `samples`."""
        self._late.add(step, (step, samples), self._report)

    def look(self, step: int, all_of_them: bool) -> list[BadStep]:
        """Return the bad steps among those that the host may read by step `step` (see late.py), or
        `all_of_them`."""
        found = []
        for (number, samples), report in self._late.take(step, all_of_them):
            *flags, unlabelled, loss, norm, mean_loss, mean_norm = report
            kinds = tuple(kind for kind, flag in zip(KINDS, flags, strict=True) if flag)
            policies: list[Policy] = [self._policies[kind] for kind in kinds]
            policy = max(policies, key=SEVERITY.index, default=SEVERITY[0])
            # The device's `_ended`, found again from the same flags.
            self._over = self._over or SEVERITY.index(policy) >= SEVERITY.index("rewind")
            if not self._over:  # steps after the end of the run do not count
                self.in_a_row = self.in_a_row + 1 if policy == "skip" else 0
            if kinds:
                texts = {
                    "not_finite": f"loss {loss:.4g} and gradient norm {norm:.4g}, not both finite",
                    "loss_spike": f"loss spike: {loss:.4g}, recent mean {mean_loss:.4g}",
                    "grad_norm_spike": f"gradient-norm spike: {norm:.4g}, recent mean {mean_norm:.4g}",
                }
                text = ", ".join(texts[kind] for kind in kinds)
                found.append(BadStep(number, samples, kinds, policy, self.in_a_row, text))
            elif unlabelled:
                if self._num_unlabelled % STEPS_PER_WORD == 0:
                    text = f"no token of its batch has a label: nothing was learned{self._so_far()}"
                    found.append(
                        BadStep(number, samples, (NO_LABELS,), policy, self.in_a_row, text)
                    )
                self._num_unlabelled += 1
        return found

    def _so_far(self) -> str:
        return f", as in {self._num_unlabelled} steps before" if self._num_unlabelled else ""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`, what `state()` returned at the checkpoint."""
        for row, values in enumerate((state["losses"], state["grad_norms"])):
            self._window[row, : len(values)] = torch.tensor(values, dtype=torch.float64)
        self._entered.fill_(state["entered"])
        self.in_a_row = int(state["in_a_row"])

    def state(self) -> dict[str, Any]:
        """Return the window and counters for a checkpoint, as JSON can hold them. Waits for the
        device."""
        entered = int(self._entered)
        losses, norms = self._window[:, : min(entered, WINDOW)].tolist()
        return {
            "losses": losses,
            "grad_norms": norms,
            "entered": entered,
            "in_a_row": self.in_a_row,
        }
