"""Draw the pictures of docs/architecture.md as SVG: a gradient's way through a step, and a
checkpoint's way.

    python tools/draw_architecture.py            # write docs/gradient.svg and docs/checkpoint.svg
    python tools/draw_architecture.py --check    # name what the code no longer has, and files that are not up to date

All names of the code that a picture shows stand in its table of steps, GRADIENT or CHECKPOINT, as
MODULE:NAME.
"""

from __future__ import annotations

import argparse
import importlib
import operator
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[1] / "docs"


class Step(NamedTuple):
    """A row of a picture: what happens, in lines of at most LONGEST characters, and the code that
    does it."""

    title: str
    lines: tuple[str, ...]
    code: tuple[str, ...]
    """MODULE:NAME, where MODULE is below `megalite.` and NAME may be CLASS.METHOD."""


GRADIENT = {
    "cut": Step(
        "The weight is cut over the tensor ranks",
        (
            "Each holds its rows of a column-parallel matrix,",
            "as a view into a flat bucket of many weights.",
        ),
        ("models.weights:Weight.local_shape", "engine.layout:make_buckets"),
    ),
    "backward": Step(
        "Backward of a column-parallel linear",
        (
            "The gradient of its input is summed over the tensor",
            "ranks while that of its weight is computed.",
        ),
        ("kernels.linear:_Linear.backward", "comm.collectives:start_reduce_whole"),
    ),
    "bucket": Step(
        "The product is added to an fp32 bucket",
        (
            "Norms, biases and embeddings have no such product:",
            "autograd's post-accumulate hook brings their gradient.",
        ),
        (
            "engine.gradients:Gradients._add_product",
            "kernels.linear:accumulate_weight_gradient",
            "engine.gradients:Gradients._take_gradient",
        ),
    ),
    "reduce": Step(
        "A full bucket is reduce-scattered",
        (
            "The last micro-batch has filled it. The replicas sum",
            "it beside the rest of the backward pass.",
        ),
        (
            "engine.gradients:Gradients._count_event",
            "engine.gradients:Gradients._reduce",
            "comm.collectives:start_reduce_scatter",
        ),
    ),
    "norm": Step(
        "One gradient norm over all ranks",
        (
            "Every rank squares its shards. Weights that the tensor",
            "ranks hold whole are counted on the first of them only.",
        ),
        ("engine.gradients:Gradients.norm", "kernels.optimizer:sum_of_squares"),
    ),
    "update": Step(
        "AdamW updates this rank's shard",
        (
            "fp32 master weights and both moments exist only for",
            "the shard. One pass clips, updates and rounds to bf16.",
        ),
        ("engine.native:NativeEngine.step", "kernels.optimizer:adamw_"),
    ),
    "gather": Step(
        "An all-gather brings the new weights to all",
        (
            "It runs beside the next bucket's update and the next",
            "forward pass: a module waits for its own weights only.",
        ),
        ("comm.collectives:start_all_gather", "engine.buckets:BucketState.await_weights"),
    ),
}

