"""What a layout costs before it is run: memory of each rank, the time of a step, and which layout is best.

    hardware.py     chips and interconnects, read from configs/
    network.py      collectives over groups of ranks: α–β
    shapes.py       what one tensor rank holds of a layer, read from the table of weights
    cost.py         time of one layer, the embedding and the head, forward and backward
    activations.py  bytes that are kept for the backward pass
    schedule.py     the order of passes of each pipeline rank: torch's own
    simulate.py     a step, event by event
    memory.py       bytes of each pipeline rank at its fullest moment
    estimate.py     all of it for one plan
    search.py       all layouts that fit, ranked
    report.py       as text; timeline.py, as a picture

What it knows of time is first principles with few measured constants: matrix products by the share of the peak that was
measured on the chip and by how they fill it, all else by the bytes it moves, messages by latency and bandwidth.
"""
