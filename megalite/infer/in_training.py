"""Evaluation of tasks, answers to prompts and targets of sources during training: on the training
ranks, by the model that is being trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.comm.collectives import all_gather, all_reduce, gather_rows
from megalite.comm.mesh import ALONE, Axis, Mesh
from megalite.config import Config
from megalite.data.mixture import Mixture
from megalite.data.tokenizer import Tokenizer
from megalite.errors import ConfigError
from megalite.infer.answer import Answer
from megalite.infer.batch import Batch
from megalite.infer.cache import CachedSequenceInfo
from megalite.infer.evaluate import load_harness
from megalite.infer.generate import Generator
from megalite.infer.sampling import Sampling
from megalite.models.context_cut import ContextCut
from megalite.models.layers import IGNORE, SequenceInfo, Source
from megalite.parallel.context import part_of_source
from megalite.parallel.stage import Inputs, Stage
from megalite.runtime.activity import NOW
from megalite.utils.outside import shown

if TYPE_CHECKING:
    from megalite.parallel.pipeline import Pipeline

WIDTHS = 32
"""Rows are padded to a multiple of this: fewer shapes."""


class TasksInTraining:
    """Evaluates the tasks of `observe.tasks` between training steps."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        """Load the tasks of `config` and rehearse them without the model, so that errors appear
        before the first step. Raise ConfigError or DataError."""
        asked, self._config, self._tokenizer = config.observe.tasks, config, tokenizer
        self._harness = load_harness()
        self._tasks = self._harness.load_tasks(asked.names, asked.include_path, asked.limit)
        self._tasks.rehearse(_generator(_no_model(config), tokenizer))
        self._fewest = self._tasks.fewest

    def measure(
        self, stages: Sequence[Stage], pipeline: Pipeline | None, mesh: Mesh
    ) -> dict[str, float]:
        """Evaluate the model of `stages` (and `pipeline`) and return the metrics, as `numbers_of`
        names them, on the first data rank; empty elsewhere. All ranks of `mesh` call it."""
        generator = _generator(TrainingModel(stages, pipeline, mesh, self._config), self._tokenizer)
        sharing = _ranks_that_share(self._config, mesh)
        # The harness wants a document for every rank.
        sharing = sharing if self._fewest >= sharing.size else ALONE
        model = self._harness.HarnessModel(generator, sharing)
        # Bootstrap errors take minutes, and curves over steps show the noise anyway.
        results = self._tasks.run(model, uncertainty=0)
        return self._harness.numbers_of(results) if results else {}


class SamplesInTraining:
    """Answers the prompts of `observe.samples` between training steps, by the likeliest tokens:
    what changes is the model."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        """Read the prompts of `config`. Raise ConfigError for one that leaves no room for an
        answer."""
        self.prompts, self._config, self._tokenizer = (
            config.observe.samples.prompts,
            config,
            tokenizer,
        )
        for number, prompt in enumerate(self.prompts):
            try:
                self._ask(_no_model(config), [prompt])
            except ConfigError as error:
                raise ConfigError(
                    f"observe.samples.prompts[{number}] = {shown(prompt)}: {error}"
                ) from None

    def answer(self, stages: Sequence[Stage], pipeline: Pipeline | None, mesh: Mesh) -> list[str]:
        """Return the answer of the model of `stages` (and `pipeline`) to each prompt, the same on
        all ranks of `mesh`, which all call it. An answer ends where logits are not finite."""
        batch, answers = self._ask(
            TrainingModel(stages, pipeline, mesh, self._config), self.prompts
        )
        # Not `finish`, which raises: bad numbers of a model in training are for its guard to judge.
        while batch.busy:
            batch.step()
        return [answer.text for answer in answers]

    def _ask(self, model: Any, prompts: Sequence[str]) -> tuple[Batch, list[Answer]]:
        """Return a batch of `model` with an answer to each of `prompts`, still to be generated.
        Raise ConfigError."""
        generator, most = (
            _generator(model, self._tokenizer),
            self._config.observe.samples.max_tokens,
        )
        batch, answers = Batch(model, generator.ends), list[Answer]()
        for prompt in prompts:
            answers.append(
                generator.start(generator.request(prompt, most, Sampling(temperature=0.0)))
            )
            batch.add(answers[-1])
        return batch, answers


class TargetsInTraining:
    """Gives the targets of validation rows between training steps, by the likeliest tokens, and
    compares them with those that the rows have."""

    def __init__(self, config: Config, tokenizer: Tokenizer, valid: Mixture):
        """Read the first `observe.target_rows` rows of `valid`. Raise ConfigError where what
        compares texts is not installed."""
        try:
            import rouge_score  # noqa: F401
            import sacrebleu  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"observe.target_rows needs {error.name}; pip install 'megalite[eval]'"
            ) from None
        self._config, self._tokenizer, most = config, tokenizer, config.observe.target_rows
        pairs = itertools.islice(_rows_of(valid), most)
        self.sources, wanted = map(list, zip(*pairs, strict=True))
        self.wanted = [tokenizer.decode_plain(target) for target in wanted]
        assert tokenizer.eod_id is not None
        self._end = tokenizer.eod_id

    def measure(
        self, stages: Sequence[Stage], pipeline: Pipeline | None, mesh: Mesh
    ) -> dict[str, float]:
        """Return BLEU, chrF and ROUGE of the targets that the model of `stages` (and `pipeline`)
        gives; the same on all ranks of `mesh`, which all call it."""
        from megalite.infer.references import corpus_scores

        model = TrainingModel(stages, pipeline, mesh, self._config)
        # Data ranks take turns, unless they must do the same.
        sharing, count = _ranks_that_share(self._config, mesh), len(self.sources)
        own, size = range(sharing.rank, count, sharing.size), model.num_slots
        found = [
            self._targets(model, [self.sources[number] for number in own[start : start + size]])
            for start in range(0, len(own), size)
        ]
        room = self._config.lengths.target
        mine = torch.cat([torch.zeros(0, room, dtype=torch.int64, device=mesh.device), *found])
        rows, _ = gather_rows(mine, sharing)
        # Rank by rank, each with its own sources.
        order = [n for rank in range(sharing.size) for n in range(rank, count, sharing.size)]
        said = [""] * count
        for number, ids in zip(order, rows.tolist(), strict=True):
            until = ids.index(self._end) if self._end in ids else len(ids)
            said[number] = self._tokenizer.decode_plain(ids[:until])
        return corpus_scores(said, self.wanted)

    def _targets(self, model: TrainingModel, sources: Sequence[Sequence[int]]) -> Tensor:
        """Return the likeliest targets, [B, room] int64, each with the end token behind it."""
        room, start = self._config.lengths.target, self._config.model.START_TOKEN
        tokens_BT = torch.full((len(sources), 1), start, device=model.device)
        source = model.source_of(sources, start)
        has_ended_B = torch.zeros(len(sources), dtype=torch.bool, device=model.device)
        while tokens_BT.shape[1] <= room and not has_ended_B.all():
            next_B = model.next_logits(tokens_BT, source).argmax(-1)
            has_ended_B |= next_B == self._end
            tokens_BT = torch.cat(
                (tokens_BT, next_B.masked_fill(has_ended_B, self._end)[:, None]), 1
            )
        return F.pad(tokens_BT[:, 1:], (0, room + 1 - tokens_BT.shape[1]), value=self._end)


def _rows_of(mixture: Mixture) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the rows of a mixture of sources with targets, in its order: token ids of both."""
    for number in range(mixture.num_samples):
        samples = mixture.read([number])
        assert samples.documents is not None
        assert samples.source is not None
        assert samples.source_documents is not None
        for document in np.unique(samples.documents[0]):
            labels = samples.labels[0][samples.documents[0] == document]
            source = samples.source[0][samples.source_documents[0] == document]
            if (labels != IGNORE).any():  # what is filled up has none
                yield source.tolist(), labels[labels != IGNORE].tolist()


