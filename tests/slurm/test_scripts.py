"""The launchers: the commands they compose and what they make of how these end, with stand-ins for
Slurm, the GPUs and Python. `test_cluster.py` runs them on a real Slurm."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "slurm"
RECORD = 'for word in "$(basename "$0")" "$@"; do printf "%s\\n" "$word"; done > "$CALLED"\necho >> "$CALLED.starts"'
# What the training does: lines of bash in $TRAINING, the first for the first start.
TRAIN = 'eval "$(sed -n "$(wc -l < "$CALLED.starts")p" <<< "$TRAINING")"'
# A config that needs four ranks, and fits $FIT of the nodes.
ANSWER = """if [[ "$*" == *" megalite job "* ]]; then
  eval "${EARLY:-}"
  nodes=$(grep -oP -- "--nodes=\\K\\d+" <<< "${*: -2}") ranks=$(grep -oP -- "--ranks-per-node=\\K\\d+" <<< "$*")
  echo $((ranks ? ranks : (4 + nodes - 1) / nodes)) "${FIT:-$nodes}" runs/x
  exit
fi"""
# What preflight does: the lines of $LOOK, in turn.
LOOK = """if [[ "$*" == *" megalite preflight "* ]]; then
  echo >> "$CALLED.looks"
  eval "$(sed -n "$(wc -l < "$CALLED.looks")p" <<< "${LOOK:-}")"
  exit
