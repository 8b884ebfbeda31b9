"""Makes a smaller model of the parts of a larger one that do most (Minitron, Muralidharan et al.
2024): fewer layers, channels, heads, groups of keys and values, inner features or experts. Its logits
are those of the large model with the other parts set to 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalite.checkpoint.convert import Model, open_source
from megalite.errors import ConfigError
from megalite.models import from_hf_config, model_config, to_hf_config, weight_table
from megalite.models.experts import Among, RoutedConfig
from megalite.models.llama import LlamaLike
from megalite.models.weights import Weight
from megalite.models.windows import WindowedByLayer
from megalite.pruning.importance import Importance, measure
from megalite.quantization.layers import LayerRuns

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")

ALIASES = ("num_experts", "num_local_experts")
"""Keys of config.json of which transformers writes both, for one number."""


@dataclass(frozen=True)
class Target:
    """How many of each part the smaller model has; None: all."""

    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    """Of queries; where left out, as many in each group of keys and values as there are."""
    kv_heads: int | None = None
    inner: int | None = None
    """Inner features, of each expert where there are experts."""
    experts: int | None = None


class Following(NamedTuple):
    """Which field of the config says how large each dimension of a weight is; None: none of those
    that are pruned."""

    stack: str | None
    rows: tuple[str | None, ...]
    """Of each of the weight's parts."""
    columns: str | None


Kept = Mapping[str, list[Tensor]]
"""Numbers of the parts that stay, ascending, by the field that counts them, and by layer: [n], or
[E,n] of inner features that differ by expert."""


