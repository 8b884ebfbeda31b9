"""Writes models whose matrices are stored in few bits, in the formats of compressed-tensors, which
transformers and vLLM open. How numbers and scales are stored says `kernels/schemes.py`.

gptq.py        rounds the columns of a matrix one after another, so that later ones make up for the error of earlier
scaling.py     scales the inputs of matrices, and what makes these by the inverse: AWQ, SmoothQuant
layers.py      runs a model layer by layer over calibration rows: the inputs of each matrix, and the perplexity
matrices.py    changes the matrices of a stored model one after another as it is written, which pruning does, too
run.py         reads a model, quantises its layers and writes the new folder"""
