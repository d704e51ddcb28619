"""GGL: search the latent of a pretrained generator for an image with the observed gradient; and its floor."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from leakbench import generators
from leakbench.attacks.base import Attack, register
from leakbench.attacks.batch_labels import batch_labels
from leakbench.attacks.matching import (
    FINAL_EVALUATION,
    Count,
    GradientMatching,
    MatchingObjective,
    NonNegative,
    Positive,
    analytic_labels,
    double,
)
from leakbench.core.component import Component
from leakbench.core.device import SHARE, free_memory
from leakbench.core.rng import Rng
from leakbench.core.types import Gradient, Reconstruction
from leakbench.errors import BadOption, Unsupported
from leakbench.generators import Generator
from leakbench.gradients.bilinear import squared_norm
from leakbench.observation import Observation
from leakbench.optim import Evaluation, Recordable, Solution, Unknowns, descend
from leakbench.optim.evolve import check_optimiser, evolve

ADAM = "adam"
CLIP_BOUND = 2.0
"""``latent=clip`` cuts the latent off here, as a truncated normal distribution does."""

GRADIENT_COPIES = 8
"""How many times a candidate's gradient its evaluation may take; activations are of the gradient's size or smaller."""

Squash = Literal["free", "clip", "tanh"]


def chosen(spec: str, observation: Observation) -> Generator:
    """Return the generator of a spec for these images; raise Unsupported if it cannot draw such images."""
    return _chosen(spec, observation.image_shape, observation.num_classes, observation.mean_image)


@functools.lru_cache(maxsize=4)
def _chosen(spec: str, shape: tuple[int, int, int], classes: int, mean: Tensor) -> Generator:
    """Return the generator; kept by the identity of the mean image, which is compared on the host."""
    generator = generators.parse(spec).choose(shape, classes, mean)
    generators.check_fit(generator, shape, classes, mean)
    return generator


def draw(generator: Generator, latent: Tensor, labels: Tensor, observation: Observation) -> Tensor:
    """Return the images [..., C, H, W] in [0, 1] of latents [..., d] and labels [...]."""
    loaded = generators.load(generator, latent.device, latent.dtype)
    images = loaded.draw(latent.flatten(0, -2), labels.flatten(), observation.image_shape)
    return images.view(*latent.shape[:-1], *images.shape[1:])


def random_latents(generator: Generator, observation: Observation, rng: Rng, purpose: str) -> Tensor:
    """Return [T, d], or [T, B, d] of batches, drawn from the generator's own distribution."""
    card = generator.card()
    rows = [card.law.draw((*observation.places, card.latent), own) for own in rng.generators(purpose)]
    return torch.stack(rows).to(rng.device, observation.dtype)


def known_labels(observation: Observation) -> Tensor:
    """Return [T] int64, or [T, B] of batches: the granted labels, or those inferred from the gradient."""
    if observation.labels is not None:
        return observation.labels
    return analytic_labels(observation) if observation.count == 1 else batch_labels(observation)


class _Generative(Attack):
    """An attack with a generator, whose spec is its option ``generator``."""

    generator: str

    def settings(self) -> dict[str, Any]:
        """Return name, version, every option, and what identifies the generator's weights."""
        return {**super().settings(), "weights": generators.parse(self.generator).settings()}

    def uses(self) -> Sequence[Component]:
        """Return the generator."""
        return (generators.parse(self.generator),)


