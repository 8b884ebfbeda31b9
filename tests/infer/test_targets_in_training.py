"""Targets that an encoder-decoder gives in validation: those of the checkpoint, on every layout,
and losses that know nothing of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from encoder_decoders import reversing_rows, rows_config, write_rows
from megalite.comm.mesh import Axis
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import ConfigError
from megalite.infer import in_training
from megalite.infer.generate import find_model
from megalite.infer.in_training import TargetsInTraining
from megalite.infer.sampling import Sampling
from megalite.infer.seq2seq import TargetGenerator
from megalite.train import train
from ranks import run_ranks
from small_runs import curve_of, metrics_of, train_on_rank

pytest.importorskip("rouge_score")
sacrebleu = pytest.importorskip("sacrebleu")

NAMES = ("bleu", "chrf", "rouge1", "rouge2", "rougeLsum")
LAYOUTS = {
    "data": ("parallel.zero_stage=1",), "tensor": ("parallel={tensor: 2, sequence: true}",),
    "pipeline": ("parallel.pipeline=2", "train.micro_batch_size=2"), "context": ("parallel.context=2",),
}  # fmt: skip
SHORT = ("train.steps=12", "observe.eval_every=12", "optimizer.lr=5e-3")


def test_ranks_that_gather_each_other_s_weights_run_the_same_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that was done earlier would leave the others waiting in a gather of ZeRO-3's."""
    passes: list[int] = []

    def targets_of(self: TargetsInTraining, model: object, sources: list[list[int]]) -> Tensor:
        passes.extend(number for (number,) in sources)
        return torch.zeros(len(sources), 2, dtype=torch.int64)

    measured = object.__new__(TargetsInTraining)
    measured.sources, measured.wanted, measured._end = [[1], [2], [3]], ["a"] * 3, 0
    measured._tokenizer = SimpleNamespace(decode_plain=lambda ids: "a")  # type: ignore[assignment]
    measured._config = SimpleNamespace(  # type: ignore[assignment]
        lengths=SimpleNamespace(target=2), parallel=SimpleNamespace(zero_stage=3)
    )
    mesh: Any = SimpleNamespace(data=Axis(2, 1), data_shares_experts=False, device="cpu")
    monkeypatch.setattr(in_training, "TrainingModel", lambda *_: SimpleNamespace(num_slots=2))
    monkeypatch.setattr(TargetsInTraining, "_targets", targets_of)
    measured.measure([], None, mesh)
    assert passes == [1, 2, 3]


def test_targets_are_those_of_the_checkpoint_on_every_layout(tmp_path: Path) -> None:
    common, rows = (*SHORT, "observe.target_rows=8"), reversing_rows(8, seed=1)
    plain = rows_config(tmp_path, *common, "observe.target_rows=0", "run.name=plain")
    write_rows(tmp_path / "held-out", rows)
    alone = rows_config(tmp_path, *common, "run.name=alone")
    others = [
        rows_config(tmp_path, *common, *more, f"run.name={name}") for name, more in LAYOUTS.items()
    ]
    train(plain)
    train(alone)
    run_ranks(2, train_on_rank, others)
    assert curve_of(alone) == curve_of(plain), "bit for bit"
    found = metrics_of(alone)[-1]
    folder = find_model(alone.run.folder)
    tokenizer, generator = load_tokenizer(folder), TargetGenerator.open(folder)
    said = [
        tokenizer.decode_plain(ids)
        for ids in generator.generate([[*row, 1] for row, _ in rows], 16, Sampling(temperature=0.0))
    ]
    wanted = [tokenizer.decode_plain(target) for _, target in rows]
    assert found["valid_bleu"] == pytest.approx(sacrebleu.corpus_bleu(said, [wanted]).score)
    assert found["valid_chrf"] == pytest.approx(sacrebleu.corpus_chrf(said, [wanted]).score)
    assert 0 < found["valid_rouge1"] < 1, "some words are those of the target"
    for other in others:
        # The same tokens, of which no probability is near another.
        last = metrics_of(other)[-1]
        np.testing.assert_allclose(
            [last[f"valid_{name}"] for name in NAMES], [found[f"valid_{name}"] for name in NAMES]
        )


def test_what_has_no_targets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"observe\.target_rows needs objective\.name: seq2seq"):
        rows_config(tmp_path, "observe.target_rows=5", "data.valid=[]")