CHECKPOINT = {
    "state": Step(
        "The state of one step is set aside",
        (
            "On CPUs a thread copies it beside the next passes;",
            "on GPUs it is gathered to the host at once.",
        ),
        ("checkpoint.save:Saver.save", "engine.native:NativeEngine.gather_later"),
    ),
    "whole": Step(
        "Shards become whole logical tensors",
        (
            "Over the replicas to the owner of the bucket, then over",
            "the tensor ranks to the owner of the weight.",
        ),
        ("engine.layout:choose_owners", "engine.gather:Gather", "models.sharding:assemble"),
    ),
    "files": Step(
        "Every owner writes its files",
        (
            "Safetensors with Hugging Face's names, also for the",
            "optimizer's state; with fsync and SHA-256.",
        ),
        (
            "checkpoint.writing:Writing._write_part",
            "models.weights:Weight.to_hf",
            "checkpoint.folder:digest",
        ),
    ),
    "seal": Step(
        "Rank 0 writes the manifest last",
        (
            "It waits for the sizes and digests of all ranks, and",
            "syncs every other file and the folder itself.",
        ),
        ("checkpoint.board:Board", "checkpoint.writing:Writing._seal"),
    ),
    "name": Step(
        "A rename makes it a checkpoint",
        (
            "A crash before it leaves a .tmp folder, which no",
            "resume takes; older checkpoints are untouched.",
        ),
        ("checkpoint.writing:Writing._give_name",),
    ),
    "find": Step(
        "A resume takes the newest undamaged one",
        (
            "Each rank hashes a share of the files; all agree. A",
            "damaged checkpoint is set aside under another name.",
        ),
        ("checkpoint.resume:find_checkpoint", "checkpoint.resume:find_damage"),
    ),
    "read": Step(
        "Each rank reads its own slices, on any layout",
        (
            "The rows of the table of weights say which. Master",
            "weights and moments are read in the same way.",
        ),
        (
            "checkpoint.load:from_checkpoint",
            "models.sharding:read_local",
            "engine.native:NativeEngine.load",
        ),
    ),
}

# --- what both are drawn with ---------------------------------------------------------------------

WIDTH, LEFT, TEXT = 900, 24, 46
LONGEST = 55
COLUMNS = (490, 595, 710, 815)
"""Middles of the four ranks: (replica 0, tensor 0), (0, 1), (1, 0), (1, 1)."""
BAR, HEIGHT = 88, 16
TITLE, LINE = 22, 18
STYLE = """
  text { font-family: -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; font-size: 13.5px }
  .head { font-size: 18px; font-weight: 600 } .title { font-size: 15px; font-weight: 600 } .small { font-size: 12px }
  .code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 12px }
  .middle { text-anchor: middle } .dashed { stroke-dasharray: 4 3 }
  .card { fill: #ffffff; stroke: #d0d7de } .rule { stroke: #d8dee4; fill: none }
  .ink { fill: #1f2328 } .mute { fill: #59636e } .name { fill: #0550ae } .onfill { fill: #ffffff }
  .ghost { fill: #f3f4f6; stroke: #afb8c1 }
  .t0 { fill: #2f6fb3; stroke: #2f6fb3 } .t1 { fill: #bf5b13; stroke: #bf5b13 }
  .full { fill: #6e5494; stroke: #6e5494 }
  .flow { stroke: #1a7f37; stroke-width: 2; fill: none } .tip { fill: #1a7f37 } .word { fill: #1a7f37 }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #30363d } .rule { stroke: #30363d }
    .ink { fill: #e6edf3 } .mute { fill: #9198a1 } .name { fill: #79c0ff } .onfill { fill: #0d1117 }
    .ghost { fill: #21262d; stroke: #6e7681 }
    .t0 { fill: #6cb0f5; stroke: #6cb0f5 } .t1 { fill: #f0a35e; stroke: #f0a35e }
    .full { fill: #b79ae0; stroke: #b79ae0 }
    .flow { stroke: #3fb950 } .tip { fill: #3fb950 } .word { fill: #3fb950 }
  }
"""


