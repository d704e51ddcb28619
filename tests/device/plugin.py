"""The pretended GPU as a plugin file, for the processes of a run: ``--plugin tests/device/plugin.py``."""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import pretend

from leakbench import Metric, metrics

pretend.install()


@metrics.register("current_device")
class CurrentDevice(Metric):
    """The index of the current device of the process, in which whatever names no index is made."""

    convention = "an index"
    default = False

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] times the index."""
        return torch.full((len(images),), float(torch.get_device_module(pretend.NAME).current_device()))
