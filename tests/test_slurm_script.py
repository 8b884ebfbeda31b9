"""slurm/pretrain.sh: the commands it composes, with stand-ins for Slurm, the GPUs and Python."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "slurm" / "pretrain.sh"
RECORD = 'for word in "$(basename "$0")" "$@"; do printf "%s\\n" "$word"; done > "$CALLED"'
STAND_INS = {
    "python": f'if [[ "$*" == "-m megalite ranks "* ]]; then echo 4; exit; fi\n{RECORD}\nexit 5',
    "srun": f'{RECORD}\necho "OMP_NUM_THREADS=$OMP_NUM_THREADS" >> "$CALLED"\npwd >> "$CALLED"\nexit 7',
    "scontrol": '[[ "$*" == "show hostnames node[3-4]" ]] && printf "node3\\nnode4\\n"',
    "nproc": "echo 12",
}
JOB = {"SLURM_JOB_ID": "45678", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[3-4]"}


class Machine:
    """A checkout in a folder, a PATH of stand-ins, and what the script called in the end."""

    def __init__(self, folder: Path):
        self.root, self.bin, self.called = folder / "repo", folder / "bin", folder / "called"
        for part in ("megalite", "configs", "slurm"):
            (self.root / part).mkdir(parents=True)
        (self.root / "configs" / "x.yaml").touch()
        self.script = Path(shutil.copy(SCRIPT, self.root / "slurm"))
        self.bin.mkdir()
        for name, body in STAND_INS.items():
            self.install(self.bin / name, body)

    def install(self, path: Path, body: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def run(self, *arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        variables = {"PATH": f"{self.bin}:{os.defpath}:/usr/bin:/bin", "CALLED": str(self.called), **env}
        command = ["bash", str(self.script), *arguments]
        return subprocess.run(command, cwd=cwd or self.root, env=variables, capture_output=True, text=True)

    @property
    def words(self) -> list[str]:
        return self.called.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_one_machine_without_gpus_starts_the_ranks_the_config_needs(machine: Machine) -> None:
    done = machine.run("configs/x.yaml", "train.steps=3", "data.train=[{path: a b}]", CUDA_VISIBLE_DEVICES="")
    launcher = ["python", "-m", "torch.distributed.run", "--nproc-per-node=4", "--standalone", "--local-addr=127.0.0.1"]
    training = ["-m", "megalite", "train", "configs/x.yaml", "train.steps=3", "data.train=[{path: a b}]"]
    assert machine.words == launcher + training
    assert done.returncode == 5
    assert "OMP_NUM_THREADS=3" in done.stdout


@pytest.mark.parametrize(
    ("env", "ranks"),
    [
        ({"RANKS": "6"}, 6),
        ({"CUDA_VISIBLE_DEVICES": "2,5"}, 2),
        ({}, 3),  # what nvidia-smi lists
        ({"RANKS": "1", "CUDA_VISIBLE_DEVICES": "0,1,2"}, 1),
    ],
)
def test_ranks_of_one_machine(machine: Machine, env: dict[str, str], ranks: int) -> None:
    machine.install(machine.bin / "nvidia-smi", 'printf "GPU 0: H100\\nGPU 1: H100\\nGPU 2: H100\\n"')
    machine.run("configs/x.yaml", **env)
    assert f"--nproc-per-node={ranks}" in machine.words


def test_sbatch_runs_one_launcher_a_node_from_the_submit_folder(machine: Machine, tmp_path: Path) -> None:
    machine.install(machine.root / ".venv" / "bin" / "python", STAND_INS["python"])
    spool = tmp_path / "spool" / "job45678"
    spool.mkdir(parents=True)
    machine.script = machine.script.rename(spool / "slurm_script")
    gpus = {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64"}
    done = machine.run("configs/x.yaml", "run.name=big", cwd=spool, SLURM_SUBMIT_DIR=str(machine.root), **JOB, **gpus)
    assert done.returncode == 7  # srun's own
    *words, threads, folder = machine.words
    split = words.index(str(machine.root / ".venv" / "bin" / "python"))
    assert words[0] == "srun"
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=64"} <= set(words[:split])
    assert words[split + 1 :] == [
        *("-m", "torch.distributed.run", "--nproc-per-node=8", "--nnodes=2"),
        *("--rdzv-id=45678", "--rdzv-backend=c10d", "--rdzv-endpoint=node3:15678"),
        *("-m", "megalite", "train", "configs/x.yaml", "run.name=big"),
    ]
    assert threads == "OMP_NUM_THREADS=8"
    assert Path(folder) == machine.root


def test_slurm_without_gpus_spreads_the_ranks_over_the_nodes(machine: Machine) -> None:
    machine.run("configs/x.yaml", CUDA_VISIBLE_DEVICES="", SLURM_CPUS_ON_NODE="6", OMP_NUM_THREADS="2", **JOB)
    assert {"--nproc-per-node=2", "--nnodes=2", "--cpus-per-task=6", "OMP_NUM_THREADS=2"} <= set(machine.words)


def test_dry_run_prints_a_command_that_can_be_pasted(machine: Machine) -> None:
    done = machine.run("--dry-run", "configs/x.yaml", "run.name=a b", RANKS="2")
    assert done.returncode == 0
    assert not machine.called.exists()
    assert shlex.split(done.stdout)[-3:] == ["train", "configs/x.yaml", "run.name=a b"]


@pytest.mark.parametrize("arguments", [(), ("configs/none.yaml",)])
def test_refuses_what_it_cannot_start(machine: Machine, arguments: tuple[str, ...]) -> None:
    done = machine.run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("pretrain.sh: ")
    assert not machine.called.exists()


def test_stops_when_the_program_cannot_tell_the_ranks(machine: Machine) -> None:
    machine.install(machine.bin / "python", "echo 'unknown key train.stepz' >&2; exit 9")
    done = machine.run("configs/x.yaml", "train.stepz=3", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 9
    assert "stepz" in done.stderr
