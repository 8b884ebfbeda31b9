"""Examines the machine a rank runs on before a run: GPUs, disks, memory, code and the speed of a
product (`Facts`)."""

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

from megalite.comm.mesh import Launch, node_name
from megalite.config import Config
from megalite.health.stragglers import host_or_device_event
from megalite.observe.throughput import chip_row

PATIENCE_S = 20.0
"""Time limit of one question, in seconds. A dead disk or driver never answers."""

HARDWARE_XIDS = {48, 62, 63, 64, 74, 79, 92, 94, 95, 119, 120, 140}
"""XID errors (NVIDIA, "XID errors") of the GPU itself, its memory or links. Others come from
programs."""

T = TypeVar("T")


@dataclass
class Facts:
    """Holds what one rank found out about its machine. Every field can be written as JSON."""

    node: str
    rank: int
    gpu: str
    """Identity of the GPU that this rank computes on; empty for the CPU."""
    chip: str
    """Its name in configs/chips.yaml; empty if it has none there."""
    gpu_troubles: list[str]
    """Sentences about faults that make a GPU unfit."""
    gpu_remarks: list[str]
    """Lines of the kernel's log that a person should look at."""
    disk_gb: dict[str, float]
    """Free space in GiB, by what the disk is for (see `disks`)."""
    disk_troubles: dict[str, str]
    """Why a disk cannot be used, by the same names."""
    memory_gb: float
    """Memory available to programs, in GiB."""
    code: dict[str, str]
    """Digest of each file of the package, by name."""
    config: dict[str, Any]
    product_s: float
    """Seconds of a matrix product; 0 if it was not measured."""
    product: str
    """Hash of the product's result, which is the same on every sound machine."""


