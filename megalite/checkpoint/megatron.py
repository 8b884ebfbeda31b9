"""Reads Llama-like models from Megatron-LM's checkpoints, without running what is pickled in them.

    torch        mp_rank_TT/model_optim_rng.pt, or mp_rank_TT_PPP/…: a file for each tensor and pipeline rank
    torch_dist   .metadata, common.pt, __R_N.distcp: whole tensors in pieces, those of all layers stacked into one

A tensor rank's shard of a weight is what a rank of megalite holds, but for two things: Megatron
stores queries, keys and values group by group, and pads the vocabulary. So the weight table
assembles the shards.
"""

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
from megalite.models.sharding import assemble
from megalite.models.weights import Weight
from megalite.utils.outside import beside, read_limited, reading, shown

LATEST = "latest_checkpointed_iteration.txt"
ENDS = {
    "embedding.word_embeddings.weight": "embedding.weight",
    "decoder.final_layernorm.weight": "norm.weight",
    "decoder.final_norm.weight": "norm.weight",
    "output_layer.weight": "head.weight",
}
"""Megatron's names and ours. Of several names for one weight, the first is that of Megatron-core
with Transformer Engine; then come Megatron-core without it, and the models before Megatron-core."""
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
NO_WEIGHTS = re.compile(
    r"_extra_state\d*$|inv_freq$|^(optimizer|rng_state|rerun_state_machine_state)\b"
)


class Parts(Protocol):
    """Gives access to the shards of a checkpoint, whichever way it is stored."""

    args: dict[str, Any]
    """Arguments of the run that wrote it."""
    tensor: int
    """Number of shards that weights come in."""

    def names(self) -> set[str]:
        """Return megalite's names of all weights."""

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        """Return the shape of each tensor rank's shard, without reading it."""

    def read(self, name: str) -> list[Tensor]:
        """Read each tensor rank's shard."""


def find_megatron(folder: Path) -> Path | None:
    """Find the folder of an iteration: `folder` itself, or the latest one that it names. None if it
    is neither."""
    if (folder / LATEST).is_file():
        with reading(folder / LATEST, CheckpointError):
            word = (
                read_limited(folder / LATEST, CheckpointError, 1000)
                .decode(errors="replace")
                .strip()
            )
        # The file may come from anywhere: it must not lead out of the folder.
        if Path(word).name != word or word == "..":
            raise CheckpointError(
                f"{folder / LATEST} names {shown(word)}, which is no folder beside it"
            )
        folder = folder / (f"iter_{int(word):07d}" if word.isdecimal() else word)
    is_one = (folder / ".metadata").is_file() or any(folder.glob("mp_rank_*/model_optim_rng.pt"))
    return folder if is_one else None


def open_megatron(
    folder: Path, vocab_size: int | None
) -> tuple[ModelConfig, tuple[Weight, ...], Callable[[Weight], Tensor]]:
    """Open the checkpoint of an iteration. Returns its model, its weight table, and a reader of
    logical tensors.

    `vocab_size` is the vocabulary without padding; without it, that of the checkpoint's arguments,
    or the padded one. Raises ConfigError for a model that is not like Llama, CheckpointError for
    unexpected files."""
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
        missing = sorted(wanted - names)[:5]
        extra = sorted(names - wanted)[:5]
        raise CheckpointError(
            f"{folder}: missing weights: {missing}; weights of no {model.family} model: {extra}"
        )
    _check_shapes(weights, parts, folder)

    def read(weight: Weight) -> Tensor:
        # One shard for each of Megatron's tensor ranks; the row of the weight knows how to join
        # them.
        shards = [_as_ours(weight, part, model, parts.tensor) for part in parts.read(weight.name)]
        dtypes = {shard.dtype for shard in shards}
        if len(dtypes) > 1 or not shards[0].is_floating_point():
            stored = ", ".join(sorted(map(str, dtypes)))
            raise CheckpointError(
                f"{folder}: {weight.name} is stored as {stored}, not as one of fp32, fp16, bf16 or fp64"
            )
        if weight.shard is None:
            return shards[0]
        if weight.shard == "vocab":
            return torch.cat(shards)[: weight.shape[0]].clone()  # without the padding
        return assemble(weight, shards)

    return model, weights, read


