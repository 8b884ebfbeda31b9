"""The loop: resuming is bitwise, layouts can change between two parts of a run, and the curve is
transformers' own."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megalite.checkpoint.folder import complete_steps, step_folder
from megalite.checkpoint.tensors import CheckpointError
from megalite.checkpoint.train_state import read_train_state
from megalite.config import Config
from megalite.data.mixture import build_mixtures
from megalite.data.tokenizer_training import train_tokenizer
from megalite.errors import DataError
from megalite.models import weight_table
from megalite.parallel.stage import Stage
from megalite.train import train
from megalite.training.schedules import learning_rate
from mixtures import windows
from ranks import run_ranks
from small_runs import curve_of, make_config, metrics_of, train_on_rank, write_corpus


def tensors_of(config: Config, step: int) -> dict[str, torch.Tensor]:
    folder = step_folder(config.run.folder / "checkpoints", step)
    return {
        f"{path.name}/{k}": v
        for path in sorted(folder.rglob("*.safetensors"))
        for k, v in load_file(path).items()
    }


RESUMED = [
    pytest.param(1, ("train.precision=fp32",), "llama", id="1-rank-fp32"),
    pytest.param(1, ("train.precision=bf16",), "gpt2", id="1-rank-bf16-dropout"),
    pytest.param(2, ("parallel.tensor=2", "train.precision=bf16"), "llama", id="tensor-2-bf16"),
    pytest.param(2, ("parallel.zero_stage=2", "train.precision=bf16"), "llama", id="data-2-zero-2-bf16"),
    pytest.param(
        2,
        ("parallel.pipeline=2", "parallel.schedule=zero_bubble", "train.precision=bf16", "data.document_mask=true"),
        "llama",
        id="pipeline-2-zero-bubble-bf16-packed",
    ),
    pytest.param(
        2, ("parallel.context=2", "train.precision=bf16", "train.recompute=full"), "llama", id="context-2-bf16"
    ),
    pytest.param(
        2, ("optimizer.name=muon", "parallel.zero_stage=1", "train.precision=bf16"), "gpt2", id="data-2-bf16-muon"
    ),
    pytest.param(
        2, ("optimizer.name=adafactor", "parallel.tensor=2", "train.precision=bf16"), "gpt2",
        id="tensor-2-bf16-adafactor",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "layout", "model"), RESUMED)
def test_resumed_run_is_bitwise_the_unbroken_one(
    tmp_path: Path, ranks: int, layout: tuple[str, ...], model: str
) -> None:
    settings = (*layout, "train.steps=8", "observe.eval_every=4")
    unbroken = make_config(tmp_path, model, *settings, "run.name=unbroken")
    first = make_config(tmp_path, model, *settings, "run.name=broken", "train.stop_at=3")
    rest = make_config(tmp_path, model, *settings, "run.name=broken")
    run_ranks(ranks, train_on_rank, [unbroken, first, rest])
    assert [line[0] for line in curve_of(rest)] == list(range(1, 9))
    assert curve_of(rest) == curve_of(unbroken)
    assert metrics_of(rest)[-1]["valid_loss"] == metrics_of(unbroken)[-1]["valid_loss"]
    wanted, found = tensors_of(unbroken, 8), tensors_of(rest, 8)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_deterministic_runs_forbid_torch_everything_else_and_change_nothing_on_cpus(
    tmp_path: Path,
) -> None:
    curves = []
    for number, overrides in enumerate((["train.deterministic=true"], [])):
        config = make_config(tmp_path, "gpt2", "train.steps=2", f"run.name=run{number}", *overrides)
        train(config)
        assert torch.are_deterministic_algorithms_enabled() == config.train.deterministic
        curves.append(curve_of(config))
    assert curves[0] == curves[1]


@pytest.mark.usefixtures("drawn")
def test_loss_falls_and_metrics_are_complete(tmp_path: Path) -> None:
    config = make_config(tmp_path, "llama", "train.steps=30", "observe.tensorboard=true")
    train(config)
    steps = [line for line in metrics_of(config) if "loss" in line]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    wanted = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "step_time_s", "tflops"}
    # No mfu: the peak of this chip is not known.
    assert all(line.keys() == wanted for line in steps)
    assert steps[-1]["tokens"] == 30 * 4 * 16
    evaluations = [line for line in metrics_of(config) if "valid_loss" in line]
    assert [line["step"] for line in evaluations] == [8, 16, 24, 30]
    folder = config.run.folder
    assert (folder / "loss.png").stat().st_size > 10_000
    assert (folder / "config.yaml").read_text() == config.to_yaml()
    assert any((folder / "tensorboard").iterdir())
    assert complete_steps(folder / "checkpoints") == [16, 24, 30]  # keep: 3
    train(config)  # a finished run: nothing left to do, nothing lost
    assert [line for line in metrics_of(config) if "loss" in line] == steps


PIPELINE = ("parallel.pipeline=2", "parallel.zero_stage=1")
CHANGES = {
    "llama": [
        (2, ("parallel.tensor=2", "train.stop_at=3")),
        (4, (*PIPELINE, "train.stop_at=6")),
        (2, ("parallel.context=2", "parallel.zero_stage=2", "train.stop_at=12")),
        (1, ()),
    ],
    "gpt2": [  # with dropout
        (2, (*PIPELINE, "parallel.schedule=zero_bubble", "train.stop_at=4")),
        (2, ("parallel.tensor=2", "train.recompute=full", "train.stop_at=9")),
        (2, ("parallel.zero_stage=2", "train.micro_batch_size=2", "train.stop_at=11")),
        (1, ()),
    ],
    "muon": [
        (4, ("parallel.tensor=2", "parallel.zero_stage=1", "train.stop_at=4")),
        (2, ("parallel.zero_stage=2", "train.stop_at=9")),
        (2, (*PIPELINE, "train.stop_at=11")),
        (1, ()),
    ],
    "adafactor": [
        (4, ("parallel.tensor=2", "parallel.zero_stage=2", "train.stop_at=4")),
        (2, (*PIPELINE, "train.stop_at=9")),
        (1, ()),
    ],
    "experts": [
        (4, ("parallel.expert=4", "train.stop_at=3")),
        (
            4,
            (
                "parallel.tensor=2",
                "parallel.expert=2",
                "parallel.expert_tensor=1",
                "train.stop_at=6",
            ),
        ),
        (2, (*PIPELINE, "train.stop_at=9")),
        (2, ("parallel.expert_tensor=2", "parallel.zero_stage=2", "train.stop_at=12")),
        (1, ()),
    ],
}


@pytest.mark.parametrize("case", CHANGES)
def test_layout_changes_between_the_parts_of_a_run(tmp_path: Path, case: str) -> None:
    """On the curve of one unbroken process, validation included. The ranks' numbers differ in the
    last bits and training amplifies that; 1e-4 is the bound the project asks of curves."""
    packed = ("data.document_mask=true",)
    given = {"llama": packed, "gpt2": (), "experts": packed}.get(case, (f"optimizer.name={case}",))
    model = case if case in ("gpt2", "experts") else "llama"
    unbroken = make_config(tmp_path, model, "run.name=unbroken", *given)
    train(unbroken)
    for ranks, overrides in CHANGES[case]:
        run_ranks(
            ranks,
            train_on_rank,
            [make_config(tmp_path, model, "run.name=changing", *given, *overrides)],
        )
    changing = make_config(tmp_path, model, "run.name=changing", *given)
    for mine, theirs in zip(curve_of(changing), curve_of(unbroken), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    wanted = {
        line["step"]: line["valid_loss"] for line in metrics_of(unbroken) if "valid_loss" in line
    }
    found = {
        line["step"]: line["valid_loss"] for line in metrics_of(changing) if "valid_loss" in line
    }
    assert found.keys() > wanted.keys()  # a part that stops is validated at its end
    assert {step: found[step] for step in wanted} == pytest.approx(wanted, rel=1e-4)


def transformers_curve(folder: Path, config: Config) -> list[float]:
    """A plain loop over transformers' model and torch's AdamW on the same batches."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decays = {name for weight in weight_table(config.model) for name in weight.hf if weight.decay}
    decayed = [p for name, p in model.named_parameters() if name in decays]
    rest = [p for name, p in model.named_parameters() if name not in decays]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    data = build_mixtures(config)["train"]
    assert data is not None
    losses = []
    for step in range(config.train.steps):
        tokens = torch.from_numpy(windows(data, range(step * 4, step * 4 + 4)))
        # transformers shifts labels itself: the last token of a sample is only predicted.
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, config.train.steps, config.optimizer)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "overrides", [(), ("parallel.tensor=2",), ("parallel.zero_stage=2",)], ids=["1", "tp2", "dp2"]
)
def test_curve_equals_transformers(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """20 steps from an exported checkpoint: fp32, within 1e-4 of LlamaForCausalLM with
    torch.optim.AdamW."""
    exported = make_config(tmp_path, "llama", "run.name=exported", "train.steps=3")
    train(exported)
    folder = step_folder(exported.run.folder / "checkpoints", 3)
    overrides += ("run.name=ours", "train.steps=20", f"model.hf={folder}")
    ours = make_config(tmp_path, {}, *overrides)
    run_ranks(2 if len(overrides) > 3 else 1, train_on_rank, [ours])
    found = [line[1] for line in curve_of(ours)]
    assert found == pytest.approx(transformers_curve(folder, ours), abs=1e-4)
    assert len(found) == 20


def test_validation_is_that_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first samples each time, without dropout, over all their labels."""
    from transformers import AutoModelForCausalLM

    modes, forward = set(), Stage.forward

    def noted(self: Stage, *arguments: Any) -> torch.Tensor:
        modes.add((self.training, torch.is_grad_enabled()))
        return forward(self, *arguments)

    monkeypatch.setattr(Stage, "forward", noted)
    config = make_config(
        tmp_path, "gpt2", "train.steps=2", "observe.eval_every=1", "observe.eval_batches=2"
    )
    train(config)
    model = AutoModelForCausalLM.from_pretrained(
        step_folder(config.run.folder / "checkpoints", 2)
    ).eval()
    data = build_mixtures(config)["valid"]
    assert data is not None
    tokens = torch.from_numpy(windows(data, range(2 * 4)))
    with torch.no_grad():
        wanted = model(input_ids=tokens, labels=tokens).loss.item()
    assert modes == {(True, True), (False, False)}, "modules of a family of one's own may ask"
    found = metrics_of(config)[-1]
    # Sums of fp32.
    assert (found["step"], found["valid_loss"]) == (
        2,
        pytest.approx(wanted, rel=1e-5),
    )
    assert found["valid_perplexity"] == pytest.approx(math.exp(found["valid_loss"]))


def test_other_data_is_refused_on_resume(tmp_path: Path) -> None:
    train(make_config(tmp_path, "llama", "train.stop_at=2"))
    write_corpus(tmp_path / "corpus", seed=1)
    with pytest.raises(DataError, match="other data"):
        train(make_config(tmp_path))


def test_other_model_is_refused_on_resume(tmp_path: Path) -> None:
    train(make_config(tmp_path, "llama", "train.stop_at=2"))
    with pytest.raises(CheckpointError, match=r"model.hidden_size = 64, there 32"):
        train(make_config(tmp_path, "llama", "model.hidden_size=64"))


def test_another_optimizer_takes_over_what_fits(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = make_config(tmp_path, "llama", "train.stop_at=4", "train.precision=bf16")
    rest = make_config(
        tmp_path,
        "llama",
        "train.stop_at=5",
        "train.precision=bf16",
        "optimizer.name=muon",
        "optimizer.ema=0.9",
    )
    train(first)
    before = tensors_of(first, 4)
    capfd.readouterr()
    train(rest)
    said = capfd.readouterr().out
    assert "optimizer.name adamw → muon" in said
    assert re.search(
        r"of some weights, whose states begin at zero: momentum_buffer of \d+ weights\n", said
    )
    after = tensors_of(rest, 5)
    embedding, matrix = "model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight"
    # The embedding's moments went on; the matrix has momentum alone, of one gradient.
    grad = (
        after[f"exp_avg.safetensors/{embedding}"] - 0.9 * before[f"exp_avg.safetensors/{embedding}"]
    ) / 0.1
    wanted = 0.95 * before[f"exp_avg_sq.safetensors/{embedding}"] + 0.05 * grad * grad
    torch.testing.assert_close(
        after[f"exp_avg_sq.safetensors/{embedding}"], wanted, rtol=1e-3, atol=1e-9
    )
    assert f"exp_avg.safetensors/{matrix}" not in after
    assert after[f"momentum_buffer.safetensors/{matrix}"].any()
    # The average began as the exact weights: at step 5 its decay is 6/15.
    begun = before[f"master.safetensors/{matrix}"]
    wanted = 0.4 * begun + 0.6 * after[f"master.safetensors/{matrix}"]
    torch.testing.assert_close(after[f"ema.safetensors/{matrix}"], wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["muon", "lion"])
def test_states_that_begin_in_a_runs_middle_are_corrected_for_updates_since(
    tmp_path: Path, name: str
) -> None:
    """AdamW divides a first gradient by its own size, whatever another optimizer did before; and
    knows of that again when the run goes on from a checkpoint."""

    def config_of(folder: str, last: int, *overrides: str) -> Config:
        (tmp_path / folder).mkdir(exist_ok=True)
        constant = "optimizer.schedule={name: constant}"
        plain = constant, "optimizer.weight_decay=0", "optimizer.clip=0"
        return make_config(tmp_path / folder, "llama", f"train.stop_at={last}", *plain, *overrides)

    for folder, stops in ("whole", (7,)), ("parts", (5, 7)):
        train(config_of(folder, 4, f"optimizer.name={name}"))
        for stop in stops:
            train(config_of(folder, stop))
    found = [tensors_of(config_of(folder, 7), 7) for folder in ("whole", "parts")]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(x, found[1][key]) for key, x in found[0].items())
    config = config_of("parts", 5)
    before, after = (tensors_of(config, step) for step in (4, 5))
    matrix = "model.safetensors/model.layers.0.mlp.down_proj.weight"
    grad = after[matrix.replace("model.safetensors", "exp_avg.safetensors")] / 0.1
    moved = (before[matrix] - after[matrix]) / config.optimizer.lr
    # All of a step's size; those of an uncorrected mean are about half of it after four updates.
    torch.testing.assert_close(moved, grad / (grad.abs() + 1e-8), rtol=1e-2, atol=2e-2)
    begun = read_train_state(step_folder(config.run.folder / "checkpoints", 7))
    (entry,) = begun["states_begun"]
    assert entry["updates"] == 4
    # Muon's AdamW went on with the embedding; Lion has one average, which means something else.
    assert ("model.embed_tokens.weight" in entry["weights"]) == (name == "lion")


def test_never_resume_refuses_to_mix_runs(tmp_path: Path) -> None:
    train(make_config(tmp_path, "llama", "train.stop_at=2"))
    with pytest.raises(CheckpointError, match=r"choose another run.name"):
        train(make_config(tmp_path, "llama", "checkpoint.resume=never"))


def test_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    (tmp_path / "corpus.json").write_text('{"vocab_size": 98}')
    with pytest.raises(DataError, match=r"98 token ids, but model.vocab_size = 97"):
        train(config)


def test_a_token_id_the_model_does_not_have_is_named(tmp_path: Path) -> None:
    """Megatron's own files say nothing of their vocabulary; a cut vocabulary would train on
    nonsense silently."""
    config = make_config(tmp_path)
    # 97.
    (tmp_path / "corpus.bin").write_bytes((tmp_path / "corpus.bin").read_bytes()[:-2] + b"\x61\x00")
    with pytest.raises(DataError, match=r"sample 32 holds token id 97, but model.vocab_size = 97"):
        train(config)


def other_corpus_on_rank_1(rank: int, world_size: int, folder: Path) -> str:
    config = make_config(folder / str(rank))
    if rank == 1:
        write_corpus(folder / "1" / "corpus", seed=5)
    with pytest.raises(DataError) as caught:
        train(config)
    return str(caught.value)


def test_a_rank_that_reads_other_files_is_named(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    assert all(
        "rank 1 has another" in text for text in run_ranks(2, other_corpus_on_rank_1, tmp_path)
    )


def test_test_split_is_evaluated_once_at_the_end(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, "llama", "train.steps=3", f"data.test=[{{path: {tmp_path / 'corpus'}}}]"
    )
    train(config)
    found = [line for line in metrics_of(config) if "test_loss" in line]
    assert [line["step"] for line in found] == [3]
    valid = [line["valid_loss"] for line in metrics_of(config) if "valid_loss" in line]
    assert found[0]["test_loss"] == valid[-1]  # the same file here


def test_another_tokenizer_than_the_datas_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("def f(x): return x + 1\n" * 50)
    train_tokenizer([str(tmp_path / "text.txt")], str(tmp_path / "tokenizer"), 300)
    config = make_config(
        tmp_path,
        "llama",
        "model.vocab_size=320",
        "train.steps=1",
        f"data.tokenizer={tmp_path / 'tokenizer'}",
    )
    (tmp_path / "corpus.json").write_text('{"vocab_size": 97, "tokenizer_fingerprint": "other"}')
    with pytest.raises(DataError, match="made with another tokenizer"):
        train(config)


def test_torchrun_starts_it(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, "llama", "parallel.tensor=2", "train.steps=2", "observe.log_every=1"
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "megalite",
    ]
    done = subprocess.run(
        [*command, "train", str(tmp_path / "config.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"step +2/2 +loss", done.stdout)
    assert "saved" in done.stdout


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.pipeline=2",),
        ("parallel.context=2", "data.document_mask=true"),
        ("train.micro_batch_size=2",),
    ],
    ids=["pipeline-2", "context-2", "data-2"],
)
def test_each_source_is_followed_on_its_own(tmp_path: Path, layout: tuple[str, ...]) -> None:
    """What was consumed of it, through phases of other weights, and its loss in validation."""
    sources = [
        f"{{path: {write_corpus(tmp_path / name, 16 * n + 1, n)}}}"
        for name, n in (("web", 20), ("code", 8))
    ]
    both = (f"data.train=[{','.join(sources)}]", f"data.valid=[{','.join(sources)}]")
    phases = "data.phases=[{after_step: 5, weights: {web: 1}}, {after_step: 8, weights: {code: 1, web: 1}}]"
    config = make_config(
        tmp_path, "llama", *both, phases, *layout, "run.name=both", "observe.eval_batches=2"
    )
    alone = [  # half as many samples, all of one source
        make_config(
            tmp_path, "llama", both[0], phases, *layout, f"data.valid=[{source}]", f"run.name=alone-{number}",
            "observe.eval_batches=1",
        )
        for number, source in enumerate(sources)
    ]  # fmt: skip
    run_ranks(2, train_on_rank, [config, *alone])
    steps = [line for line in metrics_of(config) if "loss" in line]
    assert all(line["tokens/web"] + line["tokens/code"] == line["tokens"] for line in steps)
    in_second_phase = steps[4]["tokens/code"], steps[7]["tokens/code"]
    assert in_second_phase[0] == in_second_phase[1] > 0
    assert steps[15]["tokens/code"] > in_second_phase[1]
    state = read_train_state(step_folder(config.run.folder / "checkpoints", 16))
    assert {name: count * 16 for name, count in state["data"]["consumed"].items()} == {
        name: steps[15][f"tokens/{name}"] for name in ("web", "code")
    }
    found = [line for line in metrics_of(config) if "valid_loss" in line]
    for name, other in zip(("web", "code"), alone, strict=True):
        wanted = [line["valid_loss"] for line in metrics_of(other) if "valid_loss" in line]
        assert len(wanted) == 2
        assert [line[f"valid_loss/{name}"] for line in found] == pytest.approx(wanted, rel=1e-6)
    for line in found:  # as many rows of each: the mean of all is the mean of both
        assert line["valid_loss"] == pytest.approx(
            (line["valid_loss/web"] + line["valid_loss/code"]) / 2, rel=1e-6
        )
