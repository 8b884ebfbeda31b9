"""Each family over ranks, from a Hugging Face folder and back into one: weights bit for bit, the
loss and every gradient of a step those of transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalite.checkpoint.export import write_extras
from megalite.checkpoint.load import from_hf
from megalite.comm.mesh import Mesh, make_mesh
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.loader import MicroBatch
from megalite.models import weight_table
from megalite.parallel.stage import positions_of
from megalite.plan import make_plan
from megalite.training.parts import build, forward_backward
from ranks import cases_asked_for, run_ranks
from tiny_models import (
    CASES,
    MASKED,
    OWN_HEAD,
    SEQ2SEQ,
    as_stored,
    auto_class,
    randomize,
    size_of,
    source_of,
    their_logits,
)

BATCH, LENGTH = 2, 32
FAMILIES = [
    "bert-tanh", "deepseek_v3", "deepseek_v3-ungrouped", "mistral", "mixtral", "qwen2-window", "qwen2_moe-dense-among",
    "qwen3", "qwen3_moe-dense-among", "smollm3", "phi3", "phi3-short", "olmo2", "olmoe", "gpt_neox", "gpt_neox-serial",
    "gpt_oss", "gemma2", "gemma2-uncapped", "gemma3_text", "roberta", "modernbert", "modernbert-types", "t5-gated",
    "mt5",
]  # fmt: skip


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    context: int = 1
    documents: bool = False
    recompute: str = "none"
    schedule: str = "1f1b"

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.context

    def __str__(self) -> str:
        parts = [
            f"tp{self.tensor}",
            "sp" * self.sequence,
            f"pp{self.pipeline}",
            f"cp{self.context}",
        ]
        parts += ["documents" * self.documents, "" if self.recompute == "none" else self.recompute]
        return (
            "-".join(part for part in parts if part and part not in ("tp1", "pp1", "cp1"))
            or "alone"
        )


LAYOUTS = [
    Layout(documents=True, recompute="selective"),
    Layout(tensor=2),
    Layout(tensor=2, sequence=True, documents=True),
    Layout(pipeline=2, recompute="full"),
    Layout(pipeline=2, documents=True, schedule="zero_bubble"),
    Layout(context=2, documents=True),
]


def fits(case: str, layout: Layout) -> bool:
    """Whether it is run. The ring cannot cap scores, and the plan says so. What differs from its
    family only where layouts play no part, and a schedule that only norms could disturb, are run
    once."""
    if case in ("phi3-short", "gpt_neox-serial") and layout not in (LAYOUTS[0], Layout(tensor=2)):
        return False
    if CASES[case]["model_type"] in SEQ2SEQ and (layout.documents or layout.context > 1):
        return layout.schedule == "zero_bubble"  # without documents there
    if layout.schedule == "zero_bubble" and case not in (
        "qwen3",
        "qwen3_moe-dense-among",
        "olmo2",
        "gpt_neox",
        "bert-tanh",
    ):
        return False
    return layout.context == 1 or CASES[case].get("attn_logit_softcapping") is None


RUNS = [(case, layout) for case in FAMILIES for layout in LAYOUTS if fits(case, layout)]
KIN = [
    "falcon-groups",
    "gemma",
    "granite-biases",
    "llama-biases",
    "ministral",
    "olmo3-yarn",
    "phi-grouped",
    "starcoder2",
]
"""Families that are others' modules with a setting: biases, factors and norms are what tensor ranks
could have wrong, and ends of the model what pipelines could."""
RUNS += [(case, Layout(tensor=2, sequence=True)) for case in KIN]
RUNS += [
    (case, Layout(pipeline=2))
    for case in ("falcon-groups", "granite-biases", "phi-grouped", "starcoder2")
]


def batch() -> MicroBatch:
    """Some labels carry no loss, unevenly; documents begin anywhere, and one is a single token."""
    generator = torch.Generator().manual_seed(0)
    # RoBERTa counts no positions of tokens with the id of padding.
    tokens = torch.randint(2, 99, (BATCH, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[1, :7] = -100
    begins = torch.rand(BATCH, LENGTH, generator=generator) < 0.1
    begins[:, 11:13] = True
    return MicroBatch(tokens[:, :-1], labels, torch.arange(BATCH), begins.long().cumsum(1))


def config_of(folder: Path, layout: Layout) -> Config:
    learns = {"objective": {"name": "masked_lm"}} if folder.name.startswith(MASKED) else {}
    length, documents = LENGTH, layout.documents
    if is_seq2seq(folder):
        learns = {"objective": {"name": "seq2seq", "target_length": LENGTH}}
        length, documents = source_of(batch().tokens).shape[1], True
    return parse_config(
        {
            "run": {"name": "families", "dir": str(folder / "runs")},
            "model": {"hf": str(folder)},
            "data": {
                "train": [{"path": "unused"}], "seq_length": length, "document_mask": documents,
                "tokenizer": "unused",
            },
            **learns,
            "parallel": {
                "tensor": layout.tensor, "sequence": layout.sequence, "pipeline": layout.pipeline,
                "context": layout.context, "schedule": layout.schedule, "bucket_mb": 0.01,
            },
            "train": {
                "steps": 1, "global_batch_size": BATCH, "micro_batch_size": 1, "precision": "fp32",
                "recompute": layout.recompute,
            },
            "optimizer": {"lr": 1e-3},
        }
    )  # fmt: skip


def is_seq2seq(folder: Path) -> bool:
    return CASES[folder.name]["model_type"] in SEQ2SEQ


Result = dict[str, Any]
MESHES: dict[Layout, Mesh] = {}


def run_all(rank: int, world_size: int, root: Path, runs: list[tuple[str, Layout]]) -> list[Result]:
    return [run(root / case, layout) for case, layout in runs]


def run(folder: Path, layout: Layout) -> Result:
    """The loss of a step, and under Hugging Face names the weights before it and its gradients:
    this rank's part."""
    config = config_of(folder, layout)
    table = weight_table(config.model)
    plan = make_plan(config, table, layout.ranks)
    key = Layout(layout.tensor, False, layout.pipeline, layout.context)
    mesh = MESHES.setdefault(key, MESHES.get(key) or make_mesh(plan, torch.device("cpu")))
    parts = build(config, plan, mesh)
    parts.engine.load(from_hf(folder, table, config.model, mesh))
    owners = {
        weight.name: plan.rank_at(
            next(s.index for s in plan.stages if s.holds(weight.place)) % plan.pipeline, 0, 0
        )
        for weight in table
    }
    weights = parts.engine.gather("weight", owners)
    whole = batch()
    documents = whole.documents if layout.documents and not is_seq2seq(folder) else None
    source = {"source": source_of(whole.tokens)} if is_seq2seq(folder) else {}
    micro = [
        MicroBatch(*(x[row : row + 1] for x in (whole.tokens, whole.labels, whole.samples)),
                   None if documents is None else documents[row : row + 1], 
                   **{name: x[row : row + 1] for name, x in source.items()})
        for row in range(BATCH)
    ]  # fmt: skip
    loss = forward_backward(parts, micro, mesh, seed=0)["loss"].item()
    grads = parts.engine.gather("grad", owners)
    grads = {
        weight.name: grads[weight.name]
        for weight in table
        if weight.name in grads and not weight.by_counts
    }
    by_hf = {
        kind: {
            hf: x
            for weight in table
            if weight.name in found
            for hf, x in weight.to_hf(found[weight.name]).items()
        }
        for kind, found in (("weights", weights), ("grads", grads))
    }
    return {"loss": loss, **by_hf}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the random model of every case, as transformers saves it."""
    # Here: ranks, which need it not, load this file.
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("models")
    for case in (*FAMILIES, *KIN):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(**CASES[case])
        model = auto_class(config.model_type).from_config(config, attn_implementation="eager")
        randomize(model, own_head=case in OWN_HEAD)
        model.save_pretrained(root / case)
    return root


@pytest.fixture(scope="module")
def results(root: Path, request: pytest.FixtureRequest) -> dict[tuple[str, Layout], Result]:
    """Every run that is asked for, all of two ranks in one spawn."""
    asked = [
        (each["case"], each["layout"])
        for each in cases_asked_for(request, test_a_step_is_that_of_transformers)
    ]
    written_back = cases_asked_for(request, test_transformers_opens_what_is_written_back)
    asked += [(each["case"], each["layout"]) for each in written_back]
    found: dict[tuple[str, Layout], Result] = {}
    for ranks, runner in ((1, lambda n, f, *rest: [f(0, n, *rest)]), (2, run_ranks)):
        runs = [
            (case, layout)
            for case, layout in RUNS
            if layout.ranks == ranks and (case, layout) in asked
        ]
        of_ranks = runner(ranks, run_all, root, runs) if runs else []
        for number, key in enumerate(runs):
            parts = [results[number] for results in of_ranks]
            found[key] = {"loss": parts[0]["loss"]} | {
                kind: {name: x for part in parts for name, x in part[kind].items()}
                for kind in ("weights", "grads")
            }
    return found


@cache
def reference(folder: Path, documents: bool) -> tuple[float, dict[str, Tensor]]:
    """transformers' loss and gradients. From positions that begin again decoders see where
    documents do, but for gpt-oss; it and encoders are given a mask."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    model = auto_class(model_type).from_pretrained(folder, attn_implementation="eager").eval()
    whole = batch()
    assert whole.documents is not None
    positions = positions_of(whole.documents) if documents else None
    kept: dict[str, Any] = {"use_cache": False}
    if positions is not None and model_type == "roberta":
        positions = positions + 2
    if model_type in MASKED or model_type == "gpt_oss":
        apart = whole.documents[:, None, :, None] != whole.documents[:, None, None]
        if model_type == "gpt_oss":
            apart = apart | torch.ones(LENGTH, LENGTH).triu(1).bool()
        masks = {"full_attention": torch.zeros(apart.shape).masked_fill(apart, -torch.inf)}
        if model_type == "modernbert":  # half of the window lies to each side
            far = (
                torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
            ).abs() > model.config.local_attention // 2
            masks["sliding_attention"] = masks["full_attention"].masked_fill(far, -torch.inf)
        if model_type == "gpt_oss":
            far = torch.ones(LENGTH, LENGTH).tril(-model.config.sliding_window).bool()
            masks["sliding_attention"] = masks["full_attention"].masked_fill(far, -torch.inf)
        mask = masks if "sliding_attention" in masks else masks["full_attention"]
        kept = {"attention_mask": mask} if documents else {}
    if model_type not in SEQ2SEQ:
        kept["position_ids"] = positions
    logits = their_logits(model, whole.tokens, **kept)
    loss = F.cross_entropy(logits.flatten(0, 1), whole.labels.flatten())
    loss.backward()
    return loss.item(), as_stored(
        model.config.model_type, {name: p.grad for name, p in model.named_parameters()}
    )