def _check_shapes(weights: Sequence[Weight], parts: Parts, folder: Path) -> None:
    """Raise CheckpointError unless the shards of every weight have the shapes that its row gives
    them.

    Shards of a vocabulary, whose padding is Megatron's own, must be equally long, and long enough
    together."""
    for weight in weights:
        found = parts.shapes(weight.name)
        try:
            wanted = weight.local_shape(parts.tensor)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        if weight.shard == "vocab":
            # Megatron pads to --make-vocab-size-divisible-by × tensor ranks, we to 64 rows a shard.
            wanted = (*found[0][:1], *weight.shape[1:])
        for shape in found:
            if shape != wanted:
                raise CheckpointError(
                    f"{folder}: {weight.name} has shape {shown(shape)}, the model needs {shown(wanted)} of each tensor "
                    "rank"
                )
        rows = sum(shape[0] for shape in found)
        if weight.shard == "vocab" and rows < weight.shape[0]:
            raise CheckpointError(
                f"{folder}: its vocabulary has {rows} rows, not {weight.shape[0]}"
            )


def _as_ours(weight: Weight, part: Tensor, model: Any, tensor: int) -> Tensor:
    """Reorder a shard of Megatron's: the fused query, key and value weight has all queries first in
    megalite."""
    if not weight.name.endswith(("attention.qkv.weight", "attention.qkv.bias")):
        return part
    size = model.head_size
    groups = model.kv_heads // tensor
    heads = model.num_attention_heads // model.kv_heads  # query heads of a group
    # Megatron: [q₀ … q₍h₋₁₎, k, v] of group 0, then of group 1, …; here all q, then all k, then all
    # v.
    by_group = part.unflatten(0, (groups, (heads + 2) * size))
    kinds = by_group.split((heads * size, size, size), dim=1)
    return torch.cat([kind.flatten(0, 1) for kind in kinds])


def _fields(args: dict[str, Any], vocab_size: int | None) -> dict[str, Any]:
    """Translate Megatron's arguments into the `model:` section. Raises ConfigError for what models
    like Llama lack."""
    # Arguments that change what the model computes, with the values that are known.
    only = {
        "swiglu": (True,), "normalization": ("RMSNorm",), "position_embedding_type": ("rope",),
        "add_bias_linear": (False,), "rotary_percent": (1.0,), "num_experts": (None,), "rotary_interleaved": (False,),
        "apply_layernorm_1p": (False,), "multi_latent_attention": (False,), "window_size": (None,),
        "rotary_seq_len_interpolation_factor": (None, 1), "qk_layernorm": (False, True), "add_qkv_bias": (False, True),
    }  # fmt: skip
    required = ("swiglu", "normalization", "position_embedding_type", "add_bias_linear")
    for name, allowed in only.items():
        # Older versions lack some arguments, and computed as their first value says.
        value = args.get(name, None if name in required else allowed[0])
        if value not in allowed:
            raise ConfigError(
                f"Megatron's checkpoint has {name} = {shown(value)}; models like Llama have {allowed[0]!r}"
            )
    try:
        heads = args["num_attention_heads"]
        if vocab_size is None:
            vocab_size = args.get("vocab_size") or args["padded_vocab_size"]
        fields = {
            "vocab_size": vocab_size,
            "hidden_size": args["hidden_size"],
            "intermediate_size": args["ffn_hidden_size"],
            "num_layers": args["num_layers"],
            "num_attention_heads": heads,
            "num_kv_heads": args["num_query_groups"]
            if args.get("group_query_attention")
            else heads,
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
        fields["rope_scaling"] = {
            "type": "llama3",
            "factor": args.get("rope_scaling_factor") or 8.0,
        }
    qk_norm, qkv_bias = args.get("qk_layernorm"), args.get("add_qkv_bias")
    if qk_norm and qkv_bias:
        raise ConfigError(
            "Megatron's checkpoint has both qk_layernorm and add_qkv_bias, as no known family has"
        )
    fields["family"] = "llama"
    if qk_norm:
        fields["family"] = "qwen3"
    elif qkv_bias:
        fields["family"] = "qwen2"
    return fields


def _args(saved: Any, path: Path) -> dict[str, Any]:
    """Return the arguments that Megatron has saved with a checkpoint. Raises CheckpointError."""
    args = saved.get("args") if isinstance(saved, Mapping) else None
    state = args.state if isinstance(args, Unknown) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} does not hold the arguments of the run that wrote it")
    # Only numbers, words and truth values are asked for. Anything else might make a message
    # endless.
    plain = (int, float, str, type(None))
    return {name: value for name, value in state.items() if isinstance(value, plain)}


