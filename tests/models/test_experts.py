"""A mixture of experts on one device: routing, tokens grouped by expert, and the load-balancing
loss, each against a statement of its own. Layouts: tests/parallel; transformers:
test_families.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalite.config import LoraConfig
from megalite.engine.optimizers import Shard
from megalite.engine.optimizers.by_counts import ByCounts
from megalite.errors import ConfigError
from megalite.kernels.experts import (
    accumulate_grouped_weight_gradient,
    group_by_expert,
    grouped_linear,
    router_logits,
    top_k,
    unpermute,
)
from megalite.models import model_config, weight_table
from megalite.models.experts import RoutedConfig, Router, SparseMLP
from megalite.models.lora import adapters_of

MOE: dict[str, Any] = {
    "family": "qwen3_moe", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_layers": 3,
    "num_attention_heads": 4, "max_positions": 64, "moe_intermediate_size": 24, "num_experts": 5,
    "experts_per_token": 2,
}  # fmt: skip


def config_of(**fields: Any) -> RoutedConfig:
    config = model_config(fields if "family" in fields else MOE | fields)
    assert isinstance(config, RoutedConfig)
    return config


def randomized(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return module


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Experts of each of six tokens: all are visited; two are not; one has every token.
VISITS = {
    "all": [[0, 1], [1, 4], [2, 3], [0, 4], [0, 2], [1, 3]],
    "some": [[1, 2], [1, 4], [1, 4], [2, 4], [2, 4], [1, 2]],
    "one": [[2]] * 6,
}


@pytest.mark.parametrize("visits", VISITS)
@pytest.mark.parametrize("by_callback", [False, True])
def test_grouped_rows_give_what_each_token_computes_alone(visits: str, by_callback: bool) -> None:
    index = torch.tensor(VISITS[visits]).view(2, 3, -1)
    x, weight, matrices = draw(2, 3, 8), draw(*index.shape, seed=2), draw(5, 4, 8, seed=3)
    upstream, summed = draw(2, 3, 4, seed=4), draw(5, 4, 8, seed=5)

    def theirs(x: Tensor, weight: Tensor, matrices: Tensor) -> Tensor:
        every = torch.einsum("btd,eod->bteo", x, matrices)
        return (every.gather(2, index[..., None].expand(*index.shape, 4)) * weight[..., None]).sum(
            2
        )

    wide = [tensor.double().requires_grad_() for tensor in (x, weight, matrices)]
    wanted = theirs(*wide)
    wanted_grads = torch.autograd.grad(wanted, wide, upstream.double())

    mine = [tensor.clone().requires_grad_() for tensor in (x, weight, matrices)]
    sum_of = summed.clone() if by_callback else torch.zeros_like(summed)

    def add(parameter: Tensor, grad: Tensor, rows: Tensor, counts: Any) -> None:
        assert parameter is mine[2]
        accumulate_grouped_weight_gradient(sum_of, grad, rows, counts, add=True)

    groups = group_by_expert(index, 5)
    rows = grouped_linear(mine[0], mine[2], groups, True, add if by_callback else None)
    found = unpermute(rows, mine[1], groups)
    found.backward(upstream)
    grads = [mine[0].grad, mine[1].grad, sum_of - summed if by_callback else mine[2].grad]
    assert (mine[2].grad is None) == by_callback
    # fp32 sums of at most six products near 1.
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert grad is not None
        torch.testing.assert_close(grad.double(), wanted_grad, rtol=0, atol=4e-6)
    overwritten = torch.full_like(summed, torch.nan)
    accumulate_grouped_weight_gradient(overwritten, draw(index.numel(), 4), rows.new_ones(index.numel(), 8),
                                       groups.counts, add=False)  # fmt: skip
    assert [bool((matrix == 0).all()) for matrix in overwritten] == [
        count == 0 for count in groups.counts.on_host
    ]


def test_among_equal_scores_the_lower_expert_is_chosen() -> None:
    assert top_k(torch.tensor([[0.2, 0.3, 0.3, 0.2], [0.25] * 4, [0.0, 0.1, 0.9, 0.1]]), 2).tolist() == [
        [1, 2], [0, 1], [1, 2],
    ]  # fmt: skip
    assert top_k(torch.zeros(64, 200), 3).unique(dim=0).tolist() == [[0, 1, 2]], (
        "sorts of other sizes, too"
    )


def test_a_token_is_routed_and_summed_alike_whatever_it_is_grouped_with() -> None:
    """To the bit: products of one row and of many differ in torch."""
    x, weight = draw(200, 768), draw(16, 768, seed=2)
    logits = router_logits(x, weight)[1]
    for some in (slice(7, 8), slice(7, 10), slice(3, 40)):
        assert torch.equal(router_logits(x[some], weight)[1], logits[some])
    index, share = top_k(logits, 3), draw(200, 3, seed=3)
    contributions = draw(200, 3, 8, seed=4)

    def summed(tokens: Tensor) -> Tensor:
        groups = group_by_expert(index[tokens], 16)
        rows = torch.empty(len(tokens) * 3, 8)
        rows[groups.row_TK] = contributions[tokens]
        return unpermute(rows, share[tokens], groups)

    mixed = torch.randperm(200, generator=torch.Generator().manual_seed(5))
    assert torch.equal(summed(mixed), summed(torch.arange(200))[mixed])


@pytest.mark.parametrize("renormalize", [False, True])
def test_a_router_weighs_experts_by_their_probabilities(renormalize: bool) -> None:
    router = randomized(Router(config_of(norm_topk_prob=renormalize)))
    x = draw(2, 9, 32)
    _, weight, index = router(x)
    probability = F.linear(x, router.weight).softmax(-1)
    best = probability.topk(2)
    assert torch.equal(index, best.indices.sort(-1).values)
    wanted = probability.gather(-1, index)
    wanted = wanted / wanted.sum(-1, keepdim=True) if renormalize else wanted
    torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-6)  # probabilities, at most 1


def test_the_router_computes_in_fp32_in_a_bf16_model() -> None:
    block = randomized(SparseMLP(config_of())).bfloat16()
    x = draw(2, 9, 32).bfloat16()
    _, weight, _ = block.router(x)
    exact = (x.double() @ block.router.weight.double().T).softmax(-1).topk(2).values.sum(-1)
    assert weight.dtype == torch.float32
    assert (weight.sum(-1) - exact).abs().max().item() < 1e-6  # bf16 logits would be off by 1e-3
    assert block(x).dtype == torch.bfloat16


def balance_of(probability_BTE: Tensor, k: int) -> Tensor:
    """Sequence-wise balance loss as DeepSeek-V3 states it (equations 17 to 20), row by row."""
    _, length, num_experts = probability_BTE.shape
    rows = []
    for probability_TE in probability_BTE:
        chosen_TK = probability_TE.topk(k).indices
        f_E = torch.stack(
            [(chosen_TK == e).sum() * num_experts / (k * length) for e in range(num_experts)]
        )
        rows.append((f_E * probability_TE.mean(0)).sum())
    return torch.stack(rows)


def test_the_balance_loss_is_that_of_each_sequence() -> None:
    router = randomized(Router(config_of(router_aux_loss_coef=0.5)))
    loss = router.load_balance
    x = draw(3, 9, 32)
    probability = F.linear(x, router.weight).softmax(-1)
    loss.begin(27, 3, torch.tensor(2.0))
    out = router(x.requires_grad_())[0]
    out.backward(torch.zeros_like(out))
    wanted = balance_of(probability, 2)
    assert wanted.min() > 1.02, "routed unevenly"
    assert loss.mean.item() == pytest.approx(wanted.mean().item(), rel=1e-6)
    (grad,) = torch.autograd.grad(wanted.mean(), router.weight)
    # The engine's gradient times the coefficient is 1; fp32 sums over 27 tokens.
    torch.testing.assert_close(router.weight.grad, grad, rtol=1e-4, atol=1e-6)


DEEPSEEK: dict[str, Any] = {
    "family": "deepseek_v3", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_layers": 2,
    "num_attention_heads": 4, "max_positions": 64, "moe_intermediate_size": 24, "num_experts": 6,
    "experts_per_token": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip


def test_a_selection_bias_counts_each_token_once() -> None:
    """Also where the forward pass is computed twice, and in no evaluation."""
    router = randomized(Router(config_of(**DEEPSEEK)))
    assert router.bias is not None
    x = draw(3, 9, 32).requires_grad_()
    for _ in range(2):
        out, _, index = checkpoint(router, x, use_reentrant=False)
        out.sum().backward()
    counts = torch.stack([(index == expert).sum() for expert in range(6)])
    assert torch.equal(router.bias.grad, 2 * (6 * counts - 3 * 9 * 2).float())
    with torch.no_grad():
        router(x)
    biased = x.detach() @ router.weight.T
    _, weight, index = router(x)
    assert torch.equal(index, (biased.sigmoid() + router.bias).topk(2).indices.sort(-1).values)
    scores = biased.sigmoid().gather(-1, index)
    torch.testing.assert_close(weight, scores / scores.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("refused", [False, True])
def test_a_step_moves_biases_towards_balance(refused: bool) -> None:
    bias, beyond = torch.tensor([0.5, 0.0, -0.5]), torch.tensor([7.0, 0.0, -3.0])
    by_counts = ByCounts(0.01)
    common = by_counts.begin_step(torch.tensor(0.0 if refused else 3.0), torch.ones(()))
    by_counts.update_(Shard(bias, None, beyond, {}, lr=9.0, weight_decay=9.0), common)
    assert bias.tolist() == pytest.approx([0.5, 0.0, -0.5] if refused else [0.49, 0.0, -0.49])


def test_groups_limit_where_a_token_goes() -> None:
    """Its experts are in the groups whose two best have the largest sums, also where all scores are
    negative."""
    router = Router(
        config_of(
            **DEEPSEEK | {"num_experts": 8, "n_group": 4, "topk_group": 2, "experts_per_token": 3}
        )
    )
    with torch.no_grad():
        router.bias.zero_()
    score = draw(5, 7, 8) - 5
    index = router.choose(score)
    for token in range(35):
        values = score.view(35, 4, 2)[token]
        groups = values.sum(-1).topk(2).indices
        allowed = torch.full((4, 2), -torch.inf)
        allowed[groups] = values[groups]
        assert index.view(35, 3)[token].tolist() == sorted(
            allowed.flatten().topk(3).indices.tolist()
        )


def test_the_z_loss_is_that_of_each_token() -> None:
    router = randomized(Router(config_of(router_aux_loss_coef=0, router_z_loss_coef=0.5)))
    x = draw(3, 9, 32)
    router.z_loss.begin(27, 3, torch.tensor(2.0))
    out = router(x.requires_grad_())[0]
    out.backward(torch.zeros_like(out))
    wanted = torch.logsumexp(F.linear(x, router.weight).double(), -1).square().mean()
    assert router.z_loss.mean.item() == pytest.approx(wanted.item(), rel=1e-6)
    (grad,) = torch.autograd.grad(wanted, router.weight)
    torch.testing.assert_close(router.weight.grad, grad, rtol=1e-4, atol=1e-6)


def test_the_balance_loss_is_1_in_balance_and_off_in_evaluation() -> None:
    router = Router(config_of())
    loss, probability = router.load_balance, torch.full((2, 5, 5), 0.2)
    assert loss is not None
    index = torch.tensor([[e, (e + 1) % 5] for e in range(5)]).expand(2, 5, 2)
    assert Router.imbalance(loss, probability, index).tolist() == pytest.approx([1.0, 1.0])
    randomized(router)
    loss.begin(18, 2, torch.tensor(1.0))
    x = draw(2, 9, 32).requires_grad_()
    same = router.eval()(x)[0]
    assert torch.equal(same, x)
    assert same.grad_fn is not None
    assert "RouterLogits" in same.grad_fn.name(), "no loss is attached"
    assert router.train()(x)[0] is not x
    assert Router(config_of(router_aux_loss_coef=0)).load_balance is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"load_balancing": "micro_batch"},
            "load_balancing.*'micro_batch' would depend on how many micro-batches",
        ),
        ({"load_balancing": "sequense"}, "load_balancing.*sequence"),
        ({"experts_per_token": 6}, "experts_per_token 6 must not be more than num_experts 5"),
        (
            {"mlp_only_layers": [3]},
            "mlp_only_layers names layer 3; the 3 layers have the numbers 0 to 2",
        ),
        ({"num_experts": 1, "experts_per_token": 1}, "num_experts = 1: should be greater than 1"),
    ],
)
def test_settings_that_make_no_mixture_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(**fields)


def test_which_layers_have_experts() -> None:
    def routed(**fields: Any) -> list[int]:
        config = config_of(num_layers=6, **fields)
        return [layer for layer in range(6) if config.is_routed(layer)]

    assert routed() == [0, 1, 2, 3, 4, 5]
    assert routed(decoder_sparse_step=2) == [1, 3, 5]
    assert routed(decoder_sparse_step=2, mlp_only_layers=[3, 0]) == [1, 5]


@pytest.mark.parametrize("target", ["all-linear", "gate_proj", "mlp.experts.1.down_proj"])
def test_adapters_of_experts_are_refused(target: str) -> None:
    """PEFT adapts experts by names that a dense layer among them has, too."""
    weights = weight_table(config_of(mlp_only_layers=[0]))
    with pytest.raises(ConfigError, match=f"lora.targets: '{target}' means experts, too"):
        adapters_of(weights, LoraConfig(rank=2, targets=("q_proj", target)))
    assert len(adapters_of(weights, LoraConfig(rank=2, targets=("q_proj", "o_proj")))) == 6
