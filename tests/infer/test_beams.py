"""Beam search of decoders, held against transformers' `generate` token for token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from local_server import serving

from megalite.cli import main
from megalite.errors import ConfigError
from megalite.infer.batch import Batch
from megalite.infer.beams import Beams
from megalite.infer.cache import CachedModel
from megalite.infer.generate import Generator, load_model
from megalite.infer.rules import Rules
from megalite.infer.sampling import Sampling
from scripted import Bytes
from tiny_models import CASES

openai = pytest.importorskip("openai")

GREEDY = Sampling(temperature=0)
PROMPTS = ([3, 1, 4, 1, 5], list(range(20, 43)), [9])
NEW = 18
FEW = ("llama", "gpt2", "gemma2", "deepseek_v3", "phi3")
"""Windows and soft caps, latents, and positions that change with the length among them."""


def make_model(case: str, folder: Path) -> Any:
    """Save a random transformers model to the folder, and return it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CASES[case])
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(mean=0.5 * (parameter.dim() == 1), std=0.25)
    theirs.save_pretrained(folder)
    return theirs.eval()


@pytest.fixture(scope="module", params=FEW)
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, frozenset[int]]:
    """A random transformers model, the folder it was saved to, and tokens of its own answers, some
    of which are to end there."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make_model(request.param, folder)
    ends = set()
    for place, prompt in zip((3, 8, 14), PROMPTS, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, max_new_tokens=NEW, num_beams=3, do_sample=False)
        ends.add(out[0, len(prompt) + place].item())
    return theirs, folder, frozenset(ends)


def theirs_of(
    theirs: Any, prompt: Sequence[int], beams: Beams, ends: frozenset[int], **options: Any
) -> list[list[int]]:
    ids = torch.tensor([prompt])
    out = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        num_beams=beams.width,
        num_return_sequences=beams.width,
        length_penalty=beams.length_penalty,
        early_stopping=beams.early_stopping,
        eos_token_id=sorted(ends),
        pad_token_id=0,
        **options,
    )
    rows = out[:, len(prompt) :].tolist()
    # Behind an end there is padding.
    return [row[: next((n for n, t in enumerate(row) if t in ends), len(row))] for row in rows]


def ours_of(
    generator: Generator, beams: Beams, sampling: Sampling = GREEDY
) -> list[list[list[int]]]:
    """The answers of all prompts, which are searched for in company."""
    batch = Batch(generator.model, generator.ends, 7)
    found = []
    for prompt in PROMPTS:
        request = replace(generator.request(prompt, NEW, sampling), beams=beams)
        some = [generator.start(replace(request, place=place)) for place in range(beams.width)]
        some[0].others = some[1:]
        for answer in some:
            batch.add(answer)
        found.append(some)
    greedy = generator.start(generator.request(PROMPTS[0], NEW, GREEDY))
    batch.add(greedy)
    while batch.busy:
        batch.step()
    assert greedy.finish in ("stop", "length")
    assert all(answer.finish in ("stop", "length") for some in found for answer in some)
    return [[answer.tokens for answer in some] for some in found]


@pytest.mark.parametrize(
    "beams",
    [Beams(4), Beams(2, 2.0, True), Beams(3, -1.0, "never"), Beams(3, 1.5, "never")],
    ids=["4", "early", "short", "long"],
)
def test_beams_are_those_of_transformers(
    beams: Beams, models: tuple[Any, Path, frozenset[int]]
) -> None:
    """Two searches at a time with an answer beside them, prompts taken in by parts."""
    theirs, folder, ends = models
    wanted = [theirs_of(theirs, prompt, beams, ends) for prompt in PROMPTS]
    model = CachedModel(load_model(folder), 2 * beams.width + 1)
    assert ours_of(Generator(model, Bytes(), ends), beams) == wanted
    lengths = {len(row) for rows in wanted for row in rows}
    assert len(lengths) > 1 or beams.length_penalty > 0, "some end before the others"


def test_rules_and_penalties_count_for_beams(
    models: tuple[Any, Path, frozenset[int]],
) -> None:
    theirs, folder, ends = models
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    wanted = [theirs_of(theirs, prompt, Beams(3), ends, **options) for prompt in PROMPTS]
    generator = Generator(CachedModel(load_model(folder), 4), Bytes(), ends)
    restricted = Sampling(0.0, repetition_penalty=1.3, rules=Rules(no_repeat_ngram_size=2))
    assert ours_of(generator, Beams(3), restricted) == wanted


class Likely:
    """A model that likes each token a little less than the one before, and never the end."""

    num_slots, capacity, turning_points, device = 3, 50, range(0), torch.device("cpu")
    vocab_size = 260

    def predict(self, tokens_BT: Any, places: Any, last_B: Any) -> torch.Tensor:
        return (-torch.arange(260.0)).expand(len(last_B), -1)

    def copy_slots(self, sources: Any, targets: Any, num_tokens: int) -> None: ...


def test_a_search_that_is_given_up_leaves_its_slots() -> None:
    generator = Generator(Likely(), Bytes())
    request = replace(generator.request([1], 40, GREEDY), beams=Beams(2))
    batch, first, second = Batch(generator.model, frozenset()), *map(generator.start, [request] * 2)
    for answer in (first, second):
        batch.add(answer)
    for _ in range(3):
        batch.step()
    assert (batch.num_running, len(batch.waiting)) == (2, 1), "one of three slots is left"
    batch.drop(first)
    batch.step()
    assert (batch.num_running, len(batch.waiting)) == (2, 0)
    while batch.busy:
        batch.step()
    assert (len(second.tokens), second.finish) == (40, "length")


def test_more_beams_than_sequences_are_refused() -> None:
    generator = Generator(Likely(), Bytes())
    request = replace(generator.request([1], 4, GREEDY), beams=Beams(4))
    with pytest.raises(ConfigError, match="4 beams are asked for, but this model computes 3"):
        generator.answer([request])


def test_the_server_finds_what_generate_does(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    prompts, sampling = ([1, 2, 3], [7] * 9), Sampling(0.0)
    model = CachedModel(load_model(tmp_path), 4)
    generator = Generator(model, Bytes(), sampling=sampling)
    wanted = [
        answer.text
        for prompt in prompts
        for answer in generator.answer(
            [
                replace(generator.request(prompt, 8), beams=Beams(3, 0.5, "never"), place=place)
                for place in range(2)
            ]
        )
    ]
    assert len({*wanted}) == 4
    more = {"num_beams": 3, "length_penalty": 0.5, "early_stopping": "never"}
    asked = {"model": "tiny", "prompt": prompts, "max_tokens": 8, "n": 2}
    with serving(generator, tmp_path) as local:
        create = local.client().completions.create
        found = create(**asked, extra_body=more)
        assert [choice.text for choice in found.choices] == wanted
        said = [""] * 4
        for piece in create(**asked, extra_body=more, stream=True):
            for choice in piece.choices:
                said[choice.index] += choice.text
        assert said == wanted
        for body, words in (
            ({"num_beams": 5}, "5 beams are asked for, but this model computes 4"),
            ({"num_beams": 2, "n": 3}, "n must be at most num_beams"),
            ({"num_beams": 2, "temperature": 0.5}, "num_beams draws no tokens"),
            ({"num_beams": 2, "logprobs": 1}, "has no min_p and no logprobs"),
            ({"num_beams": 2, "early_stopping": "soon"}, "must be true, false or the text never"),
            ({"length_penalty": 2.0}, "need num_beams"),
        ):
            with pytest.raises(openai.BadRequestError, match=words):
                create(**asked | {"n": 1}, extra_body=body)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--beams", "3", "--temperature", "1"), "--temperature is for tokens that are drawn"),
        (("--early-stopping", "never"), "--early-stopping is for beam search: give --beams"),
        (("--beams", "2", "--answers", "3"), "3 answers are asked for, but 2 beams"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["generate", str(tmp_path), "--prompt", "a", *options]) == 2
    assert words in capsys.readouterr().err
