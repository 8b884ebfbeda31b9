"""Whether the machines and the ranks of a run are well: before it (preflight.py) and during it
(watchdog.py, stragglers.py)."""
