"""Checks before the first step: that the data fits the model, and that all ranks have the same."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from megalite.comm.mesh import Mesh
from megalite.config import Config
from megalite.data.dataset import RowSource, Split
from megalite.data.formats import FORMATS
from megalite.data.indexed import IndexedDataset, read_note
from megalite.data.mixture import Mixture, build_mixtures
from megalite.data.tokenizer import Tokenizer, load_tokenizer, other_tokenizer
from megalite.errors import ConfigError, DataError
from megalite.utils.changes import changes, spelled
from megalite.utils.keys import key_of
from megalite.utils.outside import shown


def open_data(config: Config) -> tuple[Config, Tokenizer | None, dict[Split, Mixture | None]]:
    """Return `config` with its length in steps, its tokenizer and its mixtures, fully checked, for
    training as well as for inspection. Raise DataError or ConfigError."""
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    check_labelled(config)  # first: data of another kind looks damaged to a mixture
    data = build_mixtures(config, tokenizer)
    check_vocabulary(config, tokenizer)
    for source in data["train"].sources if config.data.seq_length_warmup and data["train"] else ():
        if isinstance(source, RowSource):
            raise DataError(
                f"{source.dataset.prefix} holds rows of labelled data, which data.seq_length_warmup would cut; leave "
                "it out"
            )
    return with_steps(config, data["train"]), tokenizer, data


def with_steps(config: Config, train: Mixture | None) -> Config:
    """Return `config` with the steps of its `train.epochs`, if it has these. Raise ConfigError."""
    epochs = config.train.epochs
    if epochs is None:
        return config
    assert train is not None
    try:
        # Rounded first: 0.1 · 30 is a little more than 3, and must not become 4. One step at least.
        samples = max(1, math.ceil(round(epochs * train.num_samples, 6)))
        return config.of_samples(samples, f"train.epochs {epochs} of this data")
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_vocabulary(config: Config, tokenizer: Tokenizer | None) -> None:
    """Refuse token ids without an embedding in the model, and data of another tokenizer than
    `data.tokenizer`.

    What is known comes from `tokenizer` and from the notes that preprocessing leaves beside token
    files; Megatron's own files have none. Raise DataError."""
    model_size = config.model.vocab_size
    if tokenizer and tokenizer.vocab_size > model_size:
        raise DataError(
            f"data.tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} token ids, "
            f"but model.vocab_size = {model_size}; {_mend(tokenizer.vocab_size)}"
        )
    for source in (*config.data.train, *config.data.valid, *config.data.test):
        note = read_note(source.path)
        if note.get("vocab_size", 0) > model_size:
            raise DataError(
                f"{source.path} has {note['vocab_size']} token ids, but model.vocab_size = {model_size}; "
                f"{_mend(note['vocab_size'])}"
            )
        if tokenizer and (why := other_tokenizer(note, tokenizer)):
            mine: dict[str, Any] = {
                "vocab_size": tokenizer.vocab_size,
                "eod_id": tokenizer.eod_id,
                "fingerprint": tokenizer.fingerprint(),
            }
            its: dict[str, Any] = {
                "fingerprint": note["tokenizer_fingerprint"],
                **{name: note[name] for name in ("vocab_size", "eod_id") if name in note},
            }
            differs = ", ".join(
                str(each) for each in changes(its, {name: mine[name] for name in its})
            )
            raise DataError(
                f"{source.path} ({note.get('tokenizer', 'a tokenizer of unknown place')}) {why} data.tokenizer "
                f"{config.data.tokenizer}: {differs}"
            )


def _mend(num_ids: int) -> str:
    """Return the advice that ends an error about the vocabulary."""
    return f"a new model takes model.vocab_size={num_ids}, a trained one its own tokenizer"


