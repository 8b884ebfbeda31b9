"""Generation: the tokens transformers would choose, sampling that follows the distribution, text that never breaks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.errors import ConfigError
from megalite.infer.generate import Sampling, find_model, generate, generate_text, load_model, sample
from megalite.infer.ranks import load_on_ranks
from megalite.mesh import Launch
from megalite.train import train
from ranks import run_ranks
from small_runs import make_config

GREEDY = Sampling(temperature=0)
WINDOW = 32
NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, nn.Module]:
    """A random transformers model and megalite's reading of it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if request.param == "llama":
        config = transformers.LlamaConfig(
            vocab_size=99, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=WINDOW, initializer_range=0.3, **NO_ENDS,
        )  # fmt: skip
        theirs = transformers.LlamaForCausalLM(config).eval()
    else:
        config = transformers.GPT2Config(
            vocab_size=99, n_positions=WINDOW, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, **NO_ENDS
        )
        theirs = transformers.GPT2LMHeadModel(config).eval()
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, load_model(folder)


def test_greedy_equals_transformers_token_for_token(models: tuple[Any, nn.Module]) -> None:
    theirs, ours = models
    for prompt in ([3, 1, 4, 1, 5], [9], list(range(12))):
        wanted = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=20, do_sample=False
        )
        assert list(generate(ours, prompt, 20, GREEDY, None)) == wanted[0, len(prompt) :].tolist()


def test_beyond_the_longest_sequence_the_window_moves(models: tuple[Any, nn.Module]) -> None:
    theirs, ours = models
    tokens = [5, 6, 7]
    for token in generate(ours, list(tokens), WINDOW + 10, GREEDY, None):
        with torch.no_grad():
            wanted = theirs(torch.tensor([tokens[-WINDOW:]])).logits[0, -1].argmax().item()
        assert token == wanted, f"after {len(tokens)} tokens"
        tokens.append(token)
    assert len(tokens) == WINDOW + 13


def test_a_seed_gives_the_same_tokens_again(models: tuple[Any, nn.Module]) -> None:
    def tokens(seed: int) -> list[int]:
        return list(generate(models[1], [3, 1, 4], 20, Sampling(temperature=2.0, seed=seed), None))

    assert tokens(0) == tokens(0)
    assert tokens(0) != tokens(1)
    state = torch.get_rng_state()
    tokens(2)
    assert torch.equal(state, torch.get_rng_state()), "nobody else's random numbers are touched"


