"""The plan is arithmetic: checked against numbers worked out by hand."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.config import Config
from megalite.config_file import parse_config
from megalite.errors import ConfigError
from megalite.models import model_config, weight_table
from megalite.plan import Cut, Plan, balance, make_plan, plan, smallest_world
from megalite.utils.resources import configs_dir

# Embedding 100·8 = 800, twice (untied); a layer 8 + (8+4+4)·8 + 8·8 + 8 + 2·12·8 + 8·12 = 496; last
# norm 8.
TINY: dict[str, Any] = {
    "family": "llama", "vocab_size": 100, "hidden_size": 8, "intermediate_size": 12, "num_layers": 2,
    "num_attention_heads": 4, "num_kv_heads": 2, "max_positions": 64,
}  # fmt: skip
TINY_PARAMS = 2 * 800 + 2 * 496 + 8
# Over two tensor ranks: 50 rows of the vocabulary are padded to 64; all of a layer but its norms is
# halved.
TINY_PARAMS_HALF = 2 * 64 * 8 + 2 * (16 + 480 // 2) + 8


def config_of(model: dict[str, Any] | None = None, *overrides: str) -> Config:
    values = {
        "run": {"name": "test"},
        "model": model or TINY,
        "data": {"train": [{"path": "x"}], "seq_length": 32},
        "train": {"steps": 10, "global_batch_size": 24, "micro_batch_size": 2},
        "optimizer": {"lr": 1e-3},
    }
    return parse_config(values, overrides)


def plan_of(world_size: int, *overrides: str, model: dict[str, Any] | None = None) -> Plan:
    config = config_of(model, *overrides)
    return make_plan(config, weight_table(config.model), world_size)


@pytest.mark.parametrize(
    ("world_size", "tensor", "micro", "data", "micro_batches"),
    [
        (1, 1, 2, 1, 12),
        (2, 1, 2, 2, 6),
        (4, 2, 2, 2, 6),
        (2, 2, 24, 1, 1),
        (12, 1, 2, 12, 1),
        (6, 2, 1, 3, 8),
    ],
)
def test_batch_arithmetic(
    world_size: int, tensor: int, micro: int, data: int, micro_batches: int
) -> None:
    plan = plan_of(world_size, f"parallel.tensor={tensor}", f"train.micro_batch_size={micro}")
    assert (plan.data, plan.tensor, plan.micro_batches) == (data, tensor, micro_batches)
    assert plan.micro_batches * micro * plan.data == 24, "every sequence once"
    assert plan.tokens_per_step == 24 * 32
    assert plan.steps == 10
    assert plan.sequence == (tensor > 1), "sequence parallelism needs a second tensor rank"


def test_sequence_parallelism_can_be_left_off() -> None:
    assert not plan_of(2, "parallel.tensor=2", "parallel.sequence=false").sequence


def test_sizes_by_hand() -> None:
    assert (plan_of(1).num_params, plan_of(1).params_per_rank) == (TINY_PARAMS, TINY_PARAMS)
    half = plan_of(2, "parallel.tensor=2")
    assert (half.num_params, half.params_per_rank) == (TINY_PARAMS, TINY_PARAMS_HALF)


# Bytes a parameter: weights, gradients (fp32), optimizer (two fp32 moments, and an fp32 master copy
# of bf16 weights).
@pytest.mark.parametrize(
    ("precision", "zero", "weights", "gradients", "optimizer"),
    [
        ("bf16", 0, 2, 4, 12), ("bf16", 1, 2, 4, 12 / 4), ("bf16", 2, 2, 4 / 4, 12 / 4),
        ("fp32", 0, 4, 4, 8), ("fp32", 1, 4, 4, 8 / 4), ("fp32", 2, 4, 4 / 4, 8 / 4),
    ],
)  # fmt: skip
def test_memory_by_hand(
    precision: str, zero: int, weights: float, gradients: float, optimizer: float
) -> None:
    plan = plan_of(
        4, f"train.precision={precision}", f"parallel.zero_stage={zero}", "train.micro_batch_size=1"
    )
    wanted = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    assert plan.memory_bytes == {name: size * TINY_PARAMS for name, size in wanted.items()}


def refusal(world_size: int, *overrides: str, model: dict[str, Any] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_of(world_size, *overrides, model=model)
    return str(caught.value)


def test_refuses_ranks_that_do_not_divide() -> None:
    found = refusal(3, "parallel.tensor=2")
    assert "parallel.tensor = 2" in found
    assert "3 rank" in found
    assert "multiple of 2" in found


def test_refuses_a_batch_that_does_not_divide_and_its_advice_helps() -> None:
    found = refusal(4, "train.micro_batch_size=4")
    assert "train.global_batch_size = 24" in found
    assert "4 × 4 = 16" in found
    assert "micro_batch_size = 3 would fit" in found
    assert plan_of(4, "train.micro_batch_size=3").micro_batches == 2


def test_refuses_a_batch_that_no_micro_batch_divides() -> None:
    found = refusal(5)
    assert "train.global_batch_size = 24" in found
    assert "choose another global_batch_size" in found


def test_refuses_a_sequence_that_cannot_be_cut() -> None:
    found = refusal(2, "parallel.tensor=2", "data.seq_length=31")
    assert "data.seq_length = 31" in found
    assert "parallel.tensor = 2" in found
    assert "parallel.sequence" in found
    assert (
        plan_of(2, "parallel.tensor=2", "data.seq_length=31", "parallel.sequence=false").tensor == 2
    )
    assert "multiple of 2 × parallel.context = 4" in refusal(
        2, "parallel.context=2", "data.seq_length=30"
    )


def test_documents_are_balanced_where_that_can_be() -> None:
    masked = "parallel.context=2", "data.document_mask=true"
    assert plan_of(2, *masked).context_balance == "documents"
    assert "ring, balanced by documents" in plan_of(2, *masked).describe()
    assert plan_of(2, *masked, "parallel.context_balance=sequence").context_balance == "sequence"
    assert plan_of(2, "parallel.context=2").context_balance == "sequence"
    asked = "parallel.context_balance=documents"
    assert "needs data.document_mask: true" in refusal(2, "parallel.context=2", asked)
    assert "is for context_method: ring" in refusal(
        2, *masked, asked, "parallel.context_method=ulysses"
    )


def test_refuses_a_weight_that_cannot_be_cut() -> None:
    found = refusal(2, "parallel.tensor=2", "model.intermediate_size=13")
    assert "parallel.tensor = 2" in found
    assert "layers.0.mlp.gate_up.weight" in found
    assert "13" in found


@pytest.mark.parametrize(
    "model",
    [
        TINY,
        {
            "family": "gpt2",
            "vocab_size": 9,
            "hidden_size": 24,
            "num_layers": 1,
            "num_attention_heads": 6,
        },
    ],
)
def test_refuses_to_cut_through_a_head(model: dict[str, Any]) -> None:
    assert "heads" in refusal(4, "parallel.tensor=4", model=model | {"max_positions": 64})


@pytest.mark.parametrize(
    ("matches", "words"),
    [
        (("*.input_norm.weight", "*embed_tokens.wieght"), "'*.input_norm.weight' is the name of no"),
        (("*embed_tokens.wieght",), "no trained weight; did you mean 'model.embed_tokens.weight'?"),
        (("*", "lm_head.weight"), "'lm_head.weight' does nothing, since earlier groups take all"),
        (("lm_head.weight", "*"), ""),
    ],
)  # fmt: skip
def test_refuses_groups_of_the_optimizer_that_do_nothing(
    matches: tuple[str, ...], words: str
) -> None:
    groups = ", ".join(f"{{match: '{match}', lr: 0.5}}" for match in matches)
    config = config_of(None, f"optimizer.groups=[{groups}]")
    if words:
        with pytest.raises(ConfigError, match=re.escape(words)):
            plan(config, 1)
    else:
        assert plan(config, 1)


def test_smallest_world_is_the_layout_without_data_parallelism() -> None:
    for tensor in (1, 2):
        config = config_of(None, f"parallel.tensor={tensor}")
        assert smallest_world(config) == tensor
        assert make_plan(config, weight_table(config.model), smallest_world(config)).data == 1


def test_description_has_the_numbers() -> None:
    text = plan_of(4, "parallel.tensor=2").describe()
    for part in (
        "4 = data 2 × tensor 2",
        f"{TINY_PARAMS:,}",
        f"{TINY_PARAMS_HALF:,}",
        "768 a step",
        "7,680 in 10",
    ):
        assert part in text, text


EIGHT = TINY | {"num_layers": 8}


def layers_of(plan: Plan) -> list[int]:
    return [stage.stop - stage.start for stage in plan.stages]


@pytest.mark.parametrize(
    ("layers", "stages", "head", "wanted"),
    [
        (8, 4, 0.0, [2, 2, 2, 2]),
        (9, 4, 0.0, [2, 2, 2, 3]),  # where all are alike, the back holds fewer activations
        (8, 4, 1.0, [2, 2, 2, 2]),
        (8, 4, 2.0, [2, 2, 3, 1]),
        (8, 2, 4.0, [6, 2]),
        (4, 4, 9.0, [1, 1, 1, 1]),
    ],
)
def test_stages_are_balanced_by_the_cost_of_the_head(
    layers: int, stages: int, head: float, wanted: list[int]
) -> None:
    assert balance(layers, stages, head) == wanted


@settings(deadline=None)
@given(layers=st.integers(1, 100), stages=st.integers(1, 32), head=st.floats(0, 10))
def test_no_other_split_has_a_quicker_slowest_stage(layers: int, stages: int, head: float) -> None:
    if layers < stages:
        return
    counts = balance(layers, stages, head)
    assert sum(counts) == layers
    assert min(counts) >= 1
    others = stages - 1
    lasts = range(1, layers - others + 1) if others else [layers]
    best = min(max(last + head, -(-(layers - last) // others) if others else 0) for last in lasts)
    assert max([*counts[:-1], counts[-1] + head]) == pytest.approx(best)


def test_stages_go_round_the_pipeline_and_hold_every_weight() -> None:
    overrides = ("parallel.pipeline=2", "parallel.virtual=2", "parallel.schedule=interleaved")
    plan = plan_of(2, *overrides, "parallel.stage_layers=[1, 3, 3, 1]", model=EIGHT)
    assert layers_of(plan) == [1, 3, 3, 1]
    assert [(s.start, s.stop) for s in plan.stages_of(1)] == [(1, 4), (7, 8)]
    table = weight_table(config_of(EIGHT).model)
    names = [w.name for rank in (0, 1) for w in plan.weights_of(rank, table)]
    assert sorted(names) == sorted(w.name for w in table)
    assert plan.params_per_rank == max(
        sum(w.numel for w in plan.weights_of(rank, table)) for rank in (0, 1)
    )


def test_both_ends_hold_a_tied_embedding() -> None:
    plan = plan_of(2, "parallel.pipeline=2", model=EIGHT | {"tie_embeddings": True})
    table = weight_table(config_of(EIGHT | {"tie_embeddings": True}).model)
    first, last = ([w.name for w in plan.weights_of(rank, table)] for rank in (0, 1))
    assert first[0] == last[-1] == "embedding.weight"
    assert set(first) & set(last) == {"embedding.weight"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["pipeline=2", "virtual=2"], ["parallel.virtual = 2", "interleaved or zero_bubble"]),
        (["pipeline=2", "schedule=interleaved"], ["interleaved", "virtual of at least 2"]),
        (["virtual=2"], ["parallel.virtual = 2", "pipeline above 1"]),
        (["pipeline=2", "virtual=8", "schedule=interleaved"], ["16 stages", "8 layers"]),
        (["pipeline=2", "stage_layers=[4, 3]"], ["[4, 3]", "2 counts", "8 layers"]),
        (["pipeline=2", "stage_layers=[8]"], ["[8]", "2 counts"]),
        (
            ["pipeline=2", "engine=deepspeed"],
            ["deepspeed cannot run a pipeline", "engine: native", "zero_stage: 3"],
        ),
        (["zero_stage=3"], ["zero_stage = 3", "engine: deepspeed"]),
        (["offload={optimizer: cpu}"], ["parallel.offload.optimizer = 'cpu'", "engine: deepspeed"]),
        (["engine=deepspeed", "zero_stage=0"], ["zero_stage = 0", "engine: native"]),
        (
            ["engine=deepspeed", "offload={parameters: cpu}"],
            ["offload.parameters", "zero_stage: 3, not 1"],
        ),
        (
            ["engine=deepspeed", "offload={optimizer: nvme, nvme_path: /x}"],
            ["'nvme'", "zero_stage: 3", "'cpu' works"],
        ),
        (["context=3"], ["seq_length = 32", "2 × parallel.context = 6"]),
        (["context=4", "tensor=3"], ["seq_length = 32", "4 × 3"]),
        (
            ["pipeline=4", "context=2"],
            ["parallel.pipeline = 4 × parallel.context = 2", "multiple of 8"],
        ),
    ],
)
def test_refuses_what_does_not_go_together(overrides: list[str], words: list[str]) -> None:
    world = {"context=3": 3, "context=4": 12}.get(
        overrides[0], 4 if "pipeline=4" in overrides else 8
    )
    found = refusal(
        world, *(f"parallel.{o}" for o in overrides), "train.micro_batch_size=1", model=EIGHT
    )
    for word in words:
        assert word in found


ROUTED = {"family": "mixtral", "num_experts": 6, "experts_per_token": 2}


def test_experts_have_ranks_of_their_own() -> None:
    """Of pipeline 2 × tensor 2 × data 2: whole experts, a third of them on each rank, would need
    three ranks."""
    layout = (
        "parallel.pipeline=2",
        "parallel.tensor=2",
        "parallel.expert_tensor=1",
        "train.micro_batch_size=1",
    )
    plan = plan_of(8, *layout, "parallel.expert=2", model=TINY | ROUTED)
    assert (plan.experts, plan.replicas_of(plan.experts), plan.data) == (Cut(1, 2), 2, 2)
    assert plan.rank_at(1, 1, 1, plan.experts) == 7
    assert "expert 2 × expert tensor 1, on 2 replicas" in plan.describe()
    assert "multiple of 12" in refusal(8, *layout, "parallel.expert=3", model=TINY | ROUTED)
    config = config_of(TINY | ROUTED, *layout, "parallel.expert=3")
    assert smallest_world(config) == 12
    assert plan_of(12, *layout, "parallel.expert=3", model=TINY | ROUTED).data == 3
    # Twelve features in three matrices of eight columns a expert, two layers: on one stage, one
    # layer's.
    dense = plan_of(2, "parallel.pipeline=2", "train.micro_batch_size=1", model=TINY | ROUTED)
    whole = 2 * 12 * 3 * 8 * 3  # three of six experts
    halves = plan_of(
        4,
        "parallel.pipeline=2",
        "parallel.expert=2",
        "train.micro_batch_size=1",
        model=TINY | ROUTED,
    )
    assert dense.params_per_rank - halves.params_per_rank == whole // 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["expert=4"], ["parallel.expert = 4", "6 experts, which do not divide by 4"]),
        (
            ["expert=2", "engine=deepspeed"],
            ["parallel.expert = 2", "engine: native, not deepspeed"],
        ),
        (
            ["expert=2", "expert_tensor=1", "tensor=2", "sequence=false"],
            ["sequence: true", "would send each twice"],
        ),
        (["expert_tensor=8"], ["12 features, which do not divide by 8"]),
    ],
)
def test_refuses_what_experts_cannot_do(overrides: list[str], words: list[str]) -> None:
    found = refusal(
        8, *(f"parallel.{o}" for o in overrides), "train.global_batch_size=8", "train.micro_batch_size=1",
        model=TINY | ROUTED,
    )  # fmt: skip
    for word in words:
        assert word in found
    assert "model.family = 'llama' has none" in refusal(
        8, "parallel.expert=2", "train.micro_batch_size=1"
    )


LATENT = {
    "family": "deepseek_v3", "vocab_size": 100, "hidden_size": 8, "intermediate_size": 12, "num_layers": 4,
    "num_attention_heads": 4, "max_positions": 64, "kv_lora_rank": 4, "qk_nope_head_dim": 2, "qk_rope_head_dim": 2,
    "v_head_dim": 2, "moe_intermediate_size": 4, "num_experts": 4, "experts_per_token": 2,
}  # fmt: skip


def test_the_last_stage_holds_predictors_and_a_copy_of_the_embedding() -> None:
    """A predictor is as much work as a layer and a head, which the other stage's layers even out."""
    overrides = "parallel.pipeline=2", "train.micro_batch_size=1"
    alone = plan_of(2, *overrides, model=LATENT)
    plan = plan_of(2, *overrides, model=LATENT | {"num_nextn_predict_layers": 1})
    assert [span.stop for span in alone.stages] == [2, 4]
    assert [span.stop for span in plan.stages] == [3, 4]
    assert [list(span.layers) for span in plan.stages] == [[0, 1, 2], [3, 4]]
    table = weight_table(config_of(LATENT | {"num_nextn_predict_layers": 1}).model)
    first, last = ([row.name for row in span.weights(table)] for span in plan.stages)
    assert "embedding.weight" in first
    assert "embedding.weight" in last
    behind = [row.numel for row in table if row.name.startswith("layers.4.")]
    assert plan.num_params - alone.num_params == sum(behind)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"objective": {"name": "dpo"}}, "needs objective.name: next_token, not dpo"),
        ({"lora": {"rank": 4, "targets": ["o_proj"]}}, "needs lora: null"),
    ],
)
def test_refuses_what_predictors_cannot_do(more: dict[str, Any], words: str) -> None:
    config = config_of(LATENT | {"num_nextn_predict_layers": 1, "hf": "folder"})
    values = config.model_dump(mode="json") | more
    values["data"]["document_mask"] = True
    with pytest.raises(ConfigError, match=f"model.num_nextn_predict_layers = 1 {words}.*; 0 "):
        plan(parse_config(values), 1)


