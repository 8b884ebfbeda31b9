"""Llama-like models from Megatron-LM's checkpoints, read without running what is pickled in them.

    torch        mp_rank_TT/model_optim_rng.pt, or mp_rank_TT_PPP/…: a file for each tensor and pipeline rank
    torch_dist   .metadata, common.pt, __R_N.distcp: whole tensors in pieces, those of all layers as one tensor

A tensor rank's part of a weight is what a rank of ours holds, but for two things: queries, keys and values lie group by
group, and the vocabulary is padded. So the table of weights puts the parts together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megalite.checkpoint.torch_file import StoredTensor, TorchFile, Unknown, load_pickle
from megalite.config import MOST_LAYERS, ModelConfig
from megalite.errors import CheckpointError, ConfigError
from megalite.models import model_config, weight_table
from megalite.models.weights import Weight
from megalite.outside import beside, read_limited, reading, shown

LATEST = "latest_checkpointed_iteration.txt"
ENDS = {
    "embedding.word_embeddings.weight": "embedding.weight",
    "decoder.final_layernorm.weight": "norm.weight",
    "decoder.final_norm.weight": "norm.weight",
    "output_layer.weight": "head.weight",
}
"""Megatron's names and ours. Where there are several: those of Megatron-core with Transformer Engine, of Megatron-core
without, and of the models before it."""
LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "attention_norm.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "input_norm.weight": "attention_norm.weight",
    "self_attention.linear_qkv.weight": "attention.qkv.weight",
    "self_attention.linear_qkv.bias": "attention.qkv.bias",
    "self_attention.query_key_value.weight": "attention.qkv.weight",
    "self_attention.query_key_value.bias": "attention.qkv.bias",
    "self_attention.q_layernorm.weight": "attention.q_norm.weight",
    "self_attention.k_layernorm.weight": "attention.k_norm.weight",
    "self_attention.linear_proj.weight": "attention.out.weight",
    "self_attention.dense.weight": "attention.out.weight",
    "mlp.linear_fc1.layer_norm_weight": "mlp_norm.weight",
    "pre_mlp_layernorm.weight": "mlp_norm.weight",
    "post_attention_layernorm.weight": "mlp_norm.weight",
    "post_attention_norm.weight": "mlp_norm.weight",
    "mlp.linear_fc1.weight": "mlp.gate_up.weight",
    "mlp.dense_h_to_4h.weight": "mlp.gate_up.weight",
    "mlp.linear_fc2.weight": "mlp.down.weight",
    "mlp.dense_4h_to_h.weight": "mlp.down.weight",
}
NO_WEIGHTS = re.compile(r"_extra_state\d*$|inv_freq$|^(optimizer|rng_state|rerun_state_machine_state)\b")


class Parts(Protocol):
    """A checkpoint, whichever way it is stored."""

    args: dict[str, Any]
    tensor: int
    """Parts that weights come in."""

    def names(self) -> set[str]:
        """Of all weights, in our words."""

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        """Of the part of each tensor rank, without reading it."""

    def read(self, name: str) -> list[Tensor]:
        """The part of each tensor rank."""


def find_megatron(folder: Path) -> Path | None:
    """The folder of the iteration that a checkpoint's folder names as its latest, or of an iteration; None where it is
    neither."""
    if (folder / LATEST).is_file():
        with reading(folder / LATEST, CheckpointError):
            word = read_limited(folder / LATEST, CheckpointError, 1000).decode(errors="replace").strip()
        if Path(word).name != word or word == "..":
            raise CheckpointError(f"{folder / LATEST} names {shown(word)}, which is no folder beside it")
        folder = folder / (f"iter_{int(word):07d}" if word.isdecimal() else word)
    is_one = (folder / ".metadata").is_file() or any(folder.glob("mp_rank_*/model_optim_rng.pt"))
    return folder if is_one else None


def open_megatron(
    folder: Path, vocab_size: int | None
) -> tuple[ModelConfig, tuple[Weight, ...], Callable[[Weight], Tensor]]:
    """The model's config, its table, and what reads the logical tensor of a weight. `vocab_size` without padding;
    where it is not given, that of the arguments in the checkpoint, or the padded one.

    Raises ConfigError for a model that is not like Llama, CheckpointError for files that are not as expected."""
    parts: Parts = _Pieces(folder) if (folder / ".metadata").is_file() else _RankFiles(folder)
    model = model_config(_fields(parts.args, vocab_size))
    weights = weight_table(model)
    names = parts.names()
    if model.tie_embeddings and "head.weight" in names:
        names.remove("head.weight")
        if not all(map(torch.equal, parts.read("head.weight"), parts.read("embedding.weight"))):
            raise CheckpointError(
                f"{folder}: its arguments tie the output layer to the embedding, but the two are stored with different "
                "numbers; save it with --untie-embeddings-and-output-weights"
            )
    wanted = {weight.name for weight in weights}
    if wanted != names:
        missing, extra = sorted(wanted - names)[:5], sorted(names - wanted)[:5]
        raise CheckpointError(f"{folder}: missing weights: {missing}; weights of no {model.family} model: {extra}")

    _check_shapes(weights, parts, folder)

    def read(weight: Weight) -> Tensor:
        locals_ = [_as_ours(weight, part, model, parts.tensor) for part in parts.read(weight.name)]
        if len(kinds := {part.dtype for part in locals_}) > 1 or not locals_[0].is_floating_point():
            raise CheckpointError(
                f"{folder}: {weight.name} is stored as {', '.join(sorted(map(str, kinds)))}, not as one of fp32, fp16, "
                "bf16 or fp64"
            )
        if weight.shard is None:
            return locals_[0]
        if weight.shard == "vocab":
            return torch.cat(locals_)[: weight.shape[0]].clone()
        return weight.assemble(locals_)

    return model, weights, read


def _check_shapes(weights: Sequence[Weight], parts: Parts, folder: Path) -> None:
    """Raise CheckpointError unless the parts of every weight have the shapes that its row gives them; those of a
    vocabulary, whose padding is Megatron's own, are equally long and long enough."""
    for weight in weights:
        found = parts.shapes(weight.name)
        try:
            wanted = weight.local_shape(parts.tensor)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        if weight.shard == "vocab":
            wanted = (*found[0][:1], *weight.shape[1:])
        if wrong := next((shape for shape in found if shape != wanted), None):
            raise CheckpointError(
                f"{folder}: {weight.name} has shape {shown(wrong)}, the model needs {shown(wanted)} of each tensor rank"
            )
        if weight.shard == "vocab" and (rows := sum(shape[0] for shape in found)) < weight.shape[0]:
            raise CheckpointError(f"{folder}: its vocabulary has {rows} rows, not {weight.shape[0]}")


