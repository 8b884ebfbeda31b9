"""The native helpers around fast tokenizing, held against their references in Python."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.blocks import json_texts_reference
from megalite.data.fast_bpe import character_states_reference
from megalite.data.preprocess import join_documents_reference

native = pytest.importorskip("megalite._data")

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
RECORDS = st.dictionaries(
    st.sampled_from(["text", "a", "té", 'q"', "text "]), VALUES | st.text(), max_size=5
)
WORDS = [
    '"',
    "\\",
    "\\n",
    "\\u00e9",
    "\\ud83d\\ude00",
    "\\ud800",
    "\\udc00x",
    "\\x",
    "é",
    "😀",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
]
WORDS += [
    "\t",
    "\r",
    "\n",
    "\x01",
    "text",
    '"text"',
    '"text": "one"',
    "0",
    "01",
    "-",
    "1.",
    "1e5",
    "true",
    "nul",
    " ",
    "a" * 9,
]


@settings(deadline=None, max_examples=500)
@given(
    records=st.lists(RECORDS, max_size=5),
    ascii=st.booleans(),
    close=st.booleans(),
    ends=st.booleans(),
)
def test_records_that_json_has_written(records, ascii, close, ends):
    separators = (",", ":") if close else (", ", ": ")
    lines = "\n".join(
        json.dumps(record, ensure_ascii=ascii, separators=separators) for record in records
    )
    data = (lines + "\n" * (ends and bool(records))).encode("utf-8", "replace")
    texts, odd = native.json_texts(data, "text", 1 << 20)
    assert texts == [t.encode() if isinstance(t := r.get("text"), str) else b"" for r in records]
    assert [number for number, _, _ in odd] == [i for i, text in enumerate(texts) if not text]
    assert all(json.loads(data[first:last]) == records[number] for number, first, last in odd)


@settings(deadline=None, max_examples=2000)
@given(
    parts=st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=14), cut=st.integers(0, 5)
)
def test_nothing_is_taken_that_json_refuses(parts, cut):
    """Broken lines around a good one, with a byte cut out somewhere."""
    inner = "".join(parts)
    data = '{"text": "' + inner + '"}\n{"text": "good"}\n{' + inner + "}"
    lines = data.encode("utf-8", "surrogatepass")
    lines = lines[: len(lines) * cut // 5] + lines[len(lines) * cut // 5 + 1 :]
    texts, odd = native.json_texts(lines, "text", 1 << 20)
    expected, expected_odd = json_texts_reference(lines, "text", 1 << 20)
    assert texts == expected
    assert odd == expected_odd


@pytest.mark.parametrize("size", range(40))
def test_special_bytes_at_every_place_of_a_word(size):
    for special in ["é", "\n", '"', "\\", "😀", "\x7f"]:
        text = "a" * size + special + "b" * (40 - size)
        line = json.dumps({"x": text, "text": text}, ensure_ascii=False).encode()
        assert native.json_texts(line, "text", 1 << 20) == ([text.encode()], [])
    broken = b'{"text": "' + b"a" * size + b"%c" + b"b" * (40 - size) + b'"}'
    for byte in [0x00, 0x1F, 0x80, 0xC0, 0xC1, 0xED, 0xF5, 0xFF]:
        assert native.json_texts(broken % byte, "text", 1 << 20)[1]


def test_lines_that_are_odd():
    lines = [
        b'{"text": "one"}',
        b'{"text": ""}',
        b"",
        b'{"text": "too long"}',
        b'{"text": "x", "text": "last"}',
        b"[]",
    ]
    data = b"\n".join(lines)
    texts, odd = native.json_texts(data, "text", 18)
    assert texts == [b"one", b"", b"", b"", b"", b""]
    assert [data[first:last] for _, first, last in odd] == lines[1:]
    assert native.json_texts(data, "text", 100)[0][4] == b"last"
    assert native.json_texts(b'{"text": "deep", "y": ' + b"[" * 99 + b"]" * 99 + b"}", "text", 999)[
        1
    ]
    assert native.json_texts(b"", "text", 9) == json_texts_reference(b"", "text", 9) == ([], [])


@settings(deadline=None, max_examples=300)
@given(
    texts=st.lists(st.text() | st.text("aé日😀", max_size=30), max_size=6), seed=st.integers(0, 99)
)
def test_states_of_characters(texts, seed):
    states = np.random.default_rng(seed).integers(0, 3, 0x110000).astype(np.uint8)
    data = [text.encode() for text in texts]
    worst, unknown = native.character_states(data, states)
    expected, expected_unknown = character_states_reference(data, states)
    assert worst.tolist() == expected.tolist()
    assert sorted(unknown.tolist()) == expected_unknown.tolist()


def test_a_character_that_another_thread_learns_just_then():
    """Whoever met it before finds it among the unknown ones: it may be one that decides who encodes
    the text."""

    class Learning(np.ndarray):
        def __getitem__(self, index):
            found = super().__getitem__(index)
            shared[ord("é")] = 2
            return found

    shared = np.zeros(0x110000, np.uint8)
    worst, unknown = character_states_reference(["é".encode()], shared.view(Learning))
    assert (worst.tolist(), unknown.tolist()) == ([0], [ord("é")])


def test_every_character_has_its_state():
    points = [point for point in range(0x80, 0x110000) if not 0xD800 <= point < 0xE000]
    _, unknown = native.character_states(
        ["".join(map(chr, points)).encode()], np.zeros(0x110000, np.uint8)
    )
    assert unknown.tolist() == points
    for bad in [b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe0\x80\x80"]:
        with pytest.raises(ValueError, match="not UTF-8"):
            native.character_states([b"a" * 9 + bad], np.zeros(0x110000, np.uint8))
    with pytest.raises(ValueError, match="each code point"):
        native.character_states([], np.zeros(9, np.uint8))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("lengths", [[], [1], [3, 1, 4, 1, 5, 9]])
def test_ends_of_documents(dtype, lengths):
    """Each gets a beginning and an end, unless it has them: a text may spell its own out."""
    lengths = np.array(lengths, np.int64)
    tokens = np.random.default_rng(0).integers(6, 9, lengths.sum(), np.uint32)
    documents = (
        [part.tolist() for part in np.split(tokens, lengths.cumsum()[:-1])] if lengths.size else []
    )
    for begin, end in [(-1, 7), (6, -1), (6, 7), (7, 7), (-1, -1)]:
        expected = [
            [begin] * (begin >= 0 and one[0] != begin) + one + [end] * (end >= 0 and one[-1] != end)
            for one in documents
        ]
        for join in (native.join_documents, join_documents_reference):
            out = np.empty(len(tokens) + 2 * len(lengths), dtype)
            joined = join(tokens, lengths, begin, end, out)
            assert joined.tolist() == [len(one) for one in expected]
            assert out[: joined.sum()].tolist() == [token for one in expected for token in one]
    out = np.empty(99, dtype)
    with pytest.raises(ValueError, match=r"sum to that of tokens|two more for each"):
        native.join_documents(np.append(tokens, np.uint32(1)), lengths, 7, 7, out)
    with pytest.raises(ValueError, match=r"sum to that of tokens|two more for each"):
        native.join_documents(tokens, np.append(lengths, 1), 7, 7, out)
    with pytest.raises(ValueError, match="must be positive"):
        native.join_documents(tokens, np.append(lengths, 0), 7, 7, out)
