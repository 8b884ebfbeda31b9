"""What a dry run prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megalite.config import Config
from megalite.dryrun.data import Start
from megalite.dryrun.match import bytes_by_axis
from megalite.dryrun.rank import RESTART, STEADY, Record
from megalite.plan import Plan
from megalite.planner.estimate import usable_bytes
from megalite.planner.hardware import Hardware
from megalite.planner.memory import Memory

GIB = 2**30
USES = ("weights", "gradients", "optimizer", "activations", "logits", "update")
MOST_WAITS = 12

SIMULATED = """\
Simulated: the training program from its start to its save, on tensors with shapes and counted memory but no numbers,
and process groups that answer at once. Not simulated: numbers, times, kernels' own workspaces, the CUDA context, NCCL's
buffers, fragmentation, files. Tokens are made up, weights are not read, a router of experts is in balance, and a
validation reads one batch; tasks, samples, tracking and torch.compile are off. See docs/dryrun.md."""


@dataclass(frozen=True)
class Outcome:
    """What a dry run has found."""

    config: Config
    plan: Plan
    hardware: Hardware
    records: Sequence[Record]
    memory: Sequence[Memory]
    """Planned, of each pipeline rank; empty for a model that the planner does not know."""
    volume: Mapping[str, float]
    """Planned bytes that a rank sends, by axis; empty where they are not known."""
    refusals: Sequence[str]
    """Why the config would not run."""
    start: Start
    num_gpus: int
    """GPUs that were there: the plan may use fewer."""


def describe(outcomes: Sequence[Outcome]) -> str:
    """Return the report of a dry run, and of its restarts."""
    sections = [section for outcome in outcomes for section in _describe(outcome)]
    return "\n\n".join("\n".join(lines) for lines in [*sections, [SIMULATED]] if lines)


def _describe(outcome: Outcome) -> list[list[str]]:
    """Return the sections of a start's report."""
    sections = [_header(outcome)]
    failed = [record for record in outcome.records if record.error]
    if failed:
        sections.append(
            [
                line
                for record in failed[:4]
                for line in (f"rank {record.rank}: {record.error}", record.trace)
            ]
        )
    done = [record for record in outcome.records if record.peaks]
    if done and outcome.start.number:
        # What a step is spent on does not change by a restart.
        sections += [_memory(outcome, done), _traffic(outcome, done)]
    elif done:
        sections += [_memory(outcome, done), _largest(done), _waits(done), _traffic(outcome, done)]
    return [*sections, _verdict(outcome)]


def _header(outcome: Outcome) -> list[str]:
    plan = outcome.plan
    axes = {
        "pipeline": plan.pipeline,
        "data": plan.data,
        "context": plan.context,
        "tensor": plan.tensor,
    }
    layout = " × ".join(f"{name} {size}" for name, size in axes.items() if size > 1) or "one rank"
    seconds = sum(record.seconds for record in outcome.records)
    where = f"on {plan.world_size} × {outcome.hardware.chip.chip}: {layout}; ZeRO stage {plan.zero_stage}"
    ran = f"{len(outcome.records)} ranks run dry for {outcome.start.steps} steps, {seconds:.0f} s of work"
    if not outcome.start.number:
        return [f"{outcome.config.model.preset or outcome.config.model.family} {where}", ran]
    unused = outcome.num_gpus - plan.world_size
    fewer = [f"{unused} of {outcome.num_gpus} GPUs are left idle: no more fit the config"]
    return [
        f"RESTART from step {outcome.start.begins_at} {where}",
        f"micro-batches of {plan.micro_batch_size}, {plan.micro_batches} a step; {ran}",
        *(fewer if unused else []),
    ]


def _place(plan: Plan, rank: int) -> str:
    """Return the coordinates of a rank, as far as there are any."""
    outer, tensor = divmod(rank, plan.tensor)
    pipeline, replica = divmod(outer, plan.replicas)
    found = [
        ("pipe", pipeline, plan.pipeline),
        ("replica", replica, plan.replicas),
        ("tensor", tensor, plan.tensor),
    ]
    return " ".join(f"{name} {number}" for name, number, size in found if size > 1)


