"""Many configs run dry at once: processes that have imported what ranks need are forked for all of
them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megalite.config import Config
from megalite.config_file import parse_config
from megalite.dryrun.data import Start
from megalite.dryrun.rank import Record
from megalite.dryrun.run import make_jobs, run_jobs, wanted_ranks
from megalite.models import weight_table
from megalite.plan import Plan, make_plan
from megalite.planner.hardware import find_hardware

built = pytest.mark.skipif(
    importlib.util.find_spec("megalite._dryrun") is None,
    reason="megalite._dryrun is not built; torch's CPU build and a C++ compiler are needed",
)

LLAMA = {"preset": "llama-8b", "num_layers": 4}
GPT2 = {"preset": "gpt2-355m", "num_layers": 4, "vocab_size": 50304}
MIXTRAL = {
    "family": "mixtral", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 3584, "num_layers": 4,
    "num_attention_heads": 16, "num_kv_heads": 8, "max_positions": 8192, "num_experts": 8, "experts_per_token": 2,
}  # fmt: skip
MISTRAL = {
    "family": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_layers": 4,
    "num_attention_heads": 32, "num_kv_heads": 8, "max_positions": 8192, "sliding_window": 1024,
}  # fmt: skip


AHEAD = {
    "family": "deepseek_v3", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_layers": 4,
    "num_attention_heads": 16, "max_positions": 8192, "moe_intermediate_size": 1024, "num_experts": 16,
    "experts_per_token": 4, "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": 768,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "num_nextn_predict_layers": 1,
}  # fmt: skip
"""With a predictor of the token after the next."""


V3 = {
    "preset": "deepseek-v3", "num_layers": 4, "num_experts": 8, "n_group": 2, "topk_group": 2, "vocab_size": 8192,
    "first_k_dense_replace": 1, "intermediate_size": 4096,
}  # fmt: skip
"""Of its width, whose rows for eight experts a token are what is most."""


T5 = {"preset": "t5-base", "num_layers": 6, "encoder_layers": 3}
BERT = {"preset": "bert-base", "num_layers": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0}


class Case(NamedTuple):
    """A config to run dry."""

    model: dict[str, Any]
    gpus: int
    overrides: tuple[str, ...] = ()
    ranks: str = "roles"


class Dry(NamedTuple):
    """What became of a case."""

    config: Config
    plan: Plan
    records: list[Record]

    @property
    def traffics(self) -> dict[int, Any]:
        return {record.rank: record.traffic for record in self.records}


def config_of(model: dict[str, Any], *overrides: str) -> Config:
    values = {
        "run": {"name": "dry"},
        "model": model,
        "data": {"train": [{"path": "nowhere/tokens"}], "split": [98, 2, 0], "seq_length": 4096},
        "parallel": {"zero_stage": 1},
        "train": {"steps": 1000, "global_batch_size": 16},
        "optimizer": {"lr": 1.0e-4},
    }
    return parse_config(values, overrides)


def run_dry(cases: Mapping[str, Case], folder: Path, steps: int = 2) -> dict[str, Dry]:
    """Run all ranks of all cases on H200s."""
    hardware = find_hardware("h200")
    jobs, found = [], []
    for number, case in enumerate(cases.values()):
        config = config_of(case.model, *case.overrides)
        plan = make_plan(config, weight_table(config.model, config.lora), case.gpus)
        place = folder / str(number)
        place.mkdir()
        own = make_jobs(config, plan, wanted_ranks(case.ranks, plan), hardware, Start(steps), place)
        jobs += own
        found.append((config, plan, len(own)))
    records = iter(run_jobs(jobs, folder))
    whole = [
        Dry(config, plan, [next(records) for _ in range(count)]) for config, plan, count in found
    ]
    for name, dry in zip(cases, whole, strict=True):
        for record in dry.records:
            assert not record.error, f"{name}, rank {record.rank}: {record.error}\n{record.trace}"
    return dict(zip(cases, whole, strict=True))
