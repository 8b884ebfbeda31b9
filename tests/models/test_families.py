"""Each family against transformers: the same folder gives the same logits and the same
gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalite.checkpoint.convert import open_source, write_model
from megalite.checkpoint.tensors import CheckpointError
from megalite.comm.mesh import Mesh
from megalite.data.loader import MicroBatch
from megalite.errors import ConfigError
from megalite.infer.generate import load_model
from megalite.models import build_model, from_hf_config, model_config, to_hf_config, weight_table
from megalite.models.core_attention import CoreAttention
from megalite.models.dropout import Dropout
from megalite.models.layers import IGNORE, CrossEntropy, SequenceInfo
from megalite.parallel.stage import positions_of
from megalite.training.parts import make_inputs
from tiny_models import (
    CASES,
    IDS,
    LLAMA,
    LLAMA3_ROPE,
    OWN_HEAD,
    as_stored,
    auto_class,
    our_logits,
    randomize,
    size_of,
    source_of,
    their_logits,
)

transformers = pytest.importorskip("transformers")

LENGTH = 40
LONE = Mesh.alone()


def their_model(case: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CASES[case])
    model = auto_class(config.model_type).from_config(config, attn_implementation="eager").eval()
    randomize(model, own_head=case in OWN_HEAD)
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, Path]:
    """A random transformers model and the folder it was saved to."""
    theirs, folder = their_model(request.param), tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, folder


def tokens_and_labels() -> tuple[Tensor, Tensor]:
    # RoBERTa counts no positions of tokens with the id of padding.
    tokens = torch.randint(2, 99, (3, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    labels = tokens[:, 1:].clone()
    labels[0, :9] = IGNORE
    return tokens[:, :-1], labels


def test_logits_and_gradients_are_those_of_transformers(pair: tuple[nn.Module, Path]) -> None:
    theirs, folder = pair
    ours = load_model(folder).requires_grad_()
    tokens, labels = tokens_and_labels()
    found, wanted = our_logits(ours, tokens), their_logits(theirs, tokens)
    # T5 1.0's are scaled by 1/√32.
    least = 0.1 if getattr(theirs.config, "scale_decoder_outputs", False) else 0.5
    assert wanted.std() > least, "logits large enough that the bound means something"
    # The project's bound; fp32 sums in another order give 1e-6.
    assert (found - wanted).abs().max().item() <= 1e-4

    ours.loss(found, labels).sum().div(7).backward()
    theirs.zero_grad()
    (F.cross_entropy(wanted.flatten(0, 1), labels.flatten(), reduction="sum") / 7).backward()
    grads = as_stored(
        ours.config.family, {name: parameter.grad for name, parameter in theirs.named_parameters()}
    )
    parameters = dict(ours.named_parameters())
    compared = set()
    for weight in weight_table(ours.config):
        if weight.by_counts:
            continue
        for name, grad in weight.to_hf(parameters[weight.name].grad).items():
            # The project's bound for gradients: fp32 rounding, about 1e-7 an operation, relative to
            # the tensor, which is 0 for an expert that no token visits.
            error = ((grad - grads[name]).norm() / size_of(name, grads).clamp(min=1e-12)).item()
            assert error <= 1e-5, f"{name} is off by {error:.1e}"
            compared.add(name)
    assert compared == grads.keys(), "every gradient was compared"


def test_config_survives_the_way_there_and_back(pair: tuple[nn.Module, Path]) -> None:
    folder = pair[1]
    config = model_config({"hf": str(folder)})
    again = from_hf_config(to_hf_config(config))
    assert model_config(again | {"hf": folder}) == config
    # transformers reads what megalite writes as it reads what it wrote itself.
    theirs, ours = (
        type(pair[0].config)(**values)
        for values in (json.loads((folder / "config.json").read_text()), to_hf_config(config))
    )
    for key in CASES[folder.name[:-1]].keys() - IDS.keys():  # the tokenizer's, not the model's
        found, wanted = getattr(ours, key), getattr(theirs, key)
        if key == "rope_parameters":
            found.pop("type", None)  # the older name of rope_type, which says the same
        assert found == wanted, key


def test_position_scaling_as_transformers_4_writes_it() -> None:
    new = {"rms_norm_eps": 1e-6} | LLAMA | {"rope_parameters": LLAMA3_ROPE}
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {
        "rope_theta": 500.0,
        "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"},
    }
    assert from_hf_config(old) == from_hf_config(new)
    assert from_hf_config(new)["rope_scaling"]["factor"] == 4.0


def test_theta_may_stand_beside_the_scaling() -> None:
    """As transformers reads it."""
    stored = {
        **LLAMA,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500.0,
        "rope_parameters": {"rope_type": "default"},
    }
    assert from_hf_config(stored)["rope_theta"] == 500.0
    assert transformers.LlamaConfig(**stored).rope_parameters["rope_theta"] == 500.0


@pytest.mark.parametrize("case", CASES)
def test_a_document_beside_others_is_what_it_is_alone(case: str, tmp_path: Path) -> None:
    """One that is longer than Phi-3's original length, by a token, beside one that is not, as both
    are trained on."""
    torch.manual_seed(1)
    theirs, lengths = their_model(case), [16, 17, 4]
    texts = [torch.randint(0, 99, (1, length)) for length in lengths]
    document = torch.repeat_interleave(torch.tensor(lengths))[None]
    tokens = torch.cat(texts, 1)
    sources = [source_of(text) for text in texts]
    of_source = torch.repeat_interleave(torch.tensor([source.shape[1] for source in sources]))[None]
    both = {"source": torch.cat(sources, 1), "source_documents": of_source}
    is_answered = theirs.config.is_encoder_decoder
    micro = MicroBatch(tokens, tokens, torch.zeros(1), document, **(both if is_answered else {}))
    inputs = make_inputs(micro, LONE)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        found = load_model(tmp_path)(inputs.tokens_BT, inputs.places).split(lengths, 1)
        for text, logits in zip(texts, found, strict=True):
            # As for every family.
            assert (logits - their_logits(theirs, text)).abs().max().item() <= 1e-4


HEADED = ["llama-3", "gpt2", "mistral", "qwen2-window", "qwen3", "smollm3"]


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("case", HEADED)
def test_logits_of_classes_are_those_of_transformers(tmp_path: Path, case: str, kind: str) -> None:
    """Of texts that it has side by side, each filled up, and ours behind one another in a row."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CASES[case] | {"pad_token_id": 0}, num_labels=3)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=0.5 * (parameter.dim() == 1), std=0.25)
    model.save_pretrained(tmp_path / "theirs")
    write_model(open_source(tmp_path / "theirs"), tmp_path / "ours")
    theirs = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path / "ours").eval()
    texts = [torch.randint(1, 99, (length,)) for length in (9, 21, 2)]
    tokens = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    with torch.no_grad():
        wanted = theirs(tokens, attention_mask=mask).logits
        document = torch.repeat_interleave(torch.tensor([len(text) for text in texts]))[None]
        places = SequenceInfo(
            torch.arange(document.shape[1])[None], positions_of(document), document
        )
        found = load_model(tmp_path / "ours")(torch.cat(texts)[None], places)[0].split(
            [len(text) for text in texts]
        )
    for row, logits in enumerate(found):
        same = wanted[row] if kind == "SequenceClassification" else wanted[row, : len(logits)]
        mine = logits[-1] if kind == "SequenceClassification" else logits
        assert same.std() > 0.1
        assert (mine - same).abs().max().item() <= 1e-4  # as for every family


