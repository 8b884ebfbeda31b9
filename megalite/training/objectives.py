"""Objectives: the loss that training minimises, as sums over the rows of a micro-batch and the
counts that divide them. Every token, or every pair of answers, of the whole global batch weighs the
same, whatever the layout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from megalite.comm.collectives import all_reduce, gather_rows
from megalite.comm.mesh import Axis, Mesh
from megalite.config import Config, DataKind, ObjectiveConfig
from megalite.data.dataset import Split
from megalite.data.loader import MicroBatch
from megalite.data.mixture import Mixture
from megalite.kernels.loss import LossTerms
from megalite.models.layers import IGNORE, SetLoss, SquaredLoss, in_set, numbers_of
from megalite.parallel.outputs import VocabShards
from megalite.parallel.stage import Inputs, Output, Pairs


class Objective(Protocol):
    """Turn what the last stage computes of each token into the loss to minimise."""

    judges: Output
    """What `judge` takes; ObjectiveConfig.NEEDS says the same of `measure`. Losses are [B,T] fp32,
    logits `VocabShards`, hidden states `HiddenStates`."""
    metrics: tuple[str, ...]
    """Names of the metrics that `measure` returns beside the loss."""
    num_judged: int
    """Number of values per row that `judge` returns beside the loss."""

    def complete(self, inputs: Inputs, micro: MicroBatch, split: Split) -> Inputs:
        """Return `inputs` with what the objective needs beside tokens and labels. `micro` is the
        whole micro-batch of `split`, `inputs` this rank's part of it."""

    def look_ahead(self, outs: Iterable[Any], inputs: list[Inputs]) -> list[Inputs]:
        """Return `inputs` with what the objective finds in `outs`: what the last stage returns of
        all of this rank's micro-batches of a global batch, without a gradient; nothing before the
        last stage. It is for losses that compare rows of other micro-batches and ranks. `outs` that
        nobody looks at cost no pass."""

    def measure(self, out: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return from what is needed of each token the sums of the losses of each row, [B], and of
        each metric, [B, metrics]. Summed over the replicas they are those of the whole row, and the
        gradients of the first are to be summed over the replicas, too. Tensor ranks all return the
        same."""

    def judge(self, out: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return the same for validation, from `judges`: [B] and [B, num_judged]."""

    def summary(self, loss: float, count: float, judged: Tensor) -> dict[str, float]:
        """Return what validation reports beside the mean `loss`. `judged` is summed over all rows,
        `count` is what their losses are divided by."""


class NextToken:
    """Cross-entropy of every token that has a label, in training with `terms` beside it; validation
    is without."""

    judges: Output = "losses"
    metrics: tuple[str, ...] = ()
    num_judged = 0
    terms: LossTerms | None = None

    def __init__(self, terms: LossTerms | None = None):
        if terms:
            self.terms, self.metrics = terms, ("cross_entropy",)

    def complete(self, inputs: Inputs, micro: MicroBatch, split: Split) -> Inputs:
        return replace(inputs, terms=self.terms) if self.terms and split == "train" else inputs

    def look_ahead(self, outs: Iterable[Any], inputs: list[Inputs]) -> list[Inputs]:
        return inputs

    def measure(self, out: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        if not inputs.terms:
            return out.sum(1), out.new_empty(len(out), 0)
        # out [B, T, 2]: what is minimised, and the cross-entropy in it, which is reported.
        loss_B, cross_entropy_B = out.sum(1).unbind(-1)
        return loss_B, cross_entropy_B.detach()[:, None]

    def judge(self, out: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return self.measure(out, inputs)

    def summary(self, loss: float, count: float, judged: Tensor) -> dict[str, float]:
        return {"perplexity": math.exp(min(loss, 700.0))}  # beyond 700, exp overflows


class NextTokenConfig(ObjectiveConfig):
    """Cross-entropy of the next token, or of the classes of a model that has a head for these."""

    name: Literal["next_token"] = "next_token"
    z_loss: float = Field(
        0.0,
        ge=0,
        description="Weight of the squared log-sum-exp of the logits, which it keeps small.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of each label that is spread evenly over the whole vocabulary.",
    )

    def build(self, config: Config, mesh: Mesh) -> Objective:
        labels = config.model.labels
        terms = None
        if self.z_loss or self.label_smoothing:
            terms = LossTerms(
                self.z_loss, self.label_smoothing, len(labels) or config.model.vocab_size
            )
        if config.model.problem == "multi_label":
            return ClassSets(len(labels))
        if config.model.problem == "regression":
            return Numbers(mesh)
        if config.model.has_classes:
            from megalite.training.entities import Entities, are_of_entities

            if config.model.task == "labels" and are_of_entities(labels):
                return Entities(labels, mesh, terms)
            return Classes(len(labels), terms)
        if predictors := config.model.architecture.predictors:
            from megalite.training.multi_token import MultiToken  # which subclasses NextToken

            return MultiToken(len(predictors), config.model.predictor_weight, terms)
        return NextToken(terms)

    def check(self, config: Config) -> None:
        if config.model.problem != "single_label" and (self.z_loss or self.label_smoothing):
            raise ValueError(
                f"objective.z_loss and .label_smoothing are of cross-entropy, which model.problem: "
                f"{config.model.problem} does not have"
            )


class Classes(NextToken):
    """Cross-entropy of the classes of texts or tokens.

    Validation counts for each class how often it occurs, is predicted, and is predicted rightly;
    averages over classes are over those that occur or are predicted, as in scikit-learn."""

    judges: Output = "logits"

    def __init__(self, num_classes: int, terms: LossTerms | None = None):
        super().__init__(terms)
        self.num_classes, self.num_judged = num_classes, 3 * num_classes

    def judge(self, out: VocabShards, inputs: Inputs) -> tuple[Tensor, Tensor]:
        labels_BT = inputs.labels_BT
        assert labels_BT is not None
        logits_BTC = out.whole()
        losses_BT = F.cross_entropy(
            logits_BTC.transpose(1, 2), labels_BT, ignore_index=IGNORE, reduction="none"
        )
        # C classes are few: whole logits on every tensor rank cost nothing.
        told_BT, is_here = logits_BTC.argmax(2), labels_BT != IGNORE
        right = is_here & (told_BT == labels_BT)
        none = losses_BT.new_zeros(len(losses_BT), self.num_classes)
        counts = [
            # Counts by class [B, C]; clamped, as IGNORE is no index, and `where` gives those 0.
            none.scatter_add(1, classes.clamp(min=0), where.float())
            for classes, where in ((labels_BT, is_here), (told_BT, is_here), (labels_BT, right))
        ]
        return losses_BT.sum(1), torch.cat(counts, 1)

    def summary(self, loss: float, count: float, judged: Tensor) -> dict[str, float]:
        # Counts add up over rows, ranks and batches; F1 does not, so it is computed from them at
        # last.
        there, told, right = judged.double().view(3, -1)
        accuracy = {"accuracy": (right.sum() / there.sum().clamp(min=1)).item()}
        return (
            accuracy
            | means_over_classes(there, told, right)
            | {"matthews": matthews(there, told, right)}
        )


def means_over_classes(there: Tensor, told: Tensor, right: Tensor) -> dict[str, float]:
    """Return F1, precision and recall as means over the classes that occur or are told, from how
    often each class [C] occurs, is told, and is told rightly."""
    occurs = there + told > 0
    means = {
        "f1": 2 * right / (there + told).clamp(min=1),
        "precision": right / told.clamp(min=1),
        "recall": right / there.clamp(min=1),
    }
    return {name: of_class[occurs].mean().item() for name, of_class in means.items()}


def matthews(there: Tensor, told: Tensor, right: Tensor) -> float:
    """Return Matthews' correlation coefficient of any number of classes (Gorodkin 2004), from the
    same counts as `means_over_classes`. 0 where one class alone occurs, or is told."""
    count, covariance = there.sum(), right.sum() * there.sum() - (there * told).sum()
    spread = (count**2 - (told**2).sum()) * (count**2 - (there**2).sum())
    return (covariance / spread.sqrt()).item() if spread > 0 else 0.0


class ClassSets(NextToken):
    """Binary cross-entropy of each class of texts that may have several. Validation counts as
    `Classes` does; its `accuracy` is the share of texts all of whose classes are told rightly."""

    judges: Output = "logits"

    def __init__(self, num_classes: int):
        super().__init__()
        self.loss, self.num_classes, self.num_judged = (
            SetLoss(num_classes),
            num_classes,
            1 + 3 * num_classes,
        )

    def judge(self, out: VocabShards, inputs: Inputs) -> tuple[Tensor, Tensor]:
        labels_BT = inputs.labels_BT
        assert labels_BT is not None
        logits_BTC = out.whole()
        is_here_BT1 = (labels_BT != IGNORE)[..., None]
        there_BTC = in_set(labels_BT.clamp(min=0), 0, self.num_classes) & is_here_BT1
        told_BTC = (logits_BTC > 0) & is_here_BT1
        right_BTC = there_BTC & told_BTC
        exact_BT1 = (there_BTC == told_BTC).all(2, keepdim=True) & is_here_BT1
        counts = torch.cat((exact_BT1, there_BTC, told_BTC, right_BTC), 2)
        losses_BT = self.loss(logits_BTC, labels_BT)
        return losses_BT.sum(1), counts.sum(1, dtype=torch.float32)

    def summary(self, loss: float, count: float, judged: Tensor) -> dict[str, float]:
        num_exact, of_classes = judged[0], judged[1:]
        there, told, right = of_classes.double().view(3, -1)
        f1 = 2 * right.sum() / (there + told).sum().clamp(min=1)
        accuracy = num_exact.item() / max(count, 1.0)
        found = {"accuracy": accuracy, "f1_micro": f1.item()}
        return found | means_over_classes(there, told, right)


class Numbers(NextToken):
    """Squared error of a number for each text. Validation also tells how what is told correlates
    with what is there."""

    judges: Output = "logits"

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.loss, self.mesh = SquaredLoss(1), mesh
        self.judged: list[Tensor] = []
        """Of each micro-batch of a validation, what is there and what is told: [n,2] fp64."""

    def judge(self, out: VocabShards, inputs: Inputs) -> tuple[Tensor, Tensor]:
        labels_BT, logits_BTC = inputs.labels_BT, out.whole()
        assert labels_BT is not None
        is_here_BT = labels_BT != IGNORE
        if self.mesh.tensor.rank == 0:  # the others have the same
            told = logits_BTC[..., 0][is_here_BT]
            self.judged.append(torch.stack((numbers_of(labels_BT[is_here_BT]), told), 1).double())
        return self.loss(logits_BTC, labels_BT).sum(1), out.padded_BTV.new_empty(len(labels_BT), 0)

    def summary(self, loss: float, count: float, judged: Tensor) -> dict[str, float]:
        own = torch.cat(
            (torch.zeros(0, 2, dtype=torch.float64, device=self.mesh.device), *self.judged)
        )
        self.judged = []
        there, told = gather_rows(own, self.mesh.world)[0].cpu().unbind(1)
        return {
            "pearson": pearson(there, told),
            "spearman": pearson(ranks_of(there), ranks_of(told)),
        }


def pearson(x: Tensor, y: Tensor) -> float:
    """Return Pearson's correlation coefficient of two series [n]; NaN where one does not vary."""
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).item()


def ranks_of(x: Tensor) -> Tensor:
    """Return the rank of each value, from 0; equal ones share the mean of theirs: Spearman's
    coefficient is Pearson's of these."""
    _, which, counts = torch.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts + 1).double() / 2)[which]


