"""The client's side: the only place that holds private images, labels and secrets.

One client step is plain torch on the CPU, one trial at a time; on a GPU the gradients of many clients are computed at
once, if their defense serves that (``Defense.joint``). What the server may see of T steps is an Observation.
"""

from leakbench.victim.client import Client, StepRecord
from leakbench.victim.network import build, groups_of
from leakbench.victim.observing import Exchange, check_reveals, observe
from leakbench.victim.trainer import layer_inputs

__all__ = [
    "Client",
    "Exchange",
    "StepRecord",
    "build",
    "check_reveals",
    "groups_of",
    "layer_inputs",
    "observe",
]
