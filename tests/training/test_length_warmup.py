"""Shorter sequences at first: against a plain loop, on every layout, over resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megalite.checkpoint.load import from_seed
from megalite.comm.mesh import Mesh
from megalite.config import Config
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.loader import MicroBatch
from megalite.data.mixture import build_mixtures
from megalite.errors import ConfigError, DataError
from megalite.models import family, weight_table
from megalite.observe.throughput import model_flops_per_token
from megalite.plan import make_plan
from megalite.train import train
from ranks import run_ranks
from small_runs import curve_of, make_config, metrics_of, train_on_rank

STEPS, LR = 8, 1e-2
LENGTHS = [4, 4, 8, 8, 8, 16, 16, 16]
WARMUP = "data.seq_length_warmup=[{seq_length: 4, until_step: 2}, {seq_length: 8, until_step: 5}]"


def warmed(folder: Path, name: str, *overrides: str) -> Config:
    return make_config(
        folder, "llama", f"run.name={name}", f"train.steps={STEPS}", WARMUP, "checkpoint.every=0",
        "observe.eval_every=4", "data.document_mask=true",
        f"optimizer={{lr: {LR}, clip: 1.0, weight_decay: 0.1, schedule: {{name: constant}}}}", *overrides,
    )  # fmt: skip


def plain_losses(config: Config) -> list[float]:
    """The same with torch alone: the model sees each row as a sequence, and each document in it by
    itself."""
    mixture, table = build_mixtures(config)["train"], weight_table(config.model)
    assert mixture is not None
    model = family(config.model.family).MODEL(config.model)
    parameters, read = dict(model.named_parameters()), from_seed(config.train.seed, Mesh.alone())
    for weight in table:
        parameters[weight.name].data.copy_(
            read(weight, "weight", 0, weight.numel).view(weight.shape)
        )
    decay = {weight.name: 0.1 if weight.decay else 0.0 for weight in table}
    groups = [
        {"params": [parameter], "weight_decay": decay[name]}
        for name, parameter in parameters.items()
    ]
    settings = config.optimizer
    optimizer = torch.optim.AdamW(groups, LR, betas=settings.betas, eps=settings.eps)
    losses = []
    for step, length in enumerate(LENGTHS):
        samples = mixture.read(np.arange(4 * step, 4 * step + 4))
        tokens, labels, documents = (
            torch.from_numpy(x).view(-1, length) for x in samples if x is not None
        )
        total = torch.zeros(())
        for row in range(len(tokens)):
            for number in documents[row].unique():
                here = documents[row] == number
                logits = model(tokens[row, here][None])
                total = total + F.cross_entropy(logits[0], labels[row, here], reduction="sum")
        loss = total / labels.numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_growing_sequences_are_those_of_a_plain_loop_on_every_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = warmed(tmp_path, "alone")
    train(alone)
    wanted = plain_losses(alone)
    found = [line for line in metrics_of(alone) if "loss" in line]
    assert [line["loss"] for line in found] == pytest.approx(wanted, abs=1e-4)
    assert [line["tokens"] for line in found] == [64 * step for step in range(1, STEPS + 1)]
    assert (
        "sequences of 4 tokens up to step 2, 8 tokens up to step 5, then of 16"
        in capsys.readouterr().out
    )
    for line, length in zip(found, LENGTHS, strict=True):
        flops = line["tflops"] * 1e12 * line["step_time_s"] / 64
        assert flops == pytest.approx(model_flops_per_token(alone, length))
    layouts = {
        "data": ["parallel.zero_stage=2"],
        "pipeline": ["parallel.pipeline=2"],
        "zero-bubble": ["parallel={pipeline: 2, virtual: 1, schedule: zero_bubble}"],
        "tensor": ["parallel.tensor=2", "train.micro_batch_size=2"],
        "context": ["parallel.context=2"],
    }
    configs = [warmed(tmp_path, name, *layout) for name, layout in layouts.items()]
    run_ranks(2, train_on_rank, configs)
    for config in configs:
        losses = [line["loss"] for line in metrics_of(config) if "loss" in line]
        assert losses == pytest.approx(wanted, abs=1e-4), config.run.name


def test_growing_sequences_go_on_where_they_were(tmp_path: Path) -> None:
    """Stopped within a phase and at the end of one."""
    unbroken = warmed(tmp_path, "unbroken")
    train(unbroken)
    for stop_at in ("1", "2", "4", "null"):
        broken = warmed(tmp_path, "broken", f"train.stop_at={stop_at}")
        train(broken)
    assert curve_of(broken) == curve_of(unbroken)


def test_rows_of_a_sample_have_keys_and_documents_of_their_own() -> None:
    whole = MicroBatch(
        torch.arange(16).view(2, 8), torch.arange(16).view(2, 8) + 1, torch.tensor([6, 7]),
        torch.tensor([[0, 0, 0, 1, 1, 1, 2, 3], [0, 0, 0, 0, 0, 0, 0, 0]]),
    )  # fmt: skip
    found = whole.cut(4)
    assert torch.equal(found.tokens, torch.arange(16).view(4, 4))
    assert torch.equal(found.labels, found.tokens + 1)
    assert found.samples.tolist() == [12, 13, 14, 15]
    assert found.documents is not None
    assert found.documents.tolist() == [[0, 0, 0, 1], [0, 0, 1, 2], [0] * 4, [0] * 4]
    assert whole.cut(8) is whole


def test_labelled_rows_are_not_cut(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "rows", np.uint16, np.uint8) as writer:
        writer.add_documents(np.arange(6), [6], np.ones(6, np.int64))
    with pytest.raises(
        DataError, match=r"holds rows of labelled data, which data\.seq_length_warmup would cut"
    ):
        train(warmed(tmp_path, "rows", f"data.train=[{{path: {tmp_path}/rows}}]"))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            "data.seq_length_warmup=[{seq_length: 5, until_step: 2}]",
            "seq_length 5 must divide data.seq_length 16",
        ),
        (
            "data.seq_length_warmup=[{seq_length: 16, until_step: 2}]",
            "seq_length 16 must divide .* and be less",
        ),
        (
            "data.seq_length_warmup=[{seq_length: 8, until_step: 2}, {seq_length: 4, until_step: 3}]",
            "each phase must be longer and end later than the one before",
        ),
        (
            "parallel.context=4",
            r"data\.seq_length_warmup: seq_length = 4 must be a multiple of 2 × parallel",
        ),
    ],
)
def test_what_does_not_grow_is_refused(tmp_path: Path, settings: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        make_plan(
            warmed(tmp_path, "refused", settings), weight_table(make_config(tmp_path).model), 4
        )
