"""Ratings, from the page's requests to the rows that finetuning learns from."""

from __future__ import annotations

import errno
import multiprocessing
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import httpx
from local_server import Local, serving

from chats import CHATML, write_tokenizer
from megalite.cli import main
from megalite.data.formats import Settings
from megalite.data.preprocess_rows import preprocess_rows
from megalite.data.tokenizer import load_tokenizer
from megalite.infer.generate import Generator
from megalite.infer.sampling import Sampling
from megalite.infer.serving.ratings import RatingBody, Ratings
from mixtures import config_of
from scripted import Scripted

JSON = {"content-type": "application/json"}
TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
STRICT = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}"
    + CHATML
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "model", STRICT)


@pytest.fixture
def local(folder: Path, tmp_path: Path) -> Iterator[Local]:
    """It says "he" to everything."""
    tokenizer = load_tokenizer(folder)
    model = Scripted(tokenizer.encode("he"))
    generator = Generator(model, tokenizer, sampling=Sampling(temperature=0), folder=folder)
    with serving(generator, tmp_path / "ratings") as found:
        yield found


def post(local: Local, **body: Any) -> httpx.Response:
    return httpx.post(f"{local.url}/v1/ratings", json=body, verify=False)


def rows_in(file: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in file.read_bytes().splitlines()]


def shown(
    prefix: Path, folder: Path, capsys: pytest.CaptureFixture[str], objective: str = "next_token"
) -> str:
    """What a run that starts from the folder's model learns of its data."""
    data = {
        "train": [{"path": str(prefix)}],
        "seq_length": 128,
        "document_mask": True,
        "tokenizer": str(folder),
    }
    config = config_of(**data).model_dump(mode="json")
    config |= {
        "model": config["model"] | {"preset": None, "hf": str(folder)},
        "objective": {"name": objective},
    }
    prefix.with_suffix(".yaml").write_text(yaml.safe_dump(config))
    assert main(["inspect", str(prefix.with_suffix(".yaml")), "--count", "1"]) == 0
    return capsys.readouterr().out


