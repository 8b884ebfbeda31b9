"""Quantised models are served by their integers: exact products, the logits that transformers has
for the same folder, and weights as they are wherever the kernels are not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalite.checkpoint.convert import open_source, write_model
from megalite.infer import integer_linears
from megalite.infer.cache import CachedModel
from megalite.infer.generate import Generator, load_model
from megalite.infer.integer_linears import INT4_ROWS, Int4Linear, Int8Linear, keep_integers
from megalite.kernels.schemes import make_scheme
from megalite.quantization.run import quantised
from tiny_models import CASES, randomize

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="this CPU has no int8 products"
)


@pytest.fixture(autouse=True)
def of_small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_linears, "INT8_BYTES", 0)


TOKENS = torch.arange(40)[None] * 7 % 99


def random(*shape: int, low: int = 0, high: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    if high:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int8)
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("shape", [(96, 64), (64, 64), (33, 70)])
@pytest.mark.parametrize("rows", [1, 8, 70])
def test_int8_products_are_exact(shape: tuple[int, int], rows: int) -> None:
    """To the bit what integers of any length give; of a square matrix, too."""
    numbers, scales = random(*shape, low=-128, high=127), random(shape[0], 1).abs()
    x, bias = random(rows, shape[1]), random(shape[0])
    step = x.abs().amax(1, keepdim=True) / 127.5
    rounded = (x / step).round().clamp(-128, 127).long()
    wanted = (rounded @ numbers.long().t()).float() * scales.flatten() * step + bias
    assert torch.equal(Int8Linear(numbers, scales, bias)(x), wanted)
    assert not Int8Linear(numbers, scales, None)(torch.zeros(1, shape[1])).any()


@pytest.mark.parametrize("rows", [1, INT4_ROWS, INT4_ROWS + 1])
def test_int4_products_are_those_of_the_weights(rows: int) -> None:
    numbers, scales = random(96, 128, low=-8, high=8), random(96, 4).abs().bfloat16().float()
    weight = (numbers.view(96, 4, 32) * scales[..., None]).flatten(1)
    layer = Int4Linear(numbers, scales, random(96).bfloat16())
    assert torch.equal(layer.dense(), weight.bfloat16())
    x = random(rows, 128).bfloat16()
    wanted = x.float() @ weight.t() + layer.bias
    # bf16 has 8 bits: of the weights, of the sum and of what is added to it.
    assert ((layer(x).float() - wanted).norm() / wanted.norm()).item() <= 2**-8


def folder_of(tmp_path: Path, case: str, scheme: str, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    config = transformers.AutoConfig.for_model(**CASES[case] | sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model)
    model.to(dtype).save_pretrained(tmp_path / "source")
    made, _ = quantised(tmp_path / "source", make_scheme(scheme, 32))
    write_model(made, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("case", ["llama-grouped-queries", "phi3", "gpt_neox"])
@torch.no_grad()
def test_int8_linears_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    """Each with the input that it has there: a token's largest number lies half way between two
    integers, so that the smallest difference grows from layer to layer."""
    pytest.importorskip("compressed_tensors")
    folder = folder_of(tmp_path, case, "w8a8", torch.float32)
    model, rows = load_model(folder), [w for w in open_source(folder).weights if w.is_matrix]
    assert keep_integers(model, folder) == len(rows) == 8
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs(TOKENS)  # decompresses the weights, which are linears from here on
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, x, out, name=name: seen.update({f"{name}.weight": (x[0][0], out[0])})
            )
    wanted = theirs(TOKENS).logits
    for weight in rows:
        layer = model.get_submodule(weight.name.removesuffix(".weight"))
        found = layer(seen[weight.hf[0]][0])
        as_rows = replace(weight, shape=(weight.num_rows, len(found)))
        for name, part in as_rows.to_hf(found.t()).items():
            torch.testing.assert_close(part.t(), seen[name][1], rtol=1e-5, atol=1e-5)
    assert ((model(TOKENS) - wanted).norm() / wanted.norm()).item() <= 0.1


def test_a_model_in_int4_is_that_of_its_weights(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama-grouped-queries", "w4a16", torch.bfloat16)
    model, plain = load_model(folder), load_model(folder)
    assert keep_integers(model, folder) == 8
    with torch.no_grad():
        found, wanted = model(TOKENS).float(), plain(TOKENS).float()
    assert ((found - wanted).norm() / wanted.norm()).item() <= 0.03  # some layers in bf16


@pytest.mark.parametrize(("scheme", "kind"), [("w8a8", Int8Linear), ("w4a16", Int4Linear)])
def test_answers_come_from_integers(scheme: str, kind: type, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    folder = folder_of(tmp_path, "llama-grouped-queries", scheme, torch.bfloat16)
    words = tokenizers.models.WordLevel({f"t{i}": i for i in range(99)}, unk_token="t0")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    generator = Generator.open(folder, num_slots=2, max_length=40)
    assert isinstance(generator.model, CachedModel)
    layers = [m for m in generator.model.model.modules() if isinstance(m, kind)]
    assert len(layers) == 8
    answers = generator.answer([generator.request([1, 2, number], 5) for number in range(3, 6)])
    assert all(len(answer.tokens) == 5 for answer in answers)


def test_elsewhere_weights_are_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """int4 in fp32, fp8, a model that is not quantised, an adapter, a small model in int8, and a
    CPU without int8 products."""
    fp32 = folder_of(tmp_path / "a", "llama-grouped-queries", "w4a16", torch.float32)
    fp8 = folder_of(tmp_path / "b", "llama-grouped-queries", "fp8", torch.bfloat16)
    for folder in (fp32, fp8, tmp_path / "a" / "source"):
        assert keep_integers(load_model(folder), folder) == 0
    int8 = folder_of(tmp_path / "c", "llama-grouped-queries", "w8a8", torch.bfloat16)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    said = {"peft_type": "LORA", "base_model_name_or_path": str(int8)}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    assert keep_integers(load_model(int8), adapter) == 0
    assert keep_integers(load_model(int8), int8) == 8
    with monkeypatch.context() as context:
        context.setattr(integer_linears, "INT8_BYTES", 2**26)
        assert keep_integers(load_model(int8), int8) == 0
    monkeypatch.setattr(integer_linears.torch.cpu, "_is_vnni_supported", lambda: False)
    assert keep_integers(load_model(int8), int8) == 0
