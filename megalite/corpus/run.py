"""Prepares a corpus from its sources, in phases of tasks that datatrove runs here or on Slurm.

    clean       one task a shard: reads, runs the stages of `checks.py`, writes what is left and its digests
    exact       16 tasks: find digests that occur twice, each among its share of them
    signatures  one task a shard: computes MinHash signatures of documents without an exact duplicate
    buckets     one task a bucket: finds documents with equal signatures in it
    clusters    one task: chooses the document of each cluster that stays
    split       one task a shard: leaves the duplicates out, writes train, valid and test
    report      one task: writes report.json and report.html

A finished task is never done again: datatrove notes it in work/logs/PHASE/completions, and its
files appear whole or not at all. Everything a task writes follows from the input and the config
alone: neither the number of workers nor an interruption changes a byte.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from megalite.corpus import checks, duplicates
from megalite.corpus.config import CorpusConfig
from megalite.corpus.execute import Phase, run_here, submit
from megalite.corpus.files import ReadShard, WriteShard, write_json
from megalite.corpus.report import WriteReport
from megalite.corpus.sources import ReadInputs, list_inputs, shards_of
from megalite.corpus.split import SPLITS, WriteSplits
from megalite.corpus.steps import Without
from megalite.data.inputs import Report
from megalite.errors import DataError
from megalite.utils.changes import changes
from megalite.utils.locks import alone_in

OF_THE_WORK = {"output", "workers", "slurm"}
"""Settings that change how the work is done, but not its result."""
NAMED = 5
"""Number of changed settings or files that a message names."""


def prepare_corpus(config: CorpusConfig, console: Console | None = None) -> dict[str, Any] | None:
    """Clean, deduplicate and split the sources into `config.output`, continuing where an earlier
    call was interrupted.

    Returns the values of report.json; None on Slurm, where the jobs have only been submitted.
    `console` shows the progress. Raises DataError for sources that match nothing and for an output
    folder of another config, ConfigError for lists that cannot be read."""
    output = config.output.absolute()
    work = output / "work"
    with alone_in(work, output):
        # Fixed at the first call: a later one with other files or settings would mix two corpora.
        num_shards = _begin(config, work)
        phases = plan_phases(config, output, num_shards)
        if config.slurm is not None:
            submit(phases, work / "logs", config.slurm, config.workers)
            return None
        _remove_leftovers(output)
        run_here(phases, work / "logs", config.workers, console)
    return json.loads((output / "report.json").read_text(encoding="utf-8"))


def plan_phases(config: CorpusConfig, output: Path, num_shards: int) -> list[Phase]:
    """Return the phases that write the corpus of `config` to `output`, from `num_shards` shards of
    input files."""
    work = output / "work"
    clean = work / "clean"
    exact = work / "exact"
    near = work / "near"
    reader = ReadInputs(config.sources, work / "shards.json")
    stages = checks.stages(config)
    first = [reader, *stages, WriteShard(clean, reader, stages), duplicates.WriteDigests(clean)]
    phases = [Phase("clean", first, num_shards)]
    # Duplicates are left out when a shard is read again; the shards of `clean` stay as they are.
    without: list[Without] = []
    if config.exact:
        find = duplicates.FindExact(clean, exact, num_shards)
        phases.append(Phase("exact", [find], duplicates.EXACT_TASKS))
        # Places count the documents of `clean`; those of the near duplicates, below, what is left
        # then.
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
        # A new list, not a longer one: the phase above has the old one.
        without = [
            *without,
            Without("near", "nearly the same text", duplicates.NearPlaces(near / "places")),
        ]
    split = WriteSplits(output, work / "split", config.split, config.compression, without)
    report = WriteReport(output, config, num_shards)
    return [
        *phases,
        Phase("split", [ReadShard(clean), *without, split], num_shards),
        Phase("report", [report], 1),
    ]


def _begin(config: CorpusConfig, work: Path) -> int:
    """List the input files, and return the number of shards.

    Notes the settings and the files in `work`. Raises DataError if an earlier call has noted
    others."""
    listing = Report()
    files = list_inputs(config.sources, listing)
    shards = shards_of(files, config.shard_mb and config.shard_mb * 1e6)
    noted = {
        "shards.json": [[asdict(file) for file in shard] for shard in shards],
        "settings.json": config.model_dump(mode="json", exclude=OF_THE_WORK),
    }
    for name, values in noted.items():
        path = work / name
        now = json.loads(json.dumps(values))  # tuples become lists, as in the file
        then = json.loads(path.read_text(encoding="utf-8")) if path.exists() else now
        if then != now:
            if name == "shards.json":
                what = "files of other names or sizes"
                differs = changes(_sizes(then), _sizes(now))
            else:
                what = "another config"
                differs = changes(then, now)
            # The same files in other shards: shard_mb has changed.
            named = "; ".join(map(str, differs[:NAMED])) or "the size of shards"
            raise DataError(
                f"{work.parent} was begun with {what}; name another `output`, or remove it to start anew ({named})"
            )
    # Nothing is written before all was compared. For the report, whose task sees only the output
    # folder.
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


def _remove_leftovers(output: Path) -> None:
    """Remove the unfinished files of a process that was killed."""
    # Only in folders of our own: `output` may be one that other programs write in as well.
    for folder in (output / name for name in ("work", *SPLITS)):
        for left in folder.rglob(".*.tmp"):
            left.unlink(missing_ok=True)
    for left in output.glob(".report.*.tmp"):
        left.unlink(missing_ok=True)


def _sizes(shards: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the size of each file, by path."""
    sizes = {}
    for shard in shards:
        for file in shard:
            sizes[file["path"]] = file["num_bytes"]
    return sizes
