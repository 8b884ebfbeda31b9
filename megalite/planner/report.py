"""An estimate, or a ranking of them, as text that is readable at 100 columns."""

from __future__ import annotations

import re

from megalite.errors import ConfigError
from megalite.planner.estimate import Estimate, usable_bytes
from megalite.planner.kernels import SUSTAINED
from megalite.planner.network import Network, place
from megalite.planner.search import Found

MOST_ROWS = 16
"""Pipeline ranks in the table of memory; of more, the first, the fullest and the last few are shown."""

GIB = 2**30


def describe(estimate: Estimate, tokens: float | None = None) -> str:
    """`tokens` of the whole training; without it, those of the config's steps."""
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
    first = found.best[0]
    lines = [
        f"{found.num_layouts:,} layouts on {first.plan.world_size} × {first.hardware.chip.chip}; "
        f"{found.num_refused:,} refused by the plan, {found.num_too_large:,} looked at that fit in no way, "
        f"{found.num_simulated:,} simulated",
        "",
        f"{'#':>2} {'tensor':>6} {'pipe':>4} {'ctx':>3} {'data':>4} {'virt':>4} {'schedule':<12}"
        f"{'micro':>5} {'zero':>4} {'recompute':<10}{'step':>8} {'MFU':>6} {'memory':>8} {'bubble':>6}",
    ]
    for number, one in enumerate(found.best, start=1):
        plan, train = one.plan, one.config.train
        schedule = plan.schedule if plan.pipeline > 1 else "-"
        lines.append(
            f"{number:>2} {plan.tensor:>6} {plan.pipeline:>4} {plan.context:>3} {plan.data:>4} {plan.virtual:>4} "
            f"{schedule:<12}{train.micro_batch_size:>5} {plan.zero_stage:>4} {train.recompute:<10}"
            f"{_seconds(one.step_time_s):>8} {one.mfu:>6.1%} {one.fullest.total / GIB:>5.1f}GiB {one.bubble:>6.1%}"
        )
    return "\n".join(lines)


