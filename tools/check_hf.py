"""Compare a checkpoint's logits in transformers with megalite's own: megalite.infer.check_hf, from a
checkout."""

import sys

from megalite.cli import explained
from megalite.infer.check_hf import main

if __name__ == "__main__":
    sys.exit(explained(main))
