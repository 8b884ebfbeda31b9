"""Runs whose ranks are killed, started again until one ends well.

What starts, watches and ends the ranks is `megalite.launch`, and each runs `megalite train`; but
both are forked from a process that has imported all they need, so that a start takes a second. Each
rank notes every phase it enters, and everything it is about to do to the files of the checkpoints,
by a system call that SIGKILL does not take back. So a kill can be aimed: at a moment of a phase,
for which this process waits, or at one operation on a file, before which the rank kills itself.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import (
    SubprocessHandler,
)

import megalite.train  # noqa: F401  (imported late by the command)
from megalite import cli, launch
from megalite.checkpoint.folder import complete_steps, step_folder
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.indexed_writer import IndexedWriter
from megalite.health.signals import SIGNALS
from megalite.runtime.activity import Activity

Tamper = Callable[[int], None]

RANKS = 2
STEPS, EVERY, KEEP = 12, 3, 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "data 2, ZeRO-1": {"zero_stage": 1},
    "tensor 2": {"tensor": 2},
    "pipeline 2": {"pipeline": 2},
}
PHASES = (
    "starting",
    "first step",
    "training",
    "validating",
    "saving",
    "writing",
    "reading",
    "ending",
)
"""What a rank can be killed in. `saving`: gathering what is to be saved; `writing`: that goes to
disk, or older checkpoints are deleted, while training goes on; `reading`: a start reads a
checkpoint."""

AGAIN = 1 / 3
"""How likely a rank of the second start is killed as well."""

PATIENCE_S = 120.0
MOST_STARTS = 6
FILE_EVENTS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}
"""Of Python's audit events, those about files."""


def prepare(folder: Path) -> None:
    """The corpus, and in this process what ranks would else have to do first thing each: rank 0
    draws its loss."""
    write_corpus(folder / "corpus")
    figure = Figure()
    figure.subplots().plot([0, 1])
    figure.savefig(io.BytesIO())


def write_corpus(prefix: Path) -> None:
    tokens = np.random.default_rng(5).integers(0, 96, 4000).astype(np.uint16)
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in np.array_split(tokens, 9):
            writer.add_document(document)


def _corpus_above(folder: Path) -> Path:
    return next(above / "corpus" for above in folder.parents if (above / "corpus.idx").exists())


def config_of(folder: Path, layout: str, **changes: dict[str, Any]) -> Config:
    """A run of STEPS steps below `folder`, on the corpus that `prepare` made above it."""
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "dir": str(folder)},
        "model": {
            "family": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2,
            "num_attention_heads": 4, "max_positions": 64,
        },
        "data": {
            "train": [{"path": str(_corpus_above(folder))}], "valid": [{"path": str(_corpus_above(folder))}],
            "seq_length": 32,
        },
        "parallel": {**LAYOUTS[layout], "bucket_mb": 0.01},
        "train": {"steps": STEPS, "global_batch_size": 4, "precision": "fp32"},
        "optimizer": {"lr": 1e-2, "schedule": {"name": "cosine", "warmup_steps": 2}},
        "checkpoint": {"every": EVERY, "keep": KEEP},
        "observe": {"eval_every": 5, "eval_batches": 1},
    }  # fmt: skip
    for section, settings in changes.items():
        values.setdefault(section, {}).update(settings)
    return parse_config(values)


class Note(NamedTuple):
    time: float
    """Of the clock that all processes of this machine share."""
    kind: str
    """born, phase or file."""
    step: int
    text: str


@dataclass(frozen=True)
class Aim:
    """At one rank: before its operation on a file of that number, or so long after it entered its
    phase of that number (0: after it began)."""

    rank: int
    file: int | None = None
    phase: int = 0
    seconds: float = 0.0
    signal: signal.Signals = signal.SIGKILL


@dataclass
class Start:
    """One start of the launcher, and what its ranks noted."""

    status: int
    notes: list[list[Note]]
    """Of each rank."""
    ended: float
    killed: float | None = None
    log: str = ""
    resumed: int = 0
    """The step it went on after."""

    @property
    def born(self) -> float:
        return max((notes[0].time for notes in self.notes if notes), default=self.ended)

    @property
    def steps(self) -> int:
        """Steps that a rank had finished."""
        last = [note for notes in self.notes for note in notes if note.kind == "phase"]
        return max(
            (n.step - (n.text in ("first step", "training")) for n in last if n.step),
            default=self.resumed,
        )


