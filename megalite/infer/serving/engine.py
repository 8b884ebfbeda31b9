"""The engine thread, which computes answers. Requests come from the server's threads, which are
told of each new piece."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megalite.infer.answer import Answer, Choice, Finish, Request, link
from megalite.infer.batch import Batch
from megalite.infer.generate import Generator
from megalite.infer.ranks import RankLost
from megalite.infer.serving.metrics import Metrics

LOG = logging.getLogger("megalite.serve")


class Overloaded(Exception):
    """Raised if too many requests wait, or the server is shutting down."""


@dataclass(frozen=True)
class Update:
    """Holds what is new of an answer since the last update."""

    text: str = ""
    choices: Sequence[Choice] = ()
    finish: Finish | None = None


@dataclass(eq=False)
class Ticket:
    """Holds an accepted request and how to report its answer."""

    answer: Answer
    number: int
    """Number among the requests that were submitted together."""
    streamed: bool
    """Report every piece, not only the end."""
    deadline: float
    """By the clock of `time.monotonic`, as is `submitted`."""
    submitted: float
    deliver: Deliver
    num_counted: int = 0
    """Tokens already counted in the metrics."""
    num_choices_told: int = 0
    first_token_s: float | None = None
    """Seconds from the request to its first token."""

    def news(self) -> Update | None:
        """Return what is new since the last call, None if there is nothing to report."""
        answer = self.answer
        if not (self.streamed or answer.finish):
            return None
        text, choices = answer.stream.take(), answer.choices[self.num_choices_told :]
        self.num_choices_told = len(answer.choices)
        return Update(text, choices, answer.finish) if text or choices or answer.finish else None


Told = list[tuple[Ticket, Update]]
Deliver = Callable[[Told], object]
"""Called in the engine's thread, once per step for all tickets that share it."""


