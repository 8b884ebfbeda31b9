"""A checkpoint goes on only as the model it is: whatever changes what its weights compute, while
shapes agree, is refused by name; whatever else has changed is said."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import yaml
from pydantic import ValidationError

from encoder_decoders import span_config
from encoders import masked_config
from megalite.checkpoint.load import stored_config
from megalite.checkpoint.match import check_match
from megalite.checkpoint.tensors import CheckpointError
from megalite.checkpoint.train_state import read_train_state
from megalite.config import Config, ModelConfig
from megalite.data.mixture import build_mixtures
from megalite.data.tokenizer import load_tokenizer
from megalite.data.tokenizer_training import train_tokenizer
from megalite.errors import ConfigError, DataError
from megalite.models import build_model, from_hf_config, model_config, set_parameters, weight_table
from megalite.models.layers import SequenceInfo, Source
from megalite.registry import families
from small_runs import MODELS, make_config, write_corpus
from tiny_models import CASES, MASKED, SEQ2SEQ

transformers = pytest.importorskip("transformers")

VALUES: dict[str, list[Any]] = {
    "rope_scaling": [{"type": "linear", "factor": 2.0}],
    "layer_types": [["full_attention", "sliding_attention"], ["full_attention"] * 2],
    "nope_layers": [[0], []],
    "sliding_window": [3, None],
    "query_pre_attn_scalar": [7.0],
    "logit_softcap": [2.0, None],
    "attention_softcap": [2.0, None],
    "rotary_pct": [1.0],
    "partial_rotary_factor": [0.5],
    "task": ["classification"],
    "labels": [["a", "b"]],
    "hf": ["elsewhere"],
    "preset": [None],
}
"""Of fields, what else they can be; a number is doubled, a flag turned."""


def others(name: str, value: Any) -> list[Any]:
    if name in VALUES:
        return [other for other in VALUES[name] if other != value]
    if isinstance(value, bool):
        return [not value]
    if name.endswith("dropout"):
        return [0.5]
    return [value * 2 or 8] if isinstance(value, (int, float)) else []


def logits(model: ModelConfig) -> torch.Tensor:
    """Of weights that differ in nothing but their names and shapes."""
    random, built = torch.Generator().manual_seed(1), build_model(model)
    weights = {
        weight.name: torch.randn(weight.shape, generator=random) * 0.3
        for weight in weight_table(model)
    }
    set_parameters(built, {name: nn.Parameter(weight) for name, weight in weights.items()})
    tokens = torch.arange(40)[None]
    source = Source.whole(tokens.flip(1)) if model.task == "seq2seq" else None
    with torch.no_grad():
        return built.eval()(tokens, SequenceInfo.whole(40, tokens.device, source))


def saved(folder: Path, config: Config) -> Path:
    checkpoint = folder / "step-00000003"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "config.yaml").write_text(config.to_yaml())
    return checkpoint


def match(checkpoint: Path, config: Config, **state: Any) -> list[str]:
    path = config.data.tokenizer
    tokenizer = load_tokenizer(path) if path else None
    train = build_mixtures(config, tokenizer)["train"]
    assert train is not None
    data = {"fingerprint": train.fingerprint(), "samples": 12}
    return check_match(
        checkpoint,
        {"step": 3, "data": data} | state,
        config,
        tokenizer,
        train,
        state.get("now", {}),
    )


@pytest.mark.parametrize("family", families.own)
def test_a_field_of_the_model_is_refused_by_name_or_changes_nothing(
    family: str, tmp_path: Path
) -> None:
    """Every field of every family, one at a time, as of a checkpoint whose weights have the same
    shapes."""
    tiny = next(case for case in CASES.values() if case["model_type"] == family)
    model = model_config(from_hf_config(transformers.AutoConfig.for_model(**tiny).to_dict()))
    makes = dict.fromkeys(MASKED, masked_config) | dict.fromkeys(SEQ2SEQ, span_config)
    make = makes.get(family, make_config)
    config = make(tmp_path, model=model.model_dump(mode="json"))
    checkpoint, tried, refused = saved(tmp_path, config), set[str](), set[str]()
    wanted = logits(config.model)
    for name, value in config.model.model_dump(mode="json").items():
        for other in others(name, value):
            try:
                changed = model_config(config.model.model_dump(mode="json") | {name: other})
            except (ConfigError, ValidationError):
                continue
            tried.add(name)
            try:
                told = match(checkpoint, config.model_copy(update={"model": changed}))
            except CheckpointError as error:
                refused.add(name)
                assert f"model.{name}" in str(error), error  # noqa: PT017
                continue
            assert any(f"model.{name} " in line for line in told), name
            if name != "hf":
                assert torch.equal(logits(changed), wanted), (
                    f"model.{name} {value} → {other} changes what is computed"
                )
    assert {"norm_eps", "hf", "init_std"} <= tried
    assert "norm_eps" in refused
    assert "rope_theta" in refused or family in ("gpt2", *MASKED, *SEQ2SEQ)
    assert not refused & {"hf", "init_std", "preset"}


def test_two_spellings_of_one_model_match(tmp_path: Path) -> None:
    spelled = MODELS["llama"] | {"head_dim": 8}
    checkpoint = saved(tmp_path, make_config(tmp_path))
    assert "model.head_dim 0 → 8" in match(checkpoint, make_config(tmp_path, spelled))[0]
    with pytest.raises(CheckpointError, match=r"model\.head_dim = 16, there 0"):
        match(checkpoint, make_config(tmp_path, spelled | {"head_dim": 16}))


LORA = "lora={rank: 4, alpha: 8, targets: [q_proj, v_proj]}"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("lora.alpha=16", "lora.alpha = 16.0, there 8.0"),
        ("lora.rslora=true", "lora.rslora = true, there false"),
        (
            "lora.targets=[q_proj, k_proj]",
            'lora.targets = ["q_proj", "k_proj"], there ["q_proj", "v_proj"]',
        ),
        ("lora=null", "lora = null, there "),
    ],
)
def test_adapters_of_another_meaning_are_refused(tmp_path: Path, changed: str, words: str) -> None:
    base = ("llama", f"model.hf={tmp_path}", LORA)
    checkpoint = saved(tmp_path, make_config(tmp_path, *base))
    assert match(checkpoint, make_config(tmp_path, *base, "lora.targets=[v_proj, q_proj]"))
    assert match(checkpoint, make_config(tmp_path, *base, "lora.dropout=0.5"))
    with pytest.raises(CheckpointError) as error:
        match(checkpoint, make_config(tmp_path, *base, changed))
    assert words in str(error.value)


def test_other_frozen_weights_are_refused_by_file(tmp_path: Path) -> None:
    config = make_config(tmp_path, "llama", f"model.hf={tmp_path}", LORA)
    checkpoint = saved(tmp_path, config)
    match(checkpoint, config, base={"model.safetensors": "aa"}, now={"model.safetensors": "aa"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors has the content bb, then aa"):
        match(checkpoint, config, base={"model.safetensors": "aa"}, now={"model.safetensors": "bb"})


def test_every_other_change_is_said(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, make_config(tmp_path, "llama"))
    changed = (
        "optimizer.betas=[0.9, 0.99]",
        "train.precision=bf16",
        "train.global_batch_size=8",
        "data.fim=null",
    )
    (told,) = match(checkpoint, make_config(tmp_path, "llama", *changed))
    assert told == (
        "changed since step 3: train.global_batch_size 4 → 8; train.precision fp32 → bf16; "
        "optimizer.betas [0.9, 0.95] → [0.9, 0.99]"
    )
    told, jump = match(checkpoint, make_config(tmp_path, "llama", "train.steps=160"))
    assert told == "changed since step 3: train.steps 16 → 160"
    assert jump.startswith(
        "warning: the learning rate jumps: 0.009996 in step 4, where the schedule before had 0.009611"
    )
    assert match(checkpoint, make_config(tmp_path)) == []


def test_a_setting_that_an_old_checkpoint_does_not_know_had_its_default(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, make_config(tmp_path))
    values = stored_config(checkpoint)
    assert values is not None
    del values["checkpoint"]["keep_best"], values["model"]["rope_theta"], values["kernels"]
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(values))
    assert match(checkpoint, make_config(tmp_path)) == []
    assert (
        "kernels.norm auto → torch"
        in match(checkpoint, make_config(tmp_path, "llama", "kernels.norm=torch"))[0]
    )
    with pytest.raises(CheckpointError, match=r"model\.rope_theta = 500000\.0, there 10000\.0"):
        match(checkpoint, make_config(tmp_path, "llama", "model.rope_theta=5e5"))
    (checkpoint / "config.yaml").unlink()
    assert match(checkpoint, make_config(tmp_path)) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected `section: {key: value}` lines, got nothing"),
        (b"[1]", "got list"),
        (b"\xff", "is not UTF-8"),
        (b"model: [1]", r"is no config of a run, but \{'model': \[1\]\}"),
        (b"model: {vocab_size: " + b"9" * 5000 + b"}", "cannot be read"),
        (b"!!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_a_stored_config_that_cannot_be_read_is_no_match(
    tmp_path: Path, content: bytes, words: str
) -> None:
    checkpoint = saved(tmp_path, make_config(tmp_path))
    (checkpoint / "config.yaml").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{checkpoint}/config\.yaml.*{words}"):
        match(checkpoint, make_config(tmp_path))


NUMBERS = {"losses": [1.0, float("nan")], "grad_norms": [2, 3.0], "entered": 2, "in_a_row": 1}
STATE = {
    "step": 3, "data": {"samples": 12, "fingerprint": "x", "skipped": [[1, 2]]}, "updates": 3, "wandb_id": None,
    "refused": 1, "hooks": {"guard": copy.deepcopy(NUMBERS), "of a plugin": {"count": 3}}, "numbers": NUMBERS,
}  # fmt: skip


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("", [1]), ("step", "3"), ("step", -1), ("step", 10**30), ("step", 1.5), ("data", None), ("data", []),
        ("data.samples", True), ("data.samples", 0.5), ("data.fingerprint", 5), ("data.skipped", [[1]]),
        ("data.skipped", [[1, 2, 3]]), ("data.skipped", ["ab"]), ("numbers", []), ("numbers.in_a_row", "x"),
        ("hooks", []), ("hooks.guard", 3), ("hooks.guard.losses", [[1]]), ("hooks.guard.losses", [0.0] * 10_000),
        ("hooks.guard.in_a_row", "x"), ("hooks.of a plugin", [3]), ("refused", "x"), ("updates", None), ("base", [1]),
        ("wandb_id", 5), ("valid_loss", "low"),
    ],
)  # fmt: skip
def test_the_state_of_a_run_is_what_a_run_writes_or_refused_by_name(
    tmp_path: Path, place: str, value: Any
) -> None:
    (tmp_path / "train_state.json").write_text(json.dumps(STATE))
    assert read_train_state(tmp_path)["step"] == 3
    state: Any = copy.deepcopy(STATE)
    *within, key = place.split(".")
    section = state
    for name in within:
        section = section[name]
    section[key] = value
    (tmp_path / "train_state.json").write_text(json.dumps(state if place else value))
    with pytest.raises(CheckpointError, match=rf"train_state\.json.*{place}"):
        read_train_state(tmp_path)


def test_the_state_that_version_0_1_wrote_is_read(tmp_path: Path) -> None:
    data = {"samples": 12, "fingerprint": "x"}
    (tmp_path / "train_state.json").write_text(
        json.dumps({"step": 3, "data": data, "numbers": NUMBERS | {"losses": []}})
    )
    state = read_train_state(tmp_path)
    assert state.pop("wandb_id") is None  # train.py and evaluate.py index it
    assert state == {"step": 3, "data": data, "hooks": {"guard": NUMBERS | {"losses": []}}}


OTHER_DATA = {
    "train.seed=4": "train.seed 3 → 4",
    "data.seq_length=8": "data.seq_length 16 → 8",
    "data.order=sequential": "data.order shuffle → sequential",
    "data.packing=best_fit": "data.packing concat → best_fit",
    "data.phases=[{after_step: 9, weights: {more: 1}}]": (
        "data.phases[0].weights.corpus 1.0 → null"
    ),
    "data.split=[8, 2, 0]": "data.split null → [8.0, 2.0, 0.0]",
    "train.global_batch_size=8": "train.global_batch_size 4 → 8",
    "data.temperature=2": "data.temperature 1.0 → 2.0",
}


@pytest.mark.parametrize("change", OTHER_DATA)
def test_what_makes_other_data_is_named_with_both_values(tmp_path: Path, change: str) -> None:
    sources = [
        f"{{path: {write_corpus(tmp_path / name, 800, n)}, weight: {n + 1}}}"
        for n, name in enumerate("ab")
    ]
    names = ("corpus", "more")
    both = ", ".join(
        source.replace("}", f", name: {name}}}")
        for source, name in zip(sources, names, strict=True)
    )
    base = (
        "llama",
        f"data.train=[{both}]",
        "data.phases=[{after_step: 9, weights: {corpus: 1, more: 1}}]",
    )
    before = make_config(tmp_path, *base)
    train = build_mixtures(before)["train"]
    assert train is not None
    state = {"fingerprint": train.fingerprint(), "samples": 12, "sources": train.contents()}
    more = ("data.valid=[]",) if "split" in change else ()
    with pytest.raises(DataError) as error:
        match(saved(tmp_path, before), make_config(tmp_path, *base, *more, change), data=state)
    assert f"What has changed: {OTHER_DATA[change]}. Put it back" in str(error.value)


def test_other_tokens_under_the_same_name_are_named(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    train = build_mixtures(config)["train"]
    assert train is not None
    state, checkpoint = (
        {"fingerprint": train.fingerprint(), "samples": 12, "sources": train.contents()},
        tmp_path,
    )
    write_corpus(tmp_path / "corpus", seed=1)
    with pytest.raises(
        DataError, match=r"changed: the tokens of \S+corpus, whose content was \w+ and is \w+\. Put"
    ):
        match(saved(tmp_path, config), config, data=state)
    del state["sources"]  # as checkpoints of older versions
    with pytest.raises(DataError, match=r"changed: the token files of data\.train\. Put"):
        match(checkpoint, config, data=state)


def test_another_tokenizer_is_refused_by_what_differs(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("def f(x): return x + 1\n" * 50)
    for name, size in (("one", 260), ("two", 261)):
        train_tokenizer([str(tmp_path / "text.txt")], str(tmp_path / name), size)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (tmp_path / "one").iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    config = make_config(
        tmp_path, "llama", "model.vocab_size=300", f"data.tokenizer={tmp_path / 'one'}"
    )
    checkpoint = saved(tmp_path, config)
    load_tokenizer(tmp_path / "one").save(checkpoint)

    def with_tokenizer(path: Path) -> Config:
        return config.model_copy(
            update={"data": config.data.model_copy(update={"tokenizer": path})}
        )

    assert "data.tokenizer" in match(checkpoint, with_tokenizer(moved))[0]
    with pytest.raises(CheckpointError, match=r"it has 261 token ids, there are 260"):
        match(checkpoint, with_tokenizer(tmp_path / "two"))
    path = moved / "tokenizer.json"
    vocabulary = json.loads(path.read_text())
    swapped = {"a": vocabulary["model"]["vocab"]["b"], "b": vocabulary["model"]["vocab"]["a"]}
    vocabulary["model"]["vocab"] |= swapped
    path.write_text(json.dumps(vocabulary))
    with pytest.raises(CheckpointError, match=r"its token \d+ is 'b', there 'a'"):
        match(checkpoint, with_tokenizer(moved))
