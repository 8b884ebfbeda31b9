"""Decides which stored tensors without a weight may be ignored, because they say nothing new. All
others are errors: nothing that was trained may be dropped unseen.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from megalite.checkpoint.tensors import CheckpointError, TensorFolder
from megalite.comm.mesh import ALONE, Axis
from megalite.config import Config, ModelConfig
from megalite.models import peft, weight_table
from megalite.models.heads import names_of, own_table
from megalite.models.hf import stored_names
from megalite.models.projections import PREFIX

BLOCK_BYTES = 2**24
"""Bytes of a tensor that a comparison reads at a time."""
MASK = re.compile(r"\.(attn|attention)\.bias$")
MASKED = re.compile(r"\.(attn|attention)\.masked_bias$")
FREQUENCIES = re.compile(r"\.rotary_emb\.inv_freq$")
POSITIONS = re.compile(r"\.embeddings\.position_ids$")
"""Buffers that older versions of transformers stored: causal masks and what they fill with (GPT-2,
GPT-NeoX), rotary frequencies, numbers of positions (BERT)."""


def unneeded(
    source: TensorFolder, model: ModelConfig, head_is_replaced: bool, ranks: Axis = ALONE
) -> set[str]:
    """Return the names of stored tensors in `source` that `model` does without. Each of `ranks`
    compares its share of what should be copies.

    These are the second copy of a tied head, and other copies of a weight, a head that another one
    replaces (`head_is_replaced`), and causal masks and rotary frequencies that are as the model
    computes them. Raises CheckpointError for a tied head, or another copy, that is not one, and for
    frequencies that contradict config.json."""
    found = {name for name in source.files if _is_computed(source, name, model)}
    embedding, head = ends_of(model)
    if head in source.files and (head_is_replaced or model.tie_embeddings):
        if not head_is_replaced:
            _check_copy(source, embedding, head, model, ranks)
        # A tied head that is stored is read from the embedding; it was only compared.
        found.add(head)
    if head_is_replaced:
        found |= names_of(own_table(model)) - names_of(weight_table(model))
    # What a distillation projected hidden states by is no part of the model.
    needed = names_of(weight_table(model))
    found |= {name for name in source.files if name.startswith(PREFIX) and name not in needed}
    starts = model.starts_of_spare(source.files)
    found |= {name for name in source.files if name.startswith(starts)}
    copies = dict.fromkeys(model.COPIES, embedding)
    copies |= {copy: row.hf[0] for row in weight_table(model) for copy in row.copies}
    for copy, of in copies.items():
        if not {copy, of} <= source.files.keys():
            continue
        if source.shape(copy) != source.shape(of):
            raise CheckpointError(f"{source.folder}: {copy} must be a copy of {of}, of its shape")
        if (row := _first_difference(source, of, copy, ranks)) is not None:
            raise CheckpointError(
                f"{source.folder}: {copy} must be a copy of {of}, but row {row} is the first that differs"
            )
        found.add(copy)
    return found | source.files.keys() & set(model.SPARE) - names_of(weight_table(model))


def left_behind(config: Config) -> list[str]:
    """Return a line about what the published model that an encoder's run starts from has for other
    tasks, and the run's checkpoints will not have; nothing where they have all of it."""
    model, folder = config.model, config.model.hf
    if folder is None or config.lora or model.task != "masked":
        return []
    source = peft.base_of(folder) if peft.is_adapter(folder) else folder
    needed, stored = names_of(weight_table(model)), stored_names(source)
    prefix = weight_table(model)[0].hf[0].partition(".")[0] + "."
    # Files of the model without a head do without its prefix; a head's bias is stored twice.
    lost = {
        name.rpartition(".")[0]
        for name in model.SPARE
        if name not in needed
        and {name, name.removeprefix(prefix)} & stored
        and not name.endswith(".decoder.bias")
    }
    if not lost:
        return []
    return [f"{folder}: {' and '.join(sorted(lost))} will not be in the run's checkpoints"]


def ends_of(model: ModelConfig) -> tuple[str, str]:
    """Return Hugging Face's names of the embedding and of the head that predicts tokens, tied or
    not."""
    untied = own_table(model.model_copy(update={"tie_embeddings": False}))
    names = {weight.name: weight.hf[0] for weight in untied}
    return names["embedding.weight"], names["head.weight"]


