"""Gradients and images as tensors [T, ...]: scaled, packed, in float64; total variation."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from leakbench.core.types import Gradient
from leakbench.gradients.lanes.layout import JOINED_VALUES, innermost, joined
from leakbench.observation import Observation


def scaled(gradient: Mapping[str, Tensor], factor: Tensor | float | None) -> Gradient:
    """Return gradients [T, *shape] times a factor, one for all or [T]; as they are for None or 1."""
    if factor is None or (isinstance(factor, float) and factor == 1.0):
        return dict(gradient)
    if not isinstance(factor, Tensor):
        return {name: value * factor for name, value in gradient.items()}
    return {name: value * factor.view(-1, *[1] * (value.ndim - 1)) for name, value in gradient.items()}


def pack(gradient: Mapping[str, Tensor]) -> Gradient:
    """Return a gradient whose small tensors are one, [T, N] under the empty name: fewer and larger operations."""
    small = [name for name in sorted(gradient) if gradient[name][0].numel() <= JOINED_VALUES]
    parts = [gradient[name] for name in small]
    placed = sum(part[0].numel() for part in parts if len(part) > 1 and part.stride(0) == 1)
    if 2 * placed > sum(part[0].numel() for part in parts):
        whole = {"": joined([innermost(part) for part in parts])}
    else:
        whole = {"": torch.cat([part.reshape(len(part), -1) for part in parts], 1)} if small else {}
    return whole | {name: tensor for name, tensor in gradient.items() if name not in small}


def total_variation(x: Tensor) -> Tensor:
    """Return [T]: mean |horizontal difference| + mean |vertical difference| of [T, ..., C, H, W] (anisotropic)."""
    across = (x[..., 1:] - x[..., :-1]).abs().flatten(1).mean(1)
    down = (x[..., 1:, :] - x[..., :-1, :]).abs().flatten(1).mean(1)
    return across + down


def root(squared: Tensor) -> Tensor:
    """Return the square root of [T], whose derivative at zero is taken as zero."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def double(observation: Observation) -> Observation:
    """Return the observation with its floating-point tensors in float64."""

    def exact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}

    return replace(
        observation,
        weights=exact(observation.weights),
        gradient=exact(observation.gradient),
        statistics=exact(observation.statistics),
        targets=None if observation.targets is None else observation.targets.double(),
    )
