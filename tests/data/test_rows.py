"""Labelled data: rows of every format become the tokens and masks that transformers' own templates
say."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import yaml
from tokenizers import pre_tokenizers, processors

from chats import (
    CHATML,
    ENDED,
    FORGETFUL,
    MARKED,
    MARKED_WITHOUT_END,
    PLAIN,
    write_rows,
    write_tokenizer,
)
from megalite.cli import main
from megalite.data.formats import Encoder, Settings
from megalite.data.indexed import IndexedDataset
from megalite.data.preprocess import preprocess
from megalite.data.preprocess_rows import preprocess_rows
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import DataError
from megalite.utils.resources import configs_dir
from mixtures import config_of

CHAT: list[dict[str, str]] = [
    {"role": "system", "content": "one two"},
    {"role": "user", "content": "say hello ✓"},
    {"role": "assistant", "content": "hello, ünï\n"},
    {"role": "user", "content": "the capital of France?"},
    {"role": "assistant", "content": "Paris"},
]


def documents(prefix: Path) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each."""
    data = IndexedDataset(prefix)
    assert data.mask is not None
    starts = data.starts_of_documents(0, data.num_documents)
    return [
        (data.tokens[a:b].tolist(), data.mask[a:b].tolist()) for a, b in itertools.pairwise(starts)
    ]


def learned(tokenizer: Path, document: tuple[list[int], list[int]]) -> list[str]:
    """The runs of tokens that are learned, as text."""
    ids, mask = document
    borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    opened = load_tokenizer(tokenizer)
    return [opened.decode(ids[a:b]) for a, b in itertools.pairwise(borders) if mask[a]]


def made(
    tmp_path: Path, rows: list[dict[str, Any]], tokenizer: Path, **settings: Any
) -> list[tuple[list[int], Any]]:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    preprocess_rows([str(file)], tmp_path / "data", Settings(tokenizer=str(tokenizer), **settings))
    return documents(tmp_path / "data")


@pytest.mark.parametrize(
    "template", [CHATML, MARKED, MARKED_WITHOUT_END], ids=["prefixes", "marked", "end-unmarked"]
)
def test_a_chat_is_what_transformers_makes_of_it(tmp_path: Path, template: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = write_tokenizer(tmp_path / "tokenizer", template)
    theirs = AutoTokenizer.from_pretrained(tokenizer)
    [(ids, mask)] = made(tmp_path, [{"messages": CHAT}], tokenizer, format="chat")
    assert ids == theirs.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    write_tokenizer(tmp_path / "marked", MARKED)
    wanted = AutoTokenizer.from_pretrained(tmp_path / "marked").apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert mask == wanted["assistant_masks"]
    assert learned(tokenizer, (ids, mask)) == ["hello, ünï\n<|im_end|>", "Paris<|im_end|>"]
    [last] = made(tmp_path, [{"messages": CHAT}], tokenizer, format="chat", last_only=True)
    assert learned(tokenizer, last) == ["Paris<|im_end|>"]


def test_the_template_for_a_model_that_has_none(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(
        tmp_path / "tokenizer", (configs_dir() / "chat_template.jinja").read_text()
    )
    [found] = made(tmp_path, [{"messages": CHAT[1:3]}], tokenizer, format="chat")
    text = load_tokenizer(tokenizer).decode(found[0])
    assert (
        text
        == f"### user\n{CHAT[1]['content']}\n\n### assistant\n{CHAT[2]['content']}<|endoftext|>\n\n"
    )
    assert learned(tokenizer, found) == [f"{CHAT[2]['content']}<|endoftext|>"]


def test_a_template_that_renders_the_last_turn_differently(tmp_path: Path) -> None:
    """As Qwen3's and R1's, of which no conversation's rendering begins with that of its first
    turns."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", FORGETFUL)
    [found] = made(tmp_path, [{"messages": CHAT}], tokenizer, format="chat")
    assert learned(tokenizer, found) == ["hello, ünï\n<|im_end|>", "thinking Paris<|im_end|>"]
    [last] = made(tmp_path, [{"messages": CHAT}], tokenizer, format="chat", last_only=True)
    assert learned(tokenizer, last) == ["thinking Paris<|im_end|>"]


def test_a_template_that_ends_the_text_behind_the_last_turn(tmp_path: Path) -> None:
    """As Phi-3's, of which answers in the middle are known all the same."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", ENDED)
    [found] = made(tmp_path, [{"messages": CHAT}], tokenizer, format="chat")
    assert learned(tokenizer, found) == ["hello, ünï\n<|im_end|>", "Paris<|im_end|>\n<|endoftext|>"]


def test_an_answer_that_nothing_ends_gets_an_end(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", PLAIN)
    [found] = made(tmp_path, [{"messages": CHAT[1:3]}], tokenizer, format="chat")
    # The ids are those of the whole: the prompt's last space belongs to the first word.
    assert learned(tokenizer, found) == [" hello, ünï\n\n<|endoftext|>"]


def test_other_names_of_the_same_chat(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    turns = [{"from": "human", "value": "say hello"}, {"from": "gpt", "value": "hello"}]
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "say hello"}]},
        {"role": "assistant", "content": "hello"},
    ]
    plain = [{"role": "user", "content": "say hello"}, {"role": "assistant", "content": "hello"}]
    rows: list[dict[str, Any]] = [
        {"conversations": turns},
        {"messages": parts},
        {"messages": plain},
    ]
    assert len({str(found) for found in made(tmp_path, rows, tokenizer, format="chat")}) == 1


