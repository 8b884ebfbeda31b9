"""Prints an estimate, or a ranking of them, as text of about 100 columns."""

from __future__ import annotations

from megalite.errors import ConfigError
from megalite.kernels.fp8 import Name
from megalite.planner.estimate import Estimate, usable_bytes
from megalite.planner.network import Network, place
from megalite.planner.search import Found
from megalite.utils.counts import parse_count

MOST_ROWS = 16
"""Largest number of pipeline ranks in the memory table. Of more, the first, the fullest and the
last few are shown."""

GIB = 2**30


def describe(estimate: Estimate, tokens: float | None = None) -> str:
    """Describe an estimate. `tokens` is the length of the training (default: that of the config's
    steps)."""
    sections = [
        _header(estimate),
        _step(estimate),
        _memory(estimate),
        _traffic(estimate),
        _duration(estimate, tokens),
        _assumptions(estimate),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def describe_search(found: Found) -> str:
    """Describe the result of a search: how many layouts there were, and a table of the best."""
    plan = found.best[0].plan
    chip = found.best[0].hardware.chip.chip
    lines = [
        f"{found.num_layouts:,} layouts on {plan.world_size} × {chip}; "
        f"{found.num_refused:,} refused by the plan, {found.num_too_large:,} looked at that fit in no way, "
        f"{found.num_simulated:,} simulated",
        "",
        _layout_row(*LAYOUT_COLUMNS),
    ]
    for number, one in enumerate(found.best, start=1):
        plan = one.plan
        train = one.config.train
        memory = one.fullest.total / GIB
        row = _layout_row(
            number,
            plan.tensor,
            plan.pipeline,
            plan.context,
            plan.data,
            " × ".join(map(str, plan.experts[::-1])) if plan.folds_experts else "-",
            plan.virtual,
            plan.schedule if plan.pipeline > 1 else "-",
            train.micro_batch_size,
            plan.zero_stage,
            train.recompute,
            _seconds(one.step_time_s),
            f"{one.mfu:.1%}",
            f"{memory:.1f}GiB",
            f"{one.bubble:.1%}",
        )
        lines.append(row)
    return "\n".join(lines)


LAYOUT_COLUMNS = {
    "#": 2,
    "tensor": 7,
    "pipe": 5,
    "ctx": 4,
    "data": 5,
    "expert": 7,
    "virt": 5,
    "schedule": -13,
    "micro": 5,
    "zero": 5,
    "recompute": -11,
    "step": 8,
    "MFU": 7,
    "memory": 9,
    "bubble": 7,
}
"""Columns of a search's table and their widths; negative: aligned to the left, after a space."""


def _layout_row(*values: object) -> str:
    """Format a row of a search's table."""
    text = ""
    for value, width in zip(values, LAYOUT_COLUMNS.values(), strict=True):
        if width > 0:
            text += f"{value:>{width}}"
        else:
            text += f" {value:<{-width - 1}}"
    return text


def _header(estimate: Estimate) -> list[str]:
    """Describe model, hardware, layout and batch."""
    plan, config, hardware = estimate.plan, estimate.config, estimate.hardware
    axes = {
        "pipeline": plan.pipeline,
        "data": plan.data,
        "context": plan.context,
        "tensor": plan.tensor,
    }
    if plan.folds_experts:
        axes |= {"expert": plan.experts.expert, "expert tensor": plan.experts.tensor}
    model = config.model.preset or config.model.family
    used = [f"{name} {size}" for name, size in axes.items() if size > 1]
    layout = " × ".join(used) or "one rank"
    if plan.pipeline > 1:
        stages = _number(plan.virtual, "stage")
        layout += f"; {plan.schedule}, {stages} a rank"
    nodes = -(-plan.world_size // hardware.gpus_per_node)
    joined = "one node"
    if nodes > 1:
        joined = f"{nodes} nodes of {hardware.gpus_per_node}, {hardware.interconnect.interconnect}"
    parameters = _count(plan.num_params)
    gpus = f"{plan.world_size} × {hardware.chip.chip}"
    micro_batches = _number(plan.micro_batches, "micro-batch", "es")
    sequence = "on" if plan.sequence else "off"
    return [
        f"{model}, {parameters} parameters, on {gpus} ({joined})",
        layout,
        f"{micro_batches} of {plan.micro_batch_size} × {config.sample_tokens:,} tokens a rank; "
        f"ZeRO stage {plan.zero_stage}; recompute {config.train.recompute}; sequence parallel {sequence}",
    ]


def _number(count: int, what: str, plural: str = "s") -> str:
    if count == 1:
        return f"1 {what}"
    return f"{count:,} {what}{plural}"


def _step(estimate: Estimate) -> list[str]:
    """List the times of a step and what follows from them."""
    passes = estimate.timeline.passes_end
    tokens_a_gpu = estimate.tokens_per_s / estimate.plan.world_size
    tflops = estimate.mfu * estimate.hardware.chip.bf16_tflops
    rows = [
        ("step", _seconds(estimate.step_time_s), f"{estimate.plan.tokens_per_step:,} tokens"),
        (
            "  passes",
            _seconds(passes),
            f"of which the average rank waits {estimate.bubble:.1%} (bubble)",
        ),
        (
            "  reduction not hidden",
            _seconds(estimate.exposed_s),
            "of gradients, after the last pass",
        ),
        ("  norm and optimizer", _seconds(estimate.optimizer_s), ""),
        ("throughput", f"{estimate.tokens_per_s:,.0f}", f"tokens/s; {tokens_a_gpu:,.0f} a GPU"),
        ("MFU", f"{estimate.mfu:.1%}", f"{tflops:.0f} TFLOP/s a GPU"),
    ]
    return [f"{name:<24}{value:>12}  {note}".rstrip() for name, value, note in rows]


def _memory(estimate: Estimate) -> list[str]:
    """List the memory of the pipeline ranks, and whether it fits."""
    limit = usable_bytes(estimate.hardware)
    fullest = estimate.fullest
    several = len(estimate.memory) > 1
    columns = ("weights", "gradients", "optimizer", "activations", "transient", "buffers")
    heads = "".join(f"{name:>12}" for name in columns)
    lines = [f"{'GiB a GPU':<12}{heads}{'total':>10}"]
    shown = _shown_ranks(estimate)
    skipped = False
    for rank, memory in enumerate(estimate.memory):
        if rank not in shown:
            if not skipped:  # one mark for all ranks between two shown ones
                lines.append("  …")
            skipped = True
            continue
        name = f"pipeline {rank}" if several else "every rank"
        values = "".join(f"{getattr(memory, column) / GIB:>12.2f}" for column in columns)
        mark = " ←" if memory is fullest and several else ""
        lines.append(f"{name:<12}{values}{memory.total / GIB:>10.2f}{mark}")
        skipped = False
    room = limit / GIB
    capacity = f"{estimate.hardware.chip.memory_gb:g} GB"
    if estimate.fits:
        share = fullest.total / limit
        lines.append(f"fits: {share:.0%} of the {room:.1f} GiB that tensors may take of {capacity}")
    else:
        needed = fullest.total / GIB
        lines.append(
            f"DOES NOT FIT: {needed:.1f} GiB, and tensors may take {room:.1f} GiB of {capacity}; try --search"
        )
    return lines


def _shown_ranks(estimate: Estimate) -> set[int]:
    """Choose the pipeline ranks for the memory table."""
    count = len(estimate.memory)
    if count <= MOST_ROWS:
        return set(range(count))
    fullest = max(range(count), key=lambda rank: estimate.memory[rank].total)
    # The ends differ from the middle: embedding, head, and the number of micro-batches in flight.
    return {0, 1, 2, fullest, count - 3, count - 2, count - 1}


def _traffic(estimate: Estimate) -> list[str]:
    """List the messages of a step by axis."""
    network = place(estimate.plan, estimate.hardware)
    rows = [row for row in _links(estimate, network) if estimate.volume[row[0]] > 0]
    if not rows:
        return ["nothing is sent: one rank"]
    lines = [
        f"{'axis':<12}{'ranks':>6}  {'link':<16}{'GB/s':>6}{'GB a step':>12}{'seconds':>10}{'of the step':>13}"
    ]
    for axis, ranks, link, speed in rows:
        gb = estimate.volume[axis] / 1e9
        gb_s = speed / 1e9
        seconds = estimate.comm_time[axis]
        share = seconds / estimate.step_time_s
        lines.append(
            f"{axis:<12}{ranks:>6}  {link:<16}{gb_s:>6.0f}{gb:>12,.2f}{seconds:>10.3f}{share:>12.1%}"
        )
    lines.append(
        "sent by a rank at the link's speed, hidden behind work or not; latencies come on top"
    )
    return lines


def _links(estimate: Estimate, network: Network) -> list[tuple[str, int, str, float]]:
    """Return (axis, ranks, link, bytes/s) of every axis."""
    plan = estimate.plan
    interconnect = estimate.hardware.interconnect.interconnect

    def name(far: bool) -> str:
        return interconnect if far else "within the node"

    rows = []
    # Rings share the network cards of a node; single messages have one each.
    for axis, group in (("tensor", network.tensor), ("data", network.replicas)):
        link = name(group.nodes > 1)
        rows.append((axis, group.ranks, link, network.bandwidth(group)))
    far = network.context.nodes > 1
    rows.append(("context", plan.context, name(far), network.message_bandwidth(far)))
    # Some of an expert rank's messages stay in the node: what it sends in all is quicker.
    experts = plan.experts.holders if plan.folds_experts else 1
    link = name(network.expert.nodes > 1)
    rows.append(("expert", experts, link, network.spread_bandwidth(network.expert)))
    far = network.pipeline_crosses_nodes
    rows.append(("pipeline", plan.pipeline, name(far), network.message_bandwidth(far)))
    return rows


def _duration(estimate: Estimate, tokens: float | None) -> list[str]:
    """Say how long a training of so many tokens takes."""
    total = tokens or float(estimate.plan.tokens)
    if not total:
        return [
            "How long the training takes, --tokens says: train.epochs are known in steps once the data is open."
        ]
    seconds = total / estimate.tokens_per_s
    gpu_hours = seconds * estimate.plan.world_size / 3600
    return [
        f"{_count(total)} tokens take {_days(seconds)} and {gpu_hours:,.0f} GPU-hours, "
        "without stops, saving or evaluation"
    ]


def _assumptions(estimate: Estimate) -> list[str]:
    """Say what the estimate rests on."""
    chip = estimate.hardware.chip
    share = f"{chip.product_share:.0%} of {chip.bf16_tflops:g} TFLOP/s"
    lines = [f"Predicted, not measured: products keep {share}; see megalite/planner/."]
    if estimate.config.train.fp8:
        lines += _of_fp8(estimate, estimate.config.train.fp8.recipe)
    if chip.assumed:
        assumed = ", ".join(chip.assumed)
        lines.append(f"Not measured on this chip, taken as typical: {assumed}.")
    return lines


def _of_fp8(estimate: Estimate, recipe: Name) -> list[str]:
    """Say what the times of products in fp8 rest on."""
    chip = estimate.hardware.chip
    if chip.multiplies(recipe):
        return [
            f"fp8: products keep the same share of {chip.fp8_tflops:g} TFLOP/s, operands are rounded in "
            "passes",
            "of their own; neither has been measured on a GPU. Saved activations are as without it.",
        ]
    why = "do not take its codes" if chip.fp8_tflops and chip.capability else "have no known peak"
    return [
        f"fp8: {recipe} on {chip.chip} is no quicker: its fp8 products {why}, and rounded operands",
        "are multiplied as bf16 numbers.",
    ]


def parse_tokens(text: str) -> float:
    """Parse a number of tokens such as 1e12, 300B or 15T. Raises ConfigError."""
    try:
        return parse_count(text)
    except ValueError as error:
        raise ConfigError(f"--tokens {text!r}: {error}") from None


def _count(number: float) -> str:
    for size, name in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if number >= size:
            return f"{number / size:,.4g}{name}"
    return f"{number:,.0f}"


def _seconds(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms"


def _days(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:,.1f} days"
    if seconds >= 7200:
        return f"{seconds / 3600:,.1f} hours"
    return f"{seconds / 60:,.1f} minutes"
