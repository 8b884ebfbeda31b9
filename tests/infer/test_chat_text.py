"""What people read of a chat's answer: up to where the template ends it, and without control
tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("transformers")

import openai
from local_server import serving

from chats import CHATML, CONTROLS, write_tokenizer
from megalite.data import template_limits
from megalite.data.tokenizer import load_tokenizer
from megalite.infer.generate import Generator
from megalite.infer.sampling import Sampling
from scripted import Scripted

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
SAID = "<|im_start|>hello, one<|user|> two<|im_end|>\n<|im_start|>user\nhello"


def generator(
    folder: Path, flagged: tuple[str, ...], added: tuple[str, ...] = CONTROLS, said: str = SAID
) -> Generator:
    """No end is told but what the template tells. Of CONTROLS, the tokenizer knows `added`, and
    says that `flagged` are special."""
    write_tokenizer(folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    kept = [token for token in values["added_tokens"] if token["content"] in added]
    values["added_tokens"] = [token | {"special": token["content"] in flagged} for token in kept]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(folder)
    prompt = len(tokenizer.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"))
    return Generator(
        Scripted(tokenizer.encode(said), prompt),
        tokenizer,
        frozenset(),
        Sampling(temperature=0),
        folder,
    )


KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "special": (CONTROLS, CONTROLS, "hello, one two"),
    "not special": (("<|im_start|>", "<|user|>"), CONTROLS, "hello, one two"),
    # What is text to the tokenizer is text to people.
    "no token": (("<|im_start|>",), ("<|im_start|>",), "hello, one<|user|> two"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_ends_where_the_template_ends_a_turn(tmp_path: Path, kind: str) -> None:
    flagged, added, wanted = KINDS[kind]
    gen = generator(tmp_path / "model", flagged, added)
    request = gen.as_chat(gen.request(gen.chat_ids(MESSAGES), 100))
    (answer,) = gen.answer([request])
    assert (answer.text, answer.finish) == (wanted, "stop")
    assert "".join(gen.stream(request)) == wanted
    with serving(gen, tmp_path / "ratings") as local:
        create = local.client().chat.completions.create
        whole = create(model="tiny", messages=MESSAGES).choices[0]
        pieces = [
            chunk.choices[0] for chunk in create(model="tiny", messages=MESSAGES, stream=True)
        ]
        raw = (
            local.client()
            .completions.create(model="tiny", prompt=gen.chat_ids(MESSAGES), max_tokens=60)
            .choices[0]
        )
    assert (whole.message.content, whole.finish_reason) == (wanted, "stop")
    assert ("".join(piece.delta.content or "" for piece in pieces), pieces[-1].finish_reason) == (
        wanted,
        "stop",
    )
    assert raw.text.startswith(SAID), "completions are texts as the model has them"


def test_a_control_token_that_is_asked_for_ends_a_chat_too(tmp_path: Path) -> None:
    gen = generator(tmp_path, CONTROLS)
    (answer,) = gen.answer(
        [gen.as_chat(gen.request(gen.chat_ids(MESSAGES), 100, stop=["<|user|>"]))]
    )
    assert (answer.text, answer.finish) == ("hello, one", "stop")


def test_the_model_s_own_texts_end_every_answer(tmp_path: Path) -> None:
    gen = generator(tmp_path, CONTROLS)
    gen.habits = gen.habits._replace(stop=(", one",))
    (answer,) = gen.answer([gen.as_chat(gen.request(gen.chat_ids(MESSAGES), 100))])
    assert (answer.text, answer.finish) == ("hello", "stop")


def test_a_template_that_does_not_end_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.5)
    gen = generator(tmp_path / "model", CONTROLS)
    loops = "{% for a in range(99999) %}" * 2 + "{{ a }}" + "{% endfor %}" * 2
    endless = f"{{% if 'loop' in messages[0].content %}}{loops}{{% endif %}}"
    write_tokenizer(tmp_path / "model", endless + CHATML)
    with serving(gen, tmp_path / "ratings") as local:
        create = local.client().chat.completions.create
        with pytest.raises(
            openai.BadRequestError, match="model: the chat template works without end"
        ) as caught:
            create(model="tiny", messages=[{"role": "user", "content": "loop"}])
        assert "\n" not in caught.value.body["message"]
        assert create(model="tiny", messages=MESSAGES).choices[0].message.content
    write_tokenizer(tmp_path / "model", loops)
    gen = Generator(gen.model, gen.tokenizer, folder=tmp_path / "model")
    with (
        serving(gen, tmp_path / "ratings") as local,
        pytest.raises(openai.BadRequestError, match="no chat template"),
    ):
        local.client().chat.completions.create(model="tiny", messages=MESSAGES)