fi"""
STAND_INS = {
    "python": f"{ANSWER}\n{RECORD}\n{TRAIN}",
    "srun": f'{LOOK}\n{RECORD}\necho "OMP_NUM_THREADS=$OMP_NUM_THREADS" >> "$CALLED"\npwd >> "$CALLED"\n{TRAIN}',
    "scontrol": 'case "$*" in\n"show hostnames node[9-10]") eval "${MEANWHILE:-}"; printf "node9\\nnode10\\n" ;;\n'
    '"show hostnames "*) tr , "\\n" <<< "${*: -1}" ;;\n"show topology") echo "${TOPOLOGY:-}" ;;\n'
    '"show job "*) echo "  ReqNodeList=(null) ExcNodeList=${EXCLUDED:-(null)}" ;;\n'
    '*) echo "$*" >> "$CALLED"; exit ${REFUSED:-0} ;;\nesac',
    "squeue": "echo ${STATE:-RUNNING}",
    "nproc": "echo 12",
}
JOB = {
    "SLURM_JOB_ID": "45678",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "node[9-10]",
    "RANKS": "1",
}
SAVE = "mkdir -p runs/x/checkpoints/step-0000000{0} && touch runs/x/checkpoints/step-0000000{0}/manifest.json"
ASKED = "trap '' USR1; kill -{0} $PPID; sleep 0.1; "  # the launcher is told to stop
# From within what the launcher has forked: it is the last of those above with its command line.
ASKED_BY_A_PIPE = """pid=$PPID
while parent=$(cut -d ' ' -f 4 /proc/$pid/stat) && grep -q pretrain.sh /proc/$parent/cmdline; do pid=$parent; done
kill -USR1 $pid"""


class Machine:
    """A checkout in a folder, a PATH of stand-ins, and what the script called in the end."""

    def __init__(self, folder: Path):
        self.root, self.bin, self.called = folder / "repo", folder / "bin", folder / "called"
        for part in ("megalite", "configs", "slurm"):
            (self.root / part).mkdir(parents=True)
        (self.root / "configs" / "x.yaml").touch()
        for script in FOLDER.glob("*.sh"):
            shutil.copy(script, self.root / "slurm")
        self.script = self.root / "slurm" / "pretrain.sh"
        self.bin.mkdir()
        for name, body in STAND_INS.items():
            self.install(self.bin / name, body)

    def install(self, path: Path, body: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def run(
        self, *arguments: str, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        variables = {
            "PATH": f"{self.bin}:{os.defpath}:/usr/bin:/bin",
            "CALLED": str(self.called),
            **env,
        }
        command = ["bash", str(self.script), *arguments]
        return subprocess.run(
            command, cwd=cwd or self.root, env=variables, capture_output=True, text=True
        )

    @property
    def starts(self) -> int:
        return len(Path(f"{self.called}.starts").read_text().splitlines())

    @property
    def words(self) -> list[str]:
        return self.called.read_text().splitlines() if self.called.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_finetuning_is_the_same_on_other_resources(machine: Machine) -> None:
    machine.run("configs/x.yaml", "train.steps=3")
    wanted = machine.words
    machine.script = machine.root / "slurm" / "finetune.sh"
    machine.run("configs/x.yaml", "train.steps=3")
    assert machine.words == wanted
    # Under sbatch it is a copy in the spool folder.
    machine.script = Path(shutil.copy(machine.script, machine.bin / "slurm_script"))
    machine.run("configs/x.yaml", "train.steps=3", SLURM_SUBMIT_DIR=str(machine.root))
    assert machine.words == wanted


def test_one_machine_without_gpus_starts_the_ranks_the_config_needs(machine: Machine) -> None:
    done = machine.run(
        "configs/x.yaml", "train.steps=3", "data.train=[{path: a b}]", CUDA_VISIBLE_DEVICES=""
    )
    launcher = [
        "python",
        "-m",
        "megalite.launch",
        "--nproc-per-node=4",
        "--standalone",
        "--local-addr=127.0.0.1",
    ]
    training = [
        "-m",
        "megalite",
        "train",
        "configs/x.yaml",
        "train.steps=3",
        "data.train=[{path: a b}]",
    ]
    assert machine.words == launcher + training
    assert done.returncode == 0
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
    machine.install(
        machine.bin / "nvidia-smi", 'printf "GPU 0: H100\\nGPU 1: H100\\nGPU 2: H100\\n"'
    )
    machine.run("configs/x.yaml", **env)
    assert f"--nproc-per-node={ranks}" in machine.words


def test_sbatch_runs_one_launcher_a_node_from_the_submit_folder(
    machine: Machine, tmp_path: Path
) -> None:
    machine.install(machine.root / ".venv" / "bin" / "python", STAND_INS["python"])
    spool = tmp_path / "spool" / "job45678"
    spool.mkdir(parents=True)
    machine.script = machine.script.rename(spool / "slurm_script")
    gpus = {
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "64",
        "RANKS": "",
        "SLURM_RESTART_COUNT": "2",
    }
    env = {**JOB, **gpus, "SLURM_SUBMIT_DIR": str(machine.root), "TRAINING": "exit 2"}
    done = machine.run("configs/x.yaml", "run.name=big", cwd=spool, **env)
    assert done.returncode == 2
    *words, threads, folder = machine.words
    split = words.index(str(machine.root / ".venv" / "bin" / "python"))
    assert words[0] == "srun"
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=64"} <= set(
        words[:split]
    )
    # What its nodes say goes to files of that name.
    assert words[split - 1] == "runs/x/logs/45678.2"
    assert "--nodelist=node10,node9" in words
    assert words[split + 1 :] == [
        *("-m", "megalite.launch", "--nproc-per-node=8", "--nnodes=2"),
        # First in the order of names.
        *("--rdzv-id=45678.2-train", "--rdzv-endpoint=node10"),
        *("-m", "megalite", "train", "configs/x.yaml", "run.name=big"),
    ]
    assert threads == "OMP_NUM_THREADS=8"
    assert Path(folder) == machine.root


@pytest.mark.parametrize(
    ("within", "before_srun", "before_python"),
    [
        ("apptainer exec --nv x.sif", [], ["apptainer", "exec", "--nv", "x.sif"]),
        ("--container-image=x.sqsh --container-mounts=/data", ["--container-image=x.sqsh"], []),
        ("source /dev/null", [], []),
    ],
)
def test_within_a_container(
    machine: Machine, within: str, before_srun: list[str], before_python: list[str]
) -> None:
    # Both also tell what the config needs: in the container there may be the only Python.
    machine.install(machine.bin / "apptainer", ANSWER)
    machine.install(machine.bin / "srun", f"{ANSWER}\n{LOOK}\n{RECORD}")
    machine.run("configs/x.yaml", WITHIN=within, **JOB)
    words = machine.words
    assert words[1 : 1 + len(before_srun)] == before_srun
    split = words.index("python")
    assert words[split - len(before_python) : split] == before_python


@pytest.mark.parametrize(
    ("topology", "order"),
    [
        ("", "node10 node9"),
        ("No topology information available", "node10 node9"),
        # The switch of a switch has all of them, in no order that counts.
        ("SwitchName=s1 Level=0 LinkSpeed=1 Nodes=node9,node8\n"
         "SwitchName=s2 Level=0 LinkSpeed=1 Nodes=node7,node10\n"
         "SwitchName=top Level=1 LinkSpeed=1 Nodes=node7,node8,node9,node10 Switches=s1,s2", "node9 node10"),
        ("BlockName=b0 BlockIndex=0 Nodes=node9 BlockSize=1", "node9 node10"),
    ],
)  # fmt: skip
def test_nodes_of_a_switch_stand_side_by_side(machine: Machine, topology: str, order: str) -> None:
    training = 'echo "order $MEGALITE_NODES" >> "$CALLED"'
    done = machine.run("configs/x.yaml", TOPOLOGY=topology, TRAINING=training, **JOB)
    assert done.returncode == 0, done.stderr
    assert f"order {order}" in machine.words
    assert f"--rdzv-endpoint={order.split()[0]}" in machine.words


def test_the_clusters_own_script_sets_variables_for_all_ranks(machine: Machine) -> None:
    hook = machine.root / "hook.sh"
    hook.write_text("NCCL_SOCKET_IFNAME=ib0\nexport OMP_NUM_THREADS=5\n[[ $NOT_SET ]] || true\n")
    show = 'echo "network $NCCL_SOCKET_IFNAME"'
    for job in ({}, JOB):
        done = machine.run("configs/x.yaml", HOOK="hook.sh", TRAINING=f"{show} >> $CALLED", **job)
        assert done.returncode == 0
        assert "network ib0" in machine.words
        assert "OMP_NUM_THREADS=5" in done.stdout
        Path(f"{machine.called}.starts").unlink()
    done = machine.run("configs/x.yaml", HOOK="nowhere.sh")
    assert (done.returncode, done.stderr) == (
        2,
        f"pretrain.sh: HOOK=nowhere.sh: there is no such file in {machine.root}\n",
    )


def test_what_nodes_say_goes_to_the_folder_of_logs(machine: Machine, tmp_path: Path) -> None:
    machine.run("configs/x.yaml", LOGS=f"{tmp_path}/logs", **JOB)
    assert f"{tmp_path}/logs/45678.0" in machine.words
    assert (tmp_path / "logs" / "45678.starts").exists()


def test_slurm_without_gpus_spreads_the_ranks_over_the_nodes(machine: Machine) -> None:
    env = {
        **JOB,
        "RANKS": "",
        "CUDA_VISIBLE_DEVICES": "",
        "SLURM_CPUS_ON_NODE": "6",
        "OMP_NUM_THREADS": "2",
    }
    machine.run("configs/x.yaml", **env)
    assert {"--nproc-per-node=2", "--nnodes=2", "--cpus-per-task=6", "OMP_NUM_THREADS=2"} <= set(
        machine.words
    )


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


@pytest.mark.parametrize(
    ("training", "env", "status", "starts", "says"),
    [
        ("exit 0", {}, 0, 1, "done"),
        ("exit 2", {}, 2, 1, "a mistake"),
        ("exit 78", {"TRIES": "3"}, 78, 1, "bad numbers"),
        ("exit 137", {}, 137, 1, "failed 1 times"),  # a bug would only be shown twice
        (
            f"{SAVE.format(1)}; exit 1\n{SAVE.format(2)}; exit 137\nexit 0",
            {},
            0,
            3,
            "starting again",
        ),
        ("exit 1\nexit 1\nexit 0", {"TRIES": "3"}, 0, 3, "starting again"),
        (
            f"{SAVE.format(1)}; exit 1\n{SAVE.format(2)}; exit 1",
            {"RESTARTS": "1"},
            1,
            2,
            "last of 1 restarts",
        ),
        (ASKED.format("USR1") + "exit 75", {}, 75, 1, "goes on where it was"),
        (ASKED.format("TERM") + "exit 1", {}, 1, 1, "without a checkpoint"),
    ],
)
def test_one_machine_starts_again_where_that_helps(
    machine: Machine, training: str, env: dict[str, str], status: int, starts: int, says: str
) -> None:
    done = machine.run("configs/x.yaml", TRAINING=training, RANKS="1", **env)
    assert (done.returncode, machine.starts) == (status, starts)
    assert says in done.stdout


@pytest.mark.parametrize(
    ("training", "env", "status", "requeued", "says"),
    [
        ("exit 0", {}, 0, False, "done"),
        ("exit 2", {}, 2, False, "a mistake"),
        ("exit 78", {}, 78, False, "bad numbers"),
        (ASKED.format("USR1") + "exit 75", {}, 75, True, "requeueing"),
        (ASKED.format("TERM") + "exit 75", {}, 75, False, "goes on where it was"),
        # Scancel signals the ranks, not the launcher.
        (
            "exit 75",
            {},
            75,
            False,
            "goes on where it was",
        ),
        # On the same nodes.
        (
            "exit 1\nexit 137\nexit 0",
            {},
            0,
            False,
            "start 1: exit status 137; starting again",
        ),
        ("exit 1", {"TRIES": "1"}, 1, False, "failed 1 times in a row"),
        # Cancelled before the handlers were there.
        (
            "exit 1",
            {"STATE": "COMPLETING"},
            1,
            False,
            "ended by Slurm",
        ),
        ("exit 1", {"SLURM_RESTART_COUNT": "100"}, 1, False, "last of 100 restarts"),
        ("", {"LOOK": "exit 2"}, 2, False, "a mistake"),
        # A node cannot be reached.
        (
            "exit 1",
            {"LOOK": "\nexit 1"},
            1,
            True,
            "start 1: exit status 1; requeueing",
        ),
        (ASKED.format("TERM") + "exit 1", {"LOOK": "exit 0"}, 1, False, "without a checkpoint"),
        ("", {"LOOK": ASKED.format("USR1") + "exit 0"}, 75, True, "requeueing"),
        # Before there is anything to stop.
        (
            "exit 1",
            {"EARLY": "kill -USR1 $PPID"},
            75,
            True,
            "requeueing",
        ),
        # While the preflight is composed.
        (
            "exit 0",
            {"MEANWHILE": ASKED_BY_A_PIPE},
            75,
            True,
            "requeueing",
        ),
        ("exit 0", {"MEANWHILE": ASKED_BY_A_PIPE, "PREFLIGHT": "no"}, 75, True, "requeueing"),
        ("exit 0", {"LOOK": "exit 1", "PREFLIGHT": "no"}, 0, False, "done"),
        (ASKED.format("USR1") + "exit 75", {"REFUSED": "1"}, 75, True, "submitted again"),
    ],
)
def test_a_job_is_requeued_where_that_helps(
    machine: Machine, training: str, env: dict[str, str], status: int, requeued: bool, says: str
) -> None:
    done = machine.run("configs/x.yaml", TRAINING=training, **JOB, **env)
    assert (done.returncode, "requeue 45678" in machine.words) == (status, requeued)
    assert says in done.stdout


def test_a_signal_in_the_moment_of_a_start_is_not_lost(machine: Machine, tmp_path: Path) -> None:
    """Between two lines: what is to be told runs already, and is not known yet."""
    (tmp_path / "trace.sh").write_text("""[[ $0 == *pretrain.sh ]] || return
