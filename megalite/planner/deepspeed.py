"""Predicts what DeepSpeed's engine holds, whose stages of ZeRO each have other buffers.

Its gradients come from autograd, in the weights' precision, and are summed and cut up in fp32. So
either of two moments of a step is the fullest: the begin of a backward pass, where most is kept for
it, or where a gradient is reduced. `tests/planner/test_planner_deepspeed.py` holds this against its
own code, run dry. Parameters or optimizer states on the host or a disk are not modelled: they count
as if they were on the GPU."""

from __future__ import annotations

from megalite.config import Config
from megalite.engine.gather import PIECE
from megalite.engine.layout import bucket_elements
from megalite.plan import Plan
from megalite.planner.activations import FP32, PartBytes
from megalite.planner.sizes import StageSizes

FP64 = 8
REDUCED_AT_ONCE = 500_000_000
"""Elements that stage 1 in bf16 puts together for an all-reduce; DeepSpeed's own constant."""
MOST_GATHERED = 1_000_000_000
"""Elements of gathered weights that stage 3 keeps (stage3_max_live_parameters)."""


def deepspeed_bytes(
    plan: Plan,
    config: Config,
    size: StageSizes,
    stage: PartBytes,
    head: PartBytes,
    passes: int,
    states: int,
) -> dict[str, int]:
    """Return the bytes that are others under DeepSpeed, by their names in `Memory`, and those of
    the `passes` at the step's peak.

    It has no pipeline: `size` and `stage` are those of all layers, `head` of what follows them;
    `passes` is held at most by passes, and `states` by the optimizer, under the native engine."""
    trained = size.trained
    element = 2 if config.train.precision == "bf16" else FP32
    share, largest = -(-trained.total // plan.replicas), trained.largest
    bucket = bucket_elements(config, plan)
    gathered = element * min(size.total, MOST_GATHERED)
    # The loss has been computed, and the gradient of the head is there.
    behind_head = max(stage.kept - head.kept, 0)
    is_begun = plan.micro_batches > 1
    gradients, buffers = FP32 * share, 0
    if plan.zero_stage == 3:
        buffers = FP32 * bucket
        reducing = (FP32 + element) * largest + behind_head + element * (largest + bucket)
        fullest = max(passes + gathered, reducing)
    elif plan.zero_stage == 2:
        piece = min(largest, share)
        # Slices go one by one, or many as one tensor, which is another copy.
        sent = FP32 * piece
        if piece <= bucket:
            sent = (FP32 + element) * min(bucket + piece, max(largest, bucket))
        reducing = sent + element * (largest + bucket)
        fullest = max(
            passes - (0 if is_begun else gradients),
            reducing + behind_head,
            # At the embedding a share's own gradients are kept, of whole weights.
            reducing + element * largest,
            FP64 * piece,  # of which the norm is computed
        )
    else:
        gradients = FP32 * trained.total
        fullest = passes  # of fp32 weights, autograd's own gradients are summed
        if element != FP32:
            own = element * trained.total
            at_once = FP32 * max(largest, min(trained.total, REDUCED_AT_ONCE))
            fullest = max(passes + (own if is_begun else 0), own + at_once)
    return {
        "gradients": gradients,
        # fp32 weights have a master copy all the same.
        "optimizer": states + (FP32 * share if element == FP32 else 0),
        "passes": fullest,
        "buffers": buffers,
        "checkpoint": _saved(plan, config, size, gradients),
    }


def _saved(plan: Plan, config: Config, size: StageSizes, gradients: int) -> int:
    """Count what a rank holds beside weights and states while it puts the largest weight together,
    of other tensor ranks' parts piece by piece."""
    largest, is_bf16 = size.trained.largest, config.train.precision == "bf16"
    whole = FP32 * largest
    if plan.tensor > 1:
        whole += FP32 * min(PIECE, plan.tensor * largest)
    if plan.zero_stage == 3:
        # Weights that a validation has gathered stay, with the one that was one too many: up to
        # so many.
        gathered = (2 if is_bf16 else FP32) * min(size.total, MOST_GATHERED + size.largest)
        return whole + gradients + gathered + FP32 * bucket_elements(config, plan)
    return whole + (gradients if plan.zero_stage == 1 and is_bf16 else 0)
