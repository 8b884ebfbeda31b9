"""Several models behind one address: each request goes to the model that it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import httpx
from local_server import PATIENCE_S, Gated, Local, opened, running

from megalite.errors import CheckpointError, ConfigError
from megalite.infer.serving.by_name import make_by_name
from megalite.infer.serving.settings import Settings


def hosting(folder: Path, *names: str, **settings: Any) -> Any:
    """Models that say their own names."""

    def opens(name: str) -> Any:
        model = Gated(name.encode())
        model.run()
        return lambda _: opened(model, name)

    asked = Settings(names[0], folder / "ratings", **settings)
    return make_by_name(asked, opens(names[0]), [(name, opens(name)) for name in names[1:]])


def post(local: Local, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{local.url}{path}", json=body, verify=False, timeout=PATIENCE_S)


def test_a_request_goes_to_the_model_that_it_names(tmp_path: Path) -> None:
    with running(hosting(tmp_path, "one", "two", "six")) as local:

        def says(**more: Any) -> dict[str, Any]:
            return post(local, "/v1/completions", {"prompt": "x", "max_tokens": 3} | more).json()

        for name in ("two", "one", "six"):
            said = says(model=name)
            assert (said["choices"][0]["text"], said["model"]) == (name, name)
            assert said["system_fingerprint"] == name
        assert says()["choices"][0]["text"] == "one", "that which the server is called by"
        names = [model.id for model in local.client().models.list()]
        assert names == ["one", "two", "six"]
        assert local.client().models.retrieve("six").id == "six"
        refused = says(model="ten")["error"]
        assert refused["code"] == "model_not_found"
        assert refused["message"].endswith("this server has 'one', 'two', 'six'")
        assert post(local, "/v1/completions", ["model"]).status_code == 400
        stream = local.client().completions.create(
            model="two", prompt="x", max_tokens=3, stream=True
        )
        assert "".join(piece.choices[0].text for piece in stream) == "two"
        for name in ("two", ""):
            body = {"prompt": "x", "answer": "good", "rating": "up", "model": name}
            assert post(local, "/v1/ratings", body).status_code == 201
        local.until("megalite_slots 3.0", 'megalite_model{folder="six",version="six"} 1.0')
    rows = (tmp_path / "ratings" / "completion.jsonl").read_text().splitlines()
    assert [json.loads(row)["model"] for row in rows] == ["two", "one"]


def test_one_that_is_ill_makes_the_server_ill(tmp_path: Path) -> None:
    host = hosting(tmp_path, "one", "two")
    with running(host) as local:
        assert httpx.get(f"{local.url}/health", verify=False).status_code == 200
        host.hosts["two"].current.engine.close(0.0)
        host.hosts["two"].current.engine.join(PATIENCE_S)
        assert httpx.get(f"{local.url}/health", verify=False).status_code == 503


def test_a_reload_is_of_all_also_behind_one_that_is_refused(tmp_path: Path) -> None:
    host, fresh = hosting(tmp_path, "one", "two", admin_key="admin"), Gated(b"new")
    fresh.run()

    def damaged(_: bool) -> Any:
        raise CheckpointError("it is damaged")

    host.hosts["one"]._open, host.hosts["two"]._open = damaged, lambda _: opened(fresh, "new")
    with running(host) as local:
        headers = {"authorization": "Bearer admin"}
        refused = httpx.post(f"{local.url}/admin/reload", headers=headers, verify=False)
        told = refused.json()["error"]["message"]
        assert (refused.status_code, told) == (
            409,
            "the model 'one' stays what it was: it is damaged",
        )
        for name, said in (("one", "one"), ("two", "new")):
            body = {"prompt": "x", "max_tokens": 3, "model": name}
            assert post(local, "/v1/completions", body).json()["choices"][0]["text"] == said


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two models are called 'one'"):
        hosting(tmp_path, "one", "two", "one")
