"""Checkpoints that were cut short or lost a bit: found whichever file it is, named, passed over, on
all ranks alike."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megalite.checkpoint import folder as folder_module
from megalite.checkpoint import resume
from megalite.checkpoint.folder import (
    MANIFEST,
    Damage,
    Files,
    complete_steps,
    parse_manifest,
    read_manifest,
    replaced,
    step_folder,
)
from megalite.checkpoint.load import from_checkpoint
from megalite.checkpoint.resume import find_checkpoint, find_damage
from megalite.checkpoint.tensors import CheckpointError, TensorFolder
from megalite.comm.mesh import Mesh, make_mesh
from megalite.config import Config
from megalite.models import weight_table
from megalite.plan import make_plan
from megalite.runtime.activity import NOW
from megalite.runtime.exit_codes import passes
from ranks import run_ranks

LONE = Mesh.alone()


@pytest.fixture
def root(trained: Config, tmp_path: Path) -> Path:
    """Checkpoints of steps 8 and 12 that a test may damage."""
    for step in (8, 12):
        shutil.copytree(
            step_folder(trained.run.folder / "checkpoints", step), step_folder(tmp_path, step)
        )
    return tmp_path


def flip(place: int) -> Callable[[bytes], bytes]:
    def flipped(data: bytes) -> bytes:
        byte, bit = divmod(place % (8 * len(data)), 8)
        return data[:byte] + bytes([data[byte] ^ 1 << bit]) + data[byte + 1 :]

    return flipped


def damages(rng: random.Random) -> dict[str, Callable[[bytes], bytes]]:
    found = {
        f"bit {place}": flip(place)
        for place in (0, -1, *(rng.randrange(1 << 40) for _ in range(4)))
    }
    return found | {
        "cut to nothing": lambda data: b"",
        "cut in half": lambda data: data[: len(data) // 2],
        "cut by a byte": lambda data: data[:-1],
        "a byte more": lambda data: data + b"\0",
        "zeros": lambda data: bytes(len(data)),
    }


def test_damage_to_any_file_is_found_and_the_checkpoint_before_is_taken(root: Path) -> None:
    newest, before = step_folder(root, 12), step_folder(root, 8)
    (newest / "README.md").write_text("a card that somebody has written")  # which is no damage
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.suffix != ".md")
    assert len(files) > 12
    assert {path.suffix for path in files} == {".safetensors", ".json", ".yaml"}
    rng = random.Random(1)
    for path in files:
        name, whole = str(path.relative_to(newest)), path.read_bytes()
        for what, damage in damages(rng).items():
            path.write_bytes(damage(whole))
            found, warnings = find_checkpoint(root, "auto", LONE)
            assert found == before, f"{what} of {name} was not noticed"
            assert len(warnings) == 1
            assert "step-00000012 is damaged and was set aside" in warnings[0]
            # A name in the manifest may be what was damaged.
            assert name in warnings[0] or name == MANIFEST
            assert f"resuming from {before}" in warnings[0]
            # Out of the way: pruning must not keep it in place of a good one. But not lost.
            assert complete_steps(root) == [8]
            (aside,) = root.glob("step-00000012.damaged-*")
            aside.rename(newest)
        path.unlink()
        found, (warning,) = find_checkpoint(root, "auto", LONE)
        assert found == before
        assert f"{name} is missing" in warning
        next(root.glob("step-00000012.damaged-*")).rename(newest)
        path.write_bytes(whole)
    assert find_checkpoint(root, "auto", LONE) == (newest, [])


def test_no_bit_of_the_manifest_can_change_unnoticed(root: Path) -> None:
    """What the flip leaves readable must differ from what was written, so that the files do not
    match it."""
    folder = step_folder(root, 12)
    whole = read_manifest(folder)
    assert not isinstance(whole, Damage)
    names = [name for name in whole if "of-00002" in name or name.endswith("index.json")][:6]
    data = json.dumps({"files": {name: whole[name] for name in names}}, indent=1).encode()
    written = parse_manifest(data)
    for place in range(8 * len(data)):
        try:
            found = parse_manifest(flip(place)(data))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        gone = any(not (folder / name).is_file() for name in found.keys() - written.keys())
        changed = any(entry != written[name] for name, entry in found.items() if name in written)
        assert gone or changed, f"bit {place}: {flip(place)(data)!r}"


def test_a_disk_that_cannot_read_is_damage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = step_folder(root, 12) / "train_state.json"

    def read(path: Path) -> dict[str, object]:
        if path.name == victim.name:
            raise OSError(5, "Input/output error")
        return real(path)

    real = folder_module.digest
    monkeypatch.setattr(folder_module, "digest", read)
    assert find_damage(victim.parent, LONE) == {"train_state.json": Damage.UNREADABLE}
    with pytest.raises(
        CheckpointError, match=r"every .*: train_state\.json cannot be read"
    ) as error:
        find_checkpoint(root, "auto", LONE)
    assert passes(error.value), "a launcher tries again, as the disk may come back"


def test_a_checkpoint_that_cannot_get_its_name_back_is_no_reason_to_begin_afresh(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that did would delete it as unfinished."""
    for step in (8, 12):
        step_folder(root, step).rename(replaced(step_folder(root, step)))

    def refused(self: Path, target: Path) -> Path:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refused)
        with pytest.raises(CheckpointError, match="name back: Input/output error") as error:
            find_checkpoint(root, "auto", LONE)
    assert passes(error.value), "a launcher tries again, as the disk may come back"
    assert find_checkpoint(root, "auto", LONE) == (step_folder(root, 12), [])


