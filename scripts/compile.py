"""Compile what would otherwise be compiled in the middle of the first run: TV-L1, DeepSpeed's all-reduce on CPUs."""

import os

import numpy as np

from dataloaders.flow import tvl1
from rev2net.distributed import keep_builds_apart

tvl1(np.zeros((2, 32, 32), np.uint8))
if os.environ.get("DS_ACCELERATOR") == "cpu":
    keep_builds_apart()
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
