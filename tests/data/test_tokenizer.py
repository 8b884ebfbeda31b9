import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from megalite.data.tokenizer_training import END, train_tokenizer
from megalite.errors import DataError

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
    """One trained tokenizer of each kind, on source files of this interpreter's standard library."""
    library = Path(json.__file__).parents[1]
    inputs = [str(library / name) for name in ("argparse.py", "ast.py", "json", "tarfile.py", "typing.py")]
    base = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        train_tokenizer(inputs, base / kind, 1500, kind)
    return base


@pytest.fixture(scope="module")
def library_lines():
    library = Path(json.__file__).parents[1]
    text = "".join((library / name).read_text() for name in ("inspect.py", "pathlib.py", "textwrap.py", "zipfile.py"))
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


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_survives(folders, kind):
    tokenizer = load_tokenizer(folders / kind)
    # U+2581 is SentencePiece's own mark for a space.
    characters = st.characters(exclude_categories=["Cs"], exclude_characters="" if kind == "bpe" else "\u2581")

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
    texts = [*VARIED, *library_lines]
    assert fast.encode_batch(texts) == slow.encode_batch(texts)
    assert [slow.decode(slow.encode(text)) for text in VARIED] == VARIED
    assert (fast.fingerprint(), fast.vocab_size, fast.eod_id) == (slow.fingerprint(), slow.vocab_size, slow.eod_id)


def test_foreign_sentencepiece_conventions(tmp_path, library_lines):
    """A leading space added, spaces squeezed and Unicode normalised, as in T5; a leading space alone, as in Llama 2."""
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
        assert [fast.decode(i) for i in fast.encode_batch(texts)] == [slow.decode(i) for i in slow.encode_batch(texts)]
        assert fast.fingerprint() == slow.fingerprint()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_is_the_same_tokenizer(folders, tmp_path, kind):
    from transformers import AutoTokenizer

    original = load_tokenizer(folders / kind)
    original.save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert saved.fingerprint() == original.fingerprint()
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").encode("  x\n é") == original.encode("  x\n é")


def test_lone_files_save_as_folders_for_transformers(folders, tmp_path):
    from transformers import AutoTokenizer

    for source, name in (("bpe/tokenizer.json", "lone.json"), ("sp-bpe/tokenizer.model", "lone.model")):
        shutil.copyfile(folders / source, tmp_path / name)
        lone = load_tokenizer(tmp_path / name)
        lone.save(tmp_path / f"{name}-saved")
        theirs = AutoTokenizer.from_pretrained(tmp_path / f"{name}-saved")
        assert theirs.encode(VARIED[0]) == lone.encode(VARIED[0])
        assert theirs.eos_token_id == lone.eod_id is not None


def test_fingerprints_differ(folders):
    assert len({load_tokenizer(folders / kind).fingerprint() for kind in KINDS}) == len(KINDS)


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
    content["model"]["vocab"] = {token.replace(END, "<|other|>"): i for token, i in content["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "special_tokens_map.json").unlink()
    assert load_tokenizer(folder).eod_id is None


def test_truncation_and_padding_in_the_file_are_ignored(folders, tmp_path):
    import tokenizers

    raw = tokenizers.Tokenizer.from_file(str(folders / "bpe" / "tokenizer.json"))
    raw.enable_truncation(2)
    raw.enable_padding(length=9)
    raw.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode_batch(VARIED) == load_tokenizer(folders / "bpe").encode_batch(VARIED)


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
        with pytest.raises(DataError, match="is not a"):
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


def test_max_bytes_takes_the_beginning(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": word * 50}) + "\n" for word in ("aaab", "zzzy")))
    tokenizer, report = train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "x", 400, max_bytes=100)
    assert report.num_documents == 1
    assert len(tokenizer.encode("aaab" * 50)) < 20
    assert len(tokenizer.encode("zzzy" * 50)) == 200


def test_tool(tmp_path):
    (tmp_path / "a.txt").write_text("print('hello, world')\n" * 50)
    command = [sys.executable, "tools/train_tokenizer.py", "--input", "a.txt", "--output", "x", "--vocab-size", "265"]
    command[1] = str(ROOT / command[1])
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "x: 265 tokens of type bpe from 1 documents" in done.stdout
    done = subprocess.run(
        [*command, "--input", "missing*"], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "input 'missing*' matches no file" in done.stderr
