"""`megalite quickstart`: the main job from one end to the other on CPU ranks.

corpus.py   text: the Python standard library's own source files
report.py   what the run has learned, and a picture of it
run.py      the steps, each a verb of the command line"""
