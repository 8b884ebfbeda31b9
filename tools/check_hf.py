"""Open a checkpoint with transformers' AutoModelForCausalLM and compare its logits with megalite's own, both in
fp32."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from megalite.errors import CheckpointError
from megalite.infer.generate import find_model, load_model
from megalite.runtime.exit_codes import explained
from megalite.utils.outside import reading

TOLERANCE = 1e-4


def largest_difference(folder: Path, num_tokens: int = 256) -> float:
    """Return the largest absolute difference between transformers' and megalite's logits, fp32, on random tokens: two
    rows of `num_tokens`, or as many as the model has positions."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with reading(folder, CheckpointError):
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    ours = load_model(folder, torch.float32, torch.device("cpu"))
    length = min(num_tokens, theirs.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(theirs.config.vocab_size, (2, length), generator=generator)
    with torch.inference_mode():
        return float((theirs(tokens).logits - ours(tokens)).abs().max())


def main() -> int:
    """Compare the models, print the difference, and return 1 where it is above TOLERANCE."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a run, a checkpoint of one, or a Hugging Face folder")
    folder = find_model(parser.parse_args().model)
    difference = largest_difference(folder)
    print(f"AutoModelForCausalLM.from_pretrained({str(folder)!r}): largest logit difference {difference:.1e} (fp32)")
    if not difference <= TOLERANCE:  # NaN fails too
        print(f"error: more than {TOLERANCE:.0e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(explained(main))
