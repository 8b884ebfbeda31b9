"""A run that is run dry resumes on other GPUs from the checkpoint that it saved."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest

from dry_runs import built, config_of
from megalite.cli import main
from megalite.dryrun import run
from megalite.dryrun.match import bytes_by_axis
from megalite.dryrun.rank import RESTART
from megalite.dryrun.report import Outcome
from megalite.dryrun.run import dry_runs
from megalite.errors import ConfigError
from megalite.models import weight_table
from megalite.planner.hardware import find_hardware

pytestmark = built

MODEL = {
    "family": "llama", "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_layers": 2,
    "num_attention_heads": 8, "num_kv_heads": 4, "max_positions": 512,
}  # fmt: skip
ELASTIC = ("data.seq_length=256", "train.micro_batch_size=4", "parallel.elastic=true")


def run_with_restarts(
    gpus: tuple[int, ...], *overrides: str, model: dict[str, object] = MODEL, ranks: str = "all"
) -> list[Outcome]:
    """Run dry on nodes of two GPUs."""
    config = config_of(model, *ELASTIC, *overrides)
    found = dry_runs(config, gpus, find_hardware("h200", 2), ranks, 2)
    for outcome in found:
        for record in outcome.records:
            assert not record.error, f"rank {record.rank}: {record.error}\n{record.trace}"
        assert not outcome.refusals
    return found


def test_a_lost_node_and_one_that_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches of 4, then of 3, as in tests/test_elastic.py; all ranks agree on all that they
    send."""
    # One at a time: rank 0 has saved its last step before the others look for a checkpoint.
    monkeypatch.setattr(run, "AT_ONCE", 1)
    found = run_with_restarts((6, 4, 6), "parallel.tensor=2", "train.global_batch_size=12")
    assert [each.plan.micro_batch_size for each in found] == [4, 3, 4]
    assert [each.start.begins_at for each in found] == [0, 2, 4]
    table = weight_table(found[0].config.model)
    part = sum(prod(weight.local_shape(2)) for weight in table)
    for outcome in found[1:]:
        replicas, memory = outcome.plan.replicas, outcome.memory[0]
        for record in outcome.records:
            # Weights and optimizer states, and of those that are read, one bucket at most.
            held = memory.weights + memory.optimizer
            assert held <= record.peaks[RESTART] < 1.1 * held + memory.gradients
            assert memory.step == pytest.approx(record.peaks["training"], rel=0.02)
            # Each replica reads a share of the weights and gives it to the others.
            sent = bytes_by_axis(record.traffic, RESTART)["data"]
            assert sent == pytest.approx(2 * part * (replicas - 1) / replicas, rel=0.005)


@pytest.fixture
def whole(pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--whole"):
        pytest.skip("half a minute each")


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_resumes(stage: int) -> None:
    pytest.importorskip("deepspeed")
    settings = ("parallel.engine=deepspeed", f"parallel.zero_stage={stage}")
    run_with_restarts((4, 2), *settings, "train.global_batch_size=8")


@pytest.mark.usefixtures("whole")
def test_adapters_resume_beside_a_model_that_is_not_there(tmp_path: Path) -> None:
    hf = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(hf))
    lora = "lora={rank: 8, alpha: 16, targets: all-linear, dora: true}"
    settings = (lora, "train.global_batch_size=8", "data.tokenizer=models/nowhere")
    run_with_restarts((4, 2), *settings, model={"hf": str(tmp_path)}, ranks="0")


def test_nodes_that_do_not_fit_stay_idle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    config = config_of(MODEL, *ELASTIC, "train.global_batch_size=8", "optimizer.name=muon")
    path.write_text(config.to_yaml())
    command = ["dryrun", str(path), "--gpus", "8", "--gpu", "h200", "--nodes-of", "2"]
    assert main([*command, "--restart-gpus", "6", "--ranks", "0"]) == 0
    first, restart = capsys.readouterr().out.split("RESTART from step 3 on 4 × H200")
    assert "it runs" in first
    assert "2 of 6 GPUs are left idle: no more fit the config" in restart
    assert "micro-batches of 2, 1 a step" in restart
    assert "restart" in restart
    assert "it runs" in restart


@pytest.mark.parametrize(
    ("gpus", "ranks", "overrides", "said"),
    [
        ((4, 3), "roles", (), "--restart-gpus 3: nodes are lost and come back whole"),
        ((4, 2), "1", (), "--ranks 1: rank 0, which saves what a restart needs, is left out"),
        (
            (6, 4),
            "roles",
            ("parallel.elastic=false", "parallel.tensor=2", "train.global_batch_size=12"),
            "micro_batch_size = 3 would fit",
        ),
    ],
)
def test_restarts_that_cannot_be_are_refused_first(
    gpus: tuple[int, ...], ranks: str, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        run_with_restarts(gpus, *overrides, ranks=ranks)
