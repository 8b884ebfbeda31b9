"""What a teacher says, kept on disk: made on each layout, resumed, learned from, and refused where it
is of something else. tests/tune/test_objectives.py compares what is learned on each layout."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chats import write_tokenizer
from megalite.comm.mesh import Axis
from megalite.config import Config
from megalite.data.teacher_logits import ABOUT, UNFINISHED, record_dtype
from megalite.dryrun.data import dry_config
from megalite.errors import ConfigError, DataError
from megalite.kernels.divergence import Columns, Divergence, compared, divergence
from megalite.kernels.loss import IGNORE
from megalite.kernels.top_divergence import TopComparison, top_tokens
from megalite.train import train
from megalite.training import teacher_logits
from megalite.training.teacher_logits import make_teacher_logits
from ranks import run_ranks
from small_runs import VOCAB, curve_of, make_config, metrics_of, write_corpus

LAYOUTS = {
    "tensor": "parallel.tensor=2",
    "pipeline": "parallel.pipeline=2",
    "context": "parallel.context=2",
    "data": "train.micro_batch_size=1",
}
PACKED = ("data.packing=best_fit", "data.document_mask=true", "data.border_loss=false")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = make_config(tmp_path_factory.mktemp("teacher"), "llama", "train.steps=8")
    train(config)
    return config.run.folder / "checkpoints" / "step-00000008"


def student_of(folder: Path, teacher: Path, *overrides: str) -> Config:
    """A student whose epoch ends within the third of its 6 steps."""
    if not (folder / "corpus.idx").exists():
        write_corpus(folder / "corpus", 9 * 16 + 1)
    return make_config(
        folder,
        "llama",
        f"objective={{name: distill, teacher: {teacher}, teacher_logits: {folder / 'said'}}}",
        "train.steps=6",
        *overrides,
    )


def live(config: Config) -> Config:
    """The same with the teacher in memory."""
    objective = config.objective.model_copy(update={"teacher_logits": None})
    run = config.run.model_copy(update={"name": "live"})
    return config.model_copy(update={"objective": objective, "run": run})


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_all_tokens_of_the_vocabulary_are_the_whole_distribution(kind: Any) -> None:
    """Of fewer tokens the divergence is smaller, and never negative."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 6, 40) * 2
    labels, columns = (
        torch.tensor([[3, IGNORE, 5, 1, 0, 39]]),
        Columns(0, 40, 40, None, lambda x: x),
    )
    wanted, found = Divergence(kind, 2.0, 0.8), {}
    for count in (None, 40, 8, 1):
        leaf = student.clone().requires_grad_()
        if count is None:
            losses = divergence(leaf * 1, teacher, labels, columns, wanted)
        else:
            top = top_tokens(teacher[0], count, 2.0, 0, 40, Axis()).normalised()
            losses = compared(leaf * 1, labels, TopComparison(top, columns, wanted))
        losses[..., 0].sum().backward()
        found[count] = losses.detach(), leaf.grad
    for one, other in zip(found[None], found[40], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    diverged = [found[count][0][..., 2] for count in (40, 8, 1)]
    assert all((a >= b - 1e-6).all() for a, b in itertools.pairwise(diverged))
    assert (diverged[-1] >= -1e-6).all()
    assert diverged[0].sum() > diverged[1].sum() * 1.01


@pytest.mark.parametrize("overrides", [(), ("train.loss_chunk=20", *PACKED)])
def test_a_run_learns_as_from_the_teacher_itself(
    overrides: tuple[str, ...], tmp_path: Path, teacher: Path
) -> None:
    """With all tokens of the vocabulary in fp32; over more than an epoch."""
    config = student_of(tmp_path, teacher, *overrides)
    make_teacher_logits(config, VOCAB, "fp32")
    train(config)
    train(live(config))
    for here, there in zip(curve_of(config), curve_of(live(config)), strict=True):
        assert here == pytest.approx(there, rel=2e-5)  # fp32, after several steps
    assert metrics_of(config)[0]["divergence"] > 0.01


def test_few_tokens_in_fp16_are_a_small_part_of_the_bytes_and_say_nearly_the_same(
    tmp_path: Path, teacher: Path
) -> None:
    config = student_of(tmp_path, teacher)
    make_teacher_logits(config, 16, "fp16")
    assert (tmp_path / "said" / "0.top").stat().st_size == 9 * 16 * (16 * 4 + 2)
    train(config)
    train(live(config))
    last, wanted = (curve_of(each)[-1][1] for each in (config, live(config)))
    assert last == pytest.approx(wanted, rel=0.05)
    assert last != wanted


def made(folder: Path) -> np.ndarray:
    return np.fromfile(folder / "0.top", record_dtype(16, VOCAB, "fp32"))


def make_on_rank(rank: int, world_size: int, configs: list[Config]) -> None:
    for config in configs:
        make_teacher_logits(config, 16, "fp32")


def test_each_layout_asks_the_teacher_the_same(tmp_path: Path, teacher: Path) -> None:
    """Tokens that are nearly as likely may change places; probabilities do not."""
    asked = {
        name: student_of(
            tmp_path, teacher, f"objective.teacher_logits={tmp_path / name}", override, *PACKED
        )
        for name, override in LAYOUTS.items()
    }
    alone = student_of(tmp_path, teacher, *PACKED)
    make_teacher_logits(alone, 16, "fp32")
    run_ranks(2, make_on_rank, list(asked.values()))
    wanted = made(tmp_path / "said")
    for name in asked:
        found = made(tmp_path / name)
        for field in ("log_p", "rest"):
            np.testing.assert_allclose(found[field], wanted[field], atol=2e-5, err_msg=name)
        assert (found["ids"] == wanted["ids"]).mean() > 0.99
        assert (tmp_path / name / "0.rows").read_bytes() == (
            tmp_path / "said" / "0.rows"
        ).read_bytes()


def test_it_goes_on_after_a_kill(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = student_of(tmp_path, teacher)
    make_teacher_logits(config, 16, "fp32")
    whole = made(tmp_path / "said")
    shutil.rmtree(tmp_path / "said")
    monkeypatch.setattr(teacher_logits, "SAVED_EVERY_S", 0.0)
    asked = ask_until(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        make_teacher_logits(config, 16, "fp32")
    with pytest.raises(DataError, match="is not finished; `megalite teacher-logits"):
        train(config)
    # What was written after the last save is not trusted.
    with open(tmp_path / "said" / "0.top", "ab") as file:
        file.write(b"x" * 100)
    with pytest.raises(DataError, match="holds what was made of another count; remove it"):
        make_teacher_logits(config, 17, "fp32")
    asked.clear()
    make_teacher_logits(config, 16, "fp32")
    assert len(asked) == 1, "of three batches, two were done"
    assert (made(tmp_path / "said") == whole).all()
    make_teacher_logits(config, 16, "fp32")
    assert len(asked) == 1, "all is done"


def ask_until(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Have the third batch end like Ctrl-C, unless the list of batches is cleared."""
    asked: list[int] = []
    real = teacher_logits._Making._ask

    def ask(*arguments: Any) -> Any:
        if len(asked) == most:
            raise KeyboardInterrupt
        asked.append(1)
        return real(*arguments)

    monkeypatch.setattr(teacher_logits._Making, "_ask", ask)
    return asked


def cut_off(folder: Path) -> None:
    with open(folder / "said" / "0.top", "r+b") as file:
        file.truncate(9 * 16 * (16 * 4 + 2) - 66)


def zeroed(folder: Path) -> None:
    with open(folder / "said" / "0.top", "r+b") as file:
        file.write(bytes(66))


def other_tokens(folder: Path) -> None:
    write_corpus(folder / "corpus", 9 * 16 + 1, seed=1)


def other_tokenizer(folder: Path) -> None:
    write_tokenizer(folder / "other", vocab_size=280)
    about = (folder / "said" / ABOUT).read_text()
    (folder / "said" / ABOUT).write_text(about.replace('"tokenizer": null', '"tokenizer": "v2:x"'))


def missing(folder: Path) -> None:
    (folder / "said" / ABOUT).unlink()


def other_teacher(folder: Path) -> None:
    path = folder / "said" / ABOUT
    path.write_text(path.read_text().replace('.safetensors": "', '.safetensors": "0'))


REFUSED: dict[str, tuple[Callable[[Path], None] | None, tuple[str, ...], str]] = {
    "cut off": (cut_off, (), r"0\.top is 9,438 bytes long, not 9,504: it was cut off"),
    "zeroed": (zeroed, (), "sample 0 has probabilities that do not add up to 1"),
    "other tokens": (other_tokens, (), r"said is of other tokens than .*corpus, which have changed"),
    "other samples": (None, ("data.seq_length=8",), "is of other samples of .*corpus: data.seq_length"),
    "other view": (None, ("data.document_mask=true",), "data.document_mask = false, not true"),
    "other temperature": (None, ("objective.temperature=2",), "objective.temperature = 1.0, not 2.0"),
    "other vocabulary": (None, ("model.vocab_size=112",), "of 97 tokens, and the trained model has"),
    "other tokenizer": (
        other_tokenizer,
        ("data.tokenizer=FOLDER/other", "model.vocab_size=300"),
        "of another tokenizer than data.tokenizer = .*other",
    ),
    "other teacher": (other_teacher, (), "of another teacher than objective.teacher = "),
    "missing": (missing, (), f"has no {ABOUT}; `megalite teacher-logits CONFIG` makes it"),
}  # fmt: skip


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("said")
    make_teacher_logits(student_of(folder, teacher), 16, "fp16")
    assert not (folder / "said" / UNFINISHED).exists()
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_of_something_else_is_refused(
    name: str, said: Path, tmp_path: Path, teacher: Path
) -> None:
    change, overrides, message = REFUSED[name]
    shutil.copytree(said, tmp_path, dirs_exist_ok=True)
    if change:
        change(tmp_path)
    asked = [each.replace("FOLDER", str(tmp_path)) for each in overrides]
    config = student_of(tmp_path, teacher, *asked)
    with pytest.raises((ConfigError, DataError), match=message):
        train(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.order=megatron", "objective.teacher_logits is of the samples of one epoch, which data.order"),
        ("objective={name: distill}", "distill needs objective.teacher, a model, or objective.teacher_logits"),
    ],
)  # fmt: skip
def test_settings_that_cannot_go_with_it_are_refused(
    override: str, message: str, tmp_path: Path, teacher: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        student_of(tmp_path, teacher, override)


def test_a_dry_run_says_that_it_has_other_tokens(tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(ConfigError, match="teacher_logits is of the run's own tokens, and a dry"):
        dry_config(student_of(tmp_path, teacher), tmp_path, 1)