def test_refuses_too_few_micro_batches_for_a_pipeline() -> None:
    four = ("parallel.pipeline=4", "train.micro_batch_size=1")
    assert "3 micro-batch" in refusal(4, *four, "train.global_batch_size=3", model=EIGHT)
    assert plan_of(4, *four, "train.global_batch_size=4", model=EIGHT).micro_batches == 4
    uneven = ("parallel.pipeline=2", "parallel.schedule=zero_bubble", "train.micro_batch_size=1")
    assert "5 micro-batches" in refusal(2, *uneven, "train.global_batch_size=5", model=EIGHT)
    assert plan_of(2, *uneven, "train.global_batch_size=6", model=EIGHT).micro_batches == 6


def test_refuses_dropout_on_attention_that_travels() -> None:
    model = {
        "family": "gpt2",
        "vocab_size": 9,
        "hidden_size": 24,
        "num_layers": 1,
        "num_attention_heads": 6,
    }
    model |= {"max_positions": 64, "attention_dropout": 0.1}
    assert "attention_dropout = 0.1" in refusal(2, "parallel.context=2", model=model)


CAPPED = {
    "family": "gemma2", "vocab_size": 9, "hidden_size": 24, "intermediate_size": 8, "num_layers": 1,
    "num_attention_heads": 6, "max_positions": 64, "sliding_window": 4,
}  # fmt: skip


