"""Quantised models: transformers opens them with the weights that are read here, slices are those
of the whole, and what cannot be quantised is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megalite.checkpoint.convert import open_source
from megalite.checkpoint.tensors import TensorFolder
from megalite.cli import main
from megalite.infer.generate import load_model
from megalite.quantization.matrices import relative_error
from megalite.runtime.exit_codes import Exit
from quantized_folders import SMALL, weights_of
from tiny_models import GPT2, LLAMA, MIXTRAL, QWEN3, QWEN3_MOE, save_model

SCHEMES = {"w8a8": [], "w4a16": ["--group", "16"], "fp8": [], "fp8_block": ["--group", "16"]}


@pytest.mark.parametrize(
    "values", [LLAMA | SMALL, QWEN3 | SMALL | {"head_dim": 16}], ids=["llama", "qwen3"]
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_opens_it_with_the_same_weights(
    scheme: str, values: dict[str, Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    source = save_model(
        tmp_path / "source", values, torch.bfloat16 if scheme == "fp8" else torch.float32
    )
    assert (
        main(["quantize", str(source), str(tmp_path / "out"), "--scheme", scheme, *SCHEMES[scheme]])
        == 0
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    ids = torch.arange(40)[None] % 99
    logits = theirs(ids).logits  # decompresses the weights
    ours = weights_of(tmp_path / "out")
    found = dict(theirs.named_parameters())
    for name, tensor in ours.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name
    before = weights_of(source)
    changed = [name for name in ours if not torch.equal(ours[name], before[name])]
    assert len(changed) == 14, "the matrices of two layers, and nothing else"
    if scheme == "w4a16":  # its inputs are not rounded: a plain model of these weights is the same
        plain = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        plain.load_state_dict(ours, strict=False)
        assert (plain(ids).logits - logits).abs().max() <= 1e-5


@pytest.mark.parametrize("scheme", [*SCHEMES, "nf4"])
def test_slices_are_those_of_the_whole(scheme: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", LLAMA | SMALL)
    assert (
        main(
            [
                "quantize",
                str(source),
                str(tmp_path / "out"),
                "--scheme",
                scheme,
                *SCHEMES.get(scheme, []),
            ]
        )
        == 0
    )
    folder, name = TensorFolder(tmp_path / "out"), "model.layers.1.mlp.down_proj.weight"
    whole = folder.fetch(name, (slice(None), slice(None)))
    assert whole.shape == folder.shape(name) == (64, 128)
    generator = np.random.default_rng(2)
    for _ in range(30):
        (a, b), (c, d) = (
            sorted(generator.choice(size + 1, 2, replace=False)) for size in whole.shape
        )
        assert torch.equal(folder.fetch(name, (slice(a, b), slice(c, d))), whole[a:b, c:d])
    assert torch.equal(folder.fetch(name, (slice(3, 20),)), whole[3:20])


def test_four_bits_lie_as_the_format_says(tmp_path: Path) -> None:
    """Against a statement of the format in plain numpy: eight numbers in a word, the first lowest,
    each with 8 added; scales of the largest number · 2/15."""
    source = save_model(tmp_path / "source", LLAMA | SMALL)
    assert (
        main(["quantize", str(source), str(tmp_path / "out"), "--scheme", "w4a16", "--group", "16"])
        == 0
    )
    name = "model.layers.0.self_attn.k_proj"
    weight = load_file(source / "model.safetensors")[f"{name}.weight"].numpy()
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        words, scales = (
            file.get_tensor(f"{name}.weight_packed"),
            file.get_tensor(f"{name}.weight_scale"),
        )
        assert [*file.get_tensor(f"{name}.weight_shape")] == [*weight.shape]
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            group = weight[row, column // 16 * 16 : column // 16 * 16 + 16]
            scale = np.abs(group).max() * np.float32(2 / 15)
            assert np.isclose(scales[row, column // 16], scale, rtol=1e-6)
            number = int(words[row, column // 8]) >> (4 * (column % 8)) & 15
            assert number - 8 == np.clip(
                np.rint(weight[row, column] / scales[row, column // 16]), -8, 7
            )


MIXTURES = {
    "mixtral": MIXTRAL | SMALL,
    "qwen3_moe": QWEN3_MOE | SMALL | {"head_dim": 16, "moe_intermediate_size": 32},
}


@pytest.mark.parametrize(("name", "scheme"), [("mixtral", "w4a16"), ("qwen3_moe", "fp8")])
def test_transformers_opens_experts_with_the_same_weights(
    name: str, scheme: str, tokens: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    source = save_model(tmp_path / "source", MIXTURES[name])
    given = ["--scheme", scheme, *SCHEMES[scheme]]
    if scheme == "w4a16":
        given += ["--method", "gptq", "--data", tokens, "--rows", "16", "--length", "32"]
    assert main(["quantize", str(source), str(tmp_path / "out"), *given]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    ids = torch.arange(40)[None] % 99
    logits = theirs(ids).logits  # decompresses the weights of linears
    ours, before = open_source(tmp_path / "out"), weights_of(source)
    found = dict(theirs.named_parameters())
    seen = 0
    for weight in ours.weights:
        whole = ours.read(weight)
        if weight.stack:
            prefix = weight.hf[0].split("experts.")[0]
            end = "gate_up_proj" if "gate_up" in weight.name else "down_proj"
            (parameter,) = (
                x for called, x in found.items()
                if called.endswith(f"experts.{end}") and called.split(".")[2] == prefix.split(".")[2]
            )  # fmt: skip
            assert torch.equal(parameter.to(whole.dtype), whole), weight.name
            seen += 1
        for hf, tensor in weight.to_hf(whole).items():
            stays = weight.shard is None or not weight.is_matrix
            assert torch.equal(tensor, before[hf]) == stays, hf
    assert seen == 4
    if scheme == "w4a16":  # inputs are not rounded: a plain model of these weights is the same
        plain = load_model(tmp_path / "out")
        with torch.inference_mode():
            assert (plain(ids) - logits).abs().max() <= 1e-3 * (logits.max() - logits.min())


def test_nf4_lies_as_bitsandbytes_has_it(tmp_path: Path) -> None:
    """Number by number: two places in a byte, the first in its high half; a scale of 64 numbers is a
    place in the table of scales, times that of its 256, and the mean."""
    source = save_model(tmp_path / "source", LLAMA | SMALL, torch.bfloat16)
    assert main(["quantize", str(source), str(tmp_path / "out"), "--scheme", "nf4"]) == 0
    name = "model.layers.0.mlp.down_proj.weight"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    state = json.loads(bytes(stored[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    assert {key: state[key] for key in ("shape", "dtype", "blocksize", "nested_blocksize")} == {
        "shape": [64, 128], "dtype": "bfloat16", "blocksize": 64, "nested_blocksize": 256,
    }  # fmt: skip
    codes, wanted = stored[name].flatten().tolist(), load_file(source / "model.safetensors")[name]
    assert stored[name].shape == (64 * 128 // 2, 1)
    found = torch.zeros(64 * 128)
    for number in range(len(found)):
        block = number // 64
        scale = stored[f"{name}.nested_quant_map"][stored[f"{name}.absmax"][block].item()]
        scale = scale * stored[f"{name}.nested_absmax"][block // 256] + state["nested_offset"]
        place = codes[number // 2] & 15 if number % 2 else codes[number // 2] >> 4
        found[number] = stored[f"{name}.quant_map"][place] * scale
    read = weights_of(tmp_path / "out")[name]
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, found.view(64, 128).bfloat16())
    # The widest step of NF4 is 0.3 of the largest of a block; scales are off by a few percent.
    largest = wanted.float().abs().view(64, 2, 64).amax(-1).repeat_interleave(64, 1)
    assert ((read.float() - wanted.float()).abs() <= 0.2 * largest).all()


def test_bitsandbytes_reads_its_own_format(tmp_path: Path) -> None:
    """And transformers opens the folder."""
    transformers = pytest.importorskip("transformers")
    functional = pytest.importorskip("bitsandbytes").functional
    source = save_model(tmp_path / "source", LLAMA | SMALL, torch.bfloat16)
    assert main(["quantize", str(source), str(tmp_path / "out"), "--scheme", "nf4"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours, seen = weights_of(tmp_path / "out"), 0
    for name, parameter in theirs.named_parameters():
        if state := getattr(parameter, "quant_state", None):
            seen += 1
            values = functional.dequantize_4bit(parameter.data, state)
            assert torch.equal(values, ours[name]), name
    assert seen == 14
    # What they write of the same model is read as well.
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=False
    )
    own = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.bfloat16
    )
    own.save_pretrained(tmp_path / "own")
    again = weights_of(tmp_path / "own")
    for name, parameter in own.named_parameters():
        if state := getattr(parameter, "quant_state", None):
            assert torch.equal(functional.dequantize_4bit(parameter.data, state), again[name]), name


def test_gptq_costs_less_than_rounding(
    tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, errors = save_model(tmp_path / "source", LLAMA | SMALL), {}
    for method in ("rtn", "gptq"):
        given = [
            "--scheme",
            "w4a16",
            "--group",
            "16",
            "--data",
            tokens,
            "--rows",
            "16",
            "--length",
            "32",
        ]
        assert (
            main(["quantize", str(source), str(tmp_path / method), "--method", method, *given]) == 0
        )
        said = capsys.readouterr().out
        errors[method] = float(said.split("outputs ")[1].split()[0])
        assert "perplexity of 4 rows held out" in said
    assert errors["gptq"] < 0.7 * errors["rtn"]


def test_held_out_rows_measure_the_models_themselves(tokens: str, tmp_path: Path) -> None:
    """The perplexities are those of the whole model before and after, run at once."""
    from megalite.checkpoint.convert import write_model
    from megalite.kernels.schemes import make_scheme
    from megalite.quantization.layers import LayerRuns, read_rows
    from megalite.quantization.run import quantised

    transformers = pytest.importorskip("transformers")
    source = save_model(tmp_path / "source", LLAMA | SMALL)
    runs = LayerRuns.from_tokens(source, tokens, 8, 24)
    model, report = quantised(source, make_scheme("w4a16", 16), "gptq", runs)
    write_model(model, tmp_path / "out")
    rows = read_rows(tokens, 8, 24)[3::4]
    plain = transformers.AutoModelForCausalLM.from_pretrained(source)
    for weights, found in zip(
        (weights_of(source), weights_of(tmp_path / "out")), report.perplexities or (), strict=True
    ):
        plain.load_state_dict(weights, strict=False)
        logits = plain(rows[:, :-1]).logits.flatten(0, 1)
        wanted = torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten()).exp()
        assert found == pytest.approx(wanted.item(), rel=1e-5)


def test_a_quantised_model_is_converted_back(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", LLAMA | SMALL)
    assert main(["quantize", str(source), str(tmp_path / "out"), "--scheme", "fp8"]) == 0
    from megalite.checkpoint.convert import write_model

    write_model(open_source(tmp_path / "out"), tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    found, wanted = (
        load_file(tmp_path / "dense" / "model.safetensors"),
        weights_of(tmp_path / "out"),
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("values", "given", "words"),
    [
        (MIXTRAL, [], "of experts --scheme w4a16 and fp8 are written"),
        (GPT2, [], "matrices stored as [in, out], or several in one tensor, are not"),
        (LLAMA, ["--scheme", "w4a16"], "do not divide into groups of 128"),
        (LLAMA, ["--scheme", "w4a16", "--group", "12"], "must be a multiple of 8"),
        (LLAMA, ["--scheme", "fp8_block", "--group", "16"], "does not divide into blocks of 16"),
        (LLAMA, ["--method", "gptq"], "give --data"),
        (LLAMA, ["--scheme", "nf4", "--method", "awq"], "does not go with --scheme nf4"),
        (LLAMA, ["--scheme", "nf4"], "do not divide into the blocks of 64"),
        (LLAMA, ["--data", "nowhere"], "does not exist"),
    ],
)
def test_refused(
    values: dict[str, Any],
    given: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = save_model(tmp_path / "source", values)
    assert main(["quantize", str(source), str(tmp_path / "out"), *given]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_not_finite_are_refused(
    tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_model(tmp_path / "source", LLAMA | SMALL)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][0] = torch.inf
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    data = ["--data", tokens, "--rows", "4", "--length", "8", "--method", "gptq"]
    assert main(["quantize", str(source), str(tmp_path / "out"), *data]) == Exit.BAD_NUMBERS
    assert "goes into layers.1.attention.qkv.weight is not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_matrix_of_zeros_loses_nothing() -> None:
    zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)
    for inputs in (None, torch.eye(3, dtype=torch.float64)):
        assert relative_error(zeros, zeros, inputs) == 0
        assert relative_error(ones, zeros, inputs) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "hqq"}, "compressed-tensors in"),
        ({"format": "marlin-24"}, "of format 'marlin-24'"),
        (
            {"config_groups": {"a": {"weights": {"symmetric": False, "num_bits": 4}}}},
            "symmetric ones of 4 or 8 bits",
        ),
        ({"config_groups": 7}, "of format"),
    ],
)
def test_another_format_is_refused(
    change: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_model(tmp_path / "source", LLAMA | SMALL)
    assert main(["quantize", str(source), str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert main(["quantize", str(tmp_path / "out"), str(tmp_path / "again")]) == 2
    assert words in capsys.readouterr().err
