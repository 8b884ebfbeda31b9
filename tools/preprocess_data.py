"""Tokenize text, or rows of labelled data, into token files: `megalite preprocess`, from a checkout."""

import sys

from megalite.cli import main

if __name__ == "__main__":
    sys.exit(main(["preprocess", *sys.argv[1:]]))