def test_refuses_what_a_capped_model_cannot_do() -> None:
    found = refusal(2, "parallel.context=2", model=CAPPED | {"attention_softcap": 50.0})
    assert "model.attention_softcap = 50.0 needs parallel.context: 1, not 2" in found
    found = refusal(1, "train.loss_chunk=8", model=CAPPED | {"logit_softcap": 30.0})
    assert "model.logit_softcap = 30.0 needs train.loss_chunk: null, not 8" in found
    plan_of(2, "parallel.context=2", "train.loss_chunk=8", model=CAPPED)


def test_refuses_chunks_of_the_loss_behind_a_head_with_a_bias() -> None:
    phi = {name: value for name, value in CAPPED.items() if name != "sliding_window"}
    found = refusal(1, "train.loss_chunk=8", model=phi | {"family": "phi"})
    assert "'phi', whose head has a bias, needs train.loss_chunk: null, not 8" in found


PUBLISHED = {
    "llama-7b": 6_738_415_616, "llama-8b": 8_030_261_248, "llama-13b": 13_015_864_320, "llama-70b": 70_553_706_496,
    "llama-1b": 1_235_814_400, "llama-3b": 3_212_749_824, "gpt2-124m": 124_439_808, "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080, "gpt2-1.5b": 1_557_611_200, "qwen3-0.6b": 596_049_920, "gemma2-2.6b": 2_614_341_888,
    "smollm2-135m": 134_515_008, "pythia-160m": 162_322_944, "olmoe-1b-7b": 6_919_161_856,
    "gpt-oss-20b": 20_914_757_184,
    "qwen3-30b-a3b": 30_532_122_624, "deepseek-v3": 671_026_419_200,
    "bert-base": 109_514_298, "bert-large": 335_174_458, "modernbert-base": 149_655_232,
    "t5-small": 60_506_624, "t5-base": 222_903_552, "flan-t5-xl": 2_849_757_184,
}  # fmt: skip
SIZES = {
    "bert-base": "110m", "bert-large": "340m", "modernbert-base": "150m", "olmoe-1b-7b": "7b", "deepseek-v3": "671b",
    "gpt-oss-20b": "20b", "t5-small": "60m", "t5-base": "220m", "flan-t5-xl": "2.85b",
}  # fmt: skip
"""Of presets that are not named for theirs."""
UNITS = {"m": 1e6, "b": 1e9}