def test_no_other_format_is_advised_than_another(tmp_path: Path) -> None:
    encoder = Encoder(Settings("completion", str(write_tokenizer(tmp_path / "tokenizer"))))
    assert encoder.encode([{"completion": "c"}, {"text": "a", "label": 1}]) == [
        "no field 'prompt'; fields here: completion",
        "no field 'prompt'; fields here: text, label; --format classification takes such rows",
    ]


def test_completions(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    rows: list[dict[str, Any]] = [
        {"prompt": "the capital of France is", "completion": " Paris"},
        {
            "prompt": "say hel",
            "completion": "lo",
        },  # one token across the border when written together
        {"prompt": CHAT[:2], "completion": CHAT[2:3]},
    ]
    found = made(tmp_path, rows, tokenizer, format="completion")
    assert [learned(tokenizer, document) for document in found] == [
        [" Paris<|endoftext|>"], ["lo<|endoftext|>"], ["hello, ünï\n<|im_end|>"],
    ]  # fmt: skip
    opened = load_tokenizer(tokenizer)
    assert opened.encode(" hello") != opened.encode(" hel") + opened.encode("lo")
    for row, (ids, _) in zip(rows[:2], found, strict=False):
        prompt = opened.encode(row["prompt"])
        assert ids[: len(prompt)] == prompt, "whoever asks gives the prompt alone"


def changed(tokenizer: Path, change: Callable[[tokenizers.Tokenizer], None]) -> Path:
    opened = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    change(opened)
    opened.save(str(tokenizer / "tokenizer.json"))
    return tokenizer


def test_a_space_before_an_answer_is_the_prompts(tmp_path: Path) -> None:
    """Also where the tokenizer leaves spaces out of the places of its tokens, as that of
    GPT-NeoX."""

    def trim(opened: tokenizers.Tokenizer) -> None:
        opened.post_processor = processors.ByteLevel(trim_offsets=True)

    tokenizer = changed(write_tokenizer(tmp_path / "tokenizer"), trim)
    prompt = "say hello to "
    [document] = made(
        tmp_path, [{"prompt": prompt, "completion": "the world"}], tokenizer, format="completion"
    )
    asked = load_tokenizer(tokenizer).encode(prompt)
    assert document[0][: len(asked)] == asked
    assert learned(tokenizer, document) == ["the world<|endoftext|>"]


def test_a_text_stays_what_it_is_where_every_text_gets_a_space(tmp_path: Path) -> None:
    def put_space(opened: tokenizers.Tokenizer) -> None:
        opened.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)

    tokenizer = changed(write_tokenizer(tmp_path / "tokenizer"), put_space)
    [(ids, _)] = made(
        tmp_path, [{"prompt": "say hel", "completion": "lo"}], tokenizer, format="completion"
    )
    assert load_tokenizer(tokenizer).decode(ids) == " say hello<|endoftext|>"


