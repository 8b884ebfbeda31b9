import os

# Ranks and test processes share the two cores of a small machine; torch must not start a thread a core in each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The suite is about CPU ranks over gloo, also where there are GPUs; tools that test GPUs ask for them.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
