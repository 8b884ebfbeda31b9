"""Faults other than a killed rank. Each takes a folder of its own, does one thing to a run, and
returns whether that came out as it should and a line that says how."""

from __future__ import annotations

import importlib
import math
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from killing import EVERY, STEPS, Aim, config_of, outcome, run_once, undisturbed

from megalite.checkpoint import writing
from megalite.checkpoint.folder import MANIFEST, complete_steps, parse_manifest, step_folder
from megalite.checkpoint.resume import find_checkpoint
from megalite.comm.mesh import Mesh
from megalite.runtime.activity import NOW
from megalite.runtime.exit_codes import Exit

loop: Any = importlib.import_module("megalite.training.loop")  # whose functions are replaced

Outcome = tuple[bool, str]
FLIPS = 8
"""Of each file."""
HIT = 5
"""The step that something is planted in."""


def bit_flips(folder: Path) -> Outcome:
    """One bit of one file: the checkpoint is set aside, and the one before taken."""
    config = config_of(folder, "data 2, ZeRO-1")
    start = run_once(config, folder / "start-0")
    if start.status:
        return False, start.log
    root, rng = config.run.folder / "checkpoints", random.Random(0)
    newest, before = step_folder(root, STEPS), step_folder(root, STEPS - EVERY)
    names = [MANIFEST, *sorted(parse_manifest((newest / MANIFEST).read_bytes()))]
    alone = Mesh.alone()
    missed = []
    for name in names:
        for _ in range(FLIPS):
            copy = folder / "copy"
            shutil.copytree(root, copy)
            path = copy / newest.name / name
            content = bytearray(path.read_bytes())
            bit = rng.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            taken, _ = find_checkpoint(copy, "auto", alone)
            if taken != copy / before.name:
                missed.append(f"{name} bit {bit}")
            shutil.rmtree(copy)
    kinds = ", ".join(names)
    if missed:
        return False, f"not noticed: {', '.join(missed)}"
    return (
        True,
        f"{FLIPS * len(names)} of {FLIPS * len(names)} noticed, the checkpoint before was taken ({kinds})",
    )


def stopped_rank(folder: Path) -> Outcome:
    """SIGSTOP: the other rank's report names it."""
    config = config_of(
        folder, "data 2, ZeRO-1", health={"hang_timeout_s": 1.5}, train={"steps": 100_000}, checkpoint={"every": 0},
        observe={"eval_every": 0},
    )  # fmt: skip
    start = run_once(config, folder / "start-0", Aim(rank=1, phase=3, signal=signal.SIGSTOP))
    behind = start.log.partition("behind:")[2].partition("waiting for others:")[0]
    named = re.search(r"rank 1 on .*stopped by a signal", behind)
    if start.status != Exit.HUNG or not named or "rank 0" in behind:
        return False, f"exit status {start.status}\n{start.log}"
    seconds = start.ended - (start.killed or start.ended)
    return (
        True,
        f"{named[0]}; exit status {Exit.HUNG}, {seconds:.1f} s after it, of which the timeout is 1.5",
    )


def full_disk(folder: Path) -> Outcome:
    """Room for two checkpoints and not for a third: training goes to its end, and started again it
    goes on there."""

    def hurry(rank: int) -> None:
        writing.PAUSES_S = (0.1, 0.1, 0.1)

    config, other = config_of(folder, "data 2, ZeRO-1"), folder / "undisturbed"
    wanted = undisturbed(config_of(other, "data 2, ZeRO-1"), other)
    root = config.run.folder / "checkpoints"
    root.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=900k", "none", root],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        return True, f"not tried, it takes root to mount a small disk ({mounted.stderr.strip()})"
    try:
        start = run_once(config, folder / "start-0", tamper=hurry)
        kept = complete_steps(root)
        subprocess.run(["mount", "-o", "remount,size=10m", root], check=True)
        again = run_once(config, folder / "start-1")
        same = again.status == 0 and outcome(config) == (wanted.curve, wanted.tensors)
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)
    told = "No space left on device" in start.log
    good = (
        start.status == Exit.NOT_SAVED
        and told
        and kept[:1] == [EVERY]
        and again.resumed == kept[-1]
        and same
    )
    said = f"{STEPS} steps trained, exit status {start.status}, checkpoints of steps {kept} stand; with room, same bits"
    return good, said if good else f"{said}?\n{start.log}{again.log}"


def nan_gradient(folder: Path) -> Outcome:
    """On one rank, in one step: all ranks refuse that step's update, and say so."""

    def plant(rank: int) -> None:
        forward_backward = loop.forward_backward

        def planted(parts: Any, *arguments: Any) -> dict[str, torch.Tensor]:
            hooks = [
                parameter.register_hook(lambda gradient: gradient * torch.nan)
                for stage in parts.stages
                for name, parameter in stage.named_parameters()
                if rank == 1 and NOW.step == HIT and "norm" in name
            ]
            found = forward_backward(parts, *arguments)
            for hook in hooks:
                hook.remove()
            return found

        loop.forward_backward = planted

    config = config_of(folder, "data 2, ZeRO-1")
    start = run_once(config, folder / "start-0", tamper=plant)
    found = re.search(
        rf"step {HIT}: loss \S+ and gradient norm nan, not both finite; [^,]*", start.log
    )
    losses = [loss for _, loss, *_ in outcome(config)[0]] if start.status == 0 else []
    good = (
        start.status == 0
        and found is not None
        and len(losses) == STEPS
        and all(map(math.isfinite, losses))
    )
    return good, found[0] if good and found else f"exit status {start.status}\n{start.log}"


def flipped_bit(folder: Path) -> Outcome:
    """In the weights of one of three replicas: it is named, and the next start goes on from what
    was sound."""
    settings: dict[str, Any] = {
        "health": {"weights_check_every": 1},
        "train": {"global_batch_size": 6},
    }

    def plant(rank: int) -> None:
        forward_backward = loop.forward_backward

        def planted(parts: Any, *arguments: Any) -> dict[str, torch.Tensor]:
            found = forward_backward(parts, *arguments)
            if rank == 1 and NOW.step == HIT:
                parts.engine.wait_for_params()
                parts.engine.buckets[0].weights.view(torch.int32)[0] ^= 1 << 12
            return found

        loop.forward_backward = planted

    config, other = config_of(folder, "data 2, ZeRO-1", **settings), folder / "undisturbed"
    wanted = undisturbed(config_of(other, "data 2, ZeRO-1", **settings), other, ranks=3)
    start = run_once(config, folder / "start-0", tamper=plant, ranks=3)
    named = re.search(r"rank 1 on .* holds other bits than the 2 ranks it must equal", start.log)
    again = run_once(config, folder / "start-1", ranks=3)
    same = again.status == 0 and outcome(config) == (wanted.curve, wanted.tensors)
    if not named or start.status == Exit.DONE or not same:
        return False, f"exit status {start.status}, then {again.status}\n{start.log}{again.log}"
    return (
        True,
        f"{named[0]}; exit status {start.status}; started again, went on after step {again.resumed}, same bits",
    )


SCENARIOS: dict[str, Callable[[Path], Outcome]] = {
    scenario.__name__.replace("_", " "): scenario
    for scenario in (bit_flips, stopped_rank, full_disk, nan_gradient, flipped_bit)
}
