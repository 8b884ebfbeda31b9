"""Generation: the tokens transformers would choose, alone and in company, sampling that follows the
distribution."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chats import write_tokenizer
from megalite.cli import main
from megalite.comm.mesh import Launch
from megalite.errors import ConfigError
from megalite.infer import cache, cells
from megalite.infer.batch import Batch
from megalite.infer.cache import CachedModel
from megalite.infer.generate import Generator, find_model, load_model
from megalite.infer.habits import LIKELY, read_habits
from megalite.infer.ranks import load_on_ranks
from megalite.infer.sampling import LIKELIEST, Sampling, choose, warp
from megalite.models.core_attention import CoreAttention
from megalite.train import train
from ranks import run_ranks
from scripted import Bytes
from small_runs import make_config
from tiny_models import CASES, DYNAMIC_ROPE, MASKED, SEQ2SEQ

GREEDY = Sampling(temperature=0)
PROMPTS = ([3, 1, 4, 1, 5], list(range(20, 43)), [9], list(range(60, 70)))
NEW = 18
"""Tokens of each answer: sequences of 19 to 41 go past every window, and past both lengths that
Phi-3's positions change at but the longest."""


@pytest.fixture(
    scope="module",
    params=[case for case in CASES if CASES[case]["model_type"] not in (*MASKED, *SEQ2SEQ)],
)
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    """A random transformers model, and the folder it was saved to."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CASES[request.param])
    theirs = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(mean=0.5 * (parameter.dim() == 1), std=0.25)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, folder


def generator(folder: Path, num_slots: int = 3) -> Any:
    return Generator(CachedModel(load_model(folder), num_slots), Bytes())


def answers(
    gen: Generator,
    sampling: Sequence[Sampling],
    prompts: Sequence[list[int]] = PROMPTS,
    prompt_tokens: int = 512,
    new: int = NEW,
) -> list[list[int]]:
    batch = Batch(gen.model, gen.ends, prompt_tokens)
    found = [
        gen.start(gen.request(prompt, new, one))
        for prompt, one in zip(prompts, sampling, strict=True)
    ]
    for answer in found:
        batch.add(answer)
    while batch.busy:
        batch.step()
    return [answer.tokens for answer in found]


def test_greedy_equals_transformers_token_for_token(models: tuple[Any, Path]) -> None:
    """Prompts of several lengths, more of them than slots, so that answers join others that are
    under way; and prompts that are taken in by parts."""
    theirs, folder = models
    # A cache of theirs keeps the keys of dynamic NTK as they were turned in a shorter sequence.
    cached = getattr(theirs.config, "rope_parameters", None) != DYNAMIC_ROPE
    wanted = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, use_cache=cached
        )
        wanted.append(out[0, len(prompt) :].tolist())
    greedy = [GREEDY] * len(PROMPTS)
    assert answers(generator(folder), greedy) == wanted
    assert answers(generator(folder), greedy, prompt_tokens=7) == wanted


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model of megalite's own, its vocabulary of 97 padded over two tensor
    ranks."""
    config = make_config(
        tmp_path_factory.mktemp("small"), "gpt2", "train.steps=2", "observe.eval_every=0"
    )
    train(config)
    return find_model(config.run.folder)


SAMPLINGS = [
    Sampling(1.5, seed=5),
    Sampling(0.7, seed=6),
    GREEDY,
    Sampling(top_k=9, top_p=0.9, min_p=0.01, seed=7),
]


def test_tokens_depend_on_the_own_seed_alone(small: Path) -> None:
    gen = generator(small, num_slots=2)
    together = answers(gen, SAMPLINGS)
    alone = [
        answers(gen, [one], [prompt])[0] for prompt, one in zip(PROMPTS, SAMPLINGS, strict=True)
    ]
    assert together == alone
    assert together == answers(gen, SAMPLINGS, prompt_tokens=5), "however its prompt was cut"
    assert answers(gen, [Sampling(1.5, seed=8)], PROMPTS[:1]) != alone[:1]
    state = torch.get_rng_state()
    answers(gen, SAMPLINGS[:1], PROMPTS[:1])
    assert torch.equal(state, torch.get_rng_state()), "nobody else's random numbers are touched"


def test_answers_end_at_end_tokens_and_limits(small: Path) -> None:
    gen = generator(small)
    (free,) = answers(gen, [GREEDY], [[1, 2]], new=1000)
    assert len(free) == gen.model.capacity - 2, "prompt and answer fill the longest sequence"
    end = free[5]
    gen.ends = frozenset({end, 1000})
    stopped, limited = gen.answer(
        [gen.request([1, 2], 50, GREEDY), gen.request([1, 2], free.index(end), GREEDY)]
    )
    assert (stopped.tokens, stopped.finish) == (free[: free.index(end)], "stop")
    assert (limited.tokens, limited.finish) == (stopped.tokens, "length")


