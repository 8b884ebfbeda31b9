"""A server over two ranks: it says what one process says, and ends with its ranks."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megalite.comm.mesh import Launch
from megalite.errors import ConfigError
from megalite.infer.beams import Beams
from megalite.infer.cache import CachedSequenceInfo, Row, lay_out
from megalite.infer.generate import Generator
from megalite.infer.sampling import Sampling
from ranks import run_ranks
from tiny_models import GROUPED, MIXTRAL, make_byte_model

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
from megalite.infer.serving import ranks  # noqa: E402
from megalite.infer.serving.run import bind  # noqa: E402
from megalite.infer.serving.settings import Settings  # noqa: E402

PATIENCE_S = 60.0
# More answers than the two slots, of different lengths: they join and leave a running batch. One is
# longer than a step's share of a prompt is in `answers_of`.
ASKED = [
    {"prompt": "Once", "max_tokens": 20, "temperature": 0},
    {"prompt": "There was " * 6, "max_tokens": 9, "temperature": 0},
    {"prompt": "a", "max_tokens": 14, "temperature": 1.5, "top_p": 1.0, "seed": 3},
    {"prompt": "In a hole", "max_tokens": 17, "temperature": 0.9, "top_p": 0.9, "seed": 4},
    {"prompt": "Two ways", "max_tokens": 12, "num_beams": 2},
]


def post(url: str, **body: Any) -> Any:
    return httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)


def until_idle(url: str) -> None:
    ends = time.monotonic() + PATIENCE_S
    while True:
        found = httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text
        if "megalite_slots_busy 0.0" in found:
            return
        assert time.monotonic() < ends, found
        time.sleep(0.02)


def stream(url: str, prompt: str) -> Any:
    """An answer that is far from its end when its first piece is there."""
    asked = {"prompt": prompt, "max_tokens": 4000, "stream": True}
    return httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=PATIENCE_S)


def ask(url: str, settings: Settings, kept: dict[str, Any]) -> None:
    """What clients do, one of which goes away and one of which waits longer than it may; then the
    server is told to end, while it answers."""
    try:
        with stream(url, "x") as answer:
            next(answer.iter_lines())
        until_idle(url)
        with ThreadPoolExecutor(len(ASKED)) as pool:
            done = list(pool.map(lambda body: post(url, **body), ASKED))
        kept["texts"] = [each.json()["choices"][0]["text"] for each in done]
        object.__setattr__(settings, "timeout_s", 0.2)
        kept["late"] = post(url, prompt="x", max_tokens=4000).status_code
        object.__setattr__(settings, "timeout_s", PATIENCE_S)
        until_idle(url)
        with stream(url, "y") as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            kept["last"] = [line for line in lines if line][-1]
    except BaseException as error:
        kept["error"] = repr(error)
        os.kill(os.getpid(), signal.SIGTERM)


def serve_on_rank(
    rank: int, world_size: int, folder: Path, layout: dict[str, int], ratings: Path
) -> Any:
    launch = Launch(rank, world_size, rank)
    generator, version = ranks.open_on_ranks(folder, 2, 5000, launch, layout)
    if rank > 0:
        return ranks.follow(generator.model)
    address, settings = bind("127.0.0.1", 0), Settings("tiny", ratings, timeout_s=PATIENCE_S)
    url = f"http://127.0.0.1:{address.getsockname()[1]}"
    kept: dict[str, Any] = {}
    client = threading.Thread(target=ask, args=(url, settings, kept))
    # It may knock before the server answers: until then the system keeps it waiting.
    address.listen()
    client.start()
    with patch.object(ranks, "BEAT_S", 0.01):
        kept["whole"] = ranks.lead(generator, version, settings, address, 0.2)
    client.join()
    return kept


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (GROUPED, {"tensor": 2}),
        (GROUPED, {"pipeline": 2}),
        (MIXTRAL | {"num_local_experts": 4}, {"tensor": 2, "expert": 2}),
    ],
    ids=["dense", "pipeline", "experts"],
)
def test_ranks_answer_as_one_process(
    tmp_path: Path, model: dict[str, Any], layout: dict[str, int]
) -> None:
    folder = make_byte_model(tmp_path / "model", model, max_position_embeddings=5000)
    alone = Generator.open(folder, num_slots=2)
    wanted = []
    for body in ASKED:
        sampling = Sampling(
            body.get("temperature", 0), top_p=body.get("top_p", 1.0), seed=body.get("seed", 0)
        )
        request = alone.request(body["prompt"], body["max_tokens"], sampling)
        beams = Beams(body["num_beams"], 1.0, False) if "num_beams" in body else None
        request = replace(request, beams=beams)
        wanted += [answer.text for answer in alone.answer([request])]
    told, followed = run_ranks(2, serve_on_rank, folder, layout, tmp_path)
    assert "error" not in told, told["error"]
    assert told["texts"] == wanted
    assert told["late"] == 504
    assert told["last"] == "data: [DONE]"
    assert (told["whole"], followed) == (True, True)


def test_a_message_is_what_was_laid_out() -> None:
    """Also rows apart, without tokens and in the middle of a prompt."""
    for rows in (
        [Row(0, 0, [5, 6, 7], 3), Row(1, 0, [8], 9)],
        [Row(0, 4, [5], 5), Row(2, 40, [6], 41)],
        [Row(1, 4, [5], 5), Row(2, 0, (), 0), Row(3, 9, [6], 10)],
    ):
        tokens, places, last = lay_out(rows, torch.device("cpu"))
        header, numbers = ranks._packed(tokens, places, last)
        assert len(header) == ranks.HEADER
        found_tokens, found, found_last = ranks._unpacked(header, numbers)
        assert torch.equal(found_tokens, tokens)
        assert torch.equal(found_last, last)
        assert as_plain(found) == as_plain(places)


def as_plain(places: CachedSequenceInfo) -> dict[str, Any]:
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name, value in vars(places).items()
    }


@contextlib.contextmanager
def two_processes(folder: Path, *options: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Start them as torchrun does, but that nobody ends one when the other is gone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for rank in range(2):
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "megalite", "serve", str(folder), "--port", "0", *options]
        found.append(
            subprocess.Popen(
                command, env=os.environ | meeting | own, stderr=subprocess.PIPE, text=True,
                cwd=folder.parent,
            )
        )  # fmt: skip
    try:
        yield found
    finally:
        for process in found:
            process.kill()
            process.wait()
            if process.stderr:
                process.stderr.close()


def test_a_rank_that_dies_ends_the_server(tmp_path: Path) -> None:
    """Nobody has asked anything, and nobody is told that it is ready to answer."""
    folder = make_byte_model(tmp_path / "model", GROUPED)
    with two_processes(folder, "--tensor", "2") as (first, second):
        assert first.stderr
        lines = iter(first.stderr.readline, "")
        url = next(found[1] for line in lines if (found := re.search(r"on (http://\S+)", line)))
        assert next(line for line in lines if "startup complete" in line)
        assert httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200
        second.kill()
        assert first.wait(PATIENCE_S) == 1
        assert "the server has ended: a rank is gone" in first.stderr.read()


def outlive(rank: int, world_size: int, folder: Path) -> None:
    layout = {"tensor": world_size}
    generator, _ = ranks.open_on_ranks(folder, 1, 64, Launch(rank, world_size, rank), layout)
    pid = torch.tensor(os.getpid())
    dist.broadcast(pid, 1)
    if rank > 0:
        assert not ranks.follow(generator.model)
        return
    leader = ranks.Leader(generator.model, 0.01)
    row = lay_out([Row(0, 0, [5], 1)], leader.device)
    leader.predict(*row)
    # It follows by now. That it is the end rank 0 alone says, which may have answers under way.
    os.kill(int(pid), signal.SIGTERM)
    assert leader.predict(*row).isfinite().all()
    os._exit(0)


def test_ranks_end_without_the_one_that_answers(tmp_path: Path) -> None:
    folder = make_byte_model(tmp_path / "model", GROUPED)
    with pytest.raises(FileNotFoundError, match=r"0\.pt"):  # of rank 0 alone nothing is left
        run_ranks(2, outlive, folder)


class Failing:
    num_slots, vocab_size, capacity, turning_points, device = 1, 9, 9, range(0), torch.device("cpu")

    def predict(self, *_: Any) -> torch.Tensor:
        raise MemoryError("no room")

    logits = predict


def test_ranks_are_lost_by_a_step_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are somewhere within it, and take no message."""
    sent: list[int] = []
    monkeypatch.setattr(ranks, "_tell", lambda header, numbers=None: sent.append(header[0]))
    leader = ranks.Leader(Failing(), beat_s=PATIENCE_S)
    for _ in range(2):
        with pytest.raises(ranks.RankLost, match="a forward pass failed: no room"):
            leader.predict(*lay_out([Row(0, 0, [5], 1)], leader.device))
    assert not leader.end()
    assert sent == [ranks.Kind.STEP]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--also", "other"], "--also: a server over ranks has one model"),
        (["--challenger", "other"], "--challenger: a server over ranks has one model"),
        ([], "tensor 2 × pipeline 1 needs 2 ranks, not 1; start them with torchrun --nproc-per-node=2"),
    ],
)  # fmt: skip
def test_what_a_server_over_ranks_has_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
) -> None:
    from megalite.cli import main

    folder = make_byte_model(tmp_path / "model", GROUPED)
    assert main(["serve", str(folder), "--port", "0", "--tensor", "2", *options]) == 2
    assert told in capsys.readouterr().err


def test_encoders_are_served_on_one_device(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=40,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.task: masked, which is served on one device"):
        ranks.open_on_ranks(tmp_path, 2, 64, Launch(0, 1, 0), {"tensor": 2})