def run_once(
    config: Config,
    folder: Path,
    aim: Aim | None = None,
    tamper: Tamper | None = None,
    ranks: int = RANKS,
) -> Start:
    """Start the launcher, as `slurm/pretrain.sh` does, and wait until it has ended. `tamper(rank)`
    is called on each rank before it trains."""
    folder.mkdir(parents=True)
    resumed = max(complete_steps(config.run.folder / "checkpoints"), default=0)
    launcher = os.fork()
    if launcher == 0:
        _be_launcher(config, folder, aim, tamper, ranks)
    killed, status = None, None
    if aim is not None and aim.file is None:
        killed, status = _kill_at(aim, folder, launcher)
    if status is None:
        status = _wait(launcher)
    ended, notes = time.monotonic(), [read_notes(folder, rank) for rank in range(ranks)]
    start = Start(os.waitstatus_to_exitcode(status), notes, ended)
    start.killed, start.resumed, start.log = killed, resumed, (folder / "log").read_text()
    if aim is not None and aim.file is not None and start.status:
        start.killed = start.notes[aim.rank][-1].time
    left = [
        rank
        for rank in range(ranks)
        if notes[rank] and Path(f"/proc/{notes[rank][0].text}").exists()
    ]
    if left:
        raise RuntimeError(f"rank {left[0]} outlived its launcher; what they said:\n{start.log}")
    return start


def _be_launcher(
    config: Config, folder: Path, aim: Aim | None, tamper: Tamper | None, ranks: int
) -> NoReturn:
    os.setsid()
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    (folder / "config.yaml").write_text(config.to_yaml())

    def popen(
        handler: SubprocessHandler, arguments: Sequence[str], env: dict[str, str]
    ) -> ForkedRank:
        rank = int(env["RANK"])
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for number in SIGNALS:  # a new program would not have the launcher's handlers
                signal.signal(number, signal.SIG_DFL)
            os.environ |= env
            last_file = aim.file if aim and aim.rank == rank else None
            _take_notes(folder / f"rank-{rank}", config.run.folder / "checkpoints", last_file)
            torch.set_num_threads(1)
            if tamper:
                tamper(rank)
            _end(lambda: cli.main(arguments[arguments.index("megalite") + 1 :]))
        return ForkedRank(pid)

    SubprocessHandler._popen = popen  # type: ignore[assignment, method-assign]
    task = ["-m", "megalite", "train", str(folder / "config.yaml")]
    _end(
        lambda: launch.main(
            [f"--nproc-per-node={ranks}", "--standalone", "--local-addr=127.0.0.1", *task]
        )
    )


class ForkedRank:
    """What the launcher uses of `subprocess.Popen`, of a rank that need not import anything any
    more."""

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.005)
        return status


def _end(main: Callable[[], int]) -> NoReturn:
    """A forked process, by the status of `main`: what this one still had to do is not for it."""
    status = 1
    try:
        status = main()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _take_notes(path: Path, checkpoints: Path, last_file: int | None) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    begin, files = Activity.begin, 0

    def note(kind: str, step: int, text: str) -> None:
        os.write(file, f"{time.monotonic():.6f}\t{kind}\t{step}\t{text}\n".encode())

    def noted_begin(self: Activity, phase: str, step: int) -> None:
        begin(self, phase, step)
        note("phase", step, phase)

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal files
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(checkpoints)):
            mode = arguments[1] if event == "open" else None
            reads = event == "open" and (mode or "").startswith("r")
            note("file", 0, f"{'read' if reads else event.removeprefix('os.')} {arguments[0]}")
            if files == last_file:
                os.kill(os.getpid(), signal.SIGKILL)
            files += 1

    Activity.begin = noted_begin  # type: ignore[method-assign]
    note("born", 0, str(os.getpid()))
    sys.addaudithook(see)


def read_notes(folder: Path, rank: int) -> list[Note]:
    try:
        # What is being written, or was when the rank was killed, may have no end.
        lines = (folder / f"rank-{rank}").read_text().rpartition("\n")[0].splitlines()
    except FileNotFoundError:
        return []
    cut = [line.split("\t", 3) for line in lines]
    return [Note(float(moment), kind, int(step), text) for moment, kind, step, text in cut]


def _kill_at(aim: Aim, folder: Path, launcher: int) -> tuple[float | None, int | None]:
    """When the rank was killed, or the status of a launcher that had ended before."""
    while True:
        ended, status = os.waitpid(launcher, os.WNOHANG)
        if ended:
            return None, status
        notes = read_notes(folder, aim.rank)
        entered = [note.time for note in notes if note.kind != "file"]
        if len(entered) > aim.phase and time.monotonic() >= entered[aim.phase] + aim.seconds:
            with contextlib.suppress(ProcessLookupError):  # it has just left by itself
                os.kill(int(notes[0].text), aim.signal)
                return time.monotonic(), None
        time.sleep(0.0005)


def _wait(launcher: int) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(launcher, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.005)
    os.kill(launcher, signal.SIGTERM)
    raise TimeoutError(f"a start had not ended after {PATIENCE_S:.0f} s")


def phase_of(notes: Sequence[Note], before_file: bool = False) -> str:
    """What a rank was in after its last note, or just before the operation on a file that this is
    about."""
    phase = next((note.text for note in reversed(notes) if note.kind == "phase"), "starting")
    file = next((note.text for note in reversed(notes) if note.kind == "file"), "")
    if before_file:
        return "reading" if file.startswith("read") and ".tmp" not in file else "writing"
    # Ranks above 0 have done their part of a save when they say so; rank 0, when the folder has its
    # name.
    return "writing" if ".tmp" in file and not re.match(r"rename .*/\.part-[1-9]", file) else phase


