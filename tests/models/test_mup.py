"""muP: initial values and learning rates by width are those of the paper's table, and the sizes of
activations do not depend on the width, which they do without it."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalite.cli import main
from megalite.errors import ConfigError
from megalite.models import weight_table
from megalite.plan import make_plan
from megalite.train import train
from ranks import run_ranks
from small_runs import MODELS, curve_of, make_config, train_on_rank

LLAMA = MODELS["llama"] | {"init_std": 0.02}


def at_width(width: int, **more: Any) -> dict[str, Any]:
    """The model of width 32 widened, with heads of 8 as before."""
    m = width // 32
    wider = {
        "hidden_size": 32 * m,
        "intermediate_size": 48 * m,
        "num_attention_heads": 4 * m,
        "num_kv_heads": 2 * m,
    }
    return LLAMA | wider | more


def table(tmp_path: Path, model: dict[str, Any], *overrides: str) -> dict[str, tuple[Any, ...]]:
    """(initial values, learning rate, decay × learning rate) by name."""
    config = make_config(
        tmp_path, model, "optimizer.lr=1", "optimizer.weight_decay=0.1", *overrides
    )
    found = {}
    for weight in weight_table(config.model):
        treatment = config.optimizer.treatment(weight)
        found[weight.name] = weight.init, treatment.lr, treatment.lr * treatment.weight_decay
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "muon-original", "muon-per-head"])
@pytest.mark.parametrize(("base", "width"), [(32, 128), (64, 32)])
def test_the_table_is_that_of_the_papers(
    optimizer: str, base: int, width: int, tmp_path: Path
) -> None:
    """Adam: Yang et al. 2022, table 3. Muon: the largest singular value of the update, its scale,
    goes by √(out/in) (Yang et al. 2023, condition 1). Decay × learning rate is the same."""
    name, _, option = optimizer.partition("-")
    given = [f"optimizer.name={name}"]
    given += {
        "": [],
        "original": ["optimizer.scale=original"],
        "per-head": ["optimizer.per_head=true"],
    }[option]
    before = table(tmp_path, at_width(base), *given)
    assert table(tmp_path, at_width(base, mup={"base_hidden": base}), *given) == before
    m = width / base
    plain, found = (
        table(tmp_path, at_width(width, mup=mup), *given) for mup in (None, {"base_hidden": base})
    )
    assert found.keys() == before.keys()
    for weight, (init, lr, decayed) in found.items():
        old_init, old_lr, old_decayed = before[weight]
        hidden = weight.startswith("layers.") and "norm" not in weight
        # Variances: 1 for the embedding, 1/fan_in of matrices within, 1/fan_in² of the head.
        std = 1 / sqrt(m) if hidden else 1 / m if weight == "head.weight" else 1.0
        rate = 1 / m if hidden or weight == "head.weight" else 1.0
        if hidden and name == "muon":
            # All of these matrices are m times as high and as wide: √(out/in) stays. The scale of
            # an update, max(out, in) under the root, goes up by √m; that of "original" stays.
            rate = 1.0 if option == "original" else 1 / sqrt(m)
            if option == "per-head" and "qkv" in weight:
                rate = 1 / m  # 8 rows of each head at any width: √(8/in) goes down, the scale up
        assert plain[weight][0] == old_init
        assert init == (pytest.approx(old_init * std) if isinstance(old_init, float) else old_init)
        assert lr == pytest.approx(old_lr * rate), weight
        assert decayed == pytest.approx(old_decayed)


def test_a_router_is_a_head_of_its_own(tmp_path: Path) -> None:
    """As many experts at any width: fan-out is constant, as the head's is."""
    experts = {"family": "mixtral", "num_experts": 4, "experts_per_token": 2}
    narrow = table(tmp_path, at_width(32) | experts)
    wide = table(tmp_path, at_width(128, mup={"base_hidden": 32}) | experts)
    for weight, std in (("router", 1 / 4), ("experts.gate_up", 1 / 2), ("experts.down", 1 / 2)):
        name = f"layers.0.mlp.{weight}.weight"
        assert wide[name][0] == pytest.approx(narrow[name][0] * std)
        assert wide[name][1] == pytest.approx(narrow[name][1] / 4)
    name = "layers.0.mlp.router.weight"
    # √(4/128) / (0.2·√128) against √(4/32) / (0.2·√32).
    muon = [table(tmp_path, model, "optimizer.name=muon")[name][1] for model in (
        at_width(32) | experts, at_width(128, mup={"base_hidden": 32}) | experts
    )]  # fmt: skip
    assert muon[1] / muon[0] == pytest.approx(1 / 4)