class Drawing:
    """Elements of an SVG file. Lengths are in its units, which a browser takes for pixels."""

    def __init__(self) -> None:
        self.elements: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, kind: str, radius: float = 2
    ) -> None:
        """Draw a rectangle of `width` and `height` whose upper left corner is (x, y); `kind` is its
        class in STYLE."""
        size = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"'
        self.elements.append(f'<rect {size} class="{kind}"/>')

    def text(self, x: float, y: float, words: str, kind: str = "ink") -> None:
        """Write the line `words` on the base line y. It begins at x, or with `middle` in `kind`,
        its class in STYLE, has its middle there."""
        self.elements.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>')

    def path(self, points: str, kind: str = "flow") -> None:
        """Draw the `d` of an SVG path."""
        self.elements.append(f'<path d="{points}" class="{kind}"/>')

    def tip(self, x: float, y: float, dx: float, dy: float) -> None:
        """Draw the head of an arrow that ends at (x, y) and comes along (dx, dy), a unit vector."""
        back, side = (x - 8 * dx, y - 8 * dy), (4.5 * dy, -4.5 * dx)
        corners = [
            (x, y),
            (back[0] + side[0], back[1] + side[1]),
            (back[0] - side[0], back[1] - side[1]),
        ]
        points = " ".join(f"{a:g},{b:g}" for a, b in corners)
        self.elements.append(f'<polygon points="{points}" class="tip"/>')

    def down(self, x: float, top: float, bottom: float) -> None:
        """Draw an arrow straight down at x, from `top` to `bottom`."""
        self.path(f"M{x:g} {top:g}V{bottom - 7:g}")
        self.tip(x, bottom, 0, 1)

    def both_ways(self, left: float, right: float, y: float) -> None:
        """Draw a level arrow with two heads at y, from `left` to `right`."""
        self.path(f"M{left + 7:g} {y:g}H{right - 7:g}")
        self.tip(left, y, -1, 0)
        self.tip(right, y, 1, 0)

    def bridge(self, left: float, right: float, y: float, depth: float) -> None:
        """Draw an arrow with two heads, at `left` and `right`, that leaves y downwards by `depth`
        and comes back up to it."""
        self.path(f"M{left:g} {y + 7:g}V{y + depth:g}H{right:g}V{y + 7:g}")
        self.tip(left, y, 0, -1)
        self.tip(right, y, 0, -1)

    def bar(self, middle: float, y: float, parts: Sequence[str], height: float = HEIGHT) -> None:
        """Draw a flat buffer of this `height` around x = `middle`, in equal `parts` of these
        kinds."""
        width = BAR / len(parts)
        for number, kind in enumerate(parts):
            self.rect(middle - BAR / 2 + number * width + 0.5, y, width - 1, height, kind)

    def code(self, x: float, y: float, name: str) -> None:
        """Write a `name` of the tables at (x, y), as FILE NAME."""
        module, _, inside = name.partition(":")
        file = f'<tspan class="mute">{module.replace(".", "/")}.py</tspan>'
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" class="code name">{file} {escape(inside)}</text>'
        )

    def svg(self, height: float, label: str) -> str:
        """Return the file, on a card of its own colour, so that it can be read on a page of any
        colour."""
        card = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="8" class="card"/>'
        size = f'width="{WIDTH}" height="{height:g}" viewBox="0 0 {WIDTH} {height:g}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(label)}">'
        return "\n".join([head, f"<style>{STYLE}</style>", card, *self.elements, "</svg>\n"])


Draw = Callable[[Drawing, float], None]
"""Function that draws what happens in a step, from this y on."""


def draw(
    title: str, steps: dict[str, Step], rows: dict[str, tuple[float, Draw]], header: Draw
) -> str:
    """Return a picture of all steps under a `title`, one below the other: words and code on the
    left, `rows` on the right, each with the least height that it needs. `header` is drawn above the
    first."""
    assert steps.keys() == rows.keys()
    drawing, y = Drawing(), 92.0
    drawing.text(LEFT, 36, title, "head ink")
    header(drawing, 56)
    for number, (key, step) in enumerate(steps.items(), 1):
        height, right = rows[key]
        drawing.path(f"M{LEFT} {y:g}H{WIDTH - LEFT}", "rule")
        drawing.text(LEFT, y + 27, str(number), "title mute")
        drawing.text(TEXT, y + 27, step.title, "title ink")
        for line, words in enumerate(step.lines):
            assert len(words) <= LONGEST, words
            drawing.text(TEXT, y + 27 + TITLE + line * LINE, words, "mute")
        below = y + 27 + TITLE + len(step.lines) * LINE + 2
        for line, name in enumerate(step.code):
            drawing.code(TEXT, below + line * LINE, name)
        right(drawing, y + 14)
        y = max(below + len(step.code) * LINE, y + 14 + height + 14)
    return drawing.svg(y + 8, title)


