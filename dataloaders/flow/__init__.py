"""Optical flow: the estimator and the 8-bit codes in which it is stored."""

from dataloaders.flow.codes import BOUND, decode_flow, encode_flow
from dataloaders.flow.tvl1 import tvl1

__all__ = ["BOUND", "decode_flow", "encode_flow", "tvl1"]
