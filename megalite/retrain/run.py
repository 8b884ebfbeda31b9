"""`megalite retrain`: a round, from new rows to a swapped model or a reason why not. Each phase writes
what it came to before the next begins: after a kill a round goes on where it was."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from megalite.bias.intervals import FEWEST
from megalite.checkpoint.folder import remove, write_json
from megalite.config_file import parse_config
from megalite.data.formats import Settings
from megalite.data.preprocess_rows import preprocess_rows
from megalite.errors import ConfigError, DataError
from megalite.infer.serving.loading import version_of
from megalite.monitor.intervals import NOTHING, Interval
from megalite.retrain import rows
from megalite.retrain.config import RetrainConfig
from megalite.retrain.judge import Verdict, check, judge, told, worthless
from megalite.retrain.page import page_of
from megalite.retrain.swap import Refused, reload, target_of, turn
from megalite.runtime.exit_codes import Exit, describe
from megalite.runtime.processes import handling
from megalite.utils.files import replacing
from megalite.utils.locks import Locked, alone_in
from megalite.utils.outside import read_object, shown
from megalite.utils.resources import read_yaml

MOST_HELD_OUT = 2000
"""Held-out rows that judge, the newest."""
DECIDED = ("swapped", "kept")
"""Outcomes of a round that is over."""
Say = Callable[[str], object]


class Round:
    """Holds a round's folder and its state."""

    def __init__(self, folder: Path):
        self.folder, self._file = folder, folder / "round.json"
        self.state: dict[str, Any] = (
            read_object(self._file, DataError) if self._file.exists() else {}
        )

    @property
    def is_over(self) -> bool:
        """Return whether it has been decided."""
        return self.state.get("outcome") in DECIDED

    def note(self, **facts: Any) -> None:
        """Write facts to the state, durably."""
        self.state |= facts
        write_json(self._file, self.state)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return its rows "train" or "held-out"."""
        return rows.read_back(self.folder / f"{name}.jsonl")


class Unfinished(Exception):
    """Raised where a round's training has stopped or failed. It goes on when started again."""

    def __init__(self, status: int, console: Path):
        super().__init__(f"training ended with {describe(status)}; {console} says more")
        self.status = status


def retrain(config: RetrainConfig, say: Say) -> int:
    """Go on with the round that is under way, or begin one if there are enough new rows. Return the
    exit status; `say` gets lines on what happens. Raises ConfigError, DataError or
    CheckpointError."""
    served = target_of(config.served)
    try:
        with alone_in(config.dir):
            return _next_round(config, served, say)
    except Locked:
        say(f"another retraining is under way in {config.dir}")
        return Exit.DONE


def _next_round(config: RetrainConfig, served: Path, say: Say) -> int:
    """Do as `retrain` does, alone in the folder of the rounds."""
    rounds = [Round(folder) for folder in sorted(config.dir.glob("round-[0-9]*"))]
    for unborn in [each for each in rounds if not each.state]:
        # Killed before it had begun: its rows are still new.
        remove(unborn.folder)
        rounds.remove(unborn)
    current = next((each for each in rounds if not each.is_over), None)
    before = [each for each in rounds if each.is_over]
    if current is None:
        current = begin(config, before, served, say)
        if current is None:
            return Exit.DONE
    try:
        _go_on(config, current, before, say)
    except Unfinished as problem:
        say(str(problem))
        return problem.status
    _remove_old(config, [*before, current])
    return Exit.DONE


