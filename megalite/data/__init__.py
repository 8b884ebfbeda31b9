"""Text to tokens to batches: reading, tokenizing, the memory-mapped dataset, the order of samples,
the loader."""
