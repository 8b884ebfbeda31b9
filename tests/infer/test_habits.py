"""generation_config.json is a closed world: each key is followed as transformers does, changes
nothing, or is named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from chats import write_tokenizer
from megalite.cli import main
from megalite.errors import ConfigError
from megalite.infer.cache import CachedModel
from megalite.infer.generate import Generator, load_model
from megalite.infer.habits import FOLLOWED, NEUTRAL, USUAL, Habits, read_habits
from megalite.infer.rules import Rules
from megalite.infer.sampling import Sampling, choose
from megalite.utils.outside import shown
from scripted import Bytes
from tiny_models import CASES

transformers = pytest.importorskip("transformers")


def habits(folder: Path, **values: Any) -> Habits:
    (folder / "config.json").write_text("{}")
    (folder / "generation_config.json").write_text(json.dumps(values))
    return read_habits(folder, Bytes())


def test_every_key_of_transformers_has_its_place() -> None:
    tables = (set(FOLLOWED), set(NEUTRAL), set(USUAL))
    assert sum(map(len, tables)) == len(set.union(*tables)), "and no key has two"
    known = set(vars(transformers.GenerationConfig())) | {"_commit_hash", "_from_model_config"}
    assert known - set.union(*tables) - {"_original_object_hash"} == set()


@pytest.mark.parametrize("name", [*USUAL, "presence_penalty"])
def test_what_is_not_followed_is_named(tmp_path: Path, name: str) -> None:
    assert habits(tmp_path, **{name: None}).warning == ""
    for usual in USUAL.get(name, ()):
        assert habits(tmp_path, **{name: usual}).warning == ""
    found = habits(tmp_path, **{name: 7, "typical_p": 0.5, **dict.fromkeys(NEUTRAL, 7)})
    assert found.warning.startswith(f"warning: {tmp_path / 'generation_config.json'}: ")
    assert "\n" not in found.warning
    for said in (f"{name} = ", "typical_p = 0.5"):
        assert said in found.warning
    assert not any(f" {neutral} = " in found.warning for neutral in NEUTRAL)


WRONG: list[tuple[str, Any]] = [
    ("no_repeat_ngram_size", -1), ("no_repeat_ngram_size", "3"), ("min_length", True), ("max_new_tokens", 0),
    ("max_length", 2.5), ("bad_words_ids", [[]]), ("bad_words_ids", [3]), ("suppress_tokens", 5),
    ("begin_suppress_tokens", "ab"), ("stop_strings", [1]), ("eos_token_id", ["x"]), ("eos_token_id", {"a": 1}),
    ("top_k", 50.5), ("temperature", "0.7"), ("top_p", True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_is_named(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json: ") as caught:
        habits(tmp_path, **{name: value})
    assert f"{name} = {shown(value)}: " in str(caught.value)


def test_lengths_and_texts_that_end(tmp_path: Path) -> None:
    assert habits(tmp_path).most_tokens(10, usual=128) == 128
    assert habits(tmp_path, max_length=100).most_tokens(10, usual=128) == 90
    assert habits(tmp_path, max_length=100).most_tokens(200, usual=128) == 1
    assert habits(tmp_path, max_length=100, max_new_tokens=300).most_tokens(10, usual=128) == 300
    assert habits(tmp_path, stop_strings="end").stop == ("end",)
    assert habits(tmp_path, stop_strings=["end", "stop"]).stop == ("end", "stop")


def processors(values: dict[str, Any], num_prompt: int, ends: list[int]) -> Any:
    of = transformers.generation.logits_process
    found, end = of.LogitsProcessorList(), torch.tensor(ends)
    made = {
        "no_repeat_ngram_size": of.NoRepeatNGramLogitsProcessor,
        "bad_words_ids": lambda words: of.NoBadWordsLogitsProcessor(words, end),
        "suppress_tokens": of.SuppressTokensLogitsProcessor,
        "begin_suppress_tokens": lambda tokens: of.SuppressTokensAtBeginLogitsProcessor(
            tokens, num_prompt
        ),
        "min_new_tokens": lambda count: of.MinNewTokensLengthLogitsProcessor(
            num_prompt, count, end
        ),
        "min_length": lambda count: of.MinLengthLogitsProcessor(count, end),
    }
    for name, value in values.items():
        found.append(made[name](value))
    return found


RULES: list[dict[str, Any]] = [
    {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 3}, {"min_new_tokens": 3},
    {"min_length": 9}, {"suppress_tokens": [2, 5]}, {"begin_suppress_tokens": [1, 6]},
    {"bad_words_ids": [[3], [1, 2], [0, 1, 2], [7]]},
    {"no_repeat_ngram_size": 2, "suppress_tokens": [4], "min_new_tokens": 2, "bad_words_ids": [[2, 2]]},
]  # fmt: skip


@pytest.mark.parametrize("values", RULES)
def test_rules_forbid_what_transformers_forbids(values: dict[str, Any]) -> None:
    rng, vocabulary, ends = random.Random(0), 12, [7, 8]
    rules = Rules(**{k: _tuples(v) for k, v in values.items()})
    for _ in range(60):
        num_prompt, num_new = rng.randint(4, 6), rng.randint(0, 5)
        ids = [rng.randrange(6) for _ in range(num_prompt + num_new)]
        logits = processors(values, num_prompt, ends)(
            torch.tensor([ids]), torch.zeros(1, vocabulary)
        )
        wanted = logits[0].isinf().nonzero()[:, 0].tolist()
        assert sorted(rules.forbidden(ids, num_new, frozenset(ends))) == wanted


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def test_something_comes_where_all_is_forbidden() -> None:
    """And repetition's penalty leaves what is forbidden forbidden."""
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    for forbidden, wanted in (((0, 1), 2), ((0, 1, 2), 0), ((0, 9), 1)):
        for temperature in (0.0, 1e-6):
            one = Sampling(
                temperature, repetition_penalty=1.1, rules=Rules(suppress_tokens=forbidden)
            )
            assert choose(logits, [one], [[2]], [0], [frozenset()]).tolist() == [wanted]
    assert logits[0, 0] == 3.0, "the caller's logits are left alone"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        **CASES["llama"] | {"vocab_size": 400, "initializer_range": 0.3}
    )
    folder = write_tokenizer(tmp_path_factory.mktemp("model"))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_answers_are_those_of_transformers(folder: Path) -> None:
    """Greedy, with all rules at a time, token for token."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = [5, 6, 7, 5, 6]
    plain = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)[
        0, len(prompt) :
    ].tolist()
    settings: dict[str, Any] = {
        "do_sample": False, "max_new_tokens": 20, "no_repeat_ngram_size": 2, "suppress_tokens": plain[3:5],
        "begin_suppress_tokens": plain[:1], "bad_words_ids": [plain[1:3], [11]], "min_new_tokens": 4,
        "eos_token_id": [0, plain[6]],
    }  # fmt: skip
    wanted = theirs.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
    assert wanted != plain
    (folder / "generation_config.json").write_text(json.dumps(settings))
    generator = Generator.open(folder)
    request = generator.request(prompt, generator.habits.most_tokens(len(prompt), 128))
    (answer,) = generator.answer([request])
    assert answer.tokens == [token for token in wanted if token not in generator.ends]


def test_generate_says_what_it_does_not_follow(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "generation_config.json").write_text(
        json.dumps({"num_beams": 4, "max_new_tokens": 3, "do_sample": False})
    )
    assert main(["generate", str(folder), "--prompt", "hello"]) == 0
    short, warned = capsys.readouterr()
    assert (
        warned
        == f"warning: {folder / 'generation_config.json'}: what megalite does not follow: num_beams = 4\n"
    )
    generator = Generator(CachedModel(load_model(folder), 1), Generator.open(folder).tokenizer)
    answer = generator.answer([generator.request("hello", 3, Sampling(temperature=0))])[0]
    assert short == f"hello{answer.text}\n"
