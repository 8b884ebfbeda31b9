"""The whole way from raw files to splits, on files in which every kind of trouble is planted."""

import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from machine_corpus import check, plant, planted, prose

from megalite.corpus.config import CorpusConfig, load_corpus_config
from megalite.corpus.run import prepare_corpus
from megalite.data.documents import Reading, read_files
from megalite.data.inputs import Report, list_files
from megalite.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools" / "prepare_corpus.py")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    plant(folder / "planted")
    (folder / "more").mkdir()
    for number in range(4):
        lines = [
            {"text": prose(seed), "url": f"https://example.org/{seed}"}
            for seed in range(100 * number, 100 * number + 40)
        ]
        lines.append({"text": prose(7777)})  # an exact duplicate across files
        data = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "more" / f"{number}.jsonl").write_text(data)
    return folder


def config_of(raw, output, **settings):
    sources = [
        {"name": "planted", "path": str(raw / "planted")},
        {"name": "more", "path": str(raw / "more")},
    ]
    values = {"output": str(output), "sources": sources, "shard_mb": 0.05, "workers": 1} | settings
    return CorpusConfig.model_validate(values | {"split": {"valid": 0.05, "test": 0.05}})


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    output = tmp_path_factory.mktemp("prepared") / "out"
    return output, prepare_corpus(config_of(raw, output))


def documents_of(output):
    """(split, document) of everything that was written, read as tools/preprocess_data.py reads
    it."""
    report = Report()
    for split in ("train", "valid", "test"):
        if (output / split).exists():
            for document in read_files(
                list_files([str(output / split)], report), Reading(metadata=True), report
            ):
                yield split, document
    assert str(report) == ""


def digest_of(output):
    """Of every file that was written, but those of the work."""
    files = [
        path
        for path in sorted(output.rglob("*"))
        if path.is_file() and output / "work" not in path.parents
    ]
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def stage_of(report, name):
    return next(stage for stage in report["stages"] if stage["name"] == name)


def dropped_by(report, name):
    return {
        reason: dropped["documents"]
        for reason, dropped in stage_of(report, name)["dropped"].items()
    }


def test_every_planted_case_is_found_and_none_is_fatal(raw, prepared, capsys):
    output, report = prepared
    assert check(raw, output) == 0, capsys.readouterr().out
    assert dropped_by(report, "read") == {"bad lines or files": 6, "empty": 2, "binary files": 1}
    assert stage_of(report, "read")["notes"] == {"documents not all UTF-8, mended": 2}
    assert dropped_by(report, "length") == {
        "over 1,000,000 characters": 1,
        "under 200 characters": 1,
    }
    assert dropped_by(report, "language") == {"language de": 1}
    assert dropped_by(report, "repetition") == {"one 3-gram everywhere": 1}
    assert dropped_by(report, "gopher") == {"hashes (#)": 1}
    assert dropped_by(report, "c4") == {"lorem ipsum": 1}
    assert stage_of(report, "personal")["notes"] == {"email addresses": 1, "IP addresses": 2}
    # The planted copy, the 40 documents of seeds that were planted as well, the line that ends each
    # of four files, and the pages that are in both WARC files.
    assert dropped_by(report, "exact") == {"the same text before": 1 + 40 + 3 + 2}
    assert dropped_by(report, "near") == {"nearly the same text": 2}


def test_documents_say_where_they_come_from(raw, prepared):
    documents = {document.metadata["id"]: document for _, document in documents_of(prepared[0])}
    path = raw / "more" / "2.jsonl"
    document = documents[f"{path}:3"]
    assert document.text == prose(202)
    assert document.metadata == {
        "id": f"{path}:3",
        "source": "more",
        "path": str(path),
        "line": 3,
        "language": "en",
        "language_score": document.metadata["language_score"],
        "metadata": {"url": "https://example.org/202"},
    }
    assert 0.65 < document.metadata["language_score"] <= 1
    page = documents["<urn:page-71>"]
    assert (page.metadata["line"], page.metadata["metadata"]["url"]) == (
        2,
        "https://example.org/page-71",
    )
    assert documents["latin"].metadata["mended_bytes"] == documents["latin"].text.count("ö") > 0


