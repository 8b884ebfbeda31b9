"""Writes models of which a part is left out, as ordinary Hugging Face folders.

sparse.py       single weights: by magnitude, Wanda or SparseGPT, anywhere or 2 of every 4
importance.py   how much the parts of a model do: heads, inner features, channels, experts, layers
structured.py   a smaller model, of the parts that do most"""
