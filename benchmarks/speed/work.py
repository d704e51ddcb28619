"""What is measured: the works, their sizes at each scale, and the subjects that do them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import leakbench
from benchmarks.speed import peer, reference
from leakbench import Rng, attacks
from leakbench.core.rng import seeded

Scale = Literal["smoke", "full"]
Attack = Literal["ig", "dlg", "grnn"]

CLASSES = 10
IMAGES = 64
"""How many images ``samples`` has; with more trials than that the images repeat, and the starts do not."""
LATENT = 128
FLOOR, FIRST_LAYER = 7, 5
"""Forward passes that a gradient, and its derivative by the image, cost at least.

Of the first layer, by whose input the loss is not differentiated, they are five.
"""

LEAKBENCH, REFERENCE, BREACHING = "leakbench", "reference", "breaching"


def groups_of(trials: Iterable[int]) -> list[int]:
    """Return the photograph that the image of each trial is a crop of."""
    dataset = leakbench.datasets.parse("samples")
    return [dataset.group(trial % IMAGES) for trial in trials]


@dataclass(frozen=True)
class Work:
    """One attack on one network, measured over iterations.

    Attributes:
        attack: ``ig`` or ``grnn``.
        model: a spec of a model.
        trials: T, how many trials leakbench attacks at once.
        short: iterations of the shorter run.
        long: iterations of the longer run; the difference between the two is what is reported.
        side: the side of the images.
        target: the ratios to reach, against breaching and against the reference; None where there is none.
    """

    attack: Attack
    model: str
    trials: int
    short: int
    long: int
    side: int = 32
    target: tuple[float | None, float | None] = (None, None)

    @property
    def title(self) -> str:
        """What tables call it."""
        return f"{self.attack.upper()}, {TITLES[self.model]}"


@dataclass(frozen=True)
class Ending:
    """DLG on LeNet to its end: time for each success.

    Attributes:
        trials: how many trials.
        steps: outer steps of L-BFGS.
        slots: how many of them leakbench works on at a time; one that is done makes room for the next.
        rounds: in each, leakbench does all trials and the others an equal share of them.
        success: the PSNR in dB from which a reconstruction counts as a success.
        target: see Work.
    """

    trials: int
    steps: int
    slots: int
    rounds: int
    success: float = 15.0
    target: tuple[float | None, float | None] = (12.0, None)


@dataclass(frozen=True)
class Growth:
    """How the time of an iteration grows along an axis.

    Attributes:
        axis: ``trials`` or ``side``.
        model: a spec of a model.
        points: (value, short, long) along the axis.
        trials: T where the axis is ``side``.
    """

    axis: Literal["trials", "side"]
    model: str
    points: tuple[tuple[int, int, int], ...]
    trials: int = 1

    def works(self) -> list[Work]:
        """Return the work at each point."""
        if self.axis == "trials":
            return [Work("ig", self.model, value, short, long) for value, short, long in self.points]
        return [Work("ig", self.model, self.trials, short, long, value) for value, short, long in self.points]


@dataclass(frozen=True)
class Exact:
    """A closed form on one image, beside what breaching's search recovers in the same seconds.

    Attributes:
        attack: a spec.
        model: a spec of a model.
        title: what tables call it.
    """

    attack: str
    model: str
    title: str


@dataclass(frozen=True)
class Plan:
    """Everything that one command measures.

    Attributes:
        rounds: how often every work is measured.
        growth_rounds: how often every point of a growth curve is.
        works: the rows of the table.
        ending: DLG to its end; None to leave it out.
        growth: the curves.
        memory: what the peak memory is taken of, in a process of its own.
        exact: the closed forms.
    """

    rounds: int
    growth_rounds: int
    works: tuple[Work, ...]
    ending: Ending | None
    growth: tuple[Growth, ...]
    memory: tuple[Work, ...]
    exact: tuple[Exact, ...] = ()


EXACT = (
    Exact("disaggregate", "mlp(hidden=512-512, init=default)", "disaggregate, MLP"),
    Exact("peel", "lenet", "peel, LeNet"),
    Exact("peel", "resnet20(mode=eval)", "peel (shift factorisation), ResNet-20, eval mode"),
)

TITLES = {"lenet": "LeNet", "resnet20": "ResNet-20"}


def plan(scale: Scale, device: str) -> Plan:
    """Return what is measured at a scale on a kind of device (``cpu`` or ``cuda``)."""
    if scale == "smoke":
        return Plan(
            rounds=2,
            growth_rounds=1,
            works=(
                Work("ig", "lenet", 16, 1, 4, target=(25.0, None)),
                Work("ig", "resnet20", 8, 1, 2, target=(5.0, None)),
                Work("grnn", "lenet", 4, 1, 2, target=(None, 6.0)),
            ),
            ending=Ending(4, 2, 2, 2),
            growth=(
                Growth("trials", "lenet", ((1, 1, 3), (4, 1, 3))),
                Growth("side", "lenet", ((32, 1, 3), (64, 1, 3)), trials=2),
            ),
            memory=(Work("ig", "lenet", 4, 1, 2),),
            exact=EXACT[:1],
        )
    if device == "cuda":
        return Plan(
            rounds=9,
            growth_rounds=5,
            works=(
                Work("ig", "lenet", 512, 20, 120, target=(50.0, None)),
                Work("ig", "resnet20", 256, 5, 25, target=(50.0, None)),
                Work("grnn", "lenet", 256, 5, 25),
            ),
            ending=Ending(64, 60, 64, 4, target=(None, None)),
            growth=(
                Growth("trials", "lenet", tuple((trials, 10, 60) for trials in (1, 4, 16, 64, 256, 1024))),
                Growth("trials", "resnet20", tuple((trials, 4, 14) for trials in (1, 4, 16, 64, 256))),
                Growth("side", "lenet", tuple((side, 5, 25) for side in (32, 64, 128, 256)), trials=64),
            ),
            memory=tuple(Work("ig", "lenet", trials, 1, 5) for trials in (1, 64, 512))
            + tuple(Work("ig", "resnet20", trials, 1, 3) for trials in (1, 64, 256)),
        )
    return Plan(
        rounds=9,
        growth_rounds=5,
        works=(
            Work("ig", "lenet", 32, 20, 120, target=(25.0, None)),
            Work("ig", "resnet20", 16, 3, 13, target=(5.0, None)),
            Work("grnn", "lenet", 16, 5, 25, target=(None, 6.0)),
        ),
        ending=Ending(64, 60, 64, 4),
        growth=(
            Growth("trials", "lenet", ((1, 20, 120), (4, 10, 60), (16, 5, 35), (64, 3, 15), (256, 1, 5))),
            Growth("trials", "resnet20", ((1, 2, 10), (4, 1, 5), (16, 1, 3), (64, 1, 2), (256, 1, 2))),
            Growth("side", "lenet", ((32, 5, 35), (64, 3, 13), (128, 2, 6), (256, 1, 3)), trials=16),
        ),
        memory=tuple(Work("ig", "lenet", trials, 1, 5) for trials in (1, 4, 16, 64, 256))
        + tuple(Work("ig", "lenet", 16, 1, 3, side) for side in (64, 128, 256))
        + tuple(Work("ig", "resnet20", trials, 1, 2) for trials in (1, 4, 16, 64, 256)),
        exact=EXACT,
    )


@dataclass(frozen=True)
class Scene:
    """The clients, what the server sees of them, and what is private, which serves to judge alone.

    Attributes:
        network: the network that clients run, on the device, without running statistics.
        observation: what the server sees of T trials.
        images: [T, C, H, W] in [0, 1], the truth, on the CPU.
        labels: [T] int64, on the device.
        seed: what the attackers' draws come from.
    """

    network: nn.Module
    observation: leakbench.Observation
    images: Tensor
    labels: Tensor
    seed: int = 0

    @property
    def device(self) -> torch.device:
        """Where the attack runs."""
        return self.observation.device

    def observed(self, trial: int) -> list[Tensor]:
        """Return the gradient of one trial, one tensor a parameter of the network, in their order."""
        return [self.observation.gradient[name][trial].clone() for name, _ in self.network.named_parameters()]

    def rng(self, *trials: int) -> Rng:
        """Return the source that ``leakbench.attack`` gives these trials."""
        return Rng(tuple(f"attack/{self.seed}/{trial}" for trial in trials), self.device)

    def rows(self, trials: range) -> Scene:
        """Return the clients at these places alone; their draws are those of ``rng(*trials)``."""
        at = slice(trials.start, trials.stop)
        own = dict(self.network.named_parameters())
        seen = replace(
            self.observation,
            weights={name: value[at] if name in own else value for name, value in self.observation.weights.items()},
            gradient={name: value[at] for name, value in self.observation.gradient.items()},
            labels=None if self.observation.labels is None else self.observation.labels[at],
        )
        return replace(self, observation=seen, images=self.images[at], labels=self.labels[at])

    def start(self, trial: int) -> tuple[Tensor, Tensor]:
        """Return the starts [1, C, H, W] and [1, K] that leakbench gives this trial, for image and label logits."""
        rng, dtype = self.rng(trial), self.observation.dtype
        return rng.normal("image", self.images.shape[1:]).to(dtype), rng.normal("label", (CLASSES,)).to(dtype)

    def success(self, image: Tensor, trial: int, threshold: float) -> bool:
        """Return whether an image [1, C, H, W] has at least this PSNR in dB after clamping."""
        return psnr(image, self.images[trial : trial + 1]) >= threshold


def psnr(image: Tensor, truth: Tensor) -> float:
    """Return the PSNR in dB of an image, clamped, to the truth in [0, 1]; minus infinity where it is not finite."""
    error = float((image.detach().cpu().clamp(0, 1) - truth).square().mean())
    return float(-10 * torch.tensor(error).log10()) if error == error else float("-inf")


def scene(
    attack: Attack, model: str, trials: int, side: int, device: str, *, dtype: torch.dtype = torch.float32
) -> Scene:
    """Return T clients with the images that ship with leakbench, scaled to side x side, and shared weights."""
    dataset = leakbench.datasets.parse("samples" if side == 32 else f"samples(size={side})")
    images, labels = dataset.load([trial % IMAGES for trial in range(trials)])
    images = images.to(dtype)
    with seeded("speed", model):
        network = leakbench.models.parse(model).build((3, side, side), CLASSES).to(dtype)
    threat = "known-label" if attack == "ig" else "paper"
    observation = leakbench.observe(network, images, labels, threat=threat, device=device)
    alone = copy.deepcopy(network).to(device)
    for module in alone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    return Scene(alone, observation, images, labels.to(device))


def generator(where: Scene, trial: int) -> tuple[reference.Generator, Tensor]:
    """Return a generator with torch's initial weights, and the latent [1, D] that leakbench gives this trial."""
    dtype = where.observation.dtype
    with seeded("speed", "generator", trial):
        made = reference.Generator(LATENT, where.images.shape[1], where.images.shape[2], CLASSES)
    return made.to(where.device, dtype), where.rng(trial).normal("latent", (LATENT,)).to(dtype)


