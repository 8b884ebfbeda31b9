"""The training loop. Pretraining and finetuning on one process or on a thousand are this file, read from top to
bottom."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from megalite.checkpoint.export import write_extras
from megalite.checkpoint.load import from_checkpoint, from_hf, from_seed
from megalite.checkpoint.resume import find_checkpoint, read_train_state
from megalite.checkpoint.save import Saver
from megalite.config import Config
from megalite.counter_random import random_bits
from megalite.data.dataset import Mixture, build_mixtures
from megalite.data.indexed import DataError
from megalite.data.loader import Loader, MicroBatch
from megalite.data.tokenizer import load_tokenizer
from megalite.engine.native import NativeEngine, ReadState
from megalite.keys import key_of
from megalite.mesh import Launch, Mesh, make_mesh
from megalite.models import build_model, weight_table
from megalite.models.layers import IGNORE
from megalite.observe.recorder import Recorder
from megalite.observe.throughput import Meter, flops_per_token
from megalite.optim.schedule import learning_rate
from megalite.parallel.apply import apply_parallelism
from megalite.parallel.collectives import all_reduce
from megalite.plan import Plan, make_plan


def train(config: Config) -> None:
    """Train as the config says, on the ranks this process was started among. Resumes by itself.

    Raises ConfigError, DataError or CheckpointError before the first step when something asked for cannot be done."""
    launch = Launch.from_environment()
    weights = weight_table(config.model)
    plan = make_plan(config, weights, launch.world_size)
    data = build_mixtures(config.data, config.train.seed)
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    check_vocabulary(config, tokenizer)
    launch.join()
    mesh = make_mesh(plan, launch.device)
    folder = config.run.folder
    checkpoint, warnings = find_checkpoint(folder / "checkpoints", config.checkpoint.resume, mesh)
    state: dict[str, Any] = (
        read_train_state(checkpoint) if checkpoint else {"step": 0, "data": {"samples": 0}, "wandb_id": None}
    )

    model, engine = build(config, plan, mesh)
    engine.load(initial_state(config, mesh, checkpoint), state["step"])

    train_data = data["train"]
    assert train_data is not None
    loader = make_loader(train_data, config, mesh, start_sample=state["data"]["samples"])
    if checkpoint:
        loader.check_state(state["data"])
    saver = Saver(
        folder / "checkpoints", config.checkpoint.keep, weights, mesh, engine,
        lambda path: write_extras(path, config, tokenizer),
    )  # fmt: skip
    recorder = None
    if mesh.world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(config.to_yaml())
        recorder = Recorder(
            config, folder, num_params=plan.num_params, start_step=state["step"], wandb_id=state["wandb_id"],
            layout={"data": plan.data, "tensor": plan.tensor, "sequence": plan.sequence, "zero": plan.zero_stage},
        )  # fmt: skip
        for line in warnings:
            recorder.message(line)

    status = "failed"
    try:
        run_steps(config, plan, mesh, model, engine, loader, data["valid"], saver, recorder, state["step"])
        status = "finished" if last_step(config) == config.train.steps else "stopped"
    except KeyboardInterrupt:
        status = "stopped"
        raise
    finally:
        loader.close()
        saver.wait()
        if recorder:
            for line in saver.news():
                recorder.message(line)
            recorder.close(status)


def initial_state(config: Config, mesh: Mesh, checkpoint: Path | None) -> ReadState:
    """Where weights and optimizer state come from: a checkpoint to go on from, a model to start from, or the seed."""
    weights = weight_table(config.model)
    if checkpoint:
        return from_checkpoint(checkpoint, weights, config.model, mesh.tensor)
    if config.model.hf:
        return from_hf(config.model.hf, weights, config.model, mesh.tensor)
    return from_seed(config.train.seed, mesh.tensor, mesh.device)


def run_steps(
    config: Config,
    plan: Plan,
    mesh: Mesh,
    model: nn.Module,
    engine: NativeEngine,
    loader: Loader,
    valid: Mixture | None,
    saver: Saver,
    recorder: Recorder | None,
    start_step: int,
) -> None:
    steps, last = config.train.steps, last_step(config)
    meter = Meter(model_flops_per_token(config), mesh.world.size, mesh.device, engine.dtype)
    for step in range(start_step + 1, last + 1):
        lr = learning_rate(step, steps, config.optimizer)
        loss = forward_backward(model, engine, next(loader), mesh, config.train.seed)
        grad_norm = engine.step(lr)
        if recorder:
            record = {"step": step, "loss": loss.item(), "lr": lr, "grad_norm": grad_norm.item()}
            recorder.step(record | {"tokens": step * plan.tokens_per_step} | meter.tick(plan.tokens_per_step))
        if valid and (step == last or _due(step, config.observe.eval_every)):
            valid_loss = evaluate(model, valid, config, mesh)
            if recorder:
                perplexity = math.exp(min(valid_loss, 700.0))  # exp overflows beyond
                recorder.evaluation({"step": step, "valid_loss": valid_loss, "valid_perplexity": perplexity})
        if step == last or _due(step, config.checkpoint.every):
            wandb_id = recorder.wandb_id if recorder else None
            saver.save(step, {"step": step, "data": loader.state(), "wandb_id": wandb_id})
        if recorder:
            for line in saver.news():
                recorder.message(line)
        meter.start()


def last_step(config: Config) -> int:
    return min(config.train.stop_at or config.train.steps, config.train.steps)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def build(config: Config, plan: Plan, mesh: Mesh) -> tuple[nn.Module, NativeEngine]:
    """This rank's part of the model, and the engine that holds its weights (still zero)."""
    weights = weight_table(config.model)
    model = build_model(config.model)
    apply_parallelism(model, weights, mesh, plan.sequence)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    engine = NativeEngine(
        model, weights, mesh, config.optimizer,
        dtype=dtype, zero_stage=plan.zero_stage, sequence=plan.sequence, bucket_mb=config.parallel.bucket_mb,
    )  # fmt: skip
    return model, engine


