"""Take documents out of a run's data, and go back to before the run saw them: `megalite forget`.

What is asked for is the run that never had these documents. It is defined so that everything else
keeps its place: a document's tokens become as many fillers, from which nothing is learned, and every
sample, batch and step is of the same places of the token files as before. Steps before the first that
was trained on any of the documents are then the same in both runs, bit for bit, and a checkpoint
saved before it is one of both."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from megalite.checkpoint.folder import (
    MANIFEST,
    Damage,
    complete_steps,
    damage_of,
    digest,
    read_manifest,
    step_folder,
    write_json,
)
from megalite.config import Config, names_of
from megalite.config_file import parse_config
from megalite.data.checks import open_data
from megalite.data.dataset import SPLITS, RowSource, SampleSource
from megalite.data.indexed import IndexedDataset, read_note
from megalite.data.mixture import Mixture
from megalite.data.origins import open_origins, writing_origins
from megalite.errors import CheckpointError, ConfigError, DataError
from megalite.lineage.corpora import Lines, add_lines, blank
from megalite.lineage.documents import Documents
from megalite.lineage.run import TracedRun
from megalite.lineage.trace import Tracer
from megalite.observe.jsonl import read_metrics
from megalite.utils.files import replacing
from megalite.utils.outside import read_object, read_text
from megalite.utils.resources import fsync
from megalite.utils.urls import is_url


@dataclass(frozen=True)
class Removal:
    """Says what is to be taken out of a run's data, and what it costs."""

    run: TracedRun
    folder: Path
    documents: dict[str, tuple[int, ...]]
    """Numbers of the documents of each token file, by prefix, ascending."""
    first_step: int | None
    """First step that was trained on any of them; None: no step was."""
    checkpoint: int
    """Step of the newest checkpoint that has seen none of them; 0: there is none."""
    lines: Lines
    """Lines of the corpora that are blanked."""

    @property
    def steps(self) -> int:
        """Return how many steps are made again."""
        return self.run.num_steps - self.checkpoint

    @cached_property
    def name(self) -> str:
        """Return the name of the run without them."""
        config = self.run.config.run
        names = (f"{config.name}-forgot-{number}" for number in itertools.count(1))
        return next(name for name in names if not (config.dir / name).exists())

    def __str__(self) -> str:
        """Return what is done, for the console."""
        count = sum(map(len, self.documents.values()))
        lines = [f"{count:,} documents of {len(self.documents)} token files are taken out"]
        if self.first_step is None:
            lines.append(f"no step up to {self.run.num_steps:,} was trained on any of them")
        else:
            lines.append(f"step {self.first_step:,} was the first that was trained on any of them")
        where = f"the checkpoint of step {self.checkpoint:,}" if self.checkpoint else "the start"
        lines.append(
            f"{self.steps:,} of {self.run.num_steps:,} steps are to be made again, from {where}"
        )
        if count := sum(map(len, self.lines.values())):
            lines.append(f"{count:,} lines of {len(self.lines)} files of text are blanked")
        return "\n".join(lines)


