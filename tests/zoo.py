"""Broken and silly defenses, and a tiny matrix to run them in: none of them may ever be ranked as protecting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leakbench import Dataset, Defense, Gradient, Matrix, Step
from leakbench.core.rng import generator

BROKEN = ("nan", "inf", "one-nan", "late-nan", "int32", "bool", "complex", "sparse", "nothing", "nil", "list", "shape")
BROKEN += ("name", "raises", "encode-nan", "encode-shape", "wrap", "loss-nan")
"""Defenses whose clients send something that is no gradient: each is an error of the defense."""
SOMETIMES = "sometimes"
"""A defense that is broken for the second image of ``Smooth`` only."""
HARMLESS = ("x1e30", "x1e-30", "flip", "roll", "shuffle", "float64", "half", "withheld", "dodge")
"""Defenses that send the gradient, or most of it, in another form: they protect from nobody who knows them."""
DTYPES = ("float64", "half", "bfloat16")
"""Types that are cast to the network's own."""
EMPTY = ("zeros", "other")
"""Defenses whose clients send nothing of their image: nobody recovers it."""
KINDS = tuple(dict.fromkeys((*BROKEN, SOMETIMES, *HARMLESS, *DTYPES, *EMPTY)))


@dataclass(frozen=True)
class Zoo(Defense):
    """A defense of one of the ``KINDS``."""

    name: ClassVar[str] = "zoo"
    kind: str = "zeros"

    def wrap(self, model: nn.Module) -> nn.Module:
        return nn.Sequential(model, Twice()) if self.kind == "wrap" else model

    def encode(self, x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.kind == "encode-nan":
            return torch.full_like(x, torch.nan), y
        return (x[:, :, 1:], y) if self.kind == "encode-shape" else (x, y)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss = super().loss(model, x, y)
        return loss * torch.nan if self.kind == "loss-nan" else loss

    def release(self, step: Step, rng: torch.Generator) -> Any:
        if self.kind == "raises":
            raise RuntimeError("no release\ntoday")
        release = RELEASES.get(self.kind)
        return step.gradient() if release is None else release(step)


class Twice(nn.Module):
    """A layer that breaks on every input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x[:, 0, 0]])


def each(change: Callable[[Tensor], Any]) -> Callable[[Step], dict[str, Any]]:
    """Return a release that changes every tensor of the gradient by itself."""
    return lambda step: {name: change(value) for name, value in step.gradient().items()}


def one_nan(step: Step) -> Gradient:
    sent = step.gradient()
    next(iter(sent.values())).flatten()[0] = torch.nan
    return sent


def grey(step: Step) -> bool:
    """Return whether a step is taken on the grey image of the check before a run."""
    return bool((step.images == 0.5).all())


def shuffled(value: Tensor) -> Tensor:
    order = torch.randperm(value.numel(), generator=generator("shuffle", value.numel()))
    return value.flatten()[order].view_as(value)


def of_another_image(step: Step) -> Gradient:
    images = torch.rand(step.images.shape, generator=generator("another image"))
    loss = nn.functional.cross_entropy(step.model(images), torch.zeros_like(step.labels))
    parameters = {name: p for name, p in step.model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()))))


def without_last_layer(step: Step) -> Gradient:
    sent = step.gradient()
    last = list(sent)[-1].rpartition(".")[0]
    return {name: value for name, value in sent.items() if name.rpartition(".")[0] != last}


RELEASES: dict[str, Callable[[Step], Any]] = {
    "zeros": each(torch.zeros_like),
    "nan": each(lambda value: torch.full_like(value, torch.nan)),
    "inf": each(lambda value: torch.full_like(value, torch.inf)),
    "one-nan": one_nan,
    "late-nan": lambda step: step.gradient() if grey(step) else one_nan(step),
    "sometimes": lambda step: one_nan(step) if torch.equal(step.images, Smooth().load([1])[0]) else step.gradient(),
    "x1e30": each(lambda value: value * 1e30),
    "x1e-30": each(lambda value: value * 1e-30),
    "flip": each(torch.neg),
    "roll": each(lambda value: value.roll(1, 0)),
    "shuffle": each(shuffled),
    "other": of_another_image,
    "withheld": without_last_layer,
    "dodge": lambda step: without_last_layer(step) if grey(step) else step.gradient(),
    "int32": each(lambda value: (1e3 * value).int()),
    "bool": each(lambda value: value > 0),
    "complex": each(lambda value: value.to(torch.complex64)),
    "sparse": each(lambda value: value.to_sparse()),
    "float64": each(torch.Tensor.double),
    "half": each(torch.Tensor.half),
    "bfloat16": each(torch.Tensor.bfloat16),
    "nothing": lambda step: {},
    "nil": lambda step: None,
    "list": each(torch.Tensor.tolist),
    "shape": each(lambda value: value[:1, None]),
    "name": lambda step: {f"my.{name}": value for name, value in step.gradient().items()},
}


@dataclass(frozen=True)
class Smooth(Dataset):
    """Smooth random images of 11 x 11 pixels in one of 4 classes, 8 in all."""

    name: ClassVar[str] = "smooth"
    num_classes: ClassVar[int] = 4
    image_shape: ClassVar[tuple[int, int, int]] = (1, 11, 11)

    def __len__(self) -> int:
        return 8

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        coarse = torch.cat([torch.rand(1, 1, 3, 3, generator=generator("smooth", index)) for index in indices])
        images = nn.functional.interpolate(coarse, size=11, mode="bilinear")
        return images, torch.tensor([index % 4 for index in indices])

    def mean(self) -> Tensor:
        return torch.full(self.image_shape, 0.5)


def network() -> nn.Module:
    """Return a small chain that ``peel`` undoes and a search inverts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.Sigmoid(),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Linear(6 * 121, 4),
        )


def matrix(*kinds: str, **axes: Any) -> Matrix:
    """Return a matrix of peel, lb and ig behind no defense and the ones of these kinds."""
    given = {"attacks": ["peel", "lb(steps=15)", "ig(steps=20)"], "models": [network()], "datasets": [Smooth()]}
    own = [Zoo(kind) for kind in kinds]
    return Matrix(**{**given, "defenses": ["none", *own], "images": 2, "metrics": ["psnr"], **axes})
