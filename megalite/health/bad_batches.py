"""Writes RUN/bad_batches/: the samples of steps with bad numbers, for a person to look at."""

from __future__ import annotations

import json
from pathlib import Path

from megalite.data.mixture import Mixture
from megalite.data.order import Int64s
from megalite.health.numbers import BadStep


def write_batch(folder: Path, bad: BadStep, mixture: Mixture, numbers: Int64s) -> Path:
    """Write a file to `folder` with one JSON line for each sample of a bad step's global batch, and
    return its path.

    `numbers` [G] are the samples' numbers in the run. A line holds the sample's number, its source
    in `mixture`, its number within that source and its token ids; `bad` says what was found. Raises
    OSError."""
    source, sample = mixture.order.locate(numbers)
    tokens = mixture.read(numbers).tokens
    folder.mkdir(parents=True, exist_ok=True)
    # After a rewind, another batch may be bad in the same step.
    path = folder / f"step-{bad.step:08d}-sample-{numbers[0]}.jsonl"
    with path.open("w") as file:
        for row, number in enumerate(numbers.tolist()):
            # The number within the source finds the text again, whatever the mixture's weights are.
            line = {
                "step": bad.step,
                "found": bad.text,
                "sample": number,
                "source": mixture.names[source[row]],
                "sample_of_source": int(sample[row]),
                "tokens": tokens[row].tolist(),
            }
            file.write(json.dumps(line) + "\n")
    return path
