"""Make training rows by a model as RECIPE says: `megalite synthesize`, from a checkout."""

import sys

from megalite.cli import main

if __name__ == "__main__":
    sys.exit(main(["synthesize", *sys.argv[1:]]))