def _ranks_that_share(config: Config, mesh: Mesh) -> Axis:
    """Return the axis of the ranks that share what is to be evaluated: the data ranks, or one alone
    where all of them must run the same forward passes. That is so under ZeRO-3, where they gather
    each other's weights in every layer, and where they share experts, and send each other tokens."""
    # One rank with more documents would wait there in a collective that no other calls.
    together = config.parallel.zero_stage == 3 or mesh.data_shares_experts
    return ALONE if together else mesh.data


def _no_model(config: Config) -> Any:
    """Return what stands for the model of `config` where only its sizes are asked for."""
    return SimpleNamespace(
        capacity=config.model.max_positions,
        vocab_size=config.model.vocab_size,
        device=torch.device("cpu"),
    )


def _generator(model: Any, tokenizer: Tokenizer) -> Generator:
    """Return a Generator for `model` that ends answers at the end-of-document token."""
    end = tokenizer.eod_id
    return Generator(model, tokenizer, frozenset() if end is None else frozenset({end}))


class TrainingModel:
    """Runs this rank's part of the model in training as a `batch.Predictor`.

    It has no KV cache, since training needs the memory. It keeps the tokens instead, and computes a
    sequence anew for each further one."""

    def __init__(
        self, stages: Sequence[Stage], pipeline: Pipeline | None, mesh: Mesh, config: Config
    ):
        """Wrap the training `stages` of this rank, with the `pipeline` that runs them (None if
        there is one stage) on `mesh`; `config` gives vocabulary, capacity and number of slots."""
        self._stages, self._pipeline, self._mesh = stages, pipeline, mesh
        self.vocab_size = config.model.vocab_size
        self.num_slots, self.capacity = config.train.micro_batch_size, config.model.max_positions
        self.turning_points, self.device = config.model.architecture.turning_points, mesh.device
        # Sequence parallelism and the zigzag of context parallelism divide a row evenly only at
        # multiples of their sizes.
        self._width = math.lcm(WIDTHS, 2 * mesh.context.size * mesh.tensor.size)
        self._tokens_SL = torch.zeros(
            self.num_slots, 1 + self.capacity, dtype=torch.int64, device=mesh.device
        )
        """Token ids of each slot, written as a cache is: the first cell is never read."""

    def predict(self, tokens_BT: Tensor, places: CachedSequenceInfo, last_B: Tensor) -> Tensor:
        """Return the next-token logits behind the token `last_B` of each row of `tokens_BT`, fp32
        [B,V]. `places` says which slots the rows continue, and where."""
        self._tokens_SL[places.slot_B[:, None], places.cell_BT] = tokens_BT
        # Where the asked token is in its whole sequence, which is computed from its beginning.
        place_B = places.position_BT.gather(1, last_B[:, None])[:, 0]
        # All rows up to the furthest asked position; the rest of a shorter row is hidden by
        # causality.
        rows_BT = self._tokens_SL[places.slot_B, 1 : 2 + int(place_B.max())]
        return self._run(rows_BT, places.whole_length, place_B)[:, 0]

    def logits(self, tokens_BT: Tensor, places: SequenceInfo) -> Tensor:
        """Return the next-token logits behind every token, fp32 [B,T,V]."""
        return self._run(tokens_BT, places.whole_length)[:, : tokens_BT.shape[1]]

    def copy_slots(self, sources: Sequence[int], targets: Sequence[int], num_tokens: int) -> None:
        """Copy sequences between slots."""
        self._tokens_SL[targets, : 1 + num_tokens] = self._tokens_SL[sources, : 1 + num_tokens]

    def source_of(self, sources: Sequence[Sequence[int]], padding: int) -> Source:
        """Return what an encoder reads of these rows of tokens. `padding` behind them is a document
        of its own, to which no token attends."""
        width = max(map(len, sources))
        width += -width % self._width
        rows = [[*row, *[padding] * (width - len(row))] for row in sources]
        index_S = torch.arange(width, device=self.device)
        lengths_B1 = torch.tensor([len(row) for row in sources], device=self.device)[:, None]
        places = SequenceInfo(index_S[None], index_S[None], (index_S >= lengths_B1).long())
        return Source(torch.tensor(rows, device=self.device), places)

    def next_logits(self, tokens_BT: Tensor, source: Source) -> Tensor:
        """Return the logits behind the last token of each row, fp32 [B,V], beside the `source` that
        an encoder reads."""
        last_B = torch.full_like(tokens_BT[:, 0], tokens_BT.shape[1] - 1)
        return self._run(tokens_BT, None, last_B, source)[:, 0]

    @torch.no_grad()  # not inference_mode: tensors that a module keeps must stay usable in training
    def _run(
        self,
        tokens_BT: Tensor,
        whole_length: int | Tensor | None,
        place_B: Tensor | None = None,
        source: Source | None = None,
    ) -> Tensor:
        """Return the logits of all positions, or of `place_B` in each row: [B,T or 1,V] fp32, on
        every rank."""
        mesh = self._mesh
        tokens_BT = F.pad(tokens_BT, (0, -tokens_BT.shape[1] % self._width))
        batch, width = tokens_BT.shape
        cut, index_T = None, torch.arange(width, device=self.device)
        if mesh.context.size > 1:
            cut = ContextCut.of(width, mesh.context.size, device=self.device)
            (index_T,) = cut.device_RBT[mesh.context.rank]
        # Padding may lie beyond the model's last position.
        position = index_T[None].clamp(max=self.capacity - 1)
        places = SequenceInfo(index_T[None], position, whole_length=whole_length, cut=cut)
        if source is not None:  # whose document 0 is what the rows here attend to
            documents = torch.zeros_like(tokens_BT)
            places = replace(
                places,
                document_BT=documents[:, index_T],
                whole_document_BT=documents if mesh.context.size > 1 else None,
                source=part_of_source(source, mesh.context),
            )
        inputs = Inputs(tokens_BT[:, index_T], places)
        # Eager, because torch.compile would recompile for each of many shapes.
        with torch.compiler.set_stance("force_eager"):
            if self._pipeline:
                outputs = self._pipeline.forward([inputs])
            else:
                NOW.do("forward")
                outputs = [self._stages[0](None, inputs)]
        logits = torch.zeros(
            batch, width if place_B is None else 1, self.vocab_size, device=self.device
        )
        for local_BTV in outputs:
            if place_B is not None:  # a context rank holds this position of only some rows
                here = index_T == place_B[:, None]
                found = all_gather(local_BTV[here].float(), mesh.tensor, dim=1)
                logits[here.any(1), 0] = found[..., : self.vocab_size]
            else:
                logits[:, index_T] = all_gather(local_BTV.float(), mesh.tensor, dim=2)[
                    ..., : self.vocab_size
                ]
        # Each position was computed by one context rank and one stage, and is zero on all others: a
        # sum is a gather.
        return all_reduce(all_reduce(logits, mesh.context), mesh.pipeline)
