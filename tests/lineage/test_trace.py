"""Traces of a run, held against what its loader hands out and what its sources say at that place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lineage_runs import FIM, MIXED, config_of, encoder_config, write_bytes_tokenizer, write_texts
from megalite.cli import main
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.blocks import Shard
from megalite.data.checks import open_data
from megalite.data.dataset import RowSource, places_in_file
from megalite.data.formats import Settings
from megalite.data.indexed import IndexedDataset
from megalite.data.loader import Loader
from megalite.data.mixture import IGNORE
from megalite.data.order import permute, permute_back
from megalite.data.origins import Origins, open_origins
from megalite.data.preprocess import preprocess
from megalite.data.preprocess_rows import preprocess_rows
from megalite.errors import ConfigError, DataError
from megalite.lineage.documents import Documents, _Name
from megalite.lineage.places import NONE, places_of
from megalite.lineage.run import TracedRun
from megalite.lineage.texts import SourceText
from megalite.lineage.trace import Tracer
from megalite.train import train

UNKNOWN = "[UNK]", "w2"
UNKNOWN = "[UNK]", "w2"
RAMP = ("train.batch_ramp={start: 2, increment: 2, samples: 60}",)
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "stream": ({}, ()),
    "mixed": (MIXED, RAMP),
    "split": ({"split": [80, 20, 0], "order": "sequential"}, ()),
    "megatron": ({"order": "megatron"}, ()),
    "fim": ({"fim": {"rate": 0.7, "spm_rate": 0.5, "tokens": FIM}}, ()),
    "packed fim": ({**MIXED, "fim": {"rate": 0.7, "tokens": FIM}}, ()),
}


def traced(config: Config, skipped: tuple[tuple[int, int], ...] = ()) -> TracedRun:
    if config.data.order == "megatron":  # it has no more samples than the run asks for
        skipped = ()
    config, tokenizer, data = open_data(config)
    assert data["train"] is not None
    return TracedRun(config, tokenizer, data["train"], skipped, {}, frozenset(), config.train.steps)


def case(folder: Path, name: str) -> Config:
    if name in ("masked", "spans", "denoisers"):
        return encoder_config(folder, name)
    data, overrides = CASES[name]
    return config_of(folder, *overrides, **data)


@pytest.mark.parametrize("name", [*CASES, "masked", "spans", "denoisers"])
def test_every_token_is_the_text_at_its_place(
    tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    count = 1000 if request.config.getoption("--whole") else 120
    run = traced(case(tmp_path, name), skipped=((5, 9), (11, 30)))
    tracer, train = Tracer(run), run.config.train
    draw, steps = np.random.default_rng(1), []
    with Loader(
        run.mixture,
        train.global_batch_size,
        1,
        0,
        1,
        skipped=run.skipped,
        batch_size=train.batch_size,
    ) as loader:
        for _ in range(train.steps):
            steps.append(next(loader))
    texts: dict[Any, SourceText | str] = {}
    found = 0
    for _ in range(count):
        step = int(draw.integers(train.steps))
        number = int(draw.integers(len(steps[step])))
        micro = steps[step][number]
        (sample,) = tracer.samples(step + 1, number)
        assert sample.sample == int(micro.samples[0])
        seen = {
            "tokens": (micro.tokens, sample.places.tokens),
            "labels": (micro.labels, sample.places.labels),
        }
        if micro.source is not None:
            assert sample.places.source is not None
            seen["source"] = (micro.source, sample.places.source)
        for what, (tokens, places) in seen.items():
            kept = np.flatnonzero(tokens[0] != IGNORE)
            at = int(draw.choice(kept if draw.random() < 0.9 and len(kept) else tokens.shape[1]))
            id, place = int(tokens[0, at]), int(places[0, at])
            if what == "labels" and id == IGNORE:
                assert place == NONE
            if place == NONE:
                continue
            where = tracer.place(sample, place)
            source = run.mixture.names.index(sample.source)
            key = source, where.document
            text = texts[key] = texts.get(key) or tracer.text(source, where)
            assert isinstance(text, SourceText), text
            assert text.spans is not None
            if where.offset not in text.spans:  # added at both ends of a document
                assert run.tokenizer is not None
                assert id in (run.tokenizer.begin_id, run.tokenizer.eod_id)
                continue
            if name in ("masked", "spans", "denoisers") and what == "tokens":
                continue  # hidden there
            first, last = text.spans[where.offset]
            assert run.tokenizer is not None
            spelled, there = run.tokenizer.decode([id]), text.text.encode()[first:last].decode()
            assert spelled.strip() == there.strip() or spelled in UNKNOWN or "\ufffd" in spelled
            found += 1
    assert found > count * 2 // 3


@pytest.mark.parametrize("name", [*CASES, "masked", "spans", "denoisers"])
def test_the_uses_of_a_document_are_all_there_are(
    tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    every = 1 if request.config.getoption("--whole") else 3
    run = traced(case(tmp_path, name), skipped=((5, 9), (40, 41)))
    tracer = Tracer(run)
    everything = {}
    for step in range(1, run.config.train.steps + 1):
        samples = run.samples_of(step)
        places = places_of(run.mixture, samples)
        for number in range(len(samples)):
            everything[step, number] = (
                int(places.of_source[number]),
                [x[number] for x in (places.tokens, places.labels, places.source) if x is not None],
            )
    for source in range(2):
        dataset = run.mixture.sources[source].dataset
        for document in range(0, dataset.num_documents, every):
            start, stop = (dataset.document_start(d) for d in (document, document + 1))
            wanted = []
            for (step, number), (of, rows) in everything.items():
                mine = [np.flatnonzero((x >= start) & (x < stop)).tolist() for x in rows]
                if of == source and any(mine):
                    wanted.append((step, number, *mine))
            found = [
                (use.step, use.number, use.seen.tolist(), use.predicted.tolist())
                + ((use.of_source.tolist(),) if len(everything[1, 0][1]) > 2 else ())
                for use in tracer.uses(source, document)
            ]
            assert found == wanted


def test_shards_note_the_same_origins_as_one_job(tmp_path: Path) -> None:
    tokenizer, paths = write_bytes_tokenizer(tmp_path / "tokenizer"), write_texts(tmp_path)
    (tmp_path / "notes.txt").write_text("a whole file\n")
    inputs = [str(path) for path in (*paths, tmp_path / "notes.txt")]
    preprocess(inputs, tmp_path / "one", tokenizer, workers=2)
    for index in (2, 0, 1):
        preprocess(inputs, tmp_path / "parts", tokenizer, shard=Shard(index, 3))
    one, parts = (tmp_path / f"{name}_text_document.src" for name in ("one", "parts"))
    assert one.read_bytes() == parts.read_bytes()
    origins = open_origins(IndexedDataset(tmp_path / "one_text_document"))
    assert origins is not None
    lines = paths[0].read_bytes().split(b"\n")
    for document in range(60):
        origin = origins.of(document)
        assert json.loads(lines[origin.line - 1])["n"] == document
        with open(paths[0], "rb") as file:
            file.seek(origin.start)
            assert file.read(origin.length) == lines[origin.line - 1]
    unpacked = gzip.decompress(paths[1].read_bytes())
    for document in range(60, 120):
        origin = origins.of(document)
        assert origin.line == document - 59
        line = json.loads(unpacked[origin.start : origin.start + origin.length])
        assert line["id"] == f"x:{document - 60}"
    assert origins.of(120)[:3] == (str(tmp_path / "notes.txt"), 1, -1)
    assert origins.documents_of("packed.jsonl.gz", 3) == [62]
    assert origins.documents_of("ked.jsonl.gz", 3) == []


def test_rows_note_where_they_come_from(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": "no"} for n in range(9)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(["", *map(json.dumps, rows)]))
    tokenizer = write_bytes_tokenizer(tmp_path / "tokenizer")
    preprocess_rows([str(path)], tmp_path / "pairs", Settings("preference", str(tokenizer)))
    origins = open_origins(IndexedDataset(tmp_path / "pairs"))
    assert origins is not None
    for document in range(18):
        origin = origins.of(document)
        assert origin.line == document // 2 + 2
        found = path.read_bytes()[origin.start : origin.start + origin.length]
        assert json.loads(found) == rows[document // 2]
    source = RowSource(IndexedDataset(tmp_path / "pairs"), 0, 18, 32, 33, together=2)
    for document in range(18):
        start, stop = (source.dataset.document_start(d) for d in (document, document + 1))
        places = places_in_file(source, np.arange(source.num_samples))
        wanted = np.flatnonzero(((places >= start) & (places < stop)).any(1))
        # Both answers of a pair are side by side in a sample.
        assert set(wanted) <= set(source.samples_with(start, stop))
        assert (
            source.samples_with(start, stop).tolist()
            == source.samples_with(
                *(source.dataset.document_start(d) for d in (document ^ 1, (document ^ 1) + 1))
            ).tolist()
        )


def test_origins_of_other_files_are_refused(tmp_path: Path) -> None:
    tokenizer, paths = write_bytes_tokenizer(tmp_path / "tokenizer"), write_texts(tmp_path)
    for name, path in zip("ab", paths, strict=True):
        preprocess([str(path)], tmp_path / name, tokenizer)
    dataset = IndexedDataset(tmp_path / "a_text_document")
    path, other = (tmp_path / f"{name}_text_document.src" for name in "ab")
    whole = path.read_bytes()
    for damaged in (other.read_bytes(), whole[:-9], whole[:100], b"", b"X" + whole[1:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a_text_document\.src"):
            Origins(dataset)


def test_permutations_are_undone() -> None:
    for size in (1, 2, 3, 19, 1000):
        index = np.arange(size)
        assert (permute_back(permute(index, size, 77), size, 77) == index).all()
    keys = np.arange(500).astype(np.uint64)
    index = np.arange(500) * 7919 % 10**9
    assert (permute_back(permute(index, 10**9, keys), 10**9, keys) == index).all()


def test_a_run_whose_batches_changed_is_traced_by_what_it_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, "train.steps=6", "checkpoint.every=3", "train.stop_at=3")
    train(config)
    again = parse_config(
        config.model_dump(mode="json"), ["train.global_batch_size=4", "train.stop_at=null"]
    )
    train(again)
    run = TracedRun.open(config.run.folder)
    assert [len(run.samples_of(step)) for step in range(1, 7)] == [8, 8, 8, 4, 4, 4]
    assert run.samples_of(5).tolist() == [28, 29, 30, 31]
    tracer = Tracer(run)
    (sample,) = tracer.samples(5, 1)
    where = tracer.place(sample, int(sample.places.tokens[0, 3]))
    assert where.origin is not None
    for token in ([], ["--token", "3"]):
        assert main(["trace", str(config.run.folder), "--step", "5", "--sample", "1", *token]) == 0
        told = capsys.readouterr().out
        assert "step 5, sample 1 (the run's 29)" in told
        assert str(where.origin) in told
    line = f"{where.origin.path}:{where.origin.line}"
    assert main(["trace", str(config.run.folder), "--document", line]) == 0
    told = capsys.readouterr().out
    assert "  step 5, sample 1, epoch 0: seen at tokens" in told
    assert "uses in the 6 steps" in told
    # Other data than that of the checkpoint is never traced.
    preprocess([str(tmp_path / "packed.jsonl.gz")], tmp_path / "plain", config.data.tokenizer)
    assert main(["trace", str(config.run.folder), "--step", "5"]) == 2
    assert "samples of other data" in capsys.readouterr().err


def test_lines_that_a_cleaned_corpus_was_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [
        {"text": f"text {n}", "id": str(n), "source": "web", "path": f"raw/{n % 2}.warc.gz", "line": 7 * n + 1}
        for n in range(40)
    ]  # fmt: skip
    (tmp_path / "clean.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = write_bytes_tokenizer(tmp_path / "tokenizer")
    preprocess([str(tmp_path / "clean.jsonl")], tmp_path / "clean", tokenizer)
    documents = Documents([IndexedDataset(tmp_path / "clean_text_document")])
    wanted = ["raw/1.warc.gz:22", "0.warc.gz:29", "clean.jsonl:12"]
    assert documents.find(wanted) == {
        name: [(0, n)] for name, n in zip(wanted, (3, 4, 11), strict=True)
    }
    for other in ("raw/1.warc.gz:29", "warc.gz:29"):
        with pytest.raises(DataError, match=f"{other}: no document"):
            documents.find([other])
    # Many names cost no more than a few: each line is held against those of its number alone.
    asked: list[int] = []
    is_of = _Name.is_of
    monkeypatch.setattr(
        _Name, "is_of", lambda self, path, line: asked.append(line) or is_of(self, path, line)
    )
    documents.find([f"raw/{n % 2}.warc.gz:{7 * n + 1}" for n in range(40)])
    assert len(asked) == 40
    # What was noted of a document is told beside it.
    config = config_of(tmp_path)
    (tmp_path / "planned.yaml").write_text(config.to_yaml())
    for number in range(8):
        arguments = ["--step", "1", "--sample", str(number), "--token", "0"]
        assert main(["trace", str(tmp_path / "planned.yaml"), *arguments]) == 0
    assert "source: 'web', mended_bytes: 3" in capsys.readouterr().out


def test_mistakes_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path)
    path = tmp_path / "planned.yaml"
    path.write_text(config.to_yaml())
    for arguments, told in (
        (["--step", "21"], "--step 21 is not in 1 … 20"),
        (["--step", "2", "--sample", "8"], "--sample 8 is not in 0 … 7"),
        (["--step", "2", "--token", "3"], "give --sample as well"),
        (["--step", "2", "--sample", "0", "--token", "32"], "--token 32 is not in 0 … 31"),
        (["--document", "plain.jsonl"], "neither FILE:LINE"),
        (["--document", "plain.jsonl:2000"], "no document of the run's data"),
        (["--document", "packed_text_document#60"], "its documents are 0 to 59"),
    ):
        assert main(["trace", str(path), *arguments]) == 2
        assert told in capsys.readouterr().err
    (tmp_path / "plain_text_document.src").unlink()
    assert main(["trace", str(path), "--document", "plain.jsonl:1"]) == 2
    assert "there is no .src" in capsys.readouterr().err
    assert main(["trace", str(path), "--document", "plain_text_document#0"]) == 0
    assert main(["trace", str(path), "--step", "1"]) == 0
    assert "plain_text_document#" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="is no run"):
        TracedRun.open(tmp_path)
