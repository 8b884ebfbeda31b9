"""tools/convert_checkpoint.py: whatever a model is stored as becomes a Hugging Face folder with the
same weights."""

from __future__ import annotations

import json
import pickle
import random
import resource
import runpy
import shutil
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import megatron_files
from megalite.checkpoint import megatron
from megalite.checkpoint.convert import open_source, write_model
from megalite.checkpoint.folder import step_folder
from megalite.checkpoint.megatron import LATEST
from megalite.checkpoint.tensors import CheckpointError
from megalite.checkpoint.torch_file import TorchFile
from megalite.cli import main
from megalite.errors import ConfigError
from megalite.quantization.layers import LayerRuns
from megalite.train import train
from megatron_files import PADDED, arguments, write_pieces, write_rank_files
from small_runs import VOCAB, make_config
from tiny_models import CASES

transformers = pytest.importorskip("transformers")
TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def make_model(case: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CASES[case] | fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=0.5 * (parameter.dim() == 1), std=0.25)
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: x
        for path in sorted(folder.glob("*.safetensors"))
        for name, x in load_file(path).items()
    }


def opened(folder: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def same_logits(a: Any, b: Any) -> bool:
    tokens = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.equal(a(tokens).logits, b(tokens).logits)


FOUR = {"num_hidden_layers": 4, "num_key_value_heads": 2}
RANK_FILES = {
    "alone": ("llama-grouped-queries", 1, 1, 1, "engine"),
    "tensor and pipeline": ("llama-grouped-queries", 2, 2, 1, "engine"),
    "interleaved pipeline, no engine": ("qwen2", 1, 2, 2, "local"),
    "tied, norms of heads": ("qwen3", 2, 2, 1, "local"),
    "before Megatron-core": ("llama", 2, 1, 1, "old"),
}


@pytest.mark.parametrize("how", RANK_FILES)
def test_megatron_rank_files(tmp_path: Path, how: str) -> None:
    case, tensor, pipeline, virtual, style = RANK_FILES[how]
    theirs = make_model(case, **FOUR, tie_word_embeddings=case == "qwen3")
    write_rank_files(theirs, tmp_path / "megatron", tensor, pipeline, virtual, style)
    write_model(open_source(tmp_path / "megatron", vocab_size=99), tmp_path / "hf")
    assert same_logits(opened(tmp_path / "hf"), theirs)
    assert not (tmp_path / "megatron" / "trapped").exists(), "nothing in a pickle is run"


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("case", ["llama-grouped-queries", "qwen2"])
def test_megatron_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, stacked: bool
) -> None:
    theirs, opens = make_model(case, **FOUR), Counter[tuple[Any, ...]]()
    write_pieces(theirs, tmp_path / "megatron", tensor=2, stacked=stacked)
    model = open_source(tmp_path / "megatron", vocab_size=99)

    class Counted(TorchFile):
        def __init__(self, *where: Any):
            opens[where] += 1
            super().__init__(*where)

    monkeypatch.setattr(megatron, "TorchFile", Counted)
    write_model(model, tmp_path / "hf")
    assert {*opens.values()} == {1}, "no piece is read for the layers of others"
    assert same_logits(opened(tmp_path / "hf"), theirs)
    assert not (tmp_path / "megatron" / "trapped").exists(), "nothing in a pickle is run"


@pytest.mark.parametrize("pieces", [True, False])
def test_a_tied_output_layer_of_megatrons_is_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: bool
) -> None:
    def tied(*what: Any) -> Any:
        args = arguments(*what)
        args.untie_embeddings_and_output_weights = False
        return args

    monkeypatch.setattr(megatron_files, "arguments", tied)
    theirs = make_model("llama")
    for name, is_copy in (("another", False), ("copy", True)):
        if is_copy:
            theirs.lm_head.weight = theirs.model.embed_tokens.weight
        if pieces:
            write_pieces(theirs, tmp_path / name, 1, False)
        else:
            write_rank_files(theirs, tmp_path / name, 2, 2, 1, "engine")
        if is_copy:
            assert open_source(tmp_path / name).config["tie_word_embeddings"]
        else:
            with pytest.raises(
                CheckpointError, match=r"tie the output layer to the embedding, but .* different"
            ):
                open_source(tmp_path / name)


