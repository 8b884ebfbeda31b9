"""RUN/bad_batches/: the samples of steps with bad numbers, for a person to look at."""

from __future__ import annotations

import json
from pathlib import Path

from megalite.data.mixture import Mixture
from megalite.data.order import Int64s
from megalite.health.numbers import BadStep


def write_batch(folder: Path, bad: BadStep, mixture: Mixture, numbers: Int64s) -> Path:
    """A line a sample of the global batch, numbers [G]: its number in the run, its source and number there, and its
    token ids. Raises OSError."""
    source, sample = mixture.order.locate(numbers)
    tokens = mixture.read(numbers).tokens
    folder.mkdir(parents=True, exist_ok=True)
    # After a rewind, another batch may be bad in the same step.
    path = folder / f"step-{bad.step:08d}-sample-{numbers[0]}.jsonl"
    with path.open("w") as file:
        for row, number in enumerate(numbers.tolist()):
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
