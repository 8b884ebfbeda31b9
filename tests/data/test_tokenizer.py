import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.cli import main
from megalite.data import tokenizer_training as training
from megalite.data.chat import ChatTemplate
from megalite.data.indexed import IndexedDataset
from megalite.data.preprocess import preprocess
from megalite.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    other_tokenizer,
)
from megalite.data.tokenizer_files import CONFIG, FLAGS
from megalite.data.tokenizer_training import END, GROUPS, train_tokenizer
from megalite.errors import DataError
from megalite.training.seq2seq import sentinels_of

ROOT = Path(__file__).parents[2]
KINDS = ("bpe", "sp-bpe", "sp-unigram")
VARIED = [
    "  def f(x):\n\treturn 12345\n\n  ",
    "日本語 \0 é e\u0301 😀 \u00a0\u3000ﬁ",
    "\r\n\r\n  \t \t x ",
    "a" * 51 + "=" * 77 + " " * 33 + "\n" * 5,
    "don't  WE'LL 3.14e-10 [1, 22, 333]",
    "\U0010ffff\u200b\ufeff\ufffd",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One trained tokenizer of each kind, on source files of this interpreter's standard
    library."""
    library = Path(json.__file__).parents[1]
    inputs = [
        str(library / name) for name in ("argparse.py", "ast.py", "json", "tarfile.py", "typing.py")
    ]
    base = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        train_tokenizer(inputs, base / kind, 1500, kind)
    return base


@pytest.fixture(scope="module")
def library_lines():
    library = Path(json.__file__).parents[1]
    text = "".join(
        (library / name).read_text()
        for name in ("inspect.py", "pathlib.py", "textwrap.py", "zipfile.py")
    )
    return text.splitlines(keepends=True)


@pytest.mark.parametrize("kind", KINDS)
def test_same_ids_as_transformers_and_back(folders, library_lines, kind):
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(folders / kind), AutoTokenizer.from_pretrained(folders / kind)
    texts = [*VARIED, *library_lines, "".join(library_lines), f"a {END} b"]
    ids = ours.encode_batch(texts)
    assert ids == theirs(texts)["input_ids"]
    assert [ours.decode(i) for i in ids] == texts
    assert [theirs.decode(i) for i in ids] == texts
    assert theirs.eos_token == END
    assert ours.eod_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs) == 1500
    assert ids[-1].count(ours.eod_id) == 1


def test_wordpiece_makes_of_texts_what_bert_reads(tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "a.jsonl").write_text(json.dumps({"text": Path(json.__file__).read_text()}) + "\n")
    train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "wp", 400, "wordpiece")
    ours, theirs = load_tokenizer(tmp_path / "wp"), AutoTokenizer.from_pretrained(tmp_path / "wp")
    text = "Return the decoded JSONObject, 日本 [MASK]"
    ids = ours.encode(text)
    assert theirs(text)["input_ids"] == [ours.begin_id, *ids, ours.eod_id]
    assert (
        theirs.convert_tokens_to_string(theirs.convert_ids_to_tokens(ids[:-3]))
        == "Return the decoded JSONObject,"
    )
    assert theirs(text, text)["token_type_ids"] == [0] * (len(ids) + 2) + [1] * (len(ids) + 1)
    assert ids[-1] == ours.mask_id == theirs.mask_token_id
    assert ours.special_ids == set(theirs.all_special_ids) == set(range(5))
    result = preprocess(
        [str(tmp_path / "a.jsonl")], tmp_path / "out", tmp_path / "wp", append_eod=True
    )
    tokens = IndexedDataset(result.prefix).read(0, result.num_tokens)
    assert (tokens[0], tokens[-1]) == (ours.begin_id, ours.eod_id)


def test_sentinels_are_what_t5_calls_them(tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "a.jsonl").write_text(json.dumps({"text": Path(json.__file__).read_text()}) + "\n")
    train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "t5", 500, "t5")
    ours, theirs = load_tokenizer(tmp_path / "t5"), AutoTokenizer.from_pretrained(tmp_path / "t5")
    text = "Return\n  the decoded 日本"
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert theirs(text)["input_ids"] == [*ids, ours.eod_id]
    assert (theirs.pad_token_id, theirs.eos_token_id) == (0, ours.eod_id) == (0, 1)
    sentinels = sentinels_of(ours)
    assert len(sentinels) == 100
    assert theirs.convert_ids_to_tokens(sentinels) == [
        f"<extra_id_{number}>" for number in range(100)
    ]
    assert ours.special_ids == {0, 1, *sentinels} == set(theirs.all_special_ids)
    assert ours.decode_plain([sentinels[0], *ids, 1]) == text
    with pytest.raises(DataError, match="size 357 is too small for type t5; the least is 358"):
        train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "small", 357, "t5")


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_survives(folders, kind):
    tokenizer = load_tokenizer(folders / kind)
    # U+2581 is SentencePiece's own mark for a space.
    characters = st.characters(
        exclude_categories=["Cs"], exclude_characters="" if kind == "bpe" else "\u2581"
    )

    @settings(deadline=None, max_examples=200)
    @given(st.text(characters))
    def survives(text):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    survives()


@pytest.mark.parametrize("kind", ["sp-bpe", "sp-unigram"])
def test_sentencepiece_model_and_its_json_agree(folders, library_lines, kind):
    folder = folders / kind
    fast, slow = load_tokenizer(folder), load_tokenizer(folder / "tokenizer.model")
    assert isinstance(fast, HuggingFaceTokenizer)
    assert isinstance(slow, SentencePieceTokenizer)
    texts = [*VARIED, *library_lines, "".join(library_lines)]
    assert fast.encode_batch(texts) == slow.encode_batch(texts)
    assert [slow.decode(slow.encode(text)) for text in VARIED] == VARIED
    assert (fast.fingerprint(), fast.vocab_size, fast.eod_id) == (
        slow.fingerprint(),
        slow.vocab_size,
        slow.eod_id,
    )


def test_foreign_sentencepiece_conventions(tmp_path, library_lines):
    """A leading space added, spaces squeezed and Unicode normalised, as in T5; a leading space
    alone, as in Llama 2."""
    import sentencepiece

    for model_type, rule, squeeze in (("unigram", "nmt_nfkc", True), ("bpe", "identity", False)):
        folder = tmp_path / model_type
        folder.mkdir()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(library_lines),
            model_prefix=str(folder / "tokenizer"),
            model_type=model_type,
            vocab_size=600,
            byte_fallback=True,
            normalization_rule_name=rule,
            remove_extra_whitespaces=squeeze,
            user_defined_symbols=["<sep>"],
            minloglevel=2,
        )
        slow = load_tokenizer(folder)
        slow.save(tmp_path / "out")
        fast = load_tokenizer(tmp_path / "out")
        texts = ["Hello  ﬁne　world", "return x", "a  b ", "日本"]
        assert fast.encode_batch(texts) == slow.encode_batch(texts)
        assert [fast.decode(i) for i in fast.encode_batch(texts)] == [
            slow.decode(i) for i in slow.encode_batch(texts)
        ]
        assert fast.fingerprint() == slow.fingerprint()


@pytest.mark.parametrize("kind", ["sp-bpe", "sp-unigram"])
def test_pieces_that_a_text_spells_out_stay_text(folders, tmp_path, kind):
    """No text is a byte, the unknown or, in data, the end of a document because it looks like that
    piece."""
    fast, slow = load_tokenizer(folders / kind), load_tokenizer(folders / kind / "tokenizer.model")
    spelled = [f"<0x{byte:02X}>" for byte in range(256)] + [
        "<unk>",
        "a<unk><0x0A>b",
        "<<0x41>>",
        "<0x4",
        "<0x0a>",
    ]
    texts = [*spelled, "".join(spelled), " ".join(spelled), "日".join(spelled)]
    assert fast.encode_batch(texts) == slow.encode_batch(texts)
    texts += [END, f"a{END}b", f"<s>{END} </s>", "<0x0A>\n" + END]
    expected = slow.encode_batch(texts)
    assert fast.encode_documents(texts) == slow.encode_documents(texts) == expected
    assert [fast.decode(ids) for ids in expected] == texts
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for source in (folders / kind, folders / kind / "tokenizer.model"):
        result = preprocess([str(tmp_path / "a.jsonl")], tmp_path / "x", source, append_eod=True)
        dataset = IndexedDataset(result.prefix)
        assert [dataset[i].tolist() for i in range(len(dataset))] == [
            [*ids, slow.eod_id] for ids in expected
        ]


def trained_model(tmp_path, lines, **settings):
    """A SentencePiece model as its own trainer makes it, parsed."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as proto

    defaults = {
        "model_type": "bpe",
        "vocab_size": 900,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
    }
    defaults |= {
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "trained"), **defaults | settings
    )
    return proto.ModelProto.FromString((tmp_path / "trained.model").read_bytes())