# --- a gradient's way -----------------------------------------------------------------------------

TENSOR = ("t0", "t1", "t0", "t1")
MIDDLE = (COLUMNS[0] + COLUMNS[3]) / 2


def shard(number: int) -> tuple[str, str]:
    """Return the halves of a bucket on a rank that has only its replica's shard of it."""
    return (TENSOR[number], "ghost dashed") if number < 2 else ("ghost dashed", TENSOR[number])


def ranks_header(drawing: Drawing, y: float) -> None:
    for replica in (0, 1):
        left, right = COLUMNS[2 * replica] - BAR / 2, COLUMNS[2 * replica + 1] + BAR / 2
        drawing.text((left + right) / 2, y - 16, f"replica {replica}", "middle title ink")
        drawing.path(f"M{left:g} {y - 8:g}H{right:g}", "rule")
    for number, x in enumerate(COLUMNS):
        drawing.text(x, y + 12, f"tensor {number % 2}", "middle small mute")


def draw_cut(drawing: Drawing, y: float) -> None:
    for number, x in enumerate(COLUMNS):
        for half in (0, 1):
            drawing.rect(
                x - 26,
                y + half * 18,
                52,
                17,
                TENSOR[number] if half == number % 2 else "ghost dashed",
            )
        drawing.down(x - BAR / 8, y + 40, y + 60)
        drawing.bar(x, y + 62, ("ghost", TENSOR[number], "ghost", "ghost"))
    drawing.text(MIDDLE, y + 96, "a weight, and its place in a bucket", "middle small mute")


def draw_backward(drawing: Drawing, y: float) -> None:
    for number, x in enumerate(COLUMNS):
        drawing.rect(x - BAR / 2, y + 34, BAR, 24, TENSOR[number], 4)
        drawing.text(x, y + 51, "gradᵀ · x", "middle onfill")
    for left, right in (COLUMNS[:2], COLUMNS[2:]):
        drawing.both_ways(left - 30, right + 30, y + 20)
        drawing.text((left + right) / 2, y + 11, "all-reduce of grad · W", "middle small word")
    drawing.text(MIDDLE, y + 80, "each replica for its own micro-batches", "middle small mute")


def draw_bucket(drawing: Drawing, y: float) -> None:
    for number, x in enumerate(COLUMNS):
        drawing.down(x - BAR / 8, y + 4, y + 34)
        drawing.text(x + 6, y + 24, "+=", "code word")
        drawing.bar(x, y + 36, ("ghost", TENSOR[number], "ghost", "ghost"))
    drawing.text(
        MIDDLE, y + 74, "the gradients of a bucket’s weights, whole, in fp32", "middle small mute"
    )


def draw_over_replicas(drawing: Drawing, y: float, words: str) -> None:
    """Draw what the two replicas of either tensor rank send each other; 62 high."""
    for tensor in (0, 1):
        drawing.bridge(COLUMNS[tensor], COLUMNS[tensor + 2], y, 22 + 16 * tensor)
    drawing.text(MIDDLE, y + 56, words, "middle small word")


def draw_reduce(drawing: Drawing, y: float) -> None:
    for number, x in enumerate(COLUMNS):
        drawing.bar(x, y, (TENSOR[number], TENSOR[number]))
        drawing.bar(x, y + 86, shard(number))
    draw_over_replicas(drawing, y + HEIGHT + 3, "reduce-scatter over the replicas")
    drawing.text(MIDDLE, y + 120, "each keeps the sum of its shard", "middle small mute")


