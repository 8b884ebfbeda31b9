"""The verb `megalite dryrun`: runs the ranks that differ, and says whether the config would run on
the cluster."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from megalite.config import Config
from megalite.dryrun.data import Start, dry_config
from megalite.dryrun.match import compare, play
from megalite.dryrun.rank import Job, Record
from megalite.dryrun.report import Outcome, describe
from megalite.errors import ConfigError
from megalite.plan import Plan, nodes_that_fit
from megalite.plan import plan as plan_of
from megalite.planner.estimate import estimate, memory_of, usable_bytes
from megalite.planner.hardware import Hardware, find_hardware
from megalite.planner.memory import Memory
from megalite.runtime.exit_codes import Exit

AT_ONCE = 2
"""Ranks that run at a time."""


def run_dryrun(
    config: Config,
    *,
    num_gpus: int,
    gpu: str,
    gpus_per_node: int,
    ranks: str,
    steps: int,
    restart_gpus: Sequence[int] = (),
) -> Exit:
    """Run `config` dry on `num_gpus` GPUs of the kind `gpu` (see `find_hardware`), `gpus_per_node`
    to a node, for `steps` steps; resume it on each of `restart_gpus`; and print what was found.
    `ranks` is "roles", "all", or numbers such as "0,384".

    Returns MISTAKE where the config would not run, FAILED where the program itself failed. Raises
    ConfigError."""
    hardware = find_hardware(gpu, gpus_per_node)
    outcomes = dry_runs(config, (num_gpus, *restart_gpus), hardware, ranks, steps)
    print(describe(outcomes))
    last = outcomes[-1]
    if any(record.error and not record.mistake for record in last.records):
        return Exit.FAILED
    return Exit.MISTAKE if last.refusals else Exit.DONE


def dry_runs(
    config: Config, num_gpus: Sequence[int], hardware: Hardware, ranks: str, steps: int
) -> list[Outcome]:
    """Return what was found of a run on the first of `num_gpus`, and of its restarts on the others,
    up to the first that would not run. Raises ConfigError."""
    check_possible(config)
    plans = [
        plan_of(config, (start and gpus_that_fit(config, count, hardware.gpus_per_node)) or count)
        for start, count in enumerate(num_gpus)
    ]
    wanted = [wanted_ranks(ranks, plan) for plan in plans]
    if len(plans) > 1 and not all(0 in each for each in wanted):
        raise ConfigError(f"--ranks {ranks}: rank 0, which saves what a restart needs, is left out")
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="megalite-dryrun-") as folder:
        for start, plan in enumerate(plans):
            place = Start(steps, start, len(plans))
            jobs = make_jobs(config, plan, wanted[start], hardware, place, Path(folder))
            records = run_jobs(jobs, Path(folder) / f"{start}")
            outcomes.append(_judge(config, plan, hardware, records, ranks, place, num_gpus[start]))
            if outcomes[-1].refusals or any(record.error for record in records):
                break
    return outcomes


def gpus_that_fit(config: Config, num_gpus: int, gpus_per_node: int) -> int:
    """Return how many of `num_gpus` GPUs a restart uses, in whole nodes, as launchers do: all, or
    with `parallel.elastic` as many as fit. Raises ConfigError."""
    from megalite.models import weight_table

    a_node = min(gpus_per_node, num_gpus)
    if num_gpus % a_node:
        raise ConfigError(
            f"--restart-gpus {num_gpus}: nodes are lost and come back whole; a multiple of --nodes-of = {a_node}"
        )
    table = weight_table(config.model, config.lora)
    return a_node * nodes_that_fit(config, table, num_gpus // a_node, a_node)


def _judge(
    config: Config,
    plan: Plan,
    hardware: Hardware,
    records: list[Record],
    ranks: str,
    start: Start,
    num_gpus: int,
) -> Outcome:
    """Compare what ranks did with the plan, the chip and one another."""
    memory: Sequence[Memory] = ()
    volume: Mapping[str, float] = {}
    with contextlib.suppress(ConfigError):  # a model or a precision that the planner does not know
        if config.model.task == "causal":
            memory = memory_of(config, plan)
            volume = estimate(config, plan, hardware).volume
    refusals = _refusals(records, hardware)
    traffics = {record.rank: record.traffic for record in records if record.traffic}
    if not any(record.error for record in records):
        refusals += compare(traffics) or play(traffics)
    return Outcome(config, plan, hardware, records, memory, volume, refusals, start, num_gpus)


def check_possible(config: Config) -> None:
    """Raise ConfigError where a dry run cannot be made here, or of this config."""
    import torch

    # A wheel for CPUs has the module, and may be installed beside another build of torch.
    if torch.version.cuda or importlib.util.find_spec("megalite._dryrun") is None:
        why = (
            f"this torch is a build with CUDA {torch.version.cuda}; a dry run needs torch's CPU build, in an "
            "environment of its own"
            if torch.version.cuda
            else "megalite/_dryrun is not built: install a C++ compiler, then megalite again"
        )
        raise ConfigError(f"megalite dryrun: {why}")
    for what in ("optimizer", "parameters"):
        if (place := getattr(config.parallel.offload, what)) != "none":
            raise ConfigError(
                f"parallel.offload.{what}: {place} cannot be run dry: it would take this machine's memory or disk; "
                "`megalite plan` estimates it"
            )
    if config.kernels.attention == "flash_attn":
        raise ConfigError(
            "kernels.attention: flash_attn cannot be run dry: it is CUDA code of another package"
        )


def wanted_ranks(ranks: str, plan: Plan) -> list[int]:
    """Return the ranks that `ranks` names: "all", "roles" or numbers. Raises ConfigError.

    Roles are the ranks that differ: each pipeline rank at both ends of the tensor axis, in the
    first replica."""
    if ranks == "all":
        return list(range(plan.world_size))
    if ranks == "roles":
        ends = sorted({0, plan.tensor - 1})
        return [
            plan.rank_at(pipeline, 0, tensor)
            for pipeline in range(plan.pipeline)
            for tensor in ends
        ]
    try:
        numbers = sorted({int(number) for number in ranks.split(",")})
    except ValueError:
        raise ConfigError(f"--ranks {ranks!r}: `roles`, `all`, or numbers such as 0,384") from None
    if not 0 <= numbers[0] <= numbers[-1] < plan.world_size:
        raise ConfigError(f"--ranks {ranks}: the ranks are 0 to {plan.world_size - 1}")
    return numbers


def make_jobs(
    config: Config, plan: Plan, ranks: Sequence[int], hardware: Hardware, start: Start, folder: Path
) -> list[Job]:
    """Write what these ranks need into `folder`, and return their jobs. All starts of a run have
    one folder."""
    path = folder / f"config-{start.number}.yaml"
    path.write_text(dry_config(config, folder, start).to_yaml(), encoding="utf-8")
    chip = f"NVIDIA {hardware.chip.chip.removesuffix(' SXM')}"
    return [
        Job(
            str(path),
            rank,
            plan.world_size,
            hardware.gpus_per_node,
            chip,
            plan.engine,
            start.begins_at,
            start.number + 1 < start.of,
        )
        for rank in ranks
    ]


def run_jobs(jobs: Sequence[Job], folder: Path) -> list[Record]:
    """Run jobs of one kind of GPU, and return their records in order. `folder` is for what they
    tell; those of another run must not be there."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs").write_text(
        "\n".join(json.dumps(asdict(job)) for job in jobs), encoding="utf-8"
    )
    command = [
        sys.executable,
        "-m",
        "megalite.dryrun.server",
        str(folder / "jobs"),
        str(folder),
        str(AT_ONCE),
    ]
    with open(folder / "output", "wb") as output:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        # A group of its own: the ranks are forks of the server, and outlive it.
        with subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=env, process_group=0
        ) as server:
            try:
                server.wait()
            finally:
                if server.returncode != 0:  # None: this process was interrupted
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(server.pid, signal.SIGKILL)
    return [_read(folder, number, job.rank) for number, job in enumerate(jobs)]


def _read(folder: Path, number: int, rank: int) -> Record:
    path = folder / f"{number}.json"
    if not path.exists():
        last = (folder / "output").read_text(errors="replace").strip().rpartition("\n")[2]
        return Record(rank, error=f"its process ended without a word; the last was: {last}")
    return Record(**json.loads(path.read_text(encoding="utf-8")))


def _refusals(records: Sequence[Record], hardware: Hardware) -> list[str]:
    """Return why ranks would not run on the chip."""
    found = [f"rank {each.rank}: {each.error}" for each in records if each.mistake]
    room = usable_bytes(hardware)
    for each in records:
        phase, peak = max(each.peaks.items(), key=lambda item: item[1], default=("", 0))
        if peak > room:
            found.append(
                f"rank {each.rank} runs out of memory in `{phase}`: {peak / 2**30:.2f} GiB of tensors, and a "
                f"{hardware.chip.chip} has room for {room / 2**30:.2f}; the most is held at {each.fullest}; "
                "`megalite plan … --search` finds layouts that fit"
            )
    return found