def random_texts(pieces, count, seed=0):
    """Pieces of a model in a row, and what gives tokenizers trouble."""
    generator = random.Random(seed)
    spaces = [" " * n for n in range(1, 40)]
    trouble = [
        *spaces,
        "\n",
        "\t",
        "\r\n",
        "😀",
        "▁",
        "\0",
        "e\u0301",
        "<0x41>",
        "日本",
        "\U0010ffff",
    ]
    choices = [*pieces, *trouble, *trouble]
    return ["".join(generator.choices(choices, k=generator.randrange(1, 15))) for _ in range(count)]


NORMAL, USER_DEFINED, UNUSED = 1, 4, 5


def tie_spaces(model):  # as in Mistral's models, which lack a run of 15
    for piece in model.pieces:
        if piece.type == NORMAL and not piece.piece.strip("▁"):
            piece.score = -1e9
    runs = {p.piece for p in model.pieces}
    for length in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16):
        if "▁" * length not in runs:
            model.pieces.add(piece="▁" * length, score=-1e9, type=NORMAL)


def tie_all(model):
    for piece in model.pieces:
        piece.score = piece.score // 60 if piece.type == NORMAL else piece.score


def tie_extension(model):  # as models grown for another language
    for text in ("th", "he", "the", "er", "ere", "self.", "lf.s"):
        if text not in {p.piece for p in model.pieces}:
            model.pieces.add(piece=text, score=0.0, type=NORMAL)