def draw_norm(drawing: Drawing, y: float) -> None:
    for number, x in enumerate(COLUMNS):
        drawing.bar(x, y, shard(number))
        drawing.path(f"M{x:g} {y + HEIGHT + 3:g}V{y + 36:g}")
    drawing.path(f"M{COLUMNS[0] - 1} {y + 36:g}H{COLUMNS[3] + 1}")
    drawing.down(MIDDLE, y + 36, y + 54)
    drawing.text(
        MIDDLE, y + 70, "all-reduce: ‖gradient‖, the same number on all ranks", "middle small word"
    )


def draw_states(drawing: Drawing, y: float) -> None:
    """Draw the optimizer's state of every rank; 58 high."""
    for number, x in enumerate(COLUMNS):
        for line, state in enumerate(("w", "m", "v")):
            drawing.bar(x, y + line * 20, shard(number), HEIGHT + 1)
            drawing.text(
                x - BAR / 4 if number < 2 else x + BAR / 4,
                y + line * 20 + 12,
                state,
                "middle small onfill",
            )


def draw_update(drawing: Drawing, y: float) -> None:
    draw_states(drawing, y)
    for number, x in enumerate(COLUMNS):
        drawing.down(x - BAR / 4 if number < 2 else x + BAR / 4, y + 61, y + 81)
        drawing.bar(x, y + 83, shard(number))
    drawing.text(
        MIDDLE, y + 117, "master weights and moments → new weights, in bf16", "middle small mute"
    )


def draw_gather(drawing: Drawing, y: float) -> None:
    for number, x in enumerate(COLUMNS):
        drawing.bar(x, y, shard(number))
        drawing.bar(x, y + 86, (TENSOR[number], TENSOR[number]))
    draw_over_replicas(drawing, y + HEIGHT + 3, "all-gather over the replicas")


def gradient() -> str:
    rows: dict[str, tuple[float, Draw]] = {
        "cut": (96, draw_cut),
        "backward": (80, draw_backward),
        "bucket": (74, draw_bucket),
        "reduce": (120, draw_reduce),
        "norm": (70, draw_norm),
        "update": (117, draw_update),
        "gather": (102, draw_gather),
    }
    return draw("A gradient’s way: tensor 2 × ZeRO-1", GRADIENT, rows, ranks_header)


# --- a checkpoint's way ---------------------------------------------------------------------------


def draw_state(drawing: Drawing, y: float) -> None:
    for number, x in enumerate(COLUMNS):
        drawing.bar(x, y, (TENSOR[number], TENSOR[number]))
    draw_states(drawing, y + 24)
    drawing.text(
        MIDDLE, y + 100, "weights; shards of master weights and moments", "middle small mute"
    )


def draw_whole(drawing: Drawing, y: float) -> None:
    for number, x in enumerate(COLUMNS):
        drawing.bar(x, y, shard(number))
        for half in (0, 1):
            drawing.rect(x - 30, y + 108 + half * 18, 60, 18, f"t{half}")
        drawing.text(x, y + 131, "ABCD"[number], "middle title onfill")
    draw_over_replicas(drawing, y + HEIGHT + 3, "to the owner of the bucket, then of the weight")
    for left, right in (COLUMNS[:2], COLUMNS[2:]):
        drawing.both_ways(left - 30, right + 30, y + 94)
    drawing.text(MIDDLE, y + 162, "whole weights, spread over all ranks", "middle small mute")


def draw_folder(
    drawing: Drawing, y: float, name: str, files: Sequence[str], kind: str = ""
) -> None:
    left, right = COLUMNS[0] - BAR / 2, COLUMNS[3] + BAR / 2
    tab, low = left + 196, y + 34 + 19 * len(files)
    outline = f"M{left:g} {low:g}V{y:g}H{tab - 8:g}L{tab:g} {y + 22:g}H{right:g}V{low:g}Z"
    drawing.path(outline, f"ghost {kind}")
    drawing.text(left + 10, y + 16, name, "code ink")
    for line, file in enumerate(files):
        drawing.text(left + 22, y + 42 + line * 19, file, "code ink")