def _memory(outcome: Outcome, records: Sequence[Record]) -> list[str]:
    plan = outcome.plan
    names = [*USES, "step peak", "planned", "save peak", "planned"]
    heads = "".join(
        f"{name:>12}" for name in (*names, *(["restart"] if outcome.start.number else []))
    )
    lines = [f"{'GiB':<34}{heads}"]
    for record in records:
        uses, peak = record.at_peak.get(STEADY, {}), record.peaks.get(STEADY, 0)
        values = [f"{uses.get(name, 0) / GIB:.2f}" for name in USES] + [f"{peak / GIB:.2f}"]
        planned = save = "-"
        if outcome.memory:
            # Pipeline ranks are the outermost axis.
            memory = outcome.memory[record.rank // (plan.replicas * plan.tensor)]
            planned = (
                f"{memory.step / GIB:.2f}{100 * (memory.step / peak - 1) if peak else 0:+.1f}%"
            )
            save = f"{memory.save / GIB:.2f}"
        values += [planned, f"{record.peaks.get('saving', 0) / GIB:.2f}", save]
        if outcome.start.number:
            values.append(f"{record.peaks.get(RESTART, 0) / GIB:.2f}")
        name = f"rank {record.rank}  {_place(plan, record.rank)}"
        lines.append(f"{name:<34}" + "".join(f"{value:>12}" for value in values))
    room = usable_bytes(outcome.hardware) / GIB
    lines.append(f"tensors may take {room:.1f} GiB of {outcome.hardware.chip.memory_gb:g} GB")
    gathered = max(record.gathered for record in records)
    lines.append(
        f"the host of a rank holds up to {gathered / GIB:.2f} GiB of a checkpoint while it is written"
    )
    return lines


def _largest(records: Sequence[Record]) -> list[str]:
    fullest = max(records, key=lambda record: max(record.peaks.values()))
    phase, peak = max(fullest.peaks.items(), key=lambda item: item[1])
    lines = [
        f"the highest peak, {peak / GIB:.2f} GiB, is that of rank {fullest.rank} in `{phase}`; most of it is held by"
    ]
    return lines + [f"{size / GIB:>9.2f}  {place}" for place, size in fullest.largest]


def _waits(records: Sequence[Record]) -> list[str]:
    """List where the host waits for the device within a step, of the rank that does so most
    often."""
    most = max(
        records, key=lambda record: sum(wait[3] for wait in record.waits if wait[0] == STEADY)
    )
    found: Counter[tuple[str, str]] = Counter()
    for phase, reason, place, count in most.waits:
        if phase == STEADY:
            found[reason, place] += count
    if not found:
        return ["no rank's host waits for its device within a step"]
    lines = [
        f"the host of rank {most.rank} waits for its device within the steps after the first, so often:"
    ]
    return lines + [
        f"{count:>9}  {reason} at {place}"
        for (reason, place), count in found.most_common(MOST_WAITS)
    ]


def _traffic(outcome: Outcome, records: Sequence[Record]) -> list[str]:
    sent, loaded = _most_sent(records, STEADY), _most_sent(records, RESTART)
    if not sent:
        return []
    is_restart = outcome.start.number > 0
    lines = [f"{'axis':<12}{'GB a step':>12}{'planned':>12}" + f"{'restart':>12}" * is_restart]
    for axis in sent | loaded:
        planned = outcome.volume.get(axis)
        shown = "-" if planned is None else f"{planned / 1e9:.3f}"
        more = f"{loaded[axis] / 1e9:>12.3f}" * is_restart
        lines.append(f"{axis:<12}{sent[axis] / 1e9:>12.3f}{shown:>12}{more}")
    lines.append("sent by the rank that sends most, as a ring sends it")
    return lines


def _most_sent(records: Sequence[Record], phase: str) -> Counter[str]:
    """Return by axis what the rank that sends most in a phase sends."""
    most: Counter[str] = Counter()
    for record in records:
        if record.traffic:
            sizes = bytes_by_axis(record.traffic, phase)
            most |= Counter({axis: size for axis, size in sizes.items() if size})
    return most


def _verdict(outcome: Outcome) -> list[str]:
    if outcome.refusals:
        return ["WOULD NOT RUN:", *outcome.refusals]
    if any(record.error for record in outcome.records):
        return ["FAILED: what the program raised stands above"]
    compared = f"all collectives of the {len(outcome.records)} ranks match, and their messages come to an end"
    return [compared if len(outcome.records) > 1 else "it runs"]
