"""On-policy distillation (GKD, Agarwal et al. 2024): of a share of the samples the student itself
writes the answers, and the teacher judges what it said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from megalite.data.loader import MicroBatch
from megalite.data.mixture import IGNORE
from megalite.infer.answer import Answer, Request, TextStream
from megalite.infer.batch import Batch, Predictor
from megalite.infer.in_training import TrainingModel
from megalite.infer.ranks import RanksModel
from megalite.infer.sampling import Sampling
from megalite.models.core_attention import CoreAttention
from megalite.models.latent import LatentAttention
from megalite.parallel.stage import Inputs
from megalite.runtime.activity import NOW
from megalite.training.distill import OnPolicyConfig
from megalite.training.parts import RankModel
from megalite.training.run import Run
from megalite.utils.counter_random import uniform
from megalite.utils.keys import key_of

SITE = "on_policy"


class Gap(NamedTuple):
    """The place of an answer in a micro-batch."""

    row: int
    start: int
    """Token that the first token of the answer is the label of."""
    stop: int
    """Behind the last token of the row of data that is here."""
    document: int


class StudentAnswers:
    """Puts what the student says in place of answers in a step's micro-batches."""

    def __init__(self, asked: OnPolicyConfig, run: Run, parts: RankModel):
        self._asked, self._run, self._parts = asked, run, parts

    def __call__(self, batch: list[MicroBatch]) -> list[MicroBatch]:
        """Return as many micro-batches of the same sizes. All ranks that share the samples call
        it."""
        seed, parts = self._run.config.train.seed, self._parts
        changed, gaps, answers = list(batch), list[tuple[int, Gap]](), list[Answer]()
        for number, micro in enumerate(batch):
            is_chosen = uniform(key_of(seed, SITE), micro.samples) < self._asked.share
            if not is_chosen.any():
                continue
            changed[number] = replace(
                micro, tokens=micro.tokens.clone(), labels=micro.labels.clone()
            )
            for gap in _gaps(micro, is_chosen, self._run.config.model.max_positions):
                gaps.append((number, gap))
                answers.append(self._start(micro, gap))
        if answers:
            NOW.do("writing answers")
            parts.engine.wait_for_params()
            parts.train(False)
            with self._model() as model:
                _answer(model, answers)
        for (number, gap), answer in zip(gaps, answers, strict=True):
            _put(changed[number], gap, answer)
        return changed

    def _start(self, micro: MicroBatch, gap: Gap) -> Answer:
        """Return the answer that is to be written into `gap`: a function of the seed, the sample's
        number and the document's, and of the weights."""
        assert micro.documents is not None
        row, labels = gap.row, micro.labels[gap.row]
        begin = int((micro.documents[row] == gap.document).nonzero()[0])
        prompt = micro.tokens[row, begin : gap.start + 1].tolist()
        # The first answer of the row ends where its labels do, with the token that ends answers.
        is_label = labels[gap.start : gap.stop] != IGNORE
        count = int(is_label.long().cumprod(0).sum())
        end = int(labels[gap.start + count - 1])
        key = key_of(self._run.config.train.seed, SITE, int(micro.samples[row]), gap.document)
        sampling = Sampling(temperature=self._asked.temperature, seed=key >> 1)
        most = min(self._asked.max_tokens, gap.stop - gap.start)
        request = Request(prompt, most, sampling, ends=frozenset({end}))
        return Answer(request, TextStream(lambda ids: "", prompt))

    @contextmanager
    def _model(self) -> Iterator[Predictor]:
        """Give the model in training as it writes: with a KV cache where the layout lets single
        tokens be computed, else anew for each token."""
        run, parts = self._run, self._parts
        plan, train = run.plan, run.config.train
        is_cut = plan.context > 1 or (plan.sequence and plan.tensor > 1)
        if is_cut or len(parts.stages) > 1 or train.compile:
            yield TrainingModel(parts.stages, parts.pipeline, run.mesh, run.config)
            return
        with _without_cache_afterwards(parts.stages[0]):
            yield _Cached(run, parts, self._asked.slots)


class _Cached(RanksModel):
    """The model in training with a KV cache."""

    def __init__(self, run: Run, parts: RankModel, num_slots: int):
        (stage,), length = parts.stages, run.config.data.seq_length + 1
        # The pipeline of training runs it, whatever the shapes.
        plan = replace(run.plan, pipeline=1)
        super().__init__(stage, plan, run.mesh, parts.dtype, num_slots, length)
        self.pipeline = parts.pipeline

    # Not inference_mode: tensors that a module keeps must stay usable in training.
    @torch.no_grad()
    def _run(self, inputs: Inputs) -> Tensor:
        return self.logits_of(inputs)


@contextmanager
def _without_cache_afterwards(stage: nn.Module) -> Iterator[None]:
    """Take the KV cache that a model gets within the block from it again, with its memory."""
    cores = [module for module in stage.modules() if isinstance(module, CoreAttention)]
    latent = [module for module in stage.modules() if isinstance(module, LatentAttention)]
    before = [core.strategy for core in cores], [module.cache for module in latent]
    try:
        yield
    finally:
        for core, strategy in zip(cores, before[0], strict=True):
            core.strategy = strategy
        for module, cache in zip(latent, before[1], strict=True):
            module.cache = cache


def _answer(model: Predictor, answers: list[Answer]) -> None:
    """Have the model write all answers."""
    batch = Batch(model, frozenset())
    for answer in answers:
        batch.add(answer)
    # Not `finish`, which raises: bad numbers of a model in training are for its guard to judge.
    while batch.busy:
        batch.step()


def _gaps(micro: MicroBatch, is_chosen: Tensor, max_positions: int) -> Iterator[Gap]:
    """Yield the place of the first answer of each document that has one, in the chosen rows; without
    those that the model has no position for."""
    assert micro.documents is not None
    for row in is_chosen.nonzero()[:, 0].tolist():
        documents, is_label = micro.documents[row], micro.labels[row] != IGNORE
        for document in documents.unique().tolist():
            here = (documents == document).nonzero()[:, 0]
            learned = here[is_label[here]]
            if len(learned) and int(learned[0] - here[0]) + 1 < max_positions:
                # As far as labels go: the last token of a row of data has none of its own.
                yield Gap(row, int(learned[0]), int(learned[-1]) + 1, document)


def _put(micro: MicroBatch, gap: Gap, answer: Answer) -> None:
    """Put an answer in place of what stood in its gap, in place. What follows it has no label."""
    tokens, labels = micro.tokens[gap.row], micro.labels[gap.row]
    ends = answer.request.ends if answer.finish == "stop" else ()
    said = torch.tensor([*answer.tokens, *ends], dtype=labels.dtype)
    labels[gap.start : gap.stop] = IGNORE
    labels[gap.start : gap.start + len(said)] = said
    # The token behind a label is that label; of the last one there may be no place.
    inputs = said[: gap.stop - gap.start - 1]
    after = gap.start + 1
    tokens[after : after + len(inputs)] = inputs