@dataclass(frozen=True)
class Reference:
    """Log-probabilities of a mixture's documents under the model that the run starts from."""

    mixture: Mixture
    tables: Sequence[Tensor]
    """One table for each source: [samples, most documents of a sample] fp32, with an even number of
    columns."""

    def of(self, samples: Tensor) -> Tensor:
        """Return the log-probabilities [B, documents] of the samples with these numbers [B] in the
        run."""
        source, sample = self.mixture.order.locate(samples.numpy())
        width = max(table.shape[1] for table in self.tables)
        rows = [self.tables[s][n] for s, n in zip(source.tolist(), sample.tolist(), strict=True)]
        return torch.stack([F.pad(row, (0, width - len(row))) for row in rows])


class DPOConfig(ObjectiveConfig):
    """Direct preference optimisation: prefer the chosen of two answers more than the model of
    model.hf does."""

    name: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0, description="Cost of straying from the model of model.hf.")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Share of the pairs that are assumed to be the wrong way round.",
    )

    DATA: ClassVar[DataKind] = "preference"
    HAS_REFERENCE: ClassVar[bool] = True

    def check(self, config: Config) -> None:
        if not config.data.document_mask:
            raise ValueError(
                "objective.name: dpo needs data.document_mask: true, which keeps the rows of a sample apart"
            )
        if config.model.hf is None:
            raise ValueError(
                "objective.name: dpo needs model.hf, the model that the run starts from"
            )
        if config.model.task != "causal":
            raise ValueError(
                f"objective.name: dpo needs a model that answers, not model.task: {config.model.task}"
            )
        if config.data.long_rows == "cut":
            raise ValueError(
                "objective.name: dpo compares whole answers; data.long_rows must be refuse or drop"
            )

    def build(self, config: Config, mesh: Mesh) -> Objective:
        return DPO(self, mesh)