def test_classes_without_names_and_problems_of_other_kinds() -> None:
    stored = transformers.AutoConfig.for_model(**CASES["llama"]).to_dict() | {
        "architectures": ["LlamaForSequenceClassification"], "id2label": None
    }  # fmt: skip
    assert (
        from_hf_config(stored)["labels"]
        == ["LABEL_0", "LABEL_1"]
        == [*transformers.LlamaConfig().id2label.values()]
    )
    with pytest.raises(
        ConfigError, match="problem_type = 'ranking', none of single_label_classification, "
    ):
        from_hf_config(stored | {"problem_type": "ranking"})


@pytest.mark.parametrize(
    "case", ["llama-3", "mistral", "smollm3", "phi3-long", "gpt_neox", "gemma3_text-linear"]
)
def test_a_config_as_transformers_4_reads_it(case: str) -> None:
    """What is written for it beside the keys of transformers 5 says the same."""
    config = model_config(
        from_hf_config(transformers.AutoConfig.for_model(**CASES[case]).to_dict())
    )
    old = {key: value for key, value in to_hf_config(config).items() if key != "rope_parameters"}
    assert model_config(from_hf_config(old)) == config


@pytest.mark.parametrize(
    ("family", "stored", "found"),
    [
        (
            "gemma2",
            {"num_hidden_layers": 3},
            ["sliding_attention", "full_attention", "sliding_attention"],
        ),
        ("gemma3_text", {"num_hidden_layers": 3}, ["sliding_attention"] * 3),
        (
            "gemma3_text",
            {"num_hidden_layers": 3, "sliding_window_pattern": 2},
            ["sliding_attention", "full_attention"],
        ),
        (
            "qwen2",
            {"num_hidden_layers": 2, "max_window_layers": 1},
            ["full_attention", "sliding_attention"],
        ),
        ("qwen2", {"num_hidden_layers": 2, "use_sliding_window": False}, ["full_attention"] * 2),
    ],
)
def test_which_layers_slide_where_an_old_config_has_a_pattern(
    family: str, stored: dict[str, Any], found: list[str]
) -> None:
    case = {"gemma2": "gemma2", "gemma3_text": "gemma3_text", "qwen2": "qwen2-window"}[family]
    old = transformers.AutoConfig.for_model(**CASES[case]).to_dict() | stored
    del old["layer_types"]
    config = model_config(from_hf_config(old))
    windows = [config.window(layer) for layer in range(len(found))]
    assert windows == [7 if kind == "sliding_attention" else None for kind in found]


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("mistral", "attention_bias", True),
        ("mistral", "mlp_bias", True),
        ("ministral", "attention_bias", True),
        ("olmo3", "attention_bias", True),
        ("granite", "hidden_act", "gelu"),
        ("gemma", "hidden_act", "silu"),
        ("starcoder2", "hidden_act", "relu"),
        ("starcoder2", "norm_type", "rms_norm"),
        ("phi", "qk_layernorm", True),
        ("falcon", "alibi", True),
        ("falcon", "parallel_attn", False),
        ("falcon", "activation", "relu"),
        ("llama", "hidden_act", "gelu"),
        ("llama", "attention_dropout", 0.1),
        ("llama", "rope_type", "proportional"),
        ("gpt2", "activation_function", "relu"),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "add_cross_attention", True),
        ("mistral", "hidden_act", "relu"),
        ("qwen3", "attention_bias", True),
        ("smollm3", "use_sliding_window", True),
        ("phi3", "resid_pdrop", 0.1),
        ("olmo2", "attention_bias", True),
        ("gpt_neox", "attention_bias", False),
        ("gpt_neox", "hidden_act", "relu"),
        ("gemma2", "use_bidirectional_attention", True),
        ("gemma3_text", "attn_logit_softcapping", 50.0),
        ("gemma3_text", "hidden_activation", "silu"),
    ],
)
def test_what_a_family_cannot_compute_is_refused_by_name(
    tmp_path: Path, case: str, key: str, value: Any
) -> None:
    values = transformers.AutoConfig.for_model(**CASES[case]).to_dict()
    values |= (
        {"rope_parameters": LLAMA3_ROPE | {key: value}} if key == "rope_type" else {key: value}
    )
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"{key} = {value!r}.*{case} family supports"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("gemma2", {"num_layers": 3}, "layer_types has 2 entries for num_layers = 3"),
        ("smollm3", {"nope_layers": [2]}, "the 2 layers have the numbers 0 to 1"),
        (
            "phi3-long",
            {"partial_rotary_factor": 0.5},
            "rope_scaling.short_factor has 3 numbers for 2 pairs",
        ),
        ("gpt_neox", {"num_kv_heads": 1}, "as many num_kv_heads as num_attention_heads"),
        ("gpt_neox", {"rotary_pct": 0.1}, "heads of size 1 cannot be rotated in pairs"),
        (
            "llama",
            {"rope_scaling": {"type": "ntk"}},
            "type must be llama3, linear, longrope, yarn, dynamic",
        ),
        (
            "llama-dynamic",
            {"max_positions": 60},
            "max_positions 60 must be 64: rope_scaling.factor × its original ones",
        ),
        ("llama-yarn", {"rope_theta": 1}, r"yarn needs a rope_theta above 1, not 1\.0"),
        ("llama", {"rope_scaling": {"type": "linear", "factr": 2}}, "did you mean 'factor'"),
        (
            "llama",
            {"rope_scaling": {"factor": -1}},
            "rope_scaling.factor = -1: should be greater than 0$",
        ),
    ],
)
def test_a_config_that_does_not_fit_its_family(
    case: str, change: dict[str, Any], words: str
) -> None:
    values = from_hf_config(transformers.AutoConfig.for_model(**CASES[case]).to_dict())
    with pytest.raises(ConfigError, match=words):
        model_config(values | change)