def begin(config: RetrainConfig, before: list[Round], served: Path, say: Say) -> Round | None:
    """Begin a round with the rows that none before has used; None where there are too few."""
    used = {
        rows.key_of(row)
        for each in before
        for name in ("train", "held-out")
        for row in each.rows(name)
    }
    found = rows.collect(config.rows, used, config.held_out_share)
    if found.num_bad:
        say(f"{found.num_bad} rows have no prompt with a completion, and are left out")
    if len(found.train) < config.min_rows:
        say(
            f"{len(found.train)} new rows to train on, fewer than min_rows = {config.min_rows}: nothing to do"
        )
        return None
    judges = {
        rows.question_of(row)
        for each in (found.held_out, *(each.rows("held-out") for each in before))
        for row in each
    }
    if len(judges) < FEWEST:
        say(
            f"{len(judges)} held-out questions, of which {FEWEST} are needed to judge a model: nothing to do until "
            "there are more ratings"
        )
        return None
    # The number behind the highest: older rounds may have been deleted.
    number = max((each.state["number"] for each in before), default=0) + 1
    folder = config.dir / f"round-{number:04d}"
    # Mistakes are told before anything is begun: what a round has taken is new for no other.
    parse_config(run_config(config, folder, served), origin=str(config.config))
    check(config)
    folder.mkdir()
    rows.write(folder / "train.jsonl", found.train)
    rows.write(folder / "held-out.jsonl", found.held_out)
    # From here on the round is there, and its rows are used: they are on disk before it says so.
    fresh = Round(folder)
    fresh.note(
        number=number, began=time.time(), served=str(served), version=version_of(served),
        num_train=len(found.train), num_held_out=len(found.held_out), margin=config.margin,
    )  # fmt: skip
    say(f"{folder}: {len(found.train)} new rows to train on, {len(found.held_out)} held out")
    return fresh


def _go_on(config: RetrainConfig, current: Round, before: list[Round], say: Say) -> None:
    """Do what of a round is not done yet."""
    folder, state = current.folder, current.state
    served = Path(state["served"])
    if "verdict" not in state and not (folder / "model").exists():
        _prepare(config, current, before, say)
        try:
            _train(folder, say)
        except Unfinished as problem:
            # Starting again would meet the same numbers.
            if problem.status != Exit.BAD_NUMBERS:
                raise
            current.note(verdict=_noted(worthless(str(problem))))
    if "verdict" not in state:
        say("comparing it with the served model")
        verdict = judge(config, served, folder / "model", folder / "held-out", folder)
        current.note(verdict=_noted(verdict), margin=config.margin)
    verdict = _verdict_of(state)
    for line in told(verdict):
        say(line)
    outcome, text = _decide(config, current, verdict)
    # The page before the outcome: a round that is over has one.
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page_of(state, verdict, outcome, text), encoding="utf-8")
    current.note(outcome=outcome, text=text, ended=time.time())
    say(f"{outcome}: {text}; {folder / 'report.html'} says why")


def _prepare(config: RetrainConfig, current: Round, before: list[Round], say: Say) -> None:
    """Write token files of the round's rows, and the config of its run."""
    folder, served = current.folder, Path(current.state["served"])
    file = folder / "config.yaml"
    if not file.exists():
        _tokenize(folder, [*before, current], served, say)
    # Until there is something to go on from, what has been mended in the config counts.
    if not any((folder / "run" / "checkpoints").glob("step-*")):
        values = run_config(config, folder, served)
        with replacing(file, durable=True) as temporary:
            temporary.write_text(yaml.safe_dump(values, sort_keys=False))


def _tokenize(folder: Path, rounds: list[Round], served: Path, say: Say) -> None:
    """Write token files of a round's rows; `rounds` are all up to it."""
    held_out = [row for each in rounds for row in each.rows("held-out")]
    rows.write(folder / rows.JUDGING, held_out[-MOST_HELD_OUT:])
    settings = Settings("completion", str(served))
    for source, prefix in (("train.jsonl", "new"), (rows.JUDGING, "held-out")):
        # Ratings are by strangers: one that cannot be used may not keep the others from being used.
        made = preprocess_rows(
            [str(folder / source)], folder / prefix, settings, bad_rows=sys.maxsize
        )
        for line in made.report.messages:
            say(f"left out: {line}")


def run_config(config: RetrainConfig, folder: Path, served: Path) -> dict[str, Any]:
    """Return the values of a round's run: the config's own, beginning at the served model, with the
    new rows and what is replayed as its data."""
    values = read_yaml(config.config)
    for name in ("run", "model", "data"):
        if not isinstance(values.get(name) or {}, dict):
            raise ConfigError(f"{config.config}: {name} = {shown(values[name])}: must be a section")
    parts = dict(values.get("data") or {})
    share = config.replay_share if config.replay else 0.0
    new = {"path": str(folder / "new"), "weight": 1 - share}
    old = [{"path": path, "weight": share / len(config.replay)} for path in config.replay]
    parts |= {
        "train": [new, *old],
        "valid": [{"path": str(folder / "held-out")}],
        "tokenizer": str(served),
    }
    parts.pop("split", None)  # the validation data are files of their own
    # A rating that is too long may not keep the others from being used, unless that is asked for.
    parts.setdefault("long_rows", "drop")
    run = (values.get("run") or {}) | {"name": "run", "dir": str(folder)}
    model = (values.get("model") or {}) | {"hf": str(served)}
    return values | {"run": run, "model": model, "data": parts}