class Span(NamedTuple):
    """Part of a phase, in seconds since the rank began."""

    rank: int
    number: int
    """Of the phase it entered last."""
    entered: float
    begin: float
    end: float


@dataclass(frozen=True)
class Reference:
    """A run that was never disturbed: what all others must come to, and when it was in which
    phase."""

    curve: list[Any]
    tensors: dict[str, Any]
    spans: dict[str, list[Span]]
    """Of each phase."""
    files: list[int]
    """Operations on files of each rank."""
    seconds: float


def outcome(config: Config) -> tuple[list[Any], dict[str, Any]]:
    """The loss curve, and the digests of the last checkpoint's tensors."""
    lines = map(json.loads, (config.run.folder / "metrics.jsonl").read_text().splitlines())
    curve = [
        [line[key] for key in ("step", "loss", "lr", "grad_norm", "tokens")]
        for line in lines
        if "loss" in line
    ]
    files = json.loads(
        (step_folder(config.run.folder / "checkpoints", STEPS) / "manifest.json").read_text()
    )["files"]
    return curve, {name: digest for name, digest in files.items() if name.endswith(".safetensors")}


def undisturbed(config: Config, folder: Path, ranks: int = RANKS) -> Reference:
    start = run_once(config, folder / "start-0", ranks=ranks)
    if start.status:
        raise RuntimeError(f"a run that nobody disturbed failed\n{start.log}")
    spans: defaultdict[str, list[Span]] = defaultdict(list)
    for rank, notes in enumerate(start.notes):
        born, ends = notes[0].time, [*(note.time for note in notes[1:]), start.ended]
        entered = [born]
        for number, (note, end) in enumerate(zip(notes, ends, strict=True)):
            entered += [note.time] if note.kind == "phase" else []
            span = Span(rank, len(entered) - 1, entered[-1] - born, note.time - born, end - born)
            spans[phase_of(notes[: number + 1])].append(span)
    files = [sum(note.kind == "file" for note in notes) for notes in start.notes]
    return Reference(*outcome(config), dict(spans), files, start.ended - start.born)


def draw(reference: Reference, rng: random.Random) -> Aim:
    """A moment of a phase, each phase as likely, or an operation on a file."""
    if rng.random() < 1 / 3:
        rank = rng.randrange(RANKS)
        return Aim(rank, file=rng.randrange(reference.files[rank]))
    spans = reference.spans[rng.choice(sorted(reference.spans))]
    (span,) = rng.choices(spans, [span.end - span.begin for span in spans])
    return Aim(
        span.rank, phase=span.number, seconds=rng.uniform(span.begin, span.end) - span.entered
    )


@dataclass
class Kill:
    layout: str
    rank: int
    phase: str
    seconds: float
    """Since the rank began."""
    doing: str
    until_ended: float
    """Seconds until the launcher and all other ranks had ended."""
    until_restarted: float
    """Seconds until the next start's ranks began."""
    lost_steps: int


@dataclass
class Trial:
    layout: str
    kills: list[Kill] = field(default_factory=list)
    same: bool = False
    problem: str = ""
    log: str = ""
    """What the ranks said, where something is wrong."""


def run_trial(
    layout: str, reference: Reference, folder: Path, rng: random.Random, **changes: dict[str, Any]
) -> Trial:
    """Kill a rank of a run, perhaps also one of the start after that, and start until the run ends
    by itself. A trial whose kill came too late has none. `changes` are those of `config_of`."""
    config, trial = config_of(folder, layout, **changes), Trial(layout)
    starts: list[Start] = []
    aims: list[tuple[Aim, Start]] = []
    while not starts or starts[-1].status:
        if len(starts) == MOST_STARTS:
            trial.problem = f"did not end in {MOST_STARTS} starts"
            break
        aim = (
            draw(reference, rng)
            if not starts or (len(starts) == 1 and rng.random() < AGAIN)
            else None
        )
        starts.append(run_once(config, folder / f"start-{len(starts)}", aim))
        if aim and starts[-1].killed:
            aims.append((aim, starts[-1]))
        elif starts[-1].status:
            trial.problem = f"exit status {starts[-1].status}, and nobody had killed a rank"
            break
    for (aim, killed), following in zip(aims, starts[1:], strict=False):
        trial.kills.append(_kill_of(layout, aim, killed, following))
    if not trial.problem:
        trial.same = outcome(config) == (reference.curve, reference.tensors)
    if trial.problem or not trial.same:
        trial.log = "\n".join(start.log for start in starts)
    return trial


def _kill_of(layout: str, aim: Aim, killed: Start, following: Start) -> Kill:
    notes, moment = killed.notes[aim.rank], killed.killed or killed.ended
    born = notes[0].time
    doing = re.sub(r" .*/checkpoints/?", " ", notes[-1].text) if aim.file is not None else ""
    return Kill(
        layout,
        aim.rank,
        phase_of(notes, aim.file is not None),
        moment - born,
        doing,
        killed.ended - moment,
        following.born - moment,
        max(0, killed.steps - following.resumed),
    )
