"""Train a model as a config says, from its newest checkpoint where there is one. Run it alone, under
torchrun or under srun: how it is started says how many ranks there are."""

from __future__ import annotations

import argparse

from megalite.commands.parser import VerbParser, add_config
from megalite.runtime.exit_codes import Exit


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_config(parser, "train.steps=100")
    parser.add_argument(
        "--print-plan", action="store_true", help="show what follows from the config, and stop"
    )
    parser.set_defaults(verb=_train)


def _train(arguments: argparse.Namespace) -> Exit:
    """Train, or print the plan."""
    from megalite.config_file import load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_plan:
        from megalite.comm.mesh import Launch
        from megalite.plan import plan as plan_of
        from megalite.plan import smallest_world

        launch = Launch.from_environment()
        # Without a launcher, plan for the fewest ranks that the layout needs.
        world_size = launch.world_size if launch.world_size > 1 else smallest_world(config)
        if launch.rank == 0:
            plan = plan_of(config, world_size)
            print(plan.describe())
            # What DeepSpeed is given follows from the plan, and is what its users know.
            if plan.engine == "deepspeed":
                import json

                from megalite.engine.deepspeed import deepspeed_config

                print(
                    f"DeepSpeed's configuration:\n{json.dumps(deepspeed_config(config, plan), indent=2)}"
                )
        return Exit.DONE
    from megalite.comm.mesh import leave
    from megalite.train import train

    ended = train(config)
    leave(ended)
    return ended
