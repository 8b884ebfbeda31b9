"""The search: what it finds fits, is what the plan makes of it, and is the best of all there is."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from megalite.config import Config, LoraConfig
from megalite.config_file import load_config, parse_config
from megalite.errors import ConfigError
from megalite.models import weight_table
from megalite.plan import make_plan, plan_of_sizes
from megalite.planner.estimate import Outlook, estimate, usable_bytes
from megalite.planner.hardware import find_hardware
from megalite.planner.search import _layouts, _outlook, search
from megalite.planner.shapes import ModelTable
from megalite.planner.sizes import together

H100 = find_hardware("h100")


def config_of(preset: str, *overrides: str) -> Config:
    values: dict[str, Any] = {
        "run": {"name": "test"},
        "model": {"preset": preset},
        "data": {"train": [{"path": "x"}], "seq_length": 4096},
        "train": {"steps": 100, "global_batch_size": 64},
        "optimizer": {"lr": 1e-4},
    }
    return parse_config(values, overrides)


@pytest.fixture(scope="module")
def found() -> Any:
    return search(config_of("llama-8b"), 16, H100)


def test_ranked_and_fitting(found: Any) -> None:
    times = [one.step_time_s for one in found.best]
    assert times == sorted(times)
    assert len(times) == 10
    assert all(one.fullest.total <= usable_bytes(H100) for one in found.best)


def test_written_config_is_the_same_layout(found: Any, tmp_path: Path) -> None:
    file = tmp_path / "best.yaml"
    file.write_text(found.best[0].config.to_yaml())
    config = load_config(file)
    plan = make_plan(config, weight_table(config.model), 16)
    again = estimate(config, plan, H100)
    assert again.step_time_s == pytest.approx(found.best[0].step_time_s, rel=1e-12)
    assert again.memory == found.best[0].memory


def test_nothing_better_was_left_out(found: Any) -> None:
    """Every layout is simulated here; the search left most of them out by their bound."""
    config, table = config_of("llama-8b"), ModelTable(config_of("llama-8b"))
    rows = together(table.weights, table.config.optimizer)
    quickest = float("inf")
    for parallel in _layouts(config, 16, 8):
        try:
            outlook = _outlook(config, parallel, 16, H100, table, rows)
        except ConfigError:
            continue
        one = outlook.estimate()
        assert outlook.shortest_step_s <= one.step_time_s * (1 + 1e-12), parallel
        if one.fits:
            quickest = min(quickest, one.step_time_s)
    assert found.best[0].step_time_s <= quickest
    assert found.num_simulated < found.num_layouts / 2


def test_rows_put_together_make_the_same_plan() -> None:
    config = config_of("llama-8b", "parallel.tensor=4", "parallel.pipeline=2")
    table = weight_table(config.model)
    rows = together(table, config.optimizer)
    assert plan_of_sizes(config, rows, 16) == make_plan(config, table, 16)
    with pytest.raises(ConfigError, match=r"parallel\.tensor = 16"):
        plan_of_sizes(config_of("llama-8b", "parallel.tensor=16"), rows, 16)


def test_layouts_in_fp8_are_searched_and_those_that_cut_blocks_refused() -> None:
    narrow = ("model.intermediate_size=5632", "train.fp8.recipe=blockwise")
    found = search(config_of("llama-8b", "model.num_layers=3", *narrow), 8, H100, keep=100)
    # 5632 = 44 × 128: over 8 tensor ranks blocks would lie on two.
    assert found.num_refused
    assert {one.plan.tensor for one in found.best} == {1, 2, 4}


def test_layouts_that_cut_groups_of_fake_quantized_weights_are_refused() -> None:
    narrow = ("model.intermediate_size=5632", "train.fake_quantize.group=128")
    found = search(config_of("llama-8b", "model.num_layers=3", *narrow), 8, H100, keep=100)
    assert found.num_refused
    assert {one.plan.tensor for one in found.best} == {1, 2, 4}


def test_what_fits_nowhere_is_said() -> None:
    with pytest.raises(ConfigError, match="take more GPUs"):
        search(config_of("llama-70b"), 8, find_hardware("rtx 4090"))
    with pytest.raises(ConfigError, match="global_batch_size"):
        search(config_of("llama-8b", "train.global_batch_size=3"), 37, H100)


def test_less_memory_asks_for_more_sharding_or_recomputing() -> None:
    """Llama-8B on 8 GPUs: 80 GB and 24 GB."""
    roomy = search(config_of("llama-8b"), 8, H100).best[0]
    tight = search(config_of("llama-8b"), 8, find_hardware("rtx 4090")).best[0]
    assert tight.fullest.total < usable_bytes(find_hardware("rtx 4090")) < roomy.fullest.total


def test_large_search_is_quick() -> None:
    began = time.process_time()
    found = search(
        config_of("llama-70b", "train.global_batch_size=512"), 512, find_hardware("h200")
    )
    # About 6 s; without the bound, minutes.
    assert time.process_time() - began < 30
    assert found.num_layouts > 1000


def test_estimate_by_hand_for_a_rank_alone() -> None:
    """One GPU, no messages: the step is its passes and the optimizer."""
    config = config_of("llama-1b", "train.global_batch_size=4")
    plan = make_plan(config, weight_table(config.model), 1)
    one = estimate(config, plan, H100)
    outlook = Outlook(config, plan, H100, ModelTable(config))
    passes = sum(outlook.work[0].times[kind] for kind in "FB")
    assert one.step_time_s == pytest.approx(4 * passes + outlook.optimizer_s)
    assert one.volume == dict.fromkeys(("tensor", "context", "expert", "data", "pipeline"), 0.0)
    assert one.bubble == pytest.approx(0.0, abs=1e-9)
    assert 0.2 < one.mfu < 0.7
    assert one.tokens_per_s == pytest.approx(4 * 4096 / one.step_time_s)


def test_volume_by_hand() -> None:
    """Tensor parallelism: 8 ranks, 32 layers, and of hidden states 4 gathers and 4 scatters each
    way, plus one gather again in each column-parallel product's backward pass."""
    config = config_of("llama-8b", "parallel.tensor=8", "train.global_batch_size=8")
    plan = make_plan(config, weight_table(config.model), 64)
    one = estimate(config, plan, H100)
    hidden = 4096 * 4096 * 2 * 7 / 8
    layers = 32 * (2 * 3 + 2 * 2) * hidden
    ends = (2 + 3) * hidden
    # The loss all-reduces three numbers a token, and the norms, which work on slices of the
    # sequence, their gradients.
    all_reduced = 2 * 7 / 8 * (4096 * 3 * 4 + (2 * 32 + 1) * 4096 * 4)
    assert one.volume["tensor"] == pytest.approx(layers + ends + all_reduced)
    # Gradients in fp32 once, weights in bf16 once.
    assert one.volume["data"] == pytest.approx(plan.params_per_rank * 6 * 7 / 8, rel=1e-3)
    assert one.volume["pipeline"] == one.volume["context"] == 0.0