def test_from_the_page_to_what_is_learned(
    local: Local, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talk: list[dict[str, str]] = []
    for text, rating in (
        ("one?", {"rating": "down"}),
        ("two?", {"rating": "down", "correction": "one two"}),
        ("three?", {"rating": "up"}),
    ):
        talk.append({"role": "user", "content": text})
        said = post_chat(local, talk)
        assert post(local, messages=talk, answer=said, **rating).status_code == 201
        talk.append({"role": "assistant", "content": rating.get("correction", said)})
    ratings = tmp_path / "ratings"
    assert [row["rating"] for row in rows_in(ratings / "completion.jsonl")] == ["corrected", "up"]
    assert [row["rejected"] for row in rows_in(ratings / "rejected.jsonl")] == ["he"]

    options = ["--format", "completion", "--tokenizer", str(folder), "--workers", "1"]
    command = [sys.executable, str(TOOL), "--input", str(ratings / "completion.jsonl"), *options]
    made = subprocess.run(
        [*command, "--output-prefix", str(tmp_path / "sft")], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    learned = shown(tmp_path / "sft", folder, capsys)
    assert "assistant\n⟧one two<|im_end|>⟦\n" in learned
    assert "three?<|im_end|>\n<|im_start|>assistant\n⟧he<|im_end|>⟦\n" in learned
    assert learned.count("⟧he<") == 1, (
        "what was rated badly is not learned, also where it was said before"
    )

    settings = Settings("preference", str(folder))
    pairs = preprocess_rows([str(ratings / "preference.jsonl")], tmp_path / "dpo", settings)
    assert pairs.num_documents == 2
    learned = shown(tmp_path / "dpo", folder, capsys, "dpo")
    assert learned.index("⟧one two<|im_end|>⟦") < learned.index("⟧he<|im_end|>⟦"), (
        "the preferred answer comes first"
    )


def post_chat(local: Local, messages: list[dict[str, str]]) -> str:
    chunks = local.client().chat.completions.create(
        model="tiny", messages=messages, max_tokens=1, stream=True
    )  # type: ignore[call-overload]
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_texts_are_rated_too(local: Local, folder: Path, tmp_path: Path) -> None:
    assert post(local, prompt="say", answer=" hello", rating="up").status_code == 201
    assert (
        post(local, prompt="say", answer=" hello", rating="down", correction=" one").status_code
        == 201
    )
    assert (
        post(local, prompt="say", answer=" hello", rating="up", correction=" two").status_code
        == 201
    )
    for format in ("completion", "preference"):
        settings = Settings(format, str(folder))  # type: ignore[arg-type]
        made = preprocess_rows(
            [str(tmp_path / f"ratings/{format}.jsonl")], tmp_path / format, settings
        )
        assert made.num_documents == {"completion": 3, "preference": 4}[format]


HELLO = {"role": "user", "content": "hello"}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": [HELLO], "answer": " ", "rating": "up"}, "says nothing"),
    (
        {"messages": [HELLO], "answer": "x", "rating": "down", "correction": "x"},
        "something else than the answer",
    ),
    (
        {"messages": [{"role": "system", "content": "x"}], "answer": "x", "rating": "up"},
        "the user begins",
    ),
    (
        {"messages": [HELLO, {"role": "assistant"}, HELLO], "answer": "x", "rating": "up"},
        "says nothing",
    ),
    ({"prompt": "", "answer": "x", "rating": "down", "correction": "y"}, "at least 1 item"),
    (
        {"prompt": "x", "messages": [HELLO], "answer": "x", "rating": "up"},
        "either messages or a prompt",
    ),
]


def test_what_finetuning_could_not_read_is_refused(local: Local, tmp_path: Path) -> None:
    for wrong, why in WRONG:
        refused = post(local, **wrong)
        assert refused.status_code == 400
        assert why in refused.json()["error"]["message"]
    half = b'{"prompt": "x", "answer": "\\ud800", "rating": "up"}'
    assert httpx.post(f"{local.url}/v1/ratings", content=half, headers=JSON).status_code == 400
    assert not list((tmp_path / "ratings").iterdir())


def test_a_correction_of_nothing_is_learned_and_no_pair(
    local: Local, folder: Path, tmp_path: Path
) -> None:
    assert (
        post(local, messages=[HELLO], answer="", rating="down", correction="hello").status_code
        == 201
    )
    assert [file.name for file in (tmp_path / "ratings").iterdir()] == ["completion.jsonl"]


def rating(answer: str) -> RatingBody:
    return RatingBody(prompt="say", answer=answer, rating="up")


def in_processes(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Forked: they only write files."""
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=function, args=(number, *arguments), daemon=True)
        for number in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def append(number: int, folder: Path) -> None:
    ratings = Ratings(folder)
    for row in range(20):
        ratings.add(rating(f"{number} {row} " + "x" * 300_000), "tiny")


def test_several_servers_write_whole_lines(tmp_path: Path) -> None:
    in_processes(4, append, tmp_path)
    found = [row["completion"].split(" ")[:2] for row in rows_in(tmp_path / "completion.jsonl")]
    assert sorted(found) == sorted(
        [str(number), str(row)] for number in range(4) for row in range(20)
    )


def test_a_file_system_without_locks_keeps_ratings_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refused)
    for answer in ("one", "two"):
        Ratings(tmp_path).add(rating(answer), "tiny")
    assert [row["completion"] for row in rows_in(tmp_path / "completion.jsonl")] == ["one", "two"]


def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path: Path, folder: Path) -> None:
    ratings, file = Ratings(tmp_path), tmp_path / "completion.jsonl"
    ratings.add(rating(" one"), "tiny")
    with file.open("ab") as cut:
        cut.write(b'{"prompt":"say","compl')
    ratings.add(rating(" two"), "tiny")
    made = preprocess_rows(
        [str(file)], tmp_path / "data", Settings("completion", str(folder)), bad_rows=1
    )
    assert made.num_documents == 2
    assert [message for message in made.report.messages if "completion.jsonl:2" in message]


def fill_up(_: int, folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    ratings = Ratings(folder)
    ratings.add(rating("fits"), "tiny")
    with pytest.raises(OSError, match=r"only \d+ of \d+ bytes fitted on the disk"):
        ratings.add(rating("x" * 2000), "tiny")
    ratings.add(rating("fits"), "tiny")


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path) -> None:
    in_processes(1, fill_up, tmp_path)
    assert [row["completion"] for row in rows_in(tmp_path / "completion.jsonl")] == ["fits", "fits"]
