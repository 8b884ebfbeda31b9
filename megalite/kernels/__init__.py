"""One front door per fused operation. See `library` for who computes it."""
