"""Mixture of experts (Shazeer et al. 2017): a router sends each token to a few of a layer's MLPs.
Dropless: no expert has a capacity, so that what becomes of a token does not depend on the others.

Letters in shapes: B batch, T sequence, D hidden, E experts, K experts that a token visits, N =
B·T·K rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn as nn
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from torch.autograd import Function

from megalite.kernels.activation import swiglu
from megalite.kernels.experts import (
    Groups,
    add_biases,
    count_rows,
    group_by_expert,
    grouped_linear,
    router_logits,
    top_k,
    unpermute,
)
from megalite.models.architecture import ExpertsSpec, FeedForwardSpec
from megalite.models.hf import REQUIRED, Keys, agreed
from megalite.models.layer_loss import LayerLoss
from megalite.models.llama import LIKE_LLAMA, MLP, Layer, LlamaLike, mlp_rows, residual_std
from megalite.models.weights import Weight

MOST_EXPERTS = 10_000
"""Limit on the experts of a layer, each of which has names of tensors of its own. A damaged
config.json may ask for any number."""


class RoutedConfig(LlamaLike):
    """Fields of families with a mixture of experts."""

    # transformers opens no model with one.
    num_experts: int = Field(gt=1, le=MOST_EXPERTS, description="Experts of a layer.")
    experts_per_token: int = Field(gt=0, description="How many experts each token visits.")
    router_aux_loss_coef: float = Field(
        0.001,
        ge=0,
        description="Weight of each layer's load-balancing loss, which is 1 in balance. 0: none.",
    )
    router_z_loss_coef: float = Field(
        0.0,
        ge=0,
        description="Weight of each layer's router z-loss, the mean square of the log-sum-exp of its logits. 0: none.",
    )
    load_balancing: Literal["sequence"] = Field(
        "sequence",
        description="What the load-balancing loss takes the mean of before it multiplies load and probability. "
        "sequence: each row of the batch (DeepSeek-V3).",
    )

    @field_validator("load_balancing", mode="before")
    @classmethod
    def _is_the_same_on_every_layout(cls, value: Any) -> Any:
        if value in ("micro_batch", "batch"):
            raise ValueError(
                f"{value!r} would depend on how many micro-batches and ranks share a batch, so that another layout "
                "would train another model; 'sequence' does not"
            )
        return value

    @model_validator(mode="after")
    def _visits_no_more_than_there_are(self) -> RoutedConfig:
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} must not be more than num_experts {self.num_experts}"
            )
        return self

    HAS_BIASES: ClassVar[bool] = False
    """Whether the router and the projections of experts have biases."""

    @property
    def expert_inner(self) -> int:
        """Return the inner features of one expert."""
        return self.intermediate_size

    @property
    def expert_gate(self) -> Callable[[Tensor], Tensor]:
        """Return the activation between the projections of an expert, [N,2I] → [N,I]."""
        return swiglu

    @property
    def renormalizes(self) -> bool:
        """Return whether the weights of a token's experts add up to 1."""
        return True

    @property
    def scores_by(self) -> Literal["softmax", "sigmoid"]:
        """Return what makes an expert's score of its logit."""
        return "softmax"

    @property
    def groups(self) -> tuple[int, int]:
        """Return into how many groups the experts fall, and of how many of these a token may visit
        experts."""
        return 1, 1

    @property
    def routed_scale(self) -> float:
        """Return the factor of the weights of a token's experts."""
        return 1.0

    @property
    def shared_inner(self) -> int:
        """Return the inner features of the experts that every token visits beside those chosen for
        it; 0: none."""
        return 0

    @property
    def gates_shared(self) -> bool:
        """Return whether a gate weighs what these experts return."""
        return False

    def is_routed(self, layer: int) -> bool:
        """Return whether a layer has experts; others have a dense MLP."""
        return True

    def feed_forward(self, layer: int) -> FeedForwardSpec:
        if not self.is_routed(layer):
            return super().feed_forward(layer)
        return ExpertsSpec(
            inner=self.expert_inner, gated=True, activation=self.GATE, num_experts=self.num_experts,
            experts_per_token=self.experts_per_token, shared_inner=self.shared_inner, shared_gate=self.gates_shared,
        )  # fmt: skip


class Among(RoutedConfig):
    """Fields of families whose layers with experts may be among dense ones."""

    moe_intermediate_size: int = Field(
        gt=0, description="Inner features of an expert; intermediate_size is dense."
    )
    norm_topk_prob: bool = Field(
        False, description="Have the weights of a token's experts add up to 1."
    )
    decoder_sparse_step: int = Field(
        1, gt=0, description="Every so many layers one has experts, the others are dense."
    )
    mlp_only_layers: tuple[int, ...] = Field(
        (), description="Numbers of layers, from 0, that are dense in any case."
    )

    @model_validator(mode="after")
    def _dense_layers_exist(self) -> Among:
        for layer in self.mlp_only_layers:
            if not 0 <= layer < self.num_layers:
                last = self.num_layers - 1
                raise ValueError(
                    f"mlp_only_layers names layer {layer}; the {self.num_layers} layers have the numbers 0 to {last}"
                )
        return self

    @property
    def expert_inner(self) -> int:
        return self.moe_intermediate_size

    @property
    def renormalizes(self) -> bool:
        return self.norm_topk_prob

    def is_routed(self, layer: int) -> bool:
        # As transformers counts: of every so many layers the last one has experts.
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


