"""Topics of texts without a model: clusters of the words that stand in them, drawn from one half of a
reference and counted in its other half, so that shares are those of texts the clusters never saw."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

NUM_TOPICS = 10
NUM_BUCKETS = 4096
"""Words are told apart by a hash of so many values."""
MOST_TEXTS = 4000
"""Texts of either side that are looked at, evenly spread."""
MOST_WORDS = 200
"""Words of a text."""
ROUNDS = 20
FAR = 0.05
"""Share of the reference's texts that are as far from every topic as texts of no topic."""
NONE = "none of these"
_WORD = re.compile(r"[^\W\d_]+")
LONGEST = 24
"""Characters of a word; a longer one is a text without spaces, and read in pairs of characters."""
Matrix = npt.NDArray[np.float32]


def topics_of(now: Sequence[str], reference: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the topic of each text of `now`, and of each of the reference that the topics were not
    drawn from. A topic is named by three of its words."""
    now, reference = spread(now), spread(reference)
    # Texts lie nearer to clusters that were drawn from them than any new text does: counted there,
    # the reference would have fewer texts of no topic, and every window drift.
    drawn, counted = reference[::2], reference[1::2]
    if len(drawn) < NUM_TOPICS or not counted:
        return [], []
    rarity = _rarity(drawn)
    centers = _cluster(_vectors(drawn, rarity))
    names = [*_names(drawn, rarity, centers), NONE]
    near = _vectors(counted, rarity) @ centers.T
    far = float(np.quantile(near.max(1), FAR))
    return _told(_vectors(now, rarity) @ centers.T, far, names), _told(near, far, names)


def spread(texts: Sequence[str]) -> list[str]:
    """Return at most MOST_TEXTS texts, evenly spread."""
    # By a stride and not by chance: the whole time is covered, and the next call takes the same.
    stride = max(1, -(-len(texts) // MOST_TEXTS))
    return list(texts[::stride])


def words_of(text: str) -> list[str]:
    """Return the words of a text, of two letters or more, and pairs of characters of what has no
    spaces."""
    words: list[str] = []
    for word in _WORD.findall(text.lower()):
        if len(word) > LONGEST:
            words += [word[at : at + 2] for at in range(len(word) - 1)]
        elif len(word) > 1:
            words.append(word)
        if len(words) >= MOST_WORDS:
            break
    return words


def _buckets(text: str) -> list[int]:
    # Python's own hash of a text differs between processes. Each word counts once, or one that a
    # text repeats would decide its topic.
    return sorted({zlib.crc32(word.encode()) % NUM_BUCKETS for word in words_of(text)})


def _rarity(texts: Sequence[str]) -> Matrix:
    """Return the weight of each bucket: words that stand in every text tell nothing."""
    counts = np.zeros(NUM_BUCKETS)
    for text in texts:
        counts[_buckets(text)] += 1
    return np.log((1 + len(texts)) / (1 + counts)).astype(np.float32)


def _vectors(texts: Sequence[str], rarity: Matrix) -> Matrix:
    """Return a vector of length 1 for each text, [texts, NUM_BUCKETS]; 0 for one without words."""
    vectors = np.zeros((len(texts), NUM_BUCKETS), np.float32)
    for vector, text in zip(vectors, texts, strict=True):
        found = _buckets(text)
        vector[found] = rarity[found]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)


def _cluster(vectors: Matrix) -> Matrix:
    """Return the centers of spherical k-means, [NUM_TOPICS, NUM_BUCKETS], which depend on nothing
    but the vectors."""
    # Each further center begins at the text that is farthest from those before.
    centers = vectors.mean(0, keepdims=True)
    for _ in range(NUM_TOPICS):
        farthest = (vectors @ centers.T).max(1).argmin()
        centers = np.concatenate([centers, vectors[farthest : farthest + 1]])
    centers = centers[1:]  # the mean of all was only what the first is farthest from
    for _ in range(ROUNDS):
        nearest = (vectors @ centers.T).argmax(1)
        for topic in range(NUM_TOPICS):
            mine = vectors[nearest == topic]
            if len(mine):  # else it stays where it was
                mean = mine.mean(0)
                centers[topic] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return centers


def _names(texts: Sequence[str], rarity: Matrix, centers: Matrix) -> list[str]:
    """Return a name for each topic: of its heaviest buckets the most frequent words."""
    found: dict[int, Counter[str]] = {}
    for text in texts:
        for word in words_of(text):
            found.setdefault(zlib.crc32(word.encode()) % NUM_BUCKETS, Counter())[word] += 1
    names = []
    for number, center in enumerate(centers):
        # Of a topic with fewer words, buckets of weight 0 are none of its own.
        heavy = [int(at) for at in np.argsort(-center)[:3] if center[at] > 0]
        words = [found[at].most_common(1)[0][0] for at in heavy if at in found]
        names.append(f"{number + 1}: {' '.join(words)}")
    return names


def _told(near: Matrix, far: float, names: Sequence[str]) -> list[str]:
    nearest = np.where(near.max(1) < far, len(names) - 1, near.argmax(1))
    return [names[int(topic)] for topic in nearest]