def plan_removal(folder: Path, wanted: Sequence[str], corpora: bool = False) -> Removal:
    """Find the documents that `wanted` names (FILE:LINE or PREFIX#NUMBER) in the data of the run in
    `folder`, the steps that were trained on them, and the newest checkpoint from before; with
    `corpora` also the lines that they were made of. Raise DataError for a name without a document
    and for a line that cannot be blanked, ConfigError for what is no run."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no run's folder")
    run = TracedRun.open(folder)
    _, _, data = open_data(run.config)
    sources = [source for mixture in data.values() if mixture for source in mixture.sources]
    # Splits may share a token file.
    named = Documents(list({source.dataset.prefix: source.dataset for source in sources}.values()))
    documents = _documents_of(named, sources, wanted)
    lines: Lines = {}
    for number, dataset in enumerate(named.datasets):
        own = documents.get(dataset.prefix, set())
        if own and is_url(dataset.prefix):
            raise DataError(
                f"{dataset.prefix} is in an object store; copy it to a disk to take documents out"
            )
        gone = _removed_from(dataset)
        if corpora:
            origins = named.origins(number)
            # The lines of what is gone already are not there any more to be compared.
            add_lines(lines, dataset, origins, sorted(own - gone), run.tokenizer)
        if own:  # the new token file is made of this one, and lists what either lacks
            own.update(gone)
    found = {prefix: tuple(sorted(own)) for prefix, own in documents.items()}
    first = _first_step(run, found)
    held_out = [mixture for name, mixture in data.items() if mixture and name != "train"]
    judged = any(source.dataset.prefix in found for each in held_out for source in each.sources)
    # Whether to end early was decided by losses of what is taken out.
    until = 1 if judged and run.config.train.patience is not None else first
    return Removal(run, folder, found, first, _newest_before(folder, run, until), lines)


def _documents_of(
    named: Documents, sources: Sequence[SampleSource], wanted: Sequence[str]
) -> dict[str, set[int]]:
    """Return the documents that `wanted` names, by the prefix of their token file, with those that
    must go with them. Raise DataError for a name without a document."""
    documents: dict[str, set[int]] = {}
    for places in named.find(wanted).values():
        for file, document in places:
            documents.setdefault(named.datasets[file].prefix, set()).add(document)
    for source in sources:
        if isinstance(source, RowSource) and source.together == 2:
            # Of a pair (2n, 2n + 1) neither stays.
            own = documents.get(source.dataset.prefix, set())
            own.update([document ^ 1 for document in own])
    return documents


def _removed_from(dataset: IndexedDataset) -> set[int]:
    """Return the documents that an earlier removal has taken out of a token file."""
    return set() if dataset.removed is None else {*dataset.removed.tolist()}


def _first_step(run: TracedRun, documents: dict[str, tuple[int, ...]]) -> int | None:
    """Return the first step that was trained on any of the documents."""
    tracer = Tracer(run)
    steps = []
    for number, source in enumerate(run.mixture.sources):
        gone = _removed_from(source.dataset)
        for document in documents.get(source.dataset.prefix, ()):
            # Of what is gone already, the run was trained on fillers.
            if document not in gone:
                use = next(tracer.uses(number, document), None)  # the first in the run's order
                if use:
                    steps.append(use.step)
    return min(steps, default=None)


def _newest_before(folder: Path, run: TracedRun, first: int | None) -> int:
    """Return the newest whole checkpoint before step `first`, 0 if there is none. Raise
    CheckpointError where that was begun by another run."""
    for step in reversed(complete_steps(folder / "checkpoints")):
        path = step_folder(folder / "checkpoints", step)
        # Behind `num_steps` it is not known what a step was trained on.
        if (first is None or step < first) and step <= run.num_steps and _is_whole(path):
            return step
    if run.config.checkpoint.resume not in ("auto", "never"):
        raise CheckpointError(
            f"{folder} began at {run.config.checkpoint.resume}, and has no checkpoint of its own from before it was "
            "trained on these documents; forget them in the run that this one is of, and begin again from there"
        )
    return 0


def _is_whole(folder: Path) -> bool:
    """Return whether every file of a checkpoint is what was written."""
    files = read_manifest(folder)
    if isinstance(files, Damage):
        return False
    return not any(damage_of(folder / name, entry) for name, entry in files.items())


def forget(removal: Removal, register: Path, console: Console) -> Path:
    """Write token files without the documents and the folder of a run that never had them, up to
    its checkpoint, and note it in the `register` (JSON lines). Return the new folder: training goes
    on there. Raise DataError, CheckpointError or OSError."""
    # In this order, a crash leaves the old run and its texts as they were until the new one is
    # complete; texts are blanked next to last, and the register says only what was done.
    run = removal.run
    renamed = {prefix: _free_prefix(prefix) for prefix in removal.documents}
    before = {prefix: IndexedDataset(prefix).fingerprint() for prefix in renamed}
    for prefix, new in renamed.items():
        write_without(prefix, new, removal.documents[prefix])
        console.print(f"{new}.bin and .idx: {prefix} without them", highlight=False, markup=False)
    config = _config_without(run.config, renamed, removal.name)
    _, _, data = open_data(config)
    assert data["train"] is not None
    folder = config.run.folder
    folder.mkdir(parents=True)
    if removal.checkpoint:
        _copy_checkpoint(removal, config, data["train"])
        _copy_metrics(removal.folder, folder, removal.checkpoint)
    (folder / "config.yaml").write_text(config.to_yaml())
    blank(removal.lines)
    entry = _entry(removal, folder, renamed, before)
    register.parent.mkdir(parents=True, exist_ok=True)
    with open(register, "a", encoding="utf-8") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    for held in entry["still_held_by"]:
        console.print(f"still there: {held}", highlight=False, markup=False)
    console.print(
        f"megalite train {folder / 'config.yaml'} goes on without them",
        highlight=False,
        markup=False,
    )
    return folder


def _entry(
    removal: Removal, folder: Path, renamed: Mapping[str, str], before: Mapping[str, str]
) -> dict[str, Any]:
    """Return what the register says: which documents were taken out of which files, but nothing of
    their texts. `before` are the fingerprints of the old files, `folder` is that of the new run."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "run": str(removal.folder),
        "new_run": str(folder),
        "token_files": [
            {
                "was": prefix,
                "was_fingerprint": before[prefix],
                "is": new,
                "is_fingerprint": IndexedDataset(new).fingerprint(),
                "documents": list(removal.documents[prefix]),
                "from": _origins_of(prefix, removal.documents[prefix]),
            }
            for prefix, new in renamed.items()
        ],
        "first_step": removal.first_step,
        "from_step": removal.checkpoint,
        "steps_to_make_again": removal.steps,
        "lines_blanked": sorted(_places(removal.lines)),
        "still_held_by": sorted({*_still_held(removal, renamed)} - {*_places(removal.lines)}),
    }


