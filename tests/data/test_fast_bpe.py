import itertools
import json
import random
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from megalite.data import fast_bpe as module
from megalite.data.fast_bpe import DIFFERENT, SAME, FastBPE, NotFast
from megalite.data.indexed import IndexedDataset
from megalite.data.preprocess import preprocess
from megalite.data.tokenizer import load_tokenizer
from megalite.data.tokenizer_training import PATTERN, train_tokenizer

CL100K = PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|")
LETTERS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    LETTERS + r"*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    + LETTERS + r"+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
SPLITS = {"gpt2": None, "qwen2": PATTERN, "cl100k": CL100K, "o200k": O200K, "nfc": PATTERN}
TEXT = (
    "Don't they'll 1234 x² naïve Ünïcode ĞĞ Ελληνικά русский 日本語テキスト हिन्दी عربي 한국어 👍🏽  \t\n\r\n ...!! "
    * 3
)


@pytest.fixture(scope="module", params=SPLITS)
def tokenizer(request, tmp_path_factory):
    pattern = SPLITS[request.param]
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    raw = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(False, use_regex=not pattern)
    raw.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level
    raw.decoder = decoders.ByteLevel()
    raw.normalizer = normalizers.NFC() if request.param == "nfc" else None
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator([TEXT, unicodedata.normalize("NFD", TEXT)], trainer)
    raw.add_tokens([AddedToken("<tool>", normalized=False)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    raw.save(str(path))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def fast(tokenizer):
    return FastBPE(tokenizer)


def rows_of(fast, texts):
    flat, lengths, num_left = fast.encode([text.encode() for text in texts])
    assert flat.size == lengths.sum()
    return [row.tolist() for row in np.split(flat, lengths.cumsum()[:-1])], num_left


def test_same_ids_around_every_character(tokenizer, fast):
    """A part of all planes, denser where letters are or are to come; tools/bench/tokenizing.py
    --unicode does all."""
    points = [*range(0, 0x3000, 3), *range(0x3000, 0x20000, 29), *range(0x20000, 0x110000, 4999)]
    points += [p for p in range(0x20000) if unicodedata.category(chr(p)) == "Cn"][::13]
    characters = [chr(p) for p in points if not 0xD800 <= p < 0xE000]
    random.Random(0).shuffle(characters)
    texts = [f"x{c}y {c}{c}.{c}1{c} {c}A{c}\n" for c in characters]
    rows, num_left = rows_of(fast, texts)
    assert rows == tokenizer.encode_batch(texts)
    assert num_left < len(texts) / 4


ALPHABET = (
    "".join(sorted(set(TEXT)))
    + "'’aAsStTrReElLdDmMvV01٣²ǅʰ\u00a0\u0085\u2028\u200b\u0301\u0338\u1c89\u088f\U0001fae9ſK/_-"
)


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(
        st.text(st.sampled_from(ALPHABET), max_size=40) | st.text(max_size=20),
        min_size=1,
        max_size=5,
    )
)
def test_same_ids_for_any_text(tokenizer, fast, texts):
    texts = [text.replace("ad", "<tool>").replace("ee", " <|end|> ") for text in texts]
    assert rows_of(fast, texts)[0] == tokenizer.encode_batch(texts)


def test_characters_that_differ_are_left_to_the_exact_library(tokenizer, monkeypatch):
    fast = FastBPE(tokenizer)
    fast._states[ord("é")] = DIFFERENT
    encoded = []
    monkeypatch.setattr(
        fast, "_encode", lambda texts, own=fast._encode: encoded.extend(texts) or own(texts)
    )
    texts = ["plain", "café", "", "日本", "né <tool>"]
    rows, num_left = rows_of(fast, texts)
    assert rows == tokenizer.encode_batch(texts)
    assert num_left == 2
    assert encoded == [b"plain", b"", "日本".encode()]
    assert fast._states[ord("日")] == SAME


def test_company_tells_kinds_of_characters_apart(tokenizer, fast):
    """Whatever a pattern splits differently shows in where the borders are, and nothing else
    does."""
    kinds = {
        "ж": "ll",
        "ß": "ll",
        "Ж": "lu",
        "א": "lo",
        "٣": "n",
        "§": "p",
        "\u00a0": "s",
        "\u0301": "m",
    }  # of two bytes
    if "Lu" not in tokenizer.to_json():
        kinds |= {"ж": "l", "ß": "l", "Ж": "l", "א": "l", "\u0301": "p"}
    exact, _ = fast._probes

    def borders(character):
        encoding = exact.encode(module.COMPANY.format(character), add_special_tokens=False)
        return [len(token) for token in encoding.tokens]

    for one, kind in kinds.items():
        assert [other for other in kinds if borders(other) == borders(one)] == [
            o for o in kinds if kinds[o] == kind
        ]


def test_starts_anew_when_it_remembers_too_much(tokenizer, monkeypatch):
    fast = FastBPE(tokenizer)
    first, fast._cache_bytes = fast._idle, 4 << 20
    generator = np.random.default_rng(0)
    texts = [
        "".join(map(chr, generator.integers(97, 123, 50_000))).replace("e", " ") for _ in range(40)
    ]
    expected = tokenizer.encode_batch(texts)
    resident = itertools.count(1 << 40, 1 << 20)  # a process that grows by a MiB for each text
    monkeypatch.setattr(module, "_resident_bytes", lambda: next(resident))
    assert [rows_of(fast, [text])[0][0] for text in texts] == expected
    assert fast._idle is not first
    monkeypatch.setattr(module, "_resident_bytes", lambda: None)  # other systems do not tell
    second = fast._idle
    for text in texts:
        rows_of(fast, [text])
    assert fast._idle is not second


@pytest.fixture
def small(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": TEXT[i:]}) + "\n" for i in range(50))
    )
    train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "t", 400)
    return tmp_path