def missing(subject: str, attack: Attack) -> str:
    """Return why a subject cannot do an attack, or an empty string."""
    if attack not in attacks.names():
        return f"leakbench has no attack {attack!r}"
    if subject == BREACHING:
        return "breaching has no such attack" if attack == "grnn" else peer.available()
    return ""


def runner(subject: str, work: Work, where: Scene) -> Callable[[int], object]:
    """Return the call that makes a subject do the work for a number of iterations.

    leakbench attacks all trials of the scene, the others its first one.
    """
    if subject == LEAKBENCH:
        return lambda steps: leakbench.attack(f"{work.attack}(steps={steps})", where.observation, seed=where.seed)
    observed, (start, _), label = where.observed(0), where.start(0), where.labels[:1]
    if work.attack == "grnn":
        made, latent = generator(where, 0)
        return lambda steps: reference.grnn(where.network, observed, copy.deepcopy(made), latent, steps=steps)
    method = reference.ig if subject == REFERENCE else peer.ig
    return lambda steps: method(where.network, observed, label, start, steps=steps)


def flops(work: Work, where: Scene) -> int:
    """Return the least floating-point operations of an iteration for a trial, multiplications and additions apart."""
    image, first = where.images[:1].to(where.device), list[int]()

    def count(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not first:
            first.append(0)
            with FlopCounterMode(display=False) as own:
                layer.forward(*inputs)
            first[0] = own.get_total_flops()

    layers = [layer for layer in where.network.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    with torch.no_grad():
        where.network(image)
    for hook in hooks:
        hook.remove()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        where.network(image)
    least = FLOOR * counter.get_total_flops() - (FLOOR - FIRST_LAYER) * first[0]
    if work.attack == "grnn":
        made, latent = generator(where, 0)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            made(latent)
        least += 3 * counter.get_total_flops()  # forward, and backward by input and by weights
    return least
