"""Answers to prompts in training: those of the checkpoint, on every layout, and losses that know
nothing of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from local_tasks import write_tokenizer
from megalite.config import Config
from megalite.errors import ConfigError
from megalite.infer.generate import Generator
from megalite.infer.sampling import Sampling
from megalite.train import train
from ranks import run_ranks
from small_runs import curve_of, make_config, train_on_rank

PROMPTS = ("The cat", "", "a hen and a cow met a fox")


def config_with_samples(folder: Path, name: str, *overrides: str) -> Config:
    tokenizer = write_tokenizer(folder / "tokenizer")
    asked = f"observe.samples={{prompts: {json.dumps(PROMPTS)}, every: 8, max_tokens: 12}}"
    common = [f"data.tokenizer={tokenizer}", "model.vocab_size=290", f"run.name={name}", asked]
    return make_config(folder, "llama", *common, *overrides)


def samples_of(config: Config) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (config.run.folder / "samples.jsonl").read_text().splitlines()
    ]


class FakeWandb:
    """Remembers the tables that are logged."""

    class Settings:
        def __init__(self, **settings: Any): ...

    def __init__(self) -> None:
        self.tables: dict[int | None, Any] = {}

    def Table(self, columns: list[str], data: list[list[str]]) -> Any:
        return [dict(zip(columns, row, strict=True)) for row in data]

    def init(self, **settings: Any) -> SimpleNamespace:
        def log(record: dict[str, Any], step: int | None) -> None:
            if "samples" in record:
                self.tables[step] = record["samples"]

        return SimpleNamespace(dir="offline-run/files", log=log, finish=lambda exit_code: None)


def test_answers_are_those_of_the_checkpoint_and_training_is_not_disturbed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    plain = config_with_samples(tmp_path, "plain", "observe.samples.prompts=[]")
    train(plain)
    assert not (plain.run.folder / "samples.jsonl").exists()
    both = ("observe.wandb.mode=offline", "observe.tensorboard=true", "checkpoint.every=4")
    config = config_with_samples(tmp_path, "asked", *both)
    train(config_with_samples(tmp_path, "asked", *both, "train.stop_at=12"))
    assert [line["step"] for line in samples_of(config)] == [8] * 3 + [12] * 3
    # Of a step that no checkpoint has.
    with (config.run.folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 13, "prompt": "lost", "answer": "lost"}) + "\n")
    train(config)
    assert curve_of(config) == curve_of(plain), "bit for bit"
    assert "lost" in (config.run.folder / "samples.replaced.jsonl").read_text()
    found = samples_of(config)
    assert [line["step"] for line in found] == [8] * 3 + [12] * 3 + [16] * 3
    out = capfd.readouterr().out
    for step in (8, 12, 16):
        folder, said = (
            config.run.folder / "checkpoints" / f"step-{step:08d}",
            found[step // 4 * 3 - 6 :][:3],
        )
        generator = Generator.open(folder)
        greedy = [generator.request(prompt, 12, Sampling(temperature=0.0)) for prompt in PROMPTS]
        wanted = [answer.text for answer in generator.answer(greedy)]
        lines = [
            {"prompt": prompt, "answer": text} for prompt, text in zip(PROMPTS, wanted, strict=True)
        ]
        assert said == [{"step": step} | line for line in lines]
        assert wandb.tables[step] == lines
        assert f"sample {step:>2}/16  {PROMPTS[0]!r} → {wanted[0]!r}" in out
    events = (
        EventAccumulator(str(config.run.folder / "tensorboard"))
        .Reload()
        .Tensors("samples/2/text_summary")
    )
    assert events[-1].step == 16
    assert "    a hen and a cow met a fox" in events[-1].tensor_proto.string_val[0].decode()


def test_every_layout_says_the_same(tmp_path: Path) -> None:
    short = ["train.steps=3", "checkpoint.every=0", "observe.eval_every=0"]
    alone = config_with_samples(tmp_path, "alone", *short)
    layouts = {
        "tensor": ["parallel.tensor=2", "train.loss_chunk=8"],
        "pipeline": ["parallel.pipeline=2", "train.micro_batch_size=2"],
        "context": ["parallel.context=2"],
        "data": ["parallel.zero_stage=2", "train.micro_batch_size=2"],
    }
    configs = [
        config_with_samples(tmp_path, name, *short, *layout) for name, layout in layouts.items()
    ]
    train(alone)
    run_ranks(2, train_on_rank, configs)
    assert len({line["answer"] for line in samples_of(alone)}) == 3
    for config in configs:
        assert samples_of(config) == samples_of(alone), config.run.name


def test_what_cannot_be_answered_is_found_before_the_first_step(tmp_path: Path) -> None:
    config = config_with_samples(tmp_path, "long", f"observe.samples.prompts=[The cat, {'a' * 70}]")
    with pytest.raises(
        ConfigError, match=r"observe\.samples\.prompts\[1\] = .*the prompt has \d+ tokens; it must"
    ):
        train(config)
    assert not (config.run.folder / "config.yaml").exists(), "no run has begun"
    with pytest.raises(ConfigError, match=r"observe\.samples needs data\.tokenizer"):
        make_config(tmp_path, "llama", "observe.samples={prompts: [a]}")
    with pytest.raises(
        ConfigError, match=r"observe\.samples needs a model that answers, not model\.task: labels"
    ):
        config_with_samples(
            tmp_path,
            "classes",
            "model.task=labels",
            "model.labels=[a, b]",
            "data.document_mask=true",
        )
