"""Tasks in training: the numbers of the checkpoint, on every layout, and losses that know nothing
of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

from lm_eval.models.huggingface import HFLM

from local_tasks import NAMES, write_tasks, write_tokenizer
from megalite.config import Config
from megalite.errors import ConfigError, DataError
from megalite.infer.evaluate import Asked, evaluate_model
from megalite.infer.harness import load_tasks, numbers_of
from megalite.train import train
from ranks import run_ranks
from small_runs import curve_of, make_config, metrics_of, train_on_rank


def config_with_tasks(folder: Path, name: str, *overrides: str) -> Config:
    tasks = folder / "tasks" if (folder / "tasks").exists() else write_tasks(folder / "tasks")
    tokenizer = write_tokenizer(folder / "tokenizer")
    asked = (
        f"observe.tasks={{names: [{','.join(NAMES)}], include_path: {tasks}, every: 8, limit: 5}}"
    )
    common = [f"data.tokenizer={tokenizer}", "model.vocab_size=290", f"run.name={name}", asked]
    return make_config(folder, "llama", *common, *overrides)


def numbers_in(config: Config) -> dict[int, dict[str, Any]]:
    lines = [line for line in metrics_of(config) if any(key.startswith("tasks/") for key in line)]
    return {
        line["step"]: {
            key.removeprefix("tasks/"): value for key, value in line.items() if key != "step"
        }
        for line in lines
    }


class FakeWandb:
    """Remembers what is logged: (run's id, step, record)."""

    class Settings:
        def __init__(self, **settings: Any): ...

    def __init__(self) -> None:
        self.logged: list[tuple[str, int | None, dict[str, float]]] = []

    def init(self, **settings: Any) -> SimpleNamespace:
        def log(record: dict[str, float], step: int | None) -> None:
            self.logged.append((settings["id"], step, record))

        return SimpleNamespace(dir="offline-run/files", log=log, finish=lambda exit_code: None)


def test_numbers_are_those_of_the_checkpoint_and_training_is_not_disturbed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    plain = config_with_tasks(tmp_path, "plain", "observe.tasks.names=[]")
    config = config_with_tasks(tmp_path, "measured", "observe.wandb.mode=offline")
    train(plain)
    train(config)
    assert curve_of(config) == curve_of(plain), "bit for bit"
    found = numbers_in(config)
    assert list(found) == [8, 16]
    asked = Asked(NAMES, tmp_path / "tasks", limit=5)
    for step, numbers in found.items():
        folder = config.run.folder / "checkpoints" / f"step-{step:08d}"
        # The same arithmetic in batches of other sizes.
        assert numbers == pytest.approx(evaluate_model(folder, asked), rel=1e-5)
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    through_transformers = load_tasks(NAMES, tmp_path / "tasks", limit=5).run(theirs, uncertainty=0)
    assert found[16] == pytest.approx(numbers_of(through_transformers), rel=1e-5)
    assert found[8] != found[16]
    named = {
        step: {f"tasks/{name}": value for name, value in numbers.items()}
        for step, numbers in found.items()
    }
    logged = [entry for entry in wandb.logged if "tasks/story/bits_per_byte" in entry[2]]
    (run_id, *_), *_ = logged
    assert logged[:2] == [(run_id, step, named[step]) for step in (8, 16)]
    for (other_id, step, record), at in zip(logged[2:], (8, 16), strict=True):
        assert (other_id, step) == (f"{run_id}-evaluations", None)
        assert record == pytest.approx(named[at] | {"checkpoint_step": at}, rel=1e-5)
    files = sorted((config.run.folder / "evaluations").iterdir())
    assert [file.name[:13] for file in files] == ["step-00000008", "step-00000016"]
    results = json.loads(files[1].read_text())["results"]
    assert results["story"]["bits_per_byte,none"] == pytest.approx(
        found[16]["story/bits_per_byte"], rel=1e-5
    )
    assert "tasks  8/16  sounds/acc " in capfd.readouterr().out


def test_every_layout_finds_the_same(tmp_path: Path) -> None:
    short = ["train.steps=3", "checkpoint.every=0", "observe.eval_every=0"]
    experts = ["model.family=mixtral", "model.num_experts=4", "model.experts_per_token=2"]
    alone = [
        config_with_tasks(tmp_path, "alone", *short),
        config_with_tasks(tmp_path, "routed", *short, *experts),
    ]
    layouts = {
        "tensor": ["parallel.tensor=2", "train.loss_chunk=8"],
        "pipeline": ["parallel.pipeline=2", "train.micro_batch_size=2"],
        "context": ["parallel.context=2"],
        "data": ["parallel.zero_stage=2", "train.micro_batch_size=2"],
        "experts": ["parallel.expert=2", *experts],
    }
    configs = [
        config_with_tasks(tmp_path, name, *short, *layout) for name, layout in layouts.items()
    ]
    for config in alone:
        train(config)
    run_ranks(2, train_on_rank, configs)
    dense, routed = (numbers_in(config)[3] for config in alone)
    for config in configs:
        wanted = routed if config.model.family == "mixtral" else dense
        # Three steps of training, whose rounding differs from layout to layout.
        assert numbers_in(config)[3] == pytest.approx(wanted, rel=1e-4), config.run.name


def test_what_cannot_be_evaluated_is_found_before_the_first_step(tmp_path: Path) -> None:
    config = config_with_tasks(tmp_path, "missing")
    (tmp_path / "tasks" / "story.jsonl").unlink()
    with pytest.raises(DataError, match=r"task story cannot be loaded: .*story\.jsonl"):
        train(config)
    broken = config_with_tasks(tmp_path, "broken", "observe.tasks.names=[next_word]")
    judges, task = tmp_path / "tasks" / "judges.py", tmp_path / "tasks" / "next_word.yaml"
    judges.write_text("def judge(row, answers):\n    return {'said': row['solution']}\n")
    with pytest.raises(
        DataError, match=r"the tasks next_word cannot be evaluated: KeyError: 'solution'"
    ):
        train(broken)
    task.write_text(task.read_text().replace("max_gen_toks: 12", "max_gen_toks: 64"))
    with pytest.raises(ConfigError, match="answers of 64 tokens from a model that takes 64 in all"):
        train(broken)
    assert not (tmp_path / "runs").exists(), "no run has begun"


def test_tasks_need_a_tokenizer_and_a_model_that_answers(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"needs a model that answers, not model\.task: classification"
    ):
        config_with_tasks(
            tmp_path,
            "classes",
            "model.task=classification",
            "model.labels=[a, b]",
            "data.document_mask=true",
        )
    with pytest.raises(ConfigError, match=r"observe\.tasks needs data\.tokenizer"):
        make_config(tmp_path, "llama", "observe.tasks={names: [story]}")
