"""The networks: I3D, and Rev2Net around it."""

from rev2net.models.i3d import I3D
from rev2net.models.rev2net import Rev2Net

__all__ = ["I3D", "Rev2Net"]
