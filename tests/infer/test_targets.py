"""Targets of encoder-decoders, held against transformers' `generate` token for token."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from encoder_decoders import rows_config, write_words
from megalite.cli import main
from megalite.commands.generate import _generate_targets
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import ConfigError
from megalite.infer.beams import Beams
from megalite.infer.habits import read_habits
from megalite.infer.rules import Rules
from megalite.infer.sampling import Sampling
from megalite.infer.seq2seq import TargetGenerator
from megalite.train import train
from tiny_models import CASES, OWN_HEAD, randomize

LIKELIEST = Sampling(temperature=0.0)
SOURCES = [torch.randint(2, 29, (length,), generator=torch.Generator().manual_seed(length)).tolist()
           for length in range(3, 23)]  # fmt: skip


@pytest.fixture(scope="module", params=["t5", "t5-gated", "mt5"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, TargetGenerator]:
    """A random model of transformers, of few tokens, so that many targets end; and ours with its
    weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder, case = write_words(tmp_path_factory.mktemp("model")), request.param
    # transformers 5.23 keeps keys and values of as many layers as the encoder has.
    few = {"vocab_size": 29, "num_layers": 3, "num_decoder_layers": 2}
    config = transformers.AutoConfig.for_model(**CASES[case] | few)
    theirs = transformers.AutoModelForSeq2SeqLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    randomize(theirs, own_head=case in OWN_HEAD)
    theirs.generation_config.decoder_start_token_id = 0
    theirs.save_pretrained(folder)
    return theirs, TargetGenerator.open(folder)


def theirs_of(theirs: Any, room: int, **options: Any) -> list[list[int]]:
    width = max(map(len, SOURCES))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in SOURCES])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in SOURCES])
    found = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=room, do_sample=False, **options
    ).tolist()
    return [row[1:][: row[1:].index(1)] if 1 in row else row[1:] for row in found]


@pytest.mark.parametrize(
    ("options", "beams"),
    [
        ({}, None),
        ({"num_beams": 4}, Beams(4)),
        ({"num_beams": 3, "length_penalty": 0.6}, Beams(3, 0.6)),
        ({"num_beams": 2, "length_penalty": 2.0}, Beams(2, 2.0)),
        ({"num_beams": 3, "early_stopping": True}, Beams(3, early_stopping=True)),
        ({"num_beams": 3, "early_stopping": "never"}, Beams(3, early_stopping="never")),
    ],
    ids=["greedy", "4 beams", "short", "long", "early", "never"],
)
def test_targets_are_those_of_transformers(
    options: dict[str, Any], beams: Beams | None, pair: tuple[Any, TargetGenerator]
) -> None:
    theirs, ours = pair
    wanted = theirs_of(theirs, 20, **options)
    assert ours.generate(SOURCES, 20, LIKELIEST, beams) == wanted
    if not options and not getattr(theirs.config, "scale_decoder_outputs", False):
        lengths = {len(target) for target in wanted}
        assert len(lengths) > 1, "some targets end before the others"


def test_several_targets_are_the_best_beams(pair: tuple[Any, TargetGenerator]) -> None:
    """Beside a rule and a penalty, which count for beams as for other answers."""
    theirs, ours = pair
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    wanted = theirs_of(theirs, 12, num_beams=4, num_return_sequences=3, **options)
    restricted = Sampling(repetition_penalty=1.3, rules=Rules(no_repeat_ngram_size=2))
    assert ours.generate(SOURCES, 12, restricted, Beams(4), num_answers=3) == wanted
    assert wanted != ours.generate(SOURCES, 12, LIKELIEST, Beams(4), num_answers=3)
    with pytest.raises(ConfigError, match="3 answers are asked for, but 2 beams"):
        ours.generate(SOURCES, 12, LIKELIEST, Beams(2), num_answers=3)


def test_what_is_drawn_depends_on_the_seed_and_the_row_alone(
    pair: tuple[Any, TargetGenerator],
) -> None:
    ours, drawn = pair[1], Sampling(temperature=1.0, seed=3)
    found = ours.generate(SOURCES, 12, drawn)
    assert ours.generate(SOURCES, 12, drawn) == found
    assert ours.generate(SOURCES[:4], 12, drawn) == found[:4], "rows beside it change nothing"
    assert ours.generate(SOURCES, 12, Sampling(temperature=1.0, seed=40)) != found
    same = ours.generate([SOURCES[0]] * 8, 12, drawn)
    assert len({*map(tuple, same)}) > 4, "each row draws for itself"


def test_first_tokens_are_drawn_by_their_probabilities(pair: tuple[Any, TargetGenerator]) -> None:
    theirs, ours = pair
    count, source = 4000, SOURCES[2]
    found = ours.generate([source] * count, 1, Sampling(temperature=1.0))
    with torch.no_grad():
        logits = theirs(
            input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[0]])
        ).logits[0, 0]
    shares = logits.softmax(-1)
    counts = torch.bincount(torch.tensor([(row or [1])[0] for row in found]), minlength=29)
    # Four standard deviations of each share, and a count for those that are nearly never drawn.
    assert ((counts - count * shares).abs() <= 4 * (count * shares * (1 - shares)).sqrt() + 1).all()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "a source has 0 tokens"),
        ([5] * 513, r"513 tokens; .*max_positions = 512"),
        ([99], "has the token 99"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused(
    source: list[int], words: str, pair: tuple[Any, TargetGenerator]
) -> None:
    with pytest.raises(ConfigError, match=words):
        pair[1].generate([source], 4)


def test_the_command_says_the_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = rows_config(tmp_path, "train.steps=2", "observe.eval_every=0")
    train(config)
    generator = TargetGenerator.open(config.run.folder)
    assert read_habits(
        next((config.run.folder / "checkpoints").glob("step-*")),
        load_tokenizer(tmp_path / "tokenizer"),
    )
    assert generator.habits.sampling.temperature == 0.0, "a source has one answer"
    capsys.readouterr()
    for more, beams in (((), None), (("--beams", "3"), Beams(3))):
        asked = [
            "generate",
            str(config.run.folder),
            "--prompt",
            "w7 w8",
            "--max-tokens",
            "6",
            *more,
        ]
        assert main(asked) == 0
        assert (
            capsys.readouterr().out.rstrip("\n") == generator.answer(["w7 w8"], 6, beams=beams)[0]
        )
    assert main(["generate", str(config.run.folder), "--prompt", "w7", "--chat"]) == 2
    assert "an encoder-decoder has no --chat" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = argparse.Namespace(chat=False, stop=[], tensor=1, pipeline=1)
    with pytest.raises(ConfigError, match="answers on one device"):
        _generate_targets(asked, config.run.folder, None)