def test_of_many_damaged_files_some_are_named(root: Path) -> None:
    for path in step_folder(root, 12).glob("optimizer/*.safetensors"):
        path.write_bytes(flip(99)(path.read_bytes()))
    assert " and 3 more files)" in find_checkpoint(root, "auto", LONE)[1][0]


def test_all_damaged_is_an_error_not_a_fresh_start(root: Path) -> None:
    for path in root.glob("step-*/config.json"):
        path.write_bytes(flip(99)(path.read_bytes()))
    with pytest.raises(
        CheckpointError, match=r"every checkpoint is damaged.*: config.json is not what was"
    ) as error:
        find_checkpoint(root, "auto", LONE)
    assert not passes(error.value)
    assert len(list(root.glob("step-*"))) == 2, "nothing was touched"
    with pytest.raises(
        CheckpointError, match=r"no undamaged checkpoint there: config.json is not what was written"
    ):
        find_checkpoint(root / "none", step_folder(root, 8), LONE)


def agree(
    rank: int, world_size: int, config: Config, root: Path
) -> tuple[list[dict[str, Damage]], tuple[Path | None, list[str]]]:
    """What each rank makes of damage to files that one rank, or another, or both read; then of a
    manifest that one of them sees otherwise; and of finding the rest."""
    mesh = make_mesh(make_plan(config, weight_table(config.model), world_size), torch.device("cpu"))
    newest = step_folder(root, 12)
    files = [path for path in sorted(newest.rglob("*")) if path.is_file() and path.suffix != ".md"]
    names = [str(path.relative_to(newest)) for path in files]
    found: list[dict[str, Damage]] = []
    for name in names:
        torch.distributed.barrier()
        whole = (newest / name).read_bytes()
        torch.distributed.barrier()
        if rank == 0:
            (newest / name).write_bytes(flip(1234)(whole))
        torch.distributed.barrier()
        found.append(find_damage(newest, mesh))
        torch.distributed.barrier()
        if rank == 0:
            (newest / name).write_bytes(whole)
    torch.distributed.barrier()
    with pytest.MonkeyPatch.context() as patched:
        if rank == 1:
            patched.setattr(resume, "read_manifest", without_its_last_file)
        found.append(find_damage(newest, mesh))
    torch.distributed.barrier()
    with pytest.MonkeyPatch.context() as patched:
        if rank == 0:
            patched.setattr(resume, "restore_replaced", refuse)
        with pytest.raises(CheckpointError, match=r"Input/output|rank 0 cannot look") as error:
            find_checkpoint(root, "auto", mesh)
        assert passes(error.value)
    if rank == 0:
        (newest / names[0]).unlink()
    torch.distributed.barrier()
    return found, find_checkpoint(root, "auto", mesh)


def refuse(root: Path) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(root))


def without_its_last_file(folder: Path) -> Files:
    """A manifest as a node sees it whose file system shows an older one."""
    files = read_manifest(folder)
    assert not isinstance(files, Damage)
    return {name: files[name] for name in sorted(files)[:-1]}


def test_all_ranks_agree(trained: Config, root: Path) -> None:
    newest = step_folder(root, 12)
    files = [path for path in sorted(newest.rglob("*")) if path.is_file() and path.suffix != ".md"]
    names = [str(path.relative_to(newest)) for path in files]
    first, second = run_ranks(2, agree, trained, root)
    assert first == second
    (*found, of_another_manifest), (folder, (warning,)) = first
    for name, damage in zip(names, found, strict=True):
        assert damage == {name: Damage.CONTENT} or (name == MANIFEST and damage), (
            f"{name}: {damage}"
        )
    assert of_another_manifest == {MANIFEST: Damage.CONTENT}
    assert f"{names[0]} is missing" in warning
    assert folder == step_folder(root, 8)


def test_what_is_damaged_after_it_was_checked_is_said_in_words(trained: Config, root: Path) -> None:
    """Evaluating and generating open a checkpoint without reading all of it first."""
    folder = step_folder(root, 12)
    weights = weight_table(trained.model)
    (part,) = folder.glob("model-00002-*")
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=part.name):
        from_checkpoint(trained, weights, folder, Mesh.alone())
    part.unlink()
    with pytest.raises(CheckpointError, match=part.name):
        from_checkpoint(trained, weights, folder, Mesh.alone())


def test_an_index_cannot_lead_out_of_its_folder(root: Path) -> None:
    path = step_folder(root, 12) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= {"lm_head.weight": "../step-00000008/model-00001-of-00002.safetensors"}
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside of the folder"):
        TensorFolder(path.parent)


@pytest.mark.parametrize(
    "named", [["model.safetensors"], None, {"lm_head.weight": 5}, {"lm_head.weight": None}]
)
def test_an_index_of_something_else_is_refused(tmp_path: Path, named: object) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    with pytest.raises(CheckpointError, match=r"no readable model\.safetensors"):
        TensorFolder(tmp_path).fetch("lm_head.weight", (slice(0, 1),))


def test_checking_and_reading_are_seen_to_go_on(trained: Config, root: Path) -> None:
    """Of a large checkpoint they take longer than a run may be silent."""
    folder = step_folder(root, 12)
    files, weights = read_manifest(folder), weight_table(trained.model)
    assert not isinstance(files, Damage)
    before = NOW.beats
    assert not find_damage(folder, LONE)
    assert NOW.beats - before == len(files)
    read, before = from_checkpoint(trained, weights, folder, Mesh.alone()), NOW.beats
    for weight in weights:
        read(weight, "exp_avg", 0, weight.numel)
    assert NOW.beats - before >= len(weights)
