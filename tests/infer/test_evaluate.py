"""Evaluation: the numbers that lm-evaluation-harness gives for the same weights through
transformers."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager

from local_tasks import ANIMALS, NAMES, write_tasks, write_tokenizer
from megalite.cli import main
from megalite.errors import CheckpointError, ConfigError, DataError
from megalite.infer import harness
from megalite.infer.evaluate import Asked, Run, evaluate_model, kept, report
from megalite.infer.generate import Generator
from megalite.infer.harness import HarnessModel, load_tasks, numbers_of
from megalite.infer.references import compare, references_task
from megalite.infer.sampling import Sampling
from megalite.models.layers import SequenceInfo
from ranks import run_ranks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own")


def random_model(folder: Path, family: str) -> Path:
    """Two layers, 64 positions, fp32; Llama with a token that begins every text, GPT-2 without."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    ids = {
        "bos_token_id": 1 if family == "llama" else None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=290, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, **ids,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=290,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=0.3,
            **ids,
        )
        model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    return write_tokenizer(folder, begins=family == "llama")


STATE = {"step": 8, "data": {"samples": 32, "fingerprint": "x"}}


def test_a_state_names_its_wandb_run_or_is_of_none(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000008"
    folder.mkdir(parents=True)
    assert Run.of(folder) is None
    (folder / "train_state.json").write_text(json.dumps(STATE))
    assert Run.of(folder) == Run(tmp_path, STATE | {"wandb_id": None})
    away = tmp_path / "away" / folder.name
    shutil.copytree(folder, away)
    assert Run.of(away) is None, "of a copy any folder stands above"
    (folder / "train_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"train_state\.json.*step"):
        Run.of(folder)


def test_results_of_one_second_are_all_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints" / "step-00000008"
    monkeypatch.setattr("megalite.infer.evaluate.time", SimpleNamespace(strftime=lambda _: "now"))
    for number in range(3):
        report(
            {"results": {}, "number": number},
            {},
            folder,
            Run(tmp_path, {}),
            Asked(samples=True),
            None,
        )
    files = sorted((tmp_path / "evaluations").glob("*.json"))
    assert [file.name for file in files] == [
        f"step-00000008-now{more}.json" for more in ("-2", "-3", "")
    ]
    assert [json.loads(file.read_text())["number"] for file in files] == [1, 2, 0]
    assert len(list((tmp_path / "evaluations").glob("*.samples.jsonl"))) == 3


def test_results_are_kept_beside_a_config_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("a_key_of_another_version: 1\n")
    run = Run(tmp_path, STATE | {"wandb_id": "x"})
    report({"results": {}}, {"a/b": 1.0}, tmp_path / "step-00000008", run, Asked(), None)
    assert len([*(tmp_path / "evaluations").iterdir()]) == 1
    assert "warning: W&B: " in capsys.readouterr().out


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file" / "found.json"):
        with pytest.raises(ConfigError, match=f"--output {output}: .* is in its place"):
            evaluate_model(tmp_path / "no model", Asked(), output)


def test_a_checkpoint_that_the_run_removes_meanwhile(
    tmp_path: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_model(tmp_path / "checkpoints" / "step-00000008", "llama")
    (folder / "train_state.json").write_text(json.dumps(STATE))
    run = harness.Tasks.run

    def removed(*arguments: Any, **more: Any) -> Any:
        shutil.rmtree(folder)
        return run(*arguments, **more)

    monkeypatch.setattr(harness.Tasks, "run", removed)
    numbers = evaluate_model(folder, Asked(["story"], tasks, limit=2))
    (file,) = (tmp_path / "evaluations").iterdir()
    assert (
        json.loads(file.read_text())["results"]["story"]["bits_per_byte,none"]
        == numbers["story/bits_per_byte"]
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_numbers_are_those_of_transformers(tmp_path: Path, tasks: Path, family: str) -> None:
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    folder = random_model(tmp_path / "model", family)
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    ours = HarnessModel(Generator.open(folder))
    assert ours.prefix_token_id == theirs.prefix_token_id
    found = [
        load_tasks(NAMES, tasks).run(model, uncertainty=0, samples=True) for model in (theirs, ours)
    ]
    wanted, got = found
    assert wanted is not None
    assert got is not None
    greedy = 0
    for name in NAMES:
        assert len(got["samples"][name]) == len(wanted["samples"][name]) > 0
        for their_sample, our_sample in zip(
            wanted["samples"][name], got["samples"][name], strict=True
        ):
            assert our_sample["arguments"] == their_sample["arguments"]
            if name == "next_word":
                assert our_sample["resps"] == their_sample["resps"]
                continue
            if name == "story":
                pairs = zip(our_sample["resps"][0], their_sample["resps"][0], strict=True)
            else:
                pairs = zip(
                    *([r[0][0] for r in s["resps"]] for s in (our_sample, their_sample)),
                    strict=True,
                )
                greedy += sum(bool(r[0][1]) for r in our_sample["resps"])
                assert [r[0][1] for r in our_sample["resps"]] == [
                    r[0][1] for r in their_sample["resps"]
                ]
            for our_sum, their_sum in pairs:
                # Sums of up to 300 logarithms in fp32, each exact to some 1e-6 of its size, which
                # is up to 10.
                assert our_sum == pytest.approx(their_sum, rel=1e-6, abs=1e-4)
    assert greedy > 0, "some continuation is what the model would have said"
    assert numbers_of(got) == pytest.approx(numbers_of(wanted), rel=1e-5)
    if family == "llama":  # whose tokenizer has a chat template
        chats = [
            load_tasks(NAMES, tasks, limit=5).run(model, 0, chat=True) for model in (theirs, ours)
        ]
        assert numbers_of(chats[1]) == pytest.approx(numbers_of(chats[0]), rel=1e-5)
        assert numbers_of(chats[1])["next_word/said"] != numbers_of(got)["next_word/said"]
    assert {"sounds/acc_norm", "letters/acc", "story/word_perplexity", "next_word/said"} < set(
        numbers_of(got)
    )


def test_control_tokens_of_a_question_are_text(tmp_path: Path) -> None:
    """As to the server: in the harness's own chats, in rows with references, and in what is kept of
    both."""
    folder = random_model(tmp_path / "model", "llama")
    generator = Generator.open(folder)
    model, history = (
        HarnessModel(generator),
        [{"role": "user", "content": "is <|endoftext|> the end?"}],
    )
    asked = model.apply_chat_template(history)
    assert model.tok_encode(asked, add_special_tokens=False) == generator.chat_ids(history)
    assert generator.tokenizer.eod_id not in model.tok_encode(f"{asked} no")
    sample = {"arguments": [(asked, {})], "filtered_resps": [], "target": "", "metrics": []}
    assert [line["asked"] for line in kept({"t": [sample]})] == [
        [generator.chat_template.render(history, prompt=True)]
    ]
    file = tmp_path / "rows.jsonl"
    chat = {"messages": [*history, {"role": "assistant", "content": "b"}]}
    file.write_text(f"{json.dumps({'prompt': history, 'completion': 'b'})}\n{json.dumps(chat)}")
    task = references_task(file, generator.contents, 8, [])["custom_dataset"]()["test"]
    row, of_chat = task
    assert row == of_chat, "a chat is its prompt and its last answer"
    assert model.tok_encode(row["prompt"], add_special_tokens=False) == generator.chat_ids(history)
    generator.check_answer([*history, {"role": "assistant", "content": "<|endoftext|>"}])


def test_what_is_drawn_is_drawn_anew_for_each_request_and_the_same_again(tmp_path: Path) -> None:
    model = HarnessModel(Generator.open(random_model(tmp_path / "model", "gpt2")))
    asked = SimpleNamespace(
        args=("the cat", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8, "until": []})
    )
    found = model.generate_until([asked, asked])
    assert found[0] != found[1]
    assert model.generate_until([asked, asked]) == found
    asked.args[1]["num_beams"] = 4
    with pytest.raises(
        ConfigError, match="generation with num_beams = 4, which megalite does not know"
    ):
        model.generate_until([asked])


def test_the_choices_of_a_question_are_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, computed = Generator.open(random_model(tmp_path / "model", "gpt2")), []
    logits = generator.model.logits

    def counted(tokens_BT: Tensor, places: SequenceInfo) -> Tensor:
        computed.extend(tokens_BT.tolist())
        return logits(tokens_BT, places)

    monkeypatch.setattr(generator.model, "logits", counted)
    rows = [[5, 6, 7, 8], [1, 2, 3], [5, 6, 7, 9], [5, 6, 7, 8]]
    found = generator.score(rows)
    assert computed == [[5, 6, 7], [1, 2, 0]]
    for row, score in zip(rows, found, strict=True):
        alone = generator.score([row])[0]
        assert torch.equal(score.likeliest, alone.likeliest)
        torch.testing.assert_close(score.logprobs, alone.logprobs)  # batches of other sizes


def test_unknown_names_and_missing_data_are_explained(
    tmp_path: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the harness's own thousands, whose reading takes its time.
    monkeypatch.setattr(
        harness, "TaskManager", lambda include_path, **_: TaskManager(None, include_path, False)
    )
    with pytest.raises(ConfigError, match="no task is named 'storey'; did you mean 'story'"):
        load_tasks(["storey"], tasks)
    with pytest.raises(ConfigError, match="nowhere, where tasks should be, is not a folder"):
        load_tasks(["story"], tmp_path / "nowhere")
    (tmp_path / "lost.yaml").write_text((tasks / "story.yaml").read_text().replace("story", "lost"))
    with pytest.raises(
        DataError, match=r"task lost cannot be loaded: .*lost\.jsonl.*without a network"
    ):
        load_tasks(["lost"], tmp_path)


def evaluate_on_rank(
    rank: int, world_size: int, model: Path, asked: Asked, output: Path, layout: dict[str, int]
) -> dict[str, float]:
    return evaluate_model(model, asked, output, **layout)


def test_ranks_find_the_same_and_write_it_once(tmp_path: Path, tasks: Path) -> None:
    """A tensor group and a pipeline."""
    folder, asked = (
        random_model(tmp_path / "model", "llama"),
        Asked(NAMES, tasks, limit=4, samples=True),
    )
    wanted = evaluate_model(folder, asked, tmp_path / "alone.json")
    for layout in ("tensor", "pipeline"):
        output = tmp_path / f"{layout}.json"
        for found in run_ranks(2, evaluate_on_rank, folder, asked, output, {layout: 2}):
            # Sums over ranks are rounded in another order.
            assert found == pytest.approx(wanted, rel=1e-5)
        assert json.loads(output.read_text())["results"].keys() == set(NAMES)
    alone = json.loads((tmp_path / "alone.json").read_text())
    assert alone["results"]["story"]["bits_per_byte,none"] == wanted["story/bits_per_byte"]
    assert alone["asked"]["limit"] == 4
    assert alone["n-samples"]["letters"] == {"original": 9, "effective": 4}
    assert alone["results"].keys() == set(NAMES)
    lines = [
        json.loads(line) for line in (tmp_path / "alone.samples.jsonl").read_text().splitlines()
    ]
    assert [line["task"] for line in lines] == [name for name in NAMES for _ in range(4)]
    assert lines[-1]["asked"] == ["cow " * 22]
    texts = [line["said"][0] for line in lines if line["task"] == "next_word"]
    judged = [line["judged"]["said"] for line in lines if line["task"] == "next_word"]
    assert judged == [zlib.crc32(text.encode()) for text in texts]
    assert sum(judged) / 4 == wanted["next_word/said"]


def test_measures_are_those_of_their_papers() -> None:
    found = compare("The  Cat sat, on a mat.", ["no", "a cat sat on the mat"])
    assert found["f1"] == found["exact_match"] == 1.0, "articles, case and punctuation do not count"
    assert found["accuracy"] == 0.0
    assert compare(" yes\n", ["yes"])["accuracy"] == 1.0
    # 3 of 5 said words are among the 4 wanted: 2 · 3/5 · 3/4 / (3/5 + 3/4)
    assert compare("one two three four five", ["two one three seven"])["f1"] == pytest.approx(2 / 3)
    # ROUGE-1 by hand: 3 common words of 6 and 4; ROUGE-L: the longest common row of words is 2;
    # stems: cats = cat
    rouge = compare("two cats are here and there", ["here two cat sat"])
    assert rouge["rouge1"] == pytest.approx(2 * 3 / 10)
    assert rouge["rougeL"] == pytest.approx(2 * 2 / 10)
    assert rouge["rouge2"] == pytest.approx(2 * 1 / (5 + 3))
    assert compare("", ["the"])["f1"] == 1.0
    assert compare("", ["word"])["f1"] == 0.0


def test_bleu_is_sacrebleus_over_all_answers_also_with_several_references(tmp_path: Path) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    said = ["the cat sat on the mat today", "a dog barks loudly at night", "no"]
    wanted = [
        ["the cat sat on a mat today", "the cat sat on the mat"],
        ["the dog barks loudly at night"],
        ["no"],
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": "?", "completion": texts}) + "\n" for texts in wanted)
    )
    task = references_task(file, None, 8, [])
    (gather,) = [
        metric["aggregation"] for metric in task["metric_list"] if metric["metric"] == "bleu"
    ]
    found = gather(
        [
            task["process_results"]({"wanted": w}, [s])["bleu"]
            for s, w in zip(said, wanted, strict=True)
        ]
    )
    streams = [[texts[0] for texts in wanted], [wanted[0][1], None, None]]
    assert found == sacrebleu.BLEU().corpus_score(said, streams).score
    assert 40 < found < 100
    assert gather([(text[0], text) for text in wanted[:2]]) == pytest.approx(100)


def test_the_command_measures_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The wanted answers are what the model says, but in one row."""
    folder = random_model(tmp_path / "model", "gpt2")
    generator = Generator.open(folder)
    prompts = [f"What does the {animal} say?" for animal in ANIMALS[:4]]
    answers = generator.answer(
        [generator.request(prompt, 5, Sampling(temperature=0)) for prompt in prompts]
    )
    said = [generator.tokenizer.decode_plain(answer.tokens) for answer in answers]
    assert all(text.strip() for text in said)
    rows = [
        {"prompt": p, "completion": s} for p, s in zip(prompts, [*said[:3], "moo"], strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "results" / "rows.json"
    command = ["eval", str(folder), "--data", str(tmp_path / "rows.jsonl"), "--max-tokens", "5"]
    assert main([*command, "--output", str(tmp_path / "rows.jsonl")]) == 2
    assert "rows.jsonl would be written over it" in capsys.readouterr().err
    assert main([*command, "--output", str(output)]) == 0
    results = json.loads(output.read_text())["results"]["rows"]
    assert results["accuracy,none"] == 0.75
    assert {"bleu,none", "rougeL,none", "f1,none", "exact_match,none"} < results.keys()
    shown = capsys.readouterr().out
    assert any(line.split()[:3] == ["rows", "accuracy", "0.7500"] for line in shown.splitlines())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a"}', "there is no 'completion'"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            "`messages` must be a list that ends",
        ),
        ('{"messages": []}', "`messages` must be a list that ends"),
        ('{"prompt": "a", "completion": 3}', "`completion` must be a text, or a list of texts"),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}',
            "messages need --chat",
        ),
        ("{", "Expecting property name"),
    ],
)
def test_a_wrong_row_is_shown(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n\n' + line)
    with pytest.raises(DataError) as caught:
        references_task(file, None, 8, [])
    assert f"{file}, line 3: {reason}" in str(caught.value)
    assert str(caught.value).endswith(line)


def test_a_text_may_hold_what_ends_lines_elsewhere(tmp_path: Path) -> None:
    file, odd = tmp_path / "rows.jsonl", "one\u2028two\x85three"
    file.write_text(
        json.dumps({"prompt": odd, "completion": odd}, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (row,) = references_task(file, None, 8, [])["custom_dataset"]()["test"]
    assert (row["prompt"], row["wanted"]) == (odd, [odd])


def test_one_of_them_is_asked_for(tmp_path: Path) -> None:
    for asked in (Asked(["a"], tokens="a"), Asked(["a"], data=tmp_path / "rows.jsonl")):
        with pytest.raises(
            ConfigError, match="give one of --tasks NAME,NAME, --data FILE and --tok"
        ):
            evaluate_model(tmp_path, asked)
