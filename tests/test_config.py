"""Every mistake is explained in words a user can act on: the key, the value, what is allowed, the
nearest spelling."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from megalite.config.aliases import KEYS
from megalite.config.catalog import catalog
from megalite.config_file import load_config, parse_config, short_yaml
from megalite.errors import ConfigError
from megalite.models import model_config, to_hf_config

LLAMA: dict[str, Any] = {
    "family": "llama", "vocab_size": 100, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2,
    "num_attention_heads": 4, "num_kv_heads": 2, "max_positions": 64,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "family": "gpt2", "vocab_size": 100, "hidden_size": 16, "num_layers": 2, "num_attention_heads": 4,
    "max_positions": 64,
}  # fmt: skip
BASE: dict[str, Any] = {
    "run": {"name": "test"},
    "model": LLAMA,
    "data": {"train": [{"path": "data/a"}, {"path": "data/b", "weight": 2}], "seq_length": 32},
    "train": {"steps": 100, "global_batch_size": 8},
    "optimizer": {"lr": 0.001},
}


def edited(edit: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    values = copy.deepcopy(BASE)
    edit(values)
    return values


def mistake(values: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(values, overrides, origin="my.yaml")
    return str(caught.value)


def test_yaml_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(BASE))
    config = load_config(
        path,
        [
            "train.steps=7",
            "optimizer.schedule.name=linear",
            "data.train=[{path: x}]",
            "observe.wandb.tags=[a, b]",
        ],
    )
    assert config.train.steps == 7
    assert config.optimizer.schedule.name == "linear"
    assert [str(source.path) for source in config.data.train] == ["x"]
    assert config.observe.wandb.tags == ("a", "b")
    assert config.train.global_batch_size == 8, "an override leaves its neighbours alone"
    assert config.run.folder == Path("runs/test")
    assert parse_config(BASE, ["train.steps=1", "train.steps=2"]).train.steps == 2, (
        "the last one wins"
    )


# YAML 1.1 reads a number without a dot as a string: 3e-4 is the way everybody writes a learning
# rate.
@pytest.mark.parametrize(
    ("text", "lr"), [("3e-4", 3e-4), ("3.0e-4", 3e-4), ("1E-3", 1e-3), (".5", 0.5), ("1", 1.0)]
)
def test_numbers_in_every_notation(text: str, lr: float) -> None:
    assert parse_config(BASE, [f"optimizer.lr={text}"]).optimizer.lr == lr
    assert parse_config(BASE | {"optimizer": yaml.safe_load(f"lr: {text}")}).optimizer.lr == lr


# One line a mistake: the override, then what the message must say.
@pytest.mark.parametrize(
    ("override", "words"),
    [
        # unknown keys, at every depth
        ("trian.steps=3", ["command line: unknown key trian", "did you mean 'train'"]),
        ("train.stpes=3", ["train.stpes", "3", "did you mean 'steps'"]),
        (
            "optimizer.schedule.warm_up_steps=3",
            ["optimizer.schedule.warm_up_steps", "did you mean 'warmup_steps'"],
        ),
        ("observe.wandb.projct=x", ["observe.wandb.projct", "'x'", "did you mean 'project'"]),
        (
            "train.zzz=1",
            [
                "train.zzz",
                "micro_batch_size, patience, precision, recompute, recompute_layers, seed",
            ],
        ),
        (
            "model.hiden_size=3",
            ["model", "unknown key", "hiden_size", "3", "did you mean 'hidden_size'"],
        ),
        (
            "model.rope_scaling={factor: 2, low_frq_factor: 1}",
            ["rope_scaling.low_frq_factor", "'low_freq_factor'"],
        ),
        # Another family's key.
        (
            "model.hidden_dropout=0.1",
            ["model", "hidden_dropout", "rope_theta"],
        ),  # another family's key
        # another trainer's names, and keys in another section
        ("learning_rate=3", ["unknown key learning_rate", "did you mean 'optimizer.lr'"]),
        ("optimizer.learning-rate=3", ["did you mean 'optimizer.lr'"]),
        ("train.batch_size=3", ["did you mean 'train.global_batch_size'"]),
        (
            "parallel={tp: 2}",
            ["command line: unknown key parallel.tp", "did you mean 'parallel.tensor'"],
        ),
        ("epochs=3", ["did you mean 'train.epochs'"]),
        (
            "model.n_layer=3",
            ["command line: model: unknown key n_layer", "did you mean 'model.num_layers'"],
        ),
        ("model.seq_len=3", ["did you mean 'data.seq_length'"]),
        ("train.warmup_steps=3", ["did you mean 'optimizer.schedule.warmup_steps'"]),
        # wrong literals
        (
            "train.precision=fp16",
            ["train.precision", "'fp16'", "'bf16' or 'fp32'", "did you mean 'bf16'"],
        ),
        ("parallel.zero_stage=4", ["parallel.zero_stage = 4", "0, 1, 2 or 3"]),
        (
            "optimizer.schedule.name=cosin",
            ["optimizer.schedule.name", "'cosin'", "did you mean 'cosine'"],
        ),
        ("data.order=random", ["data.order", "'random'", "'shuffle', 'sequential' or 'megatron'"]),
        # wrong types
        ("train.steps=ten", ["train.steps", "'ten'", "integer"]),
        ("train.steps=1.5", ["train.steps", "1.5", "integer"]),
        ("train.steps=true", ["train", "steps = True", "number"]),
        ("optimizer.clip=on", ["optimizer", "clip = True", "number"]),
        ("checkpoint.resume=nevr", ["checkpoint.resume", "nevr", "'never'"]),
        ("train.steps=", ["train: give the length of the run: steps, tokens or epochs"]),
        (
            "train={tokens: 1x, global_batch_size: 8}",
            ["train.tokens", "'1x'", "such as 1e12, 300B or 15T"],
        ),
        (
            "train={tokens: 1e3, epochs: 2, global_batch_size: 8}",
            ["tokens 1000 and epochs 2.0 are two lengths"],
        ),
        (
            "train.tokens=1M",
            ["train.steps 100 and train.tokens 1000000, which is", "null for the other"],
        ),
        ("parallel.sequence=maybe", ["parallel.sequence", "'maybe'", "boolean"]),
        ("data.train=foo", ["data.train", "'foo'"]),
        ("train=3", ["train = 3"]),
        ("model=llama-8m", ["model", "'llama-8m'"]),
        ("model.vocab_size=many", ["model", "vocab_size", "'many'", "integer"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas"]),
        # out of range
        ("train.steps=0", ["train.steps", "0", "greater than 0"]),
        ("train.seed=-1", ["train.seed", "-1", "greater than or equal to 0"]),
        ("optimizer.lr=.nan", ["optimizer.lr", "nan", "finite"]),
        ("optimizer.lr=.inf", ["optimizer.lr", "inf", "finite"]),
        ("optimizer.betas=[0.9, 1.0]", ["optimizer.betas", "[0.9, 1.0]", "below 1"]),
        ("data.train=[]", ["data.train", "at least 1"]),
        ("data.split=[-1, 0, 0]", ["data.split", "[-1, 0, 0]", "negative"]),
        ("data.split=[0, 1, 0]", ["data.split", "[0, 1, 0]", "train"]),
        ("run.name=a/b", ["run.name", "'a/b'"]),
        ("model.num_layers=0", ["model", "num_layers", "0", "greater than 0"]),
        # parts that do not fit each other
        ("optimizer.schedule.min_lr=1", ["optimizer.schedule.min_lr 1.0", "optimizer.lr 0.001"]),
        ("data.seq_length=65", ["data.seq_length 65", "model.max_positions 64"]),
        ("model.hidden_size=18", ["hidden_size 18", "num_attention_heads 4"]),
        ("model.num_kv_heads=3", ["num_attention_heads 4", "num_kv_heads 3"]),
        # models that do not exist
        ("model.preset=llama-8x", ["model.preset", "'llama-8x'", "did you mean 'llama-8m'"]),
        ("model.preset=zzz", ["model.preset", "'zzz'", "gpt2-124m", "llama-70b"]),
        ("model.family=lama", ["model.family", "'lama'", "did you mean 'llama'"]),
        ("model.hf=/nowhere", ["/nowhere/config.json", "No such file"]),
        # overrides that are none
        ("train.steps", ["'train.steps'", "section.key=value"]),
        ("=3", ["'=3'", "section.key=value"]),
        (".steps=3", ["'.steps=3'", "section.key=value"]),
        ("train..steps=3", ["steps=3", "section.key=value"]),
        ("train.steps.x=3", ["steps", "100", "not a section"]),
    ],
)
def test_mistake_in_an_override_is_explained(override: str, words: list[str]) -> None:
    values = copy.deepcopy(BASE)
    if override.startswith(("model.preset", "model.hf", "model.family")):
        values["model"] = {}
    found = mistake(values, override)
    assert [word for word in words if word not in found] == [], found


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda v: v["data"]["train"][1].update(wieght=2),
            ["data.train.1.wieght", "2", "did you mean 'weight'"],
        ),
        (
            lambda v: v["data"]["train"][0].update(weight=0),
            ["data.train.0.weight", "0", "greater than 0"],
        ),
        (lambda v: v["data"]["train"][0].pop("path"), ["data.train.0.path", "required"]),
        (lambda v: v["data"].update(train=["data/a"]), ["data.train.0", "'data/a'"]),
        (lambda v: v.pop("model"), ["model is required"]),
        (lambda v: v["optimizer"].pop("lr"), ["optimizer.lr is required"]),
        (lambda v: v.update(train=None), ["train", "None"]),
        (lambda v: v.update(model={}), ["model", "`preset`", "`hf`", "`family`"]),
        (lambda v: v["model"].pop("intermediate_size"), ["model", "intermediate_size", "required"]),
        (
            lambda v: v.update(model=GPT2 | {"hiden_size": 3}),
            ["model", "hiden_size", "did you mean 'hidden_size'"],
        ),
        (
            lambda v: v.update(model=GPT2 | {"num_kv_heads": 3}),
            ["model", "unknown key", "num_kv_heads"],
        ),
        (
            lambda v: v.update(model=GPT2 | {"hidden_dropout": 1}),
            ["model", "hidden_dropout", "less than 1"],
        ),
        (
            lambda v: v["data"].update(split=[0.9, 0.1, 0], valid=[{"path": "c"}]),
            ["data", "`split`", "`valid`", "not both"],
        ),
    ],
)
def test_mistake_in_the_file_is_explained(
    edit: Callable[[dict[str, Any]], Any], words: list[str]
) -> None:
    found = mistake(edited(edit))
    assert [word for word in words if word not in found] == [], found


def test_every_other_trainers_name_leads_to_a_key() -> None:
    known = {key.name.removesuffix("[]") for keys in catalog().values() for key in keys}
    for key, names in KEYS.items():
        assert key in known, key
        assert not known & set(names), "a name that is a key needs no other"
        section, _, last = key.partition(".")
        assert last not in names or section == "train", key
    names = [name for names in KEYS.values() for name in names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "override",
    [
        "run.name=other", "model={preset: llama-8m, vocab_size: 300}", "optimizer.name=muon",
        "optimizer.adamw={eps: 1}",
        "optimizer.schedule={name: wsd, decay_steps: 3}", "objective.z_loss=0.1", "train.tokens=1600",
        "observe.wandb.tags=[a]", "checkpoint.resume=never", "data.split=[1, 1, 0]", "health.loss_spike=skip",
    ],
)  # fmt: skip
def test_a_short_config_means_the_same(override: str) -> None:
    overrides = [override, "optimizer.name=muon"] if "adamw" in override else [override]
    if override == "train.tokens=1600":
        overrides.append("train.steps=null")
    config = parse_config(BASE | {"model": {"preset": "llama-1m"}}, overrides)
    text = short_yaml(config)
    assert parse_config(yaml.safe_load(text)) == config
    assert len(text.splitlines()) < 30, text


def test_a_mistake_is_told_where_it_was_made() -> None:
    """In the file, or behind the command: in the first there is nothing to look for."""
    values = edited(lambda v: v["train"].update(stpes=3))
    found = mistake(values, "optimizer.lr=-1", "train.seed=7", "model.num_layers=0").split("\n  ")
    assert found[0].startswith("my.yaml: unknown key train.stpes")
    assert [line.split(" = ")[0] for line in found[1:]] == [
        "command line: model: num_layers",
        "command line: optimizer.lr",
    ]


def test_all_mistakes_are_told_at_once() -> None:
    found = mistake(BASE, "trian=1", "train.stpes=2", "optimizer.lr=-1", "model.hiden_size=3")
    assert all(word in found for word in ("trian", "train.stpes", "optimizer.lr", "hiden_size")), (
        found
    )


@pytest.mark.parametrize(
    "text", ["a: [", "a: 1\n\tb: 2", "!!python/object/apply:os.system ['false']"]
)
def test_bad_yaml_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml is not valid YAML(.|\n)*line \d"):
        load_config(path)


@pytest.mark.parametrize(("text", "kind"), [("", "nothing"), ("- a", "list"), ("words", "str")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"bad\.yaml: expected .*key: value.*{kind}"):
        load_config(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"is a folder, not a YAML file$"):
        load_config(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match=rf"of a run it is {tmp_path}/config\.yaml"):
        load_config(tmp_path)


def test_an_override_that_is_not_yaml() -> None:
    assert "train.steps" in mistake(BASE, "train.steps=[")


def test_a_family_that_is_not_a_name() -> None:
    assert "model.family" in mistake(BASE, "model.family=3")


@pytest.mark.parametrize("override", ["train.stop-at=1", "model.hidden-size=1"])
def test_unknown_key_with_a_hyphen(override: str) -> None:
    found = mistake(BASE, override)
    assert override.split("=")[0].split(".")[1] in found
    assert override.split("=")[0].split(".")[1].replace("-", "_") in found, "the nearest spelling"


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(path)


def test_nothing_can_be_changed_afterwards() -> None:
    config = parse_config(BASE)
    for section, key, value in [
        (config, "train", None), (config.train, "steps", 3), (config.model, "hidden_size", 3),
        (config.optimizer.schedule, "name", "linear"), (config.data.train[0], "weight", 3.0),
    ]:  # fmt: skip
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, value)
    assert isinstance(config.data.train, tuple)
    assert isinstance(config.optimizer.betas, tuple)


def test_overrides_leave_what_was_read_alone() -> None:
    values = copy.deepcopy(BASE)
    parse_config(
        values, ["train.steps=3", "optimizer.schedule.name=linear", "model.hidden_size=32"]
    )
    assert values == BASE


MODELS: list[dict[str, Any]] = [
    LLAMA,
    LLAMA
    | {"rope_scaling": {"factor": 4}, "head_dim": 8, "tie_embeddings": True, "norm_eps": 1e-6},
    GPT2 | {"attention_dropout": 0.1, "intermediate_size": 40},
    {"preset": "llama-8b"},
    {"preset": "gpt2-1m", "vocab_size": 77},
]


@pytest.mark.parametrize("model", MODELS)
def test_yaml_that_is_written_means_the_same(tmp_path: Path, model: dict[str, Any]) -> None:
    asked = BASE | {"model": model}
    config = parse_config(
        asked,
        [
            "optimizer.lr=3e-4",
            "train.stop_at=5",
            "checkpoint.resume=runs/x",
            "data.split=[9, 1, 0]",
        ],
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    again = load_config(path)
    assert again == config
    assert type(again.model) is type(config.model)
    assert again.to_yaml() == config.to_yaml()


def test_a_changed_preset_does_not_change_what_a_run_wrote() -> None:
    """The config of a run holds every field, so that a later preset of the same name cannot alter
    it."""
    written = yaml.safe_load(
        parse_config(BASE | {"model": {"preset": "llama-1m", "vocab_size": 77}}).to_yaml()
    )
    alone = {key: value for key, value in written["model"].items() if key != "preset"}
    assert (
        model_config(alone).model_copy(update={"preset": "llama-1m"}) == parse_config(written).model
    )


@pytest.mark.parametrize("model", [LLAMA, GPT2])
def test_fields_of_a_hugging_face_folder(tmp_path: Path, model: dict[str, Any]) -> None:
    expected = model_config(model)
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(expected)))
    found = parse_config(BASE | {"model": {"hf": str(tmp_path), "init_std": 0.5}}).model
    shared = expected.model_dump(exclude={"hf", "init_std", "head_dim"})
    assert found.model_dump(include=set(shared)) == shared
    assert found.init_std == 0.5, "a field beside `hf` overrides the folder's"
    assert found.hf == tmp_path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["config.json is not valid JSON"]),
        (
            '{"model_type": "lama"}',
            ["config.json", "'lama'", "nearest in name is 'llama'", "known: bert, "],
        ),
        (
            '{"model_type": "mamba"}',
            ["config.json", "'mamba'", "gpt_neox, gpt_oss, granite, llama"],
        ),
        ("{}", ["config.json", "model_type"]),
        ('{"model_type": "llama", "vocab_size": 3}', ["config.json", "llama", "hidden_size"]),
        ("[]", ["config.json is not a JSON object"]),
    ],
)
def test_bad_config_json(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "config.json").write_text(text)
    found = mistake(BASE | {"model": {"hf": str(tmp_path)}})
    assert [word for word in words if word not in found] == [], found
