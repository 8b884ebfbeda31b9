"""Supervised finetuning, DPO and heads for classes: loss, metrics and every gradient of a step on
each layout, against plain statements of them on transformers' models, which see each row alone."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chats import write_rows, write_tokenizer
from megalite.checkpoint.load import from_hf
from megalite.comm.mesh import Mesh, make_mesh
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.formats import CLASSES, Format, Settings
from megalite.data.indexed import IndexedDataset
from megalite.data.mixture import build_mixtures
from megalite.data.preprocess_rows import preprocess_rows
from megalite.models import weight_table
from megalite.plan import make_plan
from megalite.training.parts import build, forward_backward
from megalite.training.reference import prepare_references
from megalite.training.run import Run, make_loader
from megalite.training.teacher_logits import make_teacher_logits
from ranks import run_ranks

BATCH, LENGTH, BETA, SMOOTHING, CHUNK = 4, 96, 0.3, 0.1, 20
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tensor 2": (2, {"tensor": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
    "pipeline 2, zero bubble": (2, {"pipeline": 2, "schedule": "zero_bubble"}),
    "data 2, ZeRO-1": (2, {"zero_stage": 1}),
    "data 2, ZeRO-2": (2, {"zero_stage": 2}),
    "context 2": (2, {"context": 2}),
}
LABELS = ("place", "greeting", "number")
DPO = {"name": "dpo", "beta": BETA, "label_smoothing": SMOOTHING}
TEMPERATURE, WEIGHT, TEACHER = 1.5, 0.7, "teacher"
DISTILL = {"name": "distill", "temperature": TEMPERATURE, "weight": WEIGHT, "teacher": TEACHER}
TOP, SEED = 20, 5
HIDDEN = [
    {"student": 0, "teacher": 1},
    {"student": 1, "teacher": 2, "loss": "cosine", "weight": 0.5},
]
KEPT = {"teacher_logits": "teacher-logits"}
# Format of the rows, objective, transformers' class of the model.
OBJECTIVES: dict[str, tuple[Format, dict[str, Any], str]] = {
    "sft": ("chat", {}, "LlamaForCausalLM"),
    "dpo": ("preference", DPO, "LlamaForCausalLM"),
    "distill": ("chat", DISTILL, "LlamaForCausalLM"),
    "distill in chunks": ("chat", DISTILL, "LlamaForCausalLM"),
    "distill, reverse": ("chat", DISTILL | {"loss": "reverse_kl"}, "LlamaForCausalLM"),
    "distill, jsd in chunks": ("chat", DISTILL | {"loss": "jsd"}, "LlamaForCausalLM"),
    "distill, hidden": ("chat", DISTILL | {"hidden": HIDDEN}, "LlamaForCausalLM"),
    "distill, kept": ("chat", DISTILL | KEPT, "LlamaForCausalLM"),
    "distill, kept reverse in chunks": (
        "chat",
        DISTILL | KEPT | {"loss": "reverse_kl"},
        "LlamaForCausalLM",
    ),
    "distill, kept jsd": ("chat", DISTILL | KEPT | {"loss": "jsd"}, "LlamaForCausalLM"),
    "classes": ("classification", {}, "LlamaForSequenceClassification"),
    "classes-gpt2": ("classification", {}, "GPT2ForSequenceClassification"),
    "labels": ("labels", {}, "LlamaForTokenClassification"),
    "labels-gpt2": ("labels", {}, "GPT2ForTokenClassification"),
}

HEAD = {"id2label": dict(enumerate(LABELS)), "label2id": {name: n for n, name in enumerate(LABELS)}}
MODEL: dict[str, dict[str, Any]] = {
    "Llam": {
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.2, **HEAD,
    },
    "GPT2": {
        "vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "initializer_range": 0.2,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, **HEAD,
    },
}  # fmt: skip


def config_of(root: Path, objective: str, layout: str) -> Config:
    asked = dict(OBJECTIVES[objective][1])
    if "teacher" in asked:
        asked["teacher"] = str(root / TEACHER)
    if "teacher_logits" in asked:
        asked["teacher_logits"] = str(root / f"{objective}-said")
    return parse_config(
        {
            "run": {"name": f"{objective} {layout}".replace(" ", "-").replace(",", ""), "dir": str(root / "runs")},
            "model": {"hf": str(root / f"{objective}-start")},
            "data": {"train": [{"path": str(root / objective)}], "seq_length": LENGTH, "document_mask": True},
            "objective": asked,
            "parallel": {"bucket_mb": 0.01, **LAYOUTS[layout][1]},
            "train": {
                "steps": 2, "global_batch_size": BATCH, "micro_batch_size": 1, "precision": "fp32",
                "loss_chunk": CHUNK if "in chunks" in objective else None,
            },
            "optimizer": {"lr": 1e-3},
        }
    )  # fmt: skip


def step_on_rank(
    rank: int, world_size: int, root: Path, layouts: list[str]
) -> list[dict[str, Any]]:
    found = []
    for layout in layouts:
        plan = make_plan(
            config := config_of(root, "sft", layout), weight_table(config.model), world_size
        )
        # Making process groups takes longer than a step.
        mesh = make_mesh(plan, torch.device("cpu"))
        found += [
            step(root, objective, layout, mesh)
            for objective in OBJECTIVES
            if fits(objective, layout)
        ]
    return found


def fits(objective: str, layout: str) -> bool:
    """Whether it is run. Heads for classes, and divergences, differ from others at the model's end
    alone."""
    if "hidden" in OBJECTIVES[objective][1]:
        return layout in ("one process", "tensor 2", "context 2", "data 2, ZeRO-2")
    if OBJECTIVES[objective][0] in CLASSES or objective.startswith("distill, "):
        return layout in ("one process", "tensor 2", "pipeline 2", "context 2")
    return True


def step(root: Path, objective: str, layout: str, mesh: Mesh) -> dict[str, Any]:
    """What a step finds where the model has moved on from the one that the run started from."""
    config = config_of(root, objective, layout)
    table = weight_table(config.model)
    plan = make_plan(config, table, LAYOUTS[layout][0])
    parts, data = build(config, plan, mesh), build_mixtures(config)
    run = Run(config, plan, mesh, None)
    if objective == "dpo":
        prepare_references(run, parts, data)
    # Projections are in no folder, and drawn from the seed.
    parts.engine.load(from_hf(root / f"{objective}-later", table, config.model, mesh, SEED))
    with make_loader(data["train"], run) as loader:
        batches = config.objective.batches(loader, run, parts)
        found = forward_backward(parts, next(batches), mesh, seed=0)
    owners = {
        weight.name: plan.rank_at(
            next(s.index for s in plan.stages if s.holds(weight.place)) % plan.pipeline, 0, 0
        )
        for weight in table
    }
    grads = parts.engine.gather("grad", owners)
    by_hf = {hf: x for w in table if w.name in grads for hf, x in w.to_hf(grads[w.name]).items()}
    return {"metrics": {name: x.item() for name, x in found.items()}, "grads": by_hf}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random models, and rows, of each objective."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("tune")
    tokenizer = write_tokenizer(root / "tokenizer")
    for objective, (_, _, architecture) in OBJECTIVES.items():
        for seed, name in enumerate(("start", "later")):
            torch.manual_seed(seed)
            model = getattr(transformers, architecture)
            model(model.config_class(**MODEL[architecture[:4]])).save_pretrained(
                root / f"{objective}-{name}"
            )
    torch.manual_seed(2)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3}
    wide = transformers.LlamaConfig(**MODEL["Llam"] | sizes)
    transformers.LlamaForCausalLM(wide).save_pretrained(root / TEACHER)
    rng = random.Random(0)

    def words(most: int) -> str:
        return " ".join(
            rng.choice(["hello", "world", "Paris", "two", "ünï"])
            for _ in range(rng.randint(1, most))
        )

    turns = [
        [turn for _ in range(rng.randint(1, 2)) for turn in ({"role": "user", "content": words(3)},
                                                             {"role": "assistant", "content": words(3)})]
        for _ in range(24)
    ]  # fmt: skip
    pairs = [
        {"prompt": words(3), "chosen": " " + words(4), "rejected": f" {words(2)} {n}"}
        for n in range(24)
    ]
    texts = [{"text": words(6), "label": rng.choice(LABELS)} for _ in range(24)]
    tagged = [
        {"tokens": (found := words(6).split()), "labels": [rng.choice(LABELS) for _ in found]}
        for _ in range(24)
    ]
    rows = {
        "chat": [{"messages": turn} for turn in turns], "preference": pairs, "classification": texts, "labels": tagged
    }  # fmt: skip
    for objective, (kind, _, _) in OBJECTIVES.items():
        file = write_rows(root / f"{objective}.jsonl", rows[kind])
        labels = LABELS if kind in CLASSES else ()
        preprocess_rows(
            [str(file)], root / objective, Settings(kind, str(tokenizer), labels=labels)
        )
        if "teacher_logits" in OBJECTIVES[objective][1]:
            make_teacher_logits(config_of(root, objective, "one process"), TOP, "fp32")
    return root


@pytest.fixture(scope="module")
def results(root: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for ranks, runner in ((1, lambda n, f, *rest: [f(0, n, *rest)]), (2, run_ranks)):
        layouts = [name for name, (count, _) in LAYOUTS.items() if count == ranks]
        of_ranks = runner(ranks, step_on_rank, root, layouts)
        keys = [
            (objective, layout)
            for layout in layouts
            for objective in OBJECTIVES
            if fits(objective, layout)
        ]
        for number, key in enumerate(keys):
            parts = [results[number] for results in of_ranks]
            assert all(part["metrics"] == parts[0]["metrics"] for part in parts), (
                "every rank knows them"
            )
            grads = {name: x for part in parts for name, x in part["grads"].items()}
            found[key] = {"metrics": parts[0]["metrics"], "grads": grads}
    return found


def log_probability(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Of what is learned, given what comes before: of a row alone."""
    logits = model(ids[None], use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0][mask[1:] > 0].sum()


