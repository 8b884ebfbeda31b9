"""Verbs of the command line, a file each: what it takes, and the call of the room that does the
work. `megalite/cli.py` lists them."""