def check_labelled(config: Config) -> None:
    """Refuse labelled data of another kind than the run learns from, as far as the notes beside
    token files say. Raise DataError."""
    has_classes, task = config.model.has_classes, config.model.task
    asked = f"model.task: {task}" if has_classes else f"objective.name: {config.objective.name}"
    kind = task if has_classes else config.objective.DATA
    for source in (*config.data.train, *config.data.valid, *config.data.test):
        note = read_note(source.path)
        found = note.get("format", "")
        wanted = found if found in GOES_WITH else "text"
        if wanted != kind:
            what = f"rows of format {found!r}, which go" if found else "plain text, which goes"
            raise DataError(
                f"{source.path} holds {what} with {GOES_WITH[wanted]}; this run has {asked}"
            )
        if note.get("labels") and tuple(note["labels"]) != config.model.labels:
            raise DataError(
                f"{source.path} has the classes {note['labels']}, but model.labels = {list(config.model.labels)}"
            )
        if has_classes and (problem := note.get("problem", "single_label")) != config.model.problem:
            raise DataError(
                f"{source.path} is for model.problem: {problem}, not {config.model.problem}"
            )
        check_mask(IndexedDataset(source.path), note)


def check_mask(dataset: IndexedDataset, note: Mapping[str, Any]) -> None:
    """Raise DataError for labelled data without the mask that says what is learned of it: all would
    be."""
    if (format := note.get("format")) and format not in FORMATS:
        raise DataError(
            f"{dataset.prefix}.json: format = {shown(format)} is none of {', '.join(FORMATS)}"
        )
    if format and dataset.mask is None:
        raise DataError(
            f"{dataset.prefix}.mask is missing, which says what is learned of rows of format {format!r}: copy it "
            "beside the .bin, or make the token file again"
        )


GOES_WITH = {
    "text": "objective.name: next_token, masked_lm or span_corruption",
    "preference": "objective.name: dpo",
    "seq2seq": "objective.name: seq2seq",
    "pairs": "objective.name: contrastive",
    "classification": "model.task: classification",
    "labels": "model.task: labels",
    "answers": "model.task: answers",
}
"""Kind of data and the setting that it needs."""


def check_token_files(config: Config) -> None:
    """Check every index and mask of a config completely, as `build_mixtures` does. Raise
    DataError."""
    for path in dict.fromkeys(
        source.path for source in (*config.data.train, *config.data.valid, *config.data.test)
    ):
        IndexedDataset(path).check(config.model.highest_label)


def check_same_everywhere(config: Config, data: Mapping[Split, Mixture | None], mesh: Mesh) -> None:
    """Compare `config` and `data` (mixtures by split) of each rank of `mesh` with rank 0's. All
    ranks call it; raise DataError on all if any differs."""
    if mesh.world.size == 1:
        return
    mixtures = {
        split: mixture.fingerprint() if mixture else None for split, mixture in data.items()
    }
    contents = {
        f"tokens of data.{split}": mixture.contents() for split, mixture in data.items() if mixture
    }
    # Shifted by one, because a 64-bit key does not fit a signed int64.
    # Not gathered: of thousands of ranks, that would be thousands of configs on each. They compare
    # one number; only where it differs do two of them say what it is made of.
    mine = torch.tensor(key_of(config.to_yaml(), json.dumps(mixtures)) >> 1, device=mesh.device)
    wanted = mine.clone()
    dist.broadcast(wanted, 0)
    # MAX finds one rank that differs, the highest: all ranks then ask that one, and raise alike.
    differs = torch.tensor([mesh.world.rank if mine != wanted else -1], device=mesh.device)
    dist.all_reduce(differs, dist.ReduceOp.MAX)
    if differs >= 0:
        facts = config.model_dump(mode="json") | contents
        theirs = json.loads(_said_by(0, json.dumps(facts), mesh))
        what = "; ".join(
            f"{each.key} {spelled(each.was)} there, {spelled(each.now)} here"
            for each in changes(theirs, facts)
        )
        what = _said_by(int(differs), what or "the order of samples", mesh)
        raise DataError(
            f"rank {int(differs)} has another config or other token files than rank 0: {what}; "
            "are all nodes on one file system?"
        )


def _said_by(rank: int, text: str, mesh: Mesh) -> str:
    """Broadcast `text` from one rank and return it on all."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=mesh.device)
    size = torch.tensor(len(data), device=mesh.device)
    dist.broadcast(size, rank)
    data = (
        data
        if mesh.world.rank == rank
        else torch.zeros(int(size), dtype=torch.uint8, device=mesh.device)
    )
    dist.broadcast(data, rank)
    return bytes(data.tolist()).decode()