def distilled(
    root: Path,
    model: Any,
    rows: list[tuple[Tensor, Tensor]],
    kind: str,
    top: int | None,
    projections: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Means over the tokens that are learned, from whole logits of each row alone. With `top`, of
    the teacher's so many likeliest tokens, and all others as one."""
    import transformers

    teacher = transformers.LlamaForCausalLM.from_pretrained(root / TEACHER).eval()
    crosses, divergences, hidden = [], [], []
    outputs = [outputs_of(each) for each in (model, teacher)]
    for ids, mask in rows:
        logits = model(ids[None], use_cache=False).logits[0, :-1][mask[1:] > 0]
        with torch.no_grad():
            t = F.log_softmax(
                teacher(ids[None], use_cache=False).logits[0, :-1][mask[1:] > 0] / TEMPERATURE, -1
            )
        s = F.log_softmax(logits / TEMPERATURE, -1)
        if top:
            order = t.argsort(-1, descending=True)
            t, s = (
                torch.cat((x[:, :top], x[:, top:].logsumexp(-1, keepdim=True)), -1)
                for x in (t.gather(-1, order), s.gather(-1, order))
            )
        m = ((s.exp() + t.exp()) / 2).log()
        if projections:
            hidden.append(unlike(*outputs, projections, mask[1:] > 0))
        crosses.append(F.cross_entropy(logits, ids[1:][mask[1:] > 0], reduction="none"))
        pairs = {"forward_kl": [(t, s)], "reverse_kl": [(s, t)], "jsd": [(s, m), (t, m)]}[kind]
        divergences.append(sum((p.exp() * (p - q)).sum(-1) / len(pairs) for p, q in pairs))
    cross, diverged = torch.cat(crosses).mean(), torch.cat(divergences).mean()
    loss = WEIGHT * TEMPERATURE**2 * diverged + (1 - WEIGHT) * cross
    found = {"loss": loss, "cross_entropy": cross, "divergence": diverged}
    return found | ({"layer_loss/hidden": torch.cat(hidden, 1).mean(1)} if hidden else {})


def outputs_of(model: Any) -> dict[int, Tensor]:
    """Outputs of the layers of a model of transformers, after each forward pass."""
    found: dict[int, Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda module, inputs, out, number=number: found.update({number: out[0]})
        )
    return found


def unlike(
    student: dict[int, Tensor],
    teacher: dict[int, Tensor],
    projections: dict[str, Tensor],
    is_learned: Tensor,
) -> Tensor:
    """What pairs of layers differ by at the tokens that are learned: [pairs, tokens]."""
    x, y = (
        student[n][:-1][is_learned] @ projections[f"distill.layers.{n}.weight"].T for n in (0, 1)
    )
    wanted = [teacher[n][:-1][is_learned].detach() for n in (1, 2)]
    return torch.stack((
        (x - wanted[0]).square().mean(-1), 1 - F.cosine_similarity(y, wanted[1], dim=-1)
    ))  # fmt: skip


def loss_of_classes(model: Any, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """transformers' own losses of each row, of which each label weighs the same."""
    total, count = torch.zeros(()), 0
    for ids, mask in rows:
        of_text = "Sequence" in type(model).__name__
        labels = mask[-1:] - 1 if of_text else torch.where(mask > 0, mask - 1, -100)[None]
        num = int((labels >= 0).sum())
        total = total + model(ids[None], labels=labels, use_cache=False).loss * num
        count += num
    return total / count


@cache
def reference(root: Path, objective: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    import transformers

    kind, _, architecture = OBJECTIVES[objective]
    load = getattr(transformers, architecture).from_pretrained
    start, later = (load(root / f"{objective}-{name}").eval() for name in ("start", "later"))
    mixture = build_mixtures(config_of(root, objective, "one process"))["train"]
    assert mixture is not None
    data = IndexedDataset(root / objective)
    assert data.mask is not None
    _, samples = mixture.order.locate(range(BATCH))
    pieces = mixture.sources[0].pieces(samples, True)
    rows = [
        (
            torch.tensor(data.tokens[a : a + n].astype(int)),
            torch.tensor(data.mask[a : a + n].astype(int)),
        )
        for a, n in zip(pieces.start.tolist(), pieces.length.tolist(), strict=True)
    ]
    assert len(rows) > 2 * BATCH, "samples hold several rows"
    if kind in CLASSES:
        found = {"loss": loss_of_classes(later, rows)}
        found["loss"].backward()
        return {"loss": found["loss"].item()}, {n: p.grad for n, p in later.named_parameters()}
    asked = OBJECTIVES[objective][1]
    if asked.get("name") == "distill":
        top = TOP if "teacher_logits" in asked else None
        model = config_of(root, objective, "one process").model
        projections = {
            weight.hf[0]: weight.initial_rows(SEED, 0, weight.shape[0], None)
            .view(weight.shape)
            .requires_grad_()
            for weight in weight_table(model)
            if weight.hf[0].startswith("distill.")
        }
        found = distilled(root, later, rows, asked.get("loss", "forward_kl"), top, projections)
        total = found["loss"]
        if projections:
            of_pairs = found["layer_loss/hidden"]
            total = total + of_pairs[0] + 0.5 * of_pairs[1]
            found["layer_loss/hidden"] = of_pairs.mean()
        total.backward()
        named = [*later.named_parameters(), *projections.items()]
        return {name: x.item() for name, x in found.items()}, {n: p.grad for n, p in named}
    of_rows = torch.stack([log_probability(later, *row) for row in rows])
    if objective == "sft":
        found = {"loss": -of_rows.sum() / sum(int(mask.sum()) for _, mask in rows)}
    else:
        with torch.no_grad():
            wanted = torch.stack([log_probability(start, *row) for row in rows])
        chosen, rejected = (BETA * (of_rows - wanted)).view(-1, 2).unbind(1)
        margin = chosen - rejected
        loss = -(1 - SMOOTHING) * F.logsigmoid(margin) - SMOOTHING * F.logsigmoid(-margin)
        found = {
            "loss": loss.mean(), "reward_chosen": chosen.mean(), "reward_rejected": rejected.mean(),
            "reward_margin": margin.mean(), "reward_accuracy": (margin > 0).float().mean(),
        }  # fmt: skip
        assert 0 < found["reward_accuracy"] < 1
    found["loss"].backward()
    return {name: x.item() for name, x in found.items()}, {
        n: p.grad for n, p in later.named_parameters()
    }


@pytest.mark.parametrize(
    ("objective", "layout"),
    [(o, layout) for o in OBJECTIVES for layout in LAYOUTS if fits(o, layout)],
)
def test_a_step_is_that_of_the_plain_statement(
    objective: str, layout: str, root: Path, results: dict[tuple[str, str], dict[str, Any]]
) -> None:
    found = results[objective, layout]
    metrics, grads = reference(root, objective)
    assert found["metrics"] == pytest.approx(metrics, rel=1e-5)
    assert found["grads"].keys() == grads.keys()
    for name, grad in grads.items():
        # The project's bound for every layout: fp32 sums in another order.
        error = ((found["grads"][name] - grad).norm() / grad.norm()).item()
        assert error <= 1e-5, f"gradient of {name} is off by {error:.1e}"
