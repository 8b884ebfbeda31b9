"""Finetuning runs dry from a Hugging Face model whose weights are not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dry_runs import Case, Dry, built, run_dry
from megalite.planner.estimate import memory_of

pytestmark = built

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROWS = ("data.document_mask=true", "data.seq_length=1024", "data.tokenizer=models/nowhere")
KINDS = {
    "lora": ("lora={rank: 16, alpha: 32, targets: all-linear}", "parallel.tensor=2"),
    "qlora": ("lora={rank: 16, alpha: 32, quantize_base: nf4}", "parallel.tensor=2"),
    "dpo": ("objective={name: dpo, beta: 0.1}", "parallel.pipeline=2"),
    "classes": (),
    "words": ("parallel.tensor=2",),
    **{
        f"distill, {name}": (
            "objective={name: distill, teacher: FOLDER, temperature: 2.0}",
            *overrides,
        )
        for name, overrides in {
            "tensor": ("parallel.tensor=2",),
            "chunks": ("train.loss_chunk=256", "objective.loss=jsd"),
            "pipeline": ("parallel.pipeline=2",),
        }.items()
    },
}
HEADS = {
    "classes": {"task": "classification", "labels": ["no", "yes"]},
    "words": {"task": "labels", "labels": ["a", "b"]},
}


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dry]:
    folder: Path = tmp_path_factory.mktemp("finetuning")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))
    cases = {
        name: Case(
            {"hf": str(folder / "model")} | HEADS.get(name, {}),
            4,
            (*ROWS, *(each.replace("FOLDER", str(folder / "model")) for each in overrides)),
        )
        for name, overrides in KINDS.items()
    }
    return run_dry(cases, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_finetuning_run_trains_validates_and_saves(kind: str, dry: dict[str, Dry]) -> None:
    for record in dry[kind].records:
        assert {"training", "validating", "saving"} <= record.peaks.keys()
        assert record.peaks["training"] > 2**27
        assert not any(
            phase == "training" and reason == "a number is read"
            for phase, reason, *_ in record.waits
        )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("distill", "qlora"))])
def test_the_memory_of_what_is_frozen_is_planned(kind: str, dry: dict[str, Dry]) -> None:
    memories = memory_of(dry[kind].config, dry[kind].plan)
    for record in dry[kind].records:
        rank = record.rank // (dry[kind].plan.replicas * dry[kind].plan.tensor)
        for planned, phase in ((memories[rank].step, "training"), (memories[rank].save, "saving")):
            # The bound of tests/planner/test_planner_dry_runs.py.
            assert planned == pytest.approx(record.peaks[phase], rel=0.02), (
                phase,
                record.at_peak[phase],
            )
