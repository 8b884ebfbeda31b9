"""A global batch that grows over the first samples: against a plain loop, on every layout, over
resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megalite.checkpoint.load import from_seed
from megalite.comm.mesh import Mesh
from megalite.config import Config
from megalite.data.mixture import build_mixtures
from megalite.errors import ConfigError
from megalite.models import family, weight_table
from megalite.plan import make_plan
from megalite.train import train
from ranks import run_ranks
from small_runs import curve_of, make_config, metrics_of, train_on_rank

STEPS, LR = 20, 1e-2
# 3 increments in 30 samples: a batch is 4 for 10 samples, then 6 and 8 likewise, then 10. Steps
# overshoot the ends.
SIZES = [4, 4, 4, 6, 6, 8] + [10] * 14
TOKENS = np.cumsum(SIZES) * 16


def ramped(folder: Path, name: str, *overrides: str) -> Config:
    return make_config(
        folder, "llama", f"run.name={name}", f"train.steps={STEPS}", "train.global_batch_size=10",
        "train.batch_ramp={start: 4, increment: 2, samples: 30}", "checkpoint.every=0", "observe.eval_every=0",
        f"optimizer={{lr: {LR}, clip: 1.0, weight_decay: 0.1, schedule: {{name: constant}}}}", *overrides,
    )  # fmt: skip


def plain_losses(config: Config) -> list[float]:
    """The same with torch alone, one batch after another of the run's order of samples."""
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
    losses, first = [], 0
    while len(losses) < STEPS:
        size = min(4 + 2 * (first * 3 // 30), 10)
        samples = mixture.read(np.arange(first, first + size))
        logits = model(torch.from_numpy(samples.tokens))
        loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(samples.labels).flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        first += size
    return losses


def test_a_growing_batch_is_that_of_a_plain_loop_on_every_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = ramped(tmp_path, "alone")
    train(alone)
    wanted = plain_losses(alone)
    found = metrics_of(alone)
    assert [line["loss"] for line in found if "loss" in line] == pytest.approx(wanted, abs=1e-4)
    assert [line["tokens"] for line in found if "loss" in line] == TOKENS.tolist()
    assert f"{STEPS} steps of 64 to 160 tokens, 2.75k in all" in capsys.readouterr().out
    layouts = {
        "data": ["parallel.zero_stage=2"],
        "pipeline": ["parallel.pipeline=2"],
        "zero bubble": ["parallel={pipeline: 2, virtual: 1, schedule: zero_bubble}"],
        "tensor": ["parallel.tensor=2", "train.micro_batch_size=2"],
    }
    configs = [
        ramped(tmp_path, name.replace(" ", "-"), *layout) for name, layout in layouts.items()
    ]
    run_ranks(2, train_on_rank, configs)
    for config in configs:
        losses = [line["loss"] for line in metrics_of(config) if "loss" in line]
        assert losses == pytest.approx(wanted, abs=1e-4), config.run.name


def test_a_growing_batch_goes_on_where_it_was(tmp_path: Path) -> None:
    """Stopped within the ramp, at one of its ends, and behind it."""
    unbroken = ramped(tmp_path, "unbroken")
    train(unbroken)
    for stop_at in (2, 3, 5, 9):
        train(ramped(tmp_path, "broken", f"train.stop_at={stop_at}"))
    broken = ramped(tmp_path, "broken")
    train(broken)
    assert curve_of(broken) == curve_of(unbroken)


def test_lengths_in_samples_follow_the_ramp(tmp_path: Path) -> None:
    config = ramped(tmp_path, "lengths").train
    for steps, size in enumerate(SIZES):
        before = sum(SIZES[:steps])
        assert config.samples_after(steps) == before
        assert config.batch_size(before) == size
        assert config.steps_for(before + 1) == steps + 1
    by_tokens = ramped(tmp_path, "tokens", "train.steps=null", f"train.tokens={TOKENS[-1]}")
    assert by_tokens.train.steps == STEPS


def test_what_does_not_ramp_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"batch_ramp grows from 4 by 4 at a time, which never makes .*size 10"
    ):
        ramped(tmp_path, "refused", "train.batch_ramp.increment=4")
    config = ramped(
        tmp_path,
        "refused",
        "train.micro_batch_size=5",
        "train.batch_ramp.start=5",
        "train.batch_ramp.increment=1",
    )
    with pytest.raises(
        ConfigError, match=r"train\.batch_ramp: a batch = 9 must be a multiple of micro_batch_size"
    ):
        make_plan(config, weight_table(config.model), 1)
    config = ramped(tmp_path, "refused", "parallel.engine=deepspeed")
    with pytest.raises(ConfigError, match=r"train\.batch_ramp needs parallel\.engine: native"):
        make_plan(config, weight_table(config.model), 1)
