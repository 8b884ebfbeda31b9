"""Writes a model as a GGUF file, which llama.cpp and what is built on it run on small machines.

Names come from the gguf package's map, and numbers from its quantisers, Q4_K excepted. llama.cpp
rotates neighbouring numbers of Llama's and Mistral's heads where Hugging Face rotates those half a
head apart: rows of their queries and keys are put beside each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalite.checkpoint.convert import Model, check_new
from megalite.checkpoint.gguf_quants import quantise_q4_k
from megalite.checkpoint.gguf_vocabulary import add_vocabulary
from megalite.checkpoint.tensors import CheckpointError
from megalite.data.tokenizer_files import tokenizer_file
from megalite.errors import ConfigError
from megalite.models import from_hf_config, model_config
from megalite.models.llama import LlamaLike
from megalite.models.rope import LinearScaling, Llama3Scaling
from megalite.models.weights import Weight
from megalite.utils.resources import fsync

KINDS = ("F16", "BF16", "Q8_0", "Q4_K")
"""Types of the numbers of matrices that are written."""
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's names of the families that are written."""
FILE_TYPES = {
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
    "Q4_K": "MOSTLY_Q4_K_S",
}
LESS: dict[str, str] = {"Q4_K": "Q8_0", "Q8_0": "F16"}
"""What is taken where rows do not divide into the blocks of a type."""


class Written(NamedTuple):
    """Tells what was written."""

    kinds: dict[str, int]
    """Matrices of each type."""
    error: float
    """Root mean square of what rounding changed, over that of all numbers of matrices."""


def write_gguf(model: Model, path: Path, kind: str) -> Written:
    """Write `model` to the new file `path`, which appears only when complete; matrices have numbers
    of `kind`, one of `KINDS`, and norms and biases fp32. Under Q4_K embeddings and the head have
    Q8_0.

    One weight is in memory at a time. Raises ConfigError for a model that llama.cpp would compute
    otherwise, DataError for such a tokenizer, and CheckpointError where the file exists."""
    try:
        import gguf
    except ImportError:
        raise ConfigError("--gguf needs the gguf package; pip install 'megalite[gguf]'") from None
    check_new(path)
    config = _checked(model)
    folder = next((each for each in model.extras if tokenizer_file(each)), None)
    if folder is None:
        raise ConfigError(
            f"--gguf {kind}: the model has no tokenizer beside it, which a file needs"
        )
    temporary = path.with_name(f"{path.name}.tmp")
    writer = gguf.GGUFWriter(temporary, ARCHITECTURES[config.family])
    try:
        writer.add_name(path.stem)
        _add_settings(writer, config, kind)
        add_vocabulary(writer, folder, config.vocab_size)
        written = _write(writer, model, config, kind)
        writer.close()
        fsync(temporary)
        temporary.rename(path)
        return written
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}") from None
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def _checked(model: Model) -> LlamaLike:
    """Return the model's config. Raises ConfigError where llama.cpp would compute another model."""
    config = model_config(from_hf_config(model.config))
    names = ", ".join(ARCHITECTURES)
    if config.family not in ARCHITECTURES or config.task != "causal":
        raise ConfigError(
            f"--gguf: the model is of family {config.family} and task {config.task}; causal ones of {names} are written"
        )
    assert isinstance(config, LlamaLike)
    windows = {config.window(layer) for layer in range(config.num_layers)}
    if any(window is not None and window < config.max_positions for window in windows):
        raise ConfigError(
            f"--gguf: the model has sliding windows, which llama.cpp does not give a {config.family}"
        )
    scaling = config.rope_scaling
    if scaling is not None and not isinstance(scaling, LinearScaling | Llama3Scaling):
        raise ConfigError(
            f"--gguf: rope_scaling.type {scaling.type} is not written; linear and llama3 are"
        )
    return config


