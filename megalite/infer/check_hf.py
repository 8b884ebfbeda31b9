"""Open a checkpoint with transformers' AutoModelForCausalLM, AutoModelForMaskedLM or
AutoModelForSeq2SeqLM, and compare its logits with megalite's own, both in fp32."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from megalite.errors import CheckpointError
from megalite.infer.generate import find_model, load_model
from megalite.models import read_hf_config
from megalite.models.layers import SequenceInfo, Source
from megalite.registry import families
from megalite.utils.outside import reading

TOLERANCE = 1e-4


def auto_class(folder: Path) -> str:
    """Return the name of transformers' class that opens a model with its head for tokens."""
    kind = str(read_hf_config(folder).get("model_type"))
    predicts = families.get(kind).CONFIG.PREDICTS if kind in families else "causal"
    return {"masked": "AutoModelForMaskedLM", "seq2seq": "AutoModelForSeq2SeqLM"}.get(
        predicts, "AutoModelForCausalLM"
    )


def largest_difference(folder: Path, num_tokens: int = 256) -> float:
    """Return the largest absolute difference between transformers' and megalite's logits, fp32, on
    random tokens: two rows of `num_tokens`, or as many as the model has positions."""
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with reading(folder, CheckpointError):
        load = getattr(transformers, auto_class(folder)).from_pretrained
        theirs = load(folder, dtype=torch.float32, trust_remote_code=False).eval()
    ours = load_model(folder, torch.float32, torch.device("cpu"))
    length = min(num_tokens, ours.config.max_positions)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(theirs.config.vocab_size, (2, length), generator=generator)
    if (padding := theirs.config.pad_token_id) is not None:  # of which RoBERTa counts no positions
        tokens = tokens.masked_fill(tokens == padding, 0)
    with torch.inference_mode():
        if ours.config.task == "seq2seq":
            source = tokens.flip(1)
            places = SequenceInfo.whole(length, tokens.device, Source.whole(source))
            wanted = theirs(input_ids=source, decoder_input_ids=tokens).logits
            return float((wanted - ours(tokens, places)).abs().max())
        return float((theirs(tokens).logits - ours(tokens)).abs().max())


def main() -> int:
    """Compare the model that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model", type=Path, help="a run, a checkpoint of one, or a Hugging Face folder"
    )
    return compare(parser.parse_args().model)


def compare(model: Path) -> int:
    """Print the difference of a model's logits; return 1 where it is above TOLERANCE."""
    folder = find_model(model)
    difference = largest_difference(folder)
    print(
        f"{auto_class(folder)}.from_pretrained({str(folder)!r}): largest logit difference {difference:.1e} (fp32)"
    )
    if not difference <= TOLERANCE:  # NaN fails too
        print(f"error: more than {TOLERANCE:.0e}", file=sys.stderr)
        return 1
    return 0
