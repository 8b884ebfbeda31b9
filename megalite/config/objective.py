"""The section `objective`: the loss, and what it asks of data, model and ranks. Its kinds are in
`megalite/training/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from megalite import registry
from megalite.config.section import Choice
from megalite.registry import Registry

if TYPE_CHECKING:
    from megalite.comm.mesh import Mesh
    from megalite.config.model import ModelConfig
    from megalite.config.schema import Config
    from megalite.data.dataset import SampleSource, Split
    from megalite.data.indexed import IndexedDataset
    from megalite.data.loader import Batches
    from megalite.data.mixture import Corruption, Mixture
    from megalite.data.stacks import Views
    from megalite.data.tokenizer import Tokenizer
    from megalite.parallel.stage import Stage
    from megalite.plan import Plan
    from megalite.training.hidden import HiddenMatch
    from megalite.training.objectives import Objective
    from megalite.training.parts import RankModel
    from megalite.training.run import Run


class Lengths(NamedTuple):
    """Holds how many tokens belong to a sample."""

    read: int
    """Tokens that are read for it."""
    source: int
    """Tokens that an encoder sees; 0 where there is none beside the decoder."""
    target: int
    """Tokens at which something is predicted."""


DataKind = Literal["text", "preference", "pairs", "seq2seq", "answers"]
"""Kind of data that an objective learns from: `preference` is pairs of answers, the chosen one
first, side by side in a sample; `pairs` likewise of texts that belong together; `seq2seq` is rows
of a source and its target."""


class ObjectiveConfig(Choice):
    """The loss that training minimises. A model with a classification head learns its classes, by
    `next_token`."""

    name: str = Field("next_token", description="Which objective.")

    KINDS: ClassVar[Registry[Any]] = registry.objectives
    DATA: ClassVar[DataKind] = "text"
    """Kind of data it trains on."""
    HAS_REFERENCE: ClassVar[bool] = False
    """Whether it compares with the frozen model of model.hf."""

    NEEDS: ClassVar[Literal["losses", "logits", "hidden_states", "final_states"]] = "losses"
    """What it needs of the last stage in training: each token's loss, the logits in vocabulary
    shards, the hidden states that the head takes, or those of the model without a head."""
    IN_CHUNKS: ClassVar[bool] = False
    """Whether it takes hidden states a few tokens at a time where train.loss_chunk asks for it."""

    def check(self, config: Config) -> None:
        """Raise ValueError, naming the setting, when the rest of a config does not go with this
        objective."""

    def predicted(self) -> float:
        """Return the share of the tokens of which the head is computed, about, as a mean over the
        run."""
        return 1.0

    def most_predicted(self) -> float:
        """Return what `predicted` is at most at any step, for which there must be memory."""
        return self.predicted()

    def frozen_model(self, config: Config) -> Path | None:
        """Return the Hugging Face folder of a frozen model that runs beside the trained one, or
        None; `Inputs.frozen` gives the objective what it computes."""
        return None

    def projections(self, model: ModelConfig) -> dict[int, int]:
        """Return to which widths the outputs of layers of `model`, by their numbers, are projected
        in training. Raise ValueError where it does not have them."""
        return {}

    def refuses(self, config: Config) -> str:
        """Return why the objective does not go with the layout of a config, for an error; empty
        where it does."""
        return ""

    def match_layers(
        self, stages: Sequence[Stage], plan: Plan, mesh: Mesh
    ) -> tuple[HiddenMatch, ...]:
        """Return the pairs of layers, one of them of the frozen model, whose outputs are compared."""
        return ()

    def corruption(
        self, config: Config, tokenizer: Tokenizer | None, split: Split
    ) -> Corruption | None:
        """Return what makes inputs and labels of the tokens that are read for `split`; None: each
        token's label is the one that follows, or a class. `tokenizer` is the config's. Raise
        DataError where it lacks a token."""
        return None

    def pairs_of(
        self, config: Config, tokenizer: Tokenizer | None, split: Split
    ) -> Callable[[IndexedDataset, int, int], SampleSource] | None:
        """Return what makes pairs of the sentences of documents [first, last) of a file; None: texts
        are read as they stand. `tokenizer` is the config's."""
        return None

    def lengths(self, config: Config) -> Lengths:
        """Return how many tokens belong to a sample of a config."""
        return Lengths(config.data.seq_length, 0, config.data.seq_length)

    def stacks(self, config: Config, tokenizer: Tokenizer | None, split: Split) -> Views:
        """Return what makes a source and a target of the tokens that are read for `split`, for an
        encoder-decoder. `tokenizer` is the config's. Raise DataError where it lacks a token."""
        raise NotImplementedError

    def made_of_tokens(self) -> str:
        """Return the setting that names files made of the run's own tokens, which no others can
        stand in for; empty where there is none."""
        return ""

    def check_data(self, config: Config, data: Mapping[Split, Mixture | None]) -> None:
        """Raise DataError or ConfigError, before the first step, where what the objective reads
        beside the mixtures of `data` does not go with them."""

    def files(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside the model, as JSON by the name of the file."""
        return {}

    def batches(self, source: Batches, run: Run, parts: RankModel) -> Batches:
        """Return the batches to train on: those that `source` reads, or others that are made of
        them."""
        return source

    def build(self, config: Config, mesh: Mesh) -> Objective:
        """Return the objective on this rank of `mesh`."""
        raise NotImplementedError
