"""Which weights of a model `train.fp8` takes products of in fp8, and whether their blocks fit a
layout.

Linear modules inside of layers are, those that LoRA could adapt, and experts. Embeddings, head,
routers, norms and attention's own products are not, nor are the first and last layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from megalite.config import Config, Fp8Config
from megalite.errors import ConfigError
from megalite.kernels.recipes import RECIPES
from megalite.models.lora import is_called
from megalite.models.weights import Weight
from megalite.plan import expert_cut
from megalite.utils.spelling import did_you_mean


def fp8_weights(weights: Sequence[Weight], fp8: Fp8Config, num_layers: int) -> list[Weight]:
    """Return the rows whose products `fp8` asks for, of a model of `num_layers` layers. Raises
    ConfigError for what it excludes and the model has not, or has in one product with others."""
    linear = [weight for weight in weights if _is_linear(weight)]
    modules = [module for weight in linear for module in _modules(weight)]
    for target in fp8.exclude:
        if not any(is_called(module, target) for module in modules):
            known = sorted({module.rpartition(".")[2] for module in modules})
            hint = did_you_mean(target, known, f"those of this model are {', '.join(known)}")
            raise ConfigError(f"train.fp8.exclude: no linear module is called {target!r}; {hint}")
    first, last = fp8.first_last_bf16
    inside = range(first, num_layers - last)
    # Scales of several ranks would be of experts that these do not share.
    experts = not RECIPES[fp8.recipe].spans_ranks
    return [
        weight
        for weight in linear
        if weight.place in inside
        and not _is_excluded(weight, fp8)
        and (experts or not weight.is_expert)
    ]


def with_codes(weights: Sequence[Weight], fp8: Fp8Config, num_layers: int) -> tuple[Weight, ...]:
    """Return the table of a model of `num_layers` layers with the weights `coded` whose codes `fp8`
    has gathered."""
    if not fp8.param_gather:
        return tuple(weights)
    names = {weight.name for weight in fp8_weights(weights, fp8, num_layers)}
    return tuple(replace(weight, coded=weight.name in names) for weight in weights)


def _is_linear(weight: Weight) -> bool:
    """Return whether a weight is a linear module's inside of a layer, or several ones' together, or
    a stack of them."""
    return weight.is_matrix and (weight.is_expert or weight.shard in ("column", "row"))


def _modules(weight: Weight) -> list[str]:
    """Return what Hugging Face calls the modules that a weight is of."""
    return [name.removesuffix(".weight") for name in weight.hf]


def _is_excluded(weight: Weight, fp8: Fp8Config) -> bool:
    modules = _modules(weight)
    named = [
        module for module in modules if any(is_called(module, target) for target in fp8.exclude)
    ]
    # A product has one precision: half of a fused weight cannot be left out.
    if named and len(named) < len(modules):
        others = [module for module in modules if module not in named]
        more = f" and {len(others) - 2} more" if len(others) > 2 else ""
        raise ConfigError(
            f"train.fp8.exclude: {named[0]} is one product with {', '.join(others[:2])}{more}; name all of them or none"
        )
    return bool(named)


def check_fp8(config: Config, weights: Sequence[Weight]) -> None:
    """Raise ConfigError where the products that `train.fp8` asks for do not fit the layout: no block
    may lie on two ranks, or in two sequences, or layouts would train different models."""
    fp8, parallel = config.train.fp8, config.parallel
    if fp8 is None:
        return
    for key, value, only in (
        ("parallel.engine", parallel.engine, "native"), ("train.compile", config.train.compile, False),
        ("lora", config.lora, None),
    ):  # fmt: skip
        if value != only:
            needs = "null" if only is None else str(only).lower()
            raise ConfigError(f"train.fp8 needs {key}: {needs}")
    if fp8.param_gather:
        _check_gather(fp8, parallel.zero_stage)
    recipe = RECIPES[fp8.recipe]
    found = fp8_weights(weights, fp8, config.model.num_layers)
    if not found:
        raise ConfigError(
            f"train.fp8: no product is left for it beside first_last_bf16 = {list(fp8.first_last_bf16)} of "
            f"{config.model.num_layers} layers, and exclude"
        )
    if recipe.spans_ranks and parallel.context > 1:
        raise ConfigError(
            f"train.fp8.recipe: {fp8.recipe} needs parallel.context: 1, not {parallel.context}: its scales are of all "
            "tokens of a micro-batch; blockwise and mxfp8 have smaller blocks"
        )
    if fp8.recipe == "nvfp4" and config.train.recompute != "none":
        raise ConfigError(
            f"train.fp8.recipe: nvfp4 needs train.recompute: none, not {config.train.recompute}: what is computed "
            "again would not know whose samples it rounds by chance"
        )
    _check_lengths(config, fp8, recipe.multiple)
    for weight in found:
        ranks_of = expert_cut(parallel).tensor if weight.is_expert else parallel.tensor
        for what, size, ranks in sizes(weight, ranks_of):
            if size % (recipe.multiple * ranks):
                key = "expert_tensor" if weight.is_expert else "tensor"
                over = f" over parallel.{key} = {ranks}" if ranks > 1 else ""
                names = dict.fromkeys(module.rpartition(".")[2] for module in _modules(weight))
                raise ConfigError(
                    f"train.fp8.recipe: {fp8.recipe} takes multiples of {recipe.multiple}, into which the {size} "
                    f"{what} do not divide{over}; train.fp8.exclude: [{', '.join(names)}] leaves them out"
                )


def _check_gather(fp8: Fp8Config, zero_stage: int) -> None:
    """Raise ConfigError where codes of weights cannot be gathered."""
    if fp8.recipe != "blockwise":
        why = (
            "it has one scale for a whole matrix, with parts of it on other ranks"
            if fp8.recipe == "current"
            else "it rounds a weight along either of its dimensions, so that codes would be gathered twice"
        )
        raise ConfigError(
            f"train.fp8.param_gather needs train.fp8.recipe: blockwise, not {fp8.recipe}: {why}"
        )
    if zero_stage == 0:
        raise ConfigError(
            "train.fp8.param_gather needs parallel.zero_stage: 1 or 2, not 0, where every rank updates all weights "
            "and gathers none"
        )


def _check_lengths(config: Config, fp8: Fp8Config, multiple: int) -> None:
    """Raise ConfigError for sequences that are no multiple of a block's tokens, or whose pieces on
    context ranks are not."""
    # Zigzag: a context rank has one piece from the front and one from the back.
    pieces = 2 * config.parallel.context if config.parallel.context > 1 else 1
    _, source, target = config.lengths
    lengths = (source, target) if source else (*config.data.seq_lengths, target)
    for length in dict.fromkeys(lengths):
        if length % (multiple * pieces):
            over = f" over 2 × parallel.context = {pieces} pieces" if pieces > 1 else ""
            raise ConfigError(
                f"train.fp8.recipe: {fp8.recipe} takes multiples of {multiple} tokens, into which sequences of "
                f"{length} do not divide{over}"
            )


def sizes(weight: Weight, tensor: int) -> Iterator[tuple[str, int, int]]:
    """Yield what each dimension of a weight counts, its size, and the ranks that it is cut over. Rows
    are counted in each of its parts."""
    rows = tensor if weight.shard == "column" else 1
    columns = tensor if weight.shard == "row" else 1
    outputs, inputs = weight.shape[weight.stack :]
    # Parts are cut over the ranks each on its own, so each must divide by itself.
    modules, parts = _modules(weight), weight.parts or (outputs,)
    for number, size in enumerate(parts):
        # One tensor may have all parts.
        module = modules[number] if len(modules) >= len(parts) else modules[0]
        yield f"output features of {module}", size, rows
    yield f"input features of {modules[0]}", inputs, columns
