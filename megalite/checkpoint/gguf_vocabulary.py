"""The tokenizer of a GGUF file, from the files of a Hugging Face folder: byte-level BPE
(tokenizer.json) whose rule of splitting llama.cpp knows, or SentencePiece's BPE
(tokenizer.model)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalite.data.tokenizer import load_tokenizer
from megalite.errors import DataError
from megalite.utils.outside import read_json, shown

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RULES = {_WORDS % r"\p{N}": "qwen2", _WORDS % r"\p{N}{1,3}": "llama-bpe"}
"""Regular expressions by which texts are split before BPE, and llama.cpp's names of them."""
GPT2 = "gpt-2"
"""Its name of the rule that is built into tokenizers' ByteLevel."""
SPACE = "\u2581"


def add_vocabulary(writer: Any, folder: Path, vocab_size: int) -> None:
    """Write the tokenizer of a folder to a GGUFWriter, for a model of `vocab_size` rows. Raises
    DataError for one that llama.cpp would not have texts split by in the same way."""
    import gguf

    file = folder / "tokenizer.json"
    description = read_json(file, DataError) if file.is_file() else None
    spaced = folder / "tokenizer.model"
    tokens: list[str] | list[bytes]
    if description is not None and "ByteLevel" in json.dumps(description.get("pre_tokenizer")):
        by_merges = True
        tokens, kinds = _bytes_of(description, vocab_size)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_rule_of(description, file))
    elif spaced.is_file():
        by_merges = False
        tokens, kinds, scores = _pieces_of(spaced, description, vocab_size, writer)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores)
    else:
        raise DataError(
            f"{folder}: --gguf takes the tokenizer from a tokenizer.json of byte-level BPE, or from SentencePiece's "
            "tokenizer.model, and there is neither"
        )
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(folder, load_merges=by_merges, n_vocab=len(tokens))
    # What this model's texts begin with, whatever llama.cpp's default for such tokenizers is.
    begin = load_tokenizer(folder).begin_ids
    bos = special.special_token_ids.get("bos")
    if begin and [*begin] != [bos]:
        raise DataError(
            f"{folder}: texts begin with the tokens {list(begin)}; llama.cpp knows bos_token alone"
        )
    special.add_special_token["bos"] = bool(begin)
    special.add_to_gguf(writer)


def _rule_of(description: dict[str, Any], file: Path) -> str:
    """Return llama.cpp's name of the rule by which a tokenizer splits texts. Raises DataError for
    one that it does not know."""
    rule = description["pre_tokenizer"]
    parts = rule["pretokenizers"] if rule.get("type") == "Sequence" else [rule]
    normalizer = description.get("normalizer")
    plain = normalizer is None or normalizer.get("type") == "NFC"
    if len(parts) == 1 and parts[0].get("use_regex", True) and not parts[0]["add_prefix_space"]:
        found: str | None = GPT2
    elif len(parts) == 2 and parts[0].get("type") == "Split" and not parts[1]["use_regex"]:
        found = RULES.get(parts[0]["pattern"].get("Regex"))
    else:
        found = None
    if found is None or not plain:
        raise DataError(
            f"{file}: pre_tokenizer = {shown(rule)} with normalizer = {shown(normalizer)} is no rule that llama.cpp is "
            f"known to have; {GPT2}, {', '.join(RULES.values())} are written"
        )
    return found


def _bytes_of(description: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Return the tokens of byte-level BPE, as the vocabulary spells them, and their kinds."""
    from gguf import TokenType

    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [int(TokenType.UNUSED)] * vocab_size
    for token, number in description["model"]["vocab"].items():
        tokens[number], kinds[number] = token, int(TokenType.NORMAL)
    for added in description.get("added_tokens", ()):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], int(kind)
    return tokens, kinds


def _pieces_of(
    file: Path, description: dict[str, Any] | None, vocab_size: int, writer: Any
) -> tuple[list[bytes], list[int], list[float]]:
    """Return the pieces of SentencePiece's BPE, their kinds and their scores."""
    from gguf import TokenType
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(file.read_bytes())
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise DataError(f"{file}: --gguf writes SentencePiece's BPE, and this is of another kind")
    rules = model.normalizer_spec
    if rules.remove_extra_whitespaces or rules.name not in ("", "identity"):
        raise DataError(
            f"{file}: normalizes texts ({rules.name!r}, remove_extra_whitespaces: {rules.remove_extra_whitespaces}), "
            "which llama.cpp does not"
        )
    writer.add_add_space_prefix(rules.add_dummy_prefix)
    tokens = [f"[PAD{number}]".encode() for number in range(vocab_size)]
    kinds, scores = [int(TokenType.UNUSED)] * vocab_size, [-10000.0] * vocab_size
    for number, piece in enumerate(model.pieces):
        # The kinds have the same numbers in both.
        tokens[number], kinds[number] = piece.piece.encode(), piece.type
        scores[number] = piece.score
    for added in (description or {}).get("added_tokens", ()):
        if kinds[added["id"]] in (int(TokenType.UNKNOWN), int(TokenType.BYTE)):
            continue
        text = added["content"]
        control = added["special"]
        kinds[added["id"]] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
        tokens[added["id"]] = (text if control else text.replace(SPACE, " ")).encode()
        scores[added["id"]] = -1000.0
    return tokens, kinds, scores
