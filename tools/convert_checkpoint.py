"""Write a model as a Hugging Face folder: `megalite convert`, from a checkout."""

import sys

from megalite.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