@pytest.mark.parametrize("prompt", [[], [1] * 64])
def test_a_prompt_without_room_for_an_answer_is_refused(small: Path, prompt: list[int]) -> None:
    gen = generator(small)
    with pytest.raises(
        ConfigError, match=rf"the prompt has {len(prompt)} tokens; .* fewer than the 64"
    ):
        gen.answer([gen.request(prompt, 5)])


def test_an_answer_given_up_makes_room(small: Path) -> None:
    gen = generator(small, num_slots=1)
    batch = Batch(gen.model, gen.ends)
    first, second, third = (gen.start(gen.request(prompt, 20, GREEDY)) for prompt in PROMPTS[:3])
    for answer in (first, second, third):
        batch.add(answer)
    batch.step()
    batch.drop(first)
    batch.drop(second)
    while batch.busy:
        batch.step()
    assert len(first.tokens) <= 2
    assert not second.tokens
    assert [third.tokens] == answers(gen, [GREEDY], [PROMPTS[2]], new=20)


def test_the_cache_grows_with_its_sequences(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gen = generator(small)
    caches = [
        module.strategy for module in gen.model.model.modules() if isinstance(module, CoreAttention)
    ]
    wanted = answers(gen, SAMPLINGS)
    assert [x.shape[:3] for it in caches for x in (it.keys.numbers, it.values.numbers)] == [
        (3, 4, cells.FEWEST_CELLS)
    ] * 4
    monkeypatch.setattr(cells, "FEWEST_CELLS", 1)
    monkeypatch.setattr(cache, "READ_AT_ONCE", 3)
    assert answers(generator(small), SAMPLINGS, prompt_tokens=5) == wanted


def test_texts_are_scored_as_the_whole_model_sees_them(models: tuple[Any, Path]) -> None:
    theirs, folder = models
    rows = [[5, 6], *PROMPTS[:2], list(range(50))]
    for row, score in zip(rows, generator(folder).score(rows), strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([row[:-1]])).logits[0]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        # fp32 logits up to 100, summed in another order.
        assert torch.allclose(score.logprobs, wanted, atol=1e-4, rtol=1e-5)
        assert torch.equal(score.likeliest, logits.argmax(-1) == torch.tensor(row[1:]))


def continue_on_ranks(
    rank: int, world_size: int, folder: Path, tensor: int, pipeline: int, expert: int = 1
) -> list[list[int]]:
    model = load_on_ranks(
        folder, Launch.from_environment(), tensor, pipeline, num_slots=2, expert=expert
    )
    return answers(Generator(model, Bytes()), SAMPLINGS, prompt_tokens=9)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_say_what_one_process_says(small: Path, tensor: int, pipeline: int) -> None:
    """All of them, and token for token."""
    wanted = answers(generator(small), SAMPLINGS)
    found = run_ranks(tensor * pipeline, continue_on_ranks, small, tensor, pipeline)
    assert found == [wanted] * (tensor * pipeline)


def test_ranks_that_hold_different_experts_say_what_one_process_says(tmp_path: Path) -> None:
    """Two halves of the experts, each on two ranks that share its matrices."""
    config = make_config(tmp_path, "experts", "train.steps=2", "observe.eval_every=0")
    train(config)
    folder = find_model(config.run.folder)
    wanted = answers(generator(folder), SAMPLINGS)
    assert run_ranks(4, continue_on_ranks, folder, 4, 1, 2) == [wanted] * 4
    with pytest.raises(ConfigError, match="--expert 3 must divide --tensor 4"):
        load_on_ranks(folder, Launch(0, 4, 0), 4, 1, num_slots=1, expert=3)


def test_too_few_ranks_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="needs 4 ranks, not 1; start them with torchrun --nproc-per-node=4"
    ):
        load_on_ranks(tmp_path, Launch(0, 1, 0), 2, 2, num_slots=1)


PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
DRAWS = 4000


