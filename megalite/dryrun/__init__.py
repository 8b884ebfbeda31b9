"""`megalite dryrun`: the real training program, start to save, as ranks of a cluster that is not
there.

    device     a GPU without one: `csrc/dryrun` gives tensors on it shapes and counted memory, and computes nothing
    groups     process groups that write down what is asked of them
    data       token files and settings that stand for what a laptop does not have
    checkpoint what is saved, without numbers, and resumed from on other GPUs
    deepspeed  what its ranks tell one another
    rank       one rank: `megalite.train.train` on these, and the record of what it did
    server     runs ranks in processes of their own
    match      compares what ranks send, and plays it
    run        the verb: which ranks, and whether the config would run
    report     what it prints

`docs/dryrun.md` says what is simulated and what is not."""