class Scripted(nn.Module):
    """Says the tokens of a script, one after the other, whatever it is given."""

    def __init__(self, script: Sequence[int], prompt: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.script, self.prompt = script, prompt
        self.config = SimpleNamespace(max_positions=10_000)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        logits = torch.zeros(1, tokens_BT.shape[1], 512)
        logits[0, -1, self.script[tokens_BT.shape[1] - self.prompt]] = 1.0
        return logits


def test_stops_at_the_end_token_and_at_the_limit() -> None:
    model = Scripted([4, 5, 6, 7])
    assert list(generate(model, [0], 4, GREEDY, end=6)) == [4, 5]
    assert list(generate(model, [0], 3, GREEDY, end=None)) == [4, 5, 6]
    assert list(generate(model, [0], 0, GREEDY, end=None)) == []
    prompt = [0]
    list(generate(model, prompt, 2, GREEDY, None))
    assert prompt == [0], "the caller's list is left alone"


# --- sampling -------------------------------------------------------------------------------------------------------

PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
DRAWS = 4000


def shares(sampling: Sampling, logits: Tensor | None = None) -> Tensor:
    logits = PROBABILITIES.log() if logits is None else logits
    generator = torch.Generator().manual_seed(sampling.seed)
    drawn = torch.stack([sample(logits, sampling, generator) for _ in range(DRAWS)])
    return torch.bincount(drawn, minlength=len(logits)) / DRAWS


# Which of the five tokens may be drawn, in proportion to these weights.
@pytest.mark.parametrize(
    ("sampling", "weights"),
    [
        (Sampling(), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (Sampling(temperature=0.5), [0.05**2, 0.4**2, 0.1**2, 0.25**2, 0.2**2]),
        (Sampling(temperature=2.0), [0.05**0.5, 0.4**0.5, 0.1**0.5, 0.25**0.5, 0.2**0.5]),
        (Sampling(temperature=0), [0, 1, 0, 0, 0]),
        (Sampling(top_k=1), [0, 1, 0, 0, 0]),
        (Sampling(top_k=3), [0, 0.4, 0, 0.25, 0.2]),
        (Sampling(top_k=9), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (Sampling(top_p=0.3), [0, 1, 0, 0, 0]),  # the likeliest token is always in
        (Sampling(top_p=0.6), [0, 0.4, 0, 0.25, 0]),  # 0.4 + 0.25 reach it
        (Sampling(top_p=0.7), [0, 0.4, 0, 0.25, 0.2]),
        (Sampling(top_k=4, top_p=0.87), [0, 0.4, 0, 0.25, 0.2]),  # top-p of what top-k left: 0.85 of 0.95 is 0.89
        (Sampling(temperature=0.5, top_p=0.6), [0, 0.4**2, 0, 0.25**2, 0]),  # tempered: 0.59, then 0.23
    ],
)
def test_tokens_are_drawn_in_proportion(sampling: Sampling, weights: list[float]) -> None:
    wanted = torch.tensor(weights) / sum(weights)
    found = shares(sampling)
    assert (found[wanted == 0] == 0).all(), "never a token that was cut off"
    # Four standard deviations of a share of 4,000 draws; the draws are seeded.
    bound = 4 * (wanted * (1 - wanted) / DRAWS).sqrt()
    assert ((found - wanted).abs() <= bound + 1e-12).all(), found


@pytest.mark.parametrize(
    "values", [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": -1.0}]
)
def test_impossible_sampling_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="at least 0") as caught:
        Sampling(**values)
    assert str(next(iter(values.values()))) in str(caught.value)


# --- text -----------------------------------------------------------------------------------------------------------


MORE = {256: b"", 257: "né".encode()[:2], 258: "é".encode()[1:] + b"!", 259: "🙂".encode()[:3]}


class Bytes(Tokenizer):
    """Token i < 256 is a byte; more tokens stand for several bytes, also such as end inside a character."""

    eod_id = 256
    vocab_size = 260

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(MORE[i] if i in MORE else bytes([i]) for i in ids).decode(errors="replace")

    def vocabulary(self) -> dict[str, int]:
        return {str(i): i for i in range(self.vocab_size)}

    def save(self, folder: str | Path) -> None:
        raise NotImplementedError


def pieces(script: Sequence[int], max_tokens: int | None = None) -> list[str]:
    limit = len(script) if max_tokens is None else max_tokens
    return list(generate_text(Scripted(script), Bytes(), "a", limit, GREEDY))


@pytest.mark.parametrize(
    "text", ["plain", "né à 🙂, 日本語", "a\ufffdb: a true replacement character, in the middle", ""]
)
def test_pieces_are_whole_characters_and_make_the_text(text: str) -> None:
    found = pieces(list(text.encode()))
    assert "".join(found) == text
    assert all("\ufffd" not in piece for piece in found) or "\ufffd" in text
    assert len(found) <= len(text), "nothing is said before its character is complete"


def test_a_token_may_end_inside_a_character() -> None:
    assert pieces([257, 258, ord("x")]) == ["né!", "x"]
    assert "".join(pieces([259, 0x82, 256, ord("x")])) == "🙂", "and the end token is not said"


def test_complete_characters_are_said_even_when_the_last_one_is_cut_off() -> None:
    assert "".join(pieces([ord("a"), 257])).startswith("an")


def test_a_true_replacement_character_at_the_end_is_said() -> None:
    assert "".join(pieces(list("a\ufffd".encode()))) == "a\ufffd"


def test_an_empty_prompt_starts_a_document() -> None:
    seen: list[int] = []

    class Watching(Scripted):
        def forward(self, tokens_BT: Tensor) -> Tensor:
            seen.extend(tokens_BT[0].tolist())
            return super().forward(tokens_BT)

    assert list(generate_text(Watching([ord("x")]), Bytes(), "", 1, GREEDY)) == ["x"]
    assert seen == [256]
    endless = Bytes()
    endless.eod_id = None
    with pytest.raises(ConfigError, match="empty prompt"):
        list(generate_text(Scripted([0]), endless, "", 1, GREEDY))


def test_the_space_between_prompt_and_continuation(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("hello world this is a test\nthe quick brown fox\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=60, model_type="bpe",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    prompt, whole = tokenizer.encode("hello"), tokenizer.encode("hello world")
    assert whole[: len(prompt)] == prompt
    model = Scripted(whole[len(prompt) :], prompt=len(prompt))
    said = "".join(generate_text(model, tokenizer, "hello", len(whole) - len(prompt), GREEDY))
    assert "hello" + said == "hello world"


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path} is neither a run with a checkpoint nor"):
        find_model(tmp_path)


def continue_on_ranks(rank: int, world_size: int, folder: Path, tensor: int, pipeline: int) -> list[int]:
    model = load_on_ranks(folder, Launch.from_environment(), tensor, pipeline, None)
    return list(generate(model, [3, 1, 4], 12, Sampling(temperature=0.7, seed=5), None))


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_say_what_one_process_says(tmp_path: Path, tensor: int, pipeline: int) -> None:
    """All of them, and token for token; the vocabulary of 97 is padded over two tensor ranks."""
    config = make_config(tmp_path, "gpt2", "train.steps=2", "observe.eval_every=0")
    train(config)
    folder = find_model(config.run.folder)
    wanted = list(generate(load_model(folder), [3, 1, 4], 12, Sampling(temperature=0.7, seed=5), None))
    found = run_ranks(tensor * pipeline, continue_on_ranks, folder, tensor, pipeline)
    assert found == [wanted] * (tensor * pipeline)


def test_too_few_ranks_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs 4 ranks, not 1; start them with torchrun --nproc-per-node=4"):
        load_on_ranks(tmp_path, Launch(0, 1, 0), 2, 2, None)