@pytest.mark.parametrize(
    "preset", sorted(path.stem for path in (configs_dir() / "model").glob("*.yaml"))
)
def test_presets_have_the_size_they_are_named_for(preset: str) -> None:
    config = model_config({"preset": preset})
    size = sum(weight.numel for weight in weight_table(config))
    if preset in PUBLISHED:
        assert size == PUBLISHED[preset]
    named = SIZES.get(preset) or preset.split("-")[1]
    # Names are rounded by custom: the widest are 799,584 as "1m", 1.24e9 as "1b" and 109.5e6 as
    # "125m" (vocabulary).
    assert size == pytest.approx(float(named[:-1]) * UNITS[named[-1]], rel=0.25)
    name = preset.split("-")[0]
    families = {"smollm2": "llama", "pythia": "gpt_neox", "moe": "mixtral", "qwen3-30b-a3b": "qwen3_moe",
                "deepseek": "deepseek_v3", "gpt-oss-20b": "gpt_oss", "flan": "t5"}  # fmt: skip
    assert config.family == families.get(preset, families.get(name, name))


# Vocabulary, hidden size, intermediate size, layers, heads, key/value heads, and head size where it
# is its own.
OF_FAMILIES = {
    "mistral": ((32000, 4096, 14336, 32, 32, 8), 7_241_732_096),  # 7B
    "mixtral": ((32000, 4096, 14336, 32, 32, 8), 46_702_792_704),  # 8x7B
    "qwen2_moe": ((151936, 2048, 5632, 24, 16, 16), 14_315_784_192),  # 1.5-MoE-A2.7B
    "qwen2": ((151936, 896, 4864, 24, 14, 2), 494_032_768),  # 0.5B
    "qwen3": ((151936, 1024, 3072, 28, 16, 8, 128), 596_049_920),  # 0.6B
    "smollm3": ((128256, 2048, 11008, 36, 16, 4), 3_075_098_624),  # 3B
    "phi3": ((32064, 3072, 8192, 32, 32, 32), 3_821_079_552),  # mini
    "gpt_neox": ((50304, 768, 3072, 12, 12, 12), 162_322_944),  # Pythia 160M
    "gemma2": ((256000, 2304, 9216, 26, 8, 4, 256), 2_614_341_888),  # 2B
    "gemma3_text": ((262144, 1152, 6912, 26, 4, 1, 256), 999_885_952),  # 1B
}


