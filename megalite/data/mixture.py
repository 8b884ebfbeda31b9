"""Weighted mixtures of token files: what the model sees of sample i of a run, and which file it
comes from.

Legend: n = samples asked for, L = seq_length, D = number of sources."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megalite.config import Config, names_of
from megalite.config import Source as SourceConfig
from megalite.data.augment import Augmentation, Room
from megalite.data.dataset import (
    SPLITS,
    MegatronSource,
    PackedSource,
    RowSource,
    SampleSource,
    SourceTargetRows,
    Split,
    TokenSource,
    Windows,
    empty_windows,
    read_windows,
    split_range,
)
from megalite.data.fim import FillInTheMiddle
from megalite.data.indexed import IndexedDataset
from megalite.data.megatron_order import MegatronBlend, sizes_of
from megalite.data.order import Int64s, Phase, PhasedOrder, SampleOrder
from megalite.data.sentences import IN_ORDER, SentencePairs
from megalite.data.stacks import Views
from megalite.data.tokenizer import Tokenizer
from megalite.errors import DataError

IGNORE = -100
"""The label of a token after which nothing is predicted, as everywhere in torch."""

LABELS: dict[str, Literal["next", "token", "document"]] = {
    "causal": "next", "masked": "next", "seq2seq": "next", "labels": "token", "answers": "token",
    "classification": "document",
}  # fmt: skip
"""Kind of labels for each `model.task`, where the objective makes no others."""

# Part of every fingerprint: changes whenever a change in megalite/data gives other samples for the
# same config.
_SCHEME = "megalite-samples-2"


NO_TOKEN = 1 << 40
"""Stands for the tokens of documents that were taken out, where their labels are looked for."""
LOOKED_AT = 1 << 20
"""Tokens read at a time in the search for one with a label."""


class Corruption(Protocol):
    """Makes inputs and labels of n samples, as the objective has them: what is hidden, and is to be
    predicted."""

    def apply(
        self, tokens: Int64s, learned: npt.NDArray[np.bool_], index: Int64s
    ) -> tuple[Int64s, Int64s]:
        """Return inputs and labels, both [n, L], of `tokens` [n, L]. Only where `learned` [n, L]
        may a label be. `index` [n] are the numbers of the samples, which alone decide what is done
        to them."""

    def identity(self) -> list[Any]:
        """Return what decides what it does, for a fingerprint."""


class View(NamedTuple):
    """Holds how the model sees the tokens of a sample."""

    document_mask: bool = False
    border_loss: bool = True
    fim: FillInTheMiddle | None = None
    labels: Literal["next", "token", "document"] = "next"
    """`next`: each token's label is the token that follows. `token`: its own class. `document`: the
    class of the document, at one of its tokens."""
    class_at: Literal["first", "last"] = "last"
    """At which token."""
    corruption: Corruption | None = None
    """Makes inputs and labels instead."""
    separator: int | None = None
    """Token behind the first text of a document, after which its tokens are of type 1. None: types
    are not told."""
    stacks: Views | None = None
    """Makes what an encoder and a decoder see instead."""
    augment: Augmentation | None = None
    """Changes the words of rows before all else."""


PLAIN = View()


class Samples(NamedTuple):
    """Holds what the model sees of n samples."""

    tokens: Int64s  # [n, L]
    labels: Int64s  # [n, L], the token that follows each; IGNORE where none is to be predicted
    documents: Int64s | None  # [n, L], document of each token in its sample; None: not kept apart
    source: Int64s | None = (
        None  # [n, S], what an encoder reads beside them; None: there is no encoder
    )
    source_documents: Int64s | None = None  # [n, S]
    # [n, L], at the first token of a pair 1 where its texts are not in order, or else 0.
    sentences: Int64s | None = None


class Mixture:
    """Combines several sources into the samples of a run. Sample i is a function of (sources,
    order, view, i) alone. Raises DataError if the sources have different sample lengths."""

    def __init__(
        self,
        sources: Sequence[SampleSource],
        names: Sequence[str],
        order: SampleOrder,
        view: View = PLAIN,
    ) -> None:
        self.sources, self.names, self.order, self.view = tuple(sources), tuple(names), order, view
        self.seq_length = sources[0].seq_length
        self._fingerprint = ""
        self._masked = any(
            source.dataset.mask is not None or isinstance(source, SentencePairs)
            for source in sources
        )
        self._has_removed = any(source.dataset.removed is not None for source in sources)
        if any(source.seq_length != self.seq_length for source in sources):
            raise DataError(
                f"sources of one mixture are cut by lengths of {[s.seq_length for s in sources]}"
            )

    @property
    def num_samples(self) -> int:
        """Return how many samples all sources together have: an epoch."""
        return sum(source.num_samples for source in self.sources)

    def read(self, indices: npt.ArrayLike) -> Samples:
        """Return what the model sees of the global sample `indices`, [n]. Raise ValueError for an
        index outside the run."""
        index = np.asarray(indices, np.int64)
        return self._view(self.augmented(index)[0], index)

    def augmented(self, index: Int64s) -> tuple[Windows, Int64s | None]:
        """Read the windows of the samples `index` [n], with their words changed as the view says.
        Return also the column that each token was in before, [n, L + 1]; None: nothing is changed."""
        windows = self.windows(index)
        if self.view.augment is None:
            return windows, None
        source, sample = self.order.locate(index)
        epochs = self.order.epochs(index)
        assert epochs is not None  # of labelled data each is gone through by itself
        rows = []
        for number, one in zip(source.tolist(), sample, strict=True):
            of_rows = self.sources[number]
            assert isinstance(of_rows, RowSource)
            rows.append(of_rows.rows_of(one[None])[1])
        return self.view.augment.apply(windows, rows, epochs)

    def types(self, samples: Samples) -> Int64s | None:
        """Return the type of each token, [n, L]: 1 in the second text of a document, else 0. None:
        not told."""
        if self.view.separator is None or samples.documents is None:
            return None
        return _types(samples.tokens, samples.documents, self.view.separator)

    def _view(self, windows: Windows, index: Int64s) -> Samples:
        """Turn raw windows into the tokens and labels that the model sees. Nothing is predicted of
        documents that were taken out."""
        found = self._seen(windows, index)
        if windows.removed is not None and windows.removed.any():
            found.labels[self._is_label_removed(windows, index)] = IGNORE
        return found

    def _is_label_removed(self, windows: Windows, index: Int64s) -> npt.NDArray[np.bool_]:
        """Return where the label is of a document that was taken out, shaped like the labels."""
        removed, view = windows.removed, self.view
        assert removed is not None
        if view.stacks:
            # Which labels come from where, by other tokens in place of these.
            marked = windows._replace(tokens=np.where(removed, NO_TOKEN, 0))
            return view.stacks.apply(marked, index).labels == NO_TOKEN
        # Fill-in-the-middle rearranges within documents, each of which is taken out as a whole.
        is_next = view.labels == "next" and not view.corruption
        return removed[:, 1:] if is_next else removed[:, :-1]

    def _seen(self, windows: Windows, index: Int64s) -> Samples:
        """Return what `_view` does, but with labels of what was taken out."""
        tokens, filled, documents, mask, _ = windows
        view = self.view
        # [n, L]: windows have one token more than the model sees, the label of the last.
        kept = documents[:, :-1].copy() if documents is not None and view.document_mask else None
        if view.stacks:
            found = view.stacks.apply(windows, index)
            return Samples(
                found.tokens, found.labels, found.documents, found.source, found.source_documents
            )
        if view.corruption:
            learned = np.ones_like(tokens[:, :-1], bool) if mask is None else mask[:, :-1] > 0
            # Padding is no token to predict.
            learned &= np.arange(self.seq_length) < filled[:, None]
            sentences = None
            if mask is not None and isinstance(self.sources[0], SentencePairs):
                is_told = mask[:, :-1] >= IN_ORDER
                sentences = np.where(is_told, mask[:, :-1] - IN_ORDER, IGNORE)
            inputs, labels = view.corruption.apply(tokens[:, :-1].copy(), learned, index)
            return Samples(inputs, labels, kept, sentences=sentences)
        if view.labels != "next":
            return Samples(tokens[:, :-1].copy(), _classes(view, documents, filled, mask), kept)
        # Before the labels are taken, which are the tokens moved by one.
        if view.fim:
            assert documents is not None
            view.fim.turn(tokens, documents, filled, index)
        labels = tokens[:, 1:].copy()
        if mask is not None:
            # The mask is of the token that is predicted, hence shifted as the labels are.
            labels[mask[:, 1:] == 0] = IGNORE
        # Label i is token i + 1, which is padding from `filled` on.
        if (filled <= self.seq_length).any():
            labels[np.arange(1, self.seq_length + 1) >= filled[:, None]] = IGNORE
        # A document's last token then does not predict the first of the next, unrelated one.
        if not view.border_loss:
            assert documents is not None
            labels[documents[:, 1:] != documents[:, :-1]] = IGNORE
        return Samples(tokens[:, :-1].copy(), labels, kept)

    def windows(self, index: Int64s) -> Windows:
        """Read the windows of the samples `index`, source by source."""
        windows = empty_windows(
            len(index), self.seq_length, self.view != PLAIN, self._masked, self._has_removed
        )
        source, sample = self.order.locate(index)
        for number in np.unique(source):
            rows = np.flatnonzero(source == number)
            one = self.sources[number]
            if isinstance(one, SentencePairs):
                epochs = self.order.epochs(index)
                assert epochs is not None  # Megatron-LM's order is of whole tokens
                one.read(sample[rows], epochs[rows], windows, rows)
            else:
                read_windows(one, sample[rows], windows, rows)
        return windows

    def is_learned(self, number: int) -> bool:
        """Return whether source `number` has a label in any of its samples; for pairs, in both
        answers of one pair. It reads samples until one has."""
        source = self.sources[number]
        if isinstance(source, TokenSource) and self.view._replace(document_mask=False) == PLAIN:
            return True  # every token but the first
        if isinstance(source, SentencePairs):
            return True  # every pair has an order
        if source.dataset.removed is not None:
            return True  # it had labels before, and may be left without any
        for samples in self._pieces_of(source.num_samples):
            windows = empty_windows(len(samples), self.seq_length, self.view != PLAIN, self._masked)
            read_windows(source, samples, windows, np.arange(len(samples)))
            # As if sample i of the source were sample i of the run, which is as good for this.
            if _has_label(self._view(windows, samples), source):
                return True
        return False

    def is_judged(self, count: int) -> bool:
        """Return whether any of the first `count` samples has a label."""
        return any(
            (self.read(samples).labels != IGNORE).any() for samples in self._pieces_of(count)
        )

    def _pieces_of(self, count: int) -> Iterator[Int64s]:
        """Yield 0 … count - 1 in pieces. The first is a single sample, which usually suffices;
        later ones have at most LOOKED_AT tokens."""
        first, size = 0, 1
        while first < count:
            yield np.arange(first, min(first + size, count))
            first, size = first + size, min(2 * size, max(1, LOOKED_AT // self.seq_length))

    def consumed(self, count: int) -> dict[str, int]:
        """Return how many of the first `count` samples come from each source."""
        return dict(zip(self.names, self.order.consumed(count).tolist(), strict=True))

    def epochs(self, count: int) -> dict[str, float]:
        """Return how many times the first `count` samples go through each source."""
        sizes = (source.num_samples for source in self.sources)
        return {
            name: found / size
            for (name, found), size in zip(self.consumed(count).items(), sizes, strict=True)
        }

    def num_batches(self, global_batch_size: int, most: int) -> int:
        """Return how many batches an evaluation reads, at most `most`. A split smaller than one
        batch of `global_batch_size` is read more than once."""
        return max(1, min(most, self.num_samples // global_batch_size))

    def fingerprint(self) -> str:
        """Return a hexadecimal digest of everything that decides which tokens sample i has. The
        files are read for it once."""
        if not self._fingerprint:
            parts = [source.fingerprint() for source in self.sources]
            fim = list(self.view.fim) if self.view.fim else None
            view = self.view
            parts_of_view = (view.corruption, view.stacks, view.augment)
            made = [part.identity() for part in parts_of_view if part]
            identity = json.dumps([_SCHEME, parts, self.order.identity(), fim, *made])
            self._fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
        return self._fingerprint

    def contents(self) -> dict[str, str]:
        """Return a digest of the tokens of each source, by name. They are part of the fingerprint,
        kept to say what has changed."""
        return {
            name: source.dataset.fingerprint()
            for name, source in zip(self.names, self.sources, strict=True)
        }

    def check_state(self, state: Mapping[str, Any], changed: Sequence[str] = ()) -> None:
        """Raise DataError if the loader's `state` in a checkpoint belongs to other data. `changed`
        names the settings that decide the samples and differ."""
        if state["fingerprint"] == self.fingerprint():
            return
        contents: dict[str, str] = self.contents()
        stored: dict[str, str] = state.get("sources") or {}
        sources = {
            name: source.dataset.prefix
            for name, source in zip(self.names, self.sources, strict=True)
        }
        others = [
            f"the tokens of {sources[name]}, whose content was {stored[name]} and is {contents[name]}"
            for name in contents
            if stored.get(name, contents[name]) != contents[name]
        ]
        unnamed = (
            "the order of samples, which another version made"
            if stored
            else "the token files of data.train"
        )
        raise DataError(
            f"the checkpoint was written after {state['samples']} samples of other data. What has changed: "
            f"{'; '.join([*changed, *others]) or unnamed}. Put it back to go on with that run, or start a new one "
            "under another run.name"
        )

    def remarks(self) -> list[str]:
        """Return what the user should know about the data."""
        return [
            source.remark
            for source in self.sources
            if isinstance(source, RowSource) and source.remark
        ]


def _has_label(samples: Samples, source: SampleSource) -> bool:
    """Return whether any sample has a label; for pairs, whether both answers of a pair have one."""
    is_label = samples.labels != IGNORE
    if not (isinstance(source, RowSource) and source.together == 2):
        return bool(is_label.any())
    assert samples.documents is not None
    for labels, documents in zip(is_label, samples.documents, strict=True):
        # Documents 2k and 2k + 1 of a sample are the two answers of pair k.
        counts = np.bincount(documents[labels], minlength=source.most_documents)
        if (counts[: len(counts) // 2 * 2].reshape(-1, 2) > 0).all(1).any():
            return True
    return False


def _classes(view: View, documents: Int64s | None, filled: Int64s, mask: Int64s | None) -> Int64s:
    """Return the class of each token, or of each document at one of its tokens: [n, L]."""
    assert documents is not None
    assert mask is not None
    has_class = mask[:, :-1] > 0
    has_class &= np.arange(mask.shape[1] - 1) < filled[:, None]
    if view.labels == "document":
        borders = documents[:, 1:] != documents[:, :-1]
        if view.class_at == "first":
            # borders[t]: a document ends at t. Moved by one, and with a border at 0: one begins at
            # t.
            borders = np.concatenate([np.ones_like(borders[:, :1]), borders[:, :-1]], 1)
        has_class &= borders
    # In the file 0 is "nothing" and c + 1 is class c.
    return np.where(has_class, mask[:, :-1] - 1, IGNORE)


def _types(tokens: Int64s, documents: Int64s, separator: int) -> Int64s:
    """Return 1 for tokens behind the first `separator` of their document, else 0: [n, L]."""
    is_separator = tokens == separator
    before = is_separator.cumsum(1) - is_separator
    begins = np.concatenate(
        [np.ones_like(is_separator[:, :1]), documents[:, 1:] != documents[:, :-1]], 1
    )
    at_begin = np.maximum.accumulate(np.where(begins, before, 0), 1)
    return (before > at_begin).astype(np.int64)


def build_mixtures(
    config: Config, tokenizer: Tokenizer | None = None
) -> dict[Split, Mixture | None]:
    """Return the mixtures "train", "valid" and "test" of `config`; None for a split without data.

    `tokenizer`, the config's, is needed only for `data.fim` and for types of tokens. Validation and
    test are read in sequential order, and so always begin with the same samples. Raise DataError,
    naming the setting, if a source cannot be read or has too few tokens."""
    opened: dict[str, IndexedDataset] = {}
    return {which: _build_mixture(config, which, opened, tokenizer) for which in SPLITS}


def _build_mixture(
    config: Config, which: Split, opened: dict[str, IndexedDataset], tokenizer: Tokenizer | None
) -> Mixture | None:
    """Return the mixture of one split, None without data. `opened` shares datasets among the
    splits."""
    data, shares = config.data, config.data.split
    wanted: tuple[SourceConfig, ...] = getattr(data, which) if shares is None else data.train
    if not wanted or (shares is not None and shares[SPLITS.index(which)] == 0):
        return None
    num_samples = config.train.samples_after(config.train.steps)
    is_megatron = data.order == "megatron" and which == "train"
    weights = [item.weight for item in wanted]
    # Only Megatron's order has an end, and must know it; the others go on for ever.
    sizes: list[int | None] = [None] * len(wanted)
    # Megatron asks each source for slightly more than it needs, unless there is only one.
    if is_megatron:
        sizes = sizes_of(weights, num_samples).tolist() if len(wanted) > 1 else [num_samples]
    sources: list[SampleSource] = []
    for number, item in enumerate(wanted):
        if item.path not in opened:
            opened[item.path] = IndexedDataset(item.path)
            opened[item.path].check(config.model.highest_label)
        try:
            sources.append(_cut(opened[item.path], config, which, sizes[number], tokenizer))
        except DataError as error:
            setting = (
                f"data.{which}[{number}]"
                if shares is None
                else f"data.split {list(shares)}: {which} part of"
            )
            raise DataError(f"{setting} {item.path}: {error}") from None
    names = names_of(wanted)
    if is_megatron:
        order: SampleOrder = MegatronBlend(weights, num_samples)
    else:
        order = PhasedOrder(
            [source.num_samples for source in sources],
            _phases(config, which, weights, sources, names),
            config.train.seed,
            "shuffle" if which == "train" and data.order == "shuffle" else "sequential",
        )
    view = _view_of(config, which, tokenizer)
    if view.fim and any(source.dataset.mask is not None for source in sources):
        raise DataError(
            "data.fim turns texts around, which labelled data cannot be; leave one of them out"
        )
    mixture = Mixture(sources, names, order, view)
    _check_learned(mixture, config, which)
    return mixture


def _view_of(config: Config, which: Split, tokenizer: Tokenizer | None) -> View:
    """Return how the model sees the samples of a split."""
    data = config.data
    fim = (
        FillInTheMiddle.of(data.fim, tokenizer, config.train.seed)
        if data.fim and which == "train"
        else None
    )
    model, corruption = config.model, config.objective.corruption(config, tokenizer, which)
    has_pairs = model.has_classes or config.objective.pairs_of(config, tokenizer, which) is not None
    separator = tokenizer.eod_id if tokenizer and has_pairs and model.has_token_types else None
    stacks = config.objective.stacks(config, tokenizer, which) if model.task == "seq2seq" else None
    augment = None
    if data.augment and which == "train":
        assert tokenizer is not None
        room = Room(_capacity(config))
        if model.task == "seq2seq":
            room = Room(config.lengths.read, config.lengths.source)
        augment = Augmentation(data.augment, tokenizer, room, config.train.seed)
    return View(
        data.document_mask,
        data.border_loss,
        fim,
        LABELS[model.task],
        model.CLASS_AT,
        corruption,
        separator,
        stacks,
        augment,
    )


def _check_learned(mixture: Mixture, config: Config, which: Split) -> None:
    """Raise DataError for a source without any label, and for an evaluation that would meet
    none."""
    for number, (name, source) in enumerate(zip(mixture.names, mixture.sources, strict=True)):
        if not mixture.is_learned(number):
            raise DataError(
                f"data.{which}: {name}: no token of it has a label, so that there is nothing to learn or to judge: "
                f"{_why_unlearned(config, source)}; `megalite inspect {source.dataset.prefix}` shows what is learned"
            )
    count = mixture.num_batches(config.train.global_batch_size, config.observe.eval_batches)
    count *= config.train.global_batch_size
    if which != "train" and not mixture.is_judged(count):
        raise DataError(
            f"data.{which}: none of the first {count:,} samples, which an evaluation reads, has a label; raise "
            f"observe.eval_batches, which is {config.observe.eval_batches}, or give other data"
        )


def _why_unlearned(config: Config, source: SampleSource) -> str:
    """Return why a source has no label, for an error."""
    if source.dataset.mask is None:
        return "its documents have one token each, and data.border_loss is false"
    if isinstance(source, RowSource) and source.remark and config.data.long_rows != "refuse":
        return (
            f"data.long_rows: {config.data.long_rows} or {source.dataset.prefix}.mask leaves none"
        )
    return f"{source.dataset.prefix}.mask leaves none"


def _cut(
    dataset: IndexedDataset,
    config: Config,
    which: Split,
    megatron_samples: int | None,
    tokenizer: Tokenizer | None,
) -> SampleSource:
    """Return one split of a dataset as samples; in Megatron-LM's order if `megatron_samples` gives
    their number."""
    length = config.lengths.read
    if (pairs := config.objective.pairs_of(config, tokenizer, which)) is not None:
        if dataset.mask is not None:
            raise DataError("objective.sentences takes texts, not labelled rows")
        first, last = _part_of(dataset.num_documents, config, which)
        return pairs(dataset, first, last)
    if dataset.mask is not None:
        return _cut_rows(dataset, config, which)
    if config.model.has_classes or config.objective.DATA == "seq2seq":
        needs = (
            f"model.task: {config.model.task}"
            if config.model.has_classes
            else "objective.name: seq2seq"
        )
        raise DataError(f"{needs} needs labelled data, but there is no {dataset.prefix}.mask")
    if megatron_samples is not None:  # Megatron splits by sequences, not documents
        first, last = _part_of(dataset.num_sequences, config, which)
        return MegatronSource(dataset, first, last, length, megatron_samples, config.train.seed)
    first, last = _part_of(dataset.num_documents, config, which)
    if config.data.packing == "best_fit":
        return PackedSource(dataset, first, last, length, _capacity(config))
    return TokenSource(dataset, dataset.document_start(first), dataset.document_start(last), length)


def _cut_rows(dataset: IndexedDataset, config: Config, which: Split) -> RowSource:
    """Return one split of labelled data, whose rows stay whole whatever `data.packing` says."""
    data = config.data
    if data.order == "megatron":
        raise DataError(
            "data.order: megatron cuts documents anywhere; labelled data needs shuffle or sequential"
        )
    if config.objective.DATA == "seq2seq":
        first, last = _part_of(dataset.num_documents, config, which)
        return SourceTargetRows(dataset, first, last, config.lengths, data.long_rows)
    if config.model.task == "seq2seq":
        raise DataError(
            f"objective.name: {config.objective.name} takes texts, not rows, which objective seq2seq is for"
        )
    together = 1 if config.objective.DATA == "text" else 2
    first, last = _part_of(dataset.num_documents // together, config, which)
    first, last = first * together, last * together
    return RowSource(
        dataset, first, last, data.seq_length, _capacity(config), together, data.long_rows
    )


def _part_of(size: int, config: Config, which: Split) -> tuple[int, int]:
    """Return which of `size` documents, sequences or pairs are of a split: [first, last)."""
    shares = config.data.split
    return split_range(size, shares, which) if shares else (0, size)


def _capacity(config: Config) -> int:
    """Return how many tokens fit into a sample. A causal model needs one more than it sees, the
    label of the last; all else is predicted at tokens themselves."""
    return config.data.seq_length + (config.model.task == "causal")


def _phases(
    config: Config,
    which: Split,
    weights: Sequence[float],
    sources: Sequence[SampleSource],
    names: Sequence[str],
) -> list[Phase]:
    """Return the sources' shares of the samples in each phase. Validation uses the sources' own
    weights."""
    data, train = config.data, config.train
    phases = [(0, weights)]
    for phase in data.phases if which == "train" else ():
        phases.append(
            (train.samples_after(phase.after_step), [phase.weights.get(n, 0.0) for n in names])
        )
    sizes = [source.num_samples if data.weights == "epochs" else 1 for source in sources]
    return [
        # A temperature above 1 brings the shares of large and small sources closer together.
        Phase(
            begin,
            [(w * size) ** (1 / data.temperature) for w, size in zip(of_phase, sizes, strict=True)],
        )
        for begin, of_phase in phases
    ]