def find_out(config: Config, launch: Launch) -> Facts:
    """Examine the machine of this rank. A question to a disk or a driver takes no longer than
    PATIENCE_S.

    `config` names the folders a run writes to; `launch` says which rank and device this process
    has."""
    disk_gb, disk_troubles = {}, {}
    for name, folder in disks(config).items():
        try:
            disk_gb[name] = within(PATIENCE_S, partial(usable_gb, folder))
        except OSError as error:
            disk_troubles[name] = f"{name} {folder}: {error.strerror or error}"
    # Also where torch sees none: the driver may be what is broken.
    wants_gpus = torch.version.cuda is not None and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    # One rank a node, where the answer is the same for all; each, where it may see no GPU but its
    # own.
    ask = wants_gpus and (launch.local_rank == 0 or torch.cuda.device_count() == 1)
    troubles = gpu_troubles() if ask else []
    gpu, chip, product_s, product = "", "", 0.0, ""
    try:
        if launch.device.type == "cuda":
            gpu = str(torch.cuda.get_device_properties(launch.device).uuid)
            chip = (chip_row(torch.cuda.get_device_name(launch.device)) or {"chip": ""})["chip"]
        product_s, product = measure_product(launch)
    except RuntimeError as error:  # what torch makes of any error of CUDA's
        # Without its identity the GPU does not count, and no rank waits for it in NCCL.
        gpu = ""
        troubles.append(f"{launch.device} does not compute: {str(error).partition(chr(10))[0]}")
    return Facts(
        node=node_name(),
        rank=launch.rank,
        gpu=gpu,
        chip=chip,
        gpu_troubles=troubles,
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
    """Return what `ask` returns, or raise what it raises. Raises TimeoutError (an OSError) after
    `seconds`."""
    answer: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(ask())
        except BaseException as error:
            errors.append(error)

    # A thread that hangs in the kernel cannot be ended; as a daemon it does not keep the process
    # alive.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answer:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return answer[0]


def disks(config: Config) -> dict[str, Path]:
    """Return the folders a run writes to, by their purpose."""
    named = map(os.environ.get, ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"))
    cache = next(filter(None, named), None) or os.path.expanduser("~/.cache")
    # Not `tempfile.gettempdir`, which passes over a disk that is full for the current folder.
    named = map(os.environ.get, ("TMPDIR", "TEMP", "TMP"))
    temporary = next(filter(None, named), "/tmp")
    return {
        "run folder": config.run.folder,
        "temporary files": Path(temporary),
        "cache": Path(cache),
    }


def usable_gb(folder: Path) -> float:
    """Return the free space in GiB where `folder` is, or will be created. Raises OSError where
    nothing can be written."""
    absolute = folder.absolute()
    there = next(parent for parent in (absolute, *absolute.parents) if parent.exists())
    # A read-only or full file system still reports its free space: only writing tells.
    with tempfile.TemporaryFile(dir=there) as file:
        file.write(b"x")
    found = os.statvfs(there)
    return found.f_bavail * found.f_frsize / 2**30


def available_memory_gb() -> float:
    """Return the memory available to programs in GiB, as Linux estimates it; 0 if it does not
    say."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return 0.0


def gpu_troubles() -> list[str]:
    """Return the faults of this node's GPUs that nvidia-smi reports: uncorrected ECC errors and
    failed row remaps."""
    fields = "index,ecc.errors.uncorrected.volatile.total"
    rows = _nvidia_smi(f"--query-gpu={fields}")
    if isinstance(rows, str):
        return [rows]
    troubles = []
    for index, count in rows:
        if count.isdigit() and int(count):  # "[N/A]" where the GPU has no ECC
            troubles.append(f"GPU {index}: {count} uncorrected ECC errors")
    # A GPU replaces faulty rows of its memory by spare ones, until none is left.
    remapped = _nvidia_smi(
        "--query-remapped-rows=gpu_bus_id,remapped_rows.pending,remapped_rows.failure"
    )
    if isinstance(remapped, str):  # drivers before Ampere know no such query
        return troubles
    for bus, pending, failure in remapped:
        # 1 or Yes; "[N/A]" where the GPU remaps no rows.
        if failure in ("1", "Yes"):
            troubles.append(f"GPU {bus}: memory rows could not be remapped")
        elif pending in ("1", "Yes"):
            troubles.append(f"GPU {bus}: memory rows wait to be remapped, which takes a reset")
    return troubles


def _nvidia_smi(query: str) -> list[list[str]] | str:
    """Return the rows of nvidia-smi's answer, a sentence about its failure, or no rows where it is
    not installed."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S
        )
    except FileNotFoundError:
        return []
    except subprocess.TimeoutExpired:
        return f"nvidia-smi gave no answer within {PATIENCE_S:g} s"
    if done.returncode:
        # One that crashes says nothing.
        said = (done.stdout + done.stderr).strip() or f"exit status {done.returncode}"
        return f"nvidia-smi: {said.splitlines()[-1]}"
    rows = []
    for line in done.stdout.splitlines():
        if line.strip():
            rows.append([field.strip() for field in line.split(",")])
    return rows


def gpu_remarks() -> list[str]:
    """Return the last three hardware XID errors in the kernel's log; none where that may not be
    read.

    They may be older than the last repair: a person has to judge them."""
    try:
        log = subprocess.run(
            ["dmesg"], capture_output=True, text=True, errors="replace", timeout=PATIENCE_S
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = []
    for line in log.splitlines():
        # "NVRM: Xid (PCI:0000:3b:00): 79, pid=…": the number stands behind the address.
        if "NVRM: Xid" in line:
            remark = line.partition("NVRM: ")[2]
            number = remark.partition("): ")[2].partition(",")[0]
            if number.isdigit() and int(number) in HARDWARE_XIDS:
                found.append(remark)
    return found[-3:]


def digests_of_code() -> dict[str, str]:
    """Return a digest of each of the package's files, Python and compiled, and the version of
    torch."""
    package = Path(__file__).parents[1]
    found = {"torch": str(torch.__version__)}
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.so")]):
        name = str(path.relative_to(package))
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def measure_product(launch: Launch) -> tuple[float, str]:
    """Return (seconds, hash of the result) of a matrix product on this rank's device.

    All elements are -1, 0 or 1, so that every partial sum is exact: each order of summation gives
    the same bits, and a different hash means a faulty device."""
    device = launch.device
    size, dtype = 512, torch.float32
    if device.type == "cuda":
        size, dtype = 8192, torch.bfloat16
    index = torch.arange(size, device=device)
    column = index[:, None]
    a = ((column * 7 + index * 3) % 3 - 1).to(dtype)
    b = ((column * 5 + index * 11) % 3 - 1).to(dtype)
    seconds = best_time(lambda: a @ b, device, repeats=100)
    result = (a @ b).float().cpu().numpy().tobytes()
    return seconds, hashlib.sha256(result).hexdigest()


def best_time(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the seconds of the quickest of `repeats` runs of `work` on `device`: the one least
    disturbed by others."""
    work()  # the first run pays for initialization
    event = host_or_device_event(device)
    best = float("inf")
    for _ in range(repeats):
        begin, end = event(), event()
        begin.record()
        work()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return best
