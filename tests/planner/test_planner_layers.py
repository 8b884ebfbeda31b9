"""Layers that are not alike: each is counted as what it is, in FLOPs, memory and time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import pytest

from megalite.config import Config
from megalite.config_file import parse_config
from megalite.errors import ConfigError
from megalite.models.architecture import ExpertsSpec, FeedForwardSpec, MixerSpec
from megalite.models.llama import LlamaLike, layer_table, table
from megalite.models.weights import Weight
from megalite.observe.throughput import model_flops_per_token
from megalite.plan import make_plan, plan, plan_of_sizes
from megalite.planner.activations import layer_bytes
from megalite.planner.estimate import Outlook
from megalite.planner.hardware import find_hardware
from megalite.planner.search import search
from megalite.planner.shapes import Matrix, ModelTable
from megalite.planner.sizes import together
from megalite.registry import families

HIDDEN, INNER, LAYERS, LENGTH, VOCAB = 256, 512, 4, 1024, 1000
EXPERTS, VISITED, SHARED = 8, 2, 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_layers": LAYERS,
    "num_attention_heads": 8, "max_positions": LENGTH,
}  # fmt: skip
ODD = (1, 3)


class SparseConfig(LlamaLike):
    """Llama whose odd layers have eight experts, of which a token visits two, and one that is
    shared."""

    family: Literal["sparse"] = "sparse"
    num_experts: int = EXPERTS
    by_expert: bool = False

    MIXERS: ClassVar[dict[int, MixerSpec]] = {}
    SHARED: ClassVar[int] = SHARED

    def mixer(self, layer: int) -> MixerSpec:
        return self.MIXERS.get(layer) or super().mixer(layer)

    def feed_forward(self, layer: int) -> FeedForwardSpec:
        if layer not in ODD:
            return super().feed_forward(layer)
        return ExpertsSpec(
            inner=INNER,
            gated=True,
            activation="silu",
            num_experts=self.num_experts,
            experts_per_token=VISITED,
            shared_inner=self.SHARED,
        )


class Sparse:
    CONFIG = SparseConfig

    @staticmethod
    def weights(config: SparseConfig) -> Iterator[Weight]:
        count, cut = (
            config.num_experts,
            ("expert", "expert") if config.by_expert else ("column", "row"),
        )
        share = VISITED / count
        experts = (
            Weight("mlp.router.weight", (count, HIDDEN), ("r",)),
            Weight("mlp.up", (count, 2 * INNER, HIDDEN), ("u",), cut[0], stack=1, used=share),
            Weight("mlp.down", (count, HIDDEN, INNER), ("d",), cut[1], stack=1, used=share),
            Weight("mlp.shared_up", (2 * SHARED, HIDDEN), ("su",), "column", (SHARED, SHARED)),
            Weight("mlp.shared_down", (HIDDEN, SHARED), ("sd",), "row"),
        )
        dense, sparse = (
            tuple(table(config, layer_table(config, mlp=mlp))) for mlp in (None, experts)
        )
        for place in ("first", *range(config.num_layers), "last"):
            yield from (row for row in (sparse if place in ODD else dense) if row.place == place)


@pytest.fixture(autouse=True)
def sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families._found, "sparse", Sparse)  # type: ignore[arg-type]


def config_of(family: str, *overrides: str, **model: Any) -> Config:
    values = {
        "run": {"name": "test"},
        "model": SIZES | {"family": family} | model,
        "data": {"train": [{"path": "x"}], "seq_length": LENGTH},
        "train": {"steps": 1, "global_batch_size": 8, "micro_batch_size": 1},
        "optimizer": {"lr": 1e-3},
    }
    return parse_config(values, overrides)


def outlook_of(config: Config, ranks: int = 1) -> Outlook:
    return Outlook(config, plan(config, ranks), find_hardware("h100"), ModelTable(config))


def test_a_token_is_multiplied_with_the_experts_it_visits() -> None:
    """Beside what a dense layer has, an odd one has a router, the second expert that is visited,
    and a shared one."""
    more = EXPERTS * HIDDEN + (VISITED - 1) * 3 * HIDDEN * INNER + 3 * HIDDEN * SHARED
    assert more == 493_568
    found, dense = (model_flops_per_token(config_of(family)) for family in ("sparse", "llama"))
    assert found - dense == 6 * 2 * more


def test_a_rank_holds_all_experts_and_computes_some() -> None:
    outlook = outlook_of(config_of("sparse"))
    dense, sparse = outlook.layers[:2]
    assert outlook.layers[2:] == (dense, sparse)
    attention = 4 * HIDDEN * HIDDEN + 2 * HIDDEN
    odd = attention + EXPERTS * (HIDDEN + 3 * HIDDEN * INNER) + 3 * HIDDEN * SHARED
    even = attention + 3 * HIDDEN * INNER
    assert outlook.sizes[0].layers == (even, odd, even, odd)
    stack = Matrix(
        2 * INNER, HIDDEN, gathers=True, reduces=False, count=EXPERTS, used=VISITED / EXPERTS
    )
    assert stack in sparse.matrices
    assert sparse.inner == VISITED * INNER + SHARED
    # What a layer keeps: the MLP's first product is of gate and up, its second one's input half of
    # that. Beside them the output of each expert, the fp32 probabilities of all, and of each visit
    # two places and a weight.
    kept = [layer_bytes(layer, "none").kept for layer in (dense, sparse)]
    routed = LENGTH * (VISITED * 2 * HIDDEN + EXPERTS * 4 + VISITED * (8 + 8 + 4))
    assert kept[1] - kept[0] == 3 * 2 * LENGTH * (sparse.inner - INNER) + routed
    # Each of eight experts multiplies a quarter of the tokens.
    product = outlook.kernels.product
    times = outlook.costs._product(stack)
    assert times.forward == EXPERTS * product(LENGTH // 4, 2 * INNER, HIDDEN)
    assert times.backward_weight == EXPERTS * product(2 * INNER, HIDDEN, LENGTH // 4)
    passes = [outlook.costs.layer(layer, "none").forward for layer in (dense, sparse)]
    ends = outlook.costs.embedding().forward + outlook.costs.head().forward
    assert outlook.work[0].forward == pytest.approx(2 * sum(passes) + ends)


# The way into a region and out of it: of attention, of the experts, and of the shared one.
@pytest.mark.parametrize("by_expert", [False, True])
def test_whole_experts_or_parts_of_each_on_a_tensor_rank(by_expert: bool) -> None:
    outlook = outlook_of(config_of("sparse", "parallel.tensor=2", by_expert=by_expert), 2)
    sparse = outlook.layers[1]
    assert [(matrix.gathers, matrix.reduces) for matrix in sparse.matrices] == [
        (True, False), (False, True), (False, False), (True, False), (False, True), (True, False), (False, True)
    ]  # fmt: skip
    router, up = sparse.matrices[2:4]
    assert (up.count, up.rows) == ((EXPERTS // 2, 2 * INNER) if by_expert else (EXPERTS, INNER))
    # The router is whole on either rank, and under sequence parallelism takes half of the tokens.
    assert outlook.costs._product(router).forward == outlook.kernels.product(
        LENGTH // 2, EXPERTS, HIDDEN
    )
    assert outlook.costs._product(router).tensor_bytes == 0.0
    # Three ways in, gathered in both passes and once more for the weight gradients, but for those
    # of the experts, which keep their input; and three ways out.
    one = LENGTH * HIDDEN * 2 / 2
    assert outlook.costs.layer(sparse, "none").tensor_bytes == (3 * (3 + 2) - 1) * one


def test_a_head_is_weighed_against_the_work_of_a_layer() -> None:
    """With idle experts for its work, a layer would outweigh the head, which stands for more than
    two."""
    for count in (EXPERTS, 8 * EXPERTS):
        config = config_of("sparse", "parallel.pipeline=2", vocab_size=12_000, num_experts=count)
        table = ModelTable(config).weights
        assert [span.stop for span in make_plan(config, table, 2).stages] == [3, 4]
        rows = together(table, config.optimizer)
        assert plan_of_sizes(config, rows, 2) == make_plan(config, table, 2)


def test_an_embedding_under_muon_is_one_owners_work() -> None:
    """Its Newton–Schulz steps are those of one matrix, which ranks cannot share."""
    muon, group = "optimizer.name=muon", "{match: model.embed_tokens.weight, optimizer: muon}"
    wide: dict[str, Any] = {"vocab_size": 64000}
    plain, grouped = (
        [outlook_of(config_of("llama", muon, *more, **wide), ranks) for ranks in (1, 8)]
        for more in ((), (f"optimizer.groups=[{group}]",))
    )
    kernels = plain[0].kernels
    # X · Xᵀ, its square, and the sum with X, of [256, 64000], five times.
    rows = (HIDDEN, HIDDEN, 64000), (HIDDEN, HIDDEN, HIDDEN), (HIDDEN, 64000, HIDDEN)
    alone = 5 * sum(kernels.product(*each) for each in rows)
    found = [some._whole_matrices_s for some in (*plain, *grouped)]
    assert found[2] - found[0] == pytest.approx(alone, rel=1e-3)
    assert found[3] - found[1] > alone / 2


def test_a_ring_waits_for_the_rank_that_has_whole_documents() -> None:
    packed = "parallel.context=2", "data.document_mask=true"
    even, uneven, alone = (
        outlook_of(config_of("llama", *some), 2).estimate().step_time_s
        for some in (packed, (*packed, "parallel.context_balance=sequence"), packed[:1])
    )
    assert uneven > even == alone


def test_every_other_layer_has_a_window() -> None:
    """On the CPU it keeps no mask, which megalite's kernel does not take; it has fewer products."""
    config = config_of("gemma2", sliding_window=256)
    local, whole, *_ = outlook_of(config).layers
    kept = [layer_bytes(layer, "none", on_gloo=True).kept for layer in (local, whole)]
    assert kept[0] == kept[1]
    width = 8 * 32
    assert model_flops_per_token(
        config_of("gemma2", sliding_window=LENGTH)
    ) - model_flops_per_token(config) == (12 * 2 * width * (LENGTH - 256))


