"""One run that changes its layout and its engine four times, against an unbroken run on one
process, drawn.

Trains a small Llama on the bytes of the Python standard library, packed with document masks, in
fp32. Prints the largest relative difference of the loss and the gradient norm on each layout, and
fails above 1e-4 of the loss. Training amplifies rounding: how much is shown by a third run, on one
process as well, that adds up its micro-batches otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp

from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.indexed_writer import IndexedWriter
from megalite.train import train

PARTS: list[tuple[str, int, dict[str, Any]]] = [
    ("tensor 2", 2, {"tensor": 2}),
    ("pipeline 2 × ZeRO-1 over 2", 4, {"pipeline": 2, "schedule": "zero_bubble", "zero_stage": 1}),
    ("DeepSpeed ZeRO-3 over 2", 2, {"engine": "deepspeed", "zero_stage": 3}),
    ("context 2", 2, {"context": 2}),
    ("one process", 1, {}),
]


def config_of(
    folder: Path,
    name: str,
    steps: int,
    stop_at: int,
    parallel: dict[str, Any],
    micro_batch_size: int = 1,
) -> Config:
    return parse_config(
        {
            "run": {"name": name, "dir": str(folder)},
            "model": {
                "family": "llama", "vocab_size": 256, "hidden_size": 96, "intermediate_size": 256, "num_layers": 4,
                "num_attention_heads": 4, "num_kv_heads": 2, "max_positions": 256,
            },
            "data": {"train": [{"path": str(folder / "bytes")}], "seq_length": 256, "document_mask": True},
            "parallel": parallel,
            "train": {"steps": steps, "stop_at": stop_at, "global_batch_size": 8, "precision": "fp32",
                      "micro_batch_size": micro_batch_size},
            "optimizer": {"lr": 1e-3, "schedule": {"name": "cosine", "warmup_steps": 10}},
            "checkpoint": {"every": 0},
            "observe": {"eval_every": 0, "log_every": 10},
        }
    )  # fmt: skip


def write_corpus(prefix: Path, num_bytes: int = 2_000_000) -> None:
    with IndexedWriter(prefix, np.uint16) as writer:
        total = 0
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            text = np.frombuffer(path.read_bytes(), np.uint8)
            if text.size and total < num_bytes:
                writer.add_document(text)
                total += text.size


def run_rank(rank: int, ranks: int, port: int, config: Config) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train(config)


def run(config: Config, ranks: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    mp.spawn(run_rank, (ranks, port, config), nprocs=ranks)


def curve(config: Config) -> np.ndarray:
    """[steps, 2]: loss and gradient norm."""
    lines = map(json.loads, (config.run.folder / "metrics.jsonl").read_text().splitlines())
    return np.array([(line["loss"], line["grad_norm"]) for line in lines if "loss" in line])


def draw(
    path: Path, whole: np.ndarray, changing: np.ndarray, rounding: np.ndarray, a_part: int
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    steps = np.arange(1, len(whole) + 1)
    above.plot(steps, whole[:, 0], color="#999999", linewidth=5, label="one process, unbroken")
    below.semilogy(
        steps, np.maximum(rounding, 1e-9), color="#bbbbbb", label="one process, other micro-batches"
    )
    for number, (name, _, _) in enumerate(PARTS):
        rows = slice(number * a_part, (number + 1) * a_part)
        above.plot(steps[rows], changing[rows, 0], linewidth=1.5, label=name)
        below.semilogy(
            steps[rows], np.maximum(np.abs(changing[rows, 0] / whole[rows, 0] - 1), 1e-9)
        )
    below.axhline(1e-4, color="black", linestyle=":", linewidth=1)
    above.set_ylabel("loss")
    above.legend(frameon=False)
    below.legend(frameon=False, loc="lower right")
    below.set(xlabel="step", ylabel="relative difference", ylim=(1e-9, 1e-3))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--a-part", type=int, default=12, help="steps on each layout")
    parser.add_argument("--picture", type=Path, default=Path("layout_changes.png"))
    arguments = parser.parse_args()
    steps = arguments.a_part * len(PARTS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_corpus(folder / "bytes")
        unbroken = config_of(folder, "unbroken", steps, steps, {})
        run(unbroken, 1)
        control = config_of(folder, "control", steps, steps, {}, micro_batch_size=8)
        run(control, 1)
        for number, (_, ranks, parallel) in enumerate(PARTS, start=1):
            run(config_of(folder, "changing", steps, number * arguments.a_part, parallel), ranks)
        whole, changing = curve(unbroken), curve(config_of(folder, "changing", steps, steps, {}))
        rounding = np.abs(curve(control) / whole - 1)
    draw(arguments.picture, whole, changing, rounding[:, 0], arguments.a_part)
    difference = np.abs(changing / whole - 1)
    print(
        f"{'largest relative difference':<28}{'loss':>10}{'norm':>10}   by rounding alone:{'loss':>10}{'norm':>10}"
    )
    for number, (name, _, _) in enumerate(PARTS):
        rows = slice(number * arguments.a_part, (number + 1) * arguments.a_part)
        (loss, norm), (noise, norm_noise) = difference[rows].max(0), rounding[rows].max(0)
        print(f"{name:<28}{loss:>10.1e}{norm:>10.1e}{'':>21}{noise:>10.1e}{norm_noise:>10.1e}")
    print(f"drawn to {arguments.picture}")
    if difference[:, 0].max() > 1e-4:
        raise SystemExit("the curves differ")


if __name__ == "__main__":
    main()
