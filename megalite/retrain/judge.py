"""Whether a candidate is better than the model that is served: on held-out answers by a stated margin,
and on tasks and tests of bias not worse."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megalite.bias.intervals import FEWEST, estimate
from megalite.comm.mesh import Launch
from megalite.data.indexed import IndexedDataset
from megalite.data.origins import Origins
from megalite.errors import NotFinite
from megalite.infer.generate import Generator, find_model
from megalite.monitor.intervals import NOTHING, Interval
from megalite.retrain import rows
from megalite.retrain.config import RetrainConfig
from megalite.retrain.swap import admin_key

ALL = "all"
NUM_SLOTS = 8
"""Sequences that are computed at a time, as `megalite eval` has them."""
Bias = dict[str, dict[str, float]]
"""By FILE/MEASURE the `value` of a measure, its interval `low` to `high`, and what is `neutral`."""


class Measured(NamedTuple):
    """Holds what is measured of a model."""

    scores: np.ndarray
    """Mean log probability of each held-out answer's tokens, in nats, [rows]."""
    tasks: dict[str, float]
    """Metrics by TASK/METRIC."""
    directions: dict[str, bool | None]
    """Whether a higher metric is better; None where the task does not say."""
    bias: Bias


class Verdict(NamedTuple):
    """Holds what a comparison came to."""

    gain: Interval
    """Mean gain of an answer's mean log probability per token, in nats."""
    num_rows: int
    num_better: int
    """Rows whose answer the candidate finds likelier."""
    tasks: dict[str, tuple[float, float]]
    """Metrics of the served model and of the candidate."""
    bias: dict[str, tuple[float, float]]
    """Measures of bias of the served model and of the candidate."""
    reasons: list[str]
    """Why the candidate is not better; none where it is."""

    @property
    def is_better(self) -> bool:
        """Return whether the candidate takes the served model's place."""
        return not self.reasons


def check(config: RetrainConfig) -> None:
    """Look for what would keep a candidate from being judged or served: training takes long. Raises
    ConfigError or DataError."""
    if config.reload:
        admin_key(config.reload)
    if config.bias:
        _bias_tests(config)
    if config.tasks:
        _tasks(config)


def judge(
    config: RetrainConfig, served: Path, candidate: Path, held_out: Path, work: Path
) -> Verdict:
    """Compare the models in two folders on the token files `held_out` and on what the config names.
    `work` is a folder for pages. Raises ConfigError, DataError or CheckpointError."""
    # Anew in each round, since other rows judge in each. Bad numbers of its own are an error; those of
    # a candidate are a verdict.
    before = measure(config, served, held_out, work / "bias-served.html")
    try:
        now = measure(config, candidate, held_out, work / "bias-candidate.html")
    except NotFinite as problem:
        return worthless(str(problem))
    gains = now.scores - before.scores
    # Answers to one question are alike: as rows of their own they would make the gain too sure.
    found = estimate(gains, questions_of(held_out))
    gain = Interval(found.value, found.low, found.high)
    reasons = []
    if not gain.low > config.margin:
        reasons.append(
            f"the held-out answers' log probability changed by {gain.shown('+.4f')} nats per token, which does not "
            f"surely exceed the margin of {config.margin:g}"
        )
    reasons += worse_tasks(config.task_drop, before, now)
    reasons += [*_not_judged(config, before.bias), *worse_bias(before.bias, now.bias)]
    return Verdict(
        gain,
        len(gains),
        int((gains > 0).sum()),
        {name: (value, now.tasks[name]) for name, value in before.tasks.items()},
        # What is measured of one alone depends on what it answers, as BBQ's scores do.
        {
            name: (before.bias[name]["value"], x["value"])
            for name, x in now.bias.items()
            if name in before.bias
        },
        reasons,
    )


def worthless(reason: str) -> Verdict:
    """Return the verdict on a candidate that nothing can be measured of."""
    return Verdict(NOTHING, 0, 0, {}, {}, [reason])


def measure(config: RetrainConfig, folder: Path, held_out: Path, page: Path) -> Measured:
    """Return what the config asks to know of a model; that of bias is drawn to `page`."""
    generator = Generator.open(folder, num_slots=NUM_SLOTS if config.tasks else 1)
    scores = scores_of(generator, held_out)
    tasks, directions = tasks_of(config, generator) if config.tasks else ({}, {})
    del generator
    gc.collect()  # the next model needs the memory
    bias = bias_of(config, folder, page) if config.bias else {}
    gc.collect()
    return Measured(scores, tasks, directions, bias)