class DPO:
    """Direct preference optimisation (Rafailov et al. 2023): prefer the chosen of two answers,
    compared with a reference, the model that the run starts from.

    A sample holds pairs as documents side by side, the chosen one first. `label_smoothing` is the
    share of pairs that may be the wrong way round (Mitchell 2023)."""

    judges: Output = "losses"
    num_judged = 4
    metrics: tuple[str, ...] = (
        "reward_chosen",
        "reward_rejected",
        "reward_margin",
        "reward_accuracy",
    )

    def __init__(self, config: DPOConfig, mesh: Mesh):
        self.config, self.context = config, mesh.context
        self.references: dict[Split, Reference] = {}

    def complete(self, inputs: Inputs, micro: MicroBatch, split: Split) -> Inputs:
        assert micro.documents is not None
        reference_BP2 = self.references[split].of(micro.samples).unflatten(1, (-1, 2))
        # On the host, from the whole sequence: a context rank sees only a part of each answer.
        is_label_BT = (micro.labels != IGNORE).float()
        num_answers = 2 * reference_BP2.shape[1]
        num_labels = sum_by_document(is_label_BT, micro.documents, num_answers)
        real_BP = (num_labels > 0).unflatten(1, (-1, 2)).all(2)
        device = inputs.tokens_BT.device
        share = 1 / self.context.size
        pairs = Pairs(real_BP.to(device), reference_BP2.to(device), share)
        return replace(inputs, pairs=pairs)

    def look_ahead(self, outs: Iterable[Any], inputs: list[Inputs]) -> list[Inputs]:
        return inputs

    def measure(self, losses_BT: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        pairs, document_BT = inputs.pairs, inputs.places.document_BT
        assert pairs is not None
        assert document_BT is not None
        beta, smoothing = self.config.beta, self.config.label_smoothing
        # A loss is -log p of one token: summed, an answer's log-probability, of which each context
        # rank has a part.
        num_answers = 2 * pairs.real_BP.shape[1]
        mine = -sum_by_document(losses_BT, document_BT, num_answers)
        # Documents 2p and 2p + 1 are the chosen and the rejected answer of pair p.
        policy_BP2 = summed_over(mine, self.context).unflatten(1, (-1, 2))
        rewards_BP2 = beta * (policy_BP2 - pairs.reference_BP2)
        chosen_BP, rejected_BP = rewards_BP2.unbind(-1)
        margin_BP = chosen_BP - rejected_BP
        # With a chance of `smoothing` the preference was noted the wrong way round.
        right_BP, wrong_BP = F.logsigmoid(margin_BP), F.logsigmoid(-margin_BP)
        loss_BP = -(1 - smoothing) * right_BP - smoothing * wrong_BP
        loss_B = loss_BP.masked_fill(~pairs.real_BP, 0.0).sum(1)
        # Every context rank has the whole loss, but the gradient of its own tokens only: the value
        # is divided among them, the gradient is not.
        loss_B = loss_B - loss_B.detach() * (1 - pairs.share)
        is_right_BP = (margin_BP > 0).float()
        found_BPM = torch.stack((chosen_BP, rejected_BP, margin_BP, is_right_BP), -1).detach()
        found_BPM = found_BPM.masked_fill(~pairs.real_BP[..., None], 0.0)
        return loss_B, found_BPM.sum(1) * pairs.share

    def judge(self, out: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return self.measure(out, inputs)

    def summary(self, loss: float, count: float, judged: Tensor) -> dict[str, float]:
        return dict(zip(self.metrics, (judged / max(count, 1.0)).tolist(), strict=True))


def sum_by_document(x_BT: Tensor, document_BT: Tensor, count: int) -> Tensor:
    """Sum the values `x_BT`, [B,T] or [B,T,D], of each document's tokens: [B, count] or [B, count,
    D]."""
    index = document_BT.view(*document_BT.shape, *[1] * (x_BT.dim() - 2)).expand_as(x_BT)
    return x_BT.new_zeros(len(x_BT), count, *x_BT.shape[2:]).scatter_add(1, index, x_BT)


def summed_over(x: Tensor, axis: Axis) -> Tensor:
    """Return the sum over all ranks of `axis`, with the gradient of this rank's term only."""
    return x + (all_reduce(x.detach().clone(), axis) - x.detach())
