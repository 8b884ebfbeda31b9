"""GGUF files: read back by the gguf package, number by number; and by llama.cpp, where it is
installed."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from megalite.checkpoint.gguf_quants import quantise_q4_k
from megalite.cli import main
from megalite.data.tokenizer_training import PATTERN
from megalite.infer.generate import Generator, load_model
from megalite.infer.sampling import Sampling
from tiny_models import CASES, save_model

gguf = pytest.importorskip("gguf")
VOCAB = 320
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 2, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": CASES["llama"] | SIZES | {"rope_parameters": LLAMA3},
    "mistral": CASES["mistral"] | SIZES | {"sliding_window": None},
    "qwen2": CASES["qwen2"] | SIZES | {"tie_word_embeddings": True, "use_sliding_window": False},
    "qwen3": CASES["qwen3"] | SIZES | {"use_sliding_window": False},
}
LAYERS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_bpe(folder: Path, pattern: str = PATTERN) -> None:
    """Byte-level BPE with a merge, an added token and rows of the model that no token has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)} | {
        "th": 256,
        "the": 257,
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, values in MODELS.items():
        save_model(root / name, values)
        write_bpe(root / name)
    return {name: root / name for name in MODELS}


def converted(folder: Path, target: Path, kind: str) -> Any:
    assert main(["convert", str(folder), str(target), "--gguf", kind]) == 0
    return gguf.GGUFReader(target)


def their_name(hf: str) -> str:
    stem, _, end = hf.rpartition(".")
    if stem in ENDS:
        return f"{ENDS[stem]}.{end}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{LAYERS[rest]}.{end}"


def as_rotated_by_llama_cpp(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row: pair j of a head, rows j and j + K/2 in Hugging Face's order, at 2j and 2j + 1."""
    size = len(x) // heads
    order = [
        h * size + j + half
        for h in range(heads)
        for j in range(size // 2)
        for half in (0, size // 2)
    ]
    return x[order]


STEP = {"F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.57 / 127, "Q4_K": 2 / 15}
"""By what a number may be off, as a share of itself (F16, BF16) or of the largest of its 32: half a
step, and 127 times what fp16 rounds of a scale; in Q4_K, whose steps fit squares and not the largest, a whole one of
15 between both ends."""


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "Q8_0"), ("mistral", "F16"), ("qwen2", "Q4_K"), ("qwen3", "BF16")],
)
def test_a_file_holds_the_models_numbers(
    folders: dict[str, Path], tmp_path: Path, name: str, kind: str
) -> None:
    reader = converted(folders[name], tmp_path / "my.gguf", kind)
    found = {each.name: each for each in reader.tensors}
    stored = load_file(folders[name] / "model.safetensors")
    for hf, wanted in stored.items():
        tensor = found.pop(their_name(hf))
        for end, heads in (("q_proj", 4), ("k_proj", 2)):
            if name in ("llama", "mistral") and hf.split(".")[-2] == end:
                wanted = as_rotated_by_llama_cpp(wanted, heads)
        numbers = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        numbers = numbers.view(wanted.shape)
        if wanted.dim() == 1:
            assert torch.equal(numbers, wanted), hf
            continue
        apart = hf.startswith(("model.embed", "lm_head"))
        of = "Q8_0" if kind == "Q4_K" and apart else kind
        assert tensor.tensor_type.name == of
        size = wanted.abs()
        if of in ("Q8_0", "Q4_K"):
            blocks = size.unflatten(-1, (-1, 32)).amax(-1, keepdim=True).expand(-1, -1, 32)
            size = blocks.flatten(-2)
        assert ((numbers - wanted).abs() <= STEP[of] * size + 1e-7).all(), hf
    assert [*found] == ["rope_freqs.weight"] * (name == "llama")


def rotated(x_THK: torch.Tensor, base: float, divisors: torch.Tensor, neighbours: bool) -> Any:
    """RoPE as llama.cpp's two kinds have it: of pairs of neighbours, or half a head apart."""
    length, _, size = x_THK.shape
    angle = torch.outer(
        torch.arange(length).double(),
        base ** -(torch.arange(0, size, 2).double() / size) / divisors,
    ).float()[:, None]
    first, second = (x_THK[..., ::2], x_THK[..., 1::2]) if neighbours else x_THK.chunk(2, dim=-1)
    turned = (
        first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()
    )  # fmt: skip
    return torch.stack(turned, -1).flatten(-2) if neighbours else torch.cat(turned, -1)


def plain_logits(reader: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What llama.cpp's graphs of these architectures compute, from nothing but the file: [T, V]."""
    said = {key: field.contents() for key, field in reader.fields.items()}
    arch = said["general.architecture"]

    def number(key: str) -> Any:
        return said[f"{arch}.{key}"]

    weights = {
        each.name: torch.from_numpy(gguf.dequantize(each.data, each.tensor_type).copy()).view(
            *reversed([int(size) for size in each.shape])
        )
        for each in reader.tensors
    }
    heads, groups = number("attention.head_count"), number("attention.head_count_kv")
    size, base = number("attention.key_length"), number("rope.freq_base")
    divisors = weights.get("rope_freqs.weight", torch.ones(size // 2)).double()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        eps = number("attention.layer_norm_rms_epsilon")
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weights[name], eps)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    x = weights["token_embd.weight"][tokens]
    for layer in range(number("block_count")):
        own = f"blk.{layer}."
        normed = norm(x, f"{own}attn_norm.weight")
        q, k, v = (linear(normed, f"{own}attn_{each}").unflatten(-1, (-1, size)) for each in "qkv")
        if arch == "qwen3":
            q, k = norm(q, f"{own}attn_q_norm.weight"), norm(k, f"{own}attn_k_norm.weight")
        q, k = (rotated(each, base, divisors, arch == "llama") for each in (q, k))
        k, v = (each.repeat_interleave(heads // groups, 1) for each in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            *(each.transpose(0, 1) for each in (q, k, v)), is_causal=True
        )
        x = x + linear(out.transpose(0, 1).flatten(1), f"{own}attn_output")
        normed = norm(x, f"{own}ffn_norm.weight")
        gate = torch.nn.functional.silu(linear(normed, f"{own}ffn_gate"))
        x = x + linear(gate * linear(normed, f"{own}ffn_up"), f"{own}ffn_down")
    head = "output" if "output.weight" in weights else "token_embd"
    return linear(norm(x, "output_norm.weight"), head)


@pytest.mark.parametrize("name", MODELS)
def test_a_plain_forward_of_the_file_says_what_the_model_says(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    reader = converted(folders[name], tmp_path / "my.gguf", "F16")
    tokens = torch.arange(40) * 7 % 258
    with torch.inference_mode():
        wanted = load_model(folders[name])(tokens[None])[0]
        found = plain_logits(reader, tokens)
    # Weights are rounded to fp16, 11 bits, in each of two layers of wide sums.
    assert ((found - wanted).norm() / wanted.norm()).item() < 5e-3


def test_what_a_file_says_of_model_and_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    reader = converted(folders["llama"], tmp_path / "my.gguf", "F16")
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["general.architecture"] == "llama"
    numbers = {
        "block_count": 2, "embedding_length": 256, "feed_forward_length": 512, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.key_length": 64, "rope.dimension_count": 64,
        "rope.freq_base": 500000.0, "vocab_size": VOCAB,
    }  # fmt: skip
    assert {key: said[f"llama.{key}"] for key in numbers} == numbers
    tokens, kinds = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    assert (len(tokens), tokens[257:260]) == (VOCAB, ["the", "<|end|>", "[PAD259]"])
    assert kinds[256:260] == [1, 1, 3, 5]  # two normal ones, a control token, one that is not used
    assert said["tokenizer.ggml.merges"] == ["t h", "th e"]
    assert said["tokenizer.ggml.pre"] == "qwen2"
    assert said["tokenizer.ggml.eos_token_id"] == 258
    assert said["tokenizer.ggml.add_bos_token"] is False
    # By what llama3's scaling divides: 1 for pairs that turn often, 8 for those that turn seldom.
    (factors,) = (each for each in reader.tensors if each.name == "rope_freqs.weight")
    turns = 32 * 500000.0 ** -(np.arange(0, 64, 2) / 64) / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    np.testing.assert_allclose(factors.data, 1 / (smooth + (1 - smooth) / 8), rtol=1e-5)


def merged_by_scores(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """As llama.cpp does with SentencePiece's BPE: of neighbours whose joined text is a token, those
    with the largest score are joined first."""
    known = {token: number for number, token in enumerate(tokens)}
    parts = list(("\u2581" + text).replace(" ", "\u2581"))
    while pairs := [
        (scores[known[a + b]], -place)
        for place, (a, b) in enumerate(itertools.pairwise(parts))
        if a + b in known
    ]:
        place = -max(pairs)[1]
        parts[place : place + 2] = ["".join(parts[place : place + 2])]
    return [known[part] for part in parts]


def test_a_sentencepiece_model_is_written_as_it_is(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder, text = tmp_path / "m", "the end of the thieves, and then the other end"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folders["mistral"] / name, folder / name)
    (tmp_path / "text").write_text(f"{text}\n" * 20)
    for squeezed in (True, False):
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "text"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=300,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=squeezed, minloglevel=2,
        )  # fmt: skip
        if squeezed:
            assert main(["convert", str(folder), str(tmp_path / "no.gguf"), "--gguf", "F16"]) == 2
            assert "normalizes texts" in capsys.readouterr().err
    reader = converted(folder, tmp_path / "my.gguf", "F16")
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["tokenizer.ggml.model"] == "llama"
    assert said["tokenizer.ggml.add_space_prefix"] is True
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    tokens, scores = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.scores"]
    assert tokens[:300] == [pieces.IdToPiece(number) for number in range(300)]
    assert said["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]  # unknown, two controls, bytes
    assert merged_by_scores(text, tokens, scores) == pieces.encode(text)


def test_q4_k_is_nearer_than_rounding_between_the_ends() -> None:
    """Than 15 steps from the least to the largest of each 32, which is Q4_1 with fp16 scales; and
    rows without a span are what they are."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((40, 512)).astype(np.float32)
    x[0], x[1, :32], x[2] = 0.0, 3.0, np.abs(x[2]) + 1
    kinds = gguf.GGMLQuantizationType
    found = gguf.dequantize(quantise_q4_k(x), kinds.Q4_K)
    plain = gguf.dequantize(gguf.quantize(x, kinds.Q4_1), kinds.Q4_1)
    assert (found[0] == 0).all()
    assert np.abs(found[1, :32] - 3).max() < 0.05
    error, of_plain = (np.square(each[3:] - x[3:]).sum() for each in (found, plain))
    assert error < of_plain
    assert np.sqrt(error / np.square(x[3:]).sum()) < 0.08


def test_q4_k_is_llama_cpps(tmp_path: Path) -> None:
    """Its own numbers, as near: its loops sum in another order, so that a tie of two scales may go the
    other way."""
    llama_cpp = pytest.importorskip("llama_cpp")
    import ctypes

    library = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/libggml-base.so"))))
    x = np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32)
    ours = quantise_q4_k(x)
    theirs = np.zeros_like(ours)
    quantise = library.ggml_quantize_chunk
    quantise.restype = ctypes.c_size_t
    pointer = ctypes.c_void_p
    size = quantise(
        ctypes.c_int(int(gguf.GGMLQuantizationType.Q4_K)), x.ctypes.data_as(pointer), theirs.ctypes.data_as(pointer),
        ctypes.c_int64(0), ctypes.c_int64(64), ctypes.c_int64(512), pointer(),
    )  # fmt: skip
    assert size == ours.nbytes
    assert (ours == theirs).all(-1).mean() > 0.9


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_says_what_the_model_says(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    converted(folders[name], tmp_path / "my.gguf", "F16")
    generator = Generator.open(folders[name], num_slots=1)
    model = llama_cpp.Llama(
        str(tmp_path / "my.gguf"),
        n_ctx=64,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
        logits_all=True,
    )
    text = "the end of the 12 thieves' <b>thé</b>\n\n  they"
    ids = generator.tokenizer.encode(text)
    assert model.tokenize(text.encode(), add_bos=False) == ids
    with torch.inference_mode():
        from megalite.models.layers import SequenceInfo

        places = SequenceInfo.whole(len(ids), torch.device("cpu"))
        wanted = generator.model.logits(torch.tensor([ids]), places)[0]
    model.eval(ids)
    found = torch.from_numpy(np.array(model.scores[: len(ids)]))
    # Weights and the cache in fp16, products by llama.cpp's kernels.
    assert ((found - wanted).norm() / wanted.norm()).item() < 5e-3
    greedy = generator.answer([generator.request(ids, 12, Sampling(temperature=0.0))])[0].tokens
    model.reset()  # what it has read already, it would go on from without reading it
    said = [token for token, _ in zip(model.generate(ids, temp=0.0), range(12), strict=False)]
    assert said[: len(greedy)] == greedy


WRONG = {
    "gemma": "the model is of family gemma and task causal; causal ones of llama, mistral, qwen2, qwen3",
    "mistral": "the model has sliding windows",
}


@pytest.mark.parametrize("family", WRONG)
def test_models_that_would_be_others_are_refused(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "m", CASES[family])
    write_bpe(tmp_path / "m")
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "my.gguf"), "--gguf", "F16"]) == 2
    assert WRONG[family] in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"], "no part of a file is left"


def test_tokenizers_that_llama_cpp_would_split_otherwise_are_refused(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    folder = shutil.copytree(folders["qwen3"], tmp_path / "m")
    command = ["convert", str(folder), str(tmp_path / "my.gguf"), "--gguf", "Q8_0"]
    write_bpe(folder, r"\p{L}+|\p{N}")
    assert main(command) == 2
    assert "is no rule that llama.cpp is known to have" in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    assert main(command) == 2
    assert "the model has no tokenizer beside it" in capsys.readouterr().err
