"""What rows of chats and preferences mean, key by key: used, counted by name, or refused, and never
learned unseen."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_styles import ENDS, STYLES, without_generation, write_style

from chats import write_rows
from megalite.data.chat import ChatTemplate
from megalite.data.formats import Encoder, Settings
from megalite.data.preprocess_rows import preprocess_rows
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import DataError


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


def calls(arguments: Any) -> list[Any]:
    return [
        {
            "id": "abcdefghi",
            "type": "function",
            "function": {"name": "weather", "arguments": arguments},
        }
    ]


SYSTEM = {"role": "system", "content": "be kind"}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
]
NO_THOUGHTS = "<think>\n\n</think>\n\n"
CALLED = f'{NO_THOUGHTS}<tool_call>\n{{"name": "weather", "arguments": {{"city": "Paris"}}}}\n</tool_call><|im_end|>'


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("styles")
    return {
        style: write_style(root / style, without_generation(STYLES[style]), "bytes")
        for style in STYLES
    }


def learned(encoder: Encoder, row: dict[str, Any]) -> list[str] | str:
    """Of each document, what is learned; or why there is none."""
    [found] = encoder.encode([row])
    if isinstance(found, str):
        return found
    return [
        encoder.tokenizer.decode([i for i, v in zip(d.ids, d.values, strict=True) if v])
        for d in found
    ]


def whole(encoder: Encoder, row: dict[str, Any]) -> list[str] | str:
    [found] = encoder.encode([row])
    return (
        found
        if isinstance(found, str)
        else [encoder.tokenizer.decode(document.ids) for document in found]
    )


CHATS: list[tuple[str, dict[str, Any], str]] = [
    # OpenAI's weight; what it is on messages that are not learned anyhow says nothing.
    ("chatml", {"messages": [user("q") | {"weight": 0}, said("a", weight=0), user("r"), said("b", weight=1)]},
     "b<|im_end|>"),
    ("chatml", {"messages": [user("q"), said("a", weight=None), user("r"), said("", weight=0)]}, "a<|im_end|>"),
    ("chatml", {"messages": [user("q"), said("a", weight=0)]}, "every answer has weight 0"),
    ("chatml", {"messages": [user("q"), said("a", weight=0.5)]}, "weight 0.5, which must be 0 (not learned) or 1"),
    ("chatml", {"messages": [user("q") | {"weight": 1}, said("a")]}, "only what the assistant says is learned"),
    ("chatml", {"messages": [user("q"), said("a", train=False)]}, "has 'train'; what is learned"),
    ("chatml", {"messages": [user("q"), said("a", weigth=0)]}, "unknown key 'weigth'; did you mean 'weight'?"),
    # Roles
    ("chatml", {"conversations": [{"from": "human", "value": "q"}, {"from": "chatgpt", "value": "a"}]}, "a<|im_end|>"),
    ("chatml", {"conversations": [{"from": "human", "value": "q"}, {"from": "oracle", "value": "a"}]},
     "the role 'oracle', which is none of system, user, assistant, tool"),
    ("chatml", {"messages": [{"role": "User", "content": "q"}, {"role": "ASSISTANT", "content": "a"}]}, "a<|im_end|>"),
    ("qwen3", {"messages": [user("q"), said("a"), {"role": "tools", "content": "x"}, said("b")]}, "the role 'tools'"),
    # Tools
    ("qwen3", {"messages": [user("q"), said(None, tool_calls=calls({"city": "Paris", "unit": None}))], "tools": TOOLS},
     CALLED),
    ("qwen3", {"messages": [user("q"), said("", tool_calls=calls('{"city": "Paris"}'))], "tools": json.dumps(TOOLS)},
     CALLED),
    ("qwen3", {"messages": [user("q"), said(None, function_call={"name": "weather", "arguments": {"city": "Paris"}})]},
     CALLED),
    ("qwen3", {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value":
     '{"name": "weather", "arguments": {"city": "Paris"}}'}, {"from": "observation", "value": "sunny"}]},
     CALLED.removeprefix(NO_THOUGHTS)),
    ("mistral", {"messages": [user("q"), said(None, tool_calls=calls({"n": 1})), {"role": "tool", "content": "c"},
     said("it is"), user("r"), said("b")], "tools": TOOLS},
     '[TOOL_CALLS] [{"name": "weather", "arguments": {"n": 1}}]</s> it is</s> b</s>'),
    ("chatml", {"messages": [user("q"), said("a")], "tools": TOOLS}, "'tools', which the chat template does not show"),
    ("chatml", {"messages": [user("q"), said("a", tool_calls=calls({}))]}, "'tool_calls', which the chat template"),
    ("chatml", {"messages": [user("q"), said("a", tool_calls=[])], "tools": [], "images": []}, "a<|im_end|>"),
    ("qwen3", {"messages": [user("q"), said("a")], "tools": "weather"}, "'tools' must be JSON"),
    ("qwen3", {"messages": [user("q"), said("", tool_calls=[{"function": {}}])]}, "has no function with a name"),
    # System prompts
    ("gemma", {"messages": [user("q"), said("a")], "system": "x"}, "System role not supported"),
    ("chatml", {"messages": [SYSTEM, user("q"), said("a")], "system": "x"}, "begin with another one"),
    # Parts, fields
    ("chatml", {"messages": [user([{"type": "text", "text": "q", "image_url": None}]), said("a")]}, "a<|im_end|>"),
    ("chatml", {"messages": [user([{"type": "image_url", "image_url": "x"}]), said("a")]}, "part of type 'image_url'"),
    ("chatml", {"messages": [user("q"), said("a")], "images": ["x"]}, "the row has 'images': only text"),
    ("chatml", {"messages": [user("q"), said("a")], "systems": "x"}, "'systems'; did you mean 'system'?"),
    ("chatml", {"messages": [user("q"), said("a")], "conversations": [user("q"), said("b")]}, "which differ"),
    ("chatml", {"messages": [user("q"), said("a")], "score": float("nan"), "tools": float("nan")}, "a<|im_end|>"),
    ("chatml", {"messages": float("nan")}, "no field 'messages'"),
    ("chatml", {"messages": [user("q"), said(3)]}, "must be text, not int"),
    ("chatml", {"messages": [user("\ud800"), said("a")]}, "half of a surrogate pair"),
    # Thoughts
    ("qwen3", {"messages": [user("q"), said("a", reasoning_content="hm"), user("r"), said("<think>oh</think>b")]},
     "a<|im_end|><think>\noh\n</think>\n\nb<|im_end|>"),
    ("qwen3", {"messages": [user("q"), said("a")], "chat_template_kwargs": {"enable_thinking": False}}, "a<|im_end|>"),
    ("r1", {"messages": [user("q"), said("<think>hm</think>a"), user("r"), said("b")]}, "a</s>b</s>"),
    # The same texts again, and an answer that comes first
    ("chatml", {"messages": [said("a"), user("a"), said("a"), said("a")]}, "a<|im_end|>" * 3),
]  # fmt: skip


@pytest.mark.parametrize(("style", "row", "wanted"), CHATS)
def test_every_key_of_a_chat_means_something(
    folders: dict[str, Path], style: str, row: dict[str, Any], wanted: str
) -> None:
    found = learned(Encoder(Settings("chat", str(folders[style]))), row)
    assert found == [wanted] if isinstance(found, list) else wanted in found


def test_a_system_prompt_in_a_field_of_its_own_comes_first(folders: dict[str, Path]) -> None:
    encoder = Encoder(Settings("chat", str(folders["chatml"])))
    talk = [user("q"), said("a")]
    assert whole(encoder, {"messages": talk, "system": "be kind"}) == whole(
        encoder, {"messages": [SYSTEM, *talk]}
    )
    developer = {"role": "developer", "content": "be kind"}
    assert whole(encoder, {"messages": [developer, *talk]}) == whole(
        encoder, {"messages": [SYSTEM, *talk]}
    )


Q, YES, NO = user("q"), said("yes"), said("no")
PAIRS: list[tuple[dict[str, Any], str]] = [
    (
        {
            "prompt": "q",
            "chosen": [Q, YES],
            "rejected": [Q, NO],
            "messages": [Q, YES],
            "score_chosen": 9.0,
        },
        "q",
    ),
    ({"prompt": [Q], "chosen": [Q, YES], "rejected": [Q, NO]}, "q"),
    ({"prompt": [Q], "chosen": YES, "rejected": [Q, NO]}, "q"),
    ({"prompt": [SYSTEM, Q], "chosen": [Q, YES], "rejected": [NO]}, "q system"),
    ({"prompt": "q", "chosen": [SYSTEM, Q, YES], "rejected": [SYSTEM, Q, NO]}, "q system"),
    ({"chosen": [Q, YES], "rejected": [Q, NO], "system": "be kind", "prompt": "q"}, "q system"),
    ({"input": {"messages": [Q]}, "preferred_output": [YES], "non_preferred_output": [NO]}, "q"),
    ({"chosen": [Q, YES], "rejected": [user("other"), NO]}, "differ before their last answers"),
    (
        {"prompt": "q", "chosen": [user("other"), YES], "rejected": [Q, NO]},
        "'chosen' begins with other turns",
    ),
    (
        {"prompt": [Q], "chosen": [YES, Q, YES], "rejected": [NO, Q, NO]},
        "differ before their last answers",
    ),
    (
        {"prompt": [Q], "chosen": [YES, Q, YES], "rejected": [NO, Q, YES]},
        "differ before their last answers",
    ),
    ({"chosen": [Q, YES], "rejected": [Q, said("yes", id=3)]}, "the same last answer"),
    (
        {"prompt": "x", "messages": [Q], "chosen": YES, "rejected": NO},
        "'prompt' and 'messages', which differ",
    ),
    (
        {"prompt": "q", "chosen": "yes", "rejected": "no", "system": "x"},
        "'system', which only messages can take",
    ),
]


@pytest.mark.parametrize(("row", "wanted"), PAIRS)
def test_sides_that_repeat_the_prompt_have_it_once(
    folders: dict[str, Path], row: dict[str, Any], wanted: str
) -> None:
    encoder = Encoder(Settings("preference", str(folders["chatml"])))
    found = whole(encoder, row)
    if isinstance(found, str):
        assert wanted in found
        return
    before = "<|im_start|>system\nbe kind<|im_end|>\n" if "system" in wanted else ""
    before += "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert found == [f"{before}{answer}<|im_end|>\n" for answer in ("yes", "no")]
    assert learned(encoder, row) == ["yes<|im_end|>", "no<|im_end|>"]


TEXT_PAIRS: list[tuple[dict[str, Any], list[str] | str]] = [
    ({"prompt": "say", "chosen": "say hello", "rejected": "say no"}, [" hello</s>", " no</s>"]),
    ({"prompt": "a", "chosen": "apple", "rejected": "ape"}, ["apple</s>", "ape</s>"]),
    ({"chosen": "\n\nHuman: hi\n\nAssistant: I do", "rejected": "\n\nHuman: hi\n\nAssistant: I don't"},
     [" I do</s>", " I don't</s>"]),
    ({"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: ho\n\nAssistant: no"}, "differ before"),
    ({"prompt": "say", "chosen": "say x", "rejected": "x</s>"}, ["say x</s>", "x</s>"]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "wanted"), TEXT_PAIRS)
def test_texts_that_repeat_the_prompt_have_it_once(
    folders: dict[str, Path], row: dict[str, Any], wanted: list[str] | str
) -> None:
    encoder = Encoder(Settings("preference", str(folders["chatml"])))
    found = learned(encoder, row)
    assert found == wanted if isinstance(found, list) else str(wanted) in found
    # One side alone may be an echo: it is learned as it stands, and said.
    assert any("one side alone" in what for what in encoder.seen) == (row["chosen"] == "say x")


def test_a_completion_that_repeats_the_prompt_or_ends_already(folders: dict[str, Path]) -> None:
    encoder = Encoder(Settings("completion", str(folders["chatml"])))
    assert learned(encoder, {"prompt": [Q], "completion": [Q, YES, user("r"), NO]}) == [
        "yes<|im_end|>no<|im_end|>"
    ]
    assert learned(encoder, {"prompt": "1 + 1 =", "completion": "1 + 1 = 2"}) == [" 2</s>"]
    assert learned(encoder, {"prompt": "1 + 1 =", "completion": " 2</s>"}) == [" 2</s>"]
    assert "rejected" in learned(encoder, {"prompt": "1", "completion": "2", "label": False})


def ended_by(folder: Path, block_end: str, is_special: bool) -> Path:
    """ChatML whose end of an answer may be no special token, and whose block may hold the line's
    end."""
    template = STYLES["chatml"].replace(
        "message.content + '<|im_end|>' }}{% endgeneration", block_end
    )
    write_style(folder, template, "bytes")
    opened = json.loads((folder / "tokenizer.json").read_text())
    for token in opened["added_tokens"]:
        token["special"] = is_special
    (folder / "tokenizer.json").write_text(json.dumps(opened))
    return folder


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize("eos", ["<|im_end|>", "</s>"])
@pytest.mark.parametrize(
    "block_end",
    [
        "message.content + '<|im_end|>' }}{% endgeneration",
        "message.content + '<|im_end|>\\n' }}{% endgeneration",
        "message.content }}{% endgeneration %}{{- '<|im_end|>' }}{% if true %}{% endif",
    ],
)
def test_an_answer_has_one_end(tmp_path: Path, block_end: str, is_special: bool, eos: str) -> None:
    from transformers import AutoTokenizer

    folder = ended_by(tmp_path, block_end, is_special)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    encoder, talk = (
        Encoder(Settings("chat", str(folder))),
        [user("q"), said("a"), user("r"), said("b")],
    )
    [[document]] = encoder.encode([{"messages": talk}])
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (
        list(document.ids)
        == theirs.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"]
    )
    assert learned(encoder, {"messages": talk})[0].replace("\n", "") == "a<|im_end|>b<|im_end|>"


@pytest.mark.parametrize("style", [style for style in STYLES if style != "rounds"])
def test_a_template_names_its_ends(folders: dict[str, Path], style: str) -> None:
    tokenizer = load_tokenizer(folders[style])
    template = ChatTemplate.of(folders[style], tokenizer)
    ends = template.turn_end.tokens
    assert (
        set(ends) == {"<|return|>", "<|end|>"}
        if style == "harmony"
        else ends == (ENDS[style][0].strip(),)
    )
    # What is learned of an answer ends where a generated one does.
    encoder = Encoder(Settings("chat", str(folders[style])))
    [[document]] = encoder.encode([{"messages": [user("q"), said("a"), user("r"), said("b")]}])
    last = np.flatnonzero((document.values == 1) & (np.append(document.values[1:], 0) == 0))
    learned_ends = {document.ids[place] for place in last}
    assert len(last) == 2
    assert learned_ends <= {*template.turn_end.ids(tokenizer).tokens, tokenizer.eod_id}
    assert replace(template, source=STYLES["rounds"]).turn_end.tokens == ()
    # What begins the next turn is no end of this one.
    turns = without_generation(STYLES["phi3"].replace("<|end|>", ""))
    assert replace(template, source=turns, tokens={"eos_token": "</s>"}).turn_end.tokens == (
        "</s>",
    )


@pytest.mark.parametrize("is_file", [True, False])
def test_a_template_for_tools_is_taken_where_there_are_some(tmp_path: Path, is_file: bool) -> None:
    from transformers import AutoTokenizer

    folder = write_style(tmp_path, STYLES["chatml"], "bytes")
    if is_file:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(STYLES["qwen3"])
    else:
        (folder / "chat_template.jinja").unlink()
        named = [
            {"name": "default", "template": STYLES["chatml"]},
            {"name": "tool_use", "template": STYLES["qwen3"]},
        ]
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": named}))
    encoder, theirs = Encoder(Settings("chat", str(folder))), AutoTokenizer.from_pretrained(folder)
    talk = [
        user("q"),
        said("", tool_calls=calls({"city": "Paris"})),
        {"role": "tool", "content": "c"},
        said("b"),
    ]
    for messages, tools in ((talk, TOOLS), ([user("q"), said("a")], None)):
        [[document]] = encoder.encode([{"messages": messages, "tools": tools}])
        wanted = theirs.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=True)[
            "input_ids"
        ]
        assert list(document.ids) == wanted


def test_what_is_passed_over_is_told(tmp_path: Path, folders: dict[str, Path]) -> None:
    rows = [
        {
            "messages": [user("q"), said("<think>hm</think>a"), user("r"), said("b", mood="fine")],
            "id": 1,
            "topic": "x",
        },
        {"messages": [user("q"), said("<think>hm</think>a")], "topic": "y"},
        {"messages": [user("q")], "topic": "is left out, and so not counted"},
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    result = preprocess_rows(
        [str(file)], tmp_path / "data", Settings("chat", str(folders["r1"])), bad_rows=1
    )
    told = {
        "answers of which the chat template leaves out a part": 2,
        "field 'topic'": 2,
        "key 'mood' of messages, which the chat template does not use": 1,
    }
    assert json.loads((tmp_path / "data.json").read_text())["passed_over"] == told
    for what, count in told.items():
        assert f"passed over: {what} ({count})" in str(result)


def test_messages_that_the_template_does_not_show_are_told(folders: dict[str, Path]) -> None:
    encoder = Encoder(Settings("chat", str(folders["command-r"])))
    tool = {"role": "tool", "content": '{"a": "b"}'}
    row = {
        "messages": [SYSTEM, user("q"), {"role": "system", "content": "be brief"}, tool, said("a")]
    }
    assert learned(encoder, row) == ["a<|END|>"]
    assert encoder.seen == {"messages of role 'system' that the chat template does not show": 1}
    shouts = "(m.content | tojson | upper) if m.role != 'assistant' else m.content"
    template = f"{{% for m in messages %}}{{{{ ({shouts}) + eos_token }}}}{{% endfor %}}"
    written = write_style(folders["command-r"].with_name("json"), template, "bytes")
    encoder = Encoder(Settings("chat", str(written)))
    assert isinstance(learned(encoder, row), list)
    assert not encoder.seen, "what is written in another way is shown"


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_row_that_breaks_anything_costs_itself(
    tmp_path: Path, folders: dict[str, Path], kind: str
) -> None:
    good = json.dumps({"messages": [Q, YES], "score": 1.0})
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        binary = pyarrow.array([b"yes", b"\xff", b"no"])
        answers = pyarrow.Array.from_buffers(pyarrow.string(), 3, binary.buffers())
        prompts = pyarrow.array(["q", "q", "q"])
        parquet.write_table(
            pyarrow.table({"prompt": prompts, "completion": answers}), tmp_path / "rows.parquet"
        )
        format: Any = "completion"
    else:
        bad = good.replace('"yes"', '"\\ud800"')
        lines, format = [good.replace("1.0", "NaN"), bad, good], "chat"
        text = "\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]"
        (tmp_path / f"rows.{kind}").write_text(text)
    settings = Settings(format, str(folders["chatml"]))
    result = preprocess_rows(
        [str(tmp_path / f"rows.{kind}")], tmp_path / "data", settings, bad_rows=1
    )
    assert (result.num_documents, result.report.num_bad) == (2, 1)
    assert f"rows.{kind}:2" in result.report.messages[0]
    with pytest.raises(DataError, match=rf"1 rows cannot be used.*\n.*rows.{kind}:2: "):
        preprocess_rows([str(tmp_path / f"rows.{kind}")], tmp_path / "other", settings)


def test_nulls_that_arrow_writes_into_tool_calls_are_not_learned(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    import datasets

    other = [
        {
            "id": "abcdefghi",
            "type": "function",
            "function": {"name": "time", "arguments": {"zone": "UTC"}},
        }
    ]
    rows = [
        {"messages": [Q, said("", tool_calls=made)]} for made in (calls({"city": "Paris"}), other)
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    from megalite.data.inputs import Report
    from megalite.data.rows import list_rows, read_rows

    encoder = Encoder(Settings("chat", str(folders["qwen3"])))
    found = [
        row.values
        for row in read_rows(list_rows([str(tmp_path / "rows.parquet")], Report()), Report())
    ]
    assert "None" in str(found)
    assert [learned(encoder, dict(row)) for row in found] == [learned(encoder, row) for row in rows]


STRANGE = [
    None,
    float("nan"),
    "",
    "x",
    0,
    1,
    True,
    [],
    {},
    [None],
    {"a": None},
    "\ud800",
    10**30,
    b"x",
    [[]],
    {"role": 1},
]


def test_strange_values_anywhere_never_stop_the_others(
    folders: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    """A value of a row that can be used is replaced or moved: the row is used or refused, and its
    neighbour used."""
    chooser = random.Random(0)
    encoders = {
        format: Encoder(Settings(format, str(folders["qwen3"]), labels=("a", "b")))  # type: ignore[arg-type]
        for format in ("chat", "completion", "preference", "classification", "labels")
    }
    good: dict[str, dict[str, Any]] = {
        "chat": {
            "messages": [SYSTEM, Q, said("x", tool_calls=calls({"a": 1})), NO],
            "tools": TOOLS,
        },
        "completion": {"prompt": [Q], "completion": [YES]},
        "preference": {"prompt": "q", "chosen": [Q, YES], "rejected": [Q, NO]},
        "classification": {"text": "x", "label": "a"},
        "labels": {"tokens": ["x", "y"], "labels": ["a", 1]},
    }
    for _ in range(20_000 if request.config.getoption("--whole") else 600):
        format = chooser.choice(list(good))
        row = copy.deepcopy(good[format])
        place: Any = row
        while True:
            key = chooser.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key] or chooser.random() < 0.3:
                break
            place = place[key]
        place[key] = copy.deepcopy(chooser.choice(STRANGE))
        first, last = encoders[format].encode([row, good[format]])
        assert isinstance(last, list), last
        assert isinstance(first, list) or not first.startswith("cannot be read"), (row, first)