def _places(lines: Lines) -> Iterator[str]:
    """Yield FILE:LINE of each line."""
    for path, origins in lines.items():
        yield from (f"{path}:{origin.line}" for origin in origins)


def _still_held(removal: Removal, renamed: Mapping[str, str]) -> Iterator[str]:
    """Yield what still has the texts, or was trained on them: old token files, the files these were
    made of, checkpoints."""
    for prefix in renamed:
        yield f"{prefix}.bin"
        yield from _origins_of(prefix, removal.documents[prefix])
    if removal.first_step is not None:
        for step in complete_steps(removal.folder / "checkpoints"):
            if step >= removal.first_step:
                yield str(step_folder(removal.folder / "checkpoints", step))


def _origins_of(prefix: str, documents: Sequence[int]) -> list[str]:
    """Return FILE:LINE of each document, as far as it was noted."""
    origins = open_origins(IndexedDataset(prefix))
    found = [origins.of(document) for document in documents] if origins else []
    return list(dict.fromkeys(f"{origin.path}:{origin.line}" for origin in found))


def _free_prefix(prefix: str) -> str:
    """Return a prefix beside another one that no token file has."""
    names = (f"{prefix}-forgot-{number}" for number in itertools.count(1))
    return next(name for name in names if not Path(f"{name}.idx").exists())


