"""What a rank finds out about its machine before a run: see `Facts`."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from megalite.config import Config
from megalite.health.stragglers import host_or_device_event
from megalite.mesh import Launch, node_name

PATIENCE_S = 20.0
"""For one question. A dead disk or driver never answers."""

HARDWARE_XIDS = {48, 62, 63, 64, 74, 79, 92, 94, 95, 119, 120, 140}
"""Errors the driver reports of the GPU itself, its memory or links (NVIDIA, "XID errors"). Others are a program's."""

T = TypeVar("T")


@dataclass
class Facts:
    """Of one rank, in a form that JSON can hold. `troubles` are sentences; a list where there is nothing is empty."""

    node: str
    rank: int
    ranks_here: int
    """Ranks of this node."""
    gpus: int
    gpu_troubles: list[str]
    gpu_remarks: list[str]
    disk_gb: dict[str, float]
    """Free, by what the disk is for."""
    disk_troubles: dict[str, str]
    """Of disks that cannot be used, by the same."""
    memory_gb: float
    """Available to programs."""
    code: dict[str, str]
    """Digest of each file."""
    config: dict[str, Any]
    product_s: float
    product: str
    """Hash of the product, which is the same on every machine."""


def find_out(config: Config, launch: Launch) -> Facts:
    disk_gb, disk_troubles = {}, {}
    for name, folder in disks(config).items():
        try:
            disk_gb[name] = within(PATIENCE_S, partial(usable_gb, folder))
        except OSError as error:
            disk_troubles[name] = f"{name} {folder}: {error.strerror or error}"
    gpus = torch.cuda.device_count()
    # Also where torch sees none: the driver may be what is broken.
    wants_gpus = torch.version.cuda is not None and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    ask = wants_gpus and launch.local_rank == 0
    product_s, product = measure_product(launch) if gpus == 0 or launch.local_rank < gpus else (0.0, "")
    return Facts(
        node=node_name(),
        rank=launch.rank,
        ranks_here=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        gpus=gpus,
        gpu_troubles=gpu_troubles() if ask else [],
        gpu_remarks=gpu_remarks() if ask else [],
        disk_gb=disk_gb,
        disk_troubles=disk_troubles,
        memory_gb=available_memory_gb(),
        code=digests_of_code(),
        config=config.model_dump(mode="json"),
        product_s=product_s,
        product=product,
    )


def within(seconds: float, ask: Callable[[], T]) -> T:
    """What `ask` returns or raises; TimeoutError (an OSError) where it does not in time."""
    answer: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(ask())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answer:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return answer[0]


def disks(config: Config) -> dict[str, Path]:
    """Folders a run writes to, by what for."""
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return {"run folder": config.run.folder, "temporary files": Path(tempfile.gettempdir()), "cache": Path(cache)}


def usable_gb(folder: Path) -> float:
    """Free space where `folder` is, or will be. Raises OSError where nothing can be written."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    with tempfile.TemporaryFile(dir=there) as file:
        file.write(b"x")
    found = os.statvfs(there)
    return found.f_bavail * found.f_frsize / 2**30


def available_memory_gb() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return 0.0


def gpu_troubles() -> list[str]:
    """What nvidia-smi says speaks against this node's GPUs."""
    fields = "index,ecc.errors.uncorrected.volatile.total"
    rows = _nvidia_smi(f"--query-gpu={fields}")
    if isinstance(rows, str):
        return [rows]
    troubles = [
        f"GPU {index}: {count} uncorrected ECC errors" for index, count in rows if count.isdigit() and int(count)
    ]
    remapped = _nvidia_smi("--query-remapped-rows=gpu_bus_id,remapped_rows.pending,remapped_rows.failure")
    for bus, pending, failure in remapped if isinstance(remapped, list) else ():  # GPUs before Ampere have none
        if failure not in ("0", "No"):
            troubles.append(f"GPU {bus}: memory rows could not be remapped")
        elif pending not in ("0", "No"):
            troubles.append(f"GPU {bus}: memory rows wait to be remapped, which takes a reset")
    return troubles


def _nvidia_smi(query: str) -> list[list[str]] | str:
    """Rows of its answer, or what is wrong with it; no rows without it."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except FileNotFoundError:
        return []
    except subprocess.TimeoutExpired:
        return f"nvidia-smi gave no answer within {PATIENCE_S:g} s"
    if done.returncode:
        return f"nvidia-smi: {(done.stdout + done.stderr).strip().splitlines()[-1]}"
    return [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def gpu_remarks() -> list[str]:
    """Hardware errors of GPUs in the kernel's log, where that may be read. They may be older than the last repair, so
    that they are for a person to judge."""
    try:
        log = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=PATIENCE_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = [line.partition("NVRM: ")[2] for line in log.splitlines() if "NVRM: Xid" in line]
    numbers = [(line, line.partition("): ")[2].partition(",")[0]) for line in found]
    return [line for line, number in numbers if number.isdigit() and int(number) in HARDWARE_XIDS][-3:]


def digests_of_code() -> dict[str, str]:
    """Name the content of the package's files, Python and compiled, and the version of torch."""
    package, found = Path(__file__).parents[1], {"torch": str(torch.__version__)}
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.so")]):
        found[str(path.relative_to(package))] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def measure_product(launch: Launch) -> tuple[float, str]:
    """(seconds, hash) of a matrix product. Its elements are integers below what its type holds exactly, so that every
    order of summation gives the same bits."""
    device = launch.device
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    index = torch.arange(size, device=device)
    a = ((index[:, None] * 7 + index * 3) % 3 - 1).to(dtype)
    b = ((index[:, None] * 5 + index * 11) % 3 - 1).to(dtype)
    seconds = best_time(lambda: a @ b, device, repeats=100)
    return seconds, hashlib.sha256((a @ b).float().cpu().numpy().tobytes()).hexdigest()


def best_time(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the quickest of some runs, which other processes have disturbed least."""
    work()
    event, best = host_or_device_event(device), float("inf")
    for _ in range(repeats):
        begin, end = event(), event()
        begin.record()
        work()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return best
