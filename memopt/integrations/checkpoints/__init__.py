"""Checkpoints that are written while training goes on, and that are complete or not there at all.

``Checkpoints(folder)`` saves a model and its optimizer through torch.distributed.checkpoint and finds the newest
complete checkpoint again. ``model.safetensors`` holds the whole weights, whatever the number of ranks that wrote it,
and every tool that reads safetensors reads it; ``optimizer.safetensors`` holds the states as they are kept in memory,
codes and scales included; ``rank-00000.pt`` the plain values and random states of each rank.
"""

from memopt.integrations.checkpoints.folders import latest
from memopt.integrations.checkpoints.manager import Checkpoints, Loaded
from memopt.integrations.checkpoints.saving import Saving

__all__ = ["Checkpoints", "Loaded", "Saving", "latest"]
