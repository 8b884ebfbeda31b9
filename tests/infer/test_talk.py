"""`megalite chat`: what is typed, what comes back, and what the model is given of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from local_tasks import write_tokenizer
from megalite.errors import DataError
from megalite.infer.generate import Generator
from megalite.infer.sampling import Sampling
from megalite.infer.talk import Talk, open_talk, talk

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=290, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, bos_token_id=1, eos_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return write_tokenizer(folder, begins=True)


def typed(*lines: str) -> Callable[[str], str]:
    """What reads these lines, and then the end."""
    waiting = list(lines)

    def read(prompt: str) -> str:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    return read


def test_a_conversation_grows_and_begins_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = Generator.open(folder, num_slots=1)
    conversation = Talk(generator, 8, GREEDY)
    talk(conversation, typed("the cat", "", "a dog"))
    first, second = (
        "".join(generator.stream(generator.as_chat(generator.request(ids, 8, GREEDY))))
        for ids in map(generator.chat_ids, (conversation.messages[:1], conversation.messages[:3]))
    )
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert [message["content"] for message in conversation.messages[1::2]] == [first, second]
    assert capsys.readouterr().out == f"{first}\n{second}\n\n"
    talk(conversation, typed("/new", "/what", "/quit", "never"))
    assert conversation.messages == []
    told = capsys.readouterr().err
    assert "(a new conversation)" in told
    assert told.count("/system TEXT") == 2, "at first, and for a command that is none"


def test_one_that_has_become_too_long_is_told_and_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = open_talk(folder, 8, 0.0, None, "")
    talk(conversation, typed("word " * 200, "the cat"))
    told = capsys.readouterr()
    assert "/new begins another conversation" in told.err
    assert [message["content"] for message in conversation.messages[:1]] == ["the cat"]


def test_a_model_without_a_template_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    write_tokenizer(tmp_path)
    with pytest.raises(DataError, match="has no chat template"):
        open_talk(tmp_path, 8, None, None, "")
