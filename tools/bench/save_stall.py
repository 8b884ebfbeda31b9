"""How long training stands still for a checkpoint, beside how long it takes to be written.

Saves the state of a model again and again with a training step after each, as a run does that keeps
two checkpoints, and prints of each save the time that the loop waits (for the call, and in the step
for what is still to be copied; on the rank that waits longest), the time until the checkpoint has
its name, and their ratio. The first save makes the memory that the others use again.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megalite.checkpoint.load import from_seed
from megalite.checkpoint.save import Saver
from megalite.comm.collectives import start_sharing
from megalite.comm.mesh import make_mesh
from megalite.config_file import parse_config
from megalite.engine.layout import bucket_elements, choose_owners
from megalite.models import weight_table
from megalite.plan import make_plan
from megalite.runtime.host_memory import keep_freed_memory
from megalite.training.parts import build


class Waits:
    """How long an engine's steps waited for the copies of a checkpoint."""

    def __init__(self, engine: Any):
        self.seconds, self._await = 0.0, engine.await_copies
        engine.await_copies = self._timed

    def _timed(self) -> None:
        begin = time.perf_counter()
        self._await()
        self.seconds += time.perf_counter() - begin


def run(rank: int, ranks: int, folder: Path, arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    if ranks > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks
        )
    keep_freed_memory()  # as training does
    config = parse_config(
        {
            "run": {"name": "bench"}, "model": {"preset": arguments.preset}, "optimizer": {"lr": 1e-3},
            "data": {"train": [{"path": "-"}], "seq_length": arguments.tokens},
            "parallel": {"zero_stage": arguments.zero_stage},
            "train": {"steps": 1, "global_batch_size": ranks, "precision": "bf16"},
        }
    )  # fmt: skip
    weights = weight_table(config.model)
    plan = make_plan(config, weights, ranks)
    mesh = make_mesh(plan, device)
    parts = build(config, plan, mesh)
    engine, model = parts.engine, parts.stages[0].model
    engine.load(from_seed(0, mesh, device))
    owners = choose_owners(plan, weights, config.optimizer, bucket_elements(config, plan))
    saver = Saver(folder / "checkpoints", 2, weights, mesh, engine, owners, lambda folder: None)
    waits = Waits(engine)
    tokens = torch.randint(config.model.vocab_size, (1, arguments.tokens + 1), device=device)
    shares = []
    for step in range(1, arguments.saves + 2):
        waits.seconds, begin = 0.0, time.perf_counter()
        saver.save(step, {"step": step})
        waited = time.perf_counter() - begin
        engine.begin(1)
        engine.backward(model.loss(model(tokens[:, :-1]), tokens[:, 1:]).mean() / ranks)
        engine.finish()
        engine.step(1e-4)
        waited = max(start_sharing(waited + waits.seconds, mesh)().tolist())
        saver.wait()
        took = time.perf_counter() - begin
        assert saver.error is None, saver.error
        if rank == 0:
            first = "  (the first)" if step == 1 else ""
            print(
                f"loop waited {1000 * waited:6.0f} ms of {took:6.2f} s: {waited / took:5.1%}{first}",
                flush=True,
            )
        shares += [waited / took] if step > 1 else []
    if rank == 0:
        files = (folder / "checkpoints").glob("step-*/**/*.safetensors")
        size = sum(path.stat().st_size for path in files) / 2e9
        print(
            f"{arguments.preset}, {sum(weight.numel for weight in weights) / 1e6:.0f}M parameters, {size:.2f} GB, "
            f"{ranks} ranks, {device}, torch {torch.__version__}, Python {platform.python_version()}, load average "
            f"{os.getloadavg()[0]:.1f}: median {statistics.median(shares):.1%} of the save's own time"
        )
    if ranks > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llama-125m")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument(
        "--tokens", type=int, default=512, help="of the step that follows each save"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure (default: that of temporary files)"
    )
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="saves-", dir=arguments.folder))
    try:
        if arguments.ranks == 1:
            run(0, 1, folder, arguments)
        else:
            mp.spawn(run, (arguments.ranks, folder, arguments), nprocs=arguments.ranks)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