def test_counts_add_up(prepared):
    output, report = prepared
    for stage, after in zip(report["stages"], [*report["stages"][1:], None], strict=True):
        for count in ("documents", "num_bytes"):
            dropped = sum(reason[count] for reason in stage["dropped"].values())
            removed = stage["removed_bytes"] if count == "num_bytes" else 0
            assert stage["came"][count] == stage["kept"][count] + dropped + removed, stage["name"]
            if after:
                assert after["came"][count] == stage["kept"][count], stage["name"]
    assert [stage["name"] for stage in report["stages"]] == [
        *(
            "read",
            "extract",
            "encoding",
            "length",
            "language",
            "repetition",
            "gopher",
            "c4",
            "fineweb",
        ),
        *("personal", "words", "exact", "near"),
    ]
    written = {"train": [0, 0], "valid": [0, 0], "test": [0, 0]}
    for split, document in documents_of(output):
        written[split][0] += 1
        written[split][1] += document.num_bytes
    assert {split: list(count.values()) for split, count in report["splits"].items()} == written
    assert min(count for count, _ in written.values()) > 0
    assert [sum(column) for column in zip(*written.values(), strict=True)] == list(
        report["stages"][-1]["kept"].values()
    )
    for split, count in report["splits"].items():
        assert count["documents"] == sum(
            source[split]["documents"] for source in report["sources"].values()
        )
    for dropped in (
        dropped for stage in report["stages"][1:] for dropped in stage["dropped"].values()
    ):
        assert 1 <= len(dropped["samples"]) <= 3


def test_any_number_of_workers_gives_the_same_bytes(raw, prepared, tmp_path):
    prepare_corpus(config_of(raw, tmp_path / "out", workers=2))
    changed = (
        (tmp_path / "out" / "report.json")
        .read_text()
        .replace(str(tmp_path / "out"), str(prepared[0]))
    )
    assert changed == (prepared[0] / "report.json").read_text()
    mine, other = digest_of(tmp_path / "out"), digest_of(prepared[0])
    reports = {"report.json", "report.html"}  # which name the output folder
    assert {name: mine[name] for name in mine.keys() - reports} == {
        name: other[name] for name in other.keys() - reports
    }


def descendants(pid):
    """The processes that a process has started, and those that these have."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = int(re.search(r"^PPid:\s+(\d+)", status.read_text(), re.MULTILINE)[1])
        except OSError:
            continue
        if parent == pid:
            found += [int(status.parent.name), *descendants(int(status.parent.name))]
    return found


def is_alive(pid):
    try:
        return not re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return False


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None
        time.sleep(0.002)


def assert_gone(processes):
    deadline = time.monotonic() + 60
    while any(is_alive(process) for process in processes):
        assert time.monotonic() < deadline, "a process has outlived the one it worked for"
        time.sleep(0.01)


# The tool, which goes no further than a phase: it cannot come to its end before it is killed.
HELD = """
import runpy, sys, time
from megalite.corpus import execute

phase, sys.argv, finished = sys.argv[1], sys.argv[2:], execute._finished

def held(executor, pool, tasks):
    yield from finished(executor, pool, tasks)
    if executor.logging_dir.path.endswith(phase):
        time.sleep(600)

