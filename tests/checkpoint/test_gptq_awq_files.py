"""Models as GPTQ's and AWQ's tools write them: against statements of both formats in plain loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalite.checkpoint.tensors import TensorFolder
from megalite.errors import CheckpointError, ConfigError
from megalite.infer.generate import load_model
from megalite.models import weight_table
from tiny_models import LLAMA, randomize

GROUP = 16
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The columns that the parts of a word stand for, from the lowest."""
FORMATS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "gptq, act-order, 8 bits": {"quant_method": "gptq", "bits": 8, "group_size": GROUP, "desc_act": True},
    "gptq v2": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq_v2"},
    "gptq, whole columns": {"quant_method": "gptq", "bits": 4, "group_size": -1},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
}  # fmt: skip


def packed(numbers: np.ndarray, bits: int, along: int, order: tuple[int, ...]) -> Tensor:
    """Words of integers [rows, columns], of which some along a dimension share one each."""
    numbers = numbers if along == 1 else numbers.T
    per_word = 32 // bits
    words = np.zeros((len(numbers), numbers.shape[1] // per_word), np.uint32)
    for row, of_row in enumerate(numbers):
        for word in range(words.shape[1]):
            for place, column in enumerate(order):
                words[row, word] |= np.uint32(of_row[word * per_word + column] << (bits * place))
    found = words if along == 1 else words.T
    return torch.from_numpy(np.ascontiguousarray(found).view(np.int32))


def stored(
    shape: tuple[int, int], said: dict[str, Any], seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a random matrix [out, in], and the matrix."""
    outputs, inputs = shape
    generator = np.random.default_rng(seed)
    bits, awq = said["bits"], said["quant_method"] == "awq"
    group = inputs if said["group_size"] == -1 else said["group_size"]
    order = AWQ_ORDER if awq else tuple(range(32 // bits))
    numbers = generator.integers(0, 2**bits, (inputs, outputs))
    zeros = generator.integers(1, 2**bits, (inputs // group, outputs))
    scales = (generator.random((inputs // group, outputs)) * 0.05 + 0.01).astype(np.float16)
    index = np.arange(inputs) // group
    if said.get("desc_act"):
        generator.shuffle(index)
    weight = np.zeros(shape, np.float16)
    for row in range(outputs):
        for column in range(inputs):
            of = index[column]
            off = np.float32(numbers[column, row] - zeros[of, row])
            weight[row, column] = np.float16(off * np.float32(scales[of, row]))
    less = 0 if awq or said.get("checkpoint_format") == "gptq_v2" else 1
    found = {
        "qweight": packed(numbers, bits, int(awq), order),
        "qzeros": packed(zeros - less, bits, 1, order),
        "scales": torch.from_numpy(scales),
    }
    if not awq:
        found["g_idx"] = torch.from_numpy(index.astype(np.int32))
    return found, torch.from_numpy(weight)


def save(folder: Path, said: dict[str, Any]) -> dict[str, Tensor]:
    """A model whose layers' linears are stored so; what its tensors are."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**LLAMA | {"intermediate_size": 64})
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.half().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    found, wanted = dict(tensors), dict(tensors)
    for number, (name, tensor) in enumerate(tensors.items()):
        if name.endswith("proj.weight"):
            rows, columns = tensor.shape
            parts, wanted[name] = stored((rows, columns), said, number)
            del found[name]
            found |= {name.removesuffix("weight") + end: part for end, part in parts.items()}
    save_file(found, folder / "model.safetensors")
    say(folder, said)
    return wanted


def say(folder: Path, said: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": said}))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_model_of_the_hub_opens(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = save(tmp_path, FORMATS[kind])
    model = load_model(tmp_path)
    method = FORMATS[kind]["quant_method"].upper()
    said = f"{method}'s integers of {FORMATS[kind]['bits']} bits are unpacked to F16"
    assert capfd.readouterr().err.count(said) == 1
    parameters = dict(model.named_parameters())
    for weight in weight_table(model.config):
        for name, tensor in weight.to_hf(parameters[weight.name]).items():
            assert torch.equal(tensor, wanted[name]), name
    name = "model.layers.1.mlp.down_proj.weight"
    folder, generator = TensorFolder(tmp_path), np.random.default_rng(2)
    for _ in range(20):
        (a, b), (c, d) = (
            sorted(generator.choice(size + 1, 2, replace=False)) for size in wanted[name].shape
        )
        found = folder.fetch(name, (slice(a, b), slice(c, d)))
        assert torch.equal(found, wanted[name][a:b, c:d])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 3}, "GPTQ of 4 or 8 bits"),
        ({"checkpoint_format": "marlin"}, "GPTQ of 4 or 8 bits"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ of 4"),
        ({"group_size": 0}, "GPTQ of 4 or 8 bits"),
    ],
)
def test_other_integers_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    save(tmp_path, FORMATS["gptq"])
    say(tmp_path, FORMATS["gptq"] | change)
    with pytest.raises(ConfigError, match=words):
        load_model(tmp_path)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    save(tmp_path, FORMATS["gptq"])
    say(tmp_path, FORMATS["gptq"] | {"group_size": 8})
    with pytest.raises(CheckpointError, match=r"scales of \[4, 32\] .* in groups of 8"):
        load_model(tmp_path)
    say(tmp_path, FORMATS["gptq"])
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.qzeros"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"there is no model\.layers\.0\.self_attn\.q_proj\.qzeros"
    ):
        load_model(tmp_path)