def test_a_layer_that_rotates_nothing_takes_no_time_for_it() -> None:
    batch = ("train.micro_batch_size=64", "train.global_batch_size=64")
    outlook = outlook_of(config_of("smollm3", *batch, nope_layers=[1]))
    queries_keys = 64 * LENGTH * 2 * HIDDEN * 2
    times = [outlook.costs._elementwise(layer).forward for layer in outlook.layers[:2]]
    assert times[0] - times[1] == pytest.approx(outlook.kernels.memory(2 * queries_keys), rel=1e-6)


def test_what_a_family_describes_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseConfig, "SHARED", 0)
    told = r"'sparse' describes layer 1 as matrices of 262,144 .*mlp\.shared_up"
    with pytest.raises(ConfigError, match=told):
        outlook_of(config_of("sparse"))
    with pytest.raises(ConfigError, match=told):  # and not that no layout comes out even
        search(config_of("sparse"), 2, find_hardware("h100"))


class Recurrence(MixerSpec):
    def num_elements(self, hidden_size: int) -> int:
        return 4 * hidden_size**2

    def products(self, positions: int) -> int:
        return 7


def test_a_mixer_of_another_kind_has_flops_and_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = 12 * 256 * LENGTH
    before = model_flops_per_token(config_of("sparse"))
    monkeypatch.setattr(SparseConfig, "MIXERS", {2: Recurrence()})
    config = config_of("sparse")
    assert before - model_flops_per_token(config) == attention - 6 * 7
    with pytest.raises(
        ConfigError, match=r"layer 2 of model\.family = 'sparse' computes: its mixer is Recurrence"
    ):
        outlook_of(config)
    with pytest.raises(ConfigError, match=r"'sparse' needs parallel\.context: 1, not 2"):
        plan(config_of("sparse", "parallel.context=2"), 2)


