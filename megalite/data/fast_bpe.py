"""Byte-level BPE by gigatoken, with Hugging Face's ids.

gigatoken is many times as fast, but follows a newer edition of Unicode: what it considers a letter
may be none to Hugging Face's tokenizers, which then split words elsewhere. So no character is
trusted. When one occurs for the first time, both libraries split it in many contexts, with a
vocabulary made to show every border; texts that hold a character on which they disagree are left to
Hugging Face's tokenizers.

Added tokens are not trusted either. Those that depend on white space or word borders, and those
whose texts overlap where the libraries then disagree, have all texts that hold them left to Hugging
Face's. `compare`, called on samples of the texts, is for everything else they might disagree on."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import tokenizers

from megalite.data.tokenizer import PROBE, HuggingFaceTokenizer

# gigatoken's cache of words it has seen is unbounded; beyond this size it is started anew.
CACHE_BYTES, CACHE_BYTES_PER_WORKER = 512 << 20, 64 << 20
# Bytes of cache assumed per byte of text if the system does not report a process's memory: that of
# text without repeated words.
MOST_REMEMBERED = 10
# Number of characters of the first texts, and of later ones, that both libraries encode.
FIRST_COMPARED, COMPARED = 1 << 15, 1 << 9
UNKNOWN, SAME, DIFFERENT = range(3)
# Settings of an added token that make it depend on its neighbours.
ODD = ("lstrip", "rstrip", "single_word")
TOKEN_COMPANY = (
    "",
    "a",
    "1",
    ".",
    "'",
    " ",
    "  ",
    "a ",
    "\n",
    " \n",
    "\n\n",
    "\r\n",
    "\t",
    "é",
    "\u3000",
)
BETWEEN = ("", " ", "   ", "\n", "\n\n", " \n ", "a", ". ")
# Most added tokens with distinct borders that are compared in all contexts, and most pairs that are
# compared.
MOST_KINDS, MOST_PAIRS = 16, 4096
# Most characters of an added token: all parts of each are looked up, whose characters are a sixth of
# its length to the third. Models' own have some dozens.
LONGEST_ADDED = 256
ASCII = bytes(range(128))
# Contexts that distinguish letters, their case, digits, signs and spaces wherever a pattern does.
# Neighbours come twice, so that what happens on one side of them hides nothing on the other.
COMPANY = "{0}aa{0}AA{0}Aa{0}11{0}..{0}  {0}a'{0}a"
LEARNED_TOGETHER = 32
NEIGHBOURS, LEADS, CONTINUATIONS = b"aA1. '", range(0xC2, 0xF5), range(0x80, 0xC0)


class NotFast(Exception):
    """Raised if gigatoken cannot replace Hugging Face's library for a tokenizer. The message says
    why."""


class FastBPE:
    """Encodes text with gigatoken and checks its ids against Hugging Face's. Thread-safe. Raises
    NotFast if gigatoken does not support the tokenizer, or gives other ids."""

    def __init__(self, tokenizer: HuggingFaceTokenizer, workers: int = 1) -> None:
        """Prepare `tokenizer` for `workers` threads, and compare the two libraries on ASCII, a
        probe text and all added tokens."""
        self._exact = tokenizer
        self._json = tokenizer.to_json()
        description = orjson.loads(self._json)
        _check_model(description)
        added = [token for token in description["added_tokens"] if token["content"]]
        self._added = [token["content"].encode() for token in added]
        self._normalize = None
        if _normalizer_types(description["normalizer"]):
            # Compositions also differ between editions of Unicode: the exact library normalizes.
            self._normalize = tokenizers.Tokenizer.from_str(self._json).normalizer.normalize_str
            normal = (self._normalize(token["content"]).encode() for token in added)
            self._added = list(dict.fromkeys([*self._added, *normal]))
        # gigatoken gets text that is normalized already.
        self._json = json.dumps({**description, "normalizer": None})
        self._cache_bytes = max(CACHE_BYTES, CACHE_BYTES_PER_WORKER * workers)
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self.num_compared = 0  # characters of samples that both have encoded, to the same ids
        self._renew()
        probe = json.dumps(_showing_borders(description))
        self._probes = tokenizers.Tokenizer.from_str(probe), _load(probe)
        self._states = np.zeros(0x110000, np.uint8)  # by code point
        self._learn(np.arange(128, dtype=np.uint32))
        if (unlike := np.flatnonzero(self._states == DIFFERENT)).size:
            raise NotFast(f"it splits text at {chr(unlike[0])!r} in another way")
        odd = [token["content"] for token in added if any(token[name] for name in ODD)]
        # Texts with one of these are left to Hugging Face's tokenizers.
        self._odd = [token.encode() for token in odd]
        self.compare(PROBE)
        self._compare_added([token["content"] for token in added if token["content"] not in odd])

    def encode(
        self, texts: list[bytes]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64], int]:
        """Return the ids of `texts` (UTF-8) end to end, [sum(lengths)], the number of ids of each
        text, and how many texts were left to Hugging Face's tokenizer."""
        normal = texts
        if self._normalize is not None:
            normal = [
                text if text.isascii() else self._normalize(text.decode()).encode()
                for text in texts
            ]
        left = self._find_left(texts, normal)
        if not left:
            return *self._encode(normal), 0
        flat, lengths = self._encode([one for i, one in enumerate(normal) if i not in left])
        # Rows of the fast texts in their order, with those left to the exact library in between.
        fast = iter(np.split(flat, lengths.cumsum()[:-1]))
        rows = []
        with self._turn:  # it needs a hundred times the memory
            for i, text in enumerate(texts):
                if i in left:
                    rows.append(np.array(self._exact.encode(text.decode()), np.uint32))
                else:
                    rows.append(next(fast))
        return np.concatenate(rows), np.array([len(row) for row in rows], np.int64), len(left)

    def compare(self, text: str) -> None:
        """Encode `text` with both libraries. Raise NotFast if the ids differ."""
        fast, exact = self.encode([text.encode()])[0].tolist(), self._exact.encode(text)
        if fast != exact:
            at = next(
                (i for i, pair in enumerate(zip(fast, exact, strict=False)) if len(set(pair)) > 1),
                0,
            )
            near = self._exact.decode(exact[max(at - 3, 0) : at + 3])
            raise NotFast(f"its ids differ near {near!r}")

    def compare_sample(self, texts: list[bytes]) -> None:
        """Compare the libraries on a few characters from the middle of `texts`, more of them the
        first time. Raise NotFast if the ids differ."""
        with self._lock:
            num = COMPARED if self.num_compared else FIRST_COMPARED
            self.num_compared += num
        left = num
        for text in texts[len(texts) // 2 :]:
            start = max(len(text) - left, 0) // 2
            # What is cut of a character.
            sample = text[start : start + left].decode(errors="ignore")
            self.compare(sample)
            left -= len(sample)
            if not left:
                break
        with self._lock:
            self.num_compared -= left

    def _encode(self, texts: list[bytes]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Encode texts with gigatoken alone; ids end to end and their number in each text."""
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        # One instance per thread: threads that shared one would wait for each other. The list is
        # looked up once: an instance that comes back after `_renew` goes with the old one.
        idle = self._idle
        with self._lock:
            fast = idle.pop() if idle else None
        fast = fast or _load(self._json)
        rows = fast.encode_batch(texts, parallel=False).layout
        idle.append(fast)
        with self._lock:
            self._seen_bytes += sum(map(len, texts))
            resident = _resident_bytes()
            held = (
                MOST_REMEMBERED * self._seen_bytes
                if resident is None
                else resident - self._resident_before
            )
            if held > self._cache_bytes:
                self._renew()
        return np.asarray(rows.content.data), np.diff(rows.offsets.data)

    def _renew(self) -> None:
        """Drop all instances, and with them their caches."""
        self._idle: list[Any] = []  # those in use come back to the list before, and go with it
        self._seen_bytes, self._resident_before = 0, _resident_bytes() or 0

    def _find_left(self, texts: list[bytes], normal: list[bytes]) -> set[int]:
        """Return the numbers of the texts that gigatoken might encode differently. `normal` are the
        texts after normalization."""
        worst, unknown = character_states(normal, self._states)
        if unknown.size:
            self._learn(unknown)
            worst, _ = character_states(normal, self._states)
        left = set(np.flatnonzero(worst == DIFFERENT).tolist())

        def holds(text: bytes, tokens: Sequence[bytes]) -> bool:
            return any(token in text for token in tokens)

        if self._odd:
            left |= {i for i, text in enumerate(normal) if holds(text, self._odd)}
        if self._normalize is not None:
            # An added token is matched before its neighbours are normalized, so that they must not
            # be composed with it.
            found = self._odd + self._added
            for i, text in enumerate(texts):
                if not text.isascii() and (holds(text, found) or holds(normal[i], found)):
                    left.add(i)
        return left

    def _compare_added(self, tokens: list[str]) -> None:
        """Compare added tokens in contexts and with each other; one that differs becomes odd. Raise
        NotFast if too many overlap to compare them all."""
        if (longest := max(map(len, tokens), default=0)) > LONGEST_ADDED:
            raise NotFast(f"it has an added token of {longest:,} characters")
        # One of each kind is enough: others of it have the same borders.
        kinds = {(token[0], token[-1]): token for token in tokens}
        few = list(kinds.values())[:MOST_KINDS]
        together = [(one, two, "") for one in few for two in few] + _overlaps(tokens)
        if len(together) > MOST_PAIRS:
            raise NotFast(f"{len(together):,} pairs of its added tokens overlap")
        singly = [((f"a{token} {token}  {token}\n{token}{token}."), (token,)) for token in tokens]
        company = [
            (left + token + right, (token,))
            for token, left, right in itertools.product(few, TOKEN_COMPANY, TOKEN_COMPANY)
        ]
        pairs = []
        for one, two, joined in together:
            texts = [joined] if joined else [one + between + two for between in BETWEEN]
            for text, around in itertools.product(texts, ("", " ", "a", "\n")):
                pairs.append((around + text + around, (one, two)))
        odd = [token.decode() for token in self._odd]
        checks = [
            (text, who)
            for text, who in singly + company + pairs
            if not any(token in text for token in odd)
        ]
        if not checks:
            return
        texts = [text for text, _ in checks]
        flat, lengths = self._encode([text.encode() for text in texts])  # whatever they hold
        fast = (row.tolist() for row in np.split(flat, lengths.cumsum()[:-1]))
        exact = self._exact.encode_batch(texts)
        differ = [who for (_, who), one, two in zip(checks, fast, exact, strict=True) if one != two]
        self._odd += sorted({token.encode() for who in differ for token in who} - set(self._odd))

    def _learn(self, points: npt.NDArray[np.uint32]) -> None:
        """Compare how both libraries split these code points, and record the result."""
        # Many characters per text, which is faster; one by one only for texts whose ids differ.
        groups = np.split(points, range(LEARNED_TOGETHER, len(points), LEARNED_TOGETHER))
        for group, same in zip(groups, self._split_alike(groups), strict=True):
            singly = same or self._split_alike(list(group.reshape(-1, 1)))
            self._states[group] = np.where(singly, SAME, DIFFERENT)

    def _split_alike(self, groups: Sequence[npt.NDArray[np.uint32]]) -> list[bool]:
        """Return for each group of code points whether both libraries split it alike."""
        texts = ["\n".join(COMPANY.format(chr(point)) for point in group) for group in groups]
        exact, fast = self._probes
        expected = [
            encoding.ids for encoding in exact.encode_batch_fast(texts, add_special_tokens=False)
        ]
        return [
            one == two
            for one, two in zip(
                expected, fast.encode_batch_list(texts, parallel=False), strict=True
            )
        ]


def _load(description: str) -> Any:
    """Return gigatoken's tokenizer for the content of a tokenizer.json. Raise NotFast."""
    try:
        from gigatoken import gigatoken_rs
    except ImportError:
        raise NotFast("gigatoken is not installed; pip install 'megalite[data]'") from None
    try:
        return gigatoken_rs.load_hf_json(description)
    except Exception as error:  # the library raises nothing more specific
        raise NotFast(f"gigatoken does not take it: {error}") from None


def _check_model(description: dict[str, Any]) -> None:
    """Raise NotFast for settings that gigatoken ignores, and for other kinds of tokenizers."""
    model, normalizers = description["model"], _normalizer_types(description["normalizer"])
    if (
        model["type"] != "BPE"
        or model["byte_fallback"]
        or "ByteLevel" not in json.dumps(description["pre_tokenizer"])
    ):
        raise NotFast("it is no byte-level BPE")
    for name in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[name]:
            raise NotFast(f"its model has {name} {model[name]!r}")
    if other := next((name for name in normalizers if name != "NFC"), None):
        raise NotFast(f"it normalizes by {other}")


def _normalizer_types(normalizer: dict[str, Any] | None) -> list[str]:
    """Return the types of all normalizers in a (nested) sequence."""
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [name for part in normalizer["normalizers"] for name in _normalizer_types(part)]
    return [normalizer["type"]]


def _overlaps(tokens: list[str]) -> list[tuple[str, str, str]]:
    """Return all pairs of tokens that can share characters of a text, with such a text."""
    by_prefix: dict[str, list[str]] = {}
    for token in tokens:
        for stop in range(1, len(token) + 1):
            by_prefix.setdefault(token[:stop], []).append(token)
    known, found = set(tokens), []
    for one in tokens:
        for start in range(1, len(one)):
            found += [(one, two, one[:start] + two) for two in by_prefix.get(one[start:], ())]
        inner = {one[a:b] for a in range(len(one)) for b in range(a + 1, len(one) + 1)} & known - {
            one
        }
        found += [(one, two, one) for two in inner]
    return found


def _showing_borders(description: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer with the same pre-tokenizer and a vocabulary that merges any two bytes
    which may meet at the border between a character and its context. Where there is a border, they
    are not merged."""
    byte = _byte_characters()
    pairs = [(last, lead) for last in CONTINUATIONS for lead in LEADS]
    pairs += [(near, lead) for near in NEIGHBOURS for lead in LEADS]
    pairs += [(last, near) for last in CONTINUATIONS for near in NEIGHBOURS]
    # Last, so that neighbours are not merged with each other first.
    pairs += [
        pair for near in NEIGHBOURS for other in ASCII for pair in ((near, other), (other, near))
    ]
    merges = list(dict.fromkeys((byte[one], byte[two]) for one, two in pairs if one != two))
    vocabulary = [*byte.values(), *(one + two for one, two in merges)]
    model = {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(vocabulary)},
        "merges": merges,
    }
    return {
        **description,
        "added_tokens": [],
        "normalizer": None,
        "post_processor": None,
        "model": model,
    }


def _byte_characters() -> dict[int, str]:
    """Return the character by which byte-level vocabularies spell each byte: itself if it is
    printable."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(0x100) if byte not in printed]
    return {**{b: chr(b) for b in printed}, **{b: chr(0x100 + i) for i, b in enumerate(rest)}}


def character_states_reference(
    texts: list[bytes], states: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32]]:
    """Return the worst state of the characters of each text, and the characters not seen before.
    This is `megalite._data.character_states` in numpy."""
    states = states.copy()  # another thread may learn a character just then
    others = [text.translate(None, ASCII).decode().encode("utf-32-le") for text in texts]
    points = [np.frombuffer(text, "<u4") for text in others]
    worst = np.array([states[of_text].max(initial=0) for of_text in points], np.uint8)
    every = np.unique(np.concatenate([np.empty(0, np.uint32), *points]))
    return worst, every[states[every] == UNKNOWN]


try:
    from megalite._data import character_states
except ImportError:  # installed without a compiler
    character_states = character_states_reference


def _resident_bytes() -> int | None:
    """Return the resident memory of this process, None if the system does not report it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return None