def shares(sampling: Sampling, logits_V: Tensor) -> Tensor:
    """Of a token's many places."""
    ids = [[0] * place for place in range(1, 201)]
    batches = [
        choose(logits_V.expand(len(ids), -1), [replace(sampling, seed=seed)] * len(ids), ids)
        for seed in range(DRAWS // len(ids))
    ]
    return torch.bincount(torch.cat(batches), minlength=len(logits_V)) / DRAWS


# Which of the five tokens may be drawn, in proportion to these weights.
@pytest.mark.parametrize(
    ("sampling", "weights"),
    [
        (Sampling(), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (Sampling(temperature=0.5), [0.05**2, 0.4**2, 0.1**2, 0.25**2, 0.2**2]),
        (Sampling(temperature=2.0), [0.05**0.5, 0.4**0.5, 0.1**0.5, 0.25**0.5, 0.2**0.5]),
        (Sampling(temperature=0), [0, 1, 0, 0, 0]),
        (Sampling(top_k=1), [0, 1, 0, 0, 0]),
        (Sampling(top_k=3), [0, 0.4, 0, 0.25, 0.2]),
        (Sampling(top_k=9), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (Sampling(top_p=0.3), [0, 1, 0, 0, 0]),  # the likeliest token is always in
        (Sampling(top_p=0.6), [0, 0.4, 0, 0.25, 0]),  # 0.4 + 0.25 reach it
        (Sampling(top_p=0.7), [0, 0.4, 0, 0.25, 0.2]),
        # Top-p of what top-k left: 0.85 of 0.95 is 0.89.
        (
            Sampling(top_k=4, top_p=0.87),
            [0, 0.4, 0, 0.25, 0.2],
        ),
        # Tempered: 0.59, then 0.23.
        (
            Sampling(temperature=0.5, top_p=0.6),
            [0, 0.4**2, 0, 0.25**2, 0],
        ),
        (Sampling(min_p=0.45), [0, 0.4, 0, 0.25, 0.2]),  # at least 0.18
        # Tempered: 0.55, then 0.22, 0.14.
        (
            Sampling(temperature=0.5, min_p=0.3),
            [0, 0.4**2, 0, 0.25**2, 0],
        ),
        (Sampling(min_p=1.0), [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_in_proportion(sampling: Sampling, weights: list[float]) -> None:
    wanted = torch.tensor(weights) / sum(weights)
    found = shares(sampling, PROBABILITIES.log())
    assert (found[wanted == 0] == 0).all(), "never a token that was cut off"
    # Four standard deviations of a share of 4,000 draws; the draws are seeded.
    bound = 4 * (wanted * (1 - wanted) / DRAWS).sqrt()
    assert ((found - wanted).abs() <= bound + 1e-12).all(), found


def test_rows_of_a_batch_do_not_touch_each_other() -> None:
    """Flat enough that the first tokens in order do not make up top-p."""
    logits = torch.randn(4, 8 * LIKELIEST, generator=torch.Generator().manual_seed(0))
    samplings = [
        Sampling(top_p=0.9, seed=1),
        Sampling(top_k=3, seed=2),
        Sampling(1.3, min_p=0.2, seed=3),
        GREEDY,
    ]
    ids = [[1] * length for length in (5, 9, 2, 7)]
    together = choose(logits, samplings, ids).tolist()
    assert together == [
        choose(logits[i : i + 1], samplings[i : i + 1], ids[i : i + 1]).item() for i in range(4)
    ]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(top_p=0.9), Sampling(top_k=300), Sampling(0.7, top_k=99, top_p=0.8, min_p=0.05)],
)
def test_the_same_tokens_may_be_drawn_as_in_transformers(sampling: Sampling) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(1, 6 * LIKELIEST, generator=torch.Generator().manual_seed(0))
    theirs = processors.LogitsProcessorList(
        [processors.TemperatureLogitsWarper(float(sampling.temperature))]
    )
    if sampling.top_k:
        theirs.append(processors.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        theirs.append(processors.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        theirs.append(processors.MinPLogitsWarper(sampling.min_p))
    allowed = theirs(None, logits).isfinite()[0]
    assert torch.equal(warp(logits, [sampling]).isfinite()[0], allowed)
    assert 1 < allowed.sum() < logits.shape[1]


def test_repetition_is_penalised_as_in_transformers() -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.tensor([[2.0, 1.9, -0.5, 1.0], [2.0, 1.9, -0.5, 1.0]])
    ids = [[0, 2, 2], [3]]
    penalty = Sampling(temperature=0, repetition_penalty=1.2)
    wanted = [
        processors.RepetitionPenaltyLogitsProcessor(1.2)(torch.tensor([i]), x[None]).argmax()
        for i, x in zip(ids, logits, strict=True)
    ]
    assert choose(logits, [penalty, penalty], ids).tolist() == wanted == [1, 0]
    assert logits[0, 0] == 2.0, "the caller's logits are left alone"


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
        {"min_p": -0.2}, {"min_p": 1.5}, {"repetition_penalty": 0.0}, {"seed": 2**63},
    ],
)  # fmt: skip
def test_impossible_sampling_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(**values)
    assert str(next(iter(values.values()))) in str(caught.value)


def test_a_folder_s_habits_are_honoured(tmp_path: Path) -> None:
    def habits(**files: dict[str, Any]) -> tuple[frozenset[int], Sampling]:
        for name in ("config", "generation_config"):
            (tmp_path / f"{name}.json").unlink(missing_ok=True)
            if name in files:
                (tmp_path / f"{name}.json").write_text(json.dumps(files[name]))
        found = read_habits(tmp_path, Bytes())
        return found.ends, found.sampling

    assert habits(config={"eos_token_id": 7}) == ({7, 256}, LIKELY)
    told = {
        "eos_token_id": [1, 2],
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.9,
        "do_sample": True,
        "min_p": None,
    }
    assert habits(config={"eos_token_id": 7}, generation_config=told) == (
        {1, 2, 256},
        Sampling(0.6, 20, 0.9),
    )
    assert habits(config={}, generation_config={"do_sample": False})[1].temperature == 0
    with pytest.raises(ConfigError, match=r"generation_config.json: .*top-p 2"):
        habits(config={}, generation_config={"top_p": 2})
    with pytest.raises(ConfigError, match=r"generation_config.json is not a JSON object"):
        habits(config={}, generation_config=[1])  # type: ignore[arg-type]


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path} is neither a run with a checkpoint nor"):
        find_model(tmp_path)
    (tmp_path / "checkpoints" / "step-00000007").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match="no whole checkpoint: step-00000007 is unfinished or damaged"
    ):
        find_model(tmp_path)


def test_what_says_no_text_is_refused_before_its_weights_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder has none."""
    llama = pytest.importorskip("transformers").AutoConfig.for_model(**CASES["llama"]).to_dict()

    def told(verb: str, *options: str, architecture: str = "LlamaForCausalLM") -> str:
        labels = {"id2label": {"0": "ham", "1": "spam"}} if "CausalLM" not in architecture else {}
        (tmp_path / "config.json").write_text(
            json.dumps(llama | labels | {"architectures": [architecture]})
        )
        assert main([verb, str(tmp_path), *options]) == 2
        return capsys.readouterr().err

    verbs: list[tuple[str, ...]] = [("generate", "--prompt", "x"), ("serve", "--port", "0")]
    kinds = ("classification", "SequenceClassification"), ("labels", "TokenClassification")
    for task, kind in kinds:  # which `serve` answers for
        said = told(*verbs[0], architecture=f"LlamaFor{kind}")
        holds = f"{tmp_path} holds a model of model.task: {task}, which tells classes (ham, spam)"
        assert holds in said
        assert "`megalite classify` asks it" in said
    for verb in verbs:
        assert f"{tmp_path} has no tokenizer" in told(*verb)
    write_tokenizer(tmp_path, template=None)
    assert "has no chat template; put one into" in told("generate", "--chat", "--prompt", "x")
    assert "model" in told("generate", "--prompt", "x"), "its weights come last"


def test_an_address_that_is_taken_is_told_before_the_model_is_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tmp_path), "--port", str(port)]) == 2
    assert (
        f"--host 127.0.0.1 --port {port} cannot be listened on: Address already in use"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("wrong", [{"num_slots": 0}, {"max_length": 1}, {"max_length": -5}])
def test_no_room_for_an_answer_is_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="give at least one, of two tokens or more"):
        Generator.open(tmp_path, **wrong)


PLAIN_PRODUCTS = """
import sys, torch
from pathlib import Path
from megalite.infer.cache import CachedModel
from megalite.infer.generate import Generator, load_model
from megalite.infer.packed import PackedLinear
from megalite.infer.sampling import Sampling
from scripted import Bytes

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    model = CachedModel(load_model(Path(sys.argv[1]), dtype), 1)
    generator = Generator(model, Bytes())
    (answer,) = generator.answer([generator.request([3, 1, 4], 5, Sampling(temperature=0))])
    print(len(answer.tokens), any(isinstance(module, PackedLinear) for module in model.model.modules()))
"""


def test_a_cpu_without_instructions_for_a_precision_multiplies_plainly(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**CASES["llama"])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    old = {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", PLAIN_PRODUCTS, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | old, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["5 True", "5 False", "5 False"], done.stderr[-2000:]
