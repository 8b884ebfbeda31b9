"""The parts whose answer can be said without running the whole way."""

import time
from collections import Counter

import numpy as np
import pytest
from datatrove.data import Document
from machine_corpus import prose

from megalite.corpus.checks import Language, stages
from megalite.corpus.config import CorpusConfig, LanguageConfig, NearConfig
from megalite.corpus.duplicates import EXACT_TASKS, ExactPlaces, FindExact, WriteDigests, signatures
from megalite.corpus.personal import EMAILS, IPS, replaced
from megalite.corpus.steps import Stage
from megalite.corpus.tally import Tally
from megalite.corpus.tokenizing import Words
from megalite.corpus.warc import LOOKS_LIKE_HTML


@pytest.mark.parametrize(
    ("kind", "text", "after"),
    [
        (EMAILS, "Ask <j.doe+x@mail.acme.co.uk>.", "Ask <email@example.com>."),
        (EMAILS, "mailto:jane@acme.io?subject=x", "mailto:email@example.com?subject=x"),
        (EMAILS, "one@acme.io,two@acme.io", "email@example.com,email@example.com"),
        (EMAILS, "me@example.com, @decorator, a @ b, user@localhost", None),
        (IPS, "from 81.2.69.142, port 80", "from 192.0.2.1, port 80"),
        (IPS, "http://81.2.69.142:8080/", "http://192.0.2.1:8080/"),
        (IPS, "192.168.0.1, 127.0.0.1, 10.0.0.1, 999.1.1.1, 1.2.3, 1.2.3.4.5, v8.8.8.8", None),
        (IPS, "at 2a00:1450:4001:82a::200e.", "at 2001:db8::1."),
        (IPS, "std::vector, 2001:db8::5, fe80::1, 12:30:45, 2023:10:11, dead::beef", None),
    ],
)
def test_addresses(kind, text, after):
    assert replaced(text, kind)[0] == (after or text)
    assert (replaced(text, kind)[1] > 0) == (after is not None)


VERSIONS = [
    "OpenSSL version {}", "Version: {}", "firmware v{} for routers", "v. {}", "release {} (LTS)",
    "pip install numpy=={}",
    "libfoo>= {}", "nginx/{} running", "Mozilla/{} (X11)", "glibc-{}", "foo_{}", "driver {}", "see section {}",
    "build #{}",
    "versions 1.2.3, {} and 1.2.4.0", "versions {} to 9.9", "{}-rc1", "{}-beta", "libfoo {}.tar.gz", "{}-1ubuntu2",
    "~> {}",
    "python-foo-bar-{}.whl", "SDK {}", 'version = "{}"', "upgrade from version 1.2.3.4 to {}",
]  # fmt: skip
ADDRESSES = [
    "from {}", "http://{}/", "ssh root@{}", "ping {} -c 3", "{} - - [10/Oct/2000]", "server {}", "host-{}", "({})",
    "IP: {}",
    "{}-{}", "{}:8080", "nameserver {}", "https://{}.", "a version of it runs at {}", "tcp/{}", "{}, {}",
    "x-forwarded-for: {}",
]  # fmt: skip


def test_a_version_is_no_address_and_an_address_no_version():
    draw = np.random.default_rng(0)
    for sentence in VERSIONS * 20:
        numbers = ".".join(map(str, draw.integers(1, 9, 4)))
        text = sentence.format(numbers)
        assert replaced(text, IPS) == (text, 0), text
    for sentence in ADDRESSES * 20:
        address = f"81.{'.'.join(map(str, draw.integers(1, 255, 3)))}"
        text = sentence.format(address, address)
        count = sentence.count("{}")
        assert replaced(text, IPS) == (sentence.format(*["192.0.2.1"] * count), count), text


def test_tables_of_different_numbers_are_near_duplicates_only_where_numbers_do_not_count(tmp_path):
    tables = [
        "\n".join(f"row {a} has {a * seed} of {seed + a} items" for a in range(1, 40))
        for seed in (3, 7)
    ]
    equal = {}
    for numbers in (True, False):
        step = signatures(NearConfig(same_numbers=numbers), tmp_path)
        first, second = (np.array(step.get_signature(step.get_shingles(table))) for table in tables)
        equal[numbers] = bool((first == second).all(1).any())
    assert equal == {True: True, False: False}


@pytest.mark.parametrize("run", ["a", "a.", "/+", "a@", "1.", "2001:", "a-"])
def test_addresses_are_found_in_linear_time(run):
    start = time.process_time()
    for kind in (EMAILS, IPS):
        replaced(run * 200_000 + " @", kind)
    assert time.process_time() - start < 10  # seconds where quadratic time takes hours