def test_padding_is_kept_where_nobody_says_how_much_there_is(tmp_path: Path) -> None:
    write_rank_files(make_model("llama"), tmp_path / "megatron", 1, 1, 1, "engine")
    assert open_source(tmp_path / "megatron").config["vocab_size"] == PADDED


def damaged(folder: Path, **changes: Any) -> None:
    path = folder / "iter_0000012" / "mp_rank_00" / "model_optim_rng.pt"
    args = arguments(make_model("llama").config, 1, 1)
    torch.save({"args": args, "model": {}, "checkpoint_version": 3.0} | changes, path)


def test_what_is_no_llama_of_megatrons_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "megatron"
    write_rank_files(make_model("llama"), folder, 1, 1, 1, "engine")
    damaged(folder, model={"decoder.layers.0.mlp.router.weight": torch.zeros(2)})
    with pytest.raises(
        CheckpointError,
        match=r"decoder.layers.0.mlp.router.weight is no weight of a model like Llama",
    ):
        open_source(folder)
    damaged(folder)
    with pytest.raises(
        CheckpointError, match=r"missing weights: \['embedding.weight', 'head.weight'"
    ):
        open_source(folder)
    args = arguments(make_model("llama").config, 1, 1)
    args.normalization = "LayerNorm"
    damaged(folder, args=args)
    with pytest.raises(
        ConfigError, match="has normalization = 'LayerNorm'; models like Llama have 'RMSNorm'"
    ):
        open_source(folder)
    args.normalization, args.tensor_model_parallel_size = "RMSNorm", 2
    damaged(folder, args=args)
    with pytest.raises(CheckpointError, match="was written over tensor 2, but has files of 1"):
        open_source(folder)
    path = folder / "iter_0000012" / "mp_rank_00" / "model_optim_rng.pt"
    path.write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match=r"is not a file of torch\.save's"):
        open_source(folder)


def test_a_damaged_file_of_torchs_is_refused(tmp_path: Path) -> None:
    """Whatever bits are flipped in it, or where it ends: the tensor is read as it was, or not at
    all."""
    whole = torch.arange(100.0)
    torch.save({"a": whole}, tmp_path / "whole.pt")
    intact, path, refused, rng = (
        (tmp_path / "whole.pt").read_bytes(),
        tmp_path / "damaged.pt",
        0,
        random.Random(0),
    )
    for number in range(300):
        data = bytearray(intact)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data[: rng.randrange(len(data))] if number % 3 == 0 else data)
        try:
            found = TorchFile(path).load()
            assert "a" not in found or torch.equal(found["a"].read(), whole)
        except CheckpointError:
            refused += 1
    assert refused > 200


def test_what_is_packed_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**6))
    with pytest.raises(CheckpointError, match=r"data\.pkl is packed"):
        TorchFile(tmp_path / "bomb.pt").load()


def twice(metadata: Any) -> None:
    """As many numbers as there should be, some of them in the place of others."""
    _, second = (
        index for index in metadata.storage_data if index.fqn == "embedding.word_embeddings.weight"
    )
    metadata.storage_data[replace(second, offset=torch.Size([1, 0]))] = metadata.storage_data.pop(
        second
    )


def endless(metadata: Any) -> None:
    name = "decoder.layers.mlp.linear_fc2.weight"
    stored = metadata.state_dict_metadata[name]
    metadata.state_dict_metadata[name] = replace(
        stored, size=torch.Size([10**12, *stored.size[1:]])
    )


def too_long(metadata: Any) -> None:
    for place in metadata.storage_data.values():
        place.length = 2**60


def elsewhere(metadata: Any) -> None:
    for place in metadata.storage_data.values():
        place.relative_path = "../other/__0_0.distcp"


def of_words(metadata: Any) -> None:
    for place in metadata.storage_data.values():
        place.offset = "begin"


WRONG_PIECES = [
    (twice, "a piece of embedding.word_embeddings.weight is there twice"), (endless, "more than its files hold"),
    (too_long, "has no 1152921504606846976 bytes"), (elsewhere, "which is outside of the folder"),
    (of_words, "do not fit together"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), WRONG_PIECES)
