"""Scaling ladders: small models trained for several lengths each, and the law of their losses.

config.py   what a ladder's YAML file says
fit.py      L = E + A/N^α + B/D^β, its intervals, and the size that a budget is best spent on
run.py      trains what is missing
report.py   a table, the law, ladder.json and a picture"""