def test_volume_of_context_ranks_by_hand() -> None:
    """Of 4 ranks, each with 1,024 tokens of 32 heads and 8 key/value heads of 128: in a ring keys
    and values go on three times in both passes, and their gradients in fp32 four times; by heads,
    three quarters of all go there and back."""
    q, kv, tokens = 32 * 128, 2 * 8 * 128, 1024
    wanted = {
        "ring": 32 * tokens * kv * (2 * 3 * 2 + 4 * 4),
        "ulysses": 32 * tokens * (2 * q + kv) * 2 * 2 * 3 / 4,
    }
    for method, volume in wanted.items():
        config = config_of("llama-8b", "parallel.context=4", f"parallel.context_method={method}")
        plan = make_plan(config, weight_table(config.model), 64)
        assert estimate(config, plan, H100).volume["context"] == pytest.approx(
            volume * plan.micro_batches
        ), method
    config = config_of(
        "llama-8b", "parallel.context=4", "parallel.tensor=4", "parallel.context_method=ulysses"
    )
    with pytest.raises(
        ConfigError,
        match=r"tensor × context = 4 × 4 ranks whole heads, .* 32 of them and 8 key/value",
    ):
        make_plan(config, weight_table(config.model), 64)


# Of 8 micro-batches: an all-reduce is twice a reduction; ZeRO 1 reduces and gathers once a step, 2
# reduces every time, and 3 gathers for both passes as well.
@pytest.mark.parametrize(
    ("zero", "bytes_each"), [(0, 4 * 2), (1, 4 + 2), (2, 8 * 4 + 2), (3, 8 * (4 + 2 * 2))]
)
def test_volume_of_each_zero_stage_by_hand(zero: int, bytes_each: int) -> None:
    engine = "deepspeed" if zero == 3 else "native"
    config = config_of("llama-1b", f"parallel.zero_stage={zero}", f"parallel.engine={engine}")
    plan = make_plan(config, weight_table(config.model), 8)
    assert plan.micro_batches == 8
    volume = estimate(config, plan, H100).volume["data"]
    assert volume == pytest.approx(plan.num_params * bytes_each * 7 / 8)


def test_volume_of_a_ring_by_hand() -> None:
    """Of 8 heads' keys and values of 128, three of four ranks' come round in bf16, in each pass;
    their gradients in fp32, and a step further, home."""
    config = config_of("llama-8b", "parallel.context=4", "train.global_batch_size=4")
    plan = make_plan(config, weight_table(config.model), 4)
    keys_and_values = 32 * 2 * (4096 / 4) * 8 * 128
    volume = estimate(config, plan, H100).volume["context"]
    assert volume == pytest.approx(4 * keys_and_values * (2 * 3 * 2 + 4 * 4))


