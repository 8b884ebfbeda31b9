"""The whole way from sources to splits, as phases of tasks that datatrove runs here or on Slurm.

    clean       a task a shard: read, the stages of `checks.py`, shards of what is left and their digests
    exact       digests that come twice, a task a part of them
    signatures  a task a shard: MinHash of what has no exact duplicate
    buckets     documents with an equal bucket, a task a bucket
    clusters    one task: which document of each cluster stays
    split       a task a shard: leave the duplicates out, write train, valid and test
    report      one task: report.json and report.html

A task that has finished is never done again: datatrove notes it in work/logs/PHASE/completions, and its files appear
whole or not at all. Everything a task writes follows from the input and the config alone, so that neither the number of
workers nor an interruption changes a byte."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from megalite.changes import changes
from megalite.corpus import checks, duplicates
from megalite.corpus.config import CorpusConfig
from megalite.corpus.execute import Phase, run_here, submit
from megalite.corpus.files import ReadShard, WriteShard, write_json
from megalite.corpus.report import WriteReport
from megalite.corpus.sources import ReadInputs, list_inputs, shards_of
from megalite.corpus.split import WriteSplits
from megalite.corpus.steps import Without
from megalite.data.documents import Report
from megalite.errors import DataError

# Settings that change how the work is done, but not what comes out.
OF_THE_WORK = {"output", "workers", "slurm"}
NAMED = 5
"""Settings or files that have changed."""


def prepare_corpus(config: CorpusConfig, console: Console | None = None) -> dict[str, Any] | None:
    """Clean, deduplicate and split the sources into `config.output`, going on where an earlier call was interrupted.

    Returns the report, as in report.json; None on Slurm, where the jobs have only been submitted. Raises DataError for
    sources that match nothing and for an output folder of another config, ConfigError for lists that cannot be read."""
    output = config.output.absolute()
    work = output / "work"
    work.mkdir(parents=True, exist_ok=True)
    with _alone_in(work):
        num_shards = _begin(config, work)
        phases = plan_phases(config, output, num_shards)
        if config.slurm is not None:
            submit(phases, work / "logs", config.slurm, config.workers)
            return None
        for left in output.rglob(".*.tmp"):  # of a process that was killed
            left.unlink(missing_ok=True)
        run_here(phases, work / "logs", config.workers, console)
    return json.loads((output / "report.json").read_text(encoding="utf-8"))


def plan_phases(config: CorpusConfig, output: Path, num_shards: int) -> list[Phase]:
    work = output / "work"
    clean, exact, near = work / "clean", work / "exact", work / "near"
    reader, stages = ReadInputs(config.sources, work / "shards.json"), checks.stages(config)
    first = [reader, *stages, WriteShard(clean, reader, stages), duplicates.WriteDigests(clean)]
    phases = [Phase("clean", first, num_shards)]
    without: list[Without] = []
    if config.exact:
        find = duplicates.FindExact(clean, exact, num_shards)
        phases.append(Phase("exact", [find], duplicates.EXACT_TASKS))
        without.append(Without("exact", "the same text before", duplicates.ExactPlaces(exact)))
    if config.near:
        signatures = duplicates.signatures(config.near, near / "signatures")
        buckets = duplicates.buckets(config.near, near / "signatures", near / "buckets")
        clusters = duplicates.clusters(config.near, near / "buckets", near / "places")
        phases += [
            Phase("signatures", [ReadShard(clean), *without, signatures], num_shards),
            Phase("buckets", [buckets], config.near.buckets),
            Phase("clusters", [clusters], 1),
        ]
        without = [*without, Without("near", "nearly the same text", duplicates.NearPlaces(near / "places"))]
    split = WriteSplits(output, work / "split", config.split, config.compression, without)
    report = WriteReport(output, config, num_shards)
    return [
        *phases,
        Phase("split", [ReadShard(clean), *without, split], num_shards),
        Phase("report", [report], 1),
    ]


def _begin(config: CorpusConfig, work: Path) -> int:
    """The number of shards. Notes the config and the input files, or holds them against what was noted before."""
    listing = Report()
    files = list_inputs(config.sources, listing)
    shards = shards_of(files, config.shard_mb and config.shard_mb * 1e6)
    settings = config.model_dump(mode="json", exclude=OF_THE_WORK)
    noted = {"shards.json": [[asdict(file) for file in shard] for shard in shards], "settings.json": settings}
    for name, values in noted.items():
        path = work / name
        now = json.loads(json.dumps(values))
        then = json.loads(path.read_text(encoding="utf-8")) if path.exists() else now
        if then != now:
            is_files = name == "shards.json"
            what = "files of other names or sizes" if is_files else "another config"
            differs = changes(_sizes(then), _sizes(now)) if is_files else changes(then, now)
            named = "; ".join(map(str, differs[:NAMED])) or "the size of shards"
            raise DataError(
                f"{work.parent} was begun with {what}; name another `output`, or remove it to start anew ({named})"
            )
    inputs = {
        "files": len(files),
        "num_bytes": sum(file.num_bytes for file in files),
        "hidden": listing.num_hidden,
        "refused": listing.num_bad,
        "messages": listing.messages,
    }
    write_json(work / "inputs.json", inputs)
    for name, values in noted.items():
        write_json(work / name, values)
    return len(shards)


def _sizes(shards: list[list[dict[str, Any]]]) -> dict[str, Any]:
    return {file["path"]: file["num_bytes"] for shard in shards for file in shard}


@contextmanager
def _alone_in(work: Path) -> Iterator[None]:
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{work.parent} is being written by another process") from None
        yield