def _as_ours(weight: Weight, part: Tensor, model: Any, tensor: int) -> Tensor:
    """A tensor rank's part in the order of ours."""
    if not weight.name.endswith(("attention.qkv.weight", "attention.qkv.bias")):
        return part
    size, groups = model.head_size, model.kv_heads // tensor
    heads = model.num_attention_heads // model.kv_heads
    by_group = part.unflatten(0, (groups, (heads + 2) * size)).split((heads * size, size, size), dim=1)
    return torch.cat([kind.flatten(0, 1) for kind in by_group])


def _fields(args: dict[str, Any], vocab_size: int | None) -> dict[str, Any]:
    """The `model:` section, from Megatron's arguments."""
    only = {
        "swiglu": (True,), "normalization": ("RMSNorm",), "position_embedding_type": ("rope",),
        "add_bias_linear": (False,), "rotary_percent": (1.0,), "num_experts": (None,), "rotary_interleaved": (False,),
        "apply_layernorm_1p": (False,), "multi_latent_attention": (False,), "window_size": (None,),
        "rotary_seq_len_interpolation_factor": (None, 1), "qk_layernorm": (False, True), "add_qkv_bias": (False, True),
    }  # fmt: skip
    required = ("swiglu", "normalization", "position_embedding_type", "add_bias_linear")
    for name, allowed in only.items():
        value = args.get(name, None if name in required else allowed[0])
        if value not in allowed:
            raise ConfigError(
                f"Megatron's checkpoint has {name} = {shown(value)}; models like Llama have {allowed[0]!r}"
            )
    try:
        heads = args["num_attention_heads"]
        fields = {
            "vocab_size": vocab_size if vocab_size is not None else args.get("vocab_size") or args["padded_vocab_size"],
            "hidden_size": args["hidden_size"],
            "intermediate_size": args["ffn_hidden_size"],
            "num_layers": args["num_layers"],
            "num_attention_heads": heads,
            "num_kv_heads": args["num_query_groups"] if args.get("group_query_attention") else heads,
            "head_dim": args.get("kv_channels") or 0,
            "max_positions": args["max_position_embeddings"],
            "norm_eps": args.get("norm_epsilon") or args["layernorm_epsilon"],
            "rope_theta": float(args.get("rotary_base") or 10_000),
            "init_std": args.get("init_method_std") or 0.02,
            "tie_embeddings": not args["untie_embeddings_and_output_weights"],
        }
    except KeyError as error:
        raise ConfigError(f"Megatron's checkpoint does not say its {error.args[0]}") from None
    if args.get("use_rope_scaling"):
        fields["rope_scaling"] = {"type": "llama3", "factor": args.get("rope_scaling_factor") or 8.0}
    qk_norm, qkv_bias = args.get("qk_layernorm"), args.get("add_qkv_bias")
    if qk_norm and qkv_bias:
        raise ConfigError("Megatron's checkpoint has both qk_layernorm and add_qkv_bias, as no known family has")
    return fields | {"family": "qwen3" if qk_norm else "qwen2" if qkv_bias else "llama"}


