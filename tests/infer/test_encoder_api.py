"""`megalite serve` of an encoder, asked by OpenAI's client and over HTTP."""

from __future__ import annotations

import math
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from local_server import PATIENCE_S, Local, serving
from safetensors.torch import load_file, save_file

from encoders import write_words
from megalite.errors import NotFinite
from megalite.infer.encode import Encoder, is_encoder
from megalite.infer.serving.loading import open_model
from tiny_models import CASES, auto_class, randomize

transformers = pytest.importorskip("transformers")

BROKEN_WEIGHTS = {"head": "cls.predictions.bias", "layer": "layer.0.output.dense.bias"}
TEXTS = ["w7 w8 w9", "w20", "w7 w8 w10 w11 w12 w13"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_words(tmp_path_factory.mktemp("bert"))
    torch.manual_seed(0)
    model = auto_class("bert").from_config(transformers.AutoConfig.for_model(**CASES["bert"]))
    randomize(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def local(folder: Path) -> Iterator[Local]:
    with serving(Encoder.open(folder), folder) as local:
        yield local


def post(local: Local, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{local.url}/v1/{path}", json=body, verify=False, timeout=PATIENCE_S)


def vectors_of(answer: Any) -> np.ndarray:
    return np.array([each.embedding for each in answer.data], np.float32)


def test_openais_client_gets_the_vectors_of_embed(local: Local, folder: Path) -> None:
    """Which asks for base64; a list of floats has the same bits."""
    wanted = Encoder.open(folder).embed(TEXTS)
    answer = local.client().embeddings.create(model="tiny", input=TEXTS)
    assert [each.index for each in answer.data] == [0, 1, 2]
    # Computed alike, in one batch.
    np.testing.assert_array_equal(vectors_of(answer), wanted)
    floats = local.client().embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    np.testing.assert_array_equal(vectors_of(floats), wanted)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (16, 16), (
        "the two around each text count"
    )
    [alone] = local.client().embeddings.create(model="", input=TEXTS[1]).data
    # Beside others: sums in another order.
    np.testing.assert_allclose(alone.embedding, wanted[1], rtol=0, atol=1e-5)
    tokens = local.client().embeddings.create(model="tiny", input=[[2, 20, 3], [2, 7, 8, 9, 3]])
    np.testing.assert_allclose(vectors_of(tokens), wanted[[1, 0]], rtol=0, atol=1e-5)


def test_fewer_dimensions_and_cut_texts(local: Local, folder: Path) -> None:
    wanted = Encoder.open(folder).embed(TEXTS)
    short = local.client().embeddings.create(model="tiny", input=TEXTS, dimensions=5)
    np.testing.assert_array_equal(vectors_of(short), wanted[:, :5])
    words = "w7 " * 100
    cut = post(local, "embeddings", input=words, truncate_prompt_tokens=9).json()
    same = post(local, "embeddings", input="w7 " * 7).json()
    assert cut["data"] == same["data"]
    assert cut["usage"]["total_tokens"] == 9
    assert (
        post(local, "embeddings", input=words, truncate_prompt_tokens=-1).json()["usage"][
            "total_tokens"
        ]
        == 64
    )


def test_vectors_cut_to_fewer_dimensions_have_length_1_where_whole_ones_have(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "normal")
    (tmp_path / "normal" / "modules.json").write_text(
        '[{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}, {"type": "x.Normalize", '
        '"path": "2_Normalize"}]'
    )
    (tmp_path / "normal" / "1_Pooling").mkdir()
    (tmp_path / "normal" / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    with serving(Encoder.open(tmp_path / "normal"), tmp_path) as local:
        vectors = vectors_of(
            local.client().embeddings.create(model="tiny", input=TEXTS, dimensions=5)
        )
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)  # rounding of fp32


def test_documents_are_ranked_by_their_cosine(local: Local, folder: Path) -> None:
    query, documents = "w7 w8", [*TEXTS, "w7 w8"]
    answer = post(local, "rerank", query=query, documents=documents, model="tiny").json()
    first, *others = Encoder.open(folder).embed([query, *documents], normalize=True)
    cosines = np.array(others) @ first
    assert [each["index"] for each in answer["results"]] == np.argsort(-cosines).tolist()
    assert answer["results"][0] == {
        "index": 3, "relevance_score": pytest.approx(1.0, abs=1e-6), "document": {"text": "w7 w8"}
    }  # fmt: skip
    assert [each["relevance_score"] for each in answer["results"]] == pytest.approx(
        sorted(cosines)[::-1], abs=1e-5
    )
    best = post(
        local, "rerank", query=query, documents=[{"text": each} for each in documents], top_n=2
    )
    assert [each["index"] for each in best.json()["results"]] == np.argsort(-cosines)[:2].tolist()
    bare = post(local, "rerank", query=query, documents=documents, return_documents=False).json()
    assert all(each.keys() == {"index", "relevance_score"} for each in bare["results"])


@pytest.mark.parametrize("case", ["bert", "roberta", "modernbert"])
def test_a_cross_encoder_ranks_by_what_it_tells_of_both_texts(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CASES[case], num_labels=1)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    randomize(model)
    model.save_pretrained(write_words(tmp_path))
    query, documents = "w7 w8", [*TEXTS, "w7 w8 " * 40]
    with serving(Encoder.open(tmp_path), tmp_path) as local:
        answer = post(local, "rerank", query=query, documents=documents).json()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer
    tokenizer.enable_truncation(64, strategy="only_second")
    wanted = []
    for document in documents:
        encoded = tokenizer.encode(query, document)
        types = {"token_type_ids": torch.tensor([encoded.type_ids])} if case == "bert" else {}
        with torch.no_grad():
            wanted.append(model(torch.tensor([encoded.ids]), **types).logits.sigmoid().item())
    found = {each["index"]: each["relevance_score"] for each in answer["results"]}
    # The project's bound.
    assert [found[number] for number in range(4)] == pytest.approx(wanted, abs=1e-4)
    assert [*found] == sorted(found, key=lambda number: -wanted[number])


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("embeddings", {"input": "w7 " * 63}, 400, "has 65 tokens, but the model takes 64"),
        ("embeddings", {"input": [[2, 99, 3]]}, 400, "an id outside of the vocabulary"),
        ("embeddings", {"input": []}, 400, "is empty"),
        ("embeddings", {"input": "w7", "dimensions": 33}, 400, "has 32 dimensions, fewer than 33"),
        ("embeddings", {"input": ["w7"] * 2049}, 400, "2,049 texts are asked for at once"),
        (
            "embeddings",
            {"input": "w7", "model": "other"},
            404,
            "does not exist; this server has 'tiny'",
        ),
        ("embeddings", {"input": "w7", "encoding_format": "int8"}, 400, "encoding_format"),
        (
            "embeddings",
            {"input": "w7 " * 63, "truncate_prompt_tokens": 0},
            400,
            "truncate_prompt_tokens: must be at least 1, or -1",
        ),
        ("embeddings", {"input": 5}, 400, "input: must be a text, a list of texts"),
        ("rerank", {"query": "w7", "documents": []}, 400, "documents"),
        (
            "rerank",
            {"query": "w7", "documents": [5]},
            400,
            "must be a text or an object with a text",
        ),
        ("rerank", {"documents": ["w7"]}, 400, "query: is required"),
        ("completions", {"prompt": "w7"}, 404, "Not Found"),
    ],
)
def test_wrong_requests_are_refused(
    local: Local, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    answer = post(local, path, **body)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_guards_models_and_health(folder: Path, tmp_path: Path) -> None:
    assert is_encoder(folder)
    with serving(Encoder.open(folder), tmp_path, keys=["secret"]) as local:
        assert httpx.get(f"{local.url}/health", verify=False).json() == {"status": "ok"}
        assert post(local, "embeddings", input="w7").status_code == 401
        assert [model.id for model in local.client("secret").models.list()] == ["tiny"]
        local.client("secret").embeddings.create(model="tiny", input="w7")
        metrics = httpx.get(f"{local.url}/metrics", verify=False).text
        assert 'megalite_requests_total{path="/v1/embeddings",status="200"} 1.0' in metrics


def test_no_text_of_a_client_that_is_gone_is_computed(folder: Path, tmp_path: Path) -> None:
    encoder, gate, begun = Encoder.open(folder), threading.Event(), []
    embed = encoder.embed_rows

    def slow(rows: Any, **settings: Any) -> Any:
        begun.append(rows)
        gate.wait(PATIENCE_S)
        return embed(rows, **settings)

    encoder.embed_rows = slow  # type: ignore[method-assign]
    body = b'{"input": "w7"}'
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with serving(encoder, tmp_path) as local:
        address = local.url.removeprefix("http://").split(":")
        clients = []
        for waiting in ("megalite_waiting 0.0", "megalite_waiting 1.0"):
            clients.append(socket.create_connection((address[0], int(address[1]))))
            clients[-1].sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            local.until("megalite_slots_busy 1.0", waiting)
        clients[1].close()
        local.until(
            "megalite_waiting 0.0",
            'megalite_requests_total{path="/v1/embeddings",status="499"} 1.0',
        )
        gate.set()
        local.until_idle()
        assert len(begun) == 1


@pytest.mark.parametrize("where", ["head", "layer"])
def test_what_is_no_number_is_an_error(where: str, folder: Path, tmp_path: Path) -> None:
    """A model that is damaged is not opened to be served; of one that is, a request is told."""
    broken = shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(broken / "model.safetensors")
    [name] = [x for x in tensors if x.endswith(BROKEN_WEIGHTS[where])]
    tensors[name][0] = math.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    encoder = Encoder.open(broken)
    with pytest.raises(NotFinite):
        encoder.fill(["w7 [MASK]"], 1)
    if where == "head":
        return  # of which a vector does not depend
    with pytest.raises(NotFinite):
        open_model(broken, 1, 64, check=False)
    with serving(encoder, tmp_path / "ratings") as local:
        for path, body in (
            ("embeddings", {"input": "w7"}),
            ("rerank", {"query": "w7", "documents": ["w8"]}),
        ):
            answer = post(local, path, **body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "not_finite")


def test_more_than_may_wait_is_refused_and_a_long_one_ends(folder: Path, tmp_path: Path) -> None:
    encoder, gate = Encoder.open(folder), threading.Event()
    embed = encoder.embed_rows

    def slow(*arguments: Any, **settings: Any) -> Any:
        gate.wait(PATIENCE_S)
        return embed(*arguments, **settings)

    encoder.embed_rows = slow  # type: ignore[method-assign]
    with serving(encoder, tmp_path, max_waiting=1, timeout_s=5.0) as local:
        found: list[int] = []

        def ask() -> None:
            found.append(post(local, "embeddings", input="w7").status_code)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        local.until("megalite_slots_busy 1.0", "megalite_waiting 1.0")
        with pytest.raises(openai.InternalServerError, match="1 requests wait already"):
            local.client().embeddings.create(model="tiny", input="w7")
        for thread in threads:
            thread.join(PATIENCE_S)
        assert found == [504, 504]
        gate.set()
        local.until("megalite_slots_busy 0.0", "megalite_waiting 0.0")
        ends = time.monotonic() + PATIENCE_S
        while (status := post(local, "embeddings", input="w7").status_code) == 504:
            assert time.monotonic() < ends  # five seconds can be too few on a loaded machine
        assert status == 200
