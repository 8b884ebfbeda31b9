"""A crash at any moment of a save leaves a checkpoint to go on from: the one before, or the new
one, whole.

Every file operation of real saves is recorded; each of their prefixes is replayed as a kill and as
a power cut, and the next start looks for its checkpoint there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from crashes import Crash, Recorded, recorded
from megalite.checkpoint.folder import read_manifest, step_folder
from megalite.checkpoint.load import from_seed
from megalite.checkpoint.resume import find_checkpoint
from megalite.checkpoint.save import Saver
from megalite.comm.mesh import Mesh
from megalite.engine.layout import bucket_elements, choose_owners
from megalite.models import weight_table
from megalite.models.peft import TENSORS
from megalite.plan import make_plan
from megalite.training.parts import build
from small_runs import make_config

LONE = Mesh.alone()
MODEL = {
    "family": "llama", "vocab_size": 64, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1,
    "num_attention_heads": 2, "max_positions": 16,
}  # fmt: skip


@pytest.fixture
def saver(tmp_path: Path) -> Callable[[int, str], Saver]:
    """Makes what a start of a run makes: (checkpoints to keep, stem of the files) → its saver."""
    config = make_config(tmp_path, MODEL)
    weights = weight_table(config.model)
    plan = make_plan(config, weights, 1)
    engine = build(config, plan, LONE).engine
    engine.load(from_seed(1, Mesh.alone()))
    owners = choose_owners(plan, weights, config.optimizer, bucket_elements(config, plan))
    (tmp_path / "checkpoints").mkdir()

    def make(keep: int, stem: str = "model") -> Saver:
        def write_extras(folder: Path) -> None:
            (folder / "config.json").write_text("{}")

        return Saver(
            tmp_path / "checkpoints", keep, weights, LONE, engine, owners, write_extras, stem=stem
        )

    return make


def save(saver: Saver, step: int, record: Recorded, note: str = "") -> None:
    saver.save(step, {"step": step, "note": note})
    saver.wait()
    assert saver.error is None
    record.claim((step, note))


def what_a_start_finds(
    crash: Crash, folder: Path, saver: Callable[[int, str], Saver]
) -> tuple[int, str] | None:
    """Which save the next start goes on from, after it has tidied up."""
    crash.write(folder)
    root = folder.parent / "checkpoints"
    shutil.rmtree(root)
    folder.rename(root)
    found, _ = find_checkpoint(root, "auto", LONE)
    saver(1, "model")  # removes what was not finished
    again, _ = find_checkpoint(root, "auto", LONE)
    assert found == again, "tidying up took away, or brought up, a checkpoint"
    if found is None:
        return None
    assert found == step_folder(root, json.loads((found / "train_state.json").read_text())["step"])
    assert set(read_manifest(found)) >= {"config.json", "train_state.json"}
    state = json.loads((found / "train_state.json").read_text())
    return state["step"], state["note"]


def check_all(record: Recorded, tmp_path: Path, saver: Callable[[int, str], Saver]) -> int:
    """After every crash the newest save that was said to be done is there, or one that came after
    it."""
    order: list[tuple[int, str] | None] = [None]
    crashes = list(record.crashes())
    for crash in crashes:
        order += [claim for claim in crash.claimed if claim not in order]
        found = what_a_start_finds(crash, tmp_path / "crashed", saver)
        where = (
            f"{crash.kind} at moment {crash.moment} after {crash.claimed}: {sorted(crash.files)}"
        )
        if found in order:
            least = max((order.index(claim) for claim in crash.claimed), default=0)
            assert order.index(found) >= least, f"{found} is older than what was safe; {where}"
        # What is not in the order has not been claimed yet: it is the save under way.
        assert found is not None or not crash.claimed, where
    return len(crashes)


@pytest.mark.parametrize("stem", ["model", TENSORS])
def test_a_crash_at_any_moment_of_a_save(
    stem: str, tmp_path: Path, saver: Callable[[int, str], Saver], monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded(tmp_path / "checkpoints", monkeypatch) as record:
        first = saver(1, stem)
        save(first, 1, record)
        save(first, 2, record)  # and takes away the one before
        save(saver(1, stem), 3, record)
    assert check_all(record, tmp_path, saver) > 40


def test_a_crash_while_a_step_is_saved_again(
    tmp_path: Path, saver: Callable[[int, str], Saver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a resume from an older checkpoint. The only one there is gives way to its
    successor."""
    with recorded(tmp_path / "checkpoints", monkeypatch) as record:
        first = saver(1, "model")
        save(first, 1, record, "first")
        save(first, 1, record, "second")
        save(first, 1, record, "third")
    assert check_all(record, tmp_path, saver) > 40