def shuffle(model):
    scores = [p.score for p in model.pieces if p.type == NORMAL]
    random.Random(1).shuffle(scores)
    for piece in model.pieces:
        if piece.type == NORMAL:
            piece.score = scores.pop()


def drop_characters(model):
    kept = [p for p in model.pieces if p.type != NORMAL or p.piece not in ("e", "s", "l")]
    del model.pieces[:]
    model.pieces.extend(kept)


def make_unused(model):
    next(p for p in model.pieces if p.type == NORMAL and len(p.piece) > 3).type = UNUSED


SAME = ""  # it has a tokenizer.json
OWN = {"user_defined_symbols": ["<sep>", "▁▁▁", "ab", "abc", "\t"]}
BARE = {"add_dummy_prefix": False}
MODELS = {  # what a model is trained with, what is changed in it, why it has no tokenizer.json
    "plain": ({}, None, SAME),
    "no prefix": (BARE, None, SAME),
    "squeezed": ({"remove_extra_whitespaces": True}, None, SAME),
    "squeezed, no prefix": ({"remove_extra_whitespaces": True, **BARE}, None, SAME),
    "no bytes": ({"byte_fallback": False}, None, SAME),
    "own symbols, no prefix": ({**OWN, **BARE}, None, SAME),
    "own symbols": (OWN, None, "user-defined symbols"),
    "tied spaces": ({}, tie_spaces, SAME),
    "tied": ({}, tie_all, "share the score"),
    "extended": ({}, tie_extension, "share the score 0"),
    "shuffled": ({}, shuffle, SAME),
    "characters that are no pieces": ({}, drop_characters, "is no piece"),
    "unused": ({}, make_unused, "unused pieces"),
    "suffix": ({"treat_whitespace_as_suffix": True}, None, "treat_whitespace_as_suffix"),
    "nfkc": ({"normalization_rule_name": "nmt_nfkc"}, None, "normalizes by nmt_nfkc"),
    "unigram": ({"model_type": "unigram"}, None, "no multiples of 1/16"),
    "unigram, own symbols": (
        {"model_type": "unigram", **OWN, **BARE},
        None,
        "user-defined symbols",
    ),
    "word": (
        {"model_type": "word", "byte_fallback": False},
        None,
        "neither a BPE nor a unigram model",
    ),
    "characters": ({"model_type": "char"}, None, "neither a BPE nor a unigram model"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_tokenizer_json_is_equal_to_its_model_or_there_is_none(
    tmp_path, library_lines, name, pytestconfig
):
    """Whichever of the two is taken for training, serving or evaluating gives SentencePiece's
    ids."""
    import sentencepiece

    settings, change, why = MODELS[name]
    is_word = settings.get("model_type") in ("word", "char")
    model = trained_model(tmp_path, library_lines, **settings, hard_vocab_limit=not is_word)
    if change:
        change(model)
    file = tmp_path / "tokenizer.model"
    file.write_bytes(model.SerializeToString())
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    alone = load_tokenizer(file)
    assert why in alone.why_alone
    assert bool(why) == bool(alone.why_alone)
    alone.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file() == (not why)
    saved = load_tokenizer(tmp_path / "saved")
    assert isinstance(saved, SentencePieceTokenizer if why else HuggingFaceTokenizer)
    assert saved.fingerprint() == alone.fingerprint()
    assert (saved.begin_id, saved.eod_id) == (alone.begin_id, alone.eod_id)
    pieces = [p.piece.replace("▁", " ") for p in model.pieces if p.type in (NORMAL, USER_DEFINED)]
    texts = [*VARIED, *library_lines[:300], "".join(library_lines[:2000]), "", " ", "▁", " ▁ "]
    texts += random_texts(pieces, 20000 if pytestconfig.getoption("--whole") else 1000)
    expected = theirs.encode(texts)
    assert alone.encode_documents(texts) == expected
    assert saved.encode_documents(texts) == expected
    # <unk> and spaces in front are shown otherwise.
    if not why and name != "no bytes" and "squeezed" not in name:
        assert [saved.decode(ids) for ids in expected] == [alone.decode(ids) for ids in expected]


def test_real_models_with_tied_runs_of_spaces(tmp_path, library_lines):
    """Mistral's, where mistral-common is installed."""
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    source = load_tokenizer(shutil.copyfile(data / "tokenizer.model.v1", tmp_path / "lone.model"))
    source.save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert isinstance(saved, HuggingFaceTokenizer)
    texts = ["".join(library_lines), *VARIED, *random_texts(["the", "don", "    x"], 1000)]
    assert saved.encode_documents(texts) == source.encode_documents(texts)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_is_the_same_tokenizer(folders, tmp_path, kind):
    from transformers import AutoTokenizer

    original = load_tokenizer(folders / kind)
    original.save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert saved.fingerprint() == original.fingerprint()
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").encode("  x\n é") == original.encode(
        "  x\n é"
    )


@pytest.mark.parametrize("kind", ["bpe/tokenizer.json", "sp-bpe/tokenizer.model"])
@pytest.mark.parametrize("is_file", [True, False])
def test_a_saved_folder_has_the_same_chat_templates(folders, tmp_path, kind, is_file):
    from transformers import AutoTokenizer

    file, templates = (
        tmp_path / Path(kind).name,
        {"default": "{{ messages }}", "tool_use": "{{ tools }}"},
    )
    shutil.copyfile(folders / kind, file)
    if is_file:
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "chat_template.jinja").write_text(templates["default"])
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(
            templates["tool_use"]
        )
    else:
        named = [{"name": name, "template": template} for name, template in templates.items()]
        (tmp_path / CONFIG).write_text(json.dumps({"chat_template": named}))
    load_tokenizer(file).save(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved.chat_template == templates
    assert (
        ChatTemplate.of(tmp_path / "saved", load_tokenizer(file)).tool_source
        == templates["tool_use"]
    )


def test_lone_files_save_as_folders_for_transformers(folders, tmp_path):
    from transformers import AutoTokenizer

    for source, name in (
        ("bpe/tokenizer.json", "lone.json"),
        ("sp-bpe/tokenizer.model", "lone.model"),
    ):
        shutil.copyfile(folders / source, tmp_path / name)
        lone = load_tokenizer(tmp_path / name)
        lone.save(tmp_path / f"{name}-saved")
        theirs = AutoTokenizer.from_pretrained(tmp_path / f"{name}-saved")
        assert theirs.encode(VARIED[0]) == lone.encode(VARIED[0])
        assert theirs.eos_token_id == lone.eod_id is not None


def test_fingerprints_differ_where_any_text_has_other_ids(folders, tmp_path):
    """Also where the vocabulary and the ids of most texts are the same; not with what changes no
    id."""

    def name(change):
        content = json.loads((folders / "bpe" / "tokenizer.json").read_text())
        change(content)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        return load_tokenizer(tmp_path).fingerprint()

    def swap(content):
        merges = content["model"]["merges"]
        merges[-1], merges[-2] = merges[-2], merges[-1]

    def split(content):
        first = content["pre_tokenizer"]["pretokenizers"][0]
        first["pattern"]["Regex"] = first["pattern"]["Regex"].replace(r"\p{N}", r"\p{N}{1,3}", 1)

    changes = [
        swap,
        split,
        lambda content: content["added_tokens"][0].update(lstrip=True),
        lambda content: content["added_tokens"][0].update(normalized=True),
        lambda content: content["added_tokens"].append(
            {**content["added_tokens"][0], "id": 9, "content": "def"}
        ),
        lambda content: content.update(normalizer={"type": "NFC"}),
        lambda content: content["model"].update(ignore_merges=True),
    ]
    kinds = [load_tokenizer(folders / kind).fingerprint() for kind in KINDS]
    assert len({*kinds, *map(name, changes)}) == len(kinds) + len(changes)
    for same in (
        lambda content: content.update(truncation={"max_length": 9, "strategy": "LongestFirst", "stride": 0,
                                                   "direction": "Right"}),
        lambda content: content.update(post_processor=None, decoder=None),
        lambda content: content["model"].update(merges=[" ".join(pair) for pair in content["model"]["merges"]]),
        lambda content: content.update(normalizer={"type": "Sequence", "normalizers": []}),
    ):  # fmt: skip
        assert name(same) == kinds[0]


def test_token_files_of_older_versions(folders):
    """Their notes have a name that does not tell all: taken where the ids are those of today, else
    refused."""
    for kind, file, made_by, accepted in [
        ("bpe", "tokenizer.json", "gigatoken", True),
        ("sp-bpe", "tokenizer.model", "sentencepiece", True),
        ("sp-bpe", "tokenizer.json", "sentencepiece", True),
        ("sp-bpe", "tokenizer.model", "tokenizers", False),
        ("sp-unigram", "tokenizer.json", "tokenizers", False),
    ]:
        tokenizer = load_tokenizer(folders / kind / file)
        note = {"tokenizer_fingerprint": tokenizer.older_fingerprint(), "tokenized_by": made_by}
        why = other_tokenizer(note, tokenizer)
        assert not why if accepted else "by an older version of megalite" in why
        other = {**note, "tokenizer_fingerprint": "0" * 32}
        assert other_tokenizer(other, tokenizer).startswith("was made with another")
        assert not other_tokenizer(
            {**note, "tokenizer_fingerprint": tokenizer.fingerprint()}, tokenizer
        )
        assert not other_tokenizer({}, tokenizer)


def test_end_of_document_comes_from_the_configuration(folders, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(folders / "bpe", folder)
    bang = load_tokenizer(folder).encode("!")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "!"}}))
    assert [load_tokenizer(folder).eod_id] == bang
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder).eod_id == load_tokenizer(folders / "bpe").eod_id
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "!"}))
    assert [load_tokenizer(folder).eod_id] == bang
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = []
    content["model"]["vocab"] = {
        token.replace(END, "<|other|>"): i for token, i in content["model"]["vocab"].items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "special_tokens_map.json").unlink()
    assert load_tokenizer(folder).eod_id is None


