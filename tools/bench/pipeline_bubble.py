"""Bubbles of the pipeline schedules, measured over gloo ranks on this machine, beside the planner's
simulation.

Trains a small model for a few steps with every schedule, a core a rank, and reads from the traces
that `profile:` writes how long each rank was in a forward, backward or weight-gradient pass. The
bubble is the share of the time between a step's first and last pass in which a rank was in none.
The planner then simulates each schedule with the times its own passes took.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import socket
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing as mp

from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.indexed_writer import IndexedWriter
from megalite.planner.schedule import order_of
from megalite.planner.simulate import Links, StageWork, simulate
from megalite.train import train

SCHEDULES = [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1), ("zero_bubble", 2)]
PASS = re.compile(r"stage (\d+) (forward|backward|weights) (\d+)")
FIRST, LAST = 3, 12


class Pass(NamedTuple):
    rank: int
    stage: int
    kind: str
    start: float
    end: float


def config_of(
    folder: Path, schedule: str, virtual: int, arguments: argparse.Namespace, ranks: range
) -> Config:
    return parse_config(
        {
            "run": {"name": f"{schedule}-{virtual}", "dir": str(folder)},
            # A small vocabulary: the head should not unbalance the stages.
            "model": {
                "family": "llama", "vocab_size": 256, "hidden_size": arguments.hidden, "num_layers": arguments.layers,
                "intermediate_size": 3 * arguments.hidden, "num_attention_heads": 4, "max_positions": 4096,
            },
            "data": {"train": [{"path": str(folder / "corpus")}], "seq_length": arguments.seq_length},
            "parallel": {"pipeline": len(ranks), "schedule": schedule, "virtual": virtual},
            "train": {
                "steps": LAST, "global_batch_size": arguments.micro_batches, "precision": "fp32",
            },
            "optimizer": {"lr": 1e-3},
            "checkpoint": {"every": 0},
            "observe": {"eval_every": 0, "log_every": 100},
            "profile": {"steps": [FIRST, LAST], "ranks": list(ranks)},
        }
    )  # fmt: skip


def run_rank(rank: int, ranks: int, port: int, configs: list[Config]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for config in configs:
        train(config)


def passes_of(config: Config) -> list[list[Pass]]:
    """The passes of each recorded step, in seconds."""
    found: list[Pass] = []
    for path in sorted((config.run.folder / "trace").iterdir()):
        rank = int(path.name.split("-")[-1].split(".")[0])
        trace: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
        for event in trace["traceEvents"]:
            if event.get("ph") == "X" and event.get("cat") == "user_annotation":
                match = PASS.fullmatch(event["name"])
                if match:
                    start = (event["ts"] + trace.get("baseTimeNanoseconds", 0) / 1e3) / 1e6
                    found.append(
                        Pass(rank, int(match[1]), match[2], start, start + event["dur"] / 1e6)
                    )
    found.sort(key=lambda p: p.start)
    a_step = len(found) // (LAST - FIRST + 1)
    return [found[i : i + a_step] for i in range(0, len(found), a_step)]


def bubble_of(step: list[Pass], ranks: int) -> float:
    whole = max(p.end for p in step) - min(p.start for p in step)
    return 1 - sum(p.end - p.start for p in step) / (ranks * whole)


def simulated(config: Config, steps: list[list[Pass]], micro_batches: int) -> float:
    times = defaultdict[tuple[int, str], list[float]](list)
    for p in (p for step in steps for p in step):
        times[p.stage, p.kind].append(p.end - p.start)
    median = {key: statistics.median(values) for key, values in times.items()}
    parallel = config.parallel
    work = []
    for stage in range(parallel.pipeline * parallel.virtual):
        forward, backward = median[stage, "forward"], median[stage, "backward"]
        work.append(StageWork(forward, backward, backward, median.get((stage, "weights"), 0.0), ()))
    links = Links(
        hand_over=1e-4, waits_for_hand_over=parallel.schedule == "1f1b", reduces_every_time=False
    )
    order = order_of(parallel.schedule, parallel.pipeline, parallel.virtual, micro_batches)
    return simulate(order, work, links, micro_batches).bubble


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="keep the traces here")
    arguments = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with IndexedWriter(folder / "corpus", np.uint16) as writer:
            writer.add_document(
                np.random.default_rng(0).integers(256, size=100 * arguments.seq_length)
            )
        ranks = range(arguments.ranks)
        configs = [config_of(folder, *schedule, arguments, ranks) for schedule in SCHEDULES]
        mp.spawn(run_rank, (arguments.ranks, port, configs), nprocs=arguments.ranks)
        print(f"{'schedule':<14}{'virtual':>8}{'step, ms':>10}{'bubble':>9}{'simulated':>11}")
        for config, (schedule, virtual) in zip(configs, SCHEDULES, strict=True):
            steps = passes_of(config)
            bubble = statistics.median(bubble_of(step, arguments.ranks) for step in steps)
            time = statistics.median(
                max(p.end for p in step) - min(p.start for p in step) for step in steps
            )
            guess = simulated(config, steps, arguments.micro_batches)
            print(f"{schedule:<14}{virtual:>8}{time * 1e3:>10.1f}{bubble:>9.1%}{guess:>11.1%}")


if __name__ == "__main__":
    main()