@pytest.mark.parametrize("family", OF_FAMILIES)
def test_families_have_the_sizes_their_models_were_published_with(family: str) -> None:
    sizes, wanted = OF_FAMILIES[family]
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_attention_heads",
        "num_kv_heads",
    )
    values = dict(zip((*names, "head_dim"), sizes, strict=False)) | {
        "family": family,
        "max_positions": 2048,
    }
    tied = family in ("qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text")
    window = {"sliding_window": 1024} if "gemma" in family else {}
    experts = {
        "mixtral": {"num_experts": 8, "experts_per_token": 2},
        "qwen2_moe": {
            "num_experts": 60,
            "experts_per_token": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
    }
    config = config_of(
        values | {"tie_embeddings": tied} | window | experts.get(family, {}), "parallel.tensor=1"
    )  # type: ignore[operator]
    assert make_plan(config, weight_table(config.model), 1).num_params == wanted


def test_plan_of_a_large_cluster_takes_milliseconds() -> None:
    config = config_of({"preset": "llama-70b"}, "parallel.tensor=8", "train.global_batch_size=2048")
    table, times = weight_table(config.model), []
    for _ in range(5):
        begin = time.process_time()
        plan = make_plan(config, table, 4096)
        times.append(time.process_time() - begin)
    assert (plan.data, plan.micro_batches) == (512, 2)
    # It takes about 3 ms; anything that grew with the ranks or the parameters would take seconds.
    assert min(times) < 0.1