def _ours(name: str, first_layer: int = 0) -> str | None:
    """Return megalite's name for one of Megatron's, or None if it is not a known weight.

    `first_layer` is the number of its layer 0 in the whole model."""
    # Three generations of names: language_model.encoder.*, language_model.transformer.*, decoder.*.
    name = name.removeprefix("language_model.")
    name = re.sub(r"^(encoder|transformer)\.", "decoder.", name)
    if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
        known = LAYER.get(match[2])
        return known and f"layers.{first_layer + int(match[1])}.{known}"
    return ENDS.get(name)


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every value of nested dictionaries, by its whole dotted name.

    Raises CheckpointError if a dictionary is in two places, or within itself: the walk might never
    end."""
    seen = {id(values)}
    pending = [("", values)]
    while pending:
        prefix, inner = pending.pop()
        for key, value in inner.items():
            name = prefix + (key if isinstance(key, str) else shown(key))
            if not isinstance(value, Mapping):
                yield name, value
            elif id(value) in seen:
                raise CheckpointError(
                    f"{prefix}{shown(key)} is a dictionary that is elsewhere as well"
                )
            else:
                seen.add(id(value))
                pending.append((f"{name}.", value))


def _unknown(path: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name} is no weight of a model like Llama")


def _sizes(values: Any) -> tuple[int, ...]:
    """Return the sizes, or the offsets, of a tensor. Raises CheckpointError if they are none."""
    sizes = tuple(values)
    if not all(isinstance(size, int) and 0 <= size < 2**48 for size in sizes):
        raise CheckpointError(f"a tensor has the shape {shown(sizes)}, which is none")
    return sizes


class _RankFiles:
    """Reads the format "torch": a file for each tensor and pipeline rank.

    Layers are numbered from 0 in every pipeline stage (Megatron calls it a model chunk)."""

    def __init__(self, folder: Path):
        self.folder = folder
        # By pipeline rank, then by tensor rank.
        grid: dict[int, dict[int, Path]] = {}
        for path in sorted(folder.glob("mp_rank_*/model_optim_rng.pt")):
            match = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", path.parent.name)
            if match is None:
                raise CheckpointError(
                    f"{path.parent}: neither mp_rank_TENSOR nor mp_rank_TENSOR_PIPELINE"
                )
            tensor_rank, pipeline_rank = int(match[1]), int(match[2] or 0)
            grid.setdefault(pipeline_rank, {})[tensor_rank] = path
        self.tensor = len(grid[0]) if 0 in grid else 0
        self._found: dict[str, list[Any]] = {}
        """By megalite's name, a StoredTensor of each tensor rank."""
        saved = []
        for _, paths in sorted(grid.items()):
            saved.append([TorchFile(path).load() for _, path in sorted(paths.items())])
        # What the folder holds must be what its arguments say: a lost file would go unnoticed
        # otherwise.
        if any(len(row) != self.tensor for row in saved):
            raise CheckpointError(
                f"{folder}: files of some ranks are missing: {sum(map(len, saved))} are there"
            )
        self.args = _args(saved[0][0], folder)
        for axis, found in (("tensor", self.tensor), ("pipeline", len(saved))):
            if (size := self.args.get(f"{axis}_model_parallel_size", found)) != found:
                raise CheckpointError(
                    f"{folder}: was written over {axis} {shown(size)}, but has files of {found}"
                )
        first = 0
        with reading(f"{folder}: what its files hold", CheckpointError):
            whole = saved[0][0]
            chunks = ["model"]
            if "model" not in whole:
                chunks = [key for key in whole if re.fullmatch(r"model\d+", str(key))]
            # Interleaved: the first chunks of all ranks come before the second of any.
            for chunk in chunks:
                for of_ranks in saved:
                    shards = [dict(_flat(rank[chunk])) for rank in of_ranks]
                    first += self._take(shards, first)

    def _take(self, ranks: list[dict[str, Any]], first: int) -> int:
        """Take the weights of one model chunk, as each tensor rank stores them. Returns its number
        of layers.

        `first` is the number of its first layer in the whole model."""
        # Layers that this chunk brings; the next chunk's numbers go on behind them.
        layers = set()
        for name in dict.fromkeys(name for rank in ranks for name in rank):
            values = [rank.get(name) for rank in ranks]
            are_tensors = [isinstance(value, StoredTensor) for value in values]
            if (ours := _ours(name, first)) is None:
                # A tensor that is silently left out might be part of what the model computes.
                if any(are_tensors) and not NO_WEIGHTS.search(name):
                    raise _unknown(self.folder, name)
                continue
            if not all(are_tensors):
                raise CheckpointError(f"{self.folder}: {name} is not a tensor on every tensor rank")
            # The last pipeline stage stores a tied embedding again.
            if not _equal(self._found.setdefault(ours, values), values):
                raise CheckpointError(
                    f"{self.folder}: {ours} is stored twice, with different values"
                )
            if ours.startswith("layers."):
                layers.add(ours.split(".")[1])
        return len(layers)

    def names(self) -> set[str]:
        return set(self._found)

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        return [part.shape for part in self._found[name]]

    def read(self, name: str) -> list[Tensor]:
        return [part.read() for part in self._found[name]]


