"""The training program run dry: what it needs and sends, on layouts of a cluster that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megalite.cli import main

built = pytest.mark.skipif(
    not any((Path(__file__).parents[2] / "megalite").glob("_dryrun.*")), reason="megalite._dryrun is not built"
)
WITHIN = 0.02  # of the plan: what a GPU's allocator adds comes on top of both


@pytest.fixture
def config(tmp_path: Path) -> Path:
    values = {
        "run": {"name": "dry", "dir": str(tmp_path / "runs")},
        "model": {"preset": "llama-8b", "num_layers": 4},
        "data": {"train": [{"path": "nowhere/tokens"}], "split": [98, 2, 0], "seq_length": 4096},
        "parallel": {"tensor": 4, "pipeline": 2, "zero_stage": 1},
        "train": {"steps": 1000, "global_batch_size": 16},
        "optimizer": {"lr": 1.0e-4},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def dryrun(config: Path, capsys: pytest.CaptureFixture[str], *options: str, gpus: int = 16) -> tuple[int, str]:
    status = main(["dryrun", str(config), "--gpus", str(gpus), "--gpu", "h200", *options])
    said = capsys.readouterr()
    return status, said.out + said.err


@built
def test_ranks_of_a_cluster_need_what_the_plan_says(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = dryrun(config, capsys)
    assert status == 0, said
    ranks = re.findall(r"^rank (\d+) .* ([\d.]+) +([\d.]+)[+-][\d.]+% +[\d.]+$", said, re.M)
    assert [int(rank) for rank, *_ in ranks] == [0, 3, 8, 11], "both pipeline ranks, at both ends of the tensor axis"
    for _, peak, planned in ranks:
        assert float(planned) == pytest.approx(float(peak), rel=WITHIN)
    assert not (config.parent / "runs").exists(), "nothing is written where the run would be"