def draw_files(drawing: Drawing, y: float) -> None:
    for number, x in enumerate(COLUMNS):
        drawing.down(x, y - 2, y + 20 + 22 * (number > 1))
    written = (
        "model-00001-of-00004.safetensors …",
        "optimizer/exp_avg-00001-of-00004.safetensors …",
        "config.json tokenizer.json train_state.json …",
    )
    draw_folder(drawing, y + 22, "step-00000500.tmp/", written, "dashed")


def draw_seal(drawing: Drawing, y: float) -> None:
    draw_folder(
        drawing,
        y,
        "step-00000500.tmp/",
        ('manifest.json: {"size": …, "sha256": …}', "of every file"),
        "dashed",
    )


def draw_name(drawing: Drawing, y: float) -> None:
    draw_folder(drawing, y, "step-00000500/", ("a Hugging Face model, and optimizer/ beside it",))


def draw_find(drawing: Drawing, y: float) -> None:
    left = COLUMNS[0] - BAR / 2
    for line, step in enumerate((300, 400, 500)):
        damaged = step == 500
        drawing.rect(left, y + line * 26, 150, 22, "ghost dashed" if damaged else "ghost", 3)
        drawing.text(
            left + 10,
            y + line * 26 + 15,
            f"step-{step:08d}/",
            "code mute" if damaged else "code ink",
        )
    drawing.text(left + 164, y + 42, "← all ranks go on from here", "small word")
    drawing.text(left + 164, y + 68, "a file is not what was written", "small mute")


def draw_read(drawing: Drawing, y: float) -> None:
    for rank, x in enumerate((COLUMNS[0] + 10, MIDDLE, COLUMNS[3] - 10)):
        drawing.text(x, y + 10, f"data {rank}", "middle small mute")
        drawing.bar(x, y + 18, ("full",) * 3)
        for line, state in enumerate(("w", "m", "v")):
            low = y + 42 + line * 20
            drawing.bar(
                x,
                low,
                ["full" if part == rank else "ghost dashed" for part in range(3)],
                HEIGHT + 1,
            )
            drawing.text(x + (rank - 1) * BAR / 3, low + 12, state, "middle small onfill")
    drawing.text(MIDDLE, y + 120, "here: tensor 1, data 3 × ZeRO-1", "middle small mute")


def checkpoint() -> str:
    rows: dict[str, tuple[float, Draw]] = {
        "state": (100, draw_state),
        "whole": (162, draw_whole),
        "files": (113, draw_files),
        "seal": (72, draw_seal),
        "name": (53, draw_name),
        "find": (74, draw_find),
        "read": (120, draw_read),
    }
    return draw("A checkpoint’s way", CHECKPOINT, rows, ranks_header)


# --- the files ------------------------------------------------------------------------------------

PICTURES = {"gradient.svg": gradient, "checkpoint.svg": checkpoint}


def missing_names() -> list[str]:
    """Return the names in the tables that the code does not have."""
    missing = []
    for step in [*GRADIENT.values(), *CHECKPOINT.values()]:
        for name in step.code:
            module, _, inside = name.partition(":")
            try:
                operator.attrgetter(inside)(importlib.import_module(f"megalite.{module}"))
            except (ImportError, AttributeError):
                missing.append(name)
    return missing


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 where something is wrong"
    )
    if not parser.parse_args().check:
        for name, picture in PICTURES.items():
            (DOCS / name).write_text(picture(), encoding="utf-8")
        return 0
    found = [f"{name}: not in the code any more" for name in missing_names()]
    for name, picture in PICTURES.items():
        if not (DOCS / name).is_file() or (DOCS / name).read_text(encoding="utf-8") != picture():
            found.append(f"docs/{name}: not what tools/draw_architecture.py draws; run it")
    print(*found, sep="\n", end="\n" * bool(found))
    return min(len(found), 1)


if __name__ == "__main__":
    sys.exit(main())