def test_one_other_id_and_everything_is_done_by_the_exact_library(small, monkeypatch):
    preprocess([str(small / "a.jsonl")], small / "exact", small / "t", exact=True)
    wrong = FastBPE._encode

    def flipped(self, texts):
        flat, lengths = wrong(self, texts)
        if any("हिन्दी".encode() in text for text in texts):
            flat = np.where(np.arange(flat.size) == 3, 7, flat).astype(np.uint32)
        return flat, lengths

    monkeypatch.setattr(FastBPE, "_encode", flipped)
    console = Console(record=True, width=300)
    result = preprocess(
        [str(small / "a.jsonl")], small / "x", small / "t", workers=2, console=console
    )
    assert result.tokenized_by == "tokenizers"
    assert (
        "tokenizing by Hugging Face's tokenizers, since gigatoken cannot stand in for them here: its ids differ near"
        in (console.export_text())
    )
    for suffix in ("bin", "idx"):
        one, two = (
            (small / f"{name}_text_document.{suffix}").read_bytes() for name in ("exact", "x")
        )
        assert one == two
    assert not list(small.glob("*.tmp"))


def test_says_what_was_compared(small):
    result = preprocess([str(small / "a.jsonl")], small / "x", small / "t")
    assert result.tokenized_by == "gigatoken"
    characters = sum(len(TEXT[i:]) for i in range(25, 50))  # from the middle text on
    assert (
        f"by gigatoken: on {characters:,} characters from all over the text its ids are those of Hugging"
        in str(result)
    )
    assert len(IndexedDataset(result.prefix)) == 50


