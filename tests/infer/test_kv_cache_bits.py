"""A cache of 8 bits: what it keeps by a plain statement, attention to it by what it stands for, and
how far that is from the plain cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from chats import write_tokenizer
from megalite.cli import main
from megalite.comm.mesh import Launch
from megalite.infer.batch import Batch
from megalite.infer.cache import CachedModel, KVCache, LatentKVCache, Row, lay_out
from megalite.infer.cells import (
    CACHE_KINDS,
    CacheKind,
    bytes_of_a_token,
    dequantise,
    make_cells,
    memory_line,
    quantise,
)
from megalite.infer.generate import Generator, load_model
from megalite.infer.ranks import load_on_ranks
from megalite.kernels.attention import eager_heads
from megalite.kernels.attention_kinds import AttentionKind
from megalite.models import model_config
from megalite.models.core_attention import CoreAttention
from ranks import run_ranks
from scripted import Bytes
from tiny_models import CASES, save_model

CPU = torch.device("cpu")
LENGTH = 40


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def e4m3_numbers() -> list[float]:
    """All numbers from 0 up by their codes: 4 bits of exponent, 3 of mantissa, no infinity."""
    found = []
    for code in range(0x7F):
        exponent, mantissa = code >> 3, code & 7
        normal = (8 + mantissa) * 2.0 ** (exponent - 10)
        found.append(normal if exponent else mantissa * 2.0**-9)
    return found


def stated(row: list[float], kind: CacheKind, dtype: torch.dtype) -> tuple[list[float], float]:
    """The numbers that a row is stored as, and its scale, one by one in Python's floats."""
    most, largest = (127.0 if kind == "int8" else 448.0), max(map(abs, row))
    scale = torch.tensor(largest, dtype=torch.float32).div(most).to(dtype).item() or 1.0
    table = e4m3_numbers() if kind == "fp8" else [float(n) for n in range(128)]
    numbers = []
    for x in row:
        wanted = min(abs(torch.tensor(x).div(scale).item()), most)
        # The nearest; of two the one with the even code, which is its place in the table.
        at = min(range(len(table)), key=lambda n: (abs(table[n] - wanted), n % 2))
        numbers.append(-table[at] if x < 0 else table[at])
    return numbers, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_numbers_and_scales_equal_a_plain_statement(kind: CacheKind, dtype: torch.dtype) -> None:
    x = random(6, 24) * torch.tensor([1e-3, 1.0, 30.0, 1.0, 1.0, 1.0])[:, None]
    x[3] = 0.0
    x[4, :8] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 63.5])  # ties of int8
    x[5, :8] = torch.tensor([448.0, 2.0**-10, 3 * 2.0**-10, 2.0**-9, 17.0, 19.0, -17.0, 432.0])
    x = x.to(dtype)
    found = quantise(x, kind)
    assert found.scales.dtype == dtype
    for row, numbers, scale in zip(x.float().tolist(), found.numbers, found.scales, strict=True):
        assert (numbers.float().tolist(), scale.item()) == stated(row, kind, dtype)


KINDS = [AttentionKind(), AttentionKind(7, 1.5, 0.5), AttentionKind(7, sinks=True)]
BOUND = {"int8": 0.02, "fp8": 0.08}
"""Of the relative error of outputs. A number is off by half a 127th of its row's largest, which of 16
normal numbers is about 2, or in fp8 by up to a 16th of itself; sums over 40 cells make it less."""


@pytest.mark.parametrize("attention", KINDS, ids=str)
@pytest.mark.parametrize("kind", CACHE_KINDS)
@torch.inference_mode()
def test_attention_is_to_what_the_cache_stands_for(
    kind: CacheKind, attention: AttentionKind
) -> None:
    """By pieces and token by token, in two slots, by the kernel for one token and by torch."""
    sinks = random(4, seed=9) if attention.sinks else None
    q, k, v = random(2, LENGTH, 4, 16), random(2, LENGTH, 2, 16, seed=1), random(2, LENGTH, 2, 16)
    k[:, :, 1] *= 0.02  # heads of very different sizes
    v[:, 20:] *= 9
    caches = [KVCache(3, kind), KVCache(3)]
    for start, stop in ((0, 11), (11, 30), *((n, n + 1) for n in range(30, LENGTH))):
        part = slice(start, stop)
        rows = [Row(slot, start, [0] * (stop - start), LENGTH) for slot in (0, 2)]
        _, places, _ = lay_out(rows, CPU)
        found, plain = (
            each.attend(q[:, part], k[:, part], v[:, part], places, attention, sinks)
            for each in caches
        )
        if not start:
            assert found is None, "the first tokens attend to themselves, as they are"
            continue
        keys, values = (
            dequantise(quantise(x[:, :stop], kind)).transpose(1, 2).repeat_interleave(2, dim=1)
            for x in (k, v)
        )
        of_sinks = None if sinks is None else sinks.view(1, 4, 1, 1).expand(-1, -1, stop - start, 1)
        wanted = eager_heads(
            q[:, part].transpose(1, 2), keys, values, places.bias(attention.window, q.dtype)[..., :stop],
            attention, sinks=of_sinks,
        ).transpose(1, 2).flatten(2)  # fmt: skip
        # fp32 sums of at most 40 terms, in another order, of values up to 30.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
        assert ((found - plain).norm() / plain.norm()).item() < BOUND[kind]