execute._finished = held
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def long(raw, tmp_path):
    """A config of what takes minutes."""
    (tmp_path / "long").mkdir()
    line = json.dumps({"text": "\n".join(prose(seed) for seed in range(20))}) + "\n"
    (tmp_path / "long" / "0.jsonl").write_text(line * (20_000_000 // len(line)))
    for number in range(1, 4):
        os.link(tmp_path / "long" / "0.jsonl", tmp_path / "long" / f"{number}.jsonl")
    sources = [{"name": "raw", "path": str(raw)}, {"name": "long", "path": str(tmp_path / "long")}]
    config = tmp_path / "config.yaml"
    config.write_text(
        json.dumps(config_of(raw, tmp_path / "out", sources=sources).model_dump(mode="json"))
    )
    return config


@pytest.mark.parametrize("phase", ["clean", "signatures"])
def test_killed_and_resumed_gives_the_same_bytes(raw, prepared, tmp_path, phase):
    """Killed once a task of the phase is finished; that one is not done again, and no process stays
    behind."""
    output = tmp_path / "out"
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(config_of(raw, output).model_dump(mode="json")))
    command = [sys.executable, TOOL, str(config), "workers=2"]
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, phase, *command[1:]], stderr=subprocess.DEVNULL
    )
    finished = output / "work" / "logs" / phase / "completions"
    wait_until(lambda: list(finished.glob("*")), process)
    children = descendants(process.pid)
    assert children
    process.kill()
    process.wait()
    assert not (output / "report.json").exists()
    assert_gone(children)
    done = {path: path.stat().st_mtime_ns for path in finished.glob("*")}
    subprocess.run(command, check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    mine, other = digest_of(output), digest_of(prepared[0])
    names = (mine.keys() | other.keys()) - {"report.json", "report.html"}
    assert {name: mine.get(name) for name in names} == {name: other.get(name) for name in names}
    assert not list(output.rglob("*.tmp")), "a temporary file was left behind"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_tool_leaves_no_processes(long, tmp_path, sent):
    process = subprocess.Popen(
        [sys.executable, TOOL, str(long), "workers=2"], stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: list((tmp_path / "out" / "work" / "clean").glob("*")), process)
    children = descendants(process.pid)
    process.send_signal(sent)
    _, said = process.communicate()
    assert (process.returncode, said.splitlines()[-1]) == (
        130,
        "interrupted; the same command goes on from here",
    )
    assert_gone(children)


def test_a_worker_that_is_killed_ends_the_run_with_a_reason(long, tmp_path):
    process = subprocess.Popen(
        [sys.executable, TOOL, str(long), "workers=2"], stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: list((tmp_path / "out" / "work" / "clean").glob("*")), process)
    for child in descendants(process.pid):
        if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
            os.kill(child, signal.SIGKILL)
            break
    _, said = process.communicate()
    assert process.returncode == 2
    assert "error: one of 2 workers was killed, most likely for memory; use fewer workers" in said


def test_no_duplicate_crosses_the_split(tmp_path):
    """Also where duplicates are kept, and where they differ in what no reader would call another
    text."""
    variants = [
        str,
        str.upper,
        lambda text: text.replace(" ", "\n"),
        lambda text: text.replace(".", "!"),
        str,
    ]
    lines = [
        json.dumps({"text": variant(prose(seed))}) for variant in variants for seed in range(150)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    off = dict.fromkeys(
        ("encoding", "length", "language", "repetition", "gopher", "c4", "fineweb", "near")
    )
    settings = {
        "output": tmp_path / "out",
        "sources": [{"name": "a", "path": str(tmp_path / "a.jsonl")}],
        "workers": 1,
    }
    split = {"valid": 0.2, "test": 0.1}
    report = prepare_corpus(
        CorpusConfig.model_validate({**settings, **off, "exact": False, "split": split})
    )
    sides: dict[int, set[str]] = {}
    for side, document in documents_of(tmp_path / "out"):
        sides.setdefault((document.metadata["line"] - 1) % 150, set()).add(side)
    assert len(sides) == 150
    assert all(len(found) == 1 for found in sides.values())
    shares = [report["splits"][side]["documents"] / 750 for side in ("train", "valid", "test")]
    # Three standard deviations of 150 draws.
    for found, wanted in zip(shares, (0.7, 0.2, 0.1), strict=True):
        assert found == pytest.approx(wanted, abs=3 * (wanted * (1 - wanted) / 150) ** 0.5)


def test_compression_and_stages_that_are_off(raw, tmp_path):
    report = prepare_corpus(
        config_of(raw, tmp_path / "out", compression="gz", c4=None, near=None, words=None)
    )
    names = [stage["name"] for stage in report["stages"]]
    assert not {"c4", "near", "words"} & set(names)
    with gzip.open(min((tmp_path / "out" / "train").iterdir()), "rt", encoding="utf-8") as file:
        # The first that is kept of the first file, planted/bad.jsonl.
        assert json.loads(file.readline())["id"] == "latin"
    kept = {document.metadata["id"] for _, document in documents_of(tmp_path / "out")}
    assert {"near-copy", "spaced-copy", "lorem"} <= kept
    assert not {"exact-copy", "german"} & kept


def test_sources_skip_stages(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": planted()["german"][1]}) + "\n")
    sources = [
        {
            "name": "a",
            "path": str(tmp_path / "a.jsonl"),
            "skip": ["language", "gopher", "repetition", "fineweb"],
        }
    ]
    settings = {"output": tmp_path / "out", "sources": sources, "workers": 1}
    assert (
        prepare_corpus(CorpusConfig.model_validate(settings))["splits"]["train"]["documents"] == 1
    )


class Page(HTMLParser):
    """Holds every tag against the one that closes it, and collects what a browser would load."""

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.text, self.targets, self.ids, self.classes = (
            [],
            [],
            [],
            [],
            [],
            [],
        )

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href") and not value.startswith("#"):
                self.loaded.append(value)
            elif name == "href":
                self.targets.append(value[1:])
            elif name == "id":
                self.ids.append(value)
            elif name == "class":
                self.classes.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_whole_and_shows_what_the_json_says(prepared):
    output, report = prepared
    source = (output / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(source)
    assert not page.open
    assert not page.loaded
    assert "url(" not in source
    assert "@import" not in source
    assert set(page.targets) <= set(page.ids)
    style = source[source.index("<style>") : source.index("</style>")]
    assert style.count("{") == style.count("}")
    assert set(" ".join(page.classes).split()) <= set(re.findall(r"\.([a-z]+)", style))
    text = " ".join(page.text)
    for stage in report["stages"]:
        assert f"{stage['kept']['documents']:,}" in text
        for reason, dropped in stage["dropped"].items():
            assert reason in text
            assert all(sample["id"] in text for sample in dropped["samples"][:2])
    assert all(message in text for message in report["messages"])


def test_report_shows_nobodys_addresses(tmp_path):
    texts = [
        "Write to jane.doe@mail.acme.io from 81.2.69.142.",
        prose(1),
    ]  # the first is dropped as too short
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = [{"name": "a", "path": str(tmp_path / "a.jsonl")}]
    prepare_corpus(
        CorpusConfig.model_validate({"output": tmp_path / "out", "sources": sources, "workers": 1})
    )
    for name in ("report.json", "report.html"):
        told = (tmp_path / "out" / name).read_text()
        assert "Write to email@example.com from 192.0.2.1." in told
        assert "jane" not in told


def test_words_and_groups(tmp_path):
    texts = [
        prose(1) + " A blurgh woman came.",
        prose(2) + " A woman came.",
        prose(3) + " A mosque stood there.",
        prose(4),
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "words.txt").write_text("# mine\nblurgh\n")
    (tmp_path / "groups.yaml").write_text(
        "gender: {women: [woman]}\nreligion: {muslims: [mosque]}\n"
    )
    sources = [{"name": "a", "path": str(tmp_path / "a.jsonl")}]
    words = {"file": str(tmp_path / "words.txt"), "groups": str(tmp_path / "groups.yaml")}
    settings = {"output": tmp_path / "out", "sources": sources, "workers": 1, "words": words}
    report = prepare_corpus(CorpusConfig.model_validate(settings))
    assert report["groups"] == {
        "documents": 4,
        "listed": 1,
        "groups": {
            "gender/women": {"documents": 2, "listed": 1},
            "religion/muslims": {"documents": 1, "listed": 0},
        },
    }
    marked = [
        document.metadata.get("listed_words") for _, document in documents_of(tmp_path / "out")
    ]
    assert sorted(marked, key=str) == [1, None, None, None]
    settings |= {"output": tmp_path / "strict", "words": words | {"max_share": 0.001}}
    assert (
        prepare_corpus(CorpusConfig.model_validate(settings))["splits"]["train"]["documents"] == 3
    )
    (tmp_path / "groups.yaml").write_text("gender: women\n")
    with pytest.raises(ConfigError, match="must be a list of words"):
        prepare_corpus(CorpusConfig.model_validate(settings | {"output": tmp_path / "other"}))


def test_an_output_of_another_config_or_other_files_is_refused(raw, prepared, tmp_path):
    with pytest.raises(
        DataError,
        match=r"was begun with another config; name another `output`.*\(length\.min_chars \d+ → 100\)",
    ):
        prepare_corpus(config_of(raw, prepared[0], length={"min_chars": 100}))
    other = config_of(raw, prepared[0], sources=[{"name": "more", "path": str(raw / "more")}])
    with pytest.raises(
        DataError, match=r"was begun with files of other names or sizes.*\(\S+bad\.jsonl \d+ → null"
    ):
        prepare_corpus(other)
    before = digest_of(prepared[0])
    prepare_corpus(config_of(raw, prepared[0], workers=2))
    assert digest_of(prepared[0]) == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "output: o\nsources: [{name: a, path: p}]\nlanguag: null",
            "unknown key languag (value None); did you mean 'language'?",
        ),
        ("output: o\nsources: [{name: a, path: p, skip: [gophr]}]", "did you mean 'gopher'?"),
        (
            "output: o\nsources: [{name: a, path: p}, {name: a, path: q}]",
            "two sources are named 'a'",
        ),
        ("output: o\nsources: []", "sources = []"),
        (
            "output: o\nsources: [{name: a, path: p}]\nsplit: {valid: 0.5, test: 0.5}",
            "leave nothing for train",
        ),
        (
            "output: o\nsources: [{name: a, path: p}]\nlanguage: {keep: [English]}",
            "'English' is not an ISO 639 code",
        ),
    ],
)
def test_mistakes_in_a_config(tmp_path, settings, message):
    (tmp_path / "c.yaml").write_text(settings)
    with pytest.raises(ConfigError) as error:
        load_corpus_config(tmp_path / "c.yaml")
    assert message in str(error.value)


def test_example_configs_are_right():
    assert {
        load_corpus_config(path).output.name
        for path in (ROOT / "configs" / "corpus").glob("[mw]*.yaml")
    } == {
        "web",
        "machine-clean",
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_tool_says_little(raw, tmp_path, workers):
    config = tmp_path / "config.yaml"
    config.write_text(
        json.dumps(config_of(raw, tmp_path / "out", near=None).model_dump(mode="json"))
    )
    command = [sys.executable, TOOL, str(config), f"workers={workers}", "shard_mb=null"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.fullmatch(
        r"\S+: \d+ train, \d+ valid, \d+ test documents out of \d+ \(.*\) in .* s; see .*\n",
        done.stdout,
    )
    assert re.fullmatch(r"(\w+: \d+ of \d+ tasks, [\d.]+ s\n)+", done.stderr), done.stderr


def test_tool_says_what_is_wrong(tmp_path):
    """One line and status 2, also where no document is left."""
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    for name, why in {
        "none": f"input '{tmp_path}/none' matches no file; give existing files, folders or a quoted glob",
        "blank.jsonl": "no document is left: read dropped 1 (empty); "
        f"{tmp_path}/out/report.html says what was left out, and why",
    }.items():
        (tmp_path / "c.yaml").write_text(
            f"output: {tmp_path}/out\nsources: [{{name: a, path: {tmp_path}/{name}}}]\n"
        )
        done = subprocess.run(
            [sys.executable, TOOL, str(tmp_path / "c.yaml")], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr.splitlines()[-1]) == (2, f"error: {why}")