@pytest.mark.parametrize(
    "values",
    [{"hidden_size": None}, {"rope_parameters": 5}, {"rope_scaling": "yarn"}, {"architectures": 5}],
    ids=str,
)
def test_a_config_of_other_kinds_of_values_is_refused(values: dict[str, Any]) -> None:
    stored = transformers.AutoConfig.for_model(**CASES["llama"]).to_dict()
    del stored["rope_parameters"], stored["head_dim"]
    with pytest.raises(
        ConfigError, match=r"config\.json of a llama model holds a value of another kind"
    ):
        from_hf_config(stored | values)


def test_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "xlnet"}')
    with pytest.raises(
        ConfigError, match=r"model_type = 'xlnet'.*gemma2, .*gpt2, .*llama, ministral, mistral"
    ):
        load_model(tmp_path)


def drop(name: str, tensors: dict[str, Tensor]) -> None:
    del tensors[name]


def add(name: str, tensors: dict[str, Tensor]) -> None:
    tensors[name] = torch.zeros(2)


def cut(name: str, tensors: dict[str, Tensor]) -> None:
    tensors[name] = tensors[name][:-1].clone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            partial(drop, "model.layers.1.self_attn.k_proj.weight"),
            "missing tensors: model.layers.1.self_attn.k_proj",
        ),
        (
            partial(add, "model.layers.1.self_attn.k_proj.bias"),
            "of no weight: model.layers.1.self_attn.k_proj.bias",
        ),
        (
            partial(cut, "model.norm.weight"),
            r"model.norm.weight has shape \[31\], the model needs \[32\]",
        ),
        (partial(drop, "lm_head.weight"), "missing tensors: lm_head.weight"),
    ],
)
def test_tensors_that_do_not_match_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    their_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=words):
        load_model(tmp_path)