def write_without(prefix: str, new: str, documents: Sequence[int]) -> None:
    """Copy the token files `prefix` to `new`, with fillers in place of the tokens of `documents`.
    What is learned of other documents stays as it was; of these it stays only how much that was,
    which places of rows depend on. Raise DataError or OSError."""
    dataset = IndexedDataset(prefix)
    eod_id = read_note(prefix).get("eod_id")
    filler = eod_id if isinstance(eod_id, int) else 0
    spans = [slice(dataset.document_start(d), dataset.document_start(d + 1)) for d in documents]
    with _copied(f"{prefix}.bin", f"{new}.bin", dataset.dtype) as tokens:
        for span in spans:
            tokens[span] = filler
    if dataset.mask is not None:
        with _copied(f"{prefix}.mask", f"{new}.mask", dataset.mask.dtype) as mask:
            for span in spans:
                # Which tokens were learned from is kept; a class or a number that stood there is not.
                mask[span] = mask[span] > 0
    with replacing(Path(f"{new}.removed"), durable=True) as temporary:
        temporary.write_bytes(np.array(documents, "<i8").tobytes())
    if Path(f"{prefix}.json").is_file():
        shutil.copyfile(f"{prefix}.json", f"{new}.json")
    # Last: without it there is no token file.
    with replacing(Path(f"{new}.idx"), durable=True) as temporary:
        shutil.copyfile(f"{prefix}.idx", temporary)
    if origins := open_origins(dataset):
        with writing_origins(new, origins.key) as writer:
            writer.add_all(origins)


@contextmanager
def _copied(old: str, new: str, dtype: npt.DTypeLike) -> Iterator[npt.NDArray[Any]]:
    """Copy a file of numbers, and give the copy's to change. They are on the disk when the block
    ends."""
    shutil.copyfile(old, new)
    numbers = np.memmap(new, dtype, "r+")
    yield numbers
    numbers.flush()
    fsync(Path(new))


def _config_without(config: Config, renamed: Mapping[str, str], name: str) -> Config:
    """Return the config of the run without the documents. Sources keep their names, by which phases
    know them."""
    values = config.model_dump(mode="json")
    for split in SPLITS:
        names = names_of(getattr(config.data, split))
        for source, own in zip(values["data"][split], names, strict=True):
            source |= {"path": renamed.get(source["path"], source["path"]), "name": own}
    values["run"]["name"] = name
    # "never" would have the new run ignore the checkpoint that it is given.
    if values["checkpoint"]["resume"] == "never":
        values["checkpoint"]["resume"] = "auto"
    return parse_config(values)


def _copy_checkpoint(removal: Removal, config: Config, mixture: Mixture) -> None:
    """Give the new run the checkpoint that it goes on from, which names its data instead of the old
    one. Large files are linked, where the disk can."""
    was, new = (
        step_folder(folder / "checkpoints", removal.checkpoint)
        for folder in (removal.folder, config.run.folder)
    )
    files = read_manifest(was)
    if isinstance(files, Damage):
        raise CheckpointError(f"{was}: its {MANIFEST} {files.words}")
    temporary = new.with_name(f"{new.name}.tmp")
    for name in files:
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(was / name, temporary / name)
        except OSError:
            shutil.copyfile(was / name, temporary / name)
            # A link is of a file that is on the disk already; a copy must get there first.
            fsync(temporary / name)
    state = read_object(was / "train_state.json", CheckpointError)
    state["data"] |= {"fingerprint": mixture.fingerprint(), "sources": mixture.contents()}
    state["wandb_id"] = None  # another run, which must not write into the old one's curves
    texts = {"train_state.json": json.dumps(state, indent=1), "config.yaml": config.to_yaml()}
    for name, text in texts.items():
        # Written anew under its name, not into the file that the old checkpoint may share.
        with replacing(temporary / name, durable=True) as path:
            path.write_text(text)
        files[name] = digest(temporary / name)
    write_json(temporary / MANIFEST, {"files": files})
    temporary.rename(new)
    fsync(new.parent)


def _copy_metrics(was: Path, new: Path, last: int) -> None:
    """Give the new run the record of the steps up to `last`, which are its own as well."""
    metrics = was / "metrics.jsonl"
    if not metrics.is_file():  # a run is traced without one, too: by what its config says
        return
    with replacing(new / "metrics.jsonl") as temporary, open(temporary, "w") as file:
        for record in read_metrics(metrics):
            if record["step"] <= last:
                file.write(json.dumps(record) + "\n")


def read_names(path: Path) -> list[str]:
    """Return what a file of documents names, a line each; empty lines and those that begin with a
    `#` are passed over. Raise DataError."""
    lines = [line.strip() for line in read_text(path, DataError).splitlines()]
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise DataError(f"{path} names no document")
    return names
