"""Makes the rows of a recipe: slots are asked for many at a time, and judged one after another in the
order of their numbers, so that the rows do not depend on which answer comes first, nor on when a
process was killed."""

from __future__ import annotations

import asyncio
import hashlib
import json
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from megalite.errors import DataError
from megalite.synthesize.answers import Answers
from megalite.synthesize.checks import Checks
from megalite.synthesize.config import LOOK_BACK, RecipeConfig, decisive
from megalite.synthesize.endpoint import Endpoint, Spent, seed_of
from megalite.synthesize.report import report_of
from megalite.synthesize.tasks import Input, Made, Rejected, Slot, Task
from megalite.utils.changes import changes
from megalite.utils.files import replacing
from megalite.utils.locks import alone_in
from megalite.utils.outside import read_object
from megalite.utils.progress import ProgressMeter

ENDS = ("stop", "eos", "eos_token", "end_turn", "stop_sequence")
"""What servers call the end of an answer that is whole."""
NAMED = 5
"""Number of changed settings that a message names."""
REFUSED = 8
"""A recipe whose first slots the endpoint refuses, so many of them, asks for something that it does
not take."""


@dataclass
class Tally:
    """Counts what became of slots."""

    slots: int = 0
    rows: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    spent: Spent = field(default_factory=Spent)
    judged: Spent = field(default_factory=Spent)
    """What the judge cost, beside `spent`."""
    stopped: str = ""
    """Why there are fewer rows than wanted; empty if there are not."""


@dataclass
class Asked:
    """Holds what came of a slot's requests."""

    slot: Slot
    made: Made | Rejected
    spent: Spent
    judged: Spent


def synthesize(recipe: RecipeConfig, console: Console | None = None) -> dict[str, Any]:
    """Make the rows of `recipe`, or go on with it. Return the values of report.json.

    `console` shows the progress. Raises ConfigError and DataError, Unreachable where the endpoint
    does not answer any more: what it has answered is kept."""
    output = recipe.output.absolute()
    task = recipe.task
    assert isinstance(task, Task)
    with alone_in(output):
        for left in output.glob(".*.tmp"):  # of a process that was killed
            left.unlink(missing_ok=True)
        # All that may be wrong with files is found before the first request is paid for.
        inputs, checks = task.read(), Checks(recipe.checks)
        # A seed that an answer repeats is no new task. Other inputs stand in their rows by right.
        for each in inputs if task.LOOKS_BACK else ():
            checks.keep(each.text, f"seeds {each.source}")
        _begin(recipe, output, inputs, checks)
        with (
            Answers(output / "answers.jsonl") as answers,
            # Written anew in each start, from the answers: then a row of a start that was killed
            # cannot be there twice, and the checks see all rows in the same order.
            replacing(output / "rows.jsonl", durable=True) as rows,
            replacing(output / "rejected.jsonl", durable=True) as rejected,
            open(rows, "w", encoding="utf-8") as rows_file,
            open(rejected, "w", encoding="utf-8") as rejected_file,
        ):
            maker = Maker(recipe, task, inputs, checks, answers, rows_file, rejected_file)
            tally = asyncio.run(maker.run(console))
        report = report_of(recipe, tally, checks.num_short)
        with replacing(output / "report.json") as path:
            path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return report