def coordinates(
    folder: Path, capsys: pytest.CaptureFixture[str], *overrides: str
) -> list[list[float]]:
    """The size of the last layer's output by step at widths 32, 64 and 256."""
    folder.mkdir()
    config = make_config(
        folder, at_width(32), "checkpoint.every=0", "optimizer.schedule.name=constant"
    )
    values = config.model_dump(mode="json", exclude_unset=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    given = [
        str(folder / "config.yaml"),
        *overrides,
        "optimizer.lr=0.005",
        "optimizer.schedule.warmup_steps=0",
    ]
    assert main(["sweep", *given, "--coordinate-check", "32", "64", "256"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert (folder / "runs" / "test-coordinates" / "coordinates.png").stat().st_size > 10_000
    assert said[-1].endswith("coordinates.png")
    return [
        [float(x) for x in line.split("layer")[1].split()] for line in said if "last layer" in line
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_coordinates_are_alike_at_every_width(
    optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    name = f"optimizer.name={optimizer}"
    narrow, middle, wide = coordinates(tmp_path / "mup", capsys, name, "model.mup.base_hidden=32")
    assert len(narrow) == 5
    assert narrow[-1] > 1.1 * narrow[0], "they have moved"
    for found in (middle, wide):
        assert found == pytest.approx(narrow, rel=0.15)
    plain = coordinates(tmp_path / "plain", capsys, name)
    assert plain[0] == pytest.approx(narrow), "at the base's own width it is the same run"
    assert plain[2][-1] > 2 * wide[-1]


def test_two_ranks_train_the_model_of_one(tmp_path: Path) -> None:
    model = at_width(64, mup={"base_hidden": 32})
    given = ["optimizer.name=muon", "train.steps=4", "checkpoint.every=4", "observe.eval_every=4"]
    alone, cut = (
        make_config(tmp_path, model, *given, f"run.name={name}", f"parallel.tensor={ranks}")
        for name, ranks in (("alone", 1), ("cut", 2))
    )
    train(alone)
    run_ranks(2, train_on_rank, [cut])
    for one, other in zip(curve_of(alone), curve_of(cut), strict=True):
        assert one == pytest.approx(other, rel=1e-5)  # sums of fp32 in another order


@pytest.mark.parametrize(
    ("model", "overrides", "words"),
    [
        ({"tie_embeddings": True}, [], "model.mup needs tie_embeddings: false"),
        ({"family": "olmo2"}, [], "model.mup knows llama"),
        ({}, ["optimizer.name=sgd"], "optimizer.name = 'sgd' has no learning rate by width"),
        ({}, ["parallel.engine=deepspeed"], "model.mup needs parallel.engine: native"),
    ],
)
def test_what_it_does_not_fit_is_refused(
    model: dict[str, Any], overrides: list[str], words: str, tmp_path: Path
) -> None:
    config = make_config(tmp_path, at_width(64, mup={"base_hidden": 32}) | model, *overrides)
    with pytest.raises(ConfigError, match=words):
        make_plan(config, weight_table(config.model), 1)


def test_a_width_must_be_of_whole_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = make_config(tmp_path, at_width(32)).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["sweep", str(tmp_path / "config.yaml"), "--coordinate-check", "36"]) == 2
    assert (
        "makes model.num_attention_heads = 4.5, which is no whole number" in capsys.readouterr().err
    )