def _train(folder: Path, say: Say) -> None:
    """Train, or go on training, and write the model as a folder of its own. Raise Unfinished."""
    say(f"training: {folder / 'run'}")
    megalite = [sys.executable, "-m", "megalite"]
    with open(folder / "console.log", "ab") as console:
        # What has its name is whole: the model counts as trained from the rename on.
        unfinished = folder / "model.unfinished"
        remove(unfinished)
        for words in (
            ["launch", str(folder / "config.yaml")],
            ["convert", str(folder / "run"), str(unfinished)],
        ):
            if (status := _run([*megalite, *words], console)) != Exit.DONE:
                raise Unfinished(status, folder / "console.log")
    unfinished.rename(folder / "model")


def _run(command: list[str], console: Any) -> int:
    """Run a command, and pass on the signal that asks it to save and stop."""
    # A process of its own, as a user would start it: its memory, and that of its ranks, is free when
    # models are compared, and an interrupted one is a run like any other.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
    # The launcher saves on SIGTERM, whichever way this process was asked: by Slurm before its time
    # limit (USR1), or at a terminal.
    asked = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    with handling(asked, lambda *_: process.send_signal(signal.SIGTERM)):
        return process.wait()


def _noted(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as JSON can hold it, which has no NaN."""
    pairs = {
        which: {name: [None if math.isnan(x) else x for x in pair] for name, pair in found.items()}
        for which, found in (("tasks", verdict.tasks), ("bias", verdict.bias))
    }
    gain = list(verdict.gain) if verdict.num_rows else None
    return verdict._asdict() | pairs | {"gain": gain}


def _verdict_of(state: dict[str, Any]) -> Verdict:
    """Return the verdict as it was noted."""
    values = dict(state["verdict"])
    for which in ("tasks", "bias"):
        values[which] = {
            name: tuple(math.nan if x is None else x for x in pair)
            for name, pair in values[which].items()
        }
    gain = Interval(*values["gain"]) if values["gain"] else NOTHING
    return Verdict(**values | {"gain": gain})


def _decide(config: RetrainConfig, current: Round, verdict: Verdict) -> tuple[str, str]:
    """Swap the model if it is better; return the outcome and why."""
    served, model = Path(current.state["served"]), current.folder / "model"
    if not verdict.is_better:
        return "kept", f"{served} goes on being served: {verdict.reasons[0]}"
    # A kill between turning the link and noting it does this once more.
    now = target_of(config.served)
    if now not in (served, model.resolve()):
        return (
            "kept",
            f"{config.served} was turned to {now} meanwhile, which this model was not compared with",
        )
    # The link first: a server that starts anew meanwhile must read what this one is told to read.
    turn(config.served, model)
    if not config.reload:
        return "swapped", f"{config.served} leads to {model}; send the server SIGHUP"
    try:
        return (
            "swapped",
            f"{config.served} leads to {model}, and is served as version {reload(config.reload)}",
        )
    except Refused as refused:
        turn(config.served, served)
        return "kept", f"the server refused {model}: {refused}"


def _remove_old(config: RetrainConfig, rounds: list[Round]) -> None:
    """Remove the models of old rounds, and of those that were not better; never what is served, or
    was served before it."""
    current = target_of(config.served)
    swapped = [each for each in rounds if each.state["outcome"] == "swapped"]
    # One more than `keep` of them: the newest is the one that is served.
    kept = {current, *((each.folder / "model").resolve() for each in swapped[-config.keep - 1 :])}
    for each in rounds:
        if (each.folder / "model").resolve() not in kept:
            remove(each.folder / "model")
            remove(each.folder / "run" / "checkpoints")
