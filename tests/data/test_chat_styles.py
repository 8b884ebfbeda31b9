"""Chats of every style of template, by every kind of tokenizer: ids are transformers', masks are
the answers."""

from __future__ import annotations

import itertools
import random
import re
import unicodedata
from pathlib import Path

import pytest
from chat_styles import (
    STYLES,
    TOKENIZERS,
    WORDS,
    answers_of,
    random_chat,
    surfaces,
    wanted_mask,
    without_generation,
    write_style,
)

from megalite.data.formats import Encoder, Settings

CASES = [*itertools.product(STYLES, TOKENIZERS, (False, True))]
SAMPLED = 40
CHATS = 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "style" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--whole")
        metafunc.parametrize(
            ("style", "kind", "is_marked"),
            CASES if whole else random.Random(1).sample(CASES, SAMPLED),
        )


def test_ids_are_those_of_transformers_and_masks_are_the_answers(
    tmp_path: Path, style: str, kind: str, is_marked: bool, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoTokenizer

    template = STYLES[style] if is_marked else without_generation(STYLES[style])
    folder = write_style(tmp_path, template, kind)
    theirs = AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(Settings("chat", str(folder)))
    chooser = random.Random(f"{style}/{kind}/{is_marked}")
    for _ in range(40 if request.config.getoption("--whole") else CHATS):
        chat = random_chat(chooser, style)
        [found] = encoder.encode([{"messages": chat}])
        assert not isinstance(found, str), found
        ids, mask = list(found[0].ids), found[0].values.tolist()
        text = theirs.apply_chat_template(chat, tokenize=False)
        wanted = theirs.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
        is_open = style == "rounds" and chat[-1]["role"] == "assistant"
        assert ids == wanted + [encoder.tokenizer.eod_id] * is_open
        if kind == "bytes-nfc":
            text = unicodedata.normalize("NFC", text)
        tokens, place, spans = theirs.convert_ids_to_tokens(wanted), 0, []
        for answer in answers_of(chat, style):
            if kind == "bytes-nfc":
                answer = unicodedata.normalize("NFC", answer)
            answer = answer.removesuffix("</s>") if style == "rounds" else answer
            start = text.index(answer, place)
            place = start + len(answer)
            is_last_of_marked = is_marked and style in ("gemma", "phi3")
            spans.append((start, place + (is_last_of_marked and text.startswith("\n", place))))
        pieces = surfaces(kind, tokens)
        if pieces is not None:
            exact = wanted_mask(pieces, text, spans)
            assert mask == [0, *exact[1:]] + [1] * is_open
        else:
            learned = "".join(
                token.removeprefix("##")
                for token, is_learned in zip(tokens, mask, strict=False)
                if is_learned
            )
            assert (
                learned.lower() == re.sub(r"\s", "", "".join(text[a:b] for a, b in spans)).lower()
            )


@pytest.mark.parametrize("kind", ["bytes", "unigram", "unigram without a space", "metaspace"])
def test_a_label_stands_at_the_first_token_of_its_word(tmp_path: Path, kind: str) -> None:
    words = [word for text in WORDS for word in text.split()] + [
        "日",
        "q日",
        "日本日本",
        "✓✓",
        "\u00a0x",
        "(",
        ".",
    ]
    settings = Settings(
        "labels", str(write_style(tmp_path, STYLES["chatml"], kind)), labels=("a", "b")
    )
    encoder, chooser = Encoder(settings), random.Random(kind)
    names = {token: name for name, token in encoder.tokenizer.vocabulary().items()}
    for _ in range(60):
        row = chooser.choices(words, k=chooser.randrange(1, 9))
        [found] = encoder.encode([{"tokens": row, "ner_tags": [n % 2 for n in range(len(row))]}])
        assert not isinstance(found, str), found
        [document] = found
        text, place, wanted = " ".join(row), 0, [0] * len(document.ids)
        pieces = surfaces(kind, [names[token] for token in document.ids])
        assert pieces is not None
        if "<unk>" in map(bytes.decode, filter(bytes.isascii, pieces)):
            continue
        for number, word in enumerate(row):
            wanted[wanted_mask(pieces, text, [(place, place + len(word))]).index(1)] = (
                1 + number % 2
            )
            place += len(word) + 1
        assert document.values.tolist() == wanted