class StructuredPruner:
    """Chooses the parts of a model that stay, and reads the weights of the smaller model."""

    def __init__(self, folder: Path, runs: LayerRuns, target: Target):
        """Measure on `runs` what the parts of the model in `folder` do. Raises ConfigError for a
        model, or a target, that cannot be pruned so."""
        config = runs.config.model
        if config.family not in FAMILIES or config.task != "causal":
            raise ConfigError(
                f"{folder} is a {config.family} model; parts are left out of {', '.join(FAMILIES)}"
            )
        assert isinstance(config, LlamaLike)
        # Said where usual values would follow the numbers that change.
        said = {"num_kv_heads": config.kv_heads, "head_dim": config.head_size}
        self.config = config.model_copy(update=said)
        self.source = open_source(folder)
        self.words = field_names(self.config)
        self.new = self._new_numbers(target)
        self.following = following(self.config, tuple(self.words.values()))
        # What no config allows is refused before the measuring, which takes long. By then it is
        # known how many layers stay, and only later which.
        self.layers = list(range(self.new["num_layers"]))
        model_config(from_hf_config(self._config_json()))
        self.importance = self._measure(runs)
        influences = torch.tensor(self.importance.layers)
        self.layers = most(influences, self.new["num_layers"]).tolist()
        self.kept = self._choose()

    def _new_numbers(self, target: Target) -> dict[str, int]:
        """Return the number of each part by the field that says it."""
        asked = {each.name: getattr(target, each.name) for each in fields(target)}
        new = {}
        for word, field in self.words.items():
            number, has = asked.pop(word), getattr(self.config, field)
            if number is not None and not 0 < number <= has:
                raise ConfigError(f"--{word.replace('_', '-')} {number}: the model has {has}")
            new[field] = has if number is None else number
        # What is left is of no word of this family's.
        if asked.get("experts"):
            raise ConfigError(f"--experts: a {self.config.family} model has none")
        groups, each = new["num_kv_heads"], self.config.num_attention_heads // self.config.kv_heads
        # Heads of queries belong to the group whose keys they read: all groups keep as many.
        if target.heads is None:
            new["num_attention_heads"] = groups * each
        if new["num_attention_heads"] % groups or new["num_attention_heads"] > groups * each:
            raise ConfigError(
                f"--heads {new['num_attention_heads']} must be 1 to {each} for each of {groups} kv heads"
            )
        return new

    def _measure(self, runs: LayerRuns) -> Importance:
        words = {field: word for word, field in self.words.items()}
        readers: dict[str, list[Weight]] = {"heads": [], "inner": [], "hidden": []}
        for weight in runs.table:
            word = words.get(self.following[weight.name].columns or "")
            # Of those that read hidden states, the ones behind norms: a router reads what its
            # experts do, and what adds to the stream reads no hidden states.
            if weight.is_matrix and word and (word != "hidden" or weight.shard == "column"):
                readers[word].append(weight)
        return measure(runs, readers, self.config.num_attention_heads)

    def _choose(self) -> Kept:
        found, new, per_layer = self.importance, self.new, range(self.config.num_layers)
        heads, groups = new["num_attention_heads"], new["num_kv_heads"]
        chosen = [
            choose_heads(scores, self.config.kv_heads, heads, groups) for scores in found.heads
        ]
        # One choice of channels for all layers: the residual stream runs through them.
        channels = most(found.hidden, new["hidden_size"])
        kept = {
            "num_attention_heads": [queries for queries, _ in chosen],
            "num_kv_heads": [kv_heads for _, kv_heads in chosen],
            "hidden_size": [channels for _ in per_layer],
        }
        # Dense layers among those with experts have neither these, nor their inner features.
        none = torch.arange(0)
        for word, scores in (("inner", found.inner), ("experts", found.experts)):
            field = self.words.get(word)
            if field:
                kept[field] = [none if x is None else most(x, new[field]) for x in scores]
        return kept

    def model(self) -> Model:
        """Return the smaller model, as `write_model` is to write it."""
        values = self._config_json()
        made = model_config(from_hf_config(values))
        old = {weight.name: weight for weight in self.source.weights}

        # The smaller model's layers are numbered anew: its layer n is the large one's layers[n].
        def old_of(weight: Weight) -> Weight:
            if not isinstance(weight.place, int):
                return old[weight.name]
            end = weight.name.removeprefix(f"layers.{weight.place}.")
            return old[f"layers.{self.layers[weight.place]}.{end}"]

        def read(weight: Weight) -> Tensor:
            return self.cut(old_of(weight), self.source.read(old_of(weight)))

        def read_exact(weight: Weight) -> Tensor:
            exact = self.source.read_exact or self.source.read
            return self.cut(old_of(weight), exact(old_of(weight)))

        return replace(
            self.source,
            config=values,
            weights=weight_table(made),
            read=read,
            read_exact=read_exact,
        )

    def summary(self) -> str:
        """Return what stays, in words."""
        gone = sorted(set(range(self.config.num_layers)) - set(self.layers))
        said = []
        for word, field in self.words.items():
            new, old = self.new[field], getattr(self.config, field)
            if new != old:
                said.append(f"{new} of {old} {word.replace('_', ' ')}")
        if gone:
            said.append(f"without layer{'s' * (len(gone) > 1)} {', '.join(map(str, gone))}")
        return ", ".join(said)

    def cut(self, weight: Weight, value: Tensor) -> Tensor:
        """Return the parts that stay of a weight of the large model."""
        how = self.following[weight.name]
        # Outside of layers only channels are left out, which are the same in all of them.
        layer = weight.place if isinstance(weight.place, int) else 0
        if weight.stack:
            experts = self._places(how.stack, len(value), layer).tolist()
            return torch.stack([self._matrix(weight, how, value[e], layer, e) for e in experts])
        found = self._matrix(weight, how, value, layer)
        if how.rows == ("hidden_size",) and weight.init == "ones":
            # A norm's mean square is over fewer channels than before: over as many, of which the
            # rest are 0, it would be smaller.
            found = (found.double() * sqrt(self._channels)).to(value.dtype)
        return found

    @property
    def _channels(self) -> float:
        """Return how many times as many channels the large model has."""
        return self.config.hidden_size / self.new["hidden_size"]

    def _matrix(
        self, weight: Weight, how: Following, value: Tensor, layer: int, expert: int = 0
    ) -> Tensor:
        # Fused matrices (queries, keys and values) have parts of their own kinds, one behind another.
        start, rows = 0, []
        for field, size in zip(how.rows, _parts(weight), strict=True):
            rows.append(start + self._places(field, size, layer, expert))
            start += size
        value = value[torch.cat(rows)]
        if not weight.row_shape:
            return value
        return value[:, self._places(how.columns, value.shape[1], layer, expert)]

    def _places(self, field: str | None, size: int, layer: int, expert: int = 0) -> Tensor:
        """Return which of `size` features stay, that are of the parts which `field` counts."""
        if field is None:
            return torch.arange(size)
        kept = self.kept[field][layer]
        kept = kept[expert] if kept.dim() == 2 else kept
        # A part may be several features, as a head is of its dimensions.
        each = size // getattr(self.config, field)
        return (kept[:, None] * each + torch.arange(each)).flatten()

    def _config_json(self) -> dict[str, Any]:
        config, layers = self.config, self.layers
        update: dict[str, Any] = dict(self.new)
        if isinstance(config, WindowedByLayer) and config.sliding_window is not None:
            update["layer_types"] = tuple(config.type_of(layer) for layer in layers)
        if isinstance(config, Among):
            dense = [new for new, old in enumerate(layers) if not config.is_routed(old)]
            update |= {"mlp_only_layers": tuple(dense), "decoder_sparse_step": 1}
        # The mean square again: with as many times eps, the norm is the same to the last digit.
        update["norm_eps"] = config.norm_eps * self._channels
        before, after = to_hf_config(config), to_hf_config(config.model_copy(update=update))
        # The source's own keys stay as they are written, unless what they say has changed or gone.
        gone = {*before, *ALIASES} - after.keys()
        values = {key: x for key, x in self.source.config.items() if key not in gone}
        for key, x in after.items():
            if before.get(key) != x or key not in values:
                values[key] = x
        if types := self.source.config.get("layer_types"):
            values["layer_types"] = [types[layer] for layer in layers]
        return values


