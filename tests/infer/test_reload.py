"""The model is swapped while the server answers: nobody's answer is lost or mixed of two models, and
what cannot be served changes nothing."""

from __future__ import annotations

import gc
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import httpx
from local_server import PATIENCE_S, Gated, Local, opened, serving

from megalite.errors import CheckpointError, NotFinite
from megalite.infer.generate import Generator
from megalite.infer.seq2seq import TargetGenerator
from megalite.infer.serving.loading import Opened, check_whole, open_model, version_of

ADMIN = "an admin key of the tests' own"


class Shelf:
    """What the server opens next, or fails with."""

    def __init__(self) -> None:
        self.next: Any = None

    def __call__(self, check: bool) -> Opened:
        assert check, "what takes a served model's place is compared with its checksums"
        if isinstance(self.next, Exception):
            raise self.next
        return self.next


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def local(tmp_path: Path, shelf: Shelf) -> Iterator[Local]:
    with serving(Gated(b"old"), tmp_path, open_again=shelf, keys=["k"], admin_key=ADMIN) as found:
        yield found


def reload(local: Local, key: str = ADMIN) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{local.url}/admin/reload", headers=headers, verify=False, timeout=60)


def ask(local: Local, **more: Any) -> Any:
    return local.client("k").completions.create(model="tiny", prompt="x", max_tokens=6, **more)


def until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_each_request_ends_with_the_model_it_began_with(local: Local, shelf: Shelf) -> None:
    old, new = local.host.current, Gated(b"new")
    shelf.next = opened(new, "second")
    new.run()
    began: Any = old.engine.generator.model
    its_thread = old.engine._thread
    chunks = ask(local, stream=True)
    began.step(1)
    assert next(iter(chunks)).choices[0].text == "o"
    with ThreadPoolExecutor() as pool:
        # Of two slots' worth the second waits for the one slot: it has been accepted by the old.
        waiting = pool.submit(ask, local)
        local.until("megalite_waiting 1.0")
        done = reload(local)
        assert done.json() == {"version": "second", "folder": "second"}
        fresh = ask(local)
        assert (fresh.choices[0].text, fresh.system_fingerprint) == ("newnew", "second")
        local.until("megalite_slots_busy 1.0", "megalite_waiting 1.0")
        began.run()
        assert "".join(chunk.choices[0].text for chunk in chunks) == "ldold"
        last = waiting.result()
    assert (last.choices[0].text, last.system_fingerprint) == ("oldold", "first")
    until(lambda: not its_thread.is_alive())
    local.until('megalite_model{folder="second",version="second"} 1.0', "megalite_slots_busy 0.0")
    assert httpx.get(f"{local.url}/health", verify=False).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        (CheckpointError("model.safetensors is not as long as it was"), "not as long as it was"),
        (RuntimeError("something unforeseen"), "unforeseen"),
        (
            Opened(TargetGenerator.__new__(TargetGenerator), Path("t5"), "t5"),
            "t5 holds another kind of model (TargetGenerator) than is served (Generator)",
        ),
    ],
)
def test_what_cannot_be_served_changes_nothing(
    local: Local, shelf: Shelf, problem: Any, says: str
) -> None:
    shelf.next, model = problem, local.host.current.engine.generator.model
    refused = reload(local)
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "reload_refused"
    assert says in refused.json()["error"]["message"]
    model.run()
    assert ask(local).choices[0].text == "oldold"
    local.until('megalite_reloads_total{outcome="refused"} 1.0')
    shelf.next = opened(Gated(b"new"), "second")
    shelf.next.model.model.run()
    assert reload(local).status_code == 200
    assert ask(local).choices[0].text == "newnew"


def test_only_the_admin_key_reloads(local: Local, shelf: Shelf, tmp_path: Path) -> None:
    shelf.next = opened(Gated(b"new"), "second")
    assert [reload(local, key).status_code for key in ("k", "other", "wrong")] == [401] * 3
    assert local.host.current.version == "first"
    with pytest.raises(Exception, match="the API key is wrong"):
        local.client(ADMIN).models.list()
    # Without an admin key there is no such address, also where the API is open to all.
    with serving(Gated(b"old"), tmp_path, open_again=shelf) as other:
        assert reload(other).status_code == 404
        assert other.host.current.version == "first"


def test_the_old_model_leaves_the_memory(local: Local, shelf: Shelf) -> None:
    """It did not, since FastAPI keeps the functions of routes, and these had it. Nor may it wait for
    a collection of garbage, which seldom comes where the server is idle."""
    gone = weakref.ref(local.host.current.engine.generator)
    shelf.next = opened(Gated(b"new"), "second")
    gc.disable()
    try:
        assert reload(local).status_code == 200
        until(lambda: gone() is None)
    finally:
        gc.enable()


def test_a_server_that_ends_while_a_model_is_loaded_ends(tmp_path: Path) -> None:
    def open_again(_: bool) -> Opened:
        local.host.close(0.0)
        return opened(Gated(b"new"), "second")

    with serving(Gated(b"old"), tmp_path, open_again=open_again, admin_key=ADMIN) as local:
        refused = reload(local)
        assert "is about to end" in refused.json()["error"]["message"]


def damaged(change: Callable[[Path], None], model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    change(folder)
    return folder


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def bad_numbers(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from test_serving import make_folder

    return make_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("change", [cut, without_tokenizer, bad_numbers])
def test_damaged_folders_are_not_opened(
    folder: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    from megalite.errors import DataError

    broken = damaged(change, folder, tmp_path / "broken")
    with pytest.raises((CheckpointError, DataError, NotFinite)):
        open_model(broken, 2, 64, True)


def test_a_checkpoint_with_a_flipped_bit_is_told_by_its_manifest(
    folder: Path, tmp_path: Path
) -> None:
    from megalite.checkpoint.folder import MANIFEST, digest, write_json

    shutil.copytree(folder, tmp_path / "copy")
    names = [file.name for file in (tmp_path / "copy").iterdir()]
    write_json(
        tmp_path / "copy" / MANIFEST,
        {"files": {name: digest(tmp_path / "copy" / name) for name in names}},
    )
    check_whole(tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was written"):
        open_model(tmp_path / "copy", 2, 64, True)
    assert isinstance(open_model(tmp_path / "copy", 2, 64, False).model, Generator)


def test_a_link_is_followed_once_and_versions_tell_models_apart(
    folder: Path, tmp_path: Path
) -> None:
    link = tmp_path / "current"
    link.symlink_to(folder)
    found = open_model(link, 2, 64, True)
    assert found.folder == folder.resolve()
    copy = damaged(bad_numbers, folder, tmp_path / "other")
    shutil.copytree(folder, tmp_path / "same")
    assert found.version == version_of(folder) == version_of(tmp_path / "same")
    assert found.version != version_of(copy)
