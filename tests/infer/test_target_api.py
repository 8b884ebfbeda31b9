"""`megalite serve` of an encoder-decoder, asked by OpenAI's client."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from local_server import PATIENCE_S, Local, serving

from encoder_decoders import write_words
from megalite.infer import seq2seq
from megalite.infer.beams import Beams
from megalite.infer.sampling import Sampling
from megalite.infer.seq2seq import TargetGenerator
from tiny_models import CASES, randomize

transformers = pytest.importorskip("transformers")

SOURCES = ["w7 w8 w9", "w10 w11", "w3"]


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> TargetGenerator:
    torch.manual_seed(0)
    folder = write_words(tmp_path_factory.mktemp("t5"))
    config = transformers.AutoConfig.for_model(**CASES["t5"] | {"vocab_size": 29})
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    randomize(model)
    model.generation_config.decoder_start_token_id = 0
    model.save_pretrained(folder)
    return TargetGenerator.open(folder)


@pytest.fixture(scope="module")
def local(generator: TargetGenerator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    folder = tmp_path_factory.mktemp("ratings")
    with serving(generator, folder, max_waiting=8, timeout_s=20.0) as local:
        yield local


def ask(local: Local, **body: Any) -> Any:
    return local.client().completions.create(model="tiny", **body)


def test_targets_are_those_of_generate(local: Local, generator: TargetGenerator) -> None:
    ids = [generator.source_ids(text) for text in SOURCES]
    likeliest = Sampling(temperature=0.0)
    targets = generator.generate(ids, 12, likeliest)
    wanted = [generator.tokenizer.decode_plain(target) for target in targets]
    for prompt in (SOURCES, ids):
        answer = ask(local, prompt=prompt, max_tokens=12, temperature=0)
        assert [choice.text for choice in answer.choices] == wanted
    ends = ["length" if len(target) == 12 else "stop" for target in targets]
    assert [choice.finish_reason for choice in answer.choices] == ends
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        sum(map(len, ids)), sum(map(len, targets))
    )  # fmt: skip
    drawn = ask(local, prompt=SOURCES[0], max_tokens=12, n=3, seed=5, temperature=1.0)
    usual = replace(generator.habits.sampling, temperature=1.0, seed=5)
    rows = generator.generate([ids[0]] * 3, 12, usual)
    assert [c.text for c in drawn.choices] == [*map(generator.tokenizer.decode_plain, rows)]
    assert len({c.text for c in drawn.choices}) > 1


def test_several_targets_are_found_by_beams(local: Local, generator: TargetGenerator) -> None:
    ids = [generator.source_ids(text) for text in SOURCES]
    beams = Beams(3, 0.5, early_stopping=True)
    rows = generator.generate(ids, 12, beams=beams, num_answers=2)
    more = {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True}
    found = ask(local, prompt=SOURCES, max_tokens=12, n=2, extra_body=more)
    assert [c.text for c in found.choices] == [*map(generator.tokenizer.decode_plain, rows)]


def test_a_stream_and_stop_strings(local: Local) -> None:
    whole = ask(local, prompt=SOURCES[0], max_tokens=12, temperature=0).choices[0].text
    settings = {"prompt": SOURCES[0], "max_tokens": 12, "temperature": 0}
    pieces = [*ask(local, stream=True, stream_options={"include_usage": True}, **settings)]
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == whole
    assert pieces[-1].usage.total_tokens > 0
    stop = whole.split()[2]
    cut = ask(local, stop=[stop], **settings).choices[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_wrong_requests_are_refused(local: Local) -> None:
    for body, words in (
        ({"prompt": "w7 " * 600}, "at most the model's max_positions"),
        ({"prompt": [[99]]}, "has the token 99, but the model knows those from 0 to"),
        ({"prompt": [[7, -1]]}, "has the token -1, but the model knows those from 0 to"),
        ({"prompt": "w7", "logprobs": 1}, "have no logprobs"),
        ({"prompt": ["w7"] * 9}, "9 answers are asked for at once"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(local, **body)
    with pytest.raises(openai.NotFoundError):
        local.client().embeddings.create(model="tiny", input="w7")


def test_work_that_nobody_waits_for_ends(
    generator: TargetGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token of a target, which never ends, takes 0.3 s, and the server allows 0.5."""
    never, step = threading.Event(), seq2seq.Decoding.step

    def slow(decoding: seq2seq.Decoding, tokens_B: torch.Tensor) -> torch.Tensor:
        never.wait(0.3)
        return step(decoding, tokens_B).index_fill(1, torch.tensor([1]), -100.0)

    monkeypatch.setattr(seq2seq.Decoding, "step", slow)
    with serving(generator, tmp_path, timeout_s=0.5) as local:
        with pytest.raises(openai.InternalServerError, match=r"more than the 0\.5 s"):
            ask(local, prompt=SOURCES[0], max_tokens=500, temperature=1.0)
        local.until("megalite_slots_busy 0.0")
        page = httpx.get(f"{local.url}/v1/about", verify=False, timeout=PATIENCE_S).json()
        assert (page["sources"], page["chat"]) == (True, False)
