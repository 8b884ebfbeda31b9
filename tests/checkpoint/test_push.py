"""megalite push, against a hub of this process."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from listening import Heard, listening
from megalite.checkpoint.folder import MANIFEST, digest, write_json
from megalite.cli import main

WEIGHTS = "model.safetensors"
SENTENCES = ("modules.json", "1_Pooling/config.json")
"""Without them sentence-transformers makes other vectors of the same model."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint's folder: a model's files, and what only training needs."""
    folder = tmp_path / "step-00000040"
    (folder / "optimizer").mkdir(parents=True)
    save_file({"w": torch.arange(1000.0)}, folder / WEIGHTS)
    save_file({"w": torch.arange(1000.0)}, folder / "optimizer" / "moments.safetensors")
    (folder / "1_Pooling").mkdir()
    for name in ("config.json", "tokenizer.json", "train_state.json", *SENTENCES):
        (folder / name).write_text("{}")
    (folder / "config.yaml").write_text("run: {name: my}\n")
    files = {path.name: digest(path) for path in folder.iterdir() if path.is_file()}
    (folder / "README.md").write_text("# My model\n")
    write_json(folder / MANIFEST, {"files": files})
    return folder


class Hub:
    """As much of the hub's API as an upload needs."""

    def __init__(self) -> None:
        self.heard = Heard()
        self.made: list[dict[str, Any]] = []
        self.uploaded: dict[str, bytes] = {}
        self.summary = ""
        self.refusal = 0
        self.refuses_card = False

    def __call__(self, path: str, body: Any) -> tuple[int, Any]:
        path = path.partition("?")[0]
        if self.refusal:
            return self.refusal, {"error": "you may not write to other people's repositories"}
        if path == "/api/repos/create":
            self.made.append(body)
            return 200, {"url": f"{self.heard.url}/me/mine"}
        if path.endswith("/preupload/main"):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"] == WEIGHTS else "regular",
                }
                | {"shouldIgnore": False}
                for file in body["files"]
            ]
            return 200, {"files": files}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                entry | {"actions": {"upload": {"href": f"{self.heard.url}/lfs/{entry['oid']}"}}}
                for entry in body["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if path.startswith("/lfs/"):
            self.uploaded[WEIGHTS] = body
            return 200, {}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    self.summary = value["summary"]
                elif line["key"] == "file":
                    self.uploaded[value["path"]] = base64.b64decode(value["content"])
            return 200, {"commitUrl": f"{self.heard.url}/me/mine/commit/abc", "commitOid": "abc"}
        if path == "/api/validate-yaml":
            errors = [{"message": '"license" must be one of many'}] * self.refuses_card
            return 400 if errors else 200, {"errors": errors, "warnings": []}
        assert path == "/api/models/me/mine", path
        return 200, {
            "id": "me/mine",
            "private": self.made[0]["visibility"] == "private",
            "siblings": [],
        }


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a token, and no login or cache of whoever runs the tests."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_hushhushhushhushhush")


@pytest.mark.parametrize("kind", ["private", "public"])
@pytest.mark.usefixtures("user")
def test_a_model_is_uploaded_with_its_card_and_without_the_optimizer(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    hub = Hub()
    with listening(hub) as hub.heard:
        monkeypatch.setenv("HF_ENDPOINT", hub.heard.url)
        assert main(["push", str(model), "me/mine", *["--public"] * (kind == "public")]) == 0
    made = hub.made[0]
    assert (made["organization"], made["name"], made["visibility"]) == ("me", "mine", kind)
    assert {*hub.uploaded} == {
        WEIGHTS, "config.json", "tokenizer.json", "config.yaml", "README.md", *SENTENCES,
    }  # fmt: skip
    assert hub.uploaded[WEIGHTS] == (model / WEIGHTS).read_bytes()
    assert hub.uploaded["README.md"] == b"# My model\n"
    assert hub.summary == "Upload the checkpoint of step 40"
    assert (
        f"/me/mine/commit/abc: 7 files, 0.0 MB, in a {kind} repository" in capsys.readouterr().out
    )


@pytest.mark.parametrize("trouble", ["network", "token", "name", "refused", "damage", "card"])
@pytest.mark.usefixtures("user")
def test_what_cannot_be_pushed_is_one_line(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    trouble: str,
) -> None:
    hub = Hub()
    if trouble == "damage":
        (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-1] + b"x")
    if trouble == "token":
        monkeypatch.delenv("HF_TOKEN")
    hub.refuses_card = trouble == "card"
    hub.refusal = 403 if trouble == "refused" else 0
    with listening(hub) as hub.heard:
        url = "http://127.0.0.1:9" if trouble == "network" else hub.heard.url
        monkeypatch.setenv("HF_ENDPOINT", url)
        status = main(["push", str(model), "mine" if trouble == "name" else "me/mine"])
    assert status == (1 if trouble == "network" else 2), "the network may come back"
    told = capsys.readouterr()
    said = {
        "network": "the hub at http://127.0.0.1:9 cannot be reached: ",
        "token": "no token for the hub: run `hf auth login`, or set HF_TOKEN",
        "name": "'mine' names no repository: give OWNER/NAME",
        "refused": "refuses me/mine: you may not write to other people's repositories",
        "card": f'refuses {model / "README.md"}: Invalid metadata in README.md. - "license" must be one of many',
        "damage": f"{model / WEIGHTS} is not what was written: not uploaded",
    }[trouble]
    assert said in told.err
    assert told.err.count("\n") == 1
    assert "hushhush" not in told.err + told.out
    assert not hub.uploaded