def test_a_text_begins_as_the_model_is_asked(tmp_path: Path) -> None:
    """With the token that some tokenizers have begin every text; a template puts it there
    itself."""

    def begin(opened: tokenizers.Tokenizer) -> None:
        token = "<|user|>"
        opened.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", special_tokens=[(token, opened.token_to_id(token))]
        )

    tokenizer = changed(write_tokenizer(tmp_path / "tokenizer"), begin)
    rows: dict[Any, dict[str, Any]] = {
        "completion": {"prompt": "say", "completion": " hello"},
        "preference": {"prompt": "say", "chosen": " hello", "rejected": " world"},
        "classification": {"text": "say", "label": 0},
        "labels": {"tokens": ["say"], "labels": [0]},
    }
    for format, row in rows.items():
        labels = ("a", "b") if "label" in format or "class" in format else ()
        for ids, mask in made(tmp_path, [row], tokenizer, format=format, labels=labels):
            asked = load_tokenizer(tokenizer).encode_prompt("say")
            assert ids[: len(asked)] == asked
            assert mask[0] == (format == "classification"), "which encoders tell at the first token"
    [(ids, _)] = made(tmp_path, [{"messages": CHAT}], tokenizer, format="chat")
    assert load_tokenizer(tokenizer).decode(ids[:1]) == "<|im_start|>"


