"""Looks after the numbers of a run: what its steps compute (numbers.py) and whether ranks still hold the same bits
(replicas.py). Says what follows, the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megalite import last_words
from megalite.config import Config
from megalite.data.loader import Loader, Span, add_spans
from megalite.engine import Engine
from megalite.errors import DataError
from megalite.exit_codes import Exit
from megalite.health.bad_batches import write_batch
from megalite.health.numbers import BadStep, Numbers
from megalite.health.replicas import ReplicaCheck, describe
from megalite.health.stragglers import names_of_all
from megalite.mesh import Mesh, node_name
from megalite.observe.steps import Record

FOLLOWS = {
    "report": "the step counts",
    "skip": "skipped, weights and moments are as before",
    "rewind": "the run goes back to its newest checkpoint and passes over this batch",
    "stop": "the run ends as it was before this step",
}


@dataclass(frozen=True)
class Ending:
    """Why a run does not go on to its next step."""

    status: Exit | None
    """None: it goes back to its newest checkpoint."""
    saves: tuple[int, int] | None = None
    """What is to be saved: a step the weights are of, and the samples the run had trained on after it."""
    skipped: tuple[Span, ...] = ()
    """Samples to pass over after going back."""


class Guard:
    """Every rank has one and calls the same methods at the same places of the same steps."""

    def __init__(self, config: Config, mesh: Mesh, loader: Loader, state: dict[str, Any] | None):
        """`state` is what `state()` gave when the checkpoint was saved."""
        self._health, self._mesh, self._loader = config.health, mesh, loader
        self._folder = config.run.folder / "bad_batches"
        self._numbers = Numbers(config.health, mesh.device, state)
        self._replicas = ReplicaCheck(mesh)
        self._news: list[str] = []
        self.permit: Callable[[Tensor], Callable[[Tensor], Tensor]] = self._numbers.permit
        self.state: Callable[[], dict[str, Any]] = self._numbers.state

    def compare(self, step: int, engine: Engine, saves: bool = False) -> None:
        """Where it is time, begin to compare what ranks hold alike: after a step's backward pass, or before a save."""
        every = self._health.weights_check_every
        if self._mesh.world.size > 1 and every and (saves or step % every == 0):
            self._replicas.begin(step, engine.copies())

    def note(self, step: int, samples: int) -> None:
        """Behind a step, before which the run had trained on so many samples."""
        self._numbers.note(step, samples)

    def record(self) -> Record:
        """For the record of the step just judged."""
        skipped = sum(last - first for first, last in self._loader.skipped)
        return self._numbers.record() | ({"skipped_samples": skipped} if skipped else {})

    def look(self, step: int, all_of_them: bool) -> Ending | None:
        """In step `step`: what follows from the steps of some time ago, or from all until now."""
        checked, found = self._replicas.look(step, all_of_them)
        if found:
            text = describe(checked, found, names_of_all(node_name(), self._mesh))
            return self._end(Ending(Exit.CORRUPTED), text)
        bad = self._numbers.look(step, all_of_them)
        if any(self._is_an_end(each) for each in bad):
            bad += self._numbers.look(step, True)
        ends = next((each for each in bad if each.policy in ("rewind", "stop")), None)
        too_many = any(each.in_a_row >= self._health.bad_steps_limit for each in bad)
        for each in bad:
            self._tell(each)
        # From a step that ends the run, or sends it back, the device has kept the state from before it.
        saves = (ends.step - 1, ends.samples) if ends else (step, self._loader.samples)
        if ends and ends.policy == "rewind" and not too_many:
            return Ending(None, skipped=self._skipped(bad))
        if too_many:
            text = f"{self._health.bad_steps_limit} steps with bad numbers in a row (health.bad_steps_limit)"
            return self._end(Ending(Exit.BAD_NUMBERS, saves), text)
        if ends:
            text = f"bad numbers in step {ends.step}: {ends.text}; health says to stop"
            return self._end(Ending(Exit.BAD_NUMBERS, saves), text)
        return None

    def _is_an_end(self, bad: BadStep) -> bool:
        return bad.policy in ("rewind", "stop") or bad.in_a_row >= self._health.bad_steps_limit

    def news(self) -> list[str]:
        """What there is to say since the last call, for the console."""
        said, self._news = self._news, []
        return said

    def _end(self, ending: Ending, text: str) -> Ending:
        self._news.append(f"error: {text}")
        last_words.leave(text)
        return ending

    def _tell(self, bad: BadStep) -> None:
        where = ""
        if bad.policy != "report" and self._mesh.world.rank == 0:
            numbers = self._loader.samples_of_step(bad.samples)
            try:
                where = f"; its samples are in {write_batch(self._folder, bad, self._loader.mixture, numbers)}"
            except (OSError, DataError) as error:  # training is worth more
                where = f"; its samples could not be written: {error}"
        self._news.append(f"warning: step {bad.step}: {bad.text}; {FOLLOWS[bad.policy]}{where}")

    def _skipped(self, bad: Sequence[BadStep]) -> tuple[Span, ...]:
        skipped = self._loader.skipped
        for each in bad:
            if each.policy != "report":
                skipped = add_spans(skipped, self._loader.samples_of_step(each.samples))
        return skipped
