"""The trials of an observation as the descent through a ReLU network takes them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leakbench.attacks.peeling.network import Network
from leakbench.attacks.peeling.restore import Restored, restore
from leakbench.attacks.peeling.trace import filled
from leakbench.core.rng import Rng
from leakbench.core.types import Reconstruction
from leakbench.observation import Observation


@dataclass(frozen=True)
class OpenedTrial:
    """A trial of a ReLU network.

    Attributes:
        network: in float64 on the CPU.
        searched: the same, of the floating type and on the device of the search for the images.
        sent: the gradient on the CPU, by name; NaN where an entry was not sent.
        noise: [B, C, H, W], from which a search starts.
        draws: of the factorisation.
        note: called with a line if a search cannot be recorded on a GPU.
        spreads: the size of the noise of each tensor, by name, as far as it is known.
    """

    network: Network
    searched: Network
    sent: Mapping[str, Tensor]
    noise: Tensor
    draws: torch.Generator
    note: Callable[[str], None] | None
    spreads: Mapping[str, float]

    def restored(self, steps: int) -> Restored:
        """Return the images by the descent, and a search of this number of steps."""
        return restore(
            self.network,
            self.searched,
            self.sent,
            self.noise,
            self.draws,
            steps,
            self.note,
            self.spreads,
        )


def opened(network: Network, observation: Observation, rng: Rng) -> Iterator[OpenedTrial]:
    """Yield each trial of an observation of this network."""
    noise = rng.normal("start", (*observation.places, *observation.image_shape)).to(observation.dtype)
    noise, spreads = noise if observation.places else noise[:, None], spreads_of(observation)
    for trial, draws in enumerate(rng.generators("factorise")):
        own_values = {name: value[trial].cpu() for name, value in observation.gradient.items()}
        shown = {name: each[trial].cpu() for name, each in (observation.shown or {}).items() if name in own_values}
        sent = {
            name: torch.where(shown[name], value, torch.nan) if name in shown else value
            for name, value in own_values.items()
        }
        known = {name: float(each[trial]) for name, each in spreads.items() if name in sent}
        twin = filled(observation, trial)
        searched = network.on(filled(observation, trial).to(observation.device, observation.dtype), trial)
        yield OpenedTrial(network.on(twin, trial), searched, sent, noise[trial], draws, observation.note, known)


def reconstruction(parts: Sequence[Restored], observation: Observation, labels: Tensor | None) -> Reconstruction:
    """Return what is restored of every trial; a trial of which nothing is has failed."""
    images = torch.stack([each.images for each in parts])
    misfits = torch.stack([each.misfits.mean() for each in parts])
    return Reconstruction(
        images=images if observation.places else images[:, 0],
        labels=labels,
        objective=misfits,
        failed=torch.isnan(misfits),
        reasons=tuple(each.reason for each in parts),
        evaluations=torch.tensor([each.evaluations for each in parts], device=observation.device),
        path="one-at-a-time",
    )


def spreads_of(observation: Observation) -> dict[str, Tensor]:
    """Return the standard deviation [T] of an entry's error in tensors of which an adaptive attacker knows it."""
    adaptive = observation.adaptive
    if adaptive is None or adaptive.spread is None:
        return {}
    gradient = observation.gradient
    unit = torch.full_like(next(iter(gradient.values())).flatten(1)[:, 0], observation.unit)
    unit = unit if observation.size is None else unit * observation.size
    sent = {name: value * unit.view(-1, *[1] * (value.ndim - 1)) for name, value in gradient.items()}
    return {name: value / unit for name, value in adaptive.spread(sent, observation.weights).items()}
