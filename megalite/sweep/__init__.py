"""Search for a config's best settings: every trial is an ordinary run, and optuna chooses what to
try."""
