"""Words by which texts speak of groups of people, from a YAML file of `axis: {group: [words]}`."""

from __future__ import annotations

from pathlib import Path

from megalite.errors import ConfigError
from megalite.utils.resources import configs_dir, read_yaml


def read_groups(path: Path | None = None) -> dict[str, str]:
    """Return the `axis/group` of each word in lower case, by default of configs/corpus/groups.yaml.
    Raise ConfigError."""
    path = path or configs_dir() / "corpus" / "groups.yaml"
    groups: dict[str, str] = {}
    for axis, members in read_yaml(path).items():
        if not isinstance(members, dict):
            members = {"": None}  # refused below, as a group without a list
        for group, words in members.items():
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise ConfigError(
                    f"{path}, the groups of people: {axis}.{group} must be a list of words"
                )
            groups |= {word.lower(): f"{axis}/{group}" for word in words}
    return groups
