"""List what computes each fused operation on this machine, and why."""

from __future__ import annotations

import argparse

from megalite.commands.parser import VerbParser


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    parser.set_defaults(verb=_ops)


def _ops(arguments: argparse.Namespace) -> None:
    """Print the implementation of each operation, for the CPU and a GPU if there is one."""
    import torch

    from megalite.kernels.library import OPERATIONS, explain

    devices = {"cpu": "CPU"} | (
        {"cuda": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    )
    for device, name in devices.items():
        print(f"{name}:")
        for operation in OPERATIONS:
            implementation, reason = explain(operation, device)
            print(f"  {operation:18}{implementation:12}{reason}")