def test_an_end_behind_the_users_turn_is_not_learned(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", PLAIN)
    [found] = made(tmp_path, [{"messages": CHAT[1:4]}], tokenizer, format="chat")
    assert learned(tokenizer, found) == [" hello, ünï\n\n"]


def test_a_source_and_its_target_end_each_by_itself(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", None)
    rows = [{"source": "say hello", "target": "the world"}, {"input": "hel", "output": "lo"}]
    found = made(tmp_path, rows, tokenizer, format="seq2seq")
    opened = load_tokenizer(tokenizer)
    for (source, target), (ids, mask) in zip((row.values() for row in rows), found, strict=True):
        sides = [[*opened.encode(side), opened.eod_id] for side in (source, target)]
        assert ids == sides[0] + sides[1]
        assert mask == [0] * len(sides[0]) + [1] * len(sides[1]), (
            "the target's first token is learned, too"
        )


def test_preferences_are_two_documents(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    rows: list[dict[str, Any]] = [
        {"prompt": "say", "chosen": " hello", "rejected": " world"},
        {"messages": CHAT[:2], "chosen": "hello", "rejected": "world"},
        {
            "prompt": CHAT[:2],
            "chosen": {"role": "assistant", "content": "hello"},
            "rejected": [CHAT[4]],
        },
        {"chosen": CHAT, "rejected": [*CHAT[:4], {"role": "assistant", "content": "hello"}]},
    ]
    found = [
        learned(tokenizer, document)
        for document in made(tmp_path, rows, tokenizer, format="preference")
    ]
    ends = [
        f"{answer}<|im_end|>" for answer in ("hello", "world", "hello", "Paris", "Paris", "hello")
    ]
    assert found == [[" hello<|endoftext|>"], [" world<|endoftext|>"], *([end] for end in ends)]


def test_classes_and_labels(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    found = made(
        tmp_path,
        [{"text": "hello", "label": "b"}, {"text": "Paris", "label": "a"}],
        tokenizer,
        format="classification",
    )
    assert [set(mask) for _, mask in found] == [{2}, {1}]
    assert json.loads((tmp_path / "data.json").read_text())["labels"] == ["a", "b"]
    rows = [{"tokens": ["capital", "Zürich", "hello"], "ner_tags": [0, 2, -100]}]
    [(ids, mask)] = made(tmp_path, rows, tokenizer, format="labels")
    opened = load_tokenizer(tokenizer)
    assert len(ids) > 4
    marked = {
        opened.decode([token])[:2]: value for token, value in zip(ids, mask, strict=True) if value
    }
    assert list(marked.values()) == [1, 3], "the first token of each word that has a label"
    assert json.loads((tmp_path / "data.json").read_text())["labels"] == ["0", "1", "2"]


WRONG = [
    ("chat", {"text": "x"}, "no field 'messages' or 'conversations'.*fields here: text"),
    ("chat", {"messages": "x"}, "'messages' must be a list of messages, not str"),
    ("chat", {"messages": [{"role": "user"}]}, "message 0 of 'messages' has no 'content'; its keys: role"),
    ("chat", {"messages": [{"from": ["gpt"], "value": "x"}]}, "the role of message 0 of 'messages' must be text"),
    ("chat", {"messages": [{"role": None, "content": "x"}]}, "message 0 of 'messages' has no 'role'"),
    ("chat", {"messages": CHAT, "chat_template_kwargs": {"messages": []}}, "has 'messages', which is not for a row"),
    ("chat", {"messages": CHAT, "chat_template_kwargs": {"template": "x"}}, "has 'template', which is not for a row"),
    ("chat", {"messages": CHAT[:2]}, "no message is the assistant's"),
    ("chat", {"messages": [CHAT[1], {"role": "assistant", "content": ""}]}, "is an empty answer"),
    ("seq2seq", {"source": "x"}, "no field 'target' or 'output'; fields here: source"),
    ("seq2seq", {"source": " ", "target": "x"}, "'source' must be text that is not empty"),
    ("completion", {"prompt": "x"}, "no field 'completion'; fields here: prompt"),
    ("completion", {"prompt": "x", "completion": ""}, "'completion' is empty"),
    ("completion", {"prompt": "x", "completion": " \n"}, "'completion' is empty"),
    ("preference", {"chosen": "x", "rejected": "y"}, "no field 'prompt' or 'messages'"),
    ("completion", {"prompt": [], "completion": []}, "'completion' must end with a message of the assistant"),
    ("preference", {"prompt": "x", "chosen": "y", "rejected": "y"}, "are the same"),
    ("preference", {"chosen": [], "rejected": CHAT}, "'chosen' must end with a message of the assistant"),
    ("classification", {"text": "x", "label": "c"}, "label 'c' is none of the 2: a, b"),
    ("classification", {"text": " ", "label": "a"}, "'text' must be text that is not empty"),
    ("labels", {"tokens": ["x", "y"], "labels": ["a"]}, "must be a list of 2 labels"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("label", "names", "why"),
    [
        (
            ["a"],
            (),
            r"rows.jsonl:1: \['a'\] is a list of labels, which --problem multi_label takes",
        ),
        (
            {"a": 1},
            (),
            r"no row has a label; the first row: .*rows.jsonl:1: label \{'a': 1\} is neither a word nor a num",
        ),
        (
            None,
            (),
            r"no row has a label; the first row: .*: no field 'label' or 'labels' or 'score'; fields here: text$",
        ),
        (1.5, (), r"labels must be all words or all numbers; found: 1\.5; name them"),
        ("a", ("a", "b", "a"), "--labels names 'a' twice"),
    ],
)
def test_labels_that_name_no_classes_are_refused(
    tmp_path: Path, label: Any, names: tuple[str, ...], why: str
) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(DataError, match=why):
        made(
            tmp_path,
            [{"text": "x", "label": label}],
            tokenizer,
            format="classification",
            labels=names,
        )


@pytest.mark.parametrize("link", [False, True])
def test_no_input_is_written_over(tmp_path: Path, link: bool) -> None:
    """As chats.json would be by the note of the token file chats."""
    tokenizer, rows = write_tokenizer(tmp_path / "tokenizer"), [{"prompt": "a", "completion": "b"}]
    file = write_rows(tmp_path / ("rows.jsonl" if link else "chats.json"), rows)
    if link:
        (tmp_path / "chats.json").symlink_to(file)
    before = file.read_bytes()
    with pytest.raises(
        DataError, match=r"is an input, and .*chats\.json would be written over it; name another"
    ):
        preprocess_rows([str(file)], tmp_path / "chats", Settings("completion", str(tokenizer)))
    written = tmp_path / "x_text_document.json"
    written.write_text('{"text": "a"}')
    with pytest.raises(DataError, match=r"x_text_document\.json would be written over it"):
        preprocess([str(written)], tmp_path / "x", tokenizer)
    assert (file.read_bytes(), written.read_text()) == (before, '{"text": "a"}')


@pytest.mark.parametrize(("format", "row", "why"), WRONG)
def test_a_wrong_row_is_shown_and_nothing_is_written(
    tmp_path: Path, format: Any, row: dict[str, Any], why: str
) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    labels = ("a", "b") if format in ("classification", "labels") else ()
    good = {
        "chat": {"messages": CHAT}, "completion": {"prompt": "a", "completion": "b"},
        "seq2seq": {"source": "a", "target": "b"},
        "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "classification": {"text": "a", "label": "a"}, "labels": {"tokens": ["a"], "labels": ["a"]},
    }[format]  # fmt: skip
    with pytest.raises(DataError, match=rf"1 rows cannot be used.*\n.*rows.jsonl:2: .*{why}"):
        made(tmp_path, [good, row], tokenizer, format=format, labels=labels)
    assert not list(tmp_path.glob("data.*"))


def test_some_bad_rows_can_be_allowed(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\nnot json\n\n{"prompt": "a"}\n[]\n')
    settings = Settings("completion", str(tokenizer))
    with pytest.raises(DataError, match=r"3 rows cannot be used \(more than the 2 of --bad-rows\)"):
        preprocess_rows([str(file)], tmp_path / "data", settings, bad_rows=2)
    result = preprocess_rows([str(file)], tmp_path / "data", settings, bad_rows=3)
    assert (result.num_documents, result.report.num_bad, result.report.num_empty) == (1, 3, 1)
    assert [message.split(":")[1] for message in result.report.messages] == ["2", "4", "5"]


@pytest.mark.parametrize("kind", ["json", "parquet", "pq", "dataset", "jsonl.gz", "jsonlines"])
def test_every_kind_of_file_gives_the_same(tmp_path: Path, kind: str) -> None:
    import datasets

    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    rows = [{"messages": CHAT[1:3]}, {"messages": CHAT[3:]}]
    wanted = made(tmp_path, rows, tokenizer, format="chat")
    target = tmp_path / f"rows.{kind}"
    if kind == "json":
        target.write_bytes(b"\xef\xbb\xbf\n\n" + json.dumps(rows, indent=1).encode())
    elif kind == "jsonl.gz":
        import gzip

        target.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    elif kind in ("parquet", "pq"):
        datasets.Dataset.from_list(rows).to_parquet(str(target))
    elif kind == "jsonlines":
        target.write_bytes((tmp_path / "rows.jsonl").read_bytes())
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(target))
        (target / "dataset_infos.json").write_text("{}")
    preprocess_rows([str(target)], tmp_path / "other", Settings("chat", str(tokenizer)))
    assert documents(tmp_path / "other") == wanted


def test_a_dataset_names_its_classes(tmp_path: Path) -> None:
    import datasets

    tokenizer, names = write_tokenizer(tmp_path / "tokenizer"), ["O", "PLACE"]
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=names)),
        }
    )
    rows = datasets.Dataset.from_list(
        [{"tokens": ["to", "Paris"], "ner_tags": [0, 1]}], features=features
    )
    rows.save_to_disk(str(tmp_path / "rows"))
    preprocess_rows([str(tmp_path / "rows")], tmp_path / "data", Settings("labels", str(tokenizer)))
    assert json.loads((tmp_path / "data.json").read_text())["labels"] == names
    [(_, mask)] = documents(tmp_path / "data")
    assert [value for value in mask if value] == [1, 2]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_damaged_columns_are_told_before_their_classes_are_asked_for(
    tmp_path: Path, name: str
) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / name).write_bytes(b"PAR1" + b"\xff" * 50)
    with pytest.raises(DataError, match=rf"{name} cannot be read: Arrow"):
        preprocess_rows(
            [str(tmp_path / name)], tmp_path / "x", Settings("classification", str(tokenizer))
        )


