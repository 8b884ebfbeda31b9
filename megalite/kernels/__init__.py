"""Fused operations, each behind one Python function. `library` decides which implementation
computes it."""
