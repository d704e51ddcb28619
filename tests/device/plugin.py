"""The pretended GPU as a plugin file, for the processes of a run: ``--plugin tests/device/plugin.py``."""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import pretend

from leakbench import Attack, Metric, Observation, Reconstruction, Rng, attacks, metrics

pretend.install()


@metrics.register("current_device")
class CurrentDevice(Metric):
    """The index of the current device of the process, in which whatever names no index is made."""

    convention = "an index"
    default = False

    def __call__(self, images: Tensor, truth: Tensor) -> Tensor:
        """Return [T] times the index."""
        return torch.full((len(images),), float(torch.get_device_module(pretend.NAME).current_device()))


@attacks.register("current-device")
class CurrentDeviceAttack(Attack):
    """An attack of a plugin, which has a process of its own and says which device is the current one there."""

    reference = "a test"

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return grey images as failed, with the index."""
        trials, index = observation.trials, torch.get_device_module(pretend.NAME).current_device()
        images = observation.mean_image.expand(trials, *observation.image_shape).clone()
        failed = torch.ones(trials, dtype=torch.bool, device=images.device)
        return Reconstruction(images, failed=failed, reasons=(f"device {index}",) * trials)