def two_stacks(density: float = 0.15, *overrides: str) -> Config:
    return parse_config(
        {
            "run": {"name": "t5"}, "model": {"preset": "t5-small"},
            "objective": {"name": "span_corruption", "density": density},
            "data": {"train": [{"path": "x"}], "seq_length": 512, "tokenizer": "x"},
            "train": {"steps": 1, "global_batch_size": 8, "micro_batch_size": 8}, "optimizer": {"lr": 1e-3},
        },
        overrides,
    )  # fmt: skip


def test_each_stack_has_the_tokens_of_its_own_sequence() -> None:
    """And what makes keys and values of an encoder's states those of the encoder."""
    config = two_stacks()
    _, source, target = config.lengths
    assert (source, target) == (512, 114)
    found, wanted = outlook_of(config), 0
    for weight in found.table.weights:
        if isinstance(weight.place, int) and weight.row_shape:
            is_source = weight.place < 6 or "cross.kv" in weight.name
            wanted += 8 * (source if is_source else target) * weight.numel
    assert wanted == sum(
        matrix.elements * matrix.tokens_of_each(layer.tokens)
        for layer in found.layers
        for matrix in layer.matrices
    )
    more = outlook_of(two_stacks(0.3))
    assert more.lean[0] == found.lean[0], "an encoder's layer, of 512 tokens in any case"
    assert more.lean[-1].forward > 1.2 * found.lean[-1].forward, "of 228 tokens, not of 114"


def test_the_encoder_is_handed_on_beside_the_decoder() -> None:
    # A tied embedding's gradient would be sent as well.
    untied = "model.tie_embeddings=false", "model.scale_head=false"
    config = two_stacks(0.15, "parallel.pipeline=2", "train.micro_batch_size=2", *untied)
    halves = outlook_of(config, 2)
    assert halves.shapes.handed_bytes == 2 * (512 + 114) * 512 * 2
    assert halves.estimate().volume["pipeline"] == 4 * halves.shapes.handed_bytes
