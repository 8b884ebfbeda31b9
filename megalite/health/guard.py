"""Guards the numbers of a run: what its steps compute (numbers.py), and whether replicas still hold
the same bits (replicas.py). All ranks come to the same decision in the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megalite.comm.mesh import Mesh, node_name
from megalite.config import Config
from megalite.data.loader import Batches, Span, add_spans
from megalite.engine import Engine
from megalite.errors import DataError
from megalite.health.bad_batches import write_batch
from megalite.health.numbers import BadStep, Numbers
from megalite.health.replicas import ReplicaCheck, describe
from megalite.health.stragglers import names_of_all
from megalite.observe.steps import Record
from megalite.runtime import error_file
from megalite.runtime.exit_codes import Exit

# What each policy means for the run, as the console says it.
FOLLOWS = {
    "report": "the step counts",
    "skip": "skipped, weights and moments are as before",
    "rewind": "the run goes back to its newest checkpoint and passes over this batch",
    "stop": "the run ends as it was before this step",
}


@dataclass(frozen=True)
class Ending:
    """Says why a run does not go on to its next step, and what is left to do."""

    status: Exit | None
    """Exit status of the run. None: rewind to the newest checkpoint."""
    saves: tuple[int, int] | None = None
    """Checkpoint to write first: the step the weights are of, and the samples trained on by
    then."""
    skipped: tuple[Span, ...] = ()
    """Samples to pass over after a rewind."""


class Guard:
    """Watches the loss, the gradient norm and the replicas of a run.

    Every rank has one and calls the same methods at the same places of the same steps: some are
    collectives."""

    def __init__(self, config: Config, mesh: Mesh, loader: Batches):
        """Watch a run. `config.health` holds the policies; `mesh` the ranks to compare; `loader`
        knows the samples of each step."""
        self._health = config.health
        self._mesh = mesh
        self._loader = loader
        self._folder = config.run.folder / "bad_batches"
        self._numbers = Numbers(config.health, mesh.device)
        self._replicas = ReplicaCheck(mesh)
        self._news: list[str] = []
        self.update_gate: Callable[[Tensor], Callable[[Tensor], Tensor]] = self._numbers.update_gate
        self.state: Callable[[], dict[str, Any]] = self._numbers.state
        self.load_state: Callable[[dict[str, Any]], None] = self._numbers.load_state

    @property
    def refused(self) -> int:
        """Return how many steps in a row were refused, up to the last one that `look` judged."""
        return self._numbers.in_a_row

    def compare(self, step: int, engine: Engine, saves: bool = False) -> None:
        """Begin to compare the replicas' weights and optimizer state if `step` is due or the run
        `saves`.

        Call it after a step's backward pass, or before a save. `engine` gives the tensors; `look`
        has the result. A collective."""
        every = self._health.weights_check_every
        if self._mesh.world.size > 1 and every and (saves or step % every == 0):
            self._replicas.begin(step, engine.copies())

    def note(self, step: int, samples: int) -> None:
        """Note that the step just judged is `step`, before which the run had trained on
        `samples`."""
        self._numbers.note(step, samples)

    def record(self) -> Record:
        """Return the guard's fields of the metrics record of the step just judged."""
        record = self._numbers.record()
        skipped = sum(last - first for first, last in self._loader.skipped)
        if skipped:
            record["skipped_samples"] = skipped
        return record

    def look(self, step: int, all_of_them: bool) -> Ending | None:
        """Judge what the host has learned by step `step`, and return why the run ends there, or
        None.

        The host learns of a step STEPS_LATER steps later. `all_of_them` waits for the device and
        judges all steps so far, as before a save."""
        # Corruption comes first: nothing that was computed with other bits can be judged, or saved.
        checked, found = self._replicas.look(step, all_of_them)
        if found:
            text = describe(checked, found, names_of_all(node_name(), self._mesh))
            return self._end(Ending(Exit.CORRUPTED), text)
        bad = self._numbers.look(step, all_of_them)
        if any(self._is_an_end(each) for each in bad):
            # No later step will ask for the rest: take what is still on its way now.
            bad += self._numbers.look(step, True)
        ends = next((each for each in bad if each.policy in ("rewind", "stop")), None)
        too_many = any(each.in_a_row >= self._health.bad_steps_limit for each in bad)
        for each in bad:
            self._tell(each)
        # The device has refused all updates since a step that ends or rewinds the run: its state is
        # from before it.
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
        """Return whether a bad step rewinds or ends the run."""
        return bad.policy in ("rewind", "stop") or bad.in_a_row >= self._health.bad_steps_limit

    def news(self) -> list[str]:
        """Return the messages since the last call, for the console."""
        said, self._news = self._news, []
        return said

    def _end(self, ending: Ending, text: str) -> Ending:
        self._news.append(f"error: {text}")
        error_file.leave(text)  # the launcher shows it as the reason of the exit
        return ending

    def _tell(self, bad: BadStep) -> None:
        """Add a message about a bad step, and write its samples unless the step counts."""
        where = ""
        if bad.policy != "report" and self._mesh.world.rank == 0:
            # The batch is read again: by now the loader is steps ahead.
            numbers = self._loader.samples_of_step(bad.samples)
            try:
                path = write_batch(self._folder, bad, self._loader.mixture, numbers)
                where = f"; its samples are in {path}"
            except (OSError, DataError) as error:  # a file for a person must not end the run
                where = f"; its samples could not be written: {error}"
        follows = FOLLOWS[bad.policy]
        self._news.append(f"warning: step {bad.step}: {bad.text}; {follows}{where}")

    def _skipped(self, bad: Sequence[BadStep]) -> tuple[Span, ...]:
        """Return the samples to pass over after a rewind: those passed over before, and those of
        the bad steps."""
        skipped = self._loader.skipped
        for each in bad:
            if each.policy != "report":
                skipped = add_spans(skipped, self._loader.samples_of_step(each.samples))
        return skipped
