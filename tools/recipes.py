"""Write the table of what `megalite plan` predicts for recipes on GPUs into docs/recipes.md."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from megalite.config_file import load_config
from megalite.plan import plan as plan_of
from megalite.planner.estimate import estimate
from megalite.planner.hardware import DEFAULT_INTERCONNECT, find_hardware
from megalite.planner.report import parse_tokens
from megalite.utils.resources import configs_dir

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
BEGIN, END = "<!-- made by tools/recipes.py -->\n", "<!-- end -->\n"
NODE = 8


class Recipe(NamedTuple):
    """What is trained, on what, and for how long."""

    what: str
    config: str
    settings: tuple[str, ...]
    gpu: str
    gpus: int
    tokens: str


ONE_B, EIGHT_B = ("model={preset: llama-1b}",), ("model={preset: llama-8b}",)
RECIPES = (
    Recipe("pretrain 1B", "llama-1b", (), "h100", 8, "20B"),
    Recipe("pretrain 1B", "llama-1b", (), "a100-80gb", 8, "20B"),
    Recipe("pretrain 8B", "llama-8b", (), "h200", 64, "1T"),
    Recipe("pretrain 8B", "llama-8b", (), "h200", 512, "15T"),
    Recipe("pretrain 8B", "llama-8b", ("train.recompute=selective",), "b200", 64, "1T"),
    Recipe("finetune 1B on chats", "finetune-chat", ONE_B, "h100", 1, "100M"),
    Recipe("finetune 1B on chats", "finetune-chat", ONE_B, "a40", 1, "100M"),
    Recipe("finetune 8B on chats", "finetune-chat", EIGHT_B, "h100", 8, "100M"),
    Recipe("finetune 8B on chats", "finetune-chat", EIGHT_B, "h200", 8, "100M"),
)


def row(recipe: Recipe) -> str:
    """Return the line of the table for one recipe."""
    config = load_config(configs_dir() / f"{recipe.config}.yaml", recipe.settings)
    hardware = find_hardware(recipe.gpu, NODE, DEFAULT_INTERCONNECT)
    plan = plan_of(config, recipe.gpus)
    found = estimate(config, plan, hardware)
    hours = parse_tokens(recipe.tokens) / found.tokens_per_s / 3600
    took = f"{hours / 24:,.1f} days" if hours > 48 else f"{hours:.1f} hours"
    memory = f"{found.fullest.total / 2**30:.0f} GiB" + ("" if found.fits else ", **too much**")
    settings = "".join(f" `{setting}`" for setting in recipe.settings)
    cells = (
        recipe.what,
        f"`{recipe.config}.yaml`{settings}",
        f"{recipe.gpus} × {hardware.chip.chip}",
        memory,
        f"{found.tokens_per_s:,.0f}",
        f"{found.mfu:.0%}",
        f"{recipe.tokens}: {took}",
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """Return the table."""
    head = ("recipe", "config", "on", "memory a GPU", "tokens/s", "MFU", "tokens: time")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *map(row, RECIPES)]
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """Return the page with the table as it is now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