def outlook_of(preset: str, *overrides: str, world_size: int = 1) -> Outlook:
    config = config_of(preset, *overrides)
    table = ModelTable(config)
    return Outlook(config, make_plan(config, table.weights, world_size), H100, table)


def test_passes_by_hand() -> None:
    outlook = outlook_of("llama-1b")
    layer = outlook.layers[0]
    attention = outlook.costs._attention(layer)
    assert attention.backward == pytest.approx(2.5 * attention.forward), (
        "five products for two (Dao 2023)"
    )
    none, full = (outlook.costs.layer(layer, recompute) for recompute in ("none", "full"))
    assert full.backward == pytest.approx(none.backward + none.forward)
    # Of each weight the norm reads the gradient; AdamW reads it, the master weight and two moments,
    # writes these three, and the weight in bf16.
    num_bytes = outlook.plan.num_params * (4 + 4 * 4 + 3 * 4 + 2)
    assert outlook.optimizer_s == pytest.approx(outlook.kernels.memory(num_bytes))


def test_what_is_frozen_has_no_gradients_to_compute() -> None:
    config = config_of("llama-1b").model_copy(update={"lora": LoraConfig(rank=8)})
    table = ModelTable(config)
    outlook = Outlook(config, make_plan(config, table.weights, 1), H100, table)
    assert outlook.costs.layer(outlook.layers[0], "none").backward_weight == 0.0
    assert outlook.costs.head().backward_weight == 0.0


def test_what_is_quantised_takes_less_memory_and_more_time() -> None:
    """As planned of a rank with several stages, whose parts are added up."""
    layout = ("parallel.pipeline=2", "parallel.virtual=2", "parallel.schedule=zero_bubble")
    dense, few = (
        Outlook(config, make_plan(config, ModelTable(config).weights, 2), H100, ModelTable(config))
        for lora in (LoraConfig(rank=8), LoraConfig(rank=8, quantize_base="nf4"))
        for config in [config_of("llama-1b", *layout).model_copy(update={"lora": lora})]
    )
    matrices = sum(weight.numel for weight in few.table.weights if weight.quantised)
    saved = sum(a.weights - b.weights for a, b in zip(dense.memory, few.memory, strict=True))
    # Half a byte, a byte for 64 numbers, and 8 for each row instead of 2.
    assert saved == pytest.approx(matrices * (2 - 0.5 - 1 / 64), rel=0.01)
    costs = [each.costs.layer(each.layers[0], "none") for each in (dense, few)]
    assert costs[1].forward > costs[0].forward
    assert costs[1].backward > costs[0].backward


def test_both_ends_of_a_pipeline_hold_a_tied_embedding() -> None:
    tied = outlook_of("llama-1b", "model.tie_embeddings=true", "parallel.pipeline=2", world_size=2)
    first, last = tied.sizes
    assert (first.after, last.before) == (0, 0)
    assert last.after == first.before + tied.shapes.hidden, "and the last norm"


def test_some_of_a_gpu_is_not_for_tensors() -> None:
    assert usable_bytes(H100) == pytest.approx((80 - 2) * 0.95 * 2**30)


def test_more_context_ranks_hold_less() -> None:
    totals = []
    for context in (1, 2, 4):
        config = config_of(
            "llama-8b",
            f"parallel.context={context}",
            "parallel.tensor=4",
            "train.global_batch_size=4",
        )
        plan = make_plan(config, weight_table(config.model), 16)
        totals.append(estimate(config, plan, H100).fullest.activations)
    assert totals[0] > totals[1] > totals[2]


PREDICTED = r"^#   (\d+) × ([\w-]+)(?:, (.*))?: MFU ([\d.]+)%, ([\d.]+) GiB$"
SHIPPED = [
    (path, *found.groups())
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    for found in re.finditer(PREDICTED, path.read_text(), re.M)
]


@pytest.mark.parametrize(("path", "gpus", "gpu", "changes", "mfu", "gib"), SHIPPED)
def test_shipped_configs_are_what_the_search_finds(
    path: Path, gpus: str, gpu: str, changes: str | None, mfu: str, gib: str
) -> None:
    """Each says what it should reach, and reaches it without a GPU that is larger than it says."""
    config, hardware = load_config(path, (changes or "").split()), find_hardware(gpu)
    own = estimate(config, make_plan(config, weight_table(config.model), int(gpus)), hardware)
    assert own.fits
    assert (f"{own.mfu:.1%}", f"{own.fullest.total / 2**30:.1f}") == (f"{mfu}%", gib)
    assert own.step_time_s <= 1.02 * search(config, int(gpus), hardware, keep=1).best[0].step_time_s


def test_configs_for_clusters_say_what_they_reach() -> None:
    assert {path.name for path, *_ in SHIPPED} == {"llama-1b.yaml", "llama-8b.yaml"}
