"""Make the files of what a teacher says of a run's token files (`data/teacher_logits.py`), on the
run's own ranks and layout."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from megalite.checkpoint.match import digests_of
from megalite.comm.collectives import all_agree, all_reduce, gather_rows
from megalite.comm.mesh import Launch, make_mesh
from megalite.config import Config
from megalite.data.checks import check_same_everywhere, open_data
from megalite.data.loader import MicroBatch
from megalite.data.mixture import IGNORE, Mixture
from megalite.data.order import Int64s, Phase, PhasedOrder
from megalite.data.teacher_logits import (
    ABOUT,
    UNFINISHED,
    VERSION,
    Array,
    Precision,
    record_dtype,
    rows_of,
    source_facts,
    view_of,
    write_about,
)
from megalite.data.tokenizer import Tokenizer
from megalite.errors import ConfigError, DataError
from megalite.kernels import library
from megalite.kernels.divergence import ROWS
from megalite.kernels.linear import product
from megalite.kernels.loss import chunks
from megalite.kernels.top_divergence import TopTokens, top_tokens
from megalite.models import model_config
from megalite.parallel.outputs import HiddenStates
from megalite.parallel.stage import Inputs
from megalite.parallel.tensor import vocab_columns
from megalite.plan import plan as plan_of
from megalite.training.distill import DistillConfig, check_teacher
from megalite.training.frozen import FrozenModel, load_frozen
from megalite.training.parts import make_inputs
from megalite.training.run import Run, make_loader
from megalite.utils.locks import alone_in
from megalite.utils.outside import read_object
from megalite.utils.progress import ProgressMeter

SAVED_EVERY_S = 10.0
"""A kill costs no more work than of so many seconds."""


def make_teacher_logits(config: Config, count: int, precision: Precision) -> Path:
    """Write the `count` likeliest tokens of `objective.teacher` behind every label of data.train to
    `objective.teacher_logits`, and return that. It goes on where an earlier call was ended.

    All ranks of the launch call it. Raise ConfigError or DataError."""
    objective, launch = config.objective, Launch.from_environment()
    if not isinstance(objective, DistillConfig) or not objective.teacher_logits:
        raise ConfigError(
            "the config needs objective: {name: distill, teacher: MODEL, teacher_logits: FOLDER}"
        )
    if objective.teacher is None:
        raise ConfigError("objective.teacher is null; it must name the model that teaches")
    plan = plan_of(config, launch.world_size)
    config, tokenizer, data = open_data(config)
    assert data["train"] is not None
    teacher = model_config({"hf": objective.teacher})
    check_teacher(objective.teacher, teacher, config)
    vocab_size = min(teacher.vocab_size, config.model.vocab_size)
    if count > vocab_size:
        raise ConfigError(f"--count {count} is more than the {vocab_size} tokens of the vocabulary")
    launch.join()
    mesh = make_mesh(plan, launch.device)
    check_same_everywhere(config, data, mesh)
    about = _about(config, objective, data["train"], tokenizer, count, precision, vocab_size)
    is_writer = mesh.pipeline.rank == mesh.pipeline.size - 1 and mesh.stage.rank == 0
    with alone_in(objective.teacher_logits) if is_writer else nullcontext():
        before, is_done = _made_before(objective.teacher_logits, about)
        if all_agree(is_done, mesh):
            return objective.teacher_logits
        library.use(config.kernels, config.train.deterministic)
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        frozen = load_frozen(objective.teacher, config, mesh, dtype)
        making = _Making(Run(config, plan, mesh, None), frozen, about, is_writer)
        making.sources(data["train"], before)
        all_agree(True, mesh)  # nobody leaves before the files are whole
    return objective.teacher_logits


def _about(
    config: Config,
    objective: DistillConfig,
    train: Mixture,
    tokenizer: Tokenizer | None,
    count: int,
    precision: Precision,
    vocab_size: int,
) -> dict[str, Any]:
    """Return what the files belong to, without the numbers of records."""
    assert objective.teacher is not None
    return {
        "version": VERSION,
        "count": count,
        "vocab_size": vocab_size,
        "temperature": objective.temperature,
        "precision": precision,
        "tokenizer": tokenizer.fingerprint() if tokenizer else None,
        "teacher": digests_of(objective.teacher),
        "view": view_of(train),
        "sources": [source_facts(source) for source in train.sources],
    }


def _made_before(folder: Path, about: dict[str, Any]) -> tuple[list[int], bool]:
    """Return how many samples of each source an earlier call has done, and whether all is. Raise
    DataError where it was of something else."""
    for name in (ABOUT, UNFINISHED):
        if not (folder / name).is_file():
            continue
        there = read_object(folder / name, DataError)
        done = there.pop("done", [])
        sources = there.get("sources")
        for source in sources if isinstance(sources, list) else ():
            source.pop("num_records", None)
        if there != about:
            keys = [key for key in about if there.get(key) != about[key]]
            raise DataError(
                f"{folder} holds what was made of another {' and '.join(keys)}; remove it, or give another "
                "objective.teacher_logits"
            )
        return done, name == ABOUT
    return [0] * len(about["sources"]), False


class _Making:
    """Asks the teacher, sample after sample, and writes what it says."""

    def __init__(self, run: Run, frozen: FrozenModel, about: dict[str, Any], is_writer: bool):
        self._run, self._mesh, self._frozen, self._about = run, run.mesh, frozen, about
        self._is_writer = is_writer
        objective = run.config.objective
        assert isinstance(objective, DistillConfig)
        assert objective.teacher_logits is not None
        self._folder: Path = objective.teacher_logits
        self._dtype = record_dtype(about["count"], about["vocab_size"], about["precision"])
        self._saved = time.monotonic()

    def sources(self, train: Mixture, before: list[int]) -> None:
        """Make the files of all sources; of each, so many samples are done `before`."""
        done, numbers = list(before), []
        for number, (name, source) in enumerate(zip(train.names, train.sources, strict=True)):
            # Each sample once, in its own order, whatever order the run draws them in.
            count = source.num_samples
            order = PhasedOrder([count], [Phase(0, [1.0])], 0, "sequential")
            alone = Mixture([source], [name], order, train.view)
            rows = self._rows(number, alone, count)
            numbers.append(int(rows[-1]))
            self._source(number, alone, rows, done)
        if self._is_writer:
            for source, records in zip(self._about["sources"], numbers, strict=True):
                source["num_records"] = records
            write_about(self._folder / ABOUT, self._about)
            (self._folder / UNFINISHED).unlink(missing_ok=True)

    def _rows(self, number: int, alone: Mixture, count: int) -> Int64s:
        """Return the first record of each sample, on the rank that writes; nothing elsewhere."""
        if not self._is_writer:
            return np.zeros(1, np.int64)
        path = self._folder / f"{number}.rows"
        if path.is_file() and path.stat().st_size == 8 * (count + 1):
            return np.fromfile(path, "<i8")
        rows = rows_of(alone, count)
        with open(path, "wb") as file:
            file.write(rows.astype("<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        return rows

    def _source(self, number: int, alone: Mixture, rows: Int64s, done: list[int]) -> None:
        """Ask about the samples of a source that are not done, and write the records."""
        # The writer says where to go on: another node may still see older files.
        start = torch.tensor(done[number] if self._is_writer else 0, device=self._mesh.device)
        first, count = int(all_reduce(start, self._mesh.world)), alone.num_samples
        console = Console(stderr=True) if self._is_writer else None
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("samples"), TimeRemainingColumn())
        name = alone.names[0]
        with ExitStack() as stack:
            loader = stack.enter_context(make_loader(alone, self._run, first))
            meter = stack.enter_context(ProgressMeter(name, count, columns, console))
            file = stack.enter_context(self._open(number, rows, first)) if self._is_writer else None
            while first < count:
                keys, records = self._ask(next(loader), count)
                first = min(first + self._run.config.train.global_batch_size, count)
                if file is not None:
                    file.write(records[np.argsort(keys)].tobytes())
                    done[number] = first
                    if time.monotonic() - self._saved >= SAVED_EVERY_S or first == count:
                        self._save(file, done)
                meter.show(first, f"{name}: {first:,} of {count:,} samples", due=first == count)

    def _open(self, number: int, rows: Int64s, first: int) -> BinaryIO:
        """Open the file of a source's records behind those of its `first` samples."""
        path, size = self._folder / f"{number}.top", int(rows[first]) * self._dtype.itemsize
        file = open(path, "r+b" if path.is_file() else "w+b")  # noqa: SIM115
        if file.seek(0, os.SEEK_END) < size:
            file.close()
            raise DataError(f"{path} was cut off; remove {self._folder}, to begin anew")
        # What was written after the last save may not be whole.
        file.truncate(size)
        file.seek(size)
        return file

    def _save(self, file: BinaryIO, done: list[int]) -> None:
        """Note how far the files are known to be on the disk."""
        file.flush()
        os.fsync(file.fileno())
        write_about(self._folder / UNFINISHED, self._about | {"done": done})
        self._saved = time.monotonic()

    @torch.no_grad()
    def _ask(self, batch: list[MicroBatch], num_samples: int) -> tuple[Int64s, Array]:
        """Return the records of a global batch, and by what they are to be sorted: only on ranks of
        the last stage, of which all get all."""
        inputs = [make_inputs(micro, self._mesh, output="hidden_states") for micro in batch]
        found = [
            self._packed(asked, micro, num_samples)
            for asked, micro in zip(self._frozen.beside(inputs), batch, strict=True)
            if asked.frozen is not None
        ]
        if not found:
            return np.empty(0, np.int64), np.empty(0, self._dtype)
        rows = gather_rows(torch.cat(found), self._mesh.replicas)[0].cpu()
        count = self._about["count"]
        keys = rows[:, :2].contiguous().view(torch.int64)[:, 0].numpy()
        records = np.empty(len(rows), self._dtype)
        records["ids"] = rows[:, 2 : 2 + count].numpy()
        numbers = rows[:, 2 + count :].contiguous().view(torch.float32).numpy()
        records["log_p"], records["rest"] = numbers[:, :count], numbers[:, count]
        return keys, records

    def _packed(self, asked: Inputs, micro: MicroBatch, num_samples: int) -> Tensor:
        """Return int32 rows of this rank's tokens with a label: place (two numbers), K ids, and the
        bits of K + 1 log-probabilities."""
        assert asked.frozen is not None
        assert asked.labels_BT is not None
        length = micro.tokens.shape[1]
        place_BT = micro.samples.to(self._mesh.device)[:, None] * length + asked.places.index_BT
        # The last batch begins again: its samples beyond the last are known already.
        is_asked_N = (asked.labels_BT != IGNORE).flatten()
        top = self._top(asked.frozen(), is_asked_N)
        wanted_N = place_BT.flatten()[is_asked_N]
        rows = torch.cat(
            (
                wanted_N[:, None].contiguous().view(torch.int32),
                top.ids.int(),
                top.log_p.contiguous().view(torch.int32),
                top.rest[:, None].contiguous().view(torch.int32),
            ),
            1,
        )
        return rows[wanted_N < num_samples * length]

    def _top(self, hidden: HiddenStates, is_asked_N: Tensor) -> TopTokens:
        """Return the likeliest tokens behind some tokens, of logits that exist for a few at a
        time."""
        about, axis = self._about, self._mesh.tensor
        head = hidden.chunked
        if head is None:
            logits_NV = hidden.head(hidden.states_BTD).padded_BTV.flatten(0, 1)[is_asked_N]
            pieces = (logits_NV[rows] for rows in chunks(logits_NV, ROWS))
            held = logits_NV.shape[1]
        else:
            states_ND = hidden.states_BTD.flatten(0, 1)[is_asked_N]
            pieces = (product(states_ND[r], head.weight) for r in chunks(states_ND, head.rows))
            held = head.weight.shape[0]
        columns = vocab_columns(held, axis, about["vocab_size"])
        found = [
            top_tokens(piece, about["count"], about["temperature"], *columns, axis)
            for piece in pieces
        ]
        if not found:
            none = torch.zeros(0, about["count"], device=self._mesh.device)
            return TopTokens(none.long(), none, none.sum(1))
        return TopTokens(*(torch.cat(parts) for parts in zip(*found, strict=True)))
