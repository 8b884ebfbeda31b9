"""A package that adds to megalite what it does not have: a family, an optimizer, a kernel, a hook,
an objective, a schedule.

The family is a Llama whose feed-forward part is a few experts that every token visits, each
weighted by a router. It has what a dense family has not: a replicated linear module, a parameter of
a module's own that is cut over the tensor ranks, and stacks of matrices, one stored as a tensor for
each expert and one as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from megalite.comm.mesh import Mesh
from megalite.config import Config, HookConfig, ObjectiveConfig, OptimizerConfig, ScheduleConfig
from megalite.engine.optimizers import Optimizer, PlainOptimizer, Shard
from megalite.models.architecture import ExpertsSpec
from megalite.models.hf import REQUIRED
from megalite.models.layer_loss import LayerLoss
from megalite.models.llama import (
    LIKE_LLAMA,
    Attention,
    Layer,
    Llama,
    LlamaLike,
    fields_from_hf,
    fields_to_hf,
    layer_table,
    residual_std,
    table,
)
from megalite.models.weights import Weight
from megalite.parallel.rules import Layout, rule
from megalite.parallel.stage import Inputs
from megalite.parallel.tensor import enter, leave
from megalite.registry import families, hooks, kernels, objectives, optimizers, schedules
from megalite.training.hooks import Hook, Step
from megalite.training.objectives import NextToken, Objective
from megalite.training.parts import RankModel
from megalite.training.run import Run

# --- a family -------------------------------------------------------------------------------------


class BlendConfig(LlamaLike):
    family: Literal["blend"] = "blend"
    num_experts: int = Field(4, gt=0)
    balance: float = Field(
        0.01, description="Weight of the loss that has each row visit all experts alike."
    )
    router_z: float = Field(
        0.001, description="Weight of the loss that keeps the router's scores small."
    )

    def feed_forward(self, layer: int) -> ExpertsSpec:
        return ExpertsSpec(
            inner=self.intermediate_size, gated=False, activation="silu", num_experts=self.num_experts,
            experts_per_token=self.num_experts,
        )  # fmt: skip


class Experts(nn.Module):
    """Every expert's feed-forward part, weighted by the router: Σₑ pₑ · Wdownₑ (scale · silu(Wupₑ
    x))."""

    def __init__(self, config: BlendConfig):
        super().__init__()
        experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.router = nn.Linear(hidden, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, inner, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, inner))
        self.scale = nn.Parameter(torch.empty(inner))
        self.balance = LayerLoss("balance", config.balance)
        self.router_z = LayerLoss("router_z", config.router_z)

    def forward(self, x: Tensor) -> Tensor:
        return self.blend(*self.route(x))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x`, with the router's losses attached, and each expert's share of each token,
        [B,T,E]."""
        scores_BTE = self.router(x)
        weight_BTE = scores_BTE.softmax(-1)
        first_BTE = F.one_hot(weight_BTE.argmax(-1), weight_BTE.shape[-1])
        length_B = self.balance.row_sum(torch.ones_like(x[..., 0]))
        product_BE = self.balance.row_sum(first_BTE) * self.balance.row_sum(weight_BTE)
        x = self.balance(x, weight_BTE.shape[-1] * product_BE.sum(-1) / length_B.square())
        return self.router_z(x, scores_BTE.logsumexp(-1).square()), weight_BTE

    def blend(self, x: Tensor, weight_BTE: Tensor) -> Tensor:
        inner = F.silu(torch.einsum("btd,eid->btei", x, self.up)) * self.scale
        return torch.einsum("btei,edi,bte->btd", inner, self.down, weight_BTE)


class ParallelExperts(Experts):
    """Holds some of each expert's inner features. The router is on every rank."""

    def __init__(self, experts: Experts, layout: Layout):
        nn.Module.__init__(self)
        self.axis, self.sequence, self.router = layout.tensor, layout.sequence, experts.router
        self.balance, self.router_z = experts.balance, experts.router_z
        for name in ("up", "down", "scale"):
            setattr(self, name, layout.locals[getattr(experts, name)])

    def forward(self, x: Tensor) -> Tensor:
        whole_x, whole_weight = (enter(part, self.axis, self.sequence) for part in self.route(x))
        return leave(self.blend(whole_x, whole_weight), self.axis, self.sequence)


class BlendLayer(Layer):
    def __init__(self, config: BlendConfig, attention: Attention):
        super().__init__(config, attention)
        self.mlp = Experts(config)


class Blend(Llama):
    def layer(self, number: int) -> nn.Module:
        return BlendLayer(self.config, Attention(self.config, number))  # type: ignore[arg-type]


