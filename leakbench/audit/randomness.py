"""Whether clients draw random numbers while they train: dropout, stochastic depth, noise, augmentation in a network."""

import copy
import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from leakbench.core.rng import generator, seeded
from leakbench.core.text import english, plural
from leakbench.gradients.plain import without_checkpointing
from leakbench.models.surgery import linears

SHOWN = 3
"""The most layers that draw random numbers that are named."""


@dataclass(frozen=True)
class Randomness:
    """The random draws of a network in the mode in which clients train it.

    Attributes:
        layers: the names of the layers that draw; empty if nothing is drawn.
        inputs: the linear layers whose inputs depend on draws.
    """

    layers: tuple[str, ...]
    inputs: frozenset[str]

    def names(self) -> str:
        """Return the first names of the layers that draw, and how many others there are."""
        others = len(self.layers) - SHOWN
        return english([*self.layers[:SHOWN], *([plural(others, "other")] if others > 0 else [])])

    def facts(self, known: bool) -> list[tuple[str, str]]:
        """Return what a page states of the draws, as (name, value); ``known`` if all follow from what was sent."""
        if not self.layers:
            return []
        inferred = "all their draws are" if known else "not all their draws are"
        words = f"{self.names()}; active while clients train, and {inferred} inferred from what was sent"
        return [("random layers", words)]

    def doubt(self) -> str:
        """Return why nothing is protected by these draws, in one line; empty if there are none."""
        if not self.layers:
            return ""
        return (
            f"Clients draw random numbers while they train (in {self.names()}), and the attackers did not infer all "
            "of them from what was sent. An attacker who can, or who repeats the attack with other draws, may recover "
            "more, so an image that was not recovered is not protected; --mode eval shows what leaks without the draws."
        )


def randomness(network: nn.Module, image_shape: tuple[int, int, int], images: int = 1) -> Randomness:
    """Return what a network draws when it runs on an image, or several, in its mode; the network is not changed.

    A layer draws if one of the random generators of torch, NumPy or Python is in another state after it than before.
    """
    probe = copy.deepcopy(network)
    kind = next((value.dtype for value in probe.parameters() if value.is_floating_point()), torch.float32)
    image = torch.rand((images, *image_shape), generator=generator("randomness")).to(kind)
    found: list[str] = []
    before: list[tuple[list[Any], int]] = []

    def enter(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        before.append((_states(), len(found)))

    def leave(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        states, count = before.pop()
        if len(found) == count and states != _states():  # no layer within has drawn
            found.append(name or "the network itself")

    for name, layer in probe.named_modules():
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(partial(leave, name))
    taken: list[dict[str, Tensor]] = [{}, {}]
    kept = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        for number, values in enumerate(taken):
            handles = [
                layer.register_forward_pre_hook(partial(_keep, values, name)) for name, layer in linears(probe).items()
            ]
            with seeded("randomness", number), without_checkpointing(), torch.no_grad():
                probe(image)
            for handle in handles:
                handle.remove()
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002
    depend = {name for name, value in taken[0].items() if not torch.equal(value, taken[1].get(name, value))}
    return Randomness(tuple(dict.fromkeys(found)), frozenset(depend) if found else frozenset())


def _keep(values: dict[str, Tensor], name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Keep what a layer takes when it first runs."""
    values.setdefault(name, inputs[0].detach().clone())


def _states() -> list[Any]:
    """Return the states of the generators that a network may draw from, which can be compared."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002
    return [torch.get_rng_state().tolist(), random.getstate(), repr(numpy)]
