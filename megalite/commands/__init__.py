"""Verbs of the command line, a file each: what they take, and the work, which is done in other
rooms. `megalite/cli.py` lists them."""