def forward_backward(model: nn.Module, engine: NativeEngine, batch: list[MicroBatch], mesh: Mesh, seed: int) -> Tensor:
    """All of this rank's micro-batches of one global batch. Returns the mean loss of the global batch's tokens.

    Every token of the global batch weighs the same, however the valid ones are spread over ranks and micro-batches."""
    valid = sum((micro.labels != IGNORE).sum() for micro in batch)
    num_tokens = all_reduce(torch.as_tensor(valid, device=mesh.device), mesh.data).clamp(min=1)
    total = torch.zeros((), device=mesh.device)
    model.train()
    for number, micro in enumerate(batch, start=1):
        keys = random_bits(key_of(seed, "dropout"), micro.samples).to(mesh.device)
        loss = token_losses(model, micro, mesh, keys).sum() / num_tokens
        engine.backward(loss, last=number == len(batch))
        total += loss.detach()
    return all_reduce(total, mesh.data)


def token_losses(model: nn.Module, micro: MicroBatch, mesh: Mesh, dropout_keys: Tensor | None = None) -> Tensor:
    """Loss of every token of a micro-batch: [B,T] fp32, 0 where there is no label."""
    tokens, labels = (x.to(mesh.device, non_blocking=True) for x in (micro.tokens, micro.labels))
    return model.loss(model(tokens, dropout_keys), labels)  # type: ignore[operator]


@torch.no_grad()
def evaluate(model: nn.Module, mixture: Mixture, config: Config, mesh: Mesh) -> float:
    """Mean loss over the first global batches of the validation data, the same every time."""
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    model.eval()
    # A validation set smaller than a batch is gone through more than once rather than refused.
    available = sum(source.num_samples for source in mixture.sources) // config.train.global_batch_size
    with make_loader(mixture, config, mesh) as loader:
        for _ in range(max(1, min(config.observe.eval_batches, available))):
            for micro in next(loader):
                sums[0] += token_losses(model, micro, mesh).sum()
                sums[1] += (micro.labels != IGNORE).sum()
    total, count = all_reduce(sums, mesh.data).tolist()
    return total / max(count, 1.0)


def make_loader(mixture: Mixture, config: Config, mesh: Mesh, start_sample: int = 0) -> Loader:
    train = config.train
    return Loader(
        mixture, train.global_batch_size, train.micro_batch_size, mesh.data.rank, mesh.data.size, start_sample
    )


def model_flops_per_token(config: Config) -> float:
    model: Any = config.model
    # The embedding only looks up; the head multiplies, tied or not.
    matrices = sum(w.numel for w in weight_table(model) if w.name not in ("embedding.weight", "positions.weight"))
    head = model.vocab_size * model.hidden_size if model.tie_embeddings else 0
    attention_width = model.num_attention_heads * model.head_size
    return flops_per_token(matrices + head, model.num_layers, attention_width, config.data.seq_length)


def check_vocabulary(config: Config, tokenizer: Any) -> None:
    """Refuse token ids that the model has no embedding for, where the tokenizer or the data say how many there are."""
    known = {f"data.tokenizer {config.data.tokenizer}": tokenizer.vocab_size} if tokenizer else {}
    for source in (*config.data.train, *config.data.valid, *config.data.test):
        known |= _vocabulary_of(source.path)
    for what, size in known.items():
        if size > config.model.vocab_size:
            raise DataError(f"{what} has {size} token ids, but model.vocab_size = {config.model.vocab_size}")


def _vocabulary_of(prefix: Path) -> dict[str, int]:
    """What preprocessing noted beside the token files; Megatron's own files have no such note."""
    import json

    note = Path(f"{prefix}.json")
    return {str(prefix): json.loads(note.read_text())["vocab_size"]} if note.exists() else {}