def scores_of(generator: Generator, tokens: Path) -> np.ndarray:
    """Return the mean log probability of what is learned of each document in token files, [rows]."""
    data = IndexedDataset(tokens)
    assert data.mask is not None, "rows of completions have one"
    starts = data.starts_of_documents(0, data.num_documents).tolist()
    longest = generator.model.capacity + 1
    # As in training, what is cut off of a long row is not learned; then nobody is judged by it.
    places = [(start, min(end, start + longest)) for start, end in itertools.pairwise(starts)]
    found = generator.score([data.read(*place).tolist() for place in places])
    means = []
    for (start, end), score in zip(places, found, strict=True):
        # A score is that of the next token: the first one has none.
        is_learned = np.asarray(data.mask[start + 1 : end]) != 0
        means.append(score.logprobs.numpy()[is_learned].mean() if is_learned.any() else 0.0)
    return np.array(means)


def questions_of(tokens: Path) -> list[str]:
    """Return what tells the question of each document in token files from others, [rows]."""
    data = IndexedDataset(tokens)
    origins, judging = Origins(data), rows.read_back(tokens.with_name(rows.JUDGING))
    # Rows that cannot be used are no documents: lines tell which the others are.
    lines = [origins.of(number).line for number in range(data.num_documents)]
    return [rows.question_of(judging[line - 1]) for line in lines]


def _tasks(config: RetrainConfig) -> Any:
    from megalite.infer.evaluate import load_harness

    return load_harness().load_tasks(config.tasks, limit=config.task_limit)


def tasks_of(
    config: RetrainConfig, generator: Generator
) -> tuple[dict[str, float], dict[str, bool | None]]:
    """Return a model's metrics on the config's tasks, and whether higher is better."""
    from megalite.infer.evaluate import load_harness

    harness = load_harness()
    results = _tasks(config).run(harness.HarnessModel(generator), uncertainty=0)
    return harness.numbers_of(results), harness.directions_of(results)


def worse_tasks(most: float, served: Measured, candidate: Measured) -> Iterator[str]:
    """Yield the metrics of tasks that got worse by more than `most`. One that is no number any more
    has; one that has no better direction cannot."""
    for name, before in served.tasks.items():
        higher, now = served.directions[name], candidate.tasks[name]
        if higher is None or math.isnan(before):
            continue
        fall = before - now if higher else now - before
        if not fall <= most:
            yield f"{name} went from {before:.4f} to {now:.4f}, by more than {most:g}"


def _bias_tests(config: RetrainConfig) -> Any:
    from megalite.bias.forms import read_tests

    return read_tests(config.bias, None)


def bias_of(config: RetrainConfig, folder: Path, page: Path) -> Bias:
    """Return what a model says to the config's tests of bias: the measures of all items that an
    unbiased model is known for, and that have an interval."""
    from megalite.bias.page import page_of
    from megalite.bias.report import Measured as Told
    from megalite.bias.run import ask_model

    outcomes = ask_model(
        find_model(folder), _bias_tests(config), NUM_SLOTS, Launch.from_environment()
    )
    page.write_text(page_of(Told(outcomes, None), str(folder)), encoding="utf-8")
    return {
        f"{test.file}/{each.measure}": each.found._asdict() | {"neutral": each.neutral}
        for test, outcome in outcomes
        for each in outcome.results
        if each.category == ALL and each.neutral is not None and each.found.clusters >= FEWEST
    }


def _not_judged(config: RetrainConfig, found: Bias) -> Iterator[str]:
    """Yield the files of bias that tell nothing: a gate that is not there must not look open."""
    for file in config.bias:
        if not any(name.startswith(f"{file}/") for name in found):
            yield f"{file} has no measure with an interval, which needs {FEWEST} templates or questions"


def worse_bias(served: Mapping[str, Any], candidate: Mapping[str, Any]) -> Iterator[str]:
    """Yield the measures that lie surely farther from what an unbiased model has: the nearest end
    of the candidate's interval beyond the farthest of the served model's."""
    for name, now in candidate.items():
        if not (before := served.get(name)):
            continue
        # Distances, since a measure may pass to the other side and be as biased there.
        neutral = now["neutral"]
        ends = [abs(before[end] - neutral) for end in ("low", "high")]
        inside = now["low"] <= neutral <= now["high"]
        nearest = 0.0 if inside else min(abs(now[end] - neutral) for end in ("low", "high"))
        # Intervals that overlap settle nothing, and a gate that closes by chance would never open: of
        # twenty measures one looks worse each time.
        if nearest > max(ends):
            yield (
                f"{name} went from {before['value']:.3f} to {now['value']:.3f}; {neutral:g} is unbiased"
            )


def told(verdict: Verdict) -> Sequence[str]:
    """Return a verdict as lines."""
    gain = f"held-out answers: {verdict.gain.shown('+.4f')} nats per token"
    better = f"{gain}, {verdict.num_better} of {verdict.num_rows} rows likelier"
    lines = [better] if verdict.num_rows else []
    compared = [*verdict.tasks.items(), *verdict.bias.items()]
    lines += [f"{name}: {a:.4f} → {b:.4f}" for name, (a, b) in compared]
    return [*lines, *(f"not better: {reason}" for reason in verdict.reasons)]