class Router(nn.Module):
    """Choose the experts of each token by their scores, in fp32. The weights of those chosen are
    their scores, too, or shares of these; a bias and a limit of groups only choose."""

    def __init__(self, config: RoutedConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.logit_bias = (
            nn.Parameter(torch.empty(config.num_experts)) if config.HAS_BIASES else None
        )
        self.bias = (
            None if config.bias_rate is None else nn.Parameter(torch.empty(config.num_experts))
        )
        self.experts_per_token, self.renormalizes = config.experts_per_token, config.renormalizes
        self.scores_by, self.groups = config.scores_by, config.groups
        self.scale = config.routed_scale
        balance, z_loss = config.router_aux_loss_coef, config.router_z_loss_coef
        # Without a weight neither is computed, nor reported.
        self.load_balance = LayerLoss("load_balance", balance) if balance else None
        self.z_loss = LayerLoss("router_z", z_loss) if z_loss else None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `x`, with the router's losses attached, and for each token its experts in
        ascending order: their weights [B,T,K], fp32, and indices [B,T,K]."""
        x_BTD, logits_BTE = router_logits(x_BTD, self.weight)
        if self.logit_bias is not None:
            logits_BTE = logits_BTE + self.logit_bias.float()
        score_BTE = logits_BTE.softmax(-1) if self.scores_by == "softmax" else logits_BTE.sigmoid()
        # Detached: which experts are chosen has no gradient, only how much each of them weighs.
        index_BTK = self.choose(score_BTE.detach())
        # Without the bias, whose only task is to choose (DeepSeek-V3's auxiliary-loss-free
        # balance).
        weight_BTK = score_BTE.gather(-1, index_BTK)
        if self.renormalizes:
            total_BT1 = weight_BTK.sum(-1, keepdim=True)
            # Scores of a softmax add up to something; sigmoids might all be 0.
            weight_BTK = weight_BTK / (
                total_BT1 if self.scores_by == "softmax" else total_BT1 + 1e-20
            )
        if self.scale != 1.0:
            weight_BTK = weight_BTK * self.scale
        if self.bias is not None:
            # Attached to hidden states like a loss, so that it comes with the backward pass, and
            # once under recomputation.
            x_BTD = _Count.apply(x_BTD, self.bias, index_BTK)
        if self.load_balance is not None and self.load_balance.is_on:
            probability_BTE = score_BTE
            if self.scores_by == "sigmoid":
                # Sigmoids do not add up to 1 by themselves; the loss is defined on shares.
                probability_BTE = score_BTE / score_BTE.sum(-1, keepdim=True)
            x_BTD = self.load_balance(
                x_BTD, self.imbalance(self.load_balance, probability_BTE, index_BTK)
            )
        if self.z_loss is not None and self.z_loss.is_on:
            x_BTD = self.z_loss(x_BTD, logits_BTE.logsumexp(-1).square())  # Zoph et al. 2022
        return x_BTD, weight_BTK, index_BTK

    def choose(self, score_BTE: Tensor) -> Tensor:
        """Return the experts of each token, in ascending order [B,T,K], by the sum of score and
        bias, among those of the groups whose two best have the largest sums (DeepSeek-V3, section
        2.1.2)."""
        if self.bias is not None:
            score_BTE = score_BTE + self.bias.detach()
        num_groups, allowed = self.groups
        if allowed < num_groups:
            # [B, T, G groups, M experts of each]: experts of a group are neighbours.
            score_BTGM = score_BTE.unflatten(-1, (num_groups, -1))
            # A group of one expert has no second best.
            best = min(2, score_BTGM.shape[-1])
            chosen = top_k(score_BTGM.sort(-1, descending=True).values[..., :best].sum(-1), allowed)
            is_allowed = torch.zeros(score_BTGM.shape[:-1], dtype=torch.bool, device=chosen.device)
            is_allowed.scatter_(-1, chosen, True)
            # -inf and not 0: with a bias a score may be below 0.
            score_BTE = score_BTGM.masked_fill(~is_allowed[..., None], -torch.inf).flatten(-2)
        return top_k(score_BTE, self.experts_per_token)

    @staticmethod
    def imbalance(loss: LayerLoss, probability_BTE: Tensor, index_BTK: Tensor) -> Tensor:
        """Return the sequence-wise load-balancing loss of each row [B] (DeepSeek-V3, section
        2.1.2): E·Σₑ fₑ·Pₑ, with fₑ the share of visits that expert e has and Pₑ its mean
        probability. 1 in balance."""
        num_experts, k = probability_BTE.shape[-1], index_BTK.shape[-1]
        # A count, without a gradient: the loss moves probabilities only.
        visits_BTE = torch.zeros_like(probability_BTE).scatter_(-1, index_BTK, 1.0)
        # Both sums go over the whole row before they are multiplied, whatever part of it is here:
        # one message.
        visits_BE, total_BE = loss.row_sum(torch.cat((visits_BTE, probability_BTE), -1)).chunk(
            2, -1
        )
        num_visits_B = visits_BE.sum(-1)
        # fₑ = visits / all visits; Pₑ = total / tokens, and tokens = all visits / k: hence k and
        # the square.
        return num_experts * k * (visits_BE * total_BE).sum(-1) / num_visits_B.square()


class _Count(Function):
    """Pass hidden states on. In the backward pass, which a step has once for every token, the bias
    gets as its gradient how many more tokens each expert has than the mean, times the number of
    experts."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, bias_E: Tensor, index_BTK: Tensor) -> Tensor:
        ctx.save_for_backward(index_BTK)
        ctx.num_experts = len(bias_E)
        return x_BTD.view_as(x_BTD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        # A frozen bias, as under LoRA.
        if not ctx.needs_input_grad[1]:
            return grad, None, None
        (index_BTK,) = ctx.saved_tensors
        # Times the number of experts, so that all of it are whole numbers.
        beyond_E = count_rows(index_BTK, ctx.num_experts) * ctx.num_experts - index_BTK.numel()
        return grad, beyond_E.float(), None


class GroupedLinear(nn.Module):
    """A stack of matrices [E, out, in], each multiplied with the rows of one expert."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None

    def forward(self, x: Tensor, groups: Groups, gather: bool = False) -> Tensor:
        """Return [N,O]. `x` are rows sorted by expert [N,I]; with `gather`, tokens [B,T,I], each of
        which has a row at each of its experts."""
        out_NO = grouped_linear(x, self.weight, groups, gather)
        return out_NO if self.bias is None else add_biases(out_NO, self.bias, groups.counts)


class Experts(nn.Module):
    """Gated MLPs, each on a fused gate and up projection, of which a token visits those that are
    chosen for it."""

    def __init__(self, config: RoutedConfig):
        super().__init__()
        experts, hidden, inner = config.num_experts, config.hidden_size, config.expert_inner
        self.gate_up = GroupedLinear(experts, hidden, 2 * inner, config.HAS_BIASES)
        self.down = GroupedLinear(experts, inner, hidden, config.HAS_BIASES)
        self.gate = config.expert_gate

    def forward(
        self,
        x_BTD: Tensor,
        weight_BTK: Tensor,
        index_BTK: Tensor,
        beside: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Return each token's sum of its experts `index`, weighted by `weight`: [B,T,D]. What
        `beside` computes is added, while rows travel where experts are on several ranks."""
        groups = group_by_expert(index_BTK, self.down.weight.shape[0])
        gate_up_NI = self.gate_up(x_BTD, groups, gather=True)
        out_BTD = unpermute(self.activation_and_down_proj(gate_up_NI, groups), weight_BTK, groups)
        return out_BTD + beside() if beside else out_BTD

    def activation_and_down_proj(self, gate_up_NI: Tensor, groups: Groups) -> Tensor:
        """Apply the activation and the down projection; recomputed as one under `train.recompute:
        selective`."""
        return self.down(self.gate(gate_up_NI), groups)


class SparseMLP(nn.Module):
    """A router and its experts, in the place of a dense MLP, and in some families experts beside
    them that every token visits."""

    def __init__(self, config: RoutedConfig):
        super().__init__()
        self.router, self.experts = Router(config), Experts(config)
        self.shared = MLP(config, config.shared_inner) if config.shared_inner else None
        self.shared_gate = (
            nn.Linear(config.hidden_size, 1, bias=False) if config.gates_shared else None
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        # x goes through the router, which attaches its losses to it; the shared experts take the
        # plain one.
        routed = self.router(x_BTD)
        # A function and not its result: it is computed while rows travel.
        return self.experts(
            *routed, None if self.shared is None else partial(self.visit_shared, x_BTD)
        )

    def visit_shared(self, x_BTD: Tensor) -> Tensor:
        """Return the sum of the experts that every token visits, [B,T,D]."""
        assert self.shared is not None
        shared_BTD = self.shared(x_BTD)
        return (
            shared_BTD
            if self.shared_gate is None
            else self.shared_gate(x_BTD).sigmoid() * shared_BTD
        )


class RoutedLayer(Layer):
    """Pre-norm layer with experts in the place of the MLP."""

    def __init__(self, config: RoutedConfig, attention: nn.Module):
        super().__init__(config, attention)
        # In place of the dense MLP that the base has made, which took no memory on the meta device.
        self.mlp = SparseMLP(config)


def shared_rows(config: RoutedConfig, hf: str) -> tuple[Weight, ...]:
    """Return the rows of the experts that every token visits, which Hugging Face calls `hf`."""
    gate = Weight(
        "mlp.shared_gate.weight", (1, config.hidden_size), (f"{hf}_gate.weight",), init=config.init_std,
        partial_grad="sequence",
    )  # fmt: skip
    rows = mlp_rows(config, inner=config.shared_inner, name="mlp.shared", hf=hf)
    return (*rows, gate) if config.gates_shared else rows


def expert_rows(
    config: RoutedConfig,
    block: str = "mlp",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
) -> tuple[Weight, ...]:
    """Return the rows of a router and its experts. `block` is what Hugging Face calls both, `gate`,
    `up` and `down` the projections of an expert."""
    experts, hidden, inner = config.num_experts, config.hidden_size, config.expert_inner
    # For FLOPs: a token is multiplied with this share of all experts' weights.
    used = config.experts_per_token / experts

    # In the order of the rows: an expert's gate and up, then those of the next.
    def names(*modules: str) -> tuple[str, ...]:
        return tuple(
            f"{block}.experts.{e}.{module}.weight" for e in range(experts) for module in modules
        )

    # Files of the hub have a tensor for each expert, and so does what transformers 5 saves. In its
    # modules, and where it is told to save these as they are, one tensor holds all.
    bias = Weight(
        "mlp.router.bias", (experts,), (f"{block}.gate.e_score_correction_bias",), init="zeros", decay=False,
        by_counts=True, partial_grad="sequence",
    )  # fmt: skip
    return (
        # Replicated, and used on the tokens that a rank has between blocks.
        Weight(
            "mlp.router.weight", (experts, hidden), (f"{block}.gate.weight",), init=config.init_std,
            partial_grad="sequence", one_hf="mlp.gate.weight",
        ),
        *([] if config.bias_rate is None else [bias]),
        Weight(
            "mlp.experts.gate_up.weight", (experts, 2 * inner, hidden), names(gate, up), "column", (inner, inner),
            stack=1, used=used, init=config.init_std, one_hf="mlp.experts.gate_up_proj",
        ),
        Weight(
            "mlp.experts.down.weight", (experts, hidden, inner), names(down), "row", stack=1, used=used,
            init=residual_std(config), one_hf="mlp.experts.down_proj",
        ),
    )  # fmt: skip


ROUTED: Keys = LIKE_LLAMA.but(
    used={
        "num_local_experts": None,
        "num_experts": None,
        "router_aux_loss_coef": 0.001,
    },
    output_router_logits="what transformers returns beside the logits, and adds to its own loss",
)
"""Keys of families with a mixture of experts."""


AMONG: Keys = ROUTED.but(
    used={
        "moe_intermediate_size": REQUIRED,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    },
)
"""Keys of families whose layers with experts may be among dense ones."""


def among_to_hf(config: Among) -> dict[str, Any]:
    """Return the keys of config.json that families with dense layers among those with experts
    share."""
    return routed_to_hf(config) | {
        "num_experts": config.num_experts,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": config.decoder_sparse_step,
        "mlp_only_layers": list(config.mlp_only_layers),
    }


def among_from_hf(hf: dict[str, Any], usual: int) -> dict[str, Any]:
    """Return the fields that families with dense layers among those with experts share. `usual` is
    transformers' default for the number of experts."""
    return routed_from_hf(hf, "num_experts", "num_local_experts", usual=usual) | {
        "moe_intermediate_size": hf["moe_intermediate_size"],
        "norm_topk_prob": hf["norm_topk_prob"],
        "decoder_sparse_step": hf["decoder_sparse_step"],
        "mlp_only_layers": hf["mlp_only_layers"] or (),
    }


def routed_to_hf(config: RoutedConfig) -> dict[str, Any]:
    """Return the keys of config.json that all families with experts share, but for the name of
    their number."""
    return {
        "num_experts_per_tok": config.experts_per_token,
        "router_aux_loss_coef": config.router_aux_loss_coef,
    }


def routed_from_hf(hf: dict[str, Any], *names: str, usual: int) -> dict[str, Any]:
    """Return the fields of the `model:` section that all families with experts share. `names` are
    those of the number of experts, `usual` is transformers' default for it."""
    return {
        "num_experts": agreed(hf, *names, default=usual),
        "experts_per_token": hf["num_experts_per_tok"],
        "router_aux_loss_coef": hf["router_aux_loss_coef"],
    }
