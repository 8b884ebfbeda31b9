"""How chat templates end an answer, of every manner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chats import CHATML, ENDED, FORGETFUL, MARKED, MARKED_WITHOUT_END, PLAIN, write_tokenizer
from megalite.data.chat import ChatTemplate
from megalite.data.tokenizer import load_tokenizer

pytest.importorskip("transformers")
END, OTHER = "<|im_end|>", "<|endoftext|>"
TURN = "<|im_start|>{{ message.role }}\n"


def each(turn: str) -> str:
    return "{% for message in messages %}" + turn + "{% endfor %}"


TOOLS = each(
    TURN
    + "{% if message.tool_calls %}{{ message.tool_calls[0].function | tojson }}</call>{{ eos_token }}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n"
)
MANNERS: dict[str, tuple[str, list[str], list[str]]] = {
    "chatml": (CHATML, [END], []),
    "marked": (MARKED, [END], []),
    "marked without its end": (MARKED_WITHOUT_END, [END], []),
    "thoughts": (FORGETFUL, [END], []),
    "an end of text behind the last turn": (ENDED, [END], []),
    "a system message of its own": (f"<|im_start|>system\nbe good{END}\n" + CHATML, [END], []),
    "no end": (PLAIN, [], []),
    "what begins a turn ends none": (each("<|{{ message.role }}|>\n{{ message.content }}"), [], []),
    "another end behind the last turn": (
        each(TURN + "{{ message.content }}{% if loop.last %}<|endoftext|>{% else %}<|im_end|>{% endif %}"),
        [OTHER, END],
        [],
    ),
    "an end between turns alone": (
        each(TURN + "{{ message.content }}{% if not loop.last %}<|im_end|>{% endif %}"),
        [END],
        [],
    ),
    "the end of text": (
        each(
            "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]{% else %} {{ message.content }} "
            "{{ eos_token }}{% endif %}"
        ),
        [OTHER],
        [],
    ),
    "several tokens": (each("### {{ message.role }}\n{{ message.content }}\n### End\n\n"), [], ["### End"]),
    "several tokens, then one": (each(TURN + "{{ message.content }}</answer><|im_end|>\n"), [END], ["</answer>"]),
    "what ends sentences ends no turn": (each("{{ message.role }}: {{ message.content }}.\n"), [], []),
    "calls of tools": (TOOLS, [END, OTHER], []),
    "a call may have another behind it": (TOOLS.replace("{{ eos_token }}", END), [END], []),
    "refused": ("{{ raise_exception('no') }}", [], []),
}  # fmt: skip


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize("manner", MANNERS)
def test_ends_of_answers(tmp_path: Path, manner: str, is_special: bool) -> None:
    """Whether the tokenizer flags them special or not."""
    template, tokens, texts = MANNERS[manner]
    folder = write_tokenizer(tmp_path, template)
    if not is_special:
        values = json.loads((folder / "tokenizer.json").read_text())
        for token in values["added_tokens"]:
            token["special"] = token["content"] == OTHER
        (folder / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(folder)
    found = ChatTemplate.of(folder, tokenizer).turn_end.ids(tokenizer)
    assert list(found.tokens) == [tokenizer.vocabulary()[token] for token in tokens]
    assert list(found.texts) == texts


def test_an_end_without_a_token_is_a_text(tmp_path: Path) -> None:
    """As of a base model that was given a template."""
    folder = write_tokenizer(tmp_path, CHATML)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["added_tokens"] = [
        token for token in values["added_tokens"] if token["content"] == OTHER
    ]
    (folder / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer.encode(END)) > 1
    assert ChatTemplate.of(folder, tokenizer).turn_end.ids(tokenizer) == ((), (END,))
