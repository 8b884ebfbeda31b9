"""Merges what all tasks counted into report.json and report.html."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from megalite.corpus.config import CorpusConfig
from megalite.corpus.files import whole_file, write_json
from megalite.corpus.page import page_of
from megalite.corpus.split import SPLITS
from megalite.corpus.tally import Count, Dropped, Tally

MAX_MESSAGES = 100


class WriteReport(PipelineStep):
    """Writes `output`/report.json and report.html from the counts that earlier phases wrote beside
    their shards."""

    type, name = "writer", "report"

    def __init__(self, output: Path, config: CorpusConfig, num_shards: int) -> None:
        super().__init__()
        self._output = output
        self._config = config
        self._num_shards = num_shards

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        report = make_report(self._output / "work", self._config, self._num_shards)
        write_json(self._output / "report.json", report)
        with whole_file(self._output / "report.html") as file:
            file.write(page_of(report).encode("utf-8", "replace"))


def make_report(work: Path, config: CorpusConfig, num_shards: int) -> dict[str, Any]:
    """Return the values of report.json, merged from the counts of `num_shards` shards in the folder
    `work`.

    For every stage, what came is what was kept and what was dropped: in documents, and in bytes
    together with those that edits removed. `config` is that of the corpus."""
    # Counts of the tasks that read and filter, and of those that drop duplicates and split.
    cleaned = _counted(work / "clean", num_shards)
    split = _counted(work / "split", num_shards)
    reading = Counter[str]()
    left_out = Counter[str]()
    as_text = Counter[str]()
    sources = {}
    for source in config.sources:
        sources[source.name] = {side: Count() for side in ("read", *SPLITS)}
    inputs = json.loads((work / "inputs.json").read_text(encoding="utf-8"))
    # In the order of the shards, so that those which are kept are the same in every run.
    messages: list[str] = inputs["messages"]
    for shard in cleaned:
        # Counts add up. Messages and mappings are popped first, because they do not.
        messages += shard["report"].pop("messages")
        left_out.update(shard["report"].pop("left_out"))
        as_text.update(shard["report"].pop("as_text"))
        reading.update(shard["report"])
        _add(sources, {"read": shard["sources"]})
    for shard in split:
        _add(sources, shard["splits"])
    reading["num_hidden"] += inputs["hidden"]
    reading["num_bad"] += inputs["refused"]
    merged = _merged_stages(cleaned) + _merged_stages(split)
    notes = {stage.name: stage.notes for stage in merged}
    stages = [_read_tally(reading, left_out, as_text, sources)]
    for stage in merged:
        # A corpus without HTML has nothing to say about its extraction.
        if stage.name != "extract" or stage.notes or stage.dropped:
            stages.append(stage)
    splits = {}
    for side in SPLITS:
        splits[side] = vars(_sum(counts[side] for counts in sources.values()))
    of_sources = {}
    for name, counts in sources.items():
        of_sources[name] = {side: vars(count) for side, count in counts.items()}
    return {
        "stages": [stage.to_json() for stage in stages],
        "splits": splits,
        "sources": of_sources,
        "languages": dict(notes.get("language", Counter()).most_common()),
        "groups": _groups(notes.get("words", Counter())),
        "input": {"files": inputs["files"], "num_bytes": inputs["num_bytes"], "shards": num_shards},
        "messages": messages[:MAX_MESSAGES],
        "more_messages": max(reading["num_bad"] - MAX_MESSAGES, 0),
        "config": config.model_dump(mode="json", exclude={"workers", "slurm"}),
    }


def _counted(folder: Path, num_shards: int) -> list[dict[str, Any]]:
    """Read what the tasks of a phase counted."""
    found = []
    for shard in range(num_shards):
        path = folder / f"{shard:05d}.json"
        found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def _add(
    sources: dict[str, dict[str, Count]], counted: dict[str, dict[str, dict[str, int]]]
) -> None:
    """Add counts, by side and name, to those of the sources."""
    for side, counts in counted.items():
        for name, count in counts.items():
            sources[name][side].add(count["num_bytes"], count["documents"])


def _sum(counts: Iterable[Count]) -> Count:
    total = Count()
    for count in counts:
        total.add(count.num_bytes, count.documents)
    return total


def _merged_stages(shards: list[dict[str, Any]]) -> list[Tally]:
    """Merge the tallies of each stage over all shards."""
    stages = zip(*(shard["stages"] for shard in shards), strict=True)
    return [_merged(tallies) for tallies in stages]


def _merged(shards: Iterable[dict[str, Any]]) -> Tally:
    """Merge the tallies of one stage."""
    first, *rest = map(Tally.from_json, shards)
    for tally in rest:
        first.merge(tally)
    # The largest first, then by name: an order that does not depend on which shard met what first.
    dropped = sorted(first.dropped.items(), key=lambda item: (-item[1].documents, item[0]))
    notes = sorted(first.notes.items(), key=lambda item: (-item[1], item[0]))
    first.dropped = dict(dropped)
    first.notes = Counter(dict(notes))
    return first


def _read_tally(
    reading: Counter[str],
    left_out: Counter[str],
    as_text: Counter[str],
    sources: dict[str, dict[str, Count]],
) -> Tally:
    """Describe reading as a stage. What could not be read counts as dropped, with no bytes of
    text."""
    tally = Tally("read", kept=_sum(counts["read"] for counts in sources.values()))
    counts = {
        "bad lines or files": reading["num_bad"],
        "empty": reading["num_empty"],
        "binary files": reading["num_binary"],
        **dict(sorted(left_out.items())),
    }
    tally.dropped = {reason: Dropped(count) for reason, count in counts.items() if count}
    tally.came = _sum([tally.kept, *tally.dropped.values()])
    tally.notes["hidden files and folders, left out"] += reading["num_hidden"]
    tally.notes["documents not all UTF-8, mended"] += reading["num_mended"]
    for suffix, count in as_text.items():
        tally.notes[f"files {suffix or 'without a suffix'} read as plain text"] += count
    tally.notes = +tally.notes  # without the zeros
    return tally


def _groups(notes: Counter[str]) -> dict[str, Any]:
    """Return how many documents mention each group, and how many of those hold listed words."""
    named = {}
    for group, count in notes.items():
        if "/" in group and not group.endswith(" + listed"):
            named[group] = {"documents": count, "listed": notes[f"{group} + listed"]}
    return {"documents": notes["documents"], "listed": notes["listed"], "groups": named}