@pytest.mark.parametrize(("case", "layout"), RUNS, ids=str)
def test_a_step_is_that_of_transformers(
    case: str, layout: Layout, root: Path, results: dict[tuple[str, Layout], Result]
) -> None:
    found = results[case, layout]
    stored = load_file(root / case / "model.safetensors")
    assert found["weights"].keys() == stored.keys()
    assert all(torch.equal(found["weights"][name], x) for name, x in stored.items())
    loss, grads = reference(root / case, layout.documents)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["grads"].keys() == grads.keys()
    for name, grad in grads.items():
        # The project's bound for every layout; fp32 sums in another order, about 1e-7 an operation,
        # give up to 3e-6. 0 for an expert that no token visits.
        error = (
            (found["grads"][name] - grad).norm() / size_of(name, grads).clamp(min=1e-12)
        ).item()
        assert error <= 1e-5, f"gradient of {name} is off by {error:.1e}"


CUT = [
    *((case, Layout(tensor=2)) for case in FAMILIES),
    *((case, Layout(tensor=2, sequence=True)) for case in KIN),
]


@pytest.mark.parametrize(("case", "layout"), CUT, ids=str)
def test_transformers_opens_what_is_written_back(
    case: str, layout: Layout, tmp_path: Path, root: Path, results: dict[tuple[str, Layout], Result]
) -> None:
    load = auto_class(CASES[case]["model_type"]).from_pretrained
    save_file(
        results[case, layout]["weights"], tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    write_extras(tmp_path, config_of(root / case, layout), None)
    ours, info = load(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    theirs = load(root / case, attn_implementation="eager")
    tokens = batch().tokens
    with torch.no_grad():
        assert torch.equal(their_logits(ours, tokens), their_logits(theirs, tokens))
    assert type(ours) is type(theirs)
    assert (
        json.loads((tmp_path / "config.json").read_text())["model_type"]
        == CASES[case]["model_type"]
    )