def _args(saved: Any, path: Path) -> dict[str, Any]:
    args = saved.get("args") if isinstance(saved, Mapping) else None
    state = args.state if isinstance(args, Unknown) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} does not hold the arguments of the run that wrote it")
    # All that is asked for are numbers, words and truth values. Of others a message might never end.
    return {name: value for name, value in state.items() if value is None or isinstance(value, int | float | str)}


def _ours(name: str, first_layer: int = 0) -> str | None:
    """Our name; None for what is no weight, or none that we know."""
    name = name.removeprefix("language_model.")
    name = re.sub(r"^(encoder|transformer)\.", "decoder.", name)
    if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
        known = LAYER.get(match[2])
        return known and f"layers.{first_layer + int(match[1])}.{known}"
    return ENDS.get(name)


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every value by its whole name. Raises CheckpointError where a dictionary is in two places, or in itself."""
    seen, pending = {id(values)}, [("", values)]
    while pending:
        prefix, inner = pending.pop()
        for key, value in inner.items():
            if not isinstance(value, Mapping):
                yield f"{prefix}{shown(key) if not isinstance(key, str) else key}", value
            elif id(value) in seen:
                raise CheckpointError(f"{prefix}{shown(key)} is a dictionary that is elsewhere as well")
            else:
                seen.add(id(value))
                pending.append((f"{prefix}{key}." if isinstance(key, str) else f"{prefix}{shown(key)}.", value))


def _unknown(path: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name} is no weight of a model like Llama")


def _sizes(values: Any) -> tuple[int, ...]:
    """Raises CheckpointError unless they are the sizes, or the offsets, of a tensor."""
    sizes = tuple(values)
    if not all(isinstance(size, int) and 0 <= size < 2**48 for size in sizes):
        raise CheckpointError(f"a tensor has the shape {shown(sizes)}, which is none")
    return sizes


class _RankFiles:
    """A file for each tensor and pipeline rank; layers are numbered from 0 in each of its models."""

    def __init__(self, folder: Path):
        self.folder = folder
        grid: dict[int, dict[int, Path]] = {}
        for path in sorted(folder.glob("mp_rank_*/model_optim_rng.pt")):
            match = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", path.parent.name)
            if match is None:
                raise CheckpointError(f"{path.parent}: neither mp_rank_TENSOR nor mp_rank_TENSOR_PIPELINE")
            grid.setdefault(int(match[2] or 0), {})[int(match[1])] = path
        self.tensor = len(grid[0]) if 0 in grid else 0
        self._found: dict[str, list[Any]] = {}  # a StoredTensor of each tensor rank
        saved = [[TorchFile(path).load() for _, path in sorted(row.items())] for _, row in sorted(grid.items())]
        if any(len(row) != self.tensor for row in saved):
            raise CheckpointError(f"{folder}: files of some ranks are missing: {sum(map(len, saved))} are there")
        self.args = _args(saved[0][0], folder)
        for axis, found in (("tensor", self.tensor), ("pipeline", len(saved))):
            if (size := self.args.get(f"{axis}_model_parallel_size", found)) != found:
                raise CheckpointError(f"{folder}: was written over {axis} {shown(size)}, but has files of {found}")
        first = 0
        with reading(f"{folder}: what its files hold", CheckpointError):
            whole = saved[0][0]
            chunks = ["model"] if "model" in whole else [key for key in whole if re.fullmatch(r"model\d+", str(key))]
            for chunk in chunks:  # of interleaved stages, all ranks' first come before any's second
                for row in saved:
                    first += self._take([dict(_flat(ranks[chunk])) for ranks in row], first)

    def _take(self, ranks: list[dict[str, Any]], first: int) -> int:
        """The weights of one model, given by each tensor rank. Returns how many layers it has."""
        layers = set()
        for name in dict.fromkeys(name for rank in ranks for name in rank):
            values = [rank.get(name) for rank in ranks]
            are_tensors = [isinstance(value, StoredTensor) for value in values]
            if (ours := _ours(name, first)) is None:
                if any(are_tensors) and not NO_WEIGHTS.search(name):
                    raise _unknown(self.folder, name)
                continue
            if not all(are_tensors):
                raise CheckpointError(f"{self.folder}: {name} is not a tensor on every tensor rank")
            # A tied embedding stands on the last stage again.
            if not _equal(self._found.setdefault(ours, values), values):
                raise CheckpointError(f"{self.folder}: {ours} is stored twice, with different values")
            layers |= {ours.split(".")[1]} if ours.startswith("layers.") else set()
        return len(layers)

    def names(self) -> set[str]:
        return set(self._found)

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        return [part.shape for part in self._found[name]]

    def read(self, name: str) -> list[Tensor]:
        return [part.read() for part in self._found[name]]


def _equal(first: list[Any], second: list[Any]) -> bool:
    return first is second or all(torch.equal(a.read(), b.read()) for a, b in zip(first, second, strict=True))


class _Pieces:
    """torch.distributed.checkpoint's files: pieces of whole tensors."""

    tensor = 1

    def __init__(self, folder: Path):
        self.folder = folder
        common = TorchFile(folder / "common.pt").load()
        self.args = _args(common, folder / "common.pt")
        metadata = load_pickle(folder / ".metadata")
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
        self._where: dict[str, tuple[str, int | None]] = {}
        with reading(f"{folder}/.metadata of torch.distributed.checkpoint", CheckpointError):
            for name, stored in metadata.state["state_dict_metadata"].items():
                if "size" in stored.state and not NO_WEIGHTS.search(name):
                    self._shapes[name] = _sizes(stored.state["size"])
            for index, place in metadata.state["storage_data"].items():
                if isinstance(name := index.state["fqn"], str) and name in self._shapes:
                    offset = _sizes(index.state["offset"] or ())
                    self._pieces.setdefault(name, []).append((offset, place.state))
        most = sum(path.stat().st_size for path in folder.glob("*.distcp"))
        for name, shape in self._shapes.items():
            if math.prod(shape) > most:
                raise CheckpointError(f"{folder}: {name} has shape {shown(shape)}, which is more than its files hold")
            stacked = re.fullmatch(r"decoder\.layers\.(\D.*)", name.removeprefix("model."))
            if stacked and (shape[:1] != (self.args.get("num_layers"),) or shape[0] > MOST_LAYERS):
                raise CheckpointError(f"{folder}: {name} is of another number of layers than the model")
            numbers = range(shape[0]) if stacked else [None]
            for number in numbers:
                plain = name.removeprefix("model.")
                ours = _ours(f"decoder.layers.{number}.{stacked[1]}" if stacked else plain)
                if ours is None:
                    raise _unknown(folder, name)
                if ours in self._where:
                    raise CheckpointError(f"{folder}: {ours} is stored twice: {self._where[ours][0]} and {name}")
                self._where[ours] = (name, number)

    def names(self) -> set[str]:
        return set(self._where)

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        stored, layer = self._where[name]
        return [self._shapes[stored] if layer is None else self._shapes[stored][1:]]

    def read(self, name: str) -> list[Tensor]:
        stored, layer = self._where[name]
        with reading(f"{self.folder}: the pieces of {stored} do not fit together, so that it", CheckpointError):
            return [self._read(stored, layer)]

    def _read(self, stored: str, layer: int | None) -> Tensor:
        """A whole tensor; of one of all layers, that of a layer."""
        shape = self._shapes[stored]
        whole: Tensor | None = None
        filled = torch.zeros(shape if layer is None else shape[1:], dtype=torch.bool)
        for offset, place in self._pieces.get(stored, ()):
            begin = offset or (0,) * len(shape)
            if layer is not None and begin[0] > layer:
                continue
            path = beside(self.folder, place["relative_path"], self.folder / ".metadata")
            piece = TorchFile(path, place["offset"], place["length"]).load().read()
            piece = piece.reshape((1,) * (len(shape) - piece.dim()) + piece.shape)
            if layer is not None:
                if begin[0] + len(piece) <= layer:
                    continue
                begin, piece = begin[1:], piece[layer - begin[0]]
            if whole is None:
                whole = piece.new_empty(filled.shape)
            where = tuple(slice(b, b + n) for b, n in zip(begin, piece.shape, strict=True))
            if filled[where].any():
                raise CheckpointError(f"{self.folder}: a piece of {stored} is there twice")
            whole[where], filled[where] = piece, True
        if whole is None or not filled.all():
            raise CheckpointError(f"{self.folder}: pieces of {stored} are missing")
        return whole
