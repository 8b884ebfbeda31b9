"""Raw text to a clean, deduplicated, split corpus, on datatrove. `run.py` shows the whole way."""