@register("ggl")
@dataclass(frozen=True)
class GGL(_Generative, GradientMatching):
    """GGL: gradient-free search for the latent of a pretrained generator whose image has the observed gradient.

    The distance is the mean over parameters of |T(g') - g|^2. The label is inferred from the last layer's gradient and
    conditions the generator; the latent starts at 0; the best candidate by the attack's own objective is returned.
    Images that a generator draws for any gradient are no leakage: compare with ``prior`` and
    ``control=wrong-gradient``.
    Computed in float64, so that the order of candidates does not depend on how many are evaluated at a time. See
    GradientMatching for ``tv``, ``restarts`` and ``secrets``.

    Attributes:
        budget: evaluations of the objective for each image and restart; the released code takes 25,000.
        generator: the spec of a generator: dcgan, dcgan:cifar10, biggan-deep(path=...), file:PATH.
        optimizer: one of nevergrad's by name (CMA, DE, TBPSA, ...), or ``adam`` through the generator.
        popsize: candidates that are evaluated together, for nevergrad's optimizers.
        latent: ``free``; ``clip`` to [-2, 2]; ``tanh``, as in the released code for ImageNet.
        kld: the weight of -(1 + ln s^2 - m^2 - s^2) / 2 for mean m and deviation s of the latent; 0.1 where used.
        transform: T for an adaptive attacker: ``clip`` to the norm of the observed gradient,
            ``sparsify`` each parameter to the observed share of zeros, ``soteria`` the columns of the last matrix that
            are zero in its observed first row. The defense's own ``AdaptiveAttacker`` is applied in any case.
        control: ``wrong-gradient`` matches the gradient of another image: a random sample of the generator with
            the same label, as the attacker's own network gives it. Its score is what label, prior and search are worth.
        lr: the step size of ``adam``.
        batch: the most candidates evaluated at a time; none takes as many as fit into memory.
    """

    batches: ClassVar[bool] = True
    reference: ClassVar[str] = "Li et al. 2022, GGL, CVPR, sections 3.3, 4.2 and 4.4, arXiv 2203.15696 (released code)"
    assumes: ClassVar[str] = (
        "A generator whose training data resemble the images, and the label, inferred from the last layer."
    )
    cost: ClassVar[str] = "``budget`` evaluations of the gradient, 25,000 by default; no second derivative is needed."
    fails: ClassVar[str] = (
        "Returns only images that the generator can draw; for any other image, at best a distant look-alike. Compare "
        "it with `prior` and `control=wrong-gradient`."
    )
    per_tensor: ClassVar[bool] = True
    steps: ClassVar[int] = 1  # type: ignore[misc]  # the budget counts evaluations
    labels: ClassVar[Literal["analytic"]] = "analytic"  # type: ignore[misc]  # a generator draws one class

    budget: Count = 25000
    generator: str = "dcgan"
    optimizer: str = "CMA"
    popsize: Count = 50
    latent: Squash = "free"
    kld: NonNegative = 0.0
    transform: Literal["none", "clip", "sparsify", "soteria"] = "none"
    control: Literal["none", "wrong-gradient"] = "none"
    lr: Positive = 0.1
    batch: Count | None = None

    def __post_init__(self) -> None:
        generators.parse(self.generator)
        if self.optimizer not in (ADAM, "CMA"):  # nevergrad takes seconds to import
            check_optimiser(self.optimizer)

    def check(self, observation: Observation) -> None:
        """Raise Unsupported where generator and images do not fit, or the label cannot be had.

        Raises:
            BadOption: the budget is smaller than one population.
        """
        if self.optimizer != ADAM and self.budget < self.popsize:
            raise BadOption(
                f"budget={self.budget} is smaller than one population (popsize={self.popsize}); give at least as much"
            )
        generator = chosen(self.generator, observation)
        if self.transform != "none" and not observation.threat.informed:
            raise Unsupported(
                f"transform={self.transform} models a defense, and the attacker is oblivious; "
                "use a threat model with informed=true"
            )
        super().check(observation)
        generators.load(generator, observation.device, torch.float64)

    def probe(self, observation: Observation, rng: Rng) -> int | None:
        """Evaluate one population of every trial."""
        exact = double(observation)
        if self.optimizer == ADAM:
            return super().probe(exact, rng)
        objective = self._objective(exact, rng).with_path()
        start = self._begin(objective)
        rows = [trial for trial in range(observation.trials) for _ in range(self.popsize)][: self._batch(objective)]
        index = torch.tensor(rows, device=observation.device)
        with torch.no_grad():
            objective.select(rows)({name: value[index] for name, value in start.items()}, 0)
        return 0

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the best of ``restarts`` searches by the matching distance, for every trial."""
        exact = double(observation)
        exact = replace(exact, labels=known_labels(exact))
        if self.control == "wrong-gradient":
            exact = replace(exact, gradient=self._decoy(exact, rng))
        found = super().run(exact, rng)
        return replace(found, images=found.images.to(observation.dtype))

    @property
    def planned(self) -> int:
        """The budget."""
        return self.budget

    def start(self, observation: Observation, rng: Rng) -> Unknowns:
        """Return zeros [T, d], or [T, B, d] of batches."""
        shape = (observation.trials, *observation.places, chosen(self.generator, observation).card().latent)
        return {"latent": torch.zeros(shape, dtype=observation.dtype, device=observation.device)}

    def render(self, unknowns: Unknowns, observation: Observation) -> tuple[Tensor, Tensor | None]:
        """Return the generator's images for latents and labels."""
        assert observation.labels is not None, "the label is granted or inferred"
        latent = squash(unknowns["latent"], self.latent)
        return draw(chosen(self.generator, observation), latent, observation.labels, observation), None

    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the mean over parameters of the squared distances between T(g') and g."""
        changed = transformed(gradient, observed, self.transform)
        return torch.stack([squared_norm(changed[name] - target) for name, target in observed.items()]).mean(0)

    def solve(self, objective: MatchingObjective, start: Unknowns) -> Solution:
        """Run the optimizer over the latent, and over the secrets if these are optimised."""
        whole = _Regularised(objective, self)
        if self.optimizer == ADAM:
            note = objective.observation.note
            return descend(whole, start, steps=self.budget, lr=dict.fromkeys(start, self.lr), note=note)
        return evolve(
            whole,
            start,
            objective.rng,
            optimizer=self.optimizer,
            budget=self.budget,
            popsize=self.popsize,
            batch=self._batch(objective),
        )

    def _batch(self, objective: MatchingObjective) -> int:
        """Return how many candidates are evaluated at a time: what was asked for, or what memory is sure to hold."""
        if self.batch is not None:
            return self.batch
        size = sum(value[0].numel() * value.element_size() for value in objective.observation.gradient.values())
        return max(1, int(SHARE * free_memory(objective.observation.device) / (GRADIENT_COPIES * size)))

    def _decoy(self, observation: Observation, rng: Rng) -> Gradient:
        """Return the gradient of a random sample of the generator for each trial, with the trial's label."""
        objective = self._objective(observation, rng).with_path()
        generator = chosen(self.generator, observation)
        assert observation.labels is not None
        latent = random_latents(generator, observation, rng, "decoy")
        with torch.no_grad():
            images = draw(generator, latent, observation.labels, observation)
            return objective.dummy(images, observation.labels, {}, FINAL_EVALUATION)


@dataclass(frozen=True)
class _Regularised(Recordable):
    """The matching objective plus the divergence of the latent."""

    objective: MatchingObjective
    attack: GGL

    def buffered(self) -> _Regularised:
        return replace(self, objective=self.objective.buffered())

    def prepare(self, evaluation: Evaluation) -> None:
        self.objective.prepare(evaluation)

    def __call__(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
        value = self.objective(unknowns, evaluation)
        if self.attack.kld:
            apart = divergence(squash(unknowns["latent"], self.attack.latent))
            value = value + self.attack.kld * apart.view(len(value), -1).mean(1)
        return value

    def select(self, rows: Any) -> _Regularised:
        return replace(self, objective=self.objective.select(rows))


@register("prior")
@dataclass(frozen=True)
class PriorFloor(_Generative):
    """Floor: a random image of the generator with the label that ggl infers; the gradient gives nothing else.

    Where the threat model does not grant the label, it is inferred from the gradient, which tables show only for the
    first defense; the comparison of ``ggl`` with it takes each defense's own.

    Attributes:
        generator: the spec of a generator, as in ``ggl``.
        latent: as in ``ggl``: ``free``; ``clip`` to [-2, 2]; ``tanh``.
    """

    batches: ClassVar[bool] = True
    reference: ClassVar[str] = "a baseline by definition"
    assumes: ClassVar[str] = "The generator and the label that GGL has."
    cost: ClassVar[str] = "One image of the generator."
    fails: ClassVar[str] = "It is a floor: only what GGL recovers beyond it has leaked."
    floor: ClassVar[bool] = True

    generator: str = "dcgan"
    latent: Squash = "free"

    def __post_init__(self) -> None:
        generators.parse(self.generator)

    def check(self, observation: Observation) -> None:
        """Raise Unsupported where generator and images do not fit, or the label cannot be had."""
        generator = chosen(self.generator, observation)
        known_labels(observation)
        generators.load(generator, observation.device, observation.dtype)

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return one sample of the generator for every trial."""
        generator = chosen(self.generator, observation)
        labels = known_labels(observation)
        latent = squash(random_latents(generator, observation, rng, "prior"), self.latent)
        with torch.no_grad():
            return Reconstruction(draw(generator, latent, labels, observation), labels=labels)


def squash(latent: Tensor, how: Squash) -> Tensor:
    """Return the latent [N, d] as it enters the generator."""
    if how == "clip":
        return latent.clamp(-CLIP_BOUND, CLIP_BOUND)
    return latent.tanh() if how == "tanh" else latent


def divergence(latent: Tensor) -> Tensor:
    """Return [...]: -(1 + ln(s^2 + 1e-10) - m^2 - s^2) / 2, with mean m and deviation s over the d coordinates."""
    mean, variance = latent.mean(-1), latent.var(-1, unbiased=False)
    return -0.5 * (1 + (variance + 1e-10).log() - mean.square() - variance)


def transformed(gradient: Gradient, observed: Mapping[str, Tensor], transform: str) -> Gradient:
    """Return T(g'), [T, *shape] per parameter, with T's strength taken from the observed gradient (released code).

    Args:
        gradient: the dummy gradients.
        observed: the observed ones.
        transform: ``none``; ``clip``: g' min(1, |g| / |g'|) with norms over all parameters; ``sparsify``: the entries
            of each parameter below the quantile of |g'| at the share of zeros in all of g become zero; ``soteria``:
            the columns of the last matrix that are zero in its observed first row become zero.
    """
    if transform == "clip":
        bound = torch.stack([squared_norm(value) for value in observed.values()]).sum(0).sqrt()
        norm = torch.stack([squared_norm(gradient[name]) for name in observed]).sum(0).sqrt()
        factor = (bound / norm.clamp(min=1e-30)).clamp(max=1)
        return {name: gradient[name] * factor.view(-1, *[1] * (gradient[name].ndim - 1)) for name in observed}
    if transform == "sparsify":
        zeros = torch.stack([(value == 0).flatten(1).sum(1) for value in observed.values()]).sum(0)
        share = zeros / sum(value[0].numel() for value in observed.values())
        return {name: _sparsified(gradient[name], share) for name in observed}
    if transform == "soteria":
        matrices = [name for name, value in observed.items() if value.ndim == 3]
        if not matrices:
            raise Unsupported("transform=soteria needs the gradient of a linear layer, and none was sent")
        last = matrices[-1]
        kept = (observed[last][:, :1] != 0).to(gradient[last].dtype)
        return {**gradient, last: gradient[last] * kept}
    return gradient


def _sparsified(value: Tensor, share: Tensor) -> Tensor:
    """Return [T, *shape] with the entries of each row below its quantile at ``share`` [T] set to zero."""
    sizes = value.detach().abs().flatten(1)
    place = (share.double() * (sizes.shape[1] - 1)).ceil().long().clamp(0, sizes.shape[1] - 1)
    threshold = sizes.sort(1).values.gather(1, place[:, None])
    return torch.where(sizes >= threshold, value.flatten(1), 0.0).view_as(value)
