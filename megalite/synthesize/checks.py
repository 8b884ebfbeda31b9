"""Why a row is refused: it is too long, in another language, nearly a row that there is, or holds an
evaluation text."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from datatrove.data import Document
from datatrove.utils.text import simplify_text

from megalite.corpus.checks import Language, Length
from megalite.corpus.duplicates import Signatures, minhash_config
from megalite.corpus.steps import Check
from megalite.corpus.tokenizing import WORD, Words
from megalite.data.inputs import Report
from megalite.data.order import Int64s
from megalite.data.rows import list_rows, read_rows
from megalite.errors import DataError
from megalite.lineage.ngrams import Asked, Grams, texts_of_rows
from megalite.synthesize.config import ChecksConfig, ContaminationConfig, NearRowsConfig
from megalite.synthesize.tasks import Made, Rejected, texts_in

SHORTEST = 5
"""Words below which an evaluation text is not looked for: it may stand anywhere by chance."""
SKETCH = 512
"""Most n-grams of a text that are compared: those with the smallest hashes, which are a fair sample
(Broder 1997)."""


class NearTexts:
    """Holds texts, and tells which of them another one nearly repeats."""

    def __init__(self, config: NearRowsConfig) -> None:
        # Its folder is that of a pipeline's step, which writes there; here it only computes.
        self._minhash = Signatures("/", minhash_config(config), language=Words())
        self._similarity = config.similarity
        self._buckets: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        self._sketches: list[npt.NDArray[np.uint64]] = []
        self._sources: list[str] = []

    def add(self, text: str, source: str) -> None:
        """Add a text; `source` is what `find` calls it."""
        shingles = self._shingles(text)
        # Texts with one bucket in common are candidates: with 32 buckets of 4 hashes 99.98% of pairs
        # with a similarity of 0.7 have one, 23% of those with 0.3. The sketches then decide.
        for bucket in self._keys(shingles):
            self._buckets[bucket].append(len(self._sources))
        self._sketches.append(_sketch(shingles))
        self._sources.append(source)

    def find(self, text: str) -> str:
        """Return the source of a text that is nearly the same, the first; empty if there is none."""
        shingles = self._shingles(text)
        own = _sketch(shingles)
        near = {
            number for bucket in self._keys(shingles) for number in self._buckets.get(bucket, ())
        }
        # In the order in which they came, so that the source that is named does not vary.
        for number in sorted(near):
            if _jaccard(own, self._sketches[number]) >= self._similarity:
                return self._sources[number]
        return ""

    def are_near(self, one: str, other: str) -> bool:
        """Return whether two texts are nearly the same."""
        sketches = [_sketch(self._shingles(text)) for text in (one, other)]
        return _jaccard(*sketches) >= self._similarity

    def _shingles(self, text: str) -> npt.NDArray[np.uint64]:
        """Return the hashes of a text's n-grams, [n, 1]; of a shorter one, that of all of it."""
        found = self._minhash.get_shingles(text)
        if len(found):
            return found
        # Fewer words than an n-gram has: without anything to compare, it would repeat nothing.
        whole = simplify_text(text, self._minhash.config.norm_config).encode()
        digest = hashlib.blake2b(whole, digest_size=8).digest()
        return np.array([[int.from_bytes(digest, "little")]], np.uint64)

    def _keys(self, shingles: npt.NDArray[np.uint64]) -> Iterator[tuple[int, ...]]:
        for number, bucket in enumerate(self._minhash.get_signature(shingles)):
            yield (number, *bucket)  # the same hashes in another bucket are no match