def test_what_is_learned_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    made(tmp_path, [{"messages": CHAT[1:3]}], tokenizer, format="chat")
    assert main(["inspect", str(tmp_path / "data")]) == 0
    said = capsys.readouterr().out
    assert "format         chat" in said
    assert (
        "⟦<|im_start|>user\nsay hello ✓<|im_end|>\n<|im_start|>assistant\n⟧hello, ünï\n<|im_end|>⟦\n⟧"
        in said
    )
    config = config_of(
        train=[{"path": str(tmp_path / "data")}],
        seq_length=64,
        document_mask=True,
        tokenizer=str(tokenizer),
    ).model_dump(mode="json")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**config, "model": {"preset": "llama-1m"}}))
    assert main(["inspect", str(file), "--count", "1"]) == 0
    said = capsys.readouterr().out
    assert "assistant\n⟧hello, ünï\n<|im_end|>⟦\n" in said


def test_a_folder_of_splits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match=r"several splits; give one of them, such as .*/train"):
        preprocess_rows(
            [str(tmp_path / "all")],
            tmp_path / "data",
            Settings("chat", str(write_tokenizer(tmp_path / "t"))),
        )


def test_a_tokenizer_without_template_or_end_is_refused(tmp_path: Path) -> None:
    bare = write_tokenizer(tmp_path / "bare", template=None)
    with pytest.raises(
        DataError, match=r"has no chat template; put one into .*chat_template.jinja"
    ):
        made(tmp_path, [{"messages": CHAT}], bare, format="chat")


def test_workers_do_not_change_the_files(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    rows = [
        {"prompt": f"say {number}", "completion": " hello" * (number % 5 + 1)}
        for number in range(600)
    ]
    wanted = made(tmp_path, rows, tokenizer, format="completion")
    preprocess_rows(
        [str(tmp_path / "rows.jsonl")],
        tmp_path / "two",
        Settings("completion", str(tokenizer)),
        workers=2,
    )
    assert documents(tmp_path / "two") == wanted


def test_the_tool_says_what_it_wrote_or_why_not(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "say", "completion": " hello"}, {"prompt": "say"}]
    )
    tool = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
    options = [
        "--format",
        "completion",
        "--input",
        str(rows),
        "--tokenizer",
        str(tokenizer),
        "--workers",
        "1",
    ]
    command = [sys.executable, str(tool), *options, "--output-prefix", str(tmp_path / "data")]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "rows.jsonl:2: no field 'completion'; fields here: prompt" in refused.stderr
    written = subprocess.run([*command, "--bad-rows", "1"], capture_output=True, text=True)
    assert written.returncode == 0, written.stderr
    assert "1 documents" in written.stdout
    assert "learned from" in written.stdout
    assert "left out: 1 bad lines or files" in written.stdout
