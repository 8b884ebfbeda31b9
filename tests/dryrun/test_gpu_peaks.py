"""What tools/bench/gpu_peaks.py holds a GPU's memory against is what the program needs when it is
run dry."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dry_runs import Case, built, run_dry

PEAKS = Path(__file__).parents[2] / "tools" / "bench" / "gpu_peaks.yaml"


@built
def test_recorded_peaks_are_those_of_dry_runs(tmp_path: Path) -> None:
    rows = {row["name"]: row for row in yaml.safe_load(PEAKS.read_text())}
    cases = {}
    for name, row in rows.items():
        sizes = (f"data.seq_length={row['seq_length']}", f"train.micro_batch_size={row['batch']}")
        overrides = (
            *sizes,
            f"train.global_batch_size={row['batch']}",
            "observe.layers_every=0",
            *row["overrides"],
        )
        cases[name] = Case({"preset": row["preset"]}, 1, overrides)
    for name, dry in run_dry(cases, tmp_path).items():
        peak = dry.records[0].peaks["training"] / 2**30
        print(f"{name}: {peak:.2f}")
        assert rows[name]["dry"] == pytest.approx(peak, abs=0.006), name