def weights(config: BlendConfig) -> Iterator[Weight]:
    experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    ups = tuple(f"mlp.experts.{expert}.up.weight" for expert in range(experts))
    mlp = (
        Weight(
            "mlp.router.weight", (experts, hidden), ("mlp.router.weight",), init=config.init_std,
            partial_grad="sequence",
        ),
        Weight("mlp.up", (experts, inner, hidden), ups, "column", stack=1, init=config.init_std),
        Weight("mlp.down", (experts, hidden, inner), ("mlp.down",), "row", stack=1, init=residual_std(config)),
        Weight("mlp.scale", (inner,), ("mlp.scale",), "column", init="ones", decay=False),
    )  # fmt: skip
    yield from table(config, layer_table(config, mlp=mlp))


class BlendFamily:
    MODEL, CONFIG = Blend, BlendConfig
    KEYS = LIKE_LLAMA.but(used={"num_experts": REQUIRED})
    weights = staticmethod(weights)

    @staticmethod
    def to_hf(config: BlendConfig) -> dict[str, Any]:
        return fields_to_hf(config, "BlendForCausalLM") | {"num_experts": config.num_experts}

    @staticmethod
    def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
        return fields_from_hf(hf, BlendConfig) | {"num_experts": hf["num_experts"]}


families.register("blend", BlendFamily)


@rule(Experts)
def _(experts: Experts, layout: Layout) -> nn.Module | None:
    return ParallelExperts(experts, layout) if layout.tensor.size > 1 else None


# --- an optimizer ---------------------------------------------------------------------------------


@optimizers.register("signum")
class SignumConfig(OptimizerConfig):
    """Signum (Bernstein et al. 2018): the sign of a mean of gradients."""

    name: Literal["signum"] = "signum"
    beta: float = Field(0.9, ge=0, lt=1)

    STATES: ClassVar[tuple[str, ...]] = ("momentum",)

    def build(self) -> Optimizer:
        return Signum(self.beta)


class Signum(PlainOptimizer):
    def __init__(self, beta: float):
        self.beta = beta

    def compute(self, shard: Shard, num_updates: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        momentum = shard.states["momentum"].lerp(shard.grad, 1 - self.beta)
        value = shard.master * (1 - shard.lr * shard.weight_decay) - shard.lr * momentum.sign()
        return value, {"momentum": momentum}


# --- a kernel -------------------------------------------------------------------------------------


class Norm:
    """What `kernels.norm: demo` computes."""

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float, unit: float) -> Tensor:
        wide = x.float()
        return (
            wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight + unit)
        ).to(x.dtype)


kernels.register("norm.demo", Norm)


# --- a hook ---------------------------------------------------------------------------------------


@hooks.register("norms")
class NormsConfig(HookConfig):
    """Logs the largest gradient norm of all steps so far, and says it every so many steps."""

    name: Literal["norms"] = "norms"
    every: int = Field(10, gt=0)

    def build(self, run: Run, parts: RankModel) -> Hook:
        return Norms(run, self.every)


class Norms(Hook):
    def __init__(self, run: Run, every: int):
        self.run, self.every, self.steps, self.largest = (
            run,
            every,
            0,
            torch.zeros((), device=run.mesh.device),
        )

    def after_update(self, step: Step) -> None:
        norm = step.record["grad_norm"]
        assert isinstance(norm, Tensor)
        self.steps, self.largest = self.steps + 1, torch.maximum(self.largest, norm)
        step.record["largest_grad_norm"] = self.largest

    def is_due(self, step: Step) -> bool:
        return self.run.due(step.number, self.every)

    def act(self, step: Step) -> None:
        if self in step.due:
            self.run.say(f"largest gradient norm of {self.steps} steps: {self.largest.item():.3f}")

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "largest": self.largest.item()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
        self.largest.fill_(state["largest"])


# --- an objective and a schedule ------------------------------------------------------------------


@objectives.register("focal")
class FocalConfig(ObjectiveConfig):
    """Focal loss (Lin et al. 2017): tokens that are easy count less."""

    name: Literal["focal"] = "focal"
    gamma: float = Field(1.0, ge=0)

    def build(self, config: Config, mesh: Mesh) -> Objective:
        return Focal(self.gamma)


class Focal(NextToken):
    def __init__(self, gamma: float):
        self.gamma = gamma

    def measure(self, losses_BT: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        hardness_BT = (1 - torch.exp(-losses_BT)).pow(self.gamma)
        return super().measure(hardness_BT * losses_BT, inputs)


@schedules.register("rsqrt")
class InverseSquareRoot(ScheduleConfig):
    """1 / √step after the warmup (Vaswani et al. 2017)."""

    name: Literal["rsqrt"] = "rsqrt"

    def after_warmup(self, step: int, num_steps: int, peak: float) -> float:
        return max(self.min_lr, peak * math.sqrt(max(self.warmup(num_steps), 1) / step))
