"""Turns raw text into a clean, deduplicated corpus, split into train, valid and test. Start reading
at `run.py`."""
