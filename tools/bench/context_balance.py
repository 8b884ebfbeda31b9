"""How evenly context ranks share attention when rows are cut and when documents are, and how long
their steps take.

The work is counted in pairs of a query and a key, over packed rows of real documents. Steps of the
same model on the same rows are timed over gloo ranks on this machine; both ways take turns in one
process group, so that what else the machine does hits both alike. Needs the data of
tools/quickstart.sh, or token files of your own.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runs import DATA

from megalite.checkpoint.load import from_seed
from megalite.comm.mesh import make_mesh
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.loader import Loader, MicroBatch
from megalite.data.mixture import build_mixtures
from megalite.models import weight_table
from megalite.models.context_cut import ContextCut
from megalite.plan import make_plan
from megalite.runtime.host_memory import keep_freed_memory
from megalite.training.parts import build, forward_backward

WAYS = {"sequence": False, "documents": True}


def config_of(arguments: argparse.Namespace, ranks: int) -> Config:
    return parse_config(
        {
            "run": {"name": "bench"},
            "model": {"preset": arguments.preset, "max_positions": arguments.seq_length},
            "data": {
                "train": [{"path": arguments.data}], "seq_length": arguments.seq_length, "document_mask": True,
            },
            "parallel": {"context": ranks},
            "train": {
                "steps": 1, "global_batch_size": arguments.batch, "micro_batch_size": arguments.batch,
                "precision": arguments.precision,
            },
            "optimizer": {"lr": 1e-3},
        }
    )  # fmt: skip


def batches(config: Config, count: int) -> Iterator[list[MicroBatch]]:
    train = build_mixtures(config)["train"]
    assert train is not None
    size = config.train.global_batch_size
    with Loader(train, size, size, 0, 1) as loader:
        for _ in range(count):
            yield next(loader)


def report_balance(arguments: argparse.Namespace) -> None:
    config = config_of(arguments, 1)
    rows = [micro.documents for step in batches(config, arguments.rows) for micro in step]
    print(f"| ranks | {' | '.join(WAYS)} |\n|---|---|---|")
    for ranks in arguments.context:
        found = []
        for by_documents in WAYS.values():
            cuts = [ContextCut.of(arguments.seq_length, ranks, each, by_documents) for each in rows]
            # A step waits for its busiest rank, in each micro-batch anew.
            pairs = np.stack([cut.pairs(window=arguments.window) for cut in cuts])
            found.append(pairs.max(1).sum() / pairs.mean(1).sum())
        print(f"| {ranks} | {' | '.join(f'{ratio:.3f}' for ratio in found)} |", flush=True)


def run(rank: int, ranks: int, port: int, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    keep_freed_memory()
    config = config_of(arguments, ranks)
    plan = make_plan(config, weight_table(config.model), ranks)
    mesh = make_mesh(plan, torch.device("cpu"))
    parts = build(config, plan, mesh)
    parts.engine.load(from_seed(0, mesh))
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for number, batch in enumerate(batches(config, arguments.steps + 2)):
        for name in list(WAYS)[:: 1 if number % 2 else -1]:
            dist.barrier()
            begin = time.perf_counter()
            forward_backward(replace(parts, by_documents=WAYS[name]), batch, mesh, 0)
            parts.engine.step(0.0)
            dist.barrier()
            if number >= 2:  # the first steps allocate
                times[name].append(time.perf_counter() - begin)
    if rank == 0:
        sequence, documents = times.values()
        ratio = statistics.median(d / s for s, d in zip(sequence, documents, strict=True))
        print(
            f"{arguments.preset}, {ranks} gloo ranks, {arguments.batch} × {arguments.seq_length} tokens a step, "
            f"{arguments.precision}, torch {torch.__version__}, Python {platform.python_version()}: "
            f"cut by sequence {statistics.median(sequence):.3f} s, by documents {statistics.median(documents):.3f} s, "
            f"median of ratios {ratio:.3f}"
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=str(DATA / "train_text_document"))
    parser.add_argument("--preset", default="llama-8m")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--window", type=int, help="of sliding-window attention, for the balance")
    parser.add_argument(
        "--context", type=int, nargs="*", default=[2, 4, 8], help="ranks to count for"
    )
    parser.add_argument("--rows", type=int, default=100, help="batches to count")
    parser.add_argument("--batch", type=int, default=1, help="rows of a micro-batch")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="steps to time; 0: none")
    parser.add_argument("--port", type=int, default=29557)
    arguments = parser.parse_args()
    report_balance(arguments)
    if arguments.steps:
        mp.spawn(run, (arguments.ranks, arguments.port, arguments), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
