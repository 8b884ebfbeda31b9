"""Train on disks of 2 MB, in a namespace of mounts that ends with this process; print what came of
it as JSON.

unshare -rm python on_a_small_disk.py CONFIG FOLDER...     each FOLDER's last part says what happens on its disk
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from megalite.checkpoint import writing
from megalite.checkpoint.save import Saver
from megalite.cli import main
from megalite.training.run import DISK


def fill(folder: Path) -> None:
    """To the last byte."""
    with open(folder / "filler", "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017


def digests(folder: Path) -> dict[str, str]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
    }


def train(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The disk is full or read-only from before the save of step 3 until before that of step 5, or
    to the end."""
    what = folder.name
    run = folder / "test"
    disk = run / "checkpoints" if what == "read-only" else folder
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], check=True)
    older: dict[str, str] = {}

    class Trouble(Saver):
        def save(self, step: int, train_state: dict[str, Any]) -> None:
            if step == 3:
                self.wait()
                older.update(digests(run / "checkpoints"))
                if what == "read-only":
                    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
                else:
                    fill(disk)
            if step == 5:
                self.wait()  # or step 4, tried again just then, would find room
                assert digests(run / "checkpoints") == older
                if what == "read-only":
                    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
                elif what == "full":
                    (disk / "filler").unlink()
            super().save(step, train_state)

    DISK.make_saver = Trouble
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config | {"run": {"name": "test", "dir": str(folder)}}))
    log = open(folder / "log", "a")  # noqa: SIM115
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    log.close()
    status = main(["train", str(path)])
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    return {
        "status": status,
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
        "kept": all(
            digests(run / "checkpoints").get(name) == digest for name, digest in older.items()
        ),
        "steps": [record["step"] for line in metrics if "loss" in (record := json.loads(line))],
        "heartbeat": json.loads((run / "health" / "rank-00000.json").read_text())["phase"],
        "log": (folder / "log").read_text(),
    }


if __name__ == "__main__":
    said = os.fdopen(os.dup(1), "w")
    writing.PAUSES_S = (0.05, 0.05)  # type: ignore[misc, assignment]
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    print(json.dumps([train(config, Path(folder)) for folder in sys.argv[2:]]), file=said)
    said.flush()
    os._exit(0)
