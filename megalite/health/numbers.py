"""Bad numbers: losses and gradients that are not finite, and spikes of the loss or of the gradient's norm.

They are found on the device, which also refuses their update; nothing waits for it. The host learns of a step two steps
later (late.py). All that is judged is the same on all ranks, and so is what follows.

A spike is a number so many standard deviations (`health.spike_sigmas`) above the mean of the last WINDOW steps (after
OLMo's SkipStepOptimizer). It is entered there as the highest number that would have been none: one spike hides no
other, and a level that has risen for good is soon no spike any more. What is not finite is not entered.

A step of which nothing has a label is no bad one, but is told: its loss is NaN and its gradient exactly 0 (parts.py),
which no other NaN comes with.

A refused update leaves weights and moments as they are. Its step counts for the learning rate, and its data is used
up; for Adam's bias correction it does not count (as in Megatron-LM). After a step that ends the run or sends it back,
all updates are refused: the device keeps the state from before it until the host knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalite.config import HealthConfig, Policy
from megalite.health.late import Late
from megalite.observe.steps import Record

WINDOW = 128
"""Steps that a number is compared with."""

ENOUGH = 64
"""Fewer are not enough to tell a spike by."""

SMALLEST = 1e-3
"""Of the mean: what the standard deviation is taken for at least."""

KINDS = ("not_finite", "loss_spike", "grad_norm_spike")
"""What a step can be. Each has a policy in `config.health`, and is a flag in its record."""

NO_LABELS = "no_labels"
"""A flag like those, of a step that has nothing to learn. It counts, and has no policy."""

STEPS_PER_WORD = 100
"""Steps without labels of which the first is told."""

SEVERITY: tuple[Policy, ...] = ("report", "skip", "rewind", "stop")


@dataclass(frozen=True)
class BadStep:
    step: int
    samples: int
    """That the run had trained on before it."""
    kinds: tuple[str, ...]
    policy: Policy
    """The severest of its kinds."""
    in_a_row: int
    """Steps skipped, this one included."""
    text: str
    """What was found."""


class Numbers:
    """Judges every step of a run. Every rank has one, and all come to the same judgements."""

    def __init__(self, health: HealthConfig, device: torch.device, state: dict[str, Any] | None = None):
        """`state` is what `state()` gave when the checkpoint was saved."""
        self._policies: dict[str, Policy] = {kind: getattr(health, kind) for kind in KINDS}
        severity = [SEVERITY.index(policy) for policy in self._policies.values()]
        state = state or {"losses": [], "grad_norms": [], "entered": 0, "in_a_row": 0}
        window = torch.zeros(2, WINDOW, dtype=torch.float64)
        for row, values in enumerate((state["losses"], state["grad_norms"])):
            window[row, : len(values)] = torch.tensor(values, dtype=torch.float64)
        self._sigmas, self._in_a_row, self._over = health.spike_sigmas, int(state["in_a_row"]), False
        self._window, self._entered = window.to(device), torch.tensor(state["entered"], device=device)
        self._places = torch.arange(WINDOW, device=device)
        self._severity = torch.tensor(severity, device=device)
        self._ended = torch.tensor(False, device=device)
        self._late: Late[tuple[int, int]] = Late(device)
        self._num_unlabelled = 0

    # --- on the device --------------------------------------------------------------------------------------------

    def permit(self, loss: Tensor) -> Callable[[Tensor], Tensor]:
        """For `Engine.step`: whether a step of this loss, fp32 [], and of the gradient norm it is given, fp32 [], may
        update the weights; bool []."""
        return lambda norm: self._judge(torch.stack([loss, norm]).double())

    @torch.no_grad()
    def _judge(self, values: Tensor) -> Tensor:
        """values: [2], loss and gradient norm."""
        count = self._entered.clamp(max=WINDOW)
        mean = self._window.sum(1) / count.clamp(min=1)
        distance = torch.where(self._places < count, self._window - mean[:, None], 0.0)
        deviation = (distance.square().sum(1) / (count - 1).clamp(min=1)).sqrt()
        highest = mean + self._sigmas * torch.maximum(deviation, SMALLEST * mean.abs())
        unlabelled = values[0].isnan() & (values[1] == 0)
        finite = values.isfinite().all() | unlabelled
        spikes = (values > highest) & finite & (count >= ENOUGH)
        bad = torch.cat([~finite[None], spikes])
        severity = (self._severity * bad).max()
        refused = self._ended | (severity >= SEVERITY.index("skip"))
        self._ended = self._ended | (severity >= SEVERITY.index("rewind"))
        # A state that is kept is kept with the window as it was.
        enters = finite & ~unlabelled & ~self._ended
        place = (self._entered % WINDOW).expand(2, 1)
        entered = torch.where(enters, torch.where(spikes, highest, values)[:, None], self._window.gather(1, place))
        self._window.scatter_(1, place, entered)
        self._entered = self._entered + enters
        self._found = torch.cat([bad, unlabelled[None], refused[None]])
        self._report = torch.cat([bad, unlabelled[None], values, mean])
        return ~refused

    def record(self) -> Record:
        """Flags for the record of the step just judged."""
        return dict(zip((*KINDS, NO_LABELS, "skipped"), self._found.unbind(), strict=True))

    # --- on the host ----------------------------------------------------------------------------------------------

    def note(self, step: int, samples: int) -> None:
        """The step just judged is this one, before which the run had trained on so many samples."""
        self._late.add(step, (step, samples), self._report)

    def look(self, step: int, all_of_them: bool) -> list[BadStep]:
        """In step `step`: the bad ones among the steps of some time ago, or among all until now."""
        found = []
        for (number, samples), (*flags, unlabelled, loss, norm, mean_loss, mean_norm) in self._late.take(
            step, all_of_them
        ):
            kinds = tuple(kind for kind, flag in zip(KINDS, flags, strict=True) if flag)
            policies: list[Policy] = [self._policies[kind] for kind in kinds]
            policy = max(policies, key=SEVERITY.index, default=SEVERITY[0])
            self._over = self._over or SEVERITY.index(policy) >= SEVERITY.index("rewind")
            if not self._over:  # what comes after it does not count
                self._in_a_row = self._in_a_row + 1 if policy == "skip" else 0
            if kinds:
                text = ", ".join(
                    {
                        "not_finite": f"loss {loss:.4g} and gradient norm {norm:.4g}, not both finite",
                        "loss_spike": f"loss spike: {loss:.4g}, recent mean {mean_loss:.4g}",
                        "grad_norm_spike": f"gradient-norm spike: {norm:.4g}, recent mean {mean_norm:.4g}",
                    }[kind]
                    for kind in kinds
                )
                found.append(BadStep(number, samples, kinds, policy, self._in_a_row, text))
            elif unlabelled:
                if self._num_unlabelled % STEPS_PER_WORD == 0:
                    text = f"no token of its batch has a label: nothing was learned{self._so_far()}"
                    found.append(BadStep(number, samples, (NO_LABELS,), policy, self._in_a_row, text))
                self._num_unlabelled += 1
        return found

    def _so_far(self) -> str:
        return f", as in {self._num_unlabelled} steps before" if self._num_unlabelled else ""

    def state(self) -> dict[str, Any]:
        """For a checkpoint. Waits for the device."""
        entered = int(self._entered)
        losses, norms = self._window[:, : min(entered, WINDOW)].tolist()
        return {"losses": losses, "grad_norms": norms, "entered": entered, "in_a_row": self._in_a_row}
