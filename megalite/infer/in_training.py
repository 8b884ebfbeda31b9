"""Tasks evaluated during training: on the ranks as they are, by the model as it is being trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.comm.collectives import all_gather, all_reduce
from megalite.comm.mesh import ALONE, Mesh
from megalite.config import Config
from megalite.data.tokenizer import Tokenizer
from megalite.infer.cache import CachedPlaces, turning_point
from megalite.infer.evaluate import load_harness
from megalite.infer.generate import Generator
from megalite.models.layers import Places
from megalite.parallel.context import zigzag
from megalite.parallel.stage import Inputs, Stage
from megalite.runtime.activity import NOW

if TYPE_CHECKING:
    from megalite.parallel.pipeline import Pipeline

WIDTHS = 32
"""Rows are filled up to a multiple of it: fewer shapes."""


class TasksInTraining:
    def __init__(self, config: Config, tokenizer: Tokenizer):
        """Loads the tasks and goes through all of them but the model's part, so that what cannot work is known before
        the first step. Raises ConfigError or DataError."""
        asked, self._config, self._tokenizer = config.observe.tasks, config, tokenizer
        self._harness = load_harness()
        self._tasks = self._harness.load_tasks(asked.names, asked.include_path, asked.limit)
        model: Any = SimpleNamespace(
            capacity=config.model.max_positions, vocab_size=config.model.vocab_size, device=torch.device("cpu")
        )
        self._tasks.rehearse(self._generator(model))
        self._fewest = self._tasks.fewest

    def measure(self, stages: Sequence[Stage], pipeline: Pipeline | None, mesh: Mesh) -> dict[str, float]:
        """The numbers, as `numbers_of` names them, on the first data rank; all ranks call it."""
        generator = self._generator(TrainingModel(stages, pipeline, mesh, self._config))
        # With ZeRO-3 data ranks bring each other's weights, and can only go through the same documents.
        apart = self._config.parallel.zero_stage < 3 and self._fewest >= mesh.data.size
        model = self._harness.HarnessModel(generator, mesh.data if apart else ALONE)
        results = self._tasks.run(model, uncertainty=0)
        return self._harness.numbers_of(results) if results else {}

    def _generator(self, model: Any) -> Generator:
        end = self._tokenizer.eod_id
        return Generator(model, self._tokenizer, frozenset() if end is None else frozenset({end}))


class TrainingModel:
    """This rank's part of the model in training as a `batch.Predictor`. It has no cache of keys and values, whose
    memory training has other uses for: it keeps the tokens, and computes a sequence anew for each further one."""

    def __init__(self, stages: Sequence[Stage], pipeline: Pipeline | None, mesh: Mesh, config: Config):
        self._stages, self._pipeline, self._mesh = stages, pipeline, mesh
        self.vocab_size = config.model.vocab_size
        self.num_slots, self.capacity = config.train.micro_batch_size, config.model.max_positions
        self.turning_point, self.device = turning_point(config.model), mesh.device
        self._width = math.lcm(WIDTHS, 2 * mesh.context.size * mesh.tensor.size)
        self._tokens_SL = torch.zeros(self.num_slots, 1 + self.capacity, dtype=torch.int64, device=mesh.device)
        """Of each slot, written as a cache is: the first cell is never read."""

    def predict(self, tokens_BT: Tensor, places: CachedPlaces, last_B: Tensor) -> Tensor:
        """[B,V] fp32"""
        self._tokens_SL[places.slot_B[:, None], places.cell_BT] = tokens_BT
        place_B = places.position_BT.gather(1, last_B[:, None])[:, 0]
        rows_BT = self._tokens_SL[places.slot_B, 1 : 2 + int(place_B.max())]
        return self._run(rows_BT, places.whole_length, place_B)[:, 0]

    def logits(self, tokens_BT: Tensor, places: Places) -> Tensor:
        """[B,T,V] fp32"""
        return self._run(tokens_BT, places.whole_length)[:, : tokens_BT.shape[1]]

    @torch.no_grad()  # what a module may keep is still good for training, as it would not be in inference mode
    def _run(self, tokens_BT: Tensor, whole_length: int | Tensor | None, place_B: Tensor | None = None) -> Tensor:
        """Logits of every place, or of one in each row: [B,T or 1,V] fp32, on every rank."""
        mesh = self._mesh
        tokens_BT = F.pad(tokens_BT, (0, -tokens_BT.shape[1] % self._width))
        batch, width = tokens_BT.shape
        index_T = torch.arange(width, device=self.device)
        if mesh.context.size > 1:
            index_T = zigzag(width, mesh.context).to(self.device)
        # What fills a row up may stand where the model knows no positions.
        places = Places(index_T, index_T[None].clamp(max=self.capacity - 1), whole_length=whole_length)
        inputs = Inputs(tokens_BT[:, index_T], places)
        # Not compiled, which would be done again for each of many shapes.
        with torch.compiler.set_stance("force_eager"):
            if self._pipeline:
                outputs = self._pipeline.forward([inputs])
            else:
                NOW.do("forward")
                outputs = [self._stages[0](None, inputs)]
        logits = torch.zeros(batch, width if place_B is None else 1, self.vocab_size, device=self.device)
        for local_BTV in outputs:
            if place_B is not None:  # of which a context rank has those of some rows
                here = index_T == place_B[:, None]
                found = all_gather(local_BTV[here].float(), mesh.tensor, dim=1)
                logits[here.any(1), 0] = found[..., : self.vocab_size]
            else:
                logits[:, index_T] = all_gather(local_BTV.float(), mesh.tensor, dim=2)[..., : self.vocab_size]
        return all_reduce(all_reduce(logits, mesh.context), mesh.pipeline)