def _equal(first: list[Any], second: list[Any]) -> bool:
    if first is second:  # the usual case: a weight that is stored once
        return True
    return all(torch.equal(a.read(), b.read()) for a, b in zip(first, second, strict=True))


class _Pieces:
    """Reads the format "torch_dist", files of torch.distributed.checkpoint: pieces of whole
    tensors."""

    tensor = 1

    def __init__(self, folder: Path):
        self.folder = folder
        common = TorchFile(folder / "common.pt").load()
        self.args = _args(common, folder / "common.pt")
        metadata = load_pickle(folder / ".metadata")
        self._shapes: dict[str, tuple[int, ...]] = {}
        """By Megatron's name."""
        self._pieces: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
        """By Megatron's name: the offset of each piece in the tensor, and where its bytes are."""
        self._where: dict[str, tuple[str, int | None]] = {}
        """By megalite's name: Megatron's, and the layer in a tensor of all layers."""
        # Indices and places are dataclasses of torch, which stand here as `Unknown` with their
        # attributes.
        with reading(f"{folder}/.metadata of torch.distributed.checkpoint", CheckpointError):
            for name, stored in metadata.state["state_dict_metadata"].items():
                if "size" in stored.state and not NO_WEIGHTS.search(name):
                    self._shapes[name] = _sizes(stored.state["size"])
            for index, place in metadata.state["storage_data"].items():
                if isinstance(name := index.state["fqn"], str) and name in self._shapes:
                    offset = _sizes(index.state["offset"] or ())
                    self._pieces.setdefault(name, []).append((offset, place.state))
        # A number takes a byte at least: no damaged shape may make us allocate more than the files
        # hold.
        most = sum(path.stat().st_size for path in folder.glob("*.distcp"))
        for name, shape in self._shapes.items():
            if math.prod(shape) > most:
                raise CheckpointError(
                    f"{folder}: {name} has shape {shown(shape)}, which is more than its files hold"
                )
            plain = name.removeprefix("model.")
            stacked = re.fullmatch(r"decoder\.layers\.(\D.*)", plain)
            if stacked and (shape[:1] != (self.args.get("num_layers"),) or shape[0] > MOST_LAYERS):
                raise CheckpointError(
                    f"{folder}: {name} is of another number of layers than the model"
                )
            numbers = range(shape[0]) if stacked else [None]
            for number in numbers:
                ours = _ours(f"decoder.layers.{number}.{stacked[1]}" if stacked else plain)
                if ours is None:
                    raise _unknown(folder, name)
                if ours in self._where:
                    raise CheckpointError(
                        f"{folder}: {ours} is stored twice: {self._where[ours][0]} and {name}"
                    )
                self._where[ours] = (name, number)

    def names(self) -> set[str]:
        return set(self._where)

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        stored, layer = self._where[name]
        return [self._shapes[stored] if layer is None else self._shapes[stored][1:]]

    def read(self, name: str) -> list[Tensor]:
        stored, layer = self._where[name]
        what = f"{self.folder}: the pieces of {stored} do not fit together, so that it"
        with reading(what, CheckpointError):
            return [self._read(stored, layer)]

    def _pieces_at(
        self, stored: str, layer: int | None
    ) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
        """Return (where it begins, where its bytes are) of each piece of a tensor; of a tensor of
        all layers, of those that may reach into `layer`."""
        shape = self._shapes[stored]
        pieces = [(offset or (0,) * len(shape), at) for offset, at in self._pieces.get(stored, ())]
        if layer is None:
            return pieces
        # How far a piece reaches is known only when it is read. But pieces share no element: of those
        # in one place of their layers, the last that begins by this one is the only one to reach it.
        last: dict[tuple[int, ...], int] = {}
        for (first, *place), _ in pieces:
            if first <= layer:
                last[tuple(place)] = max(first, last.get(tuple(place), 0))
        return [(begin, at) for begin, at in pieces if last.get(begin[1:]) == begin[0]]

    def _read(self, stored: str, layer: int | None) -> Tensor:
        """Put a whole tensor together from its pieces; of a tensor of all layers, that of one
        `layer`."""
        shape = self._shapes[stored]
        whole: Tensor | None = None
        # Which elements have come: pieces must cover all of the tensor, and none of it twice.
        filled = torch.zeros(shape if layer is None else shape[1:], dtype=torch.bool)
        for begin, place in self._pieces_at(stored, layer):
            path = beside(self.folder, place["relative_path"], self.folder / ".metadata")
            piece = TorchFile(path, place["offset"], place["length"]).load().read()
            # A piece may lack the dimension of the layers.
            piece = piece.reshape((1,) * (len(shape) - piece.dim()) + piece.shape)
            if layer is not None:
                if begin[0] + len(piece) <= layer:
                    continue
                piece = piece[layer - begin[0]]
                begin = begin[1:]
            if whole is None:
                whole = piece.new_empty(filled.shape)
            where = tuple(
                slice(low, low + size) for low, size in zip(begin, piece.shape, strict=True)
            )
            if filled[where].any():
                raise CheckpointError(f"{self.folder}: a piece of {stored} is there twice")
            whole[where] = piece
            filled[where] = True
        if whole is None or not filled.all():
            raise CheckpointError(f"{self.folder}: pieces of {stored} are missing")
        return whole