def flagged(content, **flags):
    return {"content": content} | dict.fromkeys(FLAGS, False) | {"special": True} | flags


SETTINGS = {
    "an end that is a plain piece": ({"eos_token": "def"}, "special_tokens_map.json"),
    "an end of a newer file": ({"eos_token": "def", "added_tokens_decoder": {}}, CONFIG),
    "added tokens that are pieces": ({"added_tokens_decoder": {"9": flagged("def"), "10": flagged("re", lstrip=True)}},
                                     CONFIG),
    "an added token with other flags": ({"added_tokens_decoder": {"0": flagged(END, lstrip=True)}}, CONFIG),
    "listed special tokens": ({"extra_special_tokens": ["def", "re"]}, CONFIG),
    "added tokens of an older file": ({"def": 9, "re": 10}, "added_tokens.json"),
    "what pads": ({"pad_token": "<pad>"}, CONFIG),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_beside_it_add_tokens_as_in_transformers(folders, tmp_path, name):
    from transformers import AutoTokenizer

    shutil.copytree(folders / "bpe", tmp_path, dirs_exist_ok=True)
    values, file = SETTINGS[name]
    if file == CONFIG:
        values = json.loads((tmp_path / CONFIG).read_text()) | values
    (tmp_path / file).write_text(json.dumps(values))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    texts = [*VARIED, f"x = def  re{END}  {END} redef f(x):", "pre  return"]
    assert ours.encode_batch(texts) == theirs(texts)["input_ids"]
    assert ours.eod_id == theirs.eos_token_id
    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode_batch(texts) == ours.encode_batch(texts)


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize(
    ("file", "values", "why"),
    [
        (
            CONFIG,
            {"eos_token": "<|eot|>"},
            r"config.json names the eos_token '<\|eot\|>', which {} does",
        ),
        (
            CONFIG,
            {"added_tokens_decoder": {"7": flagged("<|x|>")}},
            r"config.json adds the token '<\|x\|>', which {}",
        ),
        (
            "added_tokens.json",
            {"<|x|>": 7},
            r"added_tokens.json adds the token '<\|x\|>', which {} does not have",
        ),
        (CONFIG, {"added_tokens_decoder": 5}, "tokenizer_config.json cannot be read: TypeError"),
        (CONFIG, [], "tokenizer_config.json is not a JSON object"),
        (CONFIG, {"eos_token": ""}, "tokenizer_config.json: eos_token = '' is no token"),
        (CONFIG, {"eos_token": {"content": 7}}, "eos_token = {{'content': 7}} is no token"),
    ],
)
def test_tokens_that_it_lacks_are_refused(folders, tmp_path, kind, file, values, why):
    """Never is another token taken for the end of a document, or a token's text for text."""
    shutil.copyfile(folders / "sp-bpe" / kind, tmp_path / kind)
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(DataError, match=why.format(kind)):
        preprocess([__file__], tmp_path / "x", tmp_path, append_eod=True)


def test_truncation_and_padding_in_the_file_are_ignored(folders, tmp_path):
    import tokenizers

    raw = tokenizers.Tokenizer.from_file(str(folders / "bpe" / "tokenizer.json"))
    raw.enable_truncation(2)
    raw.enable_padding(length=9)
    raw.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode_batch(VARIED) == load_tokenizer(
        folders / "bpe"
    ).encode_batch(VARIED)


def test_added_tokens_count_in_the_vocabulary(folders, tmp_path):
    import tokenizers

    raw = tokenizers.Tokenizer.from_file(str(folders / "bpe" / "tokenizer.json"))
    raw.add_special_tokens(["<|pad|>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).vocab_size == 1501


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no tokenizer; accepted are .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(DataError, match=rf"{name} cannot be read: "):
            load_tokenizer(tmp_path / name)


def test_training_refuses(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n")
    (tmp_path / "b.txt").write_text("")
    a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    with pytest.raises(DataError, match="the least is 257"):
        train_tokenizer([a], tmp_path / "x", 200)
    for kind in KINDS:
        with pytest.raises(DataError, match="no text to train on"):
            train_tokenizer([b], tmp_path / "x", 400, kind)
    with pytest.raises(DataError, match="could not train 5000 unigram pieces"):
        train_tokenizer([a], tmp_path / "x", 5000, "sp-unigram")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["bpe", "t5", "wordpiece"])
def test_special_tokens_are_whole_special_and_transformers_own(tmp_path, kind):
    from transformers import AutoTokenizer

    (tmp_path / "a.txt").write_text(Path(json.__file__).read_text())
    asked = ["fim", "chatml", "<|user|>", "reserved:2"]
    train_tokenizer([str(tmp_path / "a.txt")], tmp_path / "x", 500, kind, special_tokens=asked)
    ours, theirs = load_tokenizer(tmp_path / "x"), AutoTokenizer.from_pretrained(tmp_path / "x")
    tokens = [*GROUPS["fim"], *GROUPS["chatml"], "<|user|>", "<|reserved_0|>", "<|reserved_1|>"]
    ids = [ours.vocabulary()[token] for token in tokens]
    assert ours.encode("".join(tokens)) == ids == theirs.convert_tokens_to_ids(tokens)
    assert {*ids} < ours.special_ids == {*theirs.all_special_ids}
    assert ours.decode_plain(ids) == ""
    assert ours.vocab_size == len(theirs) == 500


@pytest.mark.parametrize(
    ("kind", "asked", "told"),
    [
        (
            "bpe",
            ["user"],
            r"'user' must be marked, as <\|user\|> or \[user\] is; groups are fim, chatml",
        ),
        ("bpe", ["<|a|>", "<|a|>"], "is there twice"),
        ("bpe", [END], "is there twice, or is one of type bpe anyway"),
        ("t5", ["<extra_id_3>"], "is one of type t5 anyway"),
        ("wordpiece", ["[MASK]"], "is one of type wordpiece anyway"),
        ("bpe", ["reserved:0"], "give reserved:N with N up to 10,000"),
        ("bpe", ["reserved:many"], "give reserved:N"),
        ("sp-bpe", ["fim"], "special tokens are for types bpe, t5 and wordpiece"),
        ("bpe", ["reserved:100"], "size 300 is too small for type bpe; the least is 357"),
    ],
)
def test_special_tokens_that_cannot_be_are_refused(tmp_path, kind, asked, told):
    (tmp_path / "a.txt").write_text("some text\n")
    with pytest.raises(DataError, match=told):
        train_tokenizer([str(tmp_path / "a.txt")], tmp_path / "x", 300, kind, special_tokens=asked)
    assert not (tmp_path / "x").exists()


def test_a_tokenizer_is_not_written_over_and_a_small_one_is_told(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abcabc\n")
    ctrl_c = signal.getsignal(signal.SIGINT)
    command = ["tokenizer", "train", "--input", str(tmp_path / "a.txt"), "--vocab-size", "4000"]
    command += ["--output", str(tmp_path / "x")]
    assert main(command) == 0
    told = capsys.readouterr()
    size = load_tokenizer(tmp_path / "x").vocab_size
    assert f"warning: the vocabulary came out at {size} tokens, not 4,000" in told.err
    assert f"give model.vocab_size={size}" in told.err
    before = (tmp_path / "x" / "tokenizer.json").read_bytes()
    (tmp_path / "a.txt").write_text("other text\n")
    assert main(command) == 2
    assert "x holds a tokenizer already (tokenizer.json)" in capsys.readouterr().err
    assert (tmp_path / "x" / "tokenizer.json").read_bytes() == before
    assert signal.getsignal(signal.SIGINT) is ctrl_c, "Ctrl-C is for what follows in the process"


def test_a_folder_that_could_not_be_written_whole_holds_no_tokenizer(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("abcabc\n")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for holder, name in ((os, "replace"), (training, "write_tokenizer_config")):
        monkeypatch.setattr(holder, name, full)
        with pytest.raises(OSError, match="No space left"):
            train_tokenizer([str(tmp_path / "a.txt")], tmp_path / "x", 300)
        monkeypatch.undo()
    train_tokenizer([str(tmp_path / "a.txt")], tmp_path / "x", 300)


def test_max_bytes_takes_the_beginning(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": word * 50}) + "\n" for word in ("aaab", "zzzy"))
    )
    tokenizer, report = train_tokenizer(
        [str(tmp_path / "a.jsonl")], tmp_path / "x", 400, max_bytes=100
    )
    assert report.num_documents == 1
    assert len(tokenizer.encode("aaab" * 50)) < 20
    assert len(tokenizer.encode("zzzy" * 50)) == 200


def test_tool(tmp_path):
    (tmp_path / "a.txt").write_text("print('hello, world')\n" * 50)
    command = [
        sys.executable,
        "tools/train_tokenizer.py",
        "--input",
        "a.txt",
        "--output",
        "x",
        "--vocab-size",
        "265",
    ]
    command[1] = str(ROOT / command[1])
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "x: 265 tokens of type bpe from 1 documents" in done.stdout
    assert done.stderr == ""
    command[command.index("x")] = "y"
    done = subprocess.run(
        [*command, "--input", "missing*"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "input 'missing*' matches no file" in done.stderr
