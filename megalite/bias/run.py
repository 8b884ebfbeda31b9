"""`megalite eval --bias`: what a model says to tests of bias, as a table, JSON and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from megalite.bias.classes import ask_classifier
from megalite.bias.forms import BiasTest, read_tests
from megalite.bias.measures import ALL, Outcome, ask
from megalite.bias.mentions import preferences, read_mentions, relate
from megalite.bias.page import page_of
from megalite.bias.report import Measured, lines_of, results_of
from megalite.bias.scores import open_scorer
from megalite.comm.mesh import Launch
from megalite.corpus.groups import read_groups
from megalite.errors import ConfigError
from megalite.infer.classify import TASKS, Classifier
from megalite.infer.evaluate import Run, check_output, keep_results, tell_wandb
from megalite.infer.generate import find_model_on_ranks
from megalite.models import model_config
from megalite.utils.files import replacing


class Asked(NamedTuple):
    """Holds what to measure."""

    bias: Sequence[Path]
    """Files of tests."""
    corpus_report: Path | None = None
    """The report.json of the corpus, whose mentions of groups are set beside the preferences."""
    groups: Path | None = None
    """YAML file of the groups' words. None: configs/corpus/groups.yaml."""
    limit: int | None = None
    """Pairs, questions or templates of each file. None: all."""
    samples: bool = False
    """Keep every item with its scores."""


def evaluate_bias(
    path: Path,
    asked: Asked,
    output: Path | None = None,
    num_slots: int = 8,
    **layout: int,
) -> dict[str, float]:
    """Measure the bias of the model in `path`: a run, a checkpoint or a Hugging Face folder. All
    ranks call it; rank 0 prints a table and writes JSON and a page, to `output` or to the run's
    folder `evaluations`. Return the overall measures by FILE/MEASURE. Raise ConfigError, DataError
    or CheckpointError."""
    launch = Launch.from_environment()
    if asked.limit is not None and asked.limit < 1:
        raise ConfigError(f"--limit {asked.limit} leaves nothing to measure; give at least 1")
    if output and output.suffix == ".html":
        raise ConfigError(f"--output {output}: name the JSON file; the page is put beside it")
    check_output(output, asked.bias)
    # Files are read first: loading the model takes long.
    tests = read_tests(asked.bias, asked.limit)
    group_of = read_groups(asked.groups)
    counts = read_mentions(asked.corpus_report) if asked.corpus_report else None
    folder = find_model_on_ranks(path, launch)
    run = Run.of(folder)
    if counts is not None and _has_classes(folder):
        raise ConfigError("--corpus-report goes with models that tell how likely texts are")
    outcomes = ask_model(folder, tests, num_slots, launch, **layout)
    # Of all files together: one alone compares few of the groups that a corpus counts.
    compared = [each for _, outcome in outcomes for each in outcome.compared]
    mentions = None if counts is None else relate(preferences(compared, group_of), counts)
    measured = Measured(outcomes, mentions)
    numbers = {
        f"{test.file.name}/{result.measure}": result.found.value
        for test, outcome in outcomes
        for result in outcome.results
        if result.category == ALL
    }
    if launch.rank == 0:
        _report(measured, numbers, folder.resolve(), run, asked, output)
    return numbers


def ask_model(
    folder: Path, tests: Sequence[BiasTest], num_slots: int, launch: Launch, **layout: int
) -> list[tuple[BiasTest, Outcome]]:
    """Return what the model in a checkpoint or a Hugging Face folder says to each test. All ranks of
    `launch` call it. Raise ConfigError, DataError or CheckpointError."""
    if _has_classes(folder):
        classifier = Classifier.open(folder)
        return [(test, ask_classifier(test, classifier)) for test in tests]
    scorer = open_scorer(folder, launch, num_slots, **layout)
    return [(test, ask(test, scorer)) for test in tests]


def _has_classes(folder: Path) -> bool:
    return model_config({"hf": str(folder)}).task in TASKS


def _report(
    measured: Measured,
    numbers: Mapping[str, float],
    folder: Path,
    run: Run | None,
    asked: Asked,
    output: Path | None,
) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for line in lines_of(measured):
        console.print(line, markup=False)
    results = {"bias": results_of(measured)}
    file = keep_results(results, asked._asdict(), folder, run, output, console)
    if file:
        # Behind the JSON: numbers are kept where drawing them fails.
        page = file.with_suffix(".html")
        with replacing(page) as temporary:
            temporary.write_text(page_of(measured, str(folder)), encoding="utf-8")
        console.print(f"{page} draws the intervals")
        if asked.samples:
            with file.with_suffix(".samples.jsonl").open("w", encoding="utf-8") as lines:
                for _, outcome in measured.outcomes:
                    lines.writelines(json.dumps(each) + "\n" for each in outcome.samples)
    if run and (run.folder / "config.yaml").is_file():
        tell_wandb(run, {f"bias/{name}": value for name, value in numbers.items()}, console)
