"""The plan of a run: mesh, stages, batch arithmetic and sizes that follow from a config and a
number of ranks.

It is pure arithmetic, and so runs on a laptop for any cluster. Step time and activation memory are
in `planner/`.

    layout.py       `Plan`, and the cuts and stages that it is made of
    make.py         `make_plan`: from a config to a plan
    checks.py       settings that do not go together
    stages.py       how many layers each stage of a pipeline has
    memory.py       the bytes of weights, gradients and optimizer state
"""

from megalite import make_callable
from megalite.plan.layout import (
    Cut,
    Place,
    Plan,
    Sized,
    StageSpan,
    expert_cut,
    smallest_world,
)
from megalite.plan.make import make_plan, nodes_that_fit, plan, plan_of_sizes
from megalite.plan.memory import Held, resident_bytes
from megalite.plan.stages import balance

make_callable(__name__)  # as `plan`

__all__ = [
    "Cut",
    "Held",
    "Place",
    "Plan",
    "Sized",
    "StageSpan",
    "balance",
    "expert_cut",
    "make_plan",
    "nodes_that_fit",
    "plan",
    "plan_of_sizes",
    "resident_bytes",
    "smallest_world",
]