set -o functrace
trap 'if [[ $BASH_COMMAND == "child=\\$!" ]]; then kill -USR1 $$; fi' DEBUG
""")
    env = {**JOB, "PREFLIGHT": "no", "BASH_ENV": str(tmp_path / "trace.sh")}
    done = machine.run("configs/x.yaml", TRAINING="exec sleep 60", **env)
    assert (done.returncode, "requeue 45678" in machine.words) == (128 + signal.SIGUSR1, True), (
        done.stdout
    )


@pytest.mark.parametrize(
    ("excluded", "list_"), [("", "node9"), ("node3,node4", "node3,node4,node9")]
)
def test_nodes_that_are_not_fit_are_left_out_of_the_next_start(
    machine: Machine, excluded: str, list_: str
) -> None:
    look = "echo --exclude=node9 > runs/x/logs/45678.0-preflight-node10.log; exit 77"
    done = machine.run("configs/x.yaml", LOOK=look, EXCLUDED=excluded, **JOB)
    assert done.returncode == 77
    assert machine.words == ["requeue 45678", f"update JobId=45678 ExcNodeList={list_}"]
    assert "start 0: exit status 77; requeueing without node9\n" in done.stdout


def test_a_job_uses_the_nodes_that_fit(machine: Machine) -> None:
    done = machine.run("configs/x.yaml", FIT="1", **JOB)
    assert "== 1 of the job's 2 nodes are used" in done.stdout
    assert {"--nodes=1", "--ntasks=1", "--nodelist=node10", "--nnodes=1"} <= set(machine.words)


def test_a_job_that_fails_without_a_new_checkpoint_is_given_up(machine: Machine) -> None:
    """Failures are counted over requeues, where a node is lost after each; a new checkpoint begins
    the count anew."""
    told = []
    for training in ("exit 1", f"{SAVE.format(1)}; exit 1", "exit 1"):
        Path(f"{machine.called}.starts").unlink(missing_ok=True)
        Path(f"{machine.called}.looks").unlink(missing_ok=True)
        done = machine.run("configs/x.yaml", TRAINING=training, LOOK="\nexit 1", **JOB)
        told.append("requeue 45678" in machine.words)
    assert told == [True, True, False], done.stdout


def test_a_job_that_is_always_stopped_before_it_trains_is_given_up(machine: Machine) -> None:
    told = []
    for _ in range(3):
        done = machine.run("configs/x.yaml", EARLY="kill -USR1 $PPID", **JOB)
        told.append("requeue 45678" in machine.words)
        machine.called.unlink(missing_ok=True)
    assert told == [True, True, False], done.stdout
    assert "failed 3 times in a row without a new checkpoint" in done.stdout


def test_the_summary_names_each_node(machine: Machine) -> None:
    logs = "runs/x/logs/45678.0"
    said = f"echo '== 2026-01-01 node10: rank 1: exit status 1' > {logs}-node10.log"
    trace = f"printf 'Trace\\n[rank1]: ValueError: no such thing\\n' > {logs}-node10.log"
    done = machine.run(
        "configs/x.yaml", TRAINING=f"{trace}; {said.replace('>', '>>')}; exit 1", **JOB
    )
    assert "== 2026-01-01 node10: rank 1: exit status 1; ValueError: no such thing\n" in done.stdout
    assert "== node9: lost, or ended from outside\n" in done.stdout


def test_a_sweep_is_started_on_each_node_and_requeued_before_its_time_limit(
    machine: Machine,
) -> None:
    machine.script = machine.root / "slurm" / "sweep.sh"
    sweep = ["-m", "megalite", "sweep", "configs/x.yaml", "trials=3"]
    assert machine.run("configs/x.yaml", "trials=3", TRAINING="exit 7").returncode == 7
    assert machine.words == ["python", *sweep]
    assert shlex.split(machine.run("--dry-run", "configs/x.yaml", "trials=3").stdout) == [
        "python",
        *sweep,
    ]
    assert "no sweep configs/y.yaml in " in machine.run("configs/y.yaml").stderr
    for name, called in (("USR1", ["requeue 45678"]), ("TERM", [])):
        machine.called.unlink()
        Path(f"{machine.called}.starts").unlink()
        done = machine.run(
            "configs/x.yaml", TRAINING=f"{ASKED.format(name)} exit 75", SLURM_JOB_ID="45678"
        )
        assert done.returncode == 75
        assert machine.words[5:] == called