def test_tokenizers_it_does_not_stand_in_for(small):
    train_tokenizer([str(small / "a.jsonl")], small / "sp", 400, "sp-bpe")
    for folder, library in {
        "sp/tokenizer.json": "tokenizers",
        "sp/tokenizer.model": "sentencepiece",
    }.items():
        result = preprocess([str(small / "a.jsonl")], small / "x", small / folder)
        assert result.tokenized_by == library
        assert ("no byte-level BPE" in result.remark) == (library == "tokenizers")
    description = json.loads((small / "t" / "tokenizer.json").read_text())
    for change, why in [
        ({"normalizer": {"type": "Lowercase"}}, "it normalizes by Lowercase"),
        ({"model": {**description["model"], "dropout": 0.1}}, "its model has dropout 0.1"),
        (
            {"added_tokens": [{**description["added_tokens"][0], "content": "<" * 2000}]},
            "it has an added token of 2,000 characters",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "trim_offsets": True,
                    "use_regex": False,
                }
            },
            "text at|differ|not take",
        ),
    ]:
        (small / "tokenizer.json").write_text(json.dumps({**description, **change}))
        with pytest.raises(NotFast, match=why):
            FastBPE(load_tokenizer(small / "tokenizer.json"))


def test_added_tokens_beside_characters_that_compose(tokenizer, fast):
    """`>` and U+0338 compose to one character, but not where `>` ends a token that is found
    before."""
    texts = ["a<tool>\u0338 b", "<|end|>\u0338", "x>\u0338", "e\u0301<tool>"]
    assert rows_of(fast, texts)[0] == tokenizer.encode_batch(texts)


# Texts of added tokens that overlap, contain one another, are spaces or no ASCII, and what may
# stand beside them.
ADDED = [
    "<a>",
    "<a>b",
    "b<",
    "><",
    ">x",
    " <s>",
    "x ",
    "  ",
    "   ",
    "\n\n",
    "<｜é｜>",
    "é",
    "e\u0301",
    "ab",
    "1",
    "<|end|>",
]
BESIDE = [*ADDED, *"ab c1.<>日\n\t\u3000\u0301", "'s", "    ", "\n\n\n", "\r\n"]


@pytest.mark.parametrize(
    "normalizer", [None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []}]
)
def test_added_tokens_of_all_settings_beside_each_other(tmp_path, small, normalizer, pytestconfig):
    """They take spaces from one another and from the text, overlap, or are found in another order:
    gigatoken, which knows none of that, gives other ids unless such texts are kept from it."""
    description = json.loads((small / "t" / "tokenizer.json").read_text())
    generator = random.Random(0)
    num_fast = 0
    for _ in range(100 if pytestconfig.getoption("--whole") else 3):
        tokens = [
            {"id": 400 + number, "content": content, "special": generator.random() < 0.5}
            | {
                name: generator.random() < 0.25
                for name in ("lstrip", "rstrip", "single_word", "normalized")
            }
            for number, content in enumerate(generator.sample(ADDED, 6))
        ]
        path = tmp_path / "tokenizer.json"
        path.write_text(
            json.dumps({**description, "normalizer": normalizer, "added_tokens": tokens})
        )
        tokenizer = load_tokenizer(path)
        fast = FastBPE(tokenizer)
        texts = [
            "".join(generator.choices(BESIDE, k=generator.randrange(1, 12))) for _ in range(1500)
        ]
        texts += [f"{a}{b}{c}" for a in ADDED for b in ("", " ", "  ", "\n\n") for c in ADDED]
        try:
            expected = tokenizer.encode_batch(texts)
        except BaseException as error:
            # Hugging Face's panic where two tokens strip the same spaces.
            if "bad split" not in str(error):
                raise
            continue
        rows, num_left = rows_of(fast, texts)
        assert rows == expected, tokens
        num_fast += len(texts) - num_left
    assert num_fast, "one odd token must not turn the fast path off"


def test_one_token_that_is_not_ascii_leaves_all_fast(tmp_path, small):
    """DeepSeek's; and a text with such a token is fast as well."""
    raw = tokenizers.Tokenizer.from_file(str(small / "t" / "tokenizer.json"))
    raw.add_special_tokens([AddedToken("<｜begin▁of▁sentence｜>", normalized=False)])
    raw.add_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    texts = ["plain", "<｜begin▁of▁sentence｜>a  b", "the  <mask> in it"]
    rows, num_left = rows_of(FastBPE(tokenizer), texts)
    assert rows == tokenizer.encode_batch(texts)
    assert num_left == 1