def test_pieces_that_do_not_make_the_whole_are_refused(
    tmp_path: Path, change: Callable[[Any], None], words: str
) -> None:
    folder = tmp_path / "megatron"
    write_pieces(make_model("llama"), folder, 2, True)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=words):
        write_model(open_source(folder, vocab_size=99), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("word", ["../elsewhere", "/etc", "²", ""])
def test_the_latest_iteration_is_a_folder_beside_its_name(tmp_path: Path, word: str) -> None:
    write_pieces(make_model("llama"), tmp_path / "elsewhere", 1, False)
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / LATEST).write_text(word)
    with pytest.raises(CheckpointError, match=r"no folder beside it|is none of"):
        open_source(tmp_path / "megatron")


def test_what_fp16_cannot_hold_is_said(tmp_path: Path) -> None:
    theirs = make_model("llama")
    with torch.no_grad():
        theirs.model.norm.weight[3] = 1e5
    theirs.save_pretrained(tmp_path / "hf")
    with pytest.raises(
        CheckpointError, match=r"norm.weight goes up to 1e\+05, which fp16 cannot hold"
    ):
        write_model(open_source(tmp_path / "hf"), tmp_path / "half", "fp16")
    assert not (tmp_path / "half").exists()


def test_a_model_in_fp64_stays_in_it(tmp_path: Path) -> None:
    theirs = make_model("llama").double()
    theirs.save_pretrained(tmp_path / "hf")
    write_model(open_source(tmp_path / "hf"), tmp_path / "copy")
    assert same_logits(opened(tmp_path / "copy"), theirs)


