"""Vectors of texts by contrast (van den Oord et al. 2018; Reimers and Gurevych 2019): a text is to
be nearer to its partner than to the partners of all others in the global batch.

A pair's loss sees the vectors of all micro-batches and replicas, so that it is the same on every
layout. These are computed once without a gradient; from them follows the gradient of each vector,
with which each micro-batch then goes through its own passes (Gao et al. 2021, GradCache). That
takes one more forward pass, and no more memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from megalite.comm.collectives import all_reduce, gather_rows
from megalite.comm.mesh import Mesh
from megalite.config import Config, DataKind, ObjectiveConfig
from megalite.data.dataset import Split
from megalite.data.loader import MicroBatch
from megalite.models.layers import IGNORE
from megalite.parallel.stage import Contrast, Inputs, Output
from megalite.training.objectives import Objective, sum_by_document

MODES = {
    "mean": "pooling_mode_mean_tokens",
    "first": "pooling_mode_cls_token",
    "last": "pooling_mode_lasttoken",
}
"""Ways to pool, with what sentence-transformers before version 6 calls them. Later ones read these,
too."""


class ContrastiveConfig(ObjectiveConfig):
    """Cross-entropy of which text of the global batch is the partner, by the cosines of their
    vectors."""

    name: Literal["contrastive"] = "contrastive"
    scale: float = Field(20.0, gt=0, description="Factor of the cosines: 1 / temperature.")
    symmetric: bool = Field(
        False, description="Also tell the first text of each pair from its second."
    )
    pooling: Literal["mean", "first", "last"] = Field(
        "mean",
        description="What a text's vector is: the mean of its tokens' hidden states, or that of one token.",
    )

    DATA: ClassVar[DataKind] = "pairs"
    NEEDS: ClassVar[Output] = "final_states"

    def check(self, config: Config) -> None:
        if not config.data.document_mask:
            raise ValueError(
                "objective.name: contrastive needs data.document_mask: true, which keeps texts apart"
            )
        if config.model.has_classes:
            raise ValueError(
                f"objective.name: contrastive trains no head of model.task: {config.model.task}"
            )
        if config.model.PREDICTS == "causal" and self.pooling == "first":
            raise ValueError(
                "objective.pooling: first is for encoders, whose first token sees the whole text"
            )

    def predicted(self) -> float:
        return 0.0

    def files(self) -> dict[str, Any]:
        kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
        modules = [
            {
                "idx": number,
                "name": str(number),
                "path": path,
                "type": f"sentence_transformers.models.{kind}",
            }
            for number, (kind, path) in enumerate(kinds.items())
        ]
        modes = {name: mode == self.pooling for mode, name in MODES.items()}
        return {"modules.json": modules, "1_Pooling/config.json": modes}

    def build(self, config: Config, mesh: Mesh) -> Objective:
        return Contrastive(self, mesh)


class Contrastive:
    judges: Output = "final_states"
    metrics: tuple[str, ...] = ("accuracy",)
    num_judged = 1

    def __init__(self, config: ContrastiveConfig, mesh: Mesh):
        self.config, self.mesh = config, mesh

    def complete(self, inputs: Inputs, micro: MicroBatch, split: Split) -> Inputs:
        assert micro.documents is not None
        num_pairs = int(micro.documents.max()) // 2 + 1
        num_labels = sum_by_document(
            (micro.labels != IGNORE).float(), micro.documents, 2 * num_pairs
        )
        real_BP = (num_labels > 0).unflatten(1, (-1, 2)).all(2)
        contrast = Contrast(real_BP.to(inputs.tokens_BT.device), 1 / self.mesh.context.size)
        return replace(inputs, contrast=contrast)

    def pool(self, states_BTD: Tensor, inputs: Inputs) -> Tensor:
        """Return this context rank's part of what is pooled of each text, [B,2P,D] fp32."""
        places, contrast = inputs.places, inputs.contrast
        assert contrast is not None
        assert places.document_BT is not None
        length_BT = torch.as_tensor(places.length, device=states_BTD.device).squeeze(-1)
        if self.config.pooling == "mean":
            weight_BT = 1.0 / length_BT.float()
        else:
            place = 0 if self.config.pooling == "first" else length_BT - 1
            weight_BT = (places.position_BT == place).float()
        weighted_BTD = states_BTD.float() * weight_BT[..., None]
        return sum_by_document(weighted_BTD, places.document_BT, 2 * contrast.real_BP.shape[1])

    @torch.enable_grad()
    def look_ahead(self, outs: Iterable[Any], inputs: list[Inputs]) -> list[Inputs]:
        pooled = [
            all_reduce(self.pool(out, each), self.mesh.context)
            for out, each in zip(outs, inputs, strict=False)
        ]
        if not pooled:  # before the last stage
            return inputs
        real = [each.contrast.real_BP for each in inputs if each.contrast]
        own = torch.cat(
            [x.unflatten(1, (-1, 2))[where] for x, where in zip(pooled, real, strict=True)]
        )
        every, first = gather_rows(own.flatten(1), self.mesh.data)
        texts_N2D = every.detach().unflatten(1, (2, -1)).requires_grad_()
        losses_N, right_N = self.compare(texts_N2D)
        (grads_N2D,) = torch.autograd.grad(losses_N.sum(), texts_N2D)
        found_N2 = torch.stack((losses_N.detach(), right_N), 1)
        completed = []
        for each, where_BP in zip(inputs, real, strict=True):
            mine = slice(first, first + int(where_BP.sum()))
            first = mine.stop
            grad_BP2D = grads_N2D.new_zeros(*where_BP.shape, *grads_N2D.shape[1:])
            found_BP2 = found_N2.new_zeros(*where_BP.shape, 2)
            grad_BP2D[where_BP], found_BP2[where_BP] = grads_N2D[mine], found_N2[mine]
            assert each.contrast is not None
            contrast = replace(each.contrast, grad_BND=grad_BP2D.flatten(1, 2), found_BP2=found_BP2)
            completed.append(replace(each, contrast=contrast))
        return completed

    def compare(self, texts_N2D: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each pair, [N], and 1 where its first text is nearest to its second,
        else 0."""
        one_ND, other_ND = F.normalize(texts_N2D, dim=2).unbind(1)
        scores_NN = self.config.scale * one_ND @ other_ND.T
        number_N = torch.arange(len(one_ND), device=one_ND.device)
        losses_N = F.cross_entropy(scores_NN, number_N, reduction="none")
        if self.config.symmetric:
            losses_N = (losses_N + F.cross_entropy(scores_NN.T, number_N, reduction="none")) / 2
        return losses_N, (scores_NN.argmax(1) == number_N).float()

    def measure(self, out: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        contrast = inputs.contrast
        assert contrast is not None
        assert contrast.grad_BND is not None
        # Its gradient is that of the losses; its value is not, and is replaced by theirs.
        toward_B = (self.pool(out, inputs) * contrast.grad_BND).sum((1, 2))
        loss_B, right_B1 = self.judge(out, inputs)
        return toward_B - toward_B.detach() + loss_B, right_B1

    def judge(self, out: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        contrast = inputs.contrast
        assert contrast is not None
        assert contrast.found_BP2 is not None
        loss_B, right_B = (contrast.found_BP2.sum(1) * contrast.share).unbind(1)
        return loss_B, right_B[:, None]

    def summary(self, loss: float, count: float, judged: Tensor) -> dict[str, float]:
        return {"accuracy": judged.item() / max(count, 1.0)}