def _add_settings(writer: Any, config: LlamaLike, kind: str) -> None:
    """Write what describes the model, by llama.cpp's keys."""
    import gguf

    writer.add_file_type(int(gguf.LlamaFileType[FILE_TYPES[kind]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.rotary_size)
    writer.add_rope_freq_base(config.rope_theta)
    if isinstance(config.rope_scaling, LinearScaling):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


def _kind_of(shape: Sequence[int], name: str, kind: str) -> Any:
    """Return the type of a tensor of the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) < 2:
        return GGMLQuantizationType.F32
    # What is looked up and what makes logits are the first to show an error.
    if kind == "Q4_K" and name.startswith(("token_embd", "output.")):
        kind = "Q8_0"
    while shape[-1] % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]:
        kind = LESS[kind]
    return GGMLQuantizationType[kind]


def _names(model: Model, config: LlamaLike) -> dict[str, str]:
    """Return the names of tensors in the file by Hugging Face's. Raises CheckpointError for one
    that has none."""
    import gguf

    arch = next(
        each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.family]
    )
    known = gguf.get_tensor_name_map(arch, config.num_layers)
    found = {}
    for hf in (hf for weight in model.weights for hf in weight.hf):
        name = known.get_name(hf, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise CheckpointError(f"--gguf: {hf} has no name in a file of {config.family}")
        found[hf] = name
    return found


def _beside(x: Tensor, heads: int) -> Tensor:
    """Return the rows of `heads` heads with those beside each other that RoPE rotates together."""
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _stretched(config: LlamaLike, scaling: Llama3Scaling) -> Tensor:
    """Return by what each frequency of RoPE is divided, fp32."""
    size = config.rotary_size
    frequencies = config.rope_theta ** -(torch.arange(0, size, 2).float() / size)
    return frequencies / scaling.stretch(frequencies, 0, config.rope_theta)


def _rows(
    model: Model, config: LlamaLike, names: dict[str, str], weight: Weight
) -> Iterator[tuple[str, Tensor]]:
    """Yield the file's tensors of a weight, by their names there."""
    whole = (model.read_exact or model.read)(weight)
    turned = {"q_proj": config.num_attention_heads, "k_proj": config.kv_heads}
    for hf, tensor in weight.to_hf(whole).items():
        heads = turned.get(hf.split(".")[-2]) if ARCHITECTURES[config.family] == "llama" else None
        yield names[hf], tensor if heads is None else _beside(tensor, heads)


def _write(writer: Any, model: Model, config: LlamaLike, kind: str) -> Written:
    """Write the tensors: first of all names, types and shapes, and then one weight after another."""
    import gguf

    names, factors = _names(model, config), None
    shapes = {
        names[hf]: tuple(x.shape)
        for weight in model.weights
        for hf, x in weight.to_hf(torch.empty(weight.shape, device="meta")).items()
    }
    if isinstance(config.rope_scaling, Llama3Scaling):
        factors = _stretched(config, config.rope_scaling)
        shapes = {"rope_freqs.weight": tuple(factors.shape), **shapes}
    kinds = {name: _kind_of(shape, name, kind) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        block, size = gguf.GGML_QUANT_SIZES[kinds[name]]
        num_bytes = prod(shape) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    wrong, total = 0.0, 0.0
    for weight in model.weights:
        for name, tensor in _rows(model, config, names, weight):
            numbers = tensor.float().contiguous().numpy()
            stored = encoded(numbers, kinds[name])
            writer.write_tensor_data(stored)
            if numbers.ndim > 1:
                found = gguf.dequantize(stored, kinds[name])
                wrong += float(np.square(found - numbers, dtype=np.float64).sum())
                total += float(np.square(numbers, dtype=np.float64).sum())
    of_matrices = Counter(kinds[name].name for name, shape in shapes.items() if len(shape) > 1)
    return Written(dict(of_matrices), (wrong / total) ** 0.5 if total else 0.0)


def encoded(numbers: NDArray[np.float32], kind: Any) -> NDArray[Any]:
    """Return numbers as a tensor of a file holds them. Raises CheckpointError for what fp16 cannot
    hold."""
    import gguf

    if kind == gguf.GGMLQuantizationType.Q4_K:
        return quantise_q4_k(numbers)
    with np.errstate(over="ignore"):
        stored: NDArray[Any] = gguf.quantize(numbers, kind)
    if kind == gguf.GGMLQuantizationType.F16 and not np.isfinite(stored).all():
        raise CheckpointError(
            f"a weight goes up to {np.abs(numbers).max():.3g}, which F16 cannot hold; take BF16"
        )
    return stored
