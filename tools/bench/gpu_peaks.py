"""Peak memory of real steps on one GPU beside what `megalite plan` predicts and `megalite dryrun`
finds, as a table in Markdown. Ends with status 1 where a measured peak is off the plan's by more
than 3%.

    python tools/bench/gpu_peaks.py                 # the layouts of gpu_peaks.yaml, 1 minute
    python tools/bench/gpu_peaks.py --device cpu    # one toy step, to see that it runs
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from megalite.models import weight_table
from megalite.plan import make_plan
from megalite.planner.estimate import memory_of
from peers import batches, config_of, megalite_step

WITHIN = 0.03
WARM_UP = 2
CASES: list[dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "gpu_peaks.yaml").read_text())
TOY = {
    "name": "toy",
    "preset": "llama-1m",
    "seq_length": 64,
    "batch": 1,
    "overrides": [],
    "dry": 0.0,
}


def measured(case: dict[str, Any], device: torch.device) -> float:
    """Return the peak of a step in GiB; 0 on a CPU, which counts none."""
    arguments = argparse.Namespace(**case)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    step, next_batch = (
        megalite_step(config_of(arguments, case["overrides"]), device),
        batches(arguments, device),
    )
    for _ in range(WARM_UP):
        step(next_batch())
    if device.type == "cpu":
        return 0.0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(next_batch())
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def planned(case: dict[str, Any]) -> float:
    """Return the plan's peak of a step in GiB."""
    config = config_of(argparse.Namespace(**case), case["overrides"])
    (memory,) = memory_of(config, make_plan(config, weight_table(config.model), 1))
    return memory.step / 2**30


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    device, off = parser.parse_args().device, False
    print("| layout, one GPU | measured GiB | plan GiB | dry run GiB | measured against the plan |")
    print("|---|---|---|---|---|")
    for case in CASES if device.type == "cuda" else [TOY]:
        real, plan = measured(case, device), planned(case)
        gc.collect()
        difference = real / plan - 1
        off |= bool(real) and abs(difference) > WITHIN
        against = f"{difference:+.1%}" if real else "not measured"
        print(
            f"| {case['name']} | {real:.2f} | {plan:.2f} | {case['dry']:.2f} | {against} |",
            flush=True,
        )
    return int(off)


if __name__ == "__main__":
    sys.exit(main())