class Engine:
    """Runs a batch in a thread of its own, for requests from the server's threads."""

    def __init__(self, generator: Generator, metrics: Metrics, max_waiting: int):
        """Create an engine for `generator` that reports to `metrics` and lets at most `max_waiting`
        requests wait for a slot."""
        self.generator, self.metrics, self.max_waiting = generator, metrics, max_waiting
        self._batch = Batch(generator.model, generator.ends)
        self._tickets: dict[Answer, Ticket] = {}
        # Filled by the server's threads under `_changed`, and emptied by the engine's thread: the
        # batch itself is changed by that thread alone.
        self._arrived: deque[Ticket] = deque()
        self._cancelled: deque[Ticket] = deque()
        self._changed = threading.Condition()
        # Time when answers under way are cut off. None as long as requests are accepted.
        self._ends_at: float | None = None
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()
        self.metrics.engines.append(self)

    def trouble(self, longest_s: float) -> str:
        """Return why the engine answers nobody, such as a step longer than `longest_s` seconds;
        empty if all is well."""
        if not self._thread.is_alive():
            return "the engine has ended"
        began = self._step_began
        taken = 0.0 if began is None else time.monotonic() - began
        return f"a step of the model has not ended after {taken:.0f} s" if taken > longest_s else ""

    @property
    def num_slots(self) -> int:
        """Return how many answers it computes at a time, at most."""
        return self.generator.model.num_slots

    @property
    def num_busy(self) -> int:
        """Return how many answers it computes now."""
        return self._batch.num_running

    @property
    def num_waiting(self) -> int:
        """Return how many requests wait for a slot."""
        # Read by other threads without the lock: a number that is a step old does for what asks.
        return len(self._batch.waiting) + len(self._arrived)

    def submit(
        self, requests: Sequence[Request], timeout_s: float, streamed: bool, deliver: Deliver
    ) -> list[Ticket]:
        """Queue all `requests` or none, and return their tickets.

        Each may take `timeout_s` seconds. `deliver` gets the updates: every piece if `streamed`,
        otherwise the end alone. Raise Overloaded, and ConfigError for a prompt that does not
        fit."""
        # Here, in the client's thread: in the engine's nobody could be told, and what `Batch.add`
        # raises would end it.
        for request in requests:
            self._batch.check(request)
        now = time.monotonic()
        tickets = [
            Ticket(self.generator.start(request), number, streamed, now + timeout_s, now, deliver)
            for number, request in enumerate(requests)
        ]
        link([ticket.answer for ticket in tickets])
        with self._changed:
            if self._ends_at is not None:
                raise Overloaded("the server is about to end")
            # A request that finds a free slot does not wait: it does not count against the queue.
            free = self.generator.model.num_slots - self._batch.num_running
            if self.num_waiting + len(tickets) > self.max_waiting + free:
                raise Overloaded(f"{self.max_waiting} requests wait already: try again later")
            self._arrived.extend(tickets)
            self._changed.notify()
        return tickets

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Give up the tickets that have not ended. Their slots are free before the next step."""
        with self._changed:
            self._cancelled.extend(tickets)
            self._changed.notify()

    def close(self, within_s: float) -> None:
        """Accept no more requests. Answers that have not ended after `within_s` seconds are cut
        off."""
        with self._changed:
            # A second signal can shorten the grace period, never extend it.
            self._ends_at = min(time.monotonic() + within_s, self._ends_at or float("inf"))
            self._changed.notify()

    def join(self, timeout_s: float) -> None:
        """Wait at most `timeout_s` seconds for the thread to end. The metrics forget the engine."""
        if self in self.metrics.engines:
            self.metrics.engines.remove(self)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        """Compute step after step until the engine is closed. A step that fails ends only the
        answers in progress."""
        while self._take_in():
            self._expire()
            # For `trouble`, which other threads call while this one is inside the step.
            self._step_began = time.monotonic()
            try:
                answers = self._batch.step()
            except BaseException as error:  # a panic of a tokenizer in Rust is no Exception
                # A rank that is gone is told when the server ends, by all that there is to say.
                if not isinstance(error, RankLost):
                    LOG.exception("a step of the model failed: the answers under way are given up")
                # All that the batch has, those that wait for a slot included; only `_arrived` ones
                # stay.
                answers = list(self._tickets)
                self._give_up(answers, "failed")
            self._step_began = None
            self._tell(answers)

    def _take_in(self) -> bool:
        """Wait for something to do, and add new and cancelled requests to the batch. Return False
        when the engine shall end."""
        with self._changed:
            while not (
                self._batch.busy or self._arrived or self._cancelled or self._ends_at is not None
            ):
                self._changed.wait()
            while self._arrived:
                ticket = self._arrived.popleft()
                self._tickets[ticket.answer] = ticket
                self._batch.add(ticket.answer)
            # A ticket may have ended between its cancellation and now.
            gone = [ticket.answer for ticket in self._cancelled if ticket.answer in self._tickets]
            self._cancelled.clear()
            self._give_up(gone, "cancelled")
            self._tell(gone)
            # A closed engine goes on until its answers have ended; `_expire` sees to it that they
            # do.
            return self._ends_at is None or self._batch.busy

    def _expire(self) -> None:
        """End the answers whose time is over, or all of them once the server's grace period is
        over."""
        now = time.monotonic()
        if self._ends_at is not None and now >= self._ends_at:
            late = list(self._tickets)
            self._give_up(late, "cancelled")
        else:
            # Also what still waits for a slot: its client waits as long.
            late = [answer for answer, ticket in self._tickets.items() if now >= ticket.deadline]
            self._give_up(late, "time")
        self._tell(late)

    def _give_up(self, answers: Sequence[Answer], why: Finish) -> None:
        """Drop the answers from the batch and end them."""
        for answer in answers:
            self._batch.drop(answer)
            answer.end(why)

    def _tell(self, answers: Sequence[Answer]) -> None:
        """Report what is new of these answers, in one call per receiver."""
        told: dict[Deliver, Told] = {}
        for answer in answers:
            ticket = self._tickets[answer]
            # Before it is delivered: who reads an answer, and then the metrics, finds it there.
            self._count(ticket)
            if update := ticket.news():
                told.setdefault(ticket.deliver, []).append((ticket, update))
            if answer.finish:
                del self._tickets[answer]
        for deliver, updates in told.items():
            deliver(updates)

    def _count(self, ticket: Ticket) -> None:
        """Update the metrics of one answer."""
        answer, metrics = ticket.answer, self.metrics
        if answer.tokens and not ticket.num_counted:
            ticket.first_token_s = time.monotonic() - ticket.submitted
            metrics.first_token.observe(ticket.first_token_s)
        metrics.generated.inc(len(answer.tokens) - ticket.num_counted)
        ticket.num_counted = len(answer.tokens)
        if answer.finish:
            metrics.prompted.inc(len(answer.request.prompt))
            metrics.answers.labels(answer.finish).inc()
