"""A matrix of faults: what is done to a run, and whether it comes out as if nothing had been.

Kills a rank of a small run at a random moment, a hundred times and more, over several layouts; the
launcher's next start must go on from the newest valid checkpoint, and the run end with the same
bits in its loss curve, weights and optimizer state as one that nobody disturbed. Then the other
faults, a line each. Writes report.md, trials.jsonl and kills.png.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from killing import (
    LAYOUTS,
    PHASES,
    STEPS,
    Kill,
    Reference,
    Trial,
    config_of,
    prepare,
    run_trial,
    undisturbed,
)
from rich.progress import track
from scenarios import SCENARIOS


def kill_trials(
    count: int, seed: int, work: Path, lines: TextIO, optimizer: str
) -> tuple[dict[str, Reference], list[Trial]]:
    """Over the layouts in turn; each trial's line is written as it ends."""
    changes = {"optimizer": {"name": optimizer}}
    folders = {layout: work / f"undisturbed-{number}" for number, layout in enumerate(LAYOUTS)}
    references = {
        layout: undisturbed(config_of(folder, layout, **changes), folder)
        for layout, folder in folders.items()
    }
    trials = []
    for number in track(range(count), f"{count} trials", transient=True):
        rng = random.Random(f"{seed} {number}")
        layout = list(LAYOUTS)[number % len(LAYOUTS)]
        trial = Trial(layout)
        while not trial.kills and not trial.problem:  # it came too late
            shutil.rmtree(work / "trial", ignore_errors=True)
            trial = run_trial(layout, references[layout], work / "trial", rng, **changes)
        trials.append(trial)
        print(json.dumps(asdict(trial)), file=lines, flush=True)
    return references, trials


def table_of(kills: Sequence[Kill]) -> list[str]:
    """Markdown, a line a phase."""
    lines = [
        "| killed in | kills | others ended after, s: median, longest | next start's ranks began after, s "
        "| steps done again: mean, most |",
        "|---|---|---|---|---|",
    ]
    for phase in (*PHASES, "all"):
        found = [kill for kill in kills if phase in (kill.phase, "all")]
        if not found:
            continue
        ended, again = [k.until_ended for k in found], [k.until_restarted for k in found]
        lost = [k.lost_steps for k in found]
        lines.append(
            f"| {phase} | {len(found)} | {statistics.median(ended):.2f}, {max(ended):.2f} "
            f"| {statistics.median(again):.2f}, {max(again):.2f} | {statistics.mean(lost):.1f}, {max(lost)} |"
        )
    return lines


def draw_kills(path: Path, references: dict[str, Reference], kills: Sequence[Kill]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = dict(zip(PHASES, plt.get_cmap("tab10").colors, strict=False))
    figure, axes = plt.subplot_mosaic(
        "AA;BC", figsize=(11, 6.5), layout="constrained", height_ratios=(3, 2)
    )
    for row, (layout, reference) in enumerate(references.items()):
        for phase, spans in reference.spans.items():
            bars = [(span.begin, span.end - span.begin) for span in spans if span.rank == 0]
            axes["A"].broken_barh(bars, (row - 0.45, 0.2), color=colors[phase])
        for phase in PHASES:
            here = [kill for kill in kills if kill.layout == layout and kill.phase == phase]
            heights = [row - 0.1 + 0.5 * n / max(1, len(here)) for n in range(len(here))]
            axes["A"].plot(
                [k.seconds for k in here], heights, "x", color=colors[phase], markersize=5
            )
    axes["A"].set(
        xlabel="seconds since the rank began",
        yticks=range(len(references)),
        yticklabels=list(references),
    )
    axes["A"].set_title(
        "an undisturbed run's phases (bars), and when ranks were killed (crosses)", fontsize=10
    )
    left = [0] * len(PHASES)
    for layout, shade in zip(references, ("0.2", "0.5", "0.8"), strict=False):
        counts = [
            sum(kill.layout == layout and kill.phase == phase for kill in kills) for phase in PHASES
        ]
        axes["B"].barh(PHASES, counts, left=left, color=shade, label=layout)
        left = [a + b for a, b in zip(left, counts, strict=True)]
    for label, phase in zip(axes["B"].get_yticklabels(), PHASES, strict=True):
        label.set_color(colors[phase])
    axes["B"].invert_yaxis()
    axes["B"].legend(frameon=False)
    axes["B"].set_xlabel("kills")
    lost = [kill.lost_steps for kill in kills]
    axes["C"].hist(lost, bins=[n - 0.5 for n in range(STEPS + 2)], color="0.4")
    axes["C"].set(
        xlabel="steps done again", ylabel="kills", xlim=(-0.5, max(lost, default=0) + 1.5)
    )
    figure.savefig(path, dpi=130)


def report_of(trials: Sequence[Trial], lines: Sequence[str]) -> str:
    kills = [kill for trial in trials for kill in trial.kills]
    same = sum(trial.same for trial in trials)
    text = [
        f"{len(trials)} trials, {len(kills)} ranks killed; {same} ended with the same bits as a run never disturbed.",
        "",
        *(table_of(kills) if kills else []),
        "",
        *(f"- {line}" for line in lines),
    ]
    for number, trial in enumerate(trials):
        if not trial.same:
            text += [
                "",
                f"trial {number} ({trial.layout}): {trial.problem or 'another outcome'}",
                "",
                trial.log,
            ]
    return "\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--trials", type=int, default=102, help="in each of which one or two ranks are killed"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--optimizer", default="adamw", metavar="NAME", help="of the runs whose ranks are killed"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("faults"), help="folder for the report and the picture"
    )
    parser.add_argument(
        "--scenarios", nargs="*", choices=list(SCENARIOS), default=list(SCENARIOS), metavar="NAME"
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as temporary,
        open(arguments.output / "trials.jsonl", "w") as trial_lines,
    ):
        work = Path(temporary)
        prepare(work)
        references, trials = kill_trials(
            arguments.trials, arguments.seed, work, trial_lines, arguments.optimizer
        )
        outcomes = {}
        for name in track(arguments.scenarios, "other faults", transient=True):
            outcomes[name] = SCENARIOS[name](work / name.replace(" ", "-"))
    kills = [kill for trial in trials for kill in trial.kills]
    if kills:
        draw_kills(arguments.output / "kills.png", references, kills)
    lines = [
        f"{name}: {'' if good else 'WRONG: '}{said}" for name, (good, said) in outcomes.items()
    ]
    report = report_of(trials, lines)
    (arguments.output / "report.md").write_text(report)
    print(report)
    return (
        0
        if all(trial.same for trial in trials) and all(good for good, _ in outcomes.values())
        else 1
    )


if __name__ == "__main__":
    sys.exit(main())
