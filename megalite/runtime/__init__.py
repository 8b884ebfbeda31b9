"""The surroundings of a run on a machine: its folder, exit status, processes, and what it is doing
now."""
