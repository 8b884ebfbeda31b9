"""docs/models.md says of every family what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megalite.errors import ConfigError
from megalite.models import PARTS, REFUSED, from_hf_config, heads, model_config, to_hf_config
from megalite.models.rope import KINDS
from megalite.registry import families
from tiny_models import CASES

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = {
    cells[0]: cells[1:]
    for line in PAGE.splitlines()
    if (cells := re.findall(r"(?<=\| ).*?(?= \|)", line))
}


def test_each_architecture_has_a_row() -> None:
    names = [name.strip("`") for name in ROWS if name.startswith("`") and name != "`model_type`"]
    assert sorted(names) == sorted((*families.own, *PARTS))
    assert all(f"`{name}`" in PAGE.partition("**Left out**")[2] for name in REFUSED)


@pytest.mark.parametrize("name", families.own)
def test_a_row_says_what_the_family_does(name: str) -> None:
    from transformers import AutoConfig

    base = AutoConfig.for_model(**CASES[name]).to_dict()
    config = model_config(from_hf_config(base))
    _, architecture, scalings, classes, refused = ROWS[f"`{name}`"]
    assert architecture.strip("`") == to_hf_config(config)["architectures"][0]
    kinds = config.ROPE.kinds if hasattr(config, "ROPE") else ()
    assert scalings == ("all" if kinds == tuple(KINDS) else ", ".join(kinds) or "–")
    assert classes == ("yes" if name in heads.NAMES else "–")
    for entry in re.findall(r"`(\w+: [^`]+)`", refused):
        [(key, value)] = yaml.safe_load(entry).items()
        with pytest.raises(ConfigError, match=f"config.json has {key} = "):
            from_hf_config(base | {key: value})
