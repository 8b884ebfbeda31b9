"""The coordinate check of muP (Yang et al. 2022): one config trained for a few steps at several widths,
and how large the outputs of its layers become. Where learning rates and initial values go by width
as they should, they are alike; else they grow or vanish with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megalite.config import Config
from megalite.config_file import load_config
from megalite.errors import ConfigError
from megalite.observe.jsonl import read_metrics
from megalite.utils.files import replacing

STEPS = 5
WIDENED = (
    "hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_kv_heads"
)  # fmt: skip
"""Fields of a model that go with its width; the size of a head stays."""

Sizes = Sequence[Sequence[float]]
"""The root mean square of each layer's output, by step."""


def check_coordinates(path: Path, overrides: Sequence[str], widths: Sequence[int]) -> Path:
    """Train the config in `path` at hidden sizes `widths`, each a run, print and draw the sizes of
    their layers' outputs, and return the picture's path. Raises ConfigError for a width that the
    model cannot have, before the first run."""
    from megalite.train import train

    configs = {width: at_width(path, overrides, width) for width in sorted(set(widths))}
    folder = next(iter(configs.values())).run.dir
    if folder.exists():  # runs that are there already may be of other settings
        raise ConfigError(f"{folder} exists; remove it, or give another run.name")
    sizes: dict[int, Sizes] = {}
    for width, config in configs.items():
        train(config)
        sizes[width] = sizes_of(config)
    picture = folder / "coordinates.png"
    draw(sizes, picture)
    for width, found in sizes.items():
        print(f"hidden {width:5}: last layer " + "  ".join(f"{step[-1]:.4g}" for step in found))
    return picture


def at_width(path: Path, overrides: Sequence[str], width: int) -> Config:
    """Return the config in `path` with a hidden size, and with all that goes with it as many times
    as large. Raises ConfigError where that makes a part of a head or a feature."""
    config = load_config(path, overrides)
    model, changes = config.model, []
    for name in WIDENED:
        number = getattr(model, name, 0)
        if number * width % model.hidden_size:
            raise ConfigError(
                f"a hidden size of {width} for {model.hidden_size} makes model.{name} = "
                f"{number * width / model.hidden_size:g}, which is no whole number"
            )
        if number:
            changes.append(f"model.{name}={number * width // model.hidden_size}")
    return load_config(path, [
        *overrides, *changes, f"run.dir={config.run.folder}-coordinates", f"run.name=hidden-{width}",
        f"train.steps={STEPS}", "train.tokens=null", "train.epochs=null", "observe.layers_every=1",
        "observe.eval_every=0",
    ])  # fmt: skip


def sizes_of(config: Config) -> Sizes:
    """Return what a run has measured."""
    names = [f"activation_rms/{number}" for number in range(config.model.num_layers)]
    sizes = []
    for record in read_metrics(config.run.folder / "metrics.jsonl"):
        if names[0] in record:
            # null, of a size that is not finite, has no place on the picture.
            sizes.append([float(record[name] or 0) for name in names])
    return sizes


def draw(sizes: Mapping[int, Sizes], picture: Path) -> None:
    """Draw the sizes by width: a panel each for the first, the middle and the last layer, a line
    for each step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = next(iter(sizes.values()))
    widths, steps, count = list(sizes), len(first), len(first[0])
    layers = sorted({0, count // 2, count - 1})
    figure, panels = plt.subplots(
        1, len(layers), figsize=(4 * len(layers), 3.6), sharey=True, squeeze=False
    )
    for axes, layer in zip(panels[0], layers, strict=True):
        for step in range(steps):
            values = [sizes[width][step][layer] for width in widths]
            color = plt.get_cmap("viridis")(step / max(1, steps - 1) * 0.85)
            axes.plot(widths, values, "o-", color=color, label=f"step {step + 1}")
        axes.set(xscale="log", yscale="log", title=f"layer {layer}", xlabel="hidden size")
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
    # At least a decade, so that what is flat looks flat.
    low, high = panels[0][0].get_ylim()
    middle = (low * high) ** 0.5
    panels[0][0].set_ylim(min(low, middle / 3.3), max(high, middle * 3.3))
    panels[0][0].set_ylabel("root mean square of the output")
    panels[0][-1].legend(frameon=False)
    figure.tight_layout()
    with replacing(picture) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