LATENT = {
    "family": "deepseek_v3", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_layers": 2,
    "num_attention_heads": 4, "max_positions": 64, "moe_intermediate_size": 24, "num_experts": 6,
    "experts_per_token": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6, "v_head_dim": 12, "q_lora_rank": 20,
}  # fmt: skip


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_latents_and_what_has_positions_have_scales_of_their_own(kind: CacheKind) -> None:
    latents = random(1, 12, 14)
    latents[..., 8:] *= 40
    cache = LatentKVCache(2, random(88, 8), 6, kind)
    for start in (0, 6):
        _, places, _ = lay_out([Row(1, start, [0] * 6, 12)], CPU)
        found = cache.write(latents[:, start : start + 6], places)
    assert found is not None
    wanted = [dequantise(quantise(part, kind)) for part in latents.split((8, 6), -1)]
    assert torch.equal(found[0, 0, :12], torch.cat(wanted, -1)[0])
    architecture = model_config(LATENT).architecture
    assert bytes_of_a_token(architecture, torch.bfloat16, None) == 2 * 2 * (8 + 6)
    assert bytes_of_a_token(architecture, torch.bfloat16, kind) == 2 * (8 + 6 + 2 * 2)


@pytest.mark.parametrize("kind", [None, *CACHE_KINDS])
def test_a_copied_slot_has_the_numbers_and_the_scales(kind: CacheKind | None) -> None:
    """As beam search copies them."""
    cells, x = make_cells(3, kind), random(2, 9, 2, 8)
    x[1] *= 7
    cells.write(x, lay_out([Row(slot, 0, [0] * 9, 9) for slot in (0, 1)], CPU)[1])
    cells.copy([1, 0], [0, 2], 9)
    _, places, _ = lay_out([Row(slot, 8, [0], 9) for slot in range(3)], CPU)
    found = cells.read(places)[:, :, :9].transpose(1, 2)
    wanted = x if kind is None else dequantise(quantise(x, kind))
    assert torch.equal(found, wanted[[1, 1, 0]])


def answers(model: object) -> list[list[int]]:
    gen = Generator(model, Bytes())  # type: ignore[arg-type]
    batch, prompts = Batch(gen.model, gen.ends), ([3, 1, 4, 1, 5], list(range(20, 43)), [9])
    found = [gen.start(gen.request(prompt, 12)) for prompt in prompts]
    for answer in found:
        batch.add(answer)
    while batch.busy:
        batch.step()
    return [answer.tokens for answer in found]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), CASES["llama"])


def answer_on_ranks(rank: int, world_size: int, folder: Path) -> list[list[int]]:
    launch = Launch.from_environment()
    return answers(load_on_ranks(folder, launch, 2, 1, num_slots=2, kv_cache="int8"))


def test_two_tensor_ranks_keep_what_one_process_keeps(llama: Path) -> None:
    """Their heads have scales of their own: token for token."""
    wanted = answers(CachedModel(load_model(llama), 2, kv_cache="int8"))
    assert run_ranks(2, answer_on_ranks, llama) == [wanted] * 2


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_the_memory_that_is_said_is_what_is_taken(llama: Path, kind: CacheKind) -> None:
    model = CachedModel(load_model(llama), 3, kv_cache=kind)
    assert len(answers(model)) == 3
    architecture = model.model.config.architecture
    small, plain = (bytes_of_a_token(architecture, torch.float32, x) for x in (kind, None))
    cells = [
        each
        for module in model.model.modules()
        if isinstance(module, CoreAttention) and isinstance(module.strategy, KVCache)
        for each in (module.strategy.keys, module.strategy.values)
    ]
    taken = sum(x.nbytes for each in cells for x in (each.numbers, each.scales))  # type: ignore[attr-defined]
    assert taken == small * 3 * 256
    said = memory_line(architecture, torch.float32, kind, 10**6)
    assert f"KV cache in {kind}: {small:,} bytes a token ({plain:,} in float32)" in said
    assert f"take {small:,.1f} MB, and {plain:,.1f} MB in float32" in said


def test_generate_says_what_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "m", CASES["llama"] | {"vocab_size": 420})
    write_tokenizer(folder, template=None)
    options = ["--max-tokens", "4", "--temperature", "0", "--kv-cache", "fp8"]
    assert main(["generate", str(folder), "--prompt", "the end", *options]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("the end")
    # Two layers of 4 heads of 8 features, keys and values, and a scale of each.
    assert "KV cache in fp8: 192 bytes a token (512 in float32)" in said.err
    config = model_config({"hf": str(folder)})
    assert f"the {config.max_positions:,} tokens that there is room for" in said.err


def test_models_without_such_a_cache_refuse_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.AutoConfig.for_model(**CASES["t5"]).save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "--prompt", "x", "--kv-cache", "int8"]) == 2
    assert "holds a model of model.task: seq2seq; only the keys and values of decoders" in (
        capsys.readouterr().err
    )