def _sketch(shingles: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    return np.unique(shingles)[:SKETCH]


def _jaccard(one: npt.NDArray[np.uint64], other: npt.NDArray[np.uint64]) -> float:
    """Return the share of n-grams that both texts have among those of either, by their sketches."""
    # The smallest hashes of the union are in one of the sketches: had a sketch left one out, it would
    # hold SKETCH smaller ones. So the sample of the union is exact, and fair.
    union = np.union1d(one, other)[:SKETCH]
    both = np.intersect1d(one, other, assume_unique=True)
    return np.isin(union, both, assume_unique=True).sum() / len(union)


class EvaluationTexts:
    """Holds evaluation texts as runs of words, and tells which of them a text holds one of."""

    def __init__(self, asked: Iterable[Asked], ngram: int) -> None:
        """A run has `ngram` words; a shorter text counts as a whole, from SHORTEST words on."""
        self.num_short = 0
        """Texts that are too short to be looked for."""
        rows: defaultdict[int, list[Int64s]] = defaultdict(list)
        names: defaultdict[int, list[str]] = defaultdict(list)
        for each in asked:
            for text in each.texts:
                words = _words(text)
                length = min(len(words), ngram)
                if length < SHORTEST:
                    self.num_short += 1
                    continue
                rows[length].append(words)
                names[length].append(f"{each.task} {each.number}")
        self._grams = {length: Grams(of_length, length) for length, of_length in rows.items()}
        self._rows, self._names = rows, names

    def find(self, text: str) -> str:
        """Return the task and number of an evaluation text of which `text` has a run; empty if
        there is none."""
        words = _words(text)
        # One table for each length of a run: short texts have shorter ones.
        for length, grams in sorted(self._grams.items()):
            if len(words) < length:
                continue
            _, number = grams.find(words)
            if len(number):
                return self._name(length, grams, int(number[0]))
        return ""

    def _name(self, length: int, grams: Grams, number: int) -> str:
        """Return which evaluation text has an n-gram: the first."""
        for row, name in zip(self._rows[length], self._names[length], strict=True):
            if number in grams.numbers_of(row):
                return name
        raise AssertionError("an n-gram is of one of the texts")


def _words(text: str) -> Int64s:
    """Return a number for each word of a text, whatever its case; signs are no words."""
    # Copies of tasks differ in case and in signs, which change nothing of what they give away.
    words = (word for word in WORD.findall(text.casefold()) if word[0].isalnum() or word[0] == "_")
    return np.fromiter(map(_number, words), np.int64)


@lru_cache(1 << 16)
def _number(word: str) -> int:
    digest = hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # an i64 has no room for the sign


class Checks:
    """Judges rows one after another, each against those that passed before. Raises DataError for
    files that cannot be read, and ConfigError for tasks."""

    def __init__(self, config: ChecksConfig) -> None:
        self._each: list[Check] = [Length(config.length)]
        if config.language:
            self._each.append(Language(config.language))
        self._near = NearTexts(config.near)
        self.digest = hashlib.blake2b(digest_size=16)
        """Of everything that rows are compared with."""
        # What is only asked of an evaluation may be too short for a run of words.
        asked = config.contamination.data if config.contamination else ()
        compared = {"train": config.train, "test": config.test, "evaluation": asked}
        for name, files in compared.items():
            for source, texts in _rows_in(files):
                for text in texts:
                    self.digest.update(text.encode(errors="surrogatepass") + b"\0")
                    self._near.add(text, f"{name} {source}")
        self._evaluation: EvaluationTexts | None = None
        if config.contamination:
            looked_for = self._digested(evaluation_texts(config.contamination))
            self._evaluation = EvaluationTexts(looked_for, config.contamination.ngram)

    @property
    def num_short(self) -> int:
        """Return how many evaluation texts are too short to be looked for."""
        return self._evaluation.num_short if self._evaluation else 0

    def _digested(self, asked: Iterable[Asked]) -> Iterator[Asked]:
        for each in asked:
            self.digest.update("\0".join(each.texts).encode(errors="surrogatepass") + b"\0")
            yield each

    def check(self, made: Made) -> None:
        """Raise Rejected for a row that is not wanted."""
        document = Document("\n".join(made.new), "")
        for check in self._each:
            if why := check(document, Counter()):
                raise Rejected(why)
        # Before the search for duplicates: a row that is both is the worse of the two.
        if self._evaluation and (name := self._evaluation.find(" ".join(texts_in(made.row)))):
            raise Rejected("contaminated by an evaluation text", name)
        # The parent first: a paraphrase that changes nothing is often near a row of the train files as
        # well, since its parent is one, and this reason says what to do.
        for text in made.distinct:
            if made.parent and self._near.are_near(text, made.parent):
                raise Rejected("nearly the text it was made from")
            if source := self._near.find(text):
                raise Rejected(f"nearly a text of {source.partition(' ')[0]}", source)

    def keep(self, text: str, source: str) -> None:
        """Compare the rows that follow with this text, too. The first word of `source` says what
        it is."""
        self._near.add(text, source)


def evaluation_texts(config: ContaminationConfig) -> Iterator[Asked]:
    """Yield the texts of evaluation rows and tasks. Raises DataError and ConfigError."""
    if config.data:
        yield from texts_of_rows(config.data)
    if config.tasks:
        from megalite.infer.evaluate import load_harness

        tasks = load_harness().load_tasks(config.tasks, config.include_path, None, shots=0)
        yield from (Asked(*found) for found in tasks.texts())


def _rows_in(files: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each row's place and texts."""
    report = Report()
    for row in read_rows(list_rows(files, report), report) if files else ():
        if row.why:
            raise DataError(f"{row.path}:{row.line}: {row.why}")
        yield f"{row.path}:{row.line}", [text for text in texts_in(row.values) if text.strip()]
