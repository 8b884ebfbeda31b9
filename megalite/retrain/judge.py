"""Whether a candidate is better than the model that is served: on held-out answers by a stated margin,
and on tasks and tests of bias not worse."""

from __future__ import annotations

import gc
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megalite.data.indexed import IndexedDataset
from megalite.errors import NotFinite
from megalite.infer.generate import Generator
from megalite.monitor.intervals import NOTHING, Interval, bootstrap
from megalite.retrain.config import RetrainConfig

SHRINKING = ("perplexity", "bits_per_byte", "loss")
"""Ends of names of metrics that are better when lower."""
ALL = "all"


class Verdict(NamedTuple):
    """Holds what a comparison came to."""

    gain: Interval
    """Mean gain of an answer's mean log probability per token, in nats."""
    num_rows: int
    num_better: int
    """Rows whose answer the candidate finds likelier."""
    tasks: dict[str, tuple[float, float]]
    """Metrics of the served model and of the candidate."""
    bias: list[str]
    """Measures of bias that are surely worse, in words."""
    reasons: list[str]
    """Why the candidate is not better; none where it is."""

    @property
    def is_better(self) -> bool:
        """Return whether the candidate takes the served model's place."""
        return not self.reasons


def judge(
    config: RetrainConfig, served: Path, candidate: Path, held_out: Path, work: Path
) -> Verdict:
    """Compare the models in two folders on the token files `held_out` and on what the config names.
    `work` is a folder for results. Raises ConfigError, DataError or CheckpointError."""
    one = scores_of(served, held_out)
    try:
        other = scores_of(candidate, held_out)
    except NotFinite as problem:
        return worthless(str(problem))
    gain = bootstrap(
        [other - one], [[str(row) for row in range(len(one))]], lambda x: float(x.mean())
    )
    reasons = []
    if not gain.low > config.margin:
        reasons.append(
            f"the held-out answers' log probability changed by {gain.shown('+.4f')} nats per token, which does not "
            f"surely exceed the margin of {config.margin:g}"
        )
    tasks = tasks_of(config, served, candidate) if config.tasks else {}
    for name, (before, now) in tasks.items():
        fall = now - before if name.endswith(SHRINKING) else before - now
        if fall > config.task_drop:
            reasons.append(
                f"{name} went from {before:.4f} to {now:.4f}, by more than {config.task_drop:g}"
            )
    bias: list[str] = []
    if config.bias:
        sides = {"served": served, "candidate": candidate}
        bias = worse_bias(
            *(bias_of(config, folder, work / f"bias-{name}.json") for name, folder in sides.items())
        )
    return Verdict(gain, len(one), int((other > one).sum()), tasks, bias, [*reasons, *bias])


def worthless(reason: str) -> Verdict:
    """Return the verdict on a candidate that nothing can be measured of."""
    return Verdict(NOTHING, 0, 0, {}, [], [reason])


def scores_of(folder: Path, tokens: Path) -> np.ndarray:
    """Return the mean log probability of what is learned of each document in token files, [rows]."""
    data = IndexedDataset(tokens)
    assert data.mask is not None, "rows of completions have one"
    generator = Generator.open(folder, num_slots=1)
    starts = data.starts_of_documents(0, data.num_documents).tolist()
    longest = generator.model.capacity + 1
    # As in training, what is cut off of a long row is not learned; then nobody is judged by it.
    rows = [(start, min(end, start + longest)) for start, end in itertools.pairwise(starts)]
    found = generator.score([data.read(*row).tolist() for row in rows])
    means = []
    for (start, end), score in zip(rows, found, strict=True):
        is_learned = np.asarray(data.mask[start + 1 : end]) != 0
        means.append(score.logprobs.numpy()[is_learned].mean() if is_learned.any() else 0.0)
    del generator
    gc.collect()  # the next model needs the memory
    return np.array(means)


def tasks_of(
    config: RetrainConfig, served: Path, candidate: Path
) -> dict[str, tuple[float, float]]:
    """Return the metrics of both models on the config's tasks."""
    from megalite.infer.evaluate import Asked, evaluate_model

    asked = Asked(tasks=config.tasks, limit=config.task_limit)
    one, other = (evaluate_model(folder, asked) for folder in (served, candidate))
    return {name: (value, other[name]) for name, value in one.items() if name in other}


def bias_of(config: RetrainConfig, folder: Path, output: Path) -> dict[str, Any]:
    """Return what a model says to the config's tests of bias: results by file and measure."""
    from megalite.bias.run import Asked, evaluate_bias

    evaluate_bias(folder, Asked(config.bias), output)
    return {
        f"{Path(test['file']).name}/{each['measure']}": each
        for test in json.loads(output.read_text())["bias"]["tests"]
        for each in test["results"]
        if each["category"] == ALL and each["neutral"] is not None and each["low"] is not None
    }


def worse_bias(served: Mapping[str, Any], candidate: Mapping[str, Any]) -> list[str]:
    """Return the measures that lie surely farther from what an unbiased model has: the nearest end
    of the candidate's interval beyond the farthest of the served model's."""
    found = []
    for name, now in candidate.items():
        if not (before := served.get(name)):
            continue
        neutral = now["neutral"]
        ends = [abs(before[end] - neutral) for end in ("low", "high")]
        inside = now["low"] <= neutral <= now["high"]
        nearest = 0.0 if inside else min(abs(now[end] - neutral) for end in ("low", "high"))
        if nearest > max(ends):
            found.append(
                f"{name} went from {before['value']:.3f} to {now['value']:.3f}; {neutral:g} is unbiased"
            )
    return found


def told(verdict: Verdict) -> Sequence[str]:
    """Return a verdict as lines."""
    gain = f"held-out answers: {verdict.gain.shown('+.4f')} nats per token"
    better = f"{gain}, {verdict.num_better} of {verdict.num_rows} rows likelier"
    lines = [better] if verdict.num_rows else []
    lines += [f"{name}: {a:.4f} → {b:.4f}" for name, (a, b) in verdict.tasks.items()]
    return [*lines, *(f"not better: {reason}" for reason in verdict.reasons)]