class Maker:
    """Makes the rows of one recipe."""

    def __init__(
        self,
        recipe: RecipeConfig,
        task: Task,
        inputs: Sequence[Input],
        checks: Checks,
        answers: Answers,
        rows: TextIO,
        rejected: TextIO,
    ) -> None:
        self._recipe, self._task, self._inputs, self._checks = recipe, task, inputs, checks
        self._answers, self._rows, self._rejected = answers, rows, rejected
        self._tally = Tally()
        self._num_slots = task.num_slots(inputs, recipe.rows)
        # Texts of rows in the order of their slots, for the examples of later ones.
        self._texts: list[str] = []
        self._slots_of_texts: list[int] = []
        self._template = _digest("\0".join(task.prompts()))
        self._pending: deque[tuple[asyncio.Task[Asked], Spent]] = deque()
        """Slots under way in their order, each with the most that it costs."""
        self._next = 0
        """Number of the slot that is started next."""

    async def run(self, console: Console | None) -> Tally:
        """Ask and judge until there are enough rows, no more slots, or no more budget."""
        self._endpoint = Endpoint(self._recipe.endpoint, "endpoint", self._answers)
        self._judge = self._endpoint
        if self._task.JUDGED:
            self._judge = Endpoint(self._recipe.judging, "judge", self._answers)
        wanted, tally = self._recipe.rows, self._tally
        told = TextColumn("rows, {task.fields[told]}")
        columns = (BarColumn(), MofNCompleteColumn(), told, TimeElapsedColumn())
        try:
            with ProgressMeter(self._task.name, wanted, columns, console, told="") as meter:
                while tally.rows < wanted and self._start_more():
                    # The oldest, even where a later one is done: rows are judged in the order of
                    # slots. It stays among the pending ones until then, and its cost reserved.
                    asked, _ = self._pending[0]
                    self._take(await asked)
                    self._pending.popleft()
                    counts = self._counts()
                    line = f"{self._task.name}: {tally.rows:,} of {wanted:,} rows, {counts}"
                    meter.show(tally.rows, line, due=tally.rows == wanted, told=counts)
        finally:
            # Also after an error: a task that goes on would write answers to a closed file.
            for asked, _ in self._pending:
                asked.cancel()
            await asyncio.gather(*(asked for asked, _ in self._pending), return_exceptions=True)
            await self._endpoint.close()
            await self._judge.close()
        return tally

    def _start_more(self) -> bool:
        """Begin to ask for the next slots. Return whether any is under way; if none is, it is noted
        why."""
        # No more at a time than rows are missing: what is asked for beyond is wasted.
        missing = self._recipe.rows - self._tally.rows
        most = min(self._recipe.endpoint.concurrency, missing)
        while len(self._pending) < most and self._next < self._num_slots:
            slot = self._slot(self._next)
            reserved = self._most(slot)
            # What is under way may still come to its most, and so decides nothing yet: with nothing
            # under way, the same slot is the last whatever was quick or slow.
            if not self._fits([reserved, *(own for _, own in self._pending)]):
                break
            self._pending.append((asyncio.create_task(self._ask_for(slot)), reserved))
            self._next += 1
        if self._pending:
            return True
        is_at_end = self._next >= self._num_slots
        self._tally.stopped = "all inputs are used up" if is_at_end else "the budget is spent"
        return False

    def _counts(self) -> str:
        """Return the counts beside that of the rows."""
        spent = Spent()
        for each in (self._tally.spent, self._tally.judged):
            spent.add(each)
        cost = f", cost {spent.cost:.4g}" if spent.cost else ""
        return f"{self._tally.rejected.total():,} rejected, {spent.requests:,} requests{cost}"

    def _slot(self, number: int) -> Slot:
        """Return a slot. One that looks back sees the rows of slots that are further back than any
        that may be under way: the same, however fast answers come."""
        # Slots are judged in order, so that their numbers ascend. At most LOOK_BACK are under way:
        # those further back are all judged when this one begins.
        count = bisect_right(self._slots_of_texts, number - LOOK_BACK)
        return self._task.slot(number, self._inputs, self._texts[:count], self._recipe.seed)

    def _most(self, slot: Slot) -> Spent:
        """Return the most that a slot costs."""
        task, num_bytes = self._task, self._task.num_bytes(slot)
        total = Spent()
        for call in range(task.CALLS):
            # The judge's calls are a task's last ones.
            endpoint = self._judge if call >= task.CALLS - task.JUDGED else self._endpoint
            total.add(endpoint.most(num_bytes, task.CARRIED * task.repeats()))
        return total

    def _fits(self, reserved: Sequence[Spent]) -> bool:
        """Return whether what is spent, and what may be, is within the budget."""
        total, budget = Spent(), self._recipe.budget
        for each in (self._tally.spent, self._tally.judged, *reserved):
            total.add(each)
        limits = (
            (total.requests, budget.requests),
            (total.prompt_tokens + total.completion_tokens, budget.tokens),
            (total.cost, budget.cost),
        )
        return all(limit is None or value <= limit for value, limit in limits)

    async def _ask_for(self, slot: Slot) -> Asked:
        """Make the requests of a slot."""
        spent, judged, call = Spent(), Spent(), 0

        async def ask(text: str, judging: bool = False) -> str:
            nonlocal call
            endpoint, cost = (self._judge, judged) if judging else (self._endpoint, spent)
            messages = [{"role": "user", "content": text}]
            # By the number of the call: two answers to one prompt, of which a judge shall prefer
            # one, have two seeds.
            seed = seed_of(self._recipe.seed, slot.number, call)
            answer = await endpoint.ask(messages, seed, slot.number, call, cost)
            call += 1
            if answer.finish == "refused":
                raise Rejected("refused by the endpoint", answer.text)
            # A verdict stands at the beginning.
            if answer.finish not in ENDS and not judging:
                why = {"length": "cut off at max_tokens"}.get(answer.finish)
                raise Rejected(why or f"ended by {answer.finish}", answer.text)
            return answer.text

        made: Made | Rejected
        try:
            made = await self._task.make(slot, ask)
        except Rejected as error:
            made = error
        return Asked(slot, made, spent, judged)

    def _take(self, asked: Asked) -> None:
        """Judge what came of a slot, and write it down. Raises DataError where the endpoint takes
        none of the first requests."""
        tally, slot = self._tally, asked.slot
        tally.slots += 1
        tally.spent.add(asked.spent)
        tally.judged.add(asked.judged)
        told = self._provenance(slot)
        try:
            if isinstance(asked.made, Rejected):
                raise asked.made
            row = asked.made.row
            told["hash"] = _digest(json.dumps(row, sort_keys=True, ensure_ascii=False))
            self._checks.check(asked.made)
        except Rejected as error:
            tally.rejected[error.reason] += 1
            if tally.rejected["refused by the endpoint"] == tally.slots == REFUSED:
                raise DataError(f"the endpoint refuses every request: {error.detail}") from None
            found = {"row": asked.made.row} if isinstance(asked.made, Made) else {}
            line = {"reason": error.reason, "detail": error.detail, **found, "metadata": told}
            print(json.dumps(line, ensure_ascii=False), file=self._rejected)
            return
        tally.rows += 1
        # Later rows are compared with this one, and only with rows that passed: what was refused may
        # come again in a better form.
        print(json.dumps({**row, "metadata": told}, ensure_ascii=False), file=self._rows)
        for text in asked.made.distinct:
            self._checks.keep(text, f"rows line {tally.rows}")
        self._texts += asked.made.distinct
        self._slots_of_texts += [slot.number] * len(asked.made.distinct)

    def _provenance(self, slot: Slot) -> dict[str, Any]:
        """Return where a row comes from."""
        recipe = self._recipe
        return {
            "task": recipe.task.name,
            "source": slot.input.source if slot.input else "",
            "template": self._template,
            "model": recipe.endpoint.model,
            **({"judge": recipe.judging.model} if self._task.JUDGED else {}),
            "seed": recipe.seed,
            "slot": slot.number,
        }


def _begin(recipe: RecipeConfig, output: Path, inputs: Sequence[Input], checks: Checks) -> None:
    """Note what decides the rows. Raises DataError if an earlier start has noted something else."""
    # Contents and not names: a file that was changed under its name would mix two sets of rows.
    texts = json.dumps([[each.text, each.source] for each in inputs])
    now: dict[str, Any] = {
        "settings": decisive(recipe),
        "inputs": _digest(texts),
        "compared": checks.digest.hexdigest(),
    }
    path = output / "recipe.json"
    then = read_object(path, DataError) if path.exists() else now
    if then != now:
        settings = then.get("settings")
        differs = changes(settings if isinstance(settings, dict) else {}, now["settings"])
        files = "the content of the task's files or of the checks' has changed"
        named = "; ".join(map(str, differs[:NAMED])) or files
        raise DataError(
            f"{output} was begun with another recipe; name another `output`, or remove it to start anew ({named})"
        )
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(now, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()
