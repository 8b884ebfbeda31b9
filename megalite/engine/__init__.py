"""Engines own the weights, the gradients and the optimizer; the loop only feeds them losses."""
