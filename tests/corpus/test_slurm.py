"""What is submitted to Slurm, with a stand-in for sbatch that records it, and one task of it as
Slurm would run it."""

import json
import os
import subprocess
import sys

import pytest
from machine_corpus import prose

from megalite.corpus.config import CorpusConfig
from megalite.corpus.run import prepare_corpus

SBATCH = """#!/bin/bash
number=$(($(cat "$CALLED/number" 2>/dev/null || echo 100) + 1))
echo $number > "$CALLED/number"
{ echo "$*"; cat "${@: -1}"; } > "$CALLED/$number"
echo "Submitted batch job $number"
"""
LAUNCH = "from datatrove.tools.launch_pickled_pipeline import main; main()"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    for name, script in {"sbatch": SBATCH, "scontrol": "#!/bin/bash\necho node0\n"}.items():
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "called").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLED", str(tmp_path / "called"))
    return tmp_path


def test_a_chain_of_job_arrays(cluster):
    for number in range(3):
        (cluster / f"{number}.jsonl").write_text(json.dumps({"text": prose(number)}) + "\n")
    config = CorpusConfig.model_validate(
        {
            "output": cluster / "out",
            "sources": [{"name": "a", "path": str(cluster / "*.jsonl")}],
            "shard_mb": 0.001,
            "workers": 7,
            "slurm": {
                "partition": "cpu",
                "time": "01:00:00",
                "setup": "source env",
                "sbatch": {"account": "mine"},
            },
        }
    )
    assert prepare_corpus(config) is None
    jobs = {
        path.name: path.read_text()
        for path in (cluster / "called").iterdir()
        if path.name != "number"
    }
    arrays = {}
    for number, job in sorted(jobs.items()):
        if "launch_pickled_pipeline" in job:
            options = dict(
                line[10:].partition("=")[::2]
                for line in job.splitlines()
                if line.startswith("#SBATCH --")
            )
            arrays[options["job-name"]] = (number, options["array"], job.splitlines()[0])
            assert (options["partition"], options["time"], options["account"]) == (
                "cpu",
                "01:00:00",
                "mine",
            )
            assert "source env" in job
    assert {name: array for name, (_, array, _) in arrays.items()} == {
        "corpus-clean": "0-2%7",
        "corpus-exact": "0-15%7",
        "corpus-signatures": "0-2%7",
        "corpus-buckets": "0-13%7",
        "corpus-clusters": "0-0%7",
        "corpus-split": "0-2%7",
        "corpus-report": "0-0%7",
    }
    before = None
    for number, _, call in arrays.values():
        assert (f"--dependency=afterok:{before}" in call) == (before is not None)
        before = number

    # A task in a process of its own, from the pickle alone, as in the job array; it is not
    # submitted again.
    clean = cluster / "out" / "work" / "logs" / "clean"
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": "1", "SLURM_NODELIST": "node0"}
    command = [sys.executable, "-c", LAUNCH, str(clean / "executor.pik")]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert (cluster / "out" / "work" / "clean" / "00001.jsonl.zst").exists()
    prepare_corpus(config)
    assert json.loads((clean / "ranks_to_run.json").read_text()) == [0, 2]
