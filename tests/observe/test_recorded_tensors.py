"""`megalite parity`: two layouts agree, a difference is named with its place, and a plain model
stands beside a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megalite.cli import main
from megalite.config import Config
from megalite.data.mixture import build_mixtures
from megalite.observe.tensors import folder_of, read_steps, record_model
from megalite.train import train
from ranks import run_ranks
from small_runs import make_config, train_on_rank

SHORT = ("train.steps=3", "checkpoint.every=0", "observe.eval_every=0", "profile.tensors=[1,3]")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Of one process, and of two that share matrices and a pipeline."""
    root = tmp_path_factory.mktemp("runs")
    alone = make_config(root, "llama", *SHORT, "run.name=alone")
    layouts = {"tensor": ["parallel.tensor=2"], "pipeline": ["parallel.pipeline=2"]}
    others = {
        name: make_config(root, "llama", *SHORT, f"run.name={name}", *each)
        for name, each in layouts.items()
    }
    train(alone)
    run_ranks(2, train_on_rank, [*others.values()])
    return {"alone": alone, **others}


@pytest.mark.parametrize("other", ["tensor", "pipeline"])
def test_layouts_agree(
    other: str, runs: dict[str, Config], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (str(runs[name].run.folder) for name in ("alone", other))
    assert main(["parity", a, b]) == 0
    said = capsys.readouterr().out
    assert "step 1\n  weights before  21 tensors, equal bit for bit" in said
    assert "step 3" in said
    assert "no difference beyond rounding" in said
    assert main(["parity", a, b, "--tolerance", "1e-12"]) == (other == "tensor"), (
        "whose sums have another order"
    )


def test_a_difference_is_named_with_its_place(
    runs: dict[str, Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "b"
    for file in sorted(runs["alone"].run.folder.glob("tensors/*/*")):
        target = root / file.relative_to(runs["alone"].run.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    file = folder_of(root, 3) / "rank-00000.safetensors"
    tensors = load_file(file)
    tensors["grad/model.layers.0.self_attn.k_proj.weight"][-3:] *= 1.01
    tensors["grad/model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    del tensors["weight/model.norm.weight"]
    save_file(tensors, file)
    assert main(["parity", str(runs["alone"].run.folder), str(root)]) == 1
    first, third = capsys.readouterr().out.split("step 3")
    assert first.count("equal bit for bit") == 2
    assert "model.norm.weight is in the first alone" in third
    assert "2 of 21 tensors differ:" in third
    rows = len(tensors["grad/model.layers.0.self_attn.k_proj.weight"])
    assert f"k_proj.weight [{rows}, 32]: off by" in third
    assert f"only in {rows - 3} to {rows - 1} of the {rows} along axis 0" in third
    assert third.index("layers.1.mlp.down_proj") < third.index("layers.0.self_attn.k_proj"), (
        "as a backward pass goes"
    )
    assert "off by inf" in third
    assert "the runs differ" in third


def test_a_plain_model_beside_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 40,
        "max_position_embeddings": 64,
    }
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **sizes, num_hidden_layers=2, num_attention_heads=4, pad_token_id=None
        )
    )
    model.save_pretrained(tmp_path / "hf")
    config = make_config(tmp_path, {"hf": str(tmp_path / "hf")}, *SHORT, "train.precision=fp32")
    train(config)
    mixture = build_mixtures(config)["train"]
    assert mixture is not None
    tokens, labels = (torch.as_tensor(each) for each in mixture.read(range(4))[:2])
    loss = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
    loss.backward()
    record_model(tmp_path / "plain", 1, model, loss.item())
    assert main(["parity", str(config.run.folder), str(tmp_path / "plain"), "--step", "1"]) == 0
    assert len(read_steps(tmp_path / "plain")[1].names) == 21
    assert main(["parity", str(config.run.folder), str(tmp_path / "plain"), "--step", "3"]) == 2
    assert "no step was recorded by both" in capsys.readouterr().err


def test_what_neither_has_recorded_is_no_agreement(
    runs: dict[str, Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a pipeline whose second rank's file was not copied, of gradients before a backward pass,
    and of nothing at all."""
    part = tmp_path / "part"
    shutil.copytree(runs["pipeline"].run.folder / "tensors", part / "tensors")
    (folder_of(part, 3) / "rank-00001.safetensors").unlink()
    record_model(tmp_path / "early", 1, torch.nn.Linear(2, 2), 1.0)
    shutil.copytree(part / "tensors", tmp_path / "none" / "tensors")
    for file in tmp_path.glob("none/tensors/*/*.safetensors"):
        file.unlink()
    for name, step, lacking in (
        ("part", "3", "the weight model.layers.1.input_layernorm.weight and 10 more"),
        ("early", "1", "any grad"),
        ("none", "1", "any weight"),
    ):
        folder = str(tmp_path / name)
        assert main(["parity", folder, folder, "--step", step]) == 2
        assert (
            f"step {step}: neither {folder} nor {folder} has recorded {lacking}"
            in capsys.readouterr().err
        )
    whole = str(runs["alone"].run.folder)
    assert main(["parity", whole, str(part), "--step", "3"]) == 1
    assert "lm_head.weight is in the first alone" in capsys.readouterr().out