def test_a_tied_head_may_be_stored_a_second_time(tmp_path: Path) -> None:
    their_model("llama-tied").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_model(tmp_path)
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe-dense-among", "qwen3_moe-dense-among"])
def test_experts_in_one_tensor_are_those_in_many(case: str, tmp_path: Path) -> None:
    """As transformers 5 has them in its modules; what is written is as the hub has them."""
    theirs = their_model(case)
    theirs.save_pretrained(tmp_path / "many")
    theirs.save_pretrained(tmp_path / "one", save_original_format=False)
    stored = load_file(tmp_path / "many" / "model.safetensors")
    assert stored.keys() != load_file(tmp_path / "one" / "model.safetensors").keys()
    write_model(open_source(tmp_path / "one"), tmp_path / "copy")
    copied = load_file(tmp_path / "copy" / "model.safetensors")
    assert copied.keys() == stored.keys()
    assert all(torch.equal(copied[name], tensor) for name, tensor in stored.items())
    cut(
        "model.layers.1.mlp.experts.down_proj",
        tensors := load_file(tmp_path / "one" / "model.safetensors"),
    )
    save_file(tensors, tmp_path / "one" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.experts.down_proj has shape"):
        load_model(tmp_path / "one")


def test_gpt2_as_openai_community_stores_it(tmp_path: Path) -> None:
    theirs = their_model("gpt2")
    theirs.transformer.save_pretrained(tmp_path)
    tokens, _ = tokens_and_labels()
    # As above.
    assert (load_model(tmp_path)(tokens) - theirs(tokens).logits).abs().max().item() <= 1e-4


GEMMA3_NAMES = {
    "published": ("language_model.model.", "vision_tower.", "multi_modal_projector."),
    "transformers 5": (
        "model.language_model.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
}


@pytest.mark.parametrize("spelling", GEMMA3_NAMES)
def test_the_text_part_of_a_gemma_3_for_texts_and_images(spelling: str, tmp_path: Path) -> None:
    text = {key: value for key, value in CASES["gemma3_text-linear"].items() if key not in IDS}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}
    )
    torch.manual_seed(0)
    theirs = transformers.Gemma3ForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    wanted = dict(zip(GEMMA3_NAMES["transformers 5"], GEMMA3_NAMES[spelling], strict=True))
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        start = next((start for start in wanted if name.startswith(start)), "")
        if name != "lm_head.weight":  # tied
            tensors[wanted.get(start, "") + name.removeprefix(start)] = tensor.clone()
    assert tensors.keys() == stored.keys() or spelling != "published", (
        "as transformers writes it, too"
    )
    save_file(tensors, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    tokens, _ = tokens_and_labels()
    logits = theirs(tokens).logits
    assert (load_model(tmp_path / "theirs")(tokens) - logits).abs().max().item() <= 1e-4  # as above
    write_model(open_source(tmp_path / "theirs"), tmp_path / "ours")
    alone, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(alone) is transformers.Gemma3ForCausalLM
    assert torch.equal(alone(tokens).logits, logits)


def test_what_a_text_config_leaves_out_is_what_transformers_takes_for_it() -> None:
    stored = {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "sliding_window": 1024},
    }
    found = from_hf_config(stored)
    assert model_config(found) == model_config(
        from_hf_config(transformers.Gemma3TextConfig(sliding_window=1024).to_dict())
    )
    for outer, words in (
        (
            {"use_vision_head": True},
            "use_vision_head = True, which is unknown for the gemma3 family",
        ),
        ({"text_config": 5}, "text_config = 5, which is no JSON object"),
        (
            {"text_config": {"attn_logit_softcapping": 5.0}},
            "attn_logit_softcapping = 5.0; the gemma3_text family",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            from_hf_config(stored | outer)


def test_half_precision_weights_stay_as_they_are_stored(tmp_path: Path) -> None:
    their_model("llama").bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(tmp_path, torch.float32).parameters()} == {torch.float32}


def test_bf16_is_as_close_to_fp32_as_transformers(tmp_path: Path) -> None:
    """Gemma's 1 + weight is where bf16 would lose most."""
    their_model("gemma3_text").save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    tokens, _ = tokens_and_labels()
    with torch.no_grad():
        exact = load(tmp_path, attn_implementation="eager")(tokens).logits
        theirs = load(tmp_path, attn_implementation="eager", dtype=torch.bfloat16)(
            tokens
        ).logits.float()
        ours = load_model(tmp_path, torch.bfloat16)(tokens).float()
    # Both round at other places: neither is the nearer one by more than chance.
    assert (ours - exact).norm() <= 1.25 * (theirs - exact).norm()


@pytest.mark.parametrize("case", ["gpt2", "starcoder2-untied", "phi"])
@pytest.mark.parametrize("only", ["embedding_dropout", "attention_dropout", "hidden_dropout"])
def test_each_dropout_of_a_family_drops(case: str, only: str) -> None:
    """In training alone, and others where the keys are others."""
    values = from_hf_config(transformers.AutoConfig.for_model(**CASES[case]).to_dict())
    dropouts = {name: 0.0 for name in values if name.endswith("dropout")}
    assert values[only] > 0
    model = build_model(model_config(values | dropouts | {only: values[only]}))
    model.to_empty(device="cpu")
    randomize(model)
    tokens = tokens_and_labels()[0][:1]
    with torch.no_grad():
        seen = [
            model.train(trains)(tokens, places(LENGTH, KEYS[n : n + 1]))
            for trains, n in ((False, 0), (True, 0), (True, 1))
        ]
    assert all(
        (a - b).abs().max() > 1e-3
        for a, b in ((seen[0], seen[1]), (seen[1], seen[2]), (seen[0], seen[2]))
    )
    assert torch.equal(seen[0], model.eval()(tokens))


KEYS = torch.arange(11, 15) * 7919


def places(
    length: int, keys: Tensor | None = None, documents: Tensor | None = None
) -> SequenceInfo:
    index = torch.arange(length)[None]
    return SequenceInfo(index, index, documents, keys)


def dropped(module: Dropout, x: Tensor, keys: Tensor | None = KEYS, ranks: int = 1) -> Tensor:
    """`x` may be one of `ranks` pieces along dimension 1."""
    # Tokens of hidden states, which ranks share; queries of probabilities, which each has.
    length = x.shape[2] if module.over_heads else x.shape[1] * ranks
    return module.train()(x, places(length, keys))


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    x = torch.ones(4, 64, 256)
    found = dropped(Dropout(0.3, "a"), x)
    # One rounding of fp32.
    assert found.unique().tolist() == pytest.approx([0.0, 1 / 0.7], rel=1e-7)
    # 65,536 draws: four standard deviations √(0.3·0.7/n) of each share.
    shares = (found == 0).double().mean((1, 2))
    assert (shares - 0.3).abs().max().item() < 4 * (0.21 / 65536) ** 0.5


def test_dropout_masks_differ_between_samples_and_sites_and_repeat() -> None:
    x = torch.ones(4, 64, 256)
    first, again, elsewhere = (dropped(Dropout(0.5, site), x) != 0 for site in ("a", "a", "b"))
    assert torch.equal(first, again)
    # Independent fair masks agree on half of 65,536 places, within five standard deviations of
    # 0.5/256.
    for a, b in [(first[0], first[1]), (first[2], first[3]), (first, elsewhere)]:
        assert (a == b).double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / 256)


