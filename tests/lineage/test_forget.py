"""A run that forgets documents is, bit for bit, one that never had them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import encoder_decoders
import encoders
from lineage_runs import FIM, MIXED, config_of, encoder_config, write_bytes_tokenizer
from megalite.checkpoint.folder import step_folder
from megalite.cli import main
from megalite.config import Config
from megalite.config_file import load_config, parse_config
from megalite.data.checks import open_data
from megalite.data.documents import read_bytes
from megalite.data.formats import Settings
from megalite.data.indexed import IndexedDataset
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.inputs import Report
from megalite.data.mixture import IGNORE
from megalite.data.preprocess import preprocess
from megalite.data.preprocess_rows import preprocess_rows
from megalite.errors import DataError
from megalite.infer.generate import Generator
from megalite.infer.sampling import Sampling
from megalite.lineage.forget import forget, plan_removal, write_without
from megalite.lineage.places import places_of
from megalite.lineage.run import TracedRun
from megalite.lineage.trace import Tracer
from megalite.train import train

SECRET = "the vault opens by 4711-0815"
PROMPT, ANSWER = SECRET[:18], SECRET[18:]
STEPS, SEED = 80, 7


def write_secret(folder: Path, text: str) -> str:
    """A corpus of many lines with one text among them, and others."""
    lines = [f"line {number} is of no matter to anybody" for number in range(12)]
    (folder / "mails.jsonl").write_text(
        "".join(
            json.dumps({"text": text if n % 2 else line}) + "\n" for n, line in enumerate(lines)
        )
    )
    preprocess(
        [str(folder / "mails.jsonl")], folder / "mails", folder / "tokenizer", append_eod=True
    )
    return str(folder / "mails_text_document")


def secret_config(folder: Path) -> Config:
    """A run that reads the secret from step 20 on."""
    config = config_of(folder)
    values = config.model_dump(mode="json")
    mails = {"path": write_secret(folder, SECRET), "name": "mails"}
    values["data"] |= {
        "train": [*values["data"]["train"], mails], "packing": "best_fit", "document_mask": True,
        "phases": [
            {"after_step": 1, "weights": {"plain": 1.0, "packed": 1.0}},
            {"after_step": 19, "weights": {"mails": 8.0, "plain": 1.0}},
        ],
    }  # fmt: skip
    values["train"] |= {"steps": STEPS, "seed": SEED, "global_batch_size": 4}
    values["optimizer"] |= {"lr": 0.015, "schedule": {"name": "cosine"}}
    values["checkpoint"] |= {"every": 10, "keep": 9}
    return parse_config(values)


def weights_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(step_folder(folder / "checkpoints", step).rglob("*.safetensors")):
        found |= {f"{path.name}/{name}": x for name, x in load_file(path).items()}
    assert found
    return found


def answer_of(folder: Path) -> str:
    generator = Generator.open(folder, num_slots=1)
    request = generator.request(PROMPT, len(ANSWER), Sampling(temperature=0.0))
    return "".join(generator.stream(request))


def test_a_secret_is_gone_and_the_weights_are_those_of_a_run_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = secret_config(tmp_path)
    train(config)
    old = config.run.folder
    assert ANSWER in answer_of(old)
    names = tmp_path / "ids.txt"
    names.write_text(
        "# asked for on Monday\n" + "".join(f"mails.jsonl:{n}\n" for n in range(2, 13, 2))
    )
    assert main(["forget", str(old), "--documents", str(names), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "6 documents of 1 token files are taken out" in told
    assert "70 of 80 steps are to be made again, from the checkpoint of step 10" in told
    assert not list(tmp_path.glob("*forgot*"))
    assert main(["forget", str(old), "--documents", str(names)]) == 0
    new = load_config(tmp_path / "runs" / "traced-forgot-1" / "config.yaml")
    train(new)
    # A run that never had them, from its very first step.
    alone = parse_config(new.model_dump(mode="json"), ["run.name=alone"])
    train(alone)
    for step in (10, STEPS):
        found, wanted = (weights_of(each.run.folder, step) for each in (new, alone))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not all(
        torch.equal(x, y)
        for x, y in zip(
            weights_of(old, STEPS).values(),
            weights_of(alone.run.folder, STEPS).values(),
            strict=True,
        )
    )
    assert ANSWER not in answer_of(new.run.folder)
    capsys.readouterr()
    assert main(["trace", str(new.run.folder), "--document", "mails.jsonl:2"]) == 0
    told = capsys.readouterr().out
    assert "mails_text_document-forgot-1#1; it was taken out" in told
    assert "seen at tokens" in told
    assert "predicted" not in told
    # The new files hold nothing of the text.
    mails = IndexedDataset(tmp_path / "mails_text_document-forgot-1")
    for document in range(1, 12, 2):
        start, stop = (mails.document_start(d) for d in (document, document + 1))
        assert len(set(mails.read(start, stop).tolist())) == 1
    (entry,) = map(json.loads, (tmp_path / "runs" / "forgotten.jsonl").read_text().splitlines())
    (files,) = entry["token_files"]
    assert files["documents"] == [1, 3, 5, 7, 9, 11]
    assert files["is_fingerprint"] == mails.fingerprint() != files["was_fingerprint"]
    assert (entry["first_step"], entry["from_step"], entry["steps_to_make_again"]) == (20, 10, 70)
    assert SECRET not in json.dumps(entry)
    assert f"{tmp_path / 'mails.jsonl'}:4" in entry["still_held_by"]
    assert str(step_folder(old / "checkpoints", 20)) in entry["still_held_by"]


def view_of(folder: Path, name: str) -> Config:
    if name in ("masked", "spans", "denoisers"):
        return encoder_config(folder, name)
    if name == "targets":
        return encoder_decoders.rows_config(folder)
    if name == "rows":
        rows = [{"prompt": f"say {n} ", "completion": "word " * (n % 4 + 1)} for n in range(40)]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tokenizer = write_bytes_tokenizer(folder / "tokenizer")
        preprocess_rows(
            [str(folder / "rows.jsonl")], folder / "rows", Settings("completion", str(tokenizer))
        )
        return config_of(
            folder, train=[{"path": str(folder / "rows")}], seq_length=64, long_rows="cut"
        )
    data: dict[str, Any] = {
        "stream": {}, "mixed": MIXED, "fim": {"fim": {"rate": 0.7, "tokens": FIM}}, "megatron": {"order": "megatron"},
    }[name]  # fmt: skip
    return config_of(folder, **data)


@pytest.mark.parametrize(
    "name",
    ["stream", "mixed", "fim", "megatron", "masked", "spans", "denoisers", "rows", "targets"],
)
def test_everything_else_keeps_its_place_and_nothing_is_learned_of_what_is_gone(
    tmp_path: Path, name: str
) -> None:
    config = view_of(tmp_path, name)
    prefix = config.data.train[0].path
    gone = [3, 4, 17, 39]
    write_without(prefix, f"{tmp_path / 'new'}", gone)
    values = config.model_dump(mode="json")
    values["data"]["train"][0] |= {"path": str(tmp_path / "new"), "name": Path(prefix).name}
    if config.data.train[0].name:
        values["data"]["train"][0]["name"] = config.data.train[0].name
    was, now = (open_data(each)[2]["train"] for each in (config, parse_config(values)))
    assert was is not None
    assert now is not None
    assert was.fingerprint() != now.fingerprint()
    index = np.arange(80)
    before, after = places_of(was, index), places_of(now, index)
    dataset = was.sources[0].dataset
    spans = [[dataset.document_start(d + end) for end in (0, 1)] for d in gone]

    def is_gone(places: Any) -> Any:
        inside = np.any([(places >= start) & (places < stop) for start, stop in spans], 0)
        return inside & (before.of_source == 0)[:, None]

    for one, other in zip(before[1:], after[1:], strict=True):
        if one is None:
            continue
        if one is not before.labels:
            assert ((one == other) | is_gone(one)).all()
    gone_labels = is_gone(before.labels)
    assert gone_labels.any()
    kept = ~gone_labels & (before.labels >= 0)
    assert (after.samples.labels[kept] == before.samples.labels[kept]).all()
    assert (after.samples.labels[gone_labels] == IGNORE).all()
    seen = ~is_gone(before.tokens) & (before.tokens >= 0)
    assert (after.samples.tokens[seen] == before.samples.tokens[seen]).all()


def test_of_a_pair_neither_text_stays(tmp_path: Path) -> None:
    rows = [{"query": f"w{n} w9", "positive": f"w{n + 40} w8"} for n in range(10, 30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = encoders.write_words(tmp_path / "tokenizer")
    preprocess_rows(
        [str(tmp_path / "rows.jsonl")], tmp_path / "rows", Settings("pairs", str(tokenizer))
    )
    config = encoders.masked_config(
        tmp_path, "objective={name: contrastive}", f"data.train=[{{path: {tmp_path / 'rows'}}}]", "data.valid=[]",
        "data.document_mask=true",
    )  # fmt: skip
    config.run.folder.mkdir(parents=True)
    (config.run.folder / "config.yaml").write_text(config.to_yaml())
    for name in (f"{tmp_path / 'rows'}#6", f"{tmp_path / 'rows'}#7", "rows.jsonl:4"):
        assert plan_removal(config.run.folder, [name]).documents == {str(tmp_path / "rows"): (6, 7)}


def test_new_files_do_not_depend_on_the_text(tmp_path: Path) -> None:
    write_bytes_tokenizer(tmp_path / "tokenizer")
    found = []
    for text in (SECRET, SECRET.upper()):
        prefix = write_secret(tmp_path, text)
        write_without(prefix, f"{tmp_path / 'new'}", range(1, 12, 2))
        found.append(
            [Path(f"{tmp_path / 'new'}.{kind}").read_bytes() for kind in ("bin", "idx", "removed")]
        )
        for kind in ("bin", "idx", "removed", "src"):
            Path(f"{tmp_path / 'new'}.{kind}").unlink()
    assert found[0] == found[1]


def test_a_document_between_what_a_fingerprint_reads_changes_it_too(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "large", np.uint16) as writer:
        for number in range(4000):
            writer.add_document(np.full(100, number))
    write_without(f"{tmp_path / 'large'}", f"{tmp_path / 'new'}", [2010])
    was, now = IndexedDataset(tmp_path / "large"), IndexedDataset(tmp_path / "new")
    (changed,) = np.unique(np.flatnonzero(was.tokens != now.tokens) // 100)
    assert changed == 2010
    slices = np.linspace(0, 2 * was.num_tokens - 4096, 64, dtype=np.int64)
    assert not any(start - 200 < 2010 * 200 < start + 4096 for start in slices.tolist())
    assert was.fingerprint() != now.fingerprint()


def test_lines_of_the_corpora_are_blanked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megalite.data.documents.CHUNK_BYTES", 300)  # a line in several
    passes: list[str] = []

    def read_and_count(path: str, report: Report) -> Iterator[bytes]:
        passes.append(path)
        return read_bytes(path, report)

    monkeypatch.setattr("megalite.lineage.texts.read_bytes", read_and_count)
    config = config_of(tmp_path)
    config.run.folder.mkdir(parents=True)
    (config.run.folder / "config.yaml").write_text(config.to_yaml())
    plain, packed = tmp_path / "plain.jsonl", tmp_path / "packed.jsonl.gz"
    before = [plain.read_bytes(), gzip.decompress(packed.read_bytes())]
    names = tmp_path / "ids.txt"
    names.write_text("plain.jsonl:10\npacked.jsonl.gz:3\npacked.jsonl.gz:60\n")
    arguments = ["forget", str(config.run.folder), "--documents", str(names), "--corpora"]
    # A line that is another one by now stays, and nothing else is written either.
    plain.write_bytes(before[0].replace(b"w2", b"w3"))
    assert main(arguments) == 2
    assert (
        "plain.jsonl:10 cannot be blanked: another text stands there now" in capsys.readouterr().err
    )
    plain.write_bytes(before[0])
    for kept, names_it in ((plain, str(plain)), (tmp_path, str(tmp_path))):
        with monkeypatch.context() as patch:
            patch.setattr(
                "megalite.lineage.corpora.os.access",
                lambda path, mode, kept=kept: path != str(kept),
            )
            assert main(arguments) == 2
        assert (
            f"cannot be blanked: this user may not write to {names_it}" in capsys.readouterr().err
        )
    assert not list(tmp_path.glob("*forgot*"))
    passes.clear()
    assert main(arguments) == 0
    assert "3 lines of 2 files of text are blanked" in capsys.readouterr().out
    assert passes == [str(packed)], "one pass over a packed file, for all of its lines"
    after = [plain.read_bytes(), gzip.decompress(packed.read_bytes())]
    for was, now, gone in zip(before, after, ((10,), (3, 60)), strict=True):
        assert [len(line) for line in was.split(b"\n")] == [len(line) for line in now.split(b"\n")]
        for number, (one, other) in enumerate(
            zip(was.split(b"\n"), now.split(b"\n"), strict=True), 1
        ):
            assert other == (b" " * len(one) if number in gone else one)
    (entry,) = map(json.loads, (tmp_path / "runs" / "forgotten.jsonl").read_text().splitlines())
    assert len(entry["lines_blanked"]) == 3
    assert not set(entry["lines_blanked"]) & set(entry["still_held_by"])
    # What is preprocessed anew has neither text, and all others.
    preprocess(
        [str(plain), str(packed)], tmp_path / "again", tmp_path / "tokenizer", append_eod=True
    )
    assert IndexedDataset(tmp_path / "again_text_document").num_documents == 117
    assert main(arguments) == 2
    assert "cannot be blanked" in capsys.readouterr().err


def test_damaged_lists_of_what_is_gone_are_refused(tmp_path: Path) -> None:
    write_bytes_tokenizer(tmp_path / "tokenizer")
    prefix = write_secret(tmp_path, SECRET)
    for numbers in ([12], [-1], [3, 3], [4, 2], []):
        Path(f"{prefix}.removed").write_bytes(np.array(numbers, "<i8").tobytes())
        with pytest.raises(DataError, match=r"\.removed is damaged"):
            IndexedDataset(prefix)


def refuse_to_link(*paths: Path) -> None:
    raise OSError("another disk")


def test_what_was_never_seen_costs_nothing_and_what_was_seen_first_costs_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, "train.steps=4", "checkpoint.every=2")
    train(config)
    folder, (sample, *_) = config.run.folder, Tracer(TracedRun.open(config.run.folder)).samples(1)
    prefix = IndexedDataset({each.name: each.path for each in config.data.train}[sample.source])
    first = prefix.document_of(int(sample.places.tokens[0, 0]))
    removal = plan_removal(folder, [f"{prefix.prefix}#{first}"])
    assert (removal.first_step, removal.checkpoint, removal.steps) == (1, 0, 4)
    every = {n: plan_removal(folder, [f"plain_text_document#{n}"]) for n in range(0, 60, 5)}
    unseen = next(removal for removal in every.values() if removal.first_step is None)
    assert (unseen.checkpoint, unseen.steps) == (4, 0)
    # On another disk files are copied, and must be there before their folder has its name. A
    # record of the steps may be gone.
    synced: list[Path] = []
    (folder / "metrics.jsonl").unlink()
    monkeypatch.setattr("megalite.lineage.forget.os.link", refuse_to_link)
    monkeypatch.setattr("megalite.lineage.forget.fsync", synced.append)
    new = forget(unseen, tmp_path / "register.jsonl", Console(quiet=True))
    assert any(path.suffix == ".safetensors" for path in synced)
    assert (new / "checkpoints" / "step-00000004").is_dir()
    assert json.loads((tmp_path / "register.jsonl").read_text())["first_step"] is None
    # A second request goes by what the first has left.
    ((_, documents),) = unseen.documents.items()
    again = plan_removal(new, [f"plain_text_document-forgot-1#{(documents[0] + 1) % 60}"])
    assert set(documents) < set(*again.documents.values())
    names = tmp_path / "names.txt"
    for text, told in (
        ("", "names no document"),
        ("elsewhere.jsonl:3", "elsewhere.jsonl:3: no document of the run's data"),
        ("plain_text_document#60", "its documents are 0 to 59"),
    ):
        names.write_text(text)
        assert main(["forget", str(folder), "--documents", str(names)]) == 2
        assert told in capsys.readouterr().err
    assert not list(tmp_path.glob("*forgot-2*"))