def field_names(config: LlamaLike) -> dict[str, str]:
    """Return the fields of `config` that say how many parts there are, by the names of `Target`."""
    names = {
        "layers": "num_layers", "hidden": "hidden_size", "heads": "num_attention_heads", "kv_heads": "num_kv_heads",
        "inner": "moe_intermediate_size" if isinstance(config, Among) else "intermediate_size",
    }  # fmt: skip
    return names | ({"experts": "num_experts"} if isinstance(config, RoutedConfig) else {})


def _parts(weight: Weight) -> tuple[int, ...]:
    return weight.parts or (weight.shape[weight.stack],)


def following(config: LlamaLike, counted: tuple[str, ...]) -> dict[str, Following]:
    """Return which of the fields `counted` each dimension of every weight follows: those that
    another value of the field changes in the table."""
    table = weight_table(config)
    found: dict[str, Following] = {
        weight.name: Following(None, (None,) * len(_parts(weight)), None) for weight in table
    }
    for field in counted:
        if field == "num_layers":  # says how many weights there are, and not how large they are
            continue
        other = config.model_copy(update={field: 2 * getattr(config, field)})
        for weight, larger in zip(table, weight_table(other), strict=True):
            stack, rows, columns = found[weight.name]
            if weight.shape[: weight.stack] != larger.shape[: weight.stack]:
                stack = field
            pairs = zip(rows, _parts(weight), _parts(larger), strict=True)
            rows = tuple(field if a != b else known for known, a, b in pairs)
            if weight.row_shape != larger.row_shape:
                columns = field
            found[weight.name] = Following(stack, rows, columns)
    return found


def most(scores: Tensor, count: int) -> Tensor:
    """Return the numbers of the `count` highest in the last dimension, ascending; of equal ones the
    first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


def choose_heads(scores: Tensor, had: int, heads: int, groups: int) -> tuple[Tensor, Tensor]:
    """Return which heads of queries, and which groups of keys and values, stay of `had` groups:
    the `groups` whose heads do most, and in each as many of these that do most."""
    by_group = scores.view(had, -1)  # heads of one group are neighbours
    kept = most(by_group.sum(1), groups)
    within = most(by_group[kept], heads // groups)
    return (kept[:, None] * by_group.shape[1] + within).flatten(), kept