@pytest.mark.parametrize(
    "shape", [(4, 8, 6), (4, 8, 6, 6)], ids=["hidden [B,T,D]", "probabilities [B,H,T,T]"]
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_dropout_does_not_depend_on_how_the_input_is_cut(
    shape: tuple[int, ...], ranks: int
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = dropped(Dropout(0.4, "a", over_heads=len(shape) == 4), x)
    pieces = []
    for rank, piece in enumerate(x.chunk(ranks, 1)):
        module = Dropout(0.4, "a", over_heads=len(shape) == 4)
        module.shard = (rank, ranks)
        pieces.append(dropped(module, piece, ranks=ranks))
    assert torch.equal(torch.cat(pieces, 1), whole)
    rows = torch.tensor([2, 0])  # other micro-batches
    assert torch.equal(
        dropped(Dropout(0.4, "a", len(shape) == 4), x[rows], KEYS[rows]), whole[rows]
    )


def test_dropout_passes_the_gradient_of_what_it_kept() -> None:
    x = torch.randn(4, 8, 6, dtype=torch.bfloat16).requires_grad_()
    found = dropped(Dropout(0.4, "a"), x)
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    scale = torch.tensor(1 / 0.6).bfloat16()
    assert torch.equal(x.grad, dropped(Dropout(0.4, "a"), torch.ones_like(x)))
    assert set(x.grad.unique().tolist()) == {0.0, scale.item()}


def test_dropout_can_be_off() -> None:
    x = torch.randn(4, 8, 2)
    assert dropped(Dropout(0.0, "a"), x) is x
    assert dropped(Dropout(0.5, "a"), x, None) is x
    assert Dropout(0.5, "a").eval()(x, places(8, KEYS)) is x


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_eager_attention_equals_torch(packed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 9, 4 + 2 + 2, 8, generator=generator)
    documents = torch.tensor([[0] * 4 + [1] + [2] * 4, [0] * 8 + [1]]) if packed else None
    where = places(9, KEYS[:2], documents)
    attention, dropping = (
        CoreAttention(),
        CoreAttention(Dropout(1e-9, "a", over_heads=True)).train(),
    )
    wanted = attention(qkv, 4, 2, where)
    # Both in fp32, sums of at most nine values near 1.
    torch.testing.assert_close(dropping(qkv, 4, 2, where), wanted, rtol=0, atol=2e-6)
    other = qkv.clone()
    other[:, 8, 4:] = 9.0
    assert torch.equal(attention(other, 4, 2, where)[:, :8], wanted[:, :8])
    if packed:  # each document alone gives the same
        for row, pieces in enumerate(
            [(slice(0, 4), slice(4, 5), slice(5, 9)), (slice(0, 8), slice(8, 9))]
        ):
            for piece in pieces:
                found = attention(qkv[row : row + 1, piece], 4, 2, places(piece.stop - piece.start))
                torch.testing.assert_close(found[0], wanted[row, piece], rtol=0, atol=2e-6)


def test_loss_of_each_token() -> None:
    tokens, labels = tokens_and_labels()
    logits = torch.randn(*tokens.shape, 99, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = CrossEntropy()(logits, labels)
    assert found.dtype == torch.float32
    wanted = -logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    # The same fp32 formula; logits of a few units round at 1e-6.
    torch.testing.assert_close(found, wanted.masked_fill(labels == IGNORE, 0.0), rtol=0, atol=2e-6)
