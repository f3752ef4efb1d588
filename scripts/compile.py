"""Compile what would otherwise be compiled in the middle of the first run: TV-L1, DeepSpeed's all-reduce on CPUs."""

import os

import numpy as np

from dataloaders.flow import tvl1

tvl1(np.zeros((2, 32, 32), np.uint8))
if os.environ.get("DS_ACCELERATOR") == "cpu":
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
