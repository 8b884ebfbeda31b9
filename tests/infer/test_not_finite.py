"""A model whose logits are not finite says so in one line, wherever it is asked. It used to say
nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("lm_eval")
pytest.importorskip("openai")
pytest.importorskip("fastapi")

import httpx
from local_server import Gated, serving

from local_tasks import write_tokenizer
from megalite.cli import main
from megalite.errors import ConfigError, NotFinite
from megalite.infer.cache import CachedSequenceInfo
from megalite.infer.evaluate import Asked, evaluate_model
from megalite.infer.generate import Generator
from megalite.infer.sampling import Sampling
from megalite.models.layers import SequenceInfo
from scripted import Bytes, Scripted

WAYS = {
    "greedy": Sampling(temperature=0),
    "all": Sampling(temperature=1.0),
    "top-k": Sampling(temperature=0.7, top_k=3),
    "top-p": Sampling(temperature=0.7, top_p=0.9, min_p=0.1, repetition_penalty=1.2),
}
BROKEN = (math.nan, math.inf)


class Broken(Gated):
    """Its logits hold a number that is none, for sequences that begin with this token and have so
    many."""

    def __init__(self, number: float, first: int = ord("!"), length: int = 3):
        super().__init__(b"abcdefgh", num_slots=2, vocab_size=256)
        self.number, self.first, self.length = number, first, length
        self.broken = [False] * self.num_slots
        self.run()

    def predict(self, tokens_BT: Tensor, places: CachedSequenceInfo, last_B: Tensor) -> Tensor:
        logits_BV = super().predict(tokens_BT, places, last_B)
        for row, (slot, last) in enumerate(
            zip(places.slot_B.tolist(), last_B.tolist(), strict=True)
        ):
            if places.position_BT[row, 0] == 0:
                self.broken[slot] = int(tokens_BT[row, 0]) == self.first
            if self.broken[slot] and int(places.position_BT[row, last]) + 1 >= self.length:
                logits_BV[row, 7] = self.number
        return logits_BV

    def logits(self, tokens_BT: Tensor, places: SequenceInfo) -> Tensor:
        logits_BTV = torch.zeros(*tokens_BT.shape, self.vocab_size)
        logits_BTV[tokens_BT[:, 0] == self.first, -1, 7] = self.number
        return logits_BTV


@pytest.mark.parametrize("number", BROKEN)
@pytest.mark.parametrize("way", WAYS)
def test_an_answer_of_no_numbers_is_an_error(way: str, number: float) -> None:
    generator = Generator(Broken(number), Bytes(), frozenset({256}), WAYS[way])
    for ask in (generator.answer, lambda requests: list(generator.stream(requests[0]))):
        with pytest.raises(NotFinite, match="logits are not finite"):
            ask([generator.request("!", 8)])
        ask([generator.request("?", 8)])
    with pytest.raises(NotFinite, match="logits are not finite"):
        generator.score([[1, 2, 3], [ord("!"), 2, 3]])
    assert len(generator.score([[1, 2, 3], [4, 2, 3]])) == 2


def test_minus_infinity_only_rules_a_token_out() -> None:
    model = Broken(-math.inf)
    generator = Generator(model, Bytes(), frozenset({256}), WAYS["top-p"])
    assert len(generator.answer([generator.request("!", 8)])[0].tokens) == 8
    assert generator.score([[ord("!"), 2, 3]])[0].logprobs.isfinite().all()


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_the_server_answers_500_to_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool, chat: bool
) -> None:
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    generator = Generator(Broken(math.nan), Bytes(), frozenset({256}), WAYS["greedy"], tmp_path)
    with serving(generator, tmp_path / "ratings") as local:
        found = []
        for text in ("!", "?"):
            asked = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
            body = {"model": "tiny", "max_tokens": 8, "stream": streamed, **asked}
            found.append(
                httpx.post(f"{local.url}/v1/{'chat/' * chat}completions", json=body, timeout=60)
            )
    bad, good = found
    assert (bad.status_code, good.status_code) == ((200, 200) if streamed else (500, 200))
    told = bad.text.split("data: ")[-2] if streamed else bad.text
    error = json.loads(told)["error"]
    assert (error["type"], error["code"]) == ("server_error", "not_finite")
    assert "not finite" in error["message"]
    assert "error" not in good.text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a weight that is not a number."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("nan")
    config = transformers.LlamaConfig(
        vocab_size=290, hidden_size=32, intermediate_size=56, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    model.save_pretrained(folder)
    return write_tokenizer(folder)


@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_the_commands_say_it_in_a_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a b", "completion": "c"}\n')
    more = (
        ["--prompt", "a b"]
        if verb == "generate"
        else ["--data", str(tmp_path / "rows.jsonl"), "--max-tokens", "8"]
    )
    assert main([verb, str(folder), *more]) == 78
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: the model's logits are not finite (NaN or infinite)")


def test_an_evaluation_of_no_documents_is_refused(tmp_path: Path) -> None:
    for limit in (0, -1):
        with pytest.raises(ConfigError, match=f"--limit {limit} leaves nothing to measure"):
            evaluate_model(tmp_path, Asked(tasks=["x"], limit=limit))


def test_the_same_model_answers_while_it_is_whole() -> None:
    generator = Generator(Scripted(list(b"abc")), Bytes(), frozenset({256}), WAYS["greedy"])
    assert generator.answer([generator.request("x", 3)])[0].text == "abc"
