"""README.md of a checkpoint: the model card that the hub shows."""

from __future__ import annotations

from pathlib import Path

from megalite.config import Config, ModelConfig, names_of
from megalite.models import weight_table
from megalite.utils.counts import compact
from megalite.utils.hub import is_name, name_of

NAME = "README.md"
PIPELINES = {
    "causal": ("text-generation", "AutoModelForCausalLM"),
    "masked": ("fill-mask", "AutoModelForMaskedLM"),
    "seq2seq": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "classification": ("text-classification", "AutoModelForSequenceClassification"),
    "labels": ("token-classification", "AutoModelForTokenClassification"),
    "answers": ("question-answering", "AutoModelForQuestionAnswering"),
}
"""What the hub calls a task, and the class of transformers that opens its models."""


def write_card(folder: Path, config: Config) -> None:
    """Write the card of a checkpoint of a run: what was trained, on what, and how to open it. It is
    the same for all checkpoints of a run."""
    base = name_of(config.model.hf) if config.model.hf else None
    lines = _head(config.model, base, is_adapter=config.lora is not None)
    train, data, optimizer = config.train, config.data, config.optimizer
    lines += ["## Training", "", "| | |", "|---|---|"]
    facts = {
        "started from": base or "scratch",
        "objective": config.objective.name,
        "data": ", ".join(names_of(data.train)),
        "length of the run": f"{train.steps:,} steps, {compact(config.num_tokens)} tokens",
        "batch": f"{train.global_batch_size:,} sequences of {data.seq_length:,} tokens",
        "optimizer": f"{optimizer.name}, learning rate {optimizer.lr:g}, {optimizer.schedule.name} schedule, "
        f"weight decay {optimizer.weight_decay:g}",
        "precision": train.precision,
        "seed": str(train.seed),
    }
    if config.lora:
        facts["adapters"] = f"LoRA of rank {config.lora.rank}, alpha {config.lora.alpha:g}"
    # A bar would end the cell.
    lines += [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in facts.items()]
    lines += ["", "`config.yaml` has every setting.", ""]
    (folder / NAME).write_text("\n".join([*lines, *_open(config, base)]), encoding="utf-8")


def write_plain_card(folder: Path, model: ModelConfig) -> None:
    """Write the card of a model of which no more is known than its config."""
    (folder / NAME).write_text("\n".join(_head(model, None, False)), encoding="utf-8")


def _head(model: ModelConfig, base: str | None, is_adapter: bool) -> list[str]:
    """Return the metadata that the hub reads, and the first lines."""
    size = sum(weight.numel for weight in weight_table(model))
    metadata = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": PIPELINES[model.task][0],
        # The hub takes no other names than its own here: it refuses some, and for "base" links to
        # what somebody else calls so.
        "base_model": base if base and is_name(base) else None,
    }
    what = f"{model.preset or model.family}, {compact(size)} parameters, {model.num_layers} layers"
    return [
        "---",
        *(f"{key}: {value}" for key, value in metadata.items() if value),
        "tags: [megalite]",
        "---",
        "",
        f"# {what}",
        "",
        "Trained with megalite." if not is_adapter else "Adapters, trained with megalite.",
        "This card names no licence, nor what the data allows: say so here before you share it.",
        "",
    ]


def _open(config: Config, base: str | None) -> list[str]:
    """Return how the checkpoint is opened."""
    name = PIPELINES[config.model.task][1]
    if config.lora:
        return [
            "## Opening it",
            "",
            "```python",
            f"model = PeftModel.from_pretrained({name}.from_pretrained({base!r}), FOLDER)",
            "```",
            "",
        ]
    return ["## Opening it", "", "```python", f"model = {name}.from_pretrained(FOLDER)", "```", ""]
