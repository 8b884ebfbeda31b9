"""Multi-token prediction (Gloeckle et al. 2024; DeepSeek-V3, section 2.2): layers behind the last
one, each of which predicts one token further, from what the one before it has computed and the
embedding of the token before the predicted one. Embedding and head are the model's own. They are
for training, and for drafts of speculative decoding elsewhere; megalite's generation ignores them.

Letters in shapes: A predictors; otherwise those of layers.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn as nn
from torch import Tensor

from megalite.models.experts import RoutedConfig, RoutedLayer
from megalite.models.layers import SequenceInfo
from megalite.models.llama import NAMES, Llama, LlamaLike, Shared, norm_row
from megalite.models.weights import Weight, layer_rows


class Predictor(RoutedLayer):
    """A layer that first joins hidden states with the embeddings of later tokens. Modules have
    DeepSeek's names."""

    def __init__(self, config: RoutedConfig, attention: nn.Module):
        super().__init__(config, attention)
        hidden = config.hidden_size
        self.enorm, self.hnorm = (config.NORM(hidden, config.norm_eps) for _ in range(2))
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.norm = config.NORM(hidden, config.norm_eps)

    def forward(self, x_BTD: Tensor, shared: Shared, ahead_BTD: Tensor | None = None) -> Tensor:
        """Return hidden states that the head takes, from those it would have taken for one token
        less, and the embeddings `ahead` of the tokens that were predicted with these: [B,T,D]."""
        assert ahead_BTD is not None
        # Embedding first: the order in which files have the columns of eh_proj.
        joined_BTD = self.eh_proj(torch.cat((self.enorm(ahead_BTD), self.hnorm(x_BTD)), -1))
        return self.norm(super().forward(joined_BTD, shared))


def predict_ahead(
    model: Llama, states_BTD: Tensor, tokens_ABT: Tensor, places: SequenceInfo
) -> tuple[Tensor, ...]:
    """Return what `Decoder.predict_ahead` does, of a model whose layers behind the last are
    predictors."""
    # Tokens keep their positions: a predictor sees those before them, as every layer does.
    shared, found = model.shared(places, states_BTD.dtype), [states_BTD]
    for number, tokens_BT in enumerate(tokens_ABT, model.config.num_layers):
        layer = model.layers[str(number)]
        found.append(layer(found[-1], shared, model.embed(tokens_BT, places)))
    return tuple(found)


def with_predictors(
    config: LlamaLike, weights: Iterator[Weight], layer: Sequence[Weight], count: int
) -> Iterator[Weight]:
    """Yield `weights`, the table of the model alone, and the rows of `count` predictors, whose
    layers have the rows `layer`. Embedding and head are stored once more with each of them."""
    numbers = range(config.num_layers, config.num_layers + count)
    of_embedding, of_head = (
        tuple(f"{NAMES.layers}.{number}.{name}.weight" for number in numbers)
        for name in ("embed_tokens", "shared_head.head")
    )
    copies = {"embedding.weight": of_embedding, "head.weight": of_head}
    if config.tie_embeddings:
        # One tensor is both, and is stored in both places.
        copies = {"embedding.weight": of_embedding + of_head}
    for weight in weights:
        more = copies.get(weight.name, ())
        # The last stage looks tokens up as well, and so has a copy of the embedding.
        place = "both" if more and weight.name == "embedding.weight" else weight.place
        yield replace(weight, copies=more, place=place)
    hidden = config.hidden_size
    # Not cut: it takes whole features, of this rank's slice of the tokens.
    join = Weight(
        "eh_proj.weight", (hidden, 2 * hidden), ("eh_proj.weight",), init=config.init_std,
        partial_grad="sequence",
    )  # fmt: skip
    rows = (
        norm_row(config, "enorm", "enorm"),
        norm_row(config, "hnorm", "hnorm"),
        join,
        *layer,
        norm_row(config, "norm", "shared_head.norm"),
    )
    for number in numbers:
        yield from layer_rows(number, NAMES.layers, rows)
