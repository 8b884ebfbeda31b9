"""Show a person what token files hold: `megalite inspect`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from megalite.config import Config
from megalite.data.checks import check_mask, open_data
from megalite.data.dataset import Split
from megalite.data.indexed import IndexedDataset, read_note
from megalite.data.mixture import IGNORE, Mixture, Samples
from megalite.data.order import Int64s
from megalite.data.tokenizer import Tokenizer, load_tokenizer, other_tokenizer
from megalite.errors import DataError

LOOKED_AT = 1_000_000  # documents, and tokens, that statistics are made of; slices of a larger file
SLICES = 100
BAR = 40  # characters
COLOURS = ("default", "cyan")


def inspect_file(
    prefix: str, tokenizer: Path | None, count: int, start: int, console: Console
) -> None:
    """Print statistics of the pair `prefix`, and `count` documents from number `start` on to
    `console`. They are shown as text if `tokenizer` is given or still lies where it was when they
    were made. Raise DataError."""
    dataset = IndexedDataset(prefix)
    made_of = read_note(prefix)
    check_mask(dataset, made_of)
    dataset.check(len(made_of.get("labels", ())) or (1 if "format" in made_of else None))
    if count and start >= dataset.num_documents:
        raise DataError(
            f"{prefix} has {dataset.num_documents:,} documents, counted from 0; there is no number {start:,}"
        )
    lengths = _document_lengths(dataset)
    known = _tokenizer_of(prefix, made_of, tokenizer)
    console.print(Text(prefix, style="bold"))
    size = dataset.num_tokens * dataset.dtype.itemsize
    for name, text in {
        "documents": f"{dataset.num_documents:,}",
        "tokens": f"{dataset.num_tokens:,} of {dataset.dtype.name}, {decimal(size)}",
        "made of": ", ".join(made_of.get("inputs", [])),
        "bytes a token": f"{made_of['text_bytes'] / dataset.num_tokens:.2f}"
        if "text_bytes" in made_of
        else "",
        **_ids(dataset, made_of.get("vocab_size")),
        "taken out": "" if dataset.removed is None else f"{len(dataset.removed):,} documents",
        "format": made_of.get("format", ""),
        "classes": ", ".join(made_of.get("labels", [])),
        "learned": f"{(n := made_of['num_learned']):,} tokens, {n / dataset.num_tokens:.1%}"
        if "num_learned" in made_of
        else "",
    }.items():
        if text:
            console.print(f"  {name:14} {text}", highlight=False, markup=False)
    _print_lengths(lengths, dataset.num_documents, console)
    for number in range(start, min(start + count, dataset.num_documents)):
        first, last = (dataset.document_start(d) for d in (number, number + 1))
        console.print(
            f"\ndocument {number:,}, {last - first:,} tokens", style="bold", highlight=False
        )
        ids = dataset.read(first, last)
        is_learned = (
            np.ones(len(ids), bool) if dataset.mask is None else dataset.mask[first:last] > 0
        )
        console.print(_marked(ids, is_learned, known))
    if count and dataset.mask is not None:
        console.print("\nFrom what stands in ⟦ ⟧ nothing is learned.", style="dim")


def _tokenizer_of(prefix: str, made_of: dict[str, Any], given: Path | None) -> Tokenizer | None:
    """Return the tokenizer to decode with, or None. Raise DataError if the one given is not that of
    the files."""
    path = given or Path(made_of.get("tokenizer", ""))
    if not given and not ("tokenizer" in made_of and path.exists()):
        return None
    tokenizer = load_tokenizer(path)
    why = other_tokenizer(made_of, tokenizer)
    if why and given:
        raise DataError(f"{prefix} {why} {given}")
    return None if why else tokenizer


def _document_lengths(dataset: IndexedDataset) -> Int64s:
    """Return the number of tokens of each document, or of LOOKED_AT documents in slices spread over
    the file."""
    if dataset.num_documents <= LOOKED_AT:
        return np.diff(dataset.starts_of_documents(0, dataset.num_documents))
    size = LOOKED_AT // SLICES
    firsts = np.linspace(0, dataset.num_documents - size, SLICES, dtype=np.int64).tolist()
    return np.concatenate(
        [np.diff(dataset.starts_of_documents(first, first + size)) for first in firsts]
    )


def _ids(dataset: IndexedDataset, vocab_size: int | None) -> dict[str, str]:
    """Return the lines about token ids: their range and the most frequent ones, from slices spread
    over the file."""
    size = LOOKED_AT // SLICES if dataset.num_tokens > LOOKED_AT else dataset.num_tokens
    # Of a small file all slices are one, the whole: taken once.
    firsts = np.linspace(0, dataset.num_tokens - size, SLICES, dtype=np.int64).tolist()
    looked_at = np.concatenate(
        [dataset.read(first, first + size) for first in dict.fromkeys(firsts)]
    )
    ids, counts = np.unique(looked_at, return_counts=True)
    of_all = f" of {vocab_size:,}" if vocab_size else ""
    often = ", ".join(
        f"{ids[i]} ({counts[i] / counts.sum():.1%})" for i in np.argsort(-counts, kind="stable")[:5]
    )
    return {
        "ids": f"{ids[0]} to {ids[-1]}, {len(ids):,}{of_all} in {counts.sum():,} tokens",
        "most often": often,
    }


def _print_lengths(lengths: Int64s, num_documents: int, console: Console) -> None:
    """Print quantiles of the document lengths, and a histogram of tokens by document length."""
    quantiles = {"shortest": 0, "median": 50, "90%": 90, "99%": 99, "longest": 100}
    text = ", ".join(
        f"{name} {np.percentile(lengths, q, method='lower'):,}" for name, q in quantiles.items()
    )
    of_some = f", of {len(lengths):,} documents" if len(lengths) < num_documents else ""
    console.print(f"  {'lengths':14} {text}, mean {lengths.mean():,.1f}{of_some}", highlight=False)
    # The bars count tokens, not documents: that is what training sees.
    lengths = lengths[lengths > 0]
    exponents = np.frexp(lengths)[1] - 1  # 2^e <= length < 2^(e + 1)
    shares = np.bincount(exponents, lengths, exponents.max() + 1) / lengths.sum()
    for exponent in range(int(exponents.min()), int(exponents.max()) + 1):
        share = shares[exponent]
        bar = "█" * round(share / shares.max() * BAR)
        of = f"{2**exponent:,} to {2 ** (exponent + 1) - 1:,}"
        console.print(Text.assemble(f"  {of:>22}  ", (bar, "cyan"), f" {share:.1%} of the tokens"))


def inspect_samples(config: Config, split: Split, count: int, start: int, console: Console) -> None:
    """Print where the tokens of a run's `split` come from, and `count` samples from number `start`
    on, exactly as the model sees them. Raise DataError."""
    config, tokenizer, data = open_data(config)
    mixture = data[split]
    if mixture is None:
        raise DataError(f"the config has no data for {split}")
    _print_sources(config, mixture, split, console)
    seen = Mixture(
        mixture.sources, mixture.names, mixture.order, mixture.view._replace(document_mask=True)
    )
    indices = np.arange(start, start + count)
    try:
        source, sample = mixture.order.locate(indices)
    except ValueError as error:  # Megatron-LM's order is made for so many samples, and has no more
        raise DataError(f"data.{split}: {error}") from None
    for row, (samples, number) in enumerate(
        zip(_rows(seen.read(indices)), indices.tolist(), strict=True)
    ):
        name = mixture.names[source[row]]
        predicted = int((samples.labels != IGNORE).sum())
        console.print(
            f"\nsample {number:,}: {name}'s {int(sample[row]):,}, {predicted:,} of {samples.labels.size:,} tokens "
            "are predicted",
            style="bold",
            highlight=False,
        )
        if mixture.view.stacks:
            _print_stacks(samples, tokenizer, console)
            continue
        for part in _parts(samples, mixture.view.labels == "next" and not mixture.view.corruption):
            _print_part(part, tokenizer, console, is_corrupted=mixture.view.corruption is not None)
    if count:
        console.print(f"\n{_legend(config, mixture)}", style="dim")


def _legend(config: Config, mixture: Mixture) -> str:
    """Return what the marks in samples mean, and what was done to their words."""
    legend = _marks(config, mixture)
    return (
        f"{legend}\ndata.augment has changed words; other ones in each epoch."
        if mixture.view.augment
        else legend
    )


def _marks(config: Config, mixture: Mixture) -> str:
    """Return what the marks in samples mean."""
    if mixture.view.stacks:
        return "The encoder sees the source, and the decoder the target up to each token that it is to predict."
    if mixture.view.corruption:
        attends = "its own document" if config.data.document_mask else "the sample"
        return f"A token attends to all of {attends}. ⟦ ⟧ hold what is seen and → what is to be predicted there."
    if mixture.view.labels != "next":
        return "Classes are told at what stands outside of ⟦ ⟧."
    attends = (
        "only to its own document"
        if config.data.document_mask
        else "to everything before it in the sample"
    )
    return f"A token attends {attends}. What stands in ⟦ ⟧ is seen but not predicted."


def _print_sources(config: Config, mixture: Mixture, split: Split, console: Console) -> None:
    """Print a table of the sources with their samples, and for training their share of the run and
    epochs."""
    num_samples = config.train.samples_after(config.train.steps)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (
        "source",
        "samples",
        "tokens",
        *(["share of the run", "epochs"] if split == "train" else []),
    ):
        table.add_column(name, justify="left" if name == "source" else "right")
    consumed = mixture.consumed(num_samples) if split == "train" else {}
    epochs = mixture.epochs(num_samples) if split == "train" else {}
    for name, source in zip(mixture.names, mixture.sources, strict=True):
        row = [name, f"{source.num_samples:,}", f"{source.num_samples * mixture.seq_length:,}"]
        if split == "train":
            row += [f"{consumed[name] / num_samples:.2%}", f"{epochs[name]:.2f}"]
        table.add_row(*row)
    console.print(table)
    cut = f"{config.data.packing}, order {config.data.order}"
    console.print(
        f"{split}: samples of {mixture.seq_length:,} tokens, {cut}", style="dim", highlight=False
    )


def _rows(samples: Samples) -> list[Samples]:
    """Return the samples one by one."""
    columns = [[None] * len(samples.tokens) if x is None else x for x in samples]
    return [Samples(*row) for row in zip(*columns, strict=True)]


def _print_stacks(sample: Samples, tokenizer: Tokenizer | None, console: Console) -> None:
    """Print the source and the target of each document of one sample ([S] and [T])."""
    assert sample.source is not None
    of_target = np.zeros_like(sample.labels) if sample.documents is None else sample.documents
    of_source = (
        np.zeros_like(sample.source) if sample.source_documents is None else sample.source_documents
    )
    for document in np.union1d(of_source, of_target).tolist():
        source, target = sample.source[of_source == document], sample.labels[of_target == document]
        style, is_learned = COLOURS[document % len(COLOURS)], (target != IGNORE).any()
        console.print(
            f"── document {document}, source of {len(source):,} tokens"
            + ("" if is_learned else ", padding"),
            style="yellow",
            highlight=False,
        )
        if is_learned:
            console.print(Text(_text(source.tolist(), tokenizer), style))
            console.print(
                f"── its target of {len(target):,} tokens", style="yellow", highlight=False
            )
            console.print(Text(_text(target.tolist(), tokenizer), style))


class Part(NamedTuple):
    """Holds the tokens of one document in a sample, whether each is predicted, and the labels."""

    document: int
    first: int
    tokens: Int64s
    is_predicted: Int64s
    labels: Int64s


def _parts(sample: Samples, shifted: bool) -> list[Part]:
    """Split one sample ([L]) into its documents; padding comes as one more. `shifted`: a label
    belongs to the next token."""
    assert sample.documents is not None
    has_label = sample.labels != IGNORE
    is_predicted = np.append(False, has_label[:-1]) if shifted else has_label
    borders = [0, *(np.flatnonzero(np.diff(sample.documents)) + 1).tolist(), len(sample.tokens)]
    parts = []
    for first, last in itertools.pairwise(borders):
        columns = (x[first:last] for x in (sample.tokens, is_predicted, sample.labels))
        parts.append(Part(int(sample.documents[first]), first, *columns))
    return parts


def _print_part(
    part: Part, tokenizer: Tokenizer | None, console: Console, is_corrupted: bool
) -> None:
    """Print one document of a sample; `is_corrupted`: with the label of each token that has one."""
    last = part.first + len(part.tokens)
    console.print(
        f"── document {part.document}, tokens {part.first:,} to {last - 1:,} ",
        style="yellow",
        highlight=False,
    )
    style = COLOURS[part.document % len(COLOURS)]
    if is_corrupted:
        console.print(_with_labels(part, tokenizer, style))
    else:
        console.print(_marked(part.tokens, part.is_predicted, tokenizer, style))


def _with_labels(part: Part, tokenizer: Tokenizer | None, style: str) -> Text:
    """Return the text of a document, with ⟦seen → label⟧ at each token that is predicted."""
    text, places = Text(style=style), np.flatnonzero(part.is_predicted).tolist()
    for first, place in itertools.pairwise([-1, *places, len(part.tokens)]):
        text.append(_text(part.tokens[first + 1 : place].tolist(), tokenizer))
        if place < len(part.tokens):
            seen, label = (
                _text([int(ids[place])], tokenizer).strip() for ids in (part.tokens, part.labels)
            )
            text.append(f" ⟦{seen} → {label}⟧ ", "bold")
    return text


def _marked(
    tokens: np.ndarray, is_plain: np.ndarray, tokenizer: Tokenizer | None, style: str = ""
) -> Text:
    """Return the text of `tokens`, with ⟦ ⟧ around those that are not plain."""
    text = Text(style=style)
    if not len(tokens):
        return text
    borders = [0, *(np.flatnonzero(np.diff(is_plain)) + 1).tolist(), len(tokens)]
    for first, stop in itertools.pairwise(borders):
        words = _text(tokens[first:stop].tolist(), tokenizer)
        text.append(words if is_plain[first] else f"⟦{words}⟧", "" if is_plain[first] else "dim")
    return text


def _text(ids: Sequence[int], tokenizer: Tokenizer | None) -> str:
    """Return the text of `ids`; the ids themselves without a tokenizer, or with one that is none."""
    if tokenizer and all(0 <= number < 2**32 for number in ids):
        return tokenizer.decode(ids)
    return "".join(f"{number} " for number in ids)