def _check_copy(
    source: TensorFolder, embedding: str, head: str, model: ModelConfig, ranks: Axis
) -> None:
    """Raise CheckpointError unless the stored head is a copy of the embedding."""
    if embedding not in source.files:
        return  # which `TensorFolder.check` says
    shapes = [source.shape(name) for name in (embedding, head)]
    if shapes[0] != shapes[1]:
        why = f"the shapes are {list(shapes[1])} and {list(shapes[0])}"
    elif (row := _first_difference(source, embedding, head, ranks)) is not None:
        why = f"row {row} is the first that differs"
    else:
        return
    may_be_untied = type(model).model_fields["tie_embeddings"].annotation is bool
    use = (
        f"To use the stored {head}, write tie_word_embeddings = false into config.json; to"
        if may_be_untied
        else "To"
    )
    raise CheckpointError(
        f"{source.folder}: with tie_word_embeddings = true (in config.json, or by default) {head} is {embedding}, but "
        f"both are stored and {why}. {use} do without it, remove {head} from the file"
    )


def _first_difference(source: TensorFolder, one: str, other: str, ranks: Axis) -> int | None:
    """Return the first row in which two tensors of one shape differ, or None. Reads block by block
    up to there; each of `ranks` every so many blocks, as embeddings may be of gigabytes."""
    num_rows, *rest = source.shape(one)
    step = max(1, BLOCK_BYTES // (4 * max(1, torch.Size(rest).numel())))
    for start in range(ranks.rank * step, num_rows, ranks.size * step):
        rows = (slice(start, min(start + step, num_rows)),)
        a = source.fetch(one, rows)
        b = source.fetch(other, rows)
        if a.dtype != b.dtype:
            # Both are exact in fp64: bf16 and fp32 copies of one tensor are equal only where
            # nothing was rounded.
            a, b = a.double(), b.double()
        if not torch.equal(a, b):
            differs = (a != b).flatten(1).any(1)
            return start + int(differs.nonzero()[0])
    return None


def _is_computed(source: TensorFolder, name: str, model: ModelConfig) -> bool:
    """Return whether a stored buffer holds what the model computes anyway."""
    # A mask is [1,1,T,T]; another shape is something else.
    if MASK.search(name) and len(source.shape(name)) == 4:
        mask = _whole(source, name)
        causal = torch.ones_like(mask, dtype=torch.bool).tril()
        return torch.equal(mask != 0, causal)
    if MASKED.search(name) and torch.Size(source.shape(name)).numel() == 1:
        return float(_whole(source, name)) < -9000  # -10,000 in bf16 is -9,984
    if POSITIONS.search(name):
        numbers = _whole(source, name).flatten()
        return torch.equal(numbers, torch.arange(len(numbers)))
    if FREQUENCIES.search(name) and hasattr(model, "rope_theta"):
        _check_frequencies(source, name, model)
        return True
    return False


def _check_frequencies(source: TensorFolder, name: str, model: ModelConfig) -> None:
    """Raise CheckpointError unless stored rotary frequencies are those that config.json gives."""
    size, theta, scaling = (
        getattr(model, field) for field in ("rotary_size", "rope_theta", "rope_scaling")
    )
    plain_R = theta ** -(torch.arange(0, size, 2).float() / size)
    allowed = [plain_R]
    if scaling:
        # Long sequences may have frequencies of their own.
        allowed += [scaling.stretch(plain_R, length, theta) for length in (1, model.max_positions)]
    stored_R = _whole(source, name).float()
    for R in allowed:
        # Many were rounded to 16 bits; those of another theta differ by far more.
        if R.shape == stored_R.shape and torch.allclose(stored_R, R, rtol=1e-2, atol=1e-7):
            return
    raise CheckpointError(
        f"{source.folder}: the stored rotary frequencies {name} are not those that config.json gives "
        f"(rope_theta = {theta:g}); correct rope_theta there, or remove the tensor if config.json is right"
    )


def _whole(source: TensorFolder, name: str) -> Tensor:
    return source.fetch(name, (slice(None),) * len(source.shape(name)))
