"""Tensors that are stored with scales: fp8 in blocks, and MXFP4."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalite.checkpoint.tensors import TensorFolder
from megalite.errors import CheckpointError, ConfigError
from megalite.infer.generate import load_model
from megalite.models import weight_table
from tiny_models import CASES, auto_class, randomize

transformers = pytest.importorskip("transformers")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_blocks(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers in fp8, scales, and what both stand for, of a matrix."""
    rows, columns = ((-(-size // 128)) for size in weight.shape)
    scales = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) + 0.5
    spread = scales.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[
        :, : weight.shape[1]
    ]
    numbers = (weight / spread).to(torch.float8_e4m3fn)
    return numbers, scales, numbers.float() * spread


WHERE = [
    (slice(0, 300), slice(0, 200)), (slice(5, 7), slice(127, 129)), (slice(128, 256), slice(0, 128)),
    (slice(299, 300), slice(199, 200)), (slice(100, 290), slice(3, 131)),
]  # fmt: skip


def test_blocks_of_fp8_are_scaled(tmp_path: Path) -> None:
    numbers, scales, wanted = by_blocks(random(300, 200))
    save_file(
        {"a.weight": numbers, "a.weight_scale_inv": scales, "b": random(3)},
        tmp_path / "model.safetensors",
    )
    folder = TensorFolder(tmp_path)
    assert folder.files.keys() == {"a.weight", "b"}
    assert folder.shape("a.weight") == (300, 200)
    for where in WHERE:
        assert torch.equal(folder.fetch("a.weight", where), wanted[where])


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 10, 4), generator=generator, dtype=torch.uint8)
    save_file({"w_blocks": blocks, "w_scales": scales}, tmp_path / "model.safetensors")
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    folder = TensorFolder(tmp_path)
    assert folder.shape("w") == wanted.shape == (3, 128, 10)
    for where in (
        (slice(0, 3), slice(0, 128), slice(0, 10)),
        (slice(1, 2), slice(31, 97), slice(4, 5)),
    ):
        assert torch.equal(folder.fetch("w", where), wanted[where])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"a": (300, 200), "a_scale_inv": (3, 3)},
            r"a: numbers of shape \[300, 200\] and scales of \[3, 3\] are no block",
        ),
        (
            {"w_blocks": (2, 3, 4, 8), "w_scales": (2, 3, 4)},
            r"w: numbers of shape \[2, 3, 4, 8\] .* no groups of 32",
        ),
    ],
)
def test_scales_of_another_size_are_refused(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], words: str
) -> None:
    dtypes = {"a": torch.float8_e4m3fn, "a_scale_inv": torch.float32}
    made = {
        name: torch.zeros(shape).to(dtypes.get(name, torch.uint8))
        for name, shape in tensors.items()
    }
    save_file(made, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        TensorFolder(tmp_path)


def save(case: str, folder: Path) -> dict[str, Tensor]:
    """A random model, and its stored tensors."""
    config = transformers.AutoConfig.for_model(**CASES[case])
    model = auto_class(config.model_type).from_config(config)
    randomize(model)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def say(folder: Path, quantised: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantised}))


FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def test_a_model_of_the_hub_in_fp8_opens(tmp_path: Path) -> None:
    tensors = save("deepseek_v3", tmp_path)
    stored, wanted = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            stored[name], stored[f"{name}_scale_inv"], wanted[name] = by_blocks(tensor)
    save_file(stored, tmp_path / "model.safetensors")
    say(tmp_path, FP8)
    model = load_model(tmp_path)
    parameters = dict(model.named_parameters())
    for weight in weight_table(model.config):
        for name, tensor in weight.to_hf(parameters[weight.name]).items():
            assert torch.equal(tensor, wanted[name].float()), name


def test_a_model_of_the_hub_in_mxfp4_opens(tmp_path: Path) -> None:
    tensors = save("gpt_oss", tmp_path)
    generator = torch.Generator().manual_seed(0)
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    wanted = {}
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(
            0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8
        )
        scales = torch.randint(120, 126, blocks.shape[:3], generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        wanted[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    say(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    model = load_model(tmp_path)
    parameters = dict(model.named_parameters())
    found = {}
    for weight in weight_table(model.config):
        found |= weight.to_hf(parameters[weight.name])
    assert len(wanted) == 2
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            {"quant_method": "gptq", "bits": 4},
            r"quantization_config\.bits = 4, which is unknown for weights of the deep",
        ),
        (
            FP8 | {"quant_method": "awq"},
            r"quant_method = 'awq'; of the deepseek_v3 family, 'fp8' is read",
        ),
        (
            FP8 | {"weight_block_size": [1, 128]},
            r"weight_block_size = \[1, 128\]; .* \[128, 128\] is read",
        ),
        ({}, r"quant_method = None; of the deepseek_v3 family, 'fp8' is read"),
        ([1], "quantization_config = .* which is no mapping"),
    ],
)
def test_other_quantised_models_are_refused(tmp_path: Path, said: object, words: str) -> None:
    save("deepseek_v3", tmp_path)
    say(tmp_path, said)
    with pytest.raises(ConfigError, match=words):
        load_model(tmp_path)