def _header(estimate: Estimate) -> list[str]:
    plan, config, hardware = estimate.plan, estimate.config, estimate.hardware
    axes = {"pipeline": plan.pipeline, "data": plan.data, "context": plan.context, "tensor": plan.tensor}
    model = config.model.preset or config.model.family
    layout = " × ".join(f"{name} {size}" for name, size in axes.items() if size > 1) or "one rank"
    stages = _number(plan.virtual, "stage")
    pipeline = f"; {plan.schedule}, {stages} a rank" if plan.pipeline > 1 else ""
    nodes = -(-plan.world_size // hardware.gpus_per_node)
    joined = (
        f"{nodes} nodes of {hardware.gpus_per_node}, {hardware.interconnect.interconnect}" if nodes > 1 else "one node"
    )
    return [
        f"{model}, {_count(plan.num_params)} parameters, on {plan.world_size} × {hardware.chip.chip} ({joined})",
        f"{layout}{pipeline}",
        f"{_number(plan.micro_batches, 'micro-batch', 'es')} of {plan.micro_batch_size} × "
        f"{config.data.seq_length:,} tokens a rank; "
        f"ZeRO stage {plan.zero_stage}; recompute {config.train.recompute}; "
        f"sequence parallel {'on' if plan.sequence else 'off'}",
    ]


def _number(count: int, what: str, plural: str = "s") -> str:
    return f"1 {what}" if count == 1 else f"{count:,} {what}{plural}"


def _step(estimate: Estimate) -> list[str]:
    passes = estimate.timeline.passes_end
    rows = [
        ("step", _seconds(estimate.step_time_s), f"{estimate.plan.tokens_per_step:,} tokens"),
        ("  passes", _seconds(passes), f"of which the average rank waits {estimate.bubble:.1%} (bubble)"),
        ("  reduction not hidden", _seconds(estimate.exposed_s), "of gradients, after the last pass"),
        ("  norm and optimizer", _seconds(estimate.optimizer_s), ""),
        ("throughput", f"{estimate.tokens_per_s:,.0f}", f"tokens/s; {_tokens_a_gpu(estimate):,.0f} a GPU"),
        ("MFU", f"{estimate.mfu:.1%}", f"{estimate.mfu * estimate.hardware.chip.bf16_tflops:.0f} TFLOP/s a GPU"),
    ]
    return [f"{name:<24}{value:>12}  {note}".rstrip() for name, value, note in rows]


def _tokens_a_gpu(estimate: Estimate) -> float:
    return estimate.tokens_per_s / estimate.plan.world_size


def _memory(estimate: Estimate) -> list[str]:
    limit, fullest = usable_bytes(estimate.hardware), estimate.fullest
    columns = ("weights", "gradients", "optimizer", "activations", "transient", "buffers")
    lines = [f"{'GiB a GPU':<12}" + "".join(f"{name:>12}" for name in columns) + f"{'total':>10}"]
    shown, skipped = _shown_ranks(estimate), False
    for rank, memory in enumerate(estimate.memory):
        if rank not in shown:
            if not skipped:
                lines.append("  …")
            skipped = True
            continue
        name = f"pipeline {rank}" if len(estimate.memory) > 1 else "every rank"
        values = "".join(f"{getattr(memory, column) / GIB:>12.2f}" for column in columns)
        mark = " ←" if memory is fullest and len(estimate.memory) > 1 else ""
        lines.append(f"{name:<12}{values}{memory.total / GIB:>10.2f}{mark}")
        skipped = False
    room = limit / GIB
    if estimate.fits:
        verdict = (
            f"fits: {fullest.total / limit:.0%} of the {room:.1f} GiB that tensors may take of {_capacity(estimate)}"
        )
    else:
        verdict = (
            f"DOES NOT FIT: {fullest.total / GIB:.1f} GiB, and tensors may take {room:.1f} GiB of "
            f"{_capacity(estimate)}; try --search"
        )
    return [*lines, verdict]


def _capacity(estimate: Estimate) -> str:
    return f"{estimate.hardware.chip.memory_gb:g} GB"


def _shown_ranks(estimate: Estimate) -> set[int]:
    count = len(estimate.memory)
    if count <= MOST_ROWS:
        return set(range(count))
    fullest = max(range(count), key=lambda rank: estimate.memory[rank].total)
    return {0, 1, 2, fullest, count - 3, count - 2, count - 1}


def _traffic(estimate: Estimate) -> list[str]:
    network = place(estimate.plan, estimate.hardware)
    rows = [row for row in _links(estimate, network) if estimate.volume[row[0]] > 0]
    if not rows:
        return ["nothing is sent: one rank"]
    lines = [f"{'axis':<12}{'ranks':>6}  {'link':<16}{'GB/s':>6}{'GB a step':>12}{'seconds':>10}{'of the step':>13}"]
    for axis, ranks, link, speed in rows:
        sent, seconds = estimate.volume[axis], estimate.comm_time[axis]
        share = seconds / estimate.step_time_s
        lines.append(
            f"{axis:<12}{ranks:>6}  {link:<16}{speed / 1e9:>6.0f}{sent / 1e9:>12,.2f}{seconds:>10.3f}{share:>12.1%}"
        )
    return [*lines, "sent by a rank at the link's speed, hidden behind work or not; latencies come on top"]


def _links(estimate: Estimate, network: Network) -> list[tuple[str, int, str, float]]:
    plan, interconnect = estimate.plan, estimate.hardware.interconnect.interconnect

    def name(far: bool) -> str:
        return interconnect if far else "within the node"

    groups = {"tensor": network.tensor, "data": network.replicas}
    rows = [(axis, group.ranks, name(group.nodes > 1), network.bandwidth(group)) for axis, group in groups.items()]
    for axis, ranks, far in (
        ("context", plan.context, network.context.nodes > 1),
        ("pipeline", plan.pipeline, network.pipeline_crosses_nodes),
    ):
        rows.append((axis, ranks, name(far), network.message_bandwidth(far)))
    return rows


def _duration(estimate: Estimate, tokens: float | None) -> list[str]:
    total = tokens or float(estimate.plan.tokens_per_step * estimate.plan.steps)
    seconds = total / estimate.tokens_per_s
    gpu_hours = seconds * estimate.plan.world_size / 3600
    return [
        f"{_count(total)} tokens take {_days(seconds)} and {gpu_hours:,.0f} GPU-hours, "
        "without stops, saving or evaluation"
    ]


def _assumptions(estimate: Estimate) -> list[str]:
    chip = estimate.hardware.chip
    lines = [
        f"Predicted, not measured: products keep {SUSTAINED:.0%} of {chip.matmul_share:.0%} of {chip.bf16_tflops:g} "
        "TFLOP/s; see megalite/planner/."
    ]
    if chip.assumed:
        lines.append(f"Not measured on this chip, taken as typical: {', '.join(chip.assumed)}.")
    return lines


def parse_tokens(text: str) -> float:
    """1e12, 300B, 15T. Raises ConfigError."""
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([KMBT]?)", text.strip(), re.IGNORECASE)
    try:
        count = float(found[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[found[2].upper()] if found else 0.0
    except ValueError:
        count = 0.0
    if count <= 0:
        raise ConfigError(f"--tokens {text!r}: give a number of tokens such as 1e12, 300B or 15T")
    return count


def _count(number: float) -> str:
    for size, name in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if number >= size:
            return f"{number / size:,.4g}{name}"
    return f"{number:,.0f}"


def _seconds(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _days(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:,.1f} days"
    return f"{seconds / 3600:,.1f} hours" if seconds >= 7200 else f"{seconds / 60:,.1f} minutes"
