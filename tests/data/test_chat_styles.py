"""Chats of every style of template, by every kind of tokenizer: ids are transformers', masks are the answers."""

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
            ("style", "kind", "is_marked"), CASES if whole else random.Random(1).sample(CASES, SAMPLED)
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
                token.removeprefix("##") for token, is_learned in zip(tokens, mask, strict=False) if is_learned
            )
            assert learned.lower() == re.sub(r"\s", "", "".join(text[a:b] for a, b in spans)).lower()
