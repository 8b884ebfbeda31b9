"""The training loop. Pretraining and finetuning on one process or on a thousand are this file, read from top to
bottom."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from megalite.checkpoint.export import write_extras
from megalite.checkpoint.load import from_checkpoint, from_hf, from_seed
from megalite.checkpoint.resume import find_checkpoint, read_train_state
from megalite.checkpoint.save import Saver
from megalite.checkpoint.tensors import CheckpointError
from megalite.config import Config
from megalite.counter_random import random_bits
from megalite.data.checks import check_same_everywhere, check_vocabulary
from megalite.data.dataset import Mixture, build_mixtures
from megalite.data.loader import Loader, MicroBatch
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.engine.native import NativeEngine, ReadState
from megalite.keys import key_of
from megalite.mesh import Launch, Mesh, make_mesh
from megalite.models import build_model, weight_table
from megalite.models.layers import IGNORE
from megalite.observe.recorder import Recorder
from megalite.observe.throughput import Meter, model_flops_per_token
from megalite.optim.schedule import learning_rate
from megalite.parallel.apply import apply_parallelism
from megalite.parallel.collectives import all_reduce
from megalite.plan import Plan, make_plan

Data = dict[str, Mixture | None]


def train(config: Config) -> None:
    """Train as the config says, on the ranks this process was started among. Resumes by itself.

    Raises ConfigError, DataError or CheckpointError, before the first step where something asked for cannot be done."""
    launch = Launch.from_environment()
    plan = make_plan(config, weight_table(config.model), launch.world_size)
    data = build_mixtures(config.data, config.train.seed)
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    check_vocabulary(config, tokenizer)
    launch.join()
    mesh = make_mesh(plan, launch.device)
    check_same_everywhere(config, data, mesh)
    folder = config.run.folder
    checkpoint, warnings = find_checkpoint(folder / "checkpoints", config.checkpoint.resume, mesh)
    state = read_train_state(checkpoint) if checkpoint else {"step": 0, "data": {"samples": 0}, "wandb_id": None}
    run = Run(config, plan, mesh, open_recorder(config, plan, state, tokenizer) if mesh.world.rank == 0 else None)
    run.say(*warnings)
    status = "failed"
    try:
        train_from(run, data, checkpoint, state)
        status = "finished" if run.last_step == config.train.steps else "stopped"
    except KeyboardInterrupt:
        status = "stopped"
        raise
    finally:
        if run.recorder:
            run.recorder.close(status)


@dataclass(frozen=True)
class Run:
    """What every part of a run needs to know."""

    config: Config
    plan: Plan
    mesh: Mesh
    recorder: Recorder | None
    """On rank 0."""

    def say(self, *lines: str) -> None:
        for line in lines if self.recorder else ():
            self.recorder.message(line)  # type: ignore[union-attr]

    @property
    def last_step(self) -> int:
        return min(self.config.train.stop_at or self.config.train.steps, self.config.train.steps)

    def due(self, step: int, every: int) -> bool:
        return step == self.last_step or (every > 0 and step % every == 0)


def open_recorder(config: Config, plan: Plan, state: dict[str, Any], tokenizer: Tokenizer | None) -> Recorder:
    """Makes the run folder, with the exact config and the tokenizer in it."""
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    if tokenizer:
        tokenizer.save(folder / "tokenizer")
    layout = {"data": plan.data, "tensor": plan.tensor, "sequence": plan.sequence, "zero": plan.zero_stage}
    return Recorder(
        config,
        folder,
        num_params=plan.num_params,
        start_step=state["step"],
        wandb_id=state["wandb_id"],
        layout=layout,
    )


def train_from(run: Run, data: Data, checkpoint: Path | None, state: dict[str, Any]) -> None:
    config, folder = run.config, run.config.run.folder
    model, engine = build(config, run.plan, run.mesh)
    engine.load(initial_state(config, run.mesh, checkpoint), state["step"])
    assert data["train"] is not None
    loader = make_loader(data["train"], run, start_sample=state["data"]["samples"])
    if checkpoint:
        loader.check_state(state["data"])
    tokenizer = load_tokenizer(folder / "tokenizer") if config.data.tokenizer and run.recorder else None
    saver = Saver(
        folder / "checkpoints",
        config.checkpoint.keep,
        weight_table(config.model),
        run.mesh,
        engine,
        lambda path: write_extras(path, config, tokenizer),
    )
    done = False
    try:
        run_steps(run, model, engine, loader, data, saver, state["step"])
        done = True
    finally:
        loader.close()
        saver.wait(abandon=not done)
        run.say(*saver.news())
    if saver.error:  # an earlier save that failed is made good by a later one, but the last one has none after it
        raise CheckpointError(saver.error)


def initial_state(config: Config, mesh: Mesh, checkpoint: Path | None) -> ReadState:
    """Where weights and optimizer state come from: a checkpoint to go on from, a model to start from, or the seed."""
    weights = weight_table(config.model)
    if checkpoint:
        return from_checkpoint(checkpoint, weights, config.model, mesh.tensor)
    if config.model.hf:
        return from_hf(config.model.hf, weights, config.model, mesh.tensor)
    return from_seed(config.train.seed, mesh.tensor, mesh.device)


def run_steps(
    run: Run, model: nn.Module, engine: NativeEngine, loader: Loader, data: Data, saver: Saver, start_step: int
) -> None:
    config, mesh, recorder = run.config, run.mesh, run.recorder
    meter = Meter(model_flops_per_token(config), mesh.world.size, mesh.device, engine.dtype)
    for step in range(start_step + 1, run.last_step + 1):
        lr = learning_rate(step, config.train.steps, config.optimizer)
        loss = forward_backward(model, engine, next(loader), mesh, config.train.seed)
        grad_norm = engine.step(lr)
        if recorder:
            record = {"step": step, "loss": loss.item(), "lr": lr, "grad_norm": grad_norm.item()}
            record["tokens"] = loader.samples * config.data.seq_length
            recorder.step(record | meter.tick(run.plan.tokens_per_step))
        if run.due(step, config.observe.eval_every):
            evaluate(run, model, data, "valid", step)
        if step == config.train.steps:
            evaluate(run, model, data, "test", step)
        if run.due(step, config.checkpoint.every):
            wandb_id = recorder.wandb_id if recorder else None
            saver.save(step, {"step": step, "data": loader.state(), "wandb_id": wandb_id})
        run.say(*saver.news())
        meter.start()


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
    tokens, labels = (x.to(mesh.device) for x in (micro.tokens, micro.labels))
    return model.loss(model(tokens, dropout_keys), labels)  # type: ignore[operator]


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, data: Data, split: str, step: int) -> None:
    """Record the mean loss over the first global batches of a split, the same ones every time, where there is one."""
    mixture, mesh = data[split], run.mesh
    if mixture is None:
        return
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    model.eval()
    # A split smaller than a batch is gone through more than once rather than refused.
    available = sum(source.num_samples for source in mixture.sources) // run.config.train.global_batch_size
    with make_loader(mixture, run) as loader:
        for _ in range(max(1, min(run.config.observe.eval_batches, available))):
            for micro in next(loader):
                sums[0] += token_losses(model, micro, mesh).sum()
                sums[1] += (micro.labels != IGNORE).sum()
    total, count = all_reduce(sums, mesh.data).tolist()
    loss = total / max(count, 1.0)
    if run.recorder:
        perplexity = math.exp(min(loss, 700.0))  # exp overflows beyond
        run.recorder.evaluation({"step": step, f"{split}_loss": loss, f"{split}_perplexity": perplexity})


def make_loader(mixture: Mixture, run: Run, start_sample: int = 0) -> Loader:
    train, data = run.config.train, run.mesh.data
    return Loader(
        mixture,
        train.global_batch_size,
        train.micro_batch_size,
        data.rank,
        data.size,
        start_sample,
        vocab_size=run.config.model.vocab_size,
    )
