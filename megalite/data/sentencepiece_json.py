"""Convert a SentencePiece model to a tokenizer.json that gives the same ids for every text, or give
the reason why there is none.

**BPE.** SentencePiece joins the two neighbours whose sum has the best score, the leftmost of
equals; a tokenizer.json lists pairs, the best first. All merges that make a piece lie within it, so
that they are the same as for that piece as a text of its own: of the pairs that spell a piece, only
the last merge there is ever used. With that one pair for each piece, in the order of the scores,
both libraries take the same steps. Pieces of equal score are the exception, because their position
decides between them and no list expresses that. Runs of one character are in order if the longest
comes first, because the leftmost run grows to its end before the next one begins.

**Unigram.** SentencePiece adds log-probabilities in fp32, tokenizers in fp64. On a grid of 1/16
both are exact, and break ties alike, until a text's sum reaches 2^20, at some 300,000 characters.
tokenizers also looks up control and byte pieces in texts, so these get a score worse than that of
their characters one by one."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

SPACE = "▁"
GRID = 16  # steps of unigram scores between whole numbers
NO_PIECE = float("-inf")  # score of what is none
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
Merge = tuple[str, str]


class NotConvertible(Exception):
    """Raised if no tokenizer.json gives the ids of this model for every text. The message says
    why."""


def converted(model: Any) -> tokenizers.Tokenizer:
    """Return the tokenizer that gives SentencePiece's ids for a ModelProto. It also finds control
    tokens in a text, as chat templates need. Raise NotConvertible."""
    _check_texts(model)
    core = {1: _unigram, 2: _bpe}.get(model.trainer_spec.model_type)
    if core is None:
        raise NotConvertible("it is neither a BPE nor a unigram model")
    tokenizer = tokenizers.Tokenizer(core(model))
    tokenizer.normalizer = _normalizer(model.normalizer_spec)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    # In the order of their ids, which they keep since the vocabulary has them already.
    for piece in model.pieces:
        if piece.type == CONTROL:
            tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == USER_DEFINED:
            # SentencePiece looks for them when spaces are marked already.
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=True, special=False)])
    return tokenizer


def _check_texts(model: Any) -> None:
    """Raise NotConvertible for treatment of a text before it is split into pieces that tokenizers
    cannot reproduce."""
    spec, own = model.normalizer_spec, [p.piece for p in model.pieces if p.type == USER_DEFINED]
    if spec.precompiled_charsmap:
        raise NotConvertible(
            f"it normalizes by {spec.name or 'a rule of its own'}, which tokenizers do otherwise"
        )
    if model.trainer_spec.treat_whitespace_as_suffix:
        raise NotConvertible("it has treat_whitespace_as_suffix")
    if not spec.escape_whitespaces:
        raise NotConvertible("it has escape_whitespaces off")
    if any(p.type == UNUSED for p in model.pieces):
        raise NotConvertible("it has unused pieces")
    if own and (
        spec.add_dummy_prefix or spec.remove_extra_whitespaces or any(" " in piece for piece in own)
    ):
        raise NotConvertible(
            f"it has user-defined symbols, such as {own[0]!r}, and add_dummy_prefix or remove_extra_whitespaces"
        )


def _check_characters(pieces: list[str], known: dict[str, float]) -> None:
    """Raise NotConvertible for a piece with a character that is no piece itself."""
    for piece in pieces:
        if other := next((c for c in piece if c not in known), None):
            raise NotConvertible(
                f"its piece {piece!r} has the character {other!r}, which is no piece"
            )


def _bpe(model: Any) -> models.BPE:
    """Return the BPE model with one merge per piece, in the order of the scores."""
    scores = {p.piece: p.score for p in model.pieces if p.type == NORMAL}
    _check_characters(list(scores), scores)
    merges = [
        (scores[piece], len(piece), merge)
        for piece in scores
        if (merge := _last_merge(piece, scores))
    ]
    ordered = [merge for _, _, merge in sorted(merges, reverse=True)]
    _check_ties(ordered, scores)
    return models.BPE(
        vocab={p.piece: i for i, p in enumerate(model.pieces)},
        merges=ordered,
        unk_token=model.pieces[model.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )


def _last_merge(piece: str, scores: dict[str, float]) -> Merge | None:
    """Return the two pieces that SentencePiece joins last in a text that equals `piece`; None if it
    never gets there, and for a single character."""
    steps = list(_steps(piece, scores))
    return steps[-1][0] if steps and "".join(steps[-1][0]) == piece else None


def _steps(text: str, scores: dict[str, float]) -> Iterator[tuple[Merge, list[str]]]:
    """Yield what SentencePiece joins, one merge after the other, with the symbols before each."""
    symbols, sums = list(text), [one + two for one, two in itertools.pairwise(text)]
    values = [scores.get(both, NO_PIECE) for both in sums]
    while values and (best := max(values)) != NO_PIECE:
        at = values.index(best)  # the leftmost of equals
        yield (symbols[at], symbols[at + 1]), symbols
        symbols[at : at + 2] = [sums[at]]
        del sums[at], values[at]
        for beside in range(max(at - 1, 0), min(at + 1, len(sums))):
            sums[beside] = symbols[beside] + symbols[beside + 1]
            values[beside] = scores.get(sums[beside], NO_PIECE)


def _check_ties(ordered: list[Merge], scores: dict[str, float]) -> None:
    """Raise NotConvertible if the position of pieces with equal scores may decide differently from
    their order."""
    classes: dict[float, list[Merge]] = defaultdict(list)
    for left, right in ordered:
        classes[scores[left + right]].append((left, right))
    ranks = {merge: rank for rank, merge in enumerate(ordered)}
    for score, tied in classes.items():
        if len(tied) == 1:
            continue
        characters = {c for left, right in tied for c in left + right}
        longest = max(len(left + right) for left, right in tied)
        if len(characters) > 1 or not _runs_in_order(characters.pop(), 3 * longest, scores, ranks):
            some = " and ".join(repr(left + right) for left, right in tied[:2])
            raise NotConvertible(f"its pieces {some} share the score {score:g}")


def _runs_in_order(
    character: str, longest: int, scores: dict[str, float], ranks: dict[Merge, int]
) -> bool:
    """Return whether at each step, in runs of the character of all lengths, the leftmost best merge
    is also the first in order. (Behind the growing run there are only single characters, with one
    merge.)"""
    for length in range(2, longest + 1):
        for merge, symbols in _steps(character * length, scores):
            if ranks[merge] != min(
                ranks.get(pair, len(ranks)) for pair in itertools.pairwise(symbols)
            ):
                return False
    return True


def _unigram(model: Any) -> models.Unigram:
    """Return the unigram model. Raise NotConvertible for scores off the grid, and for user-defined
    symbols."""
    scores = {p.piece: p.score for p in model.pieces if p.type == NORMAL}
    if any(p.type == USER_DEFINED for p in model.pieces):
        raise NotConvertible("it is a unigram model with user-defined symbols")
    if any(not (score * GRID).is_integer() for score in scores.values()):
        raise NotConvertible(
            "it is a unigram model whose scores are no multiples of 1/16, so that rounding decides"
        )
    reserved = [p.piece for p in model.pieces if p.type != NORMAL]
    _check_characters([*scores, *reserved], scores)
    # As bad as twice its characters at the worst score of all: no best path goes through it.
    worse = 2 * max(map(len, reserved)) * min(-1.0, *scores.values())
    pieces = [(p.piece, p.score if p.type == NORMAL else worse) for p in model.pieces]
    return models.Unigram(pieces, model.trainer_spec.unk_id, model.trainer_spec.byte_fallback)


def _normalizer(spec: Any) -> normalizers.Normalizer:
    """Return the normalizer that marks spaces as SentencePiece does."""
    squeeze = spec.remove_extra_whitespaces
    steps: list[Any] = [
        normalizers.Replace(Regex(p), to) for p, to in ((r"\A +", ""), (" {2,}", " "))
    ] * squeeze
    steps += [normalizers.Prepend(SPACE)] * spec.add_dummy_prefix
    steps.append(normalizers.Replace(" ", SPACE))
    # SentencePiece also strips a mark (U+2581) that the text itself has at its end.
    return normalizers.Sequence(steps + [normalizers.Replace(Regex(rf"{SPACE}+\z"), "")] * squeeze)
