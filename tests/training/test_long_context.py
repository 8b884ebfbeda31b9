"""Pretrained models that are lengthened: trained as a plain loop trains them, and opened by
transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalite.data.mixture import build_mixtures
from megalite.errors import ConfigError
from megalite.infer.generate import load_model
from megalite.models import model_config
from megalite.train import train
from small_runs import make_config, metrics_of
from tiny_models import LLAMA

STEPS, BATCH, LENGTH = 20, 2, 48
SCALINGS: dict[str, dict[str, Any]] = {
    "yarn": {"type": "yarn", "factor": 4.0},
    "dynamic": {"type": "dynamic", "factor": 4.0},
    "linear": {"type": "linear", "factor": 4.0},
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_lengthened_model_is_trained_as_by_a_plain_loop(kind: str, tmp_path: Path) -> None:
    """For 16 positions, on samples of 48 tokens; the original length and the new one follow from
    the model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    short = LLAMA | {"max_position_embeddings": 16, "head_dim": 12}
    start = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**short)
    )
    start.save_pretrained(tmp_path / "start")
    config = make_config(
        tmp_path, {"hf": str(tmp_path / "start"), "rope_scaling": SCALINGS[kind]}, f"train.steps={STEPS}",
        f"train.global_batch_size={BATCH}", f"data.seq_length={LENGTH}", "checkpoint.every=0", "observe.eval_every=0",
        "optimizer={lr: 1e-2, clip: 1.0, weight_decay: 0.0, schedule: {name: constant}}",
    )  # fmt: skip
    assert config.model.max_positions == 64
    train(config)

    whole = {"dynamic": 16}.get(kind, 64)  # dynamic NTK begins at max_position_embeddings
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 16} if kind == "yarn" else {}
    longer = transformers.AutoConfig.for_model(
        **short | {"rope_parameters": rope, "max_position_embeddings": whole}
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "start", config=longer)
    optimizer = torch.optim.AdamW(
        theirs.parameters(),
        1e-2,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=0.0,
    )
    mixture, losses = build_mixtures(config)["train"], []
    assert mixture is not None
    for step in range(STEPS):
        samples = mixture.read(np.arange(step * BATCH, (step + 1) * BATCH))
        logits = theirs(torch.from_numpy(samples.tokens)).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(samples.labels).flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert [line["loss"] for line in metrics_of(config) if "loss" in line] == pytest.approx(
        losses, abs=1e-4
    )

    folder = config.run.folder / "checkpoints" / f"step-{STEPS:08}"
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert opened.config.max_position_embeddings == whole
    assert opened.config.rope_parameters.items() >= rope.items()
    tokens = torch.arange(LENGTH)[None]
    with torch.no_grad():
        assert (opened(tokens).logits - load_model(folder)(tokens)).abs().max() <= 1e-4
    assert model_config({"hf": str(folder)}).max_positions == 64


def test_what_is_given_beside_a_scaling_is_taken(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.AutoConfig.for_model(**LLAMA).save_pretrained(tmp_path)
    hf, yarn = str(tmp_path), SCALINGS["yarn"]
    found = model_config(
        {"hf": hf, "rope_scaling": yarn | {"original_max_positions": 32}, "max_positions": 100}
    )
    assert (found.max_positions, found.rope_scaling.original_max_positions) == (100, 32)  # type: ignore[attr-defined]
    assert (
        model_config(
            {"hf": hf, "rope_scaling": yarn | {"original_max_positions": 32}}
        ).max_positions
        == 128
    )
    assert model_config({"hf": hf, "rope_scaling": None}).max_positions == 64
    with pytest.raises(ConfigError, match=r"rope_scaling\.factor is required"):
        model_config({"hf": hf, "rope_scaling": {"type": "yarn"}})
