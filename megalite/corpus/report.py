"""What all tasks counted, as report.json and as one page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from megalite.corpus.config import CorpusConfig
from megalite.corpus.files import replacing, write_json
from megalite.corpus.page import page_of
from megalite.corpus.split import SPLITS
from megalite.corpus.tally import Count, Dropped, Tally

MAX_MESSAGES = 100


class WriteReport(PipelineStep):
    """`output`/report.json and report.html, from what the other phases' tasks wrote beside their shards."""

    type, name = "writer", "report"

    def __init__(self, output: Path, config: CorpusConfig, num_shards: int) -> None:
        super().__init__()
        self._output, self._config, self._num_shards = output, config, num_shards

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        report = make_report(self._output / "work", self._config, self._num_shards)
        write_json(self._output / "report.json", report)
        with replacing(self._output / "report.html") as file:
            file.write(page_of(report).encode("utf-8", "replace"))


def make_report(work: Path, config: CorpusConfig, num_shards: int) -> dict[str, Any]:
    """The report's values. Of every stage: what came = what was kept + what was dropped, in documents and in bytes (of
    which kept documents may have lost some)."""
    cleaned, split = _counted(work / "clean", num_shards), _counted(work / "split", num_shards)
    reading: Counter[str] = Counter()
    left_out, as_text = Counter[str](), Counter[str]()
    sources = {source.name: {"read": Count(), **{side: Count() for side in SPLITS}} for source in config.sources}
    inputs = json.loads((work / "inputs.json").read_text(encoding="utf-8"))
    messages: list[str] = inputs["messages"]
    for shard in cleaned:
        messages += shard["report"].pop("messages")
        left_out.update(shard["report"].pop("left_out"))
        as_text.update(shard["report"].pop("as_text"))
        reading.update(shard["report"])
        _add(sources, {"read": shard["sources"]})
    for shard in split:
        _add(sources, shard["splits"])
    reading["num_hidden"] += inputs["hidden"]
    reading["num_bad"] += inputs["refused"]
    merged = [_merged(shards) for part in (cleaned, split) for shards in zip(*(s["stages"] for s in part), strict=True)]
    notes = {stage.name: stage.notes for stage in merged}
    stages = [
        _read_tally(reading, left_out, as_text, sources),
        *(stage for stage in merged if stage.name != "extract" or stage.notes or stage.dropped),
    ]
    return {
        "stages": [stage.to_json() for stage in stages],
        "splits": {side: vars(_sum(counts[side] for counts in sources.values())) for side in SPLITS},
        "sources": {name: {side: vars(count) for side, count in counts.items()} for name, counts in sources.items()},
        "languages": dict(notes.get("language", Counter()).most_common()),
        "groups": _groups(notes.get("words", Counter())),
        "input": {"files": inputs["files"], "num_bytes": inputs["num_bytes"], "shards": num_shards},
        "messages": messages[:MAX_MESSAGES],
        "more_messages": max(reading["num_bad"] - MAX_MESSAGES, 0),
        "config": config.model_dump(mode="json", exclude={"workers", "slurm"}),
    }


def _counted(folder: Path, num_shards: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{shard:05d}.json").read_text(encoding="utf-8")) for shard in range(num_shards)]


def _add(sources: dict[str, dict[str, Count]], counted: dict[str, dict[str, dict[str, int]]]) -> None:
    for side, counts in counted.items():
        for name, count in counts.items():
            sources[name][side].add(count["num_bytes"], count["documents"])


def _sum(counts: Iterable[Count]) -> Count:
    total = Count()
    for count in counts:
        total.add(count.num_bytes, count.documents)
    return total


def _merged(shards: Iterable[dict[str, Any]]) -> Tally:
    first, *rest = map(Tally.from_json, shards)
    for tally in rest:
        first.merge(tally)
    # A fixed order, whatever the shards met first.
    first.dropped = dict(sorted(first.dropped.items(), key=lambda item: (-item[1].documents, item[0])))
    first.notes = Counter(dict(sorted(first.notes.items(), key=lambda item: (-item[1], item[0]))))
    return first


def _read_tally(
    reading: Counter[str], left_out: Counter[str], as_text: Counter[str], sources: dict[str, dict[str, Count]]
) -> Tally:
    """Reading as a stage. What could not be read has no bytes of text."""
    tally = Tally("read", kept=_sum(counts["read"] for counts in sources.values()))
    counts = {"bad lines or files": "num_bad", "empty": "num_empty", "binary files": "num_binary"}
    named = {reason: reading[count] for reason, count in counts.items()} | dict(sorted(left_out.items()))
    tally.dropped = {reason: Dropped(count) for reason, count in named.items() if count}
    tally.came = _sum([tally.kept, *tally.dropped.values()])
    tally.notes.update({"hidden files and folders, left out": reading["num_hidden"]})
    tally.notes.update({"documents not all UTF-8, mended": reading["num_mended"]})
    tally.notes.update({f"files {suffix or 'without a suffix'} read as plain text": n for suffix, n in as_text.items()})
    tally.notes = +tally.notes
    return tally


def _groups(notes: Counter[str]) -> dict[str, Any]:
    """Of how many documents speak of each group, and how many of those hold listed words."""
    named = {
        group: {"documents": count, "listed": notes[f"{group} + listed"]}
        for group, count in notes.items()
        if "/" in group and not group.endswith(" + listed")
    }
    return {"documents": notes["documents"], "listed": notes["listed"], "groups": named}
