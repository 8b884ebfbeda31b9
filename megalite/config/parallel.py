"""The section `parallel`: how a model is spread over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megalite.config.section import Section


class OffloadConfig(Section):
    """What DeepSpeed keeps outside of the GPU's memory."""

    optimizer: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where the optimizer's state is kept."
    )
    parameters: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where the weights are kept. Needs zero_stage: 3."
    )
    nvme_path: Path | None = Field(
        None, description="Folder on a fast disk of each node, for nvme."
    )

    @model_validator(mode="after")
    def _nvme_has_a_path(self) -> OffloadConfig:
        if "nvme" in (self.optimizer, self.parameters) and self.nvme_path is None:
            raise ValueError("nvme needs nvme_path, a folder on a fast disk of each node")
        return self


class ParallelConfig(Section):
    """How the model is spread over the ranks. Data parallelism takes the ranks that these leave
    over."""

    tensor: int = Field(1, gt=0, description="Tensor-parallel ranks, which share every matrix.")
    sequence: bool = Field(
        True,
        description="Sequence parallelism: also split norms and dropout along the sequence. No effect at tensor: 1.",
    )
    tensor_overlap: bool = Field(
        False,
        description="Overlap the collectives of sequence parallelism with matrix products, between GPUs of one host "
        "(Megatron's --tp-comm-overlap).",
    )
    pipeline: int = Field(
        1, gt=0, description="Pipeline-parallel ranks, which each hold some of the layers."
    )
    virtual: int = Field(
        1,
        gt=0,
        description="Groups of layers on each pipeline rank. Values above 1 interleave them.",
    )
    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = Field(
        "1f1b", description="Order of a pipeline's passes. interleaved needs virtual above 1."
    )
    stage_layers: tuple[int, ...] | None = Field(
        None,
        description="Layers of each of the pipeline × virtual stages. Balanced by cost where left out.",
    )
    context: int = Field(1, gt=0, description="Context-parallel ranks, which share every sequence.")
    context_method: Literal["ring", "ulysses"] = Field(
        "ring",
        description="How they attend. ring: keys and values travel around, and are gathered where scores have a bias; "
        "ulysses: each rank gets all tokens of some heads, which context × tensor must divide.",
    )
    context_balance: Literal["sequence", "documents"] | None = Field(
        None,
        description="What each context rank takes a front and a back piece of, to have as much attention to compute "
        "as the others. sequence: the whole sequence; documents: each document of it. null: documents where "
        "data.document_mask packs them into a ring, and train.fp8 is not set.",
    )
    expert: int = Field(
        1,
        gt=0,
        description="Expert-parallel ranks, which each hold some of the experts. They are the tensor, context and data "
        "ranks of a pipeline stage once more.",
    )
    expert_tensor: int | None = Field(
        None,
        gt=0,
        description="Ranks that share every matrix of an expert. null: as many as tensor ranks.",
    )
    engine: Literal["native", "deepspeed"] = Field(
        "native", description="What reduces gradients and updates weights."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="What the data ranks shard. 0: nothing; 1: optimizer state; 2: also gradients; 3: also weights.",
    )
    offload: OffloadConfig = OffloadConfig()
    bucket_mb: float | None = Field(
        None,
        gt=0,
        description="Size of a bucket of gradients, which are reduced at once, in MB of fp32. null: 1 for each "
        "replica, and 40 at least.",
    )
    elastic: bool = Field(
        False,
        description="Continue with fewer nodes where some are lost. micro_batch_size is then an upper limit.",
    )