def test_a_disk_without_room_is_told_in_a_line_and_gets_it_back(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "hf")
    model, limits = open_source(tmp_path / "hf"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"copy could not be written: .*File too large"):
            write_model(model, tmp_path / "copy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("command", ["quantize", "prune --layers 1", "prune --sparsity 0.5"])
def test_a_folder_that_is_there_is_refused_before_anything_is_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    make_model("llama").save_pretrained(tmp_path / "hf")
    monkeypatch.setattr(LayerRuns, "from_tokens", lambda *_: pytest.fail("this takes hours"))
    verb, *options = command.split()
    folders = [str(tmp_path / "hf"), str(tmp_path)]
    assert main([verb, *folders, *options, "--data", "tokens"]) == 2
    said = capsys.readouterr().err
    assert said.endswith(f"error: {tmp_path} exists; name a new folder\n")


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    return ended.value.code


def test_a_checkpoint_without_its_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command, from a run; in another precision and several files."""
    config = make_config(tmp_path, "llama", "train.steps=1")
    train(config)
    arguments = [
        str(config.run.folder),
        str(tmp_path / "hf"),
        "--dtype",
        "bf16",
        "--shard-gb",
        "0.00001",
    ]
    assert run_tool(monkeypatch, *arguments) == 0
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    stored = tensors_of(step_folder(config.run.folder / "checkpoints", 1))
    found = tensors_of(tmp_path / "hf")
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], x.bfloat16()) for name, x in stored.items())
    assert opened(tmp_path / "hf").dtype == torch.bfloat16
    assert not (tmp_path / "hf" / "optimizer").exists()
    assert run_tool(monkeypatch, *arguments) == 2
    assert f"error: {tmp_path / 'hf'} exists; name a new folder\n" in capsys.readouterr().err


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = make_model("gpt2", embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, vocab_size=VOCAB)
    base.save_pretrained(tmp_path / "base")
    base = opened(tmp_path / "base")
    options = {
        "r": 3,
        "lora_alpha": 5,
        "fan_in_fan_out": True,
        "target_modules": r".*\.1\..*c_(attn|fc)",
    }
    adapted = peft.get_peft_model(base, peft.LoraConfig(**options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    write_model(open_source(tmp_path / "adapter"), tmp_path / "hf")
    assert (tmp_path / "adapter" / "README.md").is_file()
    assert "peft" not in (tmp_path / "hf" / "README.md").read_text(), "it is no adapter any more"
    found, before = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "base")
    wanted = adapted.merge_and_unload().state_dict()
    changed = {name for name, x in before.items() if not torch.equal(found[name], x)}
    assert changed == {f"transformer.h.1.{module}.weight" for module in ("attn.c_attn", "mlp.c_fc")}
    for name, x in found.items():
        # B A summed in another order.
        torch.testing.assert_close(x, wanted[name], rtol=0, atol=1e-6)
    assert type(opened(tmp_path / "hf")) is type(base)
    file = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(file.read_text())
    for wrong in ({"r": 0}, {"lora_alpha": None}, {"lora_dropout": 2.0}, {"target_modules": []}):
        file.write_text(json.dumps(values | wrong))
        with pytest.raises(ConfigError, match=rf"^{file}, as lora: \w+ = .*$"):
            open_source(tmp_path / "adapter")


def test_unknown_architectures_and_strangers_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(
        ConfigError, match=r"model_type = 'mamba', which megalite does not open.*known: bert"
    ):
        open_source(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(CheckpointError, match=r"is none of: a folder with a config\.json"):
        open_source(tmp_path)


def test_a_checkpoint_that_its_run_removes_meanwhile(tmp_path: Path) -> None:
    folder, theirs = tmp_path / "model", make_model("llama")
    theirs.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    model = open_source(folder)

    def read(weight: Any) -> Tensor:
        shutil.rmtree(folder, ignore_errors=True)
        return model.read(weight)

    write_model(replace(model, read=read), tmp_path / "hf")
    assert same_logits(opened(tmp_path / "hf"), theirs)
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "{}"


def changed(x: Tensor, how: str) -> Tensor:
    match how:
        case "an axis shorter":
            return x[..., : x.shape[-1] // 2].clone()
        case "an axis longer":
            return torch.cat([x, x], dim=-1)
        case "an axis more":
            return x.unsqueeze(-1)
        case _:
            return x.to(torch.int32)


HOW = ("an axis shorter", "an axis longer", "an axis more", "whole numbers")


@pytest.mark.parametrize("how", HOW)
def test_every_tensor_of_megatrons_is_held_against_its_row(tmp_path: Path, how: str) -> None:
    """One tensor after the other is of another shape or kind, on one tensor rank: no model comes of
    it."""
    write_rank_files(
        make_model("llama", num_hidden_layers=1), tmp_path / "megatron", 2, 1, 1, "engine"
    )
    path = tmp_path / "megatron" / "iter_0000012" / "mp_rank_01" / "model_optim_rng.pt"
    saved = torch.load(path, weights_only=False, pickle_module=pickle)
    names = [name for name, value in saved["model"].items() if isinstance(value, Tensor)]
    assert len(names) == 9
    for name in names:
        torch.save(
            saved | {"model": saved["model"] | {name: changed(saved["model"][name], how)}}, path
        )
        with pytest.raises(CheckpointError, match=r"has shape|is stored as"):
            write_model(open_source(tmp_path / "megatron", vocab_size=99), tmp_path / "hf")
        assert not (tmp_path / "hf").exists()


def test_pieces_are_held_against_their_rows(tmp_path: Path) -> None:
    folder = tmp_path / "megatron"
    write_pieces(make_model("llama"), folder, 1, False)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for name, stored in metadata.state_dict_metadata.items():
        for size in (
            torch.Size([*stored.size[:-1], stored.size[-1] // 2]),
            torch.Size([*stored.size, 1]),
        ):
            wrong = replace(
                metadata,
                state_dict_metadata=metadata.state_dict_metadata
                | {name: replace(stored, size=size)},
            )
            (folder / ".metadata").write_bytes(pickle.dumps(wrong))
            with pytest.raises(CheckpointError, match="has shape"):
                open_source(folder, vocab_size=99)


def test_a_weight_that_is_stored_twice_is_the_same_twice(tmp_path: Path) -> None:
    """A tied embedding stands on the first stage and on the last, and a norm under two names of
    Megatron's."""
    write_rank_files(make_model("llama"), tmp_path / "megatron", 1, 1, 1, "engine")
    path = tmp_path / "megatron" / "iter_0000012" / "mp_rank_00" / "model_optim_rng.pt"
    saved = torch.load(path, weights_only=False, pickle_module=pickle)
    norm = saved["model"]["decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"]
    for other, fits in ((norm, True), (norm + 1, False)):
        torch.save(
            saved | {"model": saved["model"] | {"decoder.layers.0.input_layernorm.weight": other}},
            path,
        )
        if fits:
            open_source(tmp_path / "megatron")
        else:
            with pytest.raises(
                CheckpointError, match=r"layers\.0\.attention_norm\.weight is stored twice"
            ):
                open_source(tmp_path / "megatron")


def test_what_was_written_is_what_its_own_config_asks_for(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "hf")
    model = open_source(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has shape"):
        write_model(replace(model, config=model.config | {"vocab_size": 98}), tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
