"""Clean, deduplicate and split raw text as CONFIG says: `megalite corpus`, from a checkout."""

import sys

from megalite.cli import main

if __name__ == "__main__":
    sys.exit(main(["corpus", *sys.argv[1:]]))
