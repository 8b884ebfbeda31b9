"""Train a tokenizer on text files: `megalite tokenizer train`, from a checkout."""

import sys

from megalite.cli import main

if __name__ == "__main__":
    sys.exit(main(["tokenizer", "train", *sys.argv[1:]]))
