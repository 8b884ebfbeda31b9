"""Imported by the server that DeepSpeed's ranks are forked from: what its engine would import in
each of them, first and amid its first step."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed.module_inject
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401

import megalite.engine.deepspeed  # noqa: F401
