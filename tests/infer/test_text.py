"""Text of answers: whole characters, piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models

from chats import write_tokenizer as write_chat_tokenizer
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import ConfigError
from megalite.infer.answer import LONGEST_CHARACTER
from megalite.infer.generate import Generator
from megalite.infer.sampling import Sampling
from scripted import Bytes, Scripted


def pieces(
    script: Sequence[int], stop: Sequence[str] = (), max_tokens: int | None = None
) -> list[str]:
    gen = Generator(Scripted(script), Bytes(), frozenset({256}), Sampling(temperature=0))
    return list(
        gen.stream(gen.request("a", len(script) if max_tokens is None else max_tokens, stop=stop))
    )


@pytest.mark.parametrize(
    "text",
    ["plain", "né à 🙂, 日本語", "a\ufffdb: a true replacement character, in the middle", "x"],
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


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        (["END"], "one E"),  # that may have begun before it did
        (["zzz"], "one EEND two"),
        (["ND two", "EEND"], "one "),
        (["two!", "wo"], "one EEND t"),
        (["o"], ""),
        (["D two?"], "one EEND two"),
        (["é"], "one EEND two"),
    ],
)
def test_an_answer_ends_before_a_stop_string(stop: list[str], said: str) -> None:
    found = pieces(list(b"one EEND two"), stop)
    assert "".join(found) == said
    assert all(found)


def test_a_stop_string_ends_the_work_too() -> None:
    gen = Generator(Scripted(list(b"abcdef")), Bytes())
    (answer,) = gen.answer([gen.request("x", 1000, Sampling(temperature=0), ["cd"])])
    assert (answer.text, bytes(answer.tokens), answer.finish) == ("ab", b"abcd", "stop")


def test_a_stop_string_beside_part_of_a_character() -> None:
    gen = Generator(Scripted([257]), Bytes())
    (answer,) = gen.answer([gen.request("x", 1, Sampling(temperature=0), ["n"])])
    assert (answer.text, answer.finish) == ("", "stop")


def test_tokens_that_the_model_has_not_are_refused() -> None:
    """Such as one that was added to its tokenizer alone."""
    gen = Generator(Scripted([1], vocab_size=200), Bytes())
    with pytest.raises(
        ConfigError, match="the prompt has the token 206, but the model knows those from 0 to 199"
    ):
        gen.answer([gen.request("Ω", 1)])


def test_an_empty_prompt_starts_a_document() -> None:
    gen = Generator(Scripted([ord("x")]), Bytes())
    assert gen.prompt_ids("") == [256]
    gen.tokenizer.eod_id = None
    with pytest.raises(ConfigError, match="empty prompt"):
        gen.prompt_ids("")


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
    gen = Generator(
        Scripted(whole[len(prompt) :], prompt=len(prompt)),
        tokenizer,
        sampling=Sampling(temperature=0),
    )
    (answer,) = gen.answer([gen.request("hello", len(whole) - len(prompt))])
    assert "hello" + answer.text == "hello world"
    names = "".join(map(gen.token_text, answer.tokens))
    assert names == " world", "and a token's own text has it"
    # Models may have more tokens than their tokenizers, and say one.
    scripted = Scripted([whole[-1], tokenizer.vocab_size], prompt=len(prompt))
    (answer,) = Generator(scripted, tokenizer).answer([gen.request("hello", 2)])
    assert answer.text == gen.token_text(whole[-1])


def test_a_prompt_begins_as_the_tokenizer_has_texts_begin(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "?": 4}, unk_token="?")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    found = load_tokenizer(tmp_path)
    assert found.encode("a b") == [2, 3]
    assert found.encode_prompt("a b") == [0, 2, 3], (
        "and it does not end: the answer goes on from it"
    )
    assert Generator(Scripted([2]), found).prompt_ids("") == [0], "an empty text too"


def test_bytes_that_never_make_a_character_are_said_and_cost_no_more_and_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoded, decode = [], Bytes.decode

    def counted(self: Bytes, ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(Bytes, "decode", counted)
    found = pieces([0xFF] * 1000)
    assert "".join(found) == "\ufffd" * 1000
    assert len(found) > 10
    assert max(decoded) <= 2 * LONGEST_CHARACTER


def test_bytes_of_tokens_make_the_text_again(tmp_path: Path) -> None:
    """Of one whose tokens are bytes for what it has not seen, and of one in SentencePiece's manner."""
    text = "日本語 🙂 né"
    tokenizer = load_tokenizer(write_chat_tokenizer(tmp_path / "bytes"))
    generator = Generator(Scripted([0]), tokenizer)
    ids = tokenizer.encode(text)
    assert any(tokenizer.decode([token]) == "\ufffd" for token in ids)
    assert b"".join(generator.token_bytes(token) or b"?" for token in ids) == text.encode()
    pieces = {"<unk>": 0, "a": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    model = models.BPE(vocab=pieces, merges=[], byte_fallback=True, unk_token="<unk>")
    fallback = tokenizers.Tokenizer(model)
    fallback.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    (tmp_path / "fallback").mkdir()
    fallback.save(str(tmp_path / "fallback" / "tokenizer.json"))
    generator = Generator(Scripted([0]), load_tokenizer(tmp_path / "fallback"))
    assert [generator.token_bytes(2 + byte) for byte in "é".encode()] == [b"\xc3", b"\xa9"]
    generator = Generator(Scripted([0]), Bytes())
    assert generator.token_bytes(0xC3) is None, "its vocabulary spells it as a number"
