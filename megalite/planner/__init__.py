"""Predicts what a layout costs before it is run: memory of each rank, time of a step, and which
layout is best.

    hardware.py     chips and interconnects, read from configs/
    network.py      time of collectives over groups of ranks (α–β model)
    shapes.py       what one tensor rank holds and computes of each layer, by the weight table and the architecture
    kernels.py      time of single kernels
    cost.py         time of one layer, the embedding and the head, forward and backward
    activations.py  bytes kept for the backward pass; attention_activations.py, cross_activations.py: by attention
    schedule.py     order of passes of each pipeline rank, taken from torch
    simulate.py     a step, event by event
    memory.py       bytes of each pipeline rank at its peak; deepspeed.py: under DeepSpeed
    estimate.py     all of it for one plan
    search.py       all layouts that fit, ranked
    report.py       the result as text; timeline.py: as a picture
    run.py          the command `megalite plan`

Times come from first principles with few measured constants: matrix products from the share of the
peak measured on the chip and from how well they fill it, everything else from the bytes it moves,
messages from latency and bandwidth.
"""
