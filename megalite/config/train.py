"""The section `train`: length, batches, precision and memory of a run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from megalite.config.section import Section
from megalite.utils.counts import parse_count

LARGEST_BATCH = 10**9
"""Limit on `global_batch_size`. What divides it is searched for."""
MOST_BATCH_SIZES = 10_000
"""Limit on the sizes that a batch grows through; each step looks at all of them."""


class BatchRampConfig(Section):
    """A global batch size that grows over the first samples (as Megatron-LM's
    --rampup-batch-size)."""

    start: int = Field(gt=0, description="Sequences per optimizer step at first.")
    increment: int = Field(gt=0, description="Sequences by which it grows at a time.")
    samples: int = Field(
        gt=0,
        description="Samples after which it is train.global_batch_size; it grows evenly up to it.",
    )


FP8_BLOCK = 128
"""Rows and columns of a weight that share a scale under `train.fp8.recipe: blockwise`."""


class Fp8Config(Section):
    """Compute the products of the layers' linear modules in fp8: x · Wᵀ and both gradients. Weights,
    gradients, optimizer states and checkpoints stay as they are without it."""

    recipe: Literal["current", "rowwise", "blockwise", "mxfp8", "nvfp4"] = Field(
        "blockwise",
        description="Numbers that share a scale. blockwise: 128 of activations and gradients, 128 × 128 of weights; "
        "mxfp8: 32; rowwise: a row; current: a whole matrix; nvfp4: 16 numbers of 4 bits, a study on any device.",
    )
    # As Megatron-LM's --first-last-layers-bf16: rounding costs most at the ends of a model.
    first_last_bf16: tuple[int, int] = Field(
        (1, 1), description="How many of the first and of the last layers stay as they are."
    )
    exclude: tuple[str, ...] = Field(
        (), description="Hugging Face's names of modules that stay as they are, such as down_proj."
    )
    # Megatron-LM's --fp8-param-gather; torchtitan's enable_fsdp_float8_all_gather.
    param_gather: bool = Field(
        False,
        description="Gather the weights of these products as codes behind an update, under ZeRO 1 and 2: half of "
        "bf16's bytes, and the same model. For blockwise.",
    )

    @field_validator("first_last_bf16")
    @classmethod
    def _not_negative(cls, layers: tuple[int, int]) -> tuple[int, int]:
        if min(layers) < 0:
            raise ValueError("numbers of layers must not be negative")
        return layers


class FakeQuantizeConfig(Section):
    """Train the model that quantising will make of it (QAT): the layers' matrices are rounded in every
    product as `megalite quantize` rounds them, and gradients go through. Checkpoints are as without
    it."""

    scheme: Literal["w8a8", "w4a16", "fp8", "fp8_block"] = Field(
        "w4a16", description="Scheme of `megalite quantize` that the result is for."
    )
    group: int = Field(
        128,
        gt=0,
        description="Columns that share a scale under w4a16, a multiple of 8; rows and columns under fp8_block.",
    )
    inputs: bool = Field(
        True,
        description="Round the inputs of matrices, too, as vLLM does of these schemes but w4a16. false: weights alone.",
    )
    start_step: int = Field(
        0, ge=0, description="Optimizer steps that are trained before rounding begins."
    )

    @model_validator(mode="after")
    def _whole_words(self) -> FakeQuantizeConfig:
        if self.scheme == "w4a16" and self.group % 8:
            raise ValueError(
                f"group {self.group} must be a multiple of 8: eight numbers share a word"
            )
        return self


class TrainConfig(Section):
    """Length, batch size, precision and memory of training."""

    # The default is not validated: 0, which nobody can give, stands for not known yet.
    steps: int = Field(
        0,
        gt=0,
        description="Optimizer steps of the whole run; the schedule spans them. They follow from `tokens` or `epochs` "
        "where one of these is given.",
    )
    tokens: int | None = Field(
        None,
        gt=0,
        description="Length of the run in tokens, such as 300B, rounded up to whole steps.",
    )
    epochs: float | None = Field(
        None,
        gt=0,
        description="Length of the run in times that all samples of the train sources are as many as it takes, rounded "
        "up to whole steps.",
    )
    patience: int | None = Field(
        None,
        gt=0,
        description="Validations without a new lowest loss after which the run ends early. null: it does not.",
    )
    stop_at: int | None = Field(
        None, gt=0, description="Save and exit after this step, to be resumed later."
    )
    global_batch_size: int = Field(
        gt=0, le=LARGEST_BATCH, description="Sequences per optimizer step, over all ranks."
    )
    batch_ramp: BatchRampConfig | None = None
    micro_batch_size: int = Field(1, gt=0, description="Sequences per forward pass of one rank.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16",
        description="Number format of passes. bf16 keeps weights, gradients and moments in fp32 as well.",
    )
    fp8: Fp8Config | None = None
    fake_quantize: FakeQuantizeConfig | None = None
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="Activations to recompute in the backward pass. selective: what is large and cheap; full: all "
        "of a layer.",
    )
    recompute_layers: int | None = Field(
        None, gt=0, description="How many of each stage's first layers to recompute. null: all."
    )
    compile: bool = Field(
        False,
        description="Run torch.compile on each layer. Not with tensor or context parallelism.",
    )
    loss_chunk: int | None = Field(
        None,
        gt=0,
        description="Number of tokens whose logits exist at a time, at the cost of a second GEMM with the head. "
        "null: all.",
    )
    deterministic: bool = Field(
        False,
        description="Compute the same bits in every run on GPUs too, as on CPUs: no operation adds in the order in "
        "which its parts arrive. Attention's backward pass takes longer.",
    )
    seed: int = Field(
        1234, ge=0, description="Seed of initial weights, order of samples and dropout."
    )

    @model_validator(mode="before")
    @classmethod
    def _no_steps_yet(cls, values: Any) -> Any:
        # A config that was written before its steps were known has `steps: null`; see the
        # serializer below.
        if isinstance(values, dict) and values.get("steps", 0) is None:
            return {name: value for name, value in values.items() if name != "steps"}
        return values

    @field_validator("tokens", mode="before")
    @classmethod
    def _with_a_unit(cls, tokens: Any) -> Any:
        # Before pydantic, to which 300B is no number.
        return int(parse_count(tokens)) if isinstance(tokens, str) else tokens

    @field_serializer("steps")
    def _steps_that_are_known(self, steps: int) -> int | None:
        # Inside, 0 stands for steps that are not known yet: `epochs` needs the data to be counted.
        return steps or None

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        given = [name for name in ("steps", "tokens", "epochs") if getattr(self, name)]
        if not given:
            raise ValueError("give the length of the run: steps, tokens or epochs")
        # `steps` may be given beside one of these: a written config has both, and `of_samples`
        # compares them.
        if given[-2:] == ["tokens", "epochs"]:
            raise ValueError(
                f"tokens {self.tokens} and epochs {self.epochs} are two lengths of the run; give one"
            )
        return self

    @model_validator(mode="after")
    def _ramp_ends(self) -> TrainConfig:
        ramp, whole = self.batch_ramp, self.global_batch_size
        # The last growth must end exactly at the whole batch, whose size the plan is about.
        if ramp and (ramp.start >= whole or (whole - ramp.start) % ramp.increment):
            raise ValueError(
                f"batch_ramp grows from {ramp.start} by {ramp.increment} at a time, which never makes "
                f"global_batch_size {whole}"
            )
        if ramp and (whole - ramp.start) // ramp.increment >= MOST_BATCH_SIZES:
            raise ValueError(
                f"batch_ramp grows from {ramp.start} to global_batch_size {whole} in more than {MOST_BATCH_SIZES:,} "
                f"sizes; raise its increment {ramp.increment}"
            )
        return self

    @property
    def batch_sizes(self) -> list[tuple[int, int]]:
        """Return the global batch sizes that a run has one after another, each with the samples
        from which on it is: those of the run before the step."""
        ramp, whole = self.batch_ramp, self.global_batch_size
        if ramp is None:
            return [(whole, 0)]
        sizes = range(ramp.start, whole + 1, ramp.increment)
        # Rounded up. The last size, the whole one, comes after exactly `ramp.samples`.
        return [
            (size, -(-number * ramp.samples // (len(sizes) - 1)))
            for number, size in enumerate(sizes)
        ]

    def batch_size(self, samples: int) -> int:
        """Return the global batch size of the step that follows the first `samples` samples."""
        return max(size for size, since in self.batch_sizes if since <= samples)

    def samples_after(self, steps: int) -> int:
        """Return how many samples the run has trained on after `steps` steps."""
        return self._walk(steps, None)[1]

    def steps_for(self, samples: int) -> int:
        """Return the fewest steps that train on `samples` samples."""
        return self._walk(None, samples)[0]

    def _walk(self, most_steps: int | None, until: int | None) -> tuple[int, int]:
        """Return the steps and samples of a run of `most_steps` steps, or until it has at least
        `until` samples."""
        sizes, steps, samples = self.batch_sizes, 0, 0
        # Each size with the samples at which the next one begins; the last has no end.
        for (size, _), (_, end) in zip(sizes, [*sizes[1:], (0, None)], strict=True):
            goal = end if until is None else until if end is None else min(end, until)
            # A step that begins below `goal` is made in full, with this size.
            count = None if goal is None else max(0, -(-(goal - samples) // size))
            if most_steps is not None:
                count = most_steps - steps if count is None else min(count, most_steps - steps)
            assert count is not None
            steps, samples = steps + count, samples + count * size
        return steps, samples

    @model_validator(mode="after")
    def _layers_of_something(self) -> TrainConfig:
        if self.recompute_layers is not None and self.recompute == "none":
            raise ValueError("recompute_layers needs recompute: selective or full")
        return self
