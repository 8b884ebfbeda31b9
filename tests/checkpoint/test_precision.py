"""Nothing is rounded on its way from a checkpoint but once, to the precision that is asked for."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalite.checkpoint.convert import DTYPES, open_source, write_model
from megalite.checkpoint.folder import step_folder
from megalite.checkpoint.load import from_hf
from megalite.comm.mesh import Mesh
from megalite.config import LoraConfig
from megalite.infer.generate import load_model
from megalite.models import model_config, weight_table
from megalite.models.lora import adapters_of
from megalite.models.peft import to_peft
from megalite.train import train
from small_runs import make_config
from tiny_models import CASES

transformers = pytest.importorskip("transformers")
TOOLS = Path(__file__).parents[2] / "tools"
LORA = LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "v_proj", "down_proj"))


def save_model(
    folder: Path, dtype: torch.dtype, case: str = "llama-grouped-queries"
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CASES[case] | {"initializer_range": 0.2})
    transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def save_adapter(folder: Path, base: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """An update of half of what bf16 tells apart, and of each weight that it changes the exact
    sum."""
    weights = weight_table(model_config({"hf": str(base)}))
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(to_peft(LORA, weights, base)))
    generator = torch.Generator().manual_seed(1)
    tensors, sums = {}, {}
    for adapter in adapters_of(weights, LORA):
        pair = [
            torch.randn(row.shape, generator=generator).mul(0.02).to(dtype)
            for row in adapter.rows(LORA)
        ]
        tensors |= {row.hf[0]: x for row, x in zip(adapter.rows(LORA), pair, strict=True)}
        sums[f"{adapter.module}.weight"] = LORA.scale * pair[1].double() @ pair[0].double()
    save_file(tensors, folder / "adapter_model.safetensors")
    stored = load_file(base / "model.safetensors")
    return {name: stored[name].double() + update for name, update in sums.items()}


def run_tool(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOLS / name), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize("of_adapter", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of_base", [torch.bfloat16, torch.float16, torch.float32])
def test_an_adapter_is_merged_in_the_precision_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_base: torch.dtype, of_adapter: torch.dtype
) -> None:
    before = save_model(tmp_path / "base", of_base)
    wanted = save_adapter(tmp_path / "adapter", tmp_path / "base", of_adapter)
    for dtype in (*DTYPES, None):
        out, kind = tmp_path / f"out-{dtype}", DTYPES[dtype] if dtype else of_base
        options = ["--dtype", dtype] if dtype else []
        assert (
            run_tool(monkeypatch, "convert_checkpoint.py", tmp_path / "adapter", out, *options) == 0
        )
        found = load_file(out / "model.safetensors")
        assert {x.dtype for x in found.values()} == {kind}
        assert all(
            torch.equal(x, before[name].to(kind)) for name, x in found.items() if name not in wanted
        )
        for name, exact in wanted.items():
            lost = (found[name].double() - exact).norm() / (exact - before[name].double()).norm()
            # fp32 sums; and one rounding, of half a unit in the last place at most: that of twice
            # as many is seen.
            assert (
                lost < 1e-4
                if kind == torch.float32
                else torch.equal(found[name], exact.float().to(kind))
            ), name


@pytest.mark.parametrize("of_base", [torch.bfloat16, torch.float32])
def test_check_hf_passes_on_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_base: torch.dtype
) -> None:
    pytest.importorskip("peft")
    save_model(tmp_path / "base", of_base)
    save_adapter(tmp_path / "adapter", tmp_path / "base", torch.float32)
    assert run_tool(monkeypatch, "check_hf.py", tmp_path / "adapter") == 0


def test_a_run_that_starts_from_an_adapter_starts_from_the_exact_sum(tmp_path: Path) -> None:
    save_model(tmp_path / "base", torch.bfloat16)
    wanted = save_adapter(tmp_path / "adapter", tmp_path / "base", torch.float32)
    model = model_config({"hf": str(tmp_path / "adapter")})
    weights = weight_table(model)
    read, found = from_hf(tmp_path / "adapter", weights, model, Mesh.alone()), {}
    for weight in weights:
        found |= weight.to_hf(read(weight, "master", 0, weight.numel).view(weight.shape))
    for name, exact in wanted.items():
        torch.testing.assert_close(found[name].double(), exact, rtol=1e-6, atol=1e-7)
    assert {p.dtype for p in load_model(tmp_path / "adapter").parameters()} == {torch.bfloat16}, (
        "as it is stored"
    )


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_in_bf16_is_converted_from_its_master_weights(tmp_path: Path, lora: bool) -> None:
    save_model(tmp_path / "base", torch.float32)
    settings = [
        "train.precision=bf16",
        "train.steps=2",
        "optimizer.lr=2e-3",
        f"model.hf={tmp_path / 'base'}",
    ]
    config = make_config(
        tmp_path, {}, *settings, *(["lora.rank=2", "lora.targets=all-linear"] if lora else [])
    )
    train(config)
    folder = step_folder(config.run.folder / "checkpoints", 2)
    stem = "adapter_model" if lora else "model"
    stored, exact = (
        load_file(folder / f"{stem}.safetensors"),
        load_file(folder / "optimizer" / "master.safetensors"),
    )
    assert any(not torch.equal(x.float(), exact[name]) for name, x in stored.items())
    for dtype in ("fp32", "bf16", None):
        write_model(open_source(folder), tmp_path / f"{dtype}", dtype)
    found = {
        dtype: load_file(tmp_path / f"{dtype}" / "model.safetensors")
        for dtype in ("fp32", "bf16", None)
    }
    if not lora:
        assert all(torch.equal(x, exact[name]) for name, x in found["fp32"].items())
        assert all(
            torch.equal(x, stored[name])
            for dtype in ("bf16", None)
            for name, x in found[dtype].items()
        )
        return
    base, name = (
        load_file(tmp_path / "base" / "model.safetensors"),
        "model.layers.1.self_attn.k_proj",
    )
    a, b = (exact[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
    assert config.lora is not None
    update = config.lora.scale * b @ a
    assert (
        found["fp32"][f"{name}.weight"].double() - base[f"{name}.weight"] - update
    ).norm() < 1e-3 * update.norm()


@pytest.mark.parametrize("named", ["bfloat16", "float32", None])
@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma2", "qwen3"])
def test_norms_may_be_stored_in_fp32(tmp_path: Path, case: str, named: str | None) -> None:
    """One precision is computed in, as in transformers; a conversion leaves each weight as it
    is."""
    tensors = save_model(tmp_path, torch.bfloat16, case)
    norms = {name for name in tensors if "norm" in name or "ln_" in name}
    store = {name: x.float() if name in norms else x for name, x in tensors.items()}
    save_file(store, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"dtype": named, "torch_dtype": named})
    )
    model, kind = load_model(tmp_path), getattr(torch, named or "bfloat16")
    assert {p.dtype for p in model.parameters()} == {kind}
    assert model(torch.arange(9)[None]).dtype == kind
    write_model(open_source(tmp_path), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        x.dtype == store[name].dtype and torch.equal(x, store[name]) for name, x in found.items()
    )