def test_no_page_makes_a_pattern_try_without_end():
    """Comments before a page, versions parted by spaces, a run of signs that ends no sentence: the
    time for them grew exponentially or with the square of their number."""
    start = time.process_time()
    assert not LOOKS_LIKE_HTML.match(b"<!-- a -->" * 40 + b"<div>")
    assert replaced("v" + " 1.1" + "      1.1" * 7 + " x 8.8.8.8", IPS)[1] == 1
    assert len(Words().span_tokenize("a" + "." * 200_000 + "x")) == 1
    assert time.process_time() - start < 1


def test_words_and_sentences():
    words = Words()
    assert words.word_tokenize("It's 3.14, état-major…") == [
        "It's",
        "3.14",
        ",",
        "état",
        "-",
        "major",
        "…",
    ]
    text = 'Hello world. It is 3.14 today! "Really?" she said\nNo end here'
    assert words.sent_tokenize(text) == [
        "Hello world.",
        "It is 3.14 today!",
        '"Really?"',
        "she said",
        "No end here",
    ]
    assert "".join(text[start:end] for start, end in words.span_tokenize(text)) == text


def test_a_rule_that_fails_drops_the_document_and_says_so():
    def fails(document, notes):
        raise ZeroDivisionError("division by zero")

    stage = Stage("rule", fails)
    assert not list(stage.run([Document(text="text", id="1", metadata={"source": "a"})]))
    assert {reason: dropped.documents for reason, dropped in stage.tally.dropped.items()} == {
        "failed: ZeroDivisionError: division by zero": 1
    }


def test_odd_documents_pass_every_stage_without_a_failure():
    config = CorpusConfig.model_validate(
        {"output": "o", "sources": [{"name": "a", "path": "p"}], "length": None}
    )
    texts = [
        "x",
        "\n",
        "。",
        "…",
        "🦜" * 400,
        "a" * 100_000,
        "\x00\x01",
        "\u200b" * 50,
        ".\n" * 5000,
        "#" * 5000,
        "é" * 10,
    ]
    made = stages(config)
    documents = [
        Document(text=text, id=str(number), metadata={"source": "a"})
        for number, text in enumerate(texts)
    ]
    for stage in made:
        documents = list(stage.run(documents))
    assert not [
        reason for stage in made for reason in stage.tally.dropped if reason.startswith("failed")
    ]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The captain wrote a long letter to the council of the village.", "en"),
        ("Der Kapitän schrieb dem Gemeinderat einen langen Brief.", "de"),
        ("船長は村の議会に長い手紙を書いた。", "ja"),
        ("Капитан написал длинное письмо в сельский совет.", "ru"),
    ],
)
def test_languages(text, language):
    document, notes = Document(text=text, id="1"), Counter()
    assert Language(LanguageConfig(keep=[language]))(document, notes) is None
    assert (document.metadata["language"], notes) == (language, {language: 1})
    assert Language(LanguageConfig(keep=["tlh"]))(document, notes) == f"language {language}"
    assert Language(LanguageConfig(keep=[]))(document, notes) is None


def test_signatures_in_parts_are_those_of_the_whole(tmp_path, monkeypatch):
    step = signatures(NearConfig(), tmp_path)
    shingles = step.get_shingles("\n".join(prose(seed) for seed in range(30)))
    whole = step.get_signature(shingles)
    assert np.shape(whole) == (14, 8)
    monkeypatch.setattr("megalite.corpus.duplicates.SHINGLES_AT_A_TIME", 1000)
    assert len(shingles) > 5000
    assert step.get_signature(shingles) == whole


def test_exact_duplicates_against_a_plain_search(tmp_path):
    draw = np.random.default_rng(5)
    shards = [[str(draw.integers(60)) for _ in range(draw.integers(0, 40))] for _ in range(6)]
    shards[2] = []
    for rank, texts in enumerate(shards):
        documents = [Document(text=text, id="") for text in texts]
        assert list(WriteDigests(tmp_path).run(documents, rank)) == documents
    for part in range(EXACT_TASKS):
        FindExact(tmp_path, tmp_path, len(shards)).run(rank=part, world_size=EXACT_TASKS)
    seen: set[str] = set()
    for rank, texts in enumerate(shards):
        expected = []
        for place, text in enumerate(texts):
            if text in seen:
                expected.append(place)
            seen.add(text)
        assert ExactPlaces(tmp_path)(rank).tolist() == expected


def test_tallies_merge_in_any_order():
    def tally_of(numbers):
        tally = Tally("a")
        for number in numbers:
            if number % 3:
                tally.drop(number, f"reason {number % 3}", f"id-{number}", f"text {number}")
            else:
                tally.keep(number, number - 1, changed=True)
        return tally

    one = tally_of(range(100))
    for parts in (
        [range(50), range(50, 100)],
        [range(50, 100), range(50)],
        [range(0, 100, 2), range(1, 100, 2)],
    ):
        merged = Tally("a")
        for part in parts:
            merged.merge(Tally.from_json(tally_of(part).to_json()))
        assert merged == one
