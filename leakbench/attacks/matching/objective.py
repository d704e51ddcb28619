"""The objective of gradient matching, of T trials at once."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Self

import torch
from torch import Tensor, nn

from leakbench.attacks.matching.buffer import DrawBuffer
from leakbench.attacks.matching.problem import MatchingProblem
from leakbench.attacks.matching.sets import TakenImages, guessed, set_distance, set_filters
from leakbench.attacks.matching.tensors import pack, root, scaled
from leakbench.core.rng import Rng
from leakbench.core.types import Gradient, Secret
from leakbench.defenses.adaptive import AdaptiveAttacker, Dummies
from leakbench.gradients import Evaluator, choose_path
from leakbench.gradients.bilinear import FromGaps, FromProducts, squared_norm
from leakbench.gradients.draws import Generators, MadeDraws
from leakbench.gradients.evaluate import tensors_of
from leakbench.gradients.lanes.evaluation import GradientComparison, fills
from leakbench.gradients.lanes.fused import add_variation, variation
from leakbench.gradients.lanes.layout import innermost
from leakbench.gradients.lanes.maps import enough
from leakbench.gradients.losses import head_of
from leakbench.observation import Observation
from leakbench.optim import Evaluation, Explicit, Recordable, Unknowns, take_rows
from leakbench.optim.client import ClientState

ROUGHNESS = 0.05
"""The expected absolute difference of neighbouring pixels of an image in [0, 1]: that of 32 photographs.

Beside a likelihood, total variation is the prior of a Laplace distribution of this scale.
"""

SECRET_PREFIX = "secret:"
"""The beginning of the name of an unknown that is a secret."""

SOFTNESS = 0.3
"""The softness of Adam's steps, of the client's optimiser, where they are differentiated (``ClientOptimiser``)."""

FINAL_EVALUATION = -1
"""The number of the evaluation by which start and end of an optimisation are compared, on the same draws."""


@dataclass(frozen=True)
class MatchingObjective(Recordable, Explicit):
    """The matching objective of T trials, a function of the attack's unknowns and of the secrets that it optimises.

    Attributes:
        attack: defines the unknowns, the distance and the prior.
        observation: the observation, with the labels if they are granted or were inferred from the gradient.
        evaluator: computes dummy gradients.
        tensors: every fixed tensor of the network: public weights, revealed and sampled secrets.
        rng: the source of draws at each evaluation (noise, the masks of dropout).
        restart: the index of the restart, from 0 on.
        draws: the draws of the client's random layers that its gradient leaks, [T, 1, *shape] by number of the call
            (``read_draws``).
        buffer: the secrets and the draws of random layers for each evaluation, for one that is recorded; None: they are
            drawn in it.
        prior_factor: [T], by which each trial's prior is multiplied while the objective is minimised; None for 1.
    """

    attack: MatchingProblem
    observation: Observation
    evaluator: Evaluator
    tensors: Mapping[str, Tensor]
    rng: Rng
    restart: int = 0
    draws: Mapping[int, Tensor] = field(default_factory=dict)
    prior_factor: Tensor | None = None
    buffer: DrawBuffer | None = None

    def buffered(self) -> Self:
        """Return the objective with what each evaluation draws in a buffer on the device."""
        return replace(self, buffer=DrawBuffer(self.observation.device))

    def prepare(self, evaluation: Evaluation) -> None:
        """Fill the buffer for a recorded evaluation, and report it."""
        self._report(evaluation)
        if self.buffer is not None:
            self.buffer.prepare(evaluation)

    def __call__(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
        """Return [T], the matching distance, as the attack reshapes it, plus the prior."""
        self._report(evaluation)
        images, logits = self.render(unknowns)
        distance, prior = self._distance(images, logits, unknowns, evaluation), self._prior(images)
        penalty = self.attack.penalty(
            images,
            self.observation,
            lambda own: self.evaluator.statistics(
                self._filled(unknowns, evaluation), own, self._generators(evaluation)
            ),
        )
        prior = prior if penalty is None else prior + penalty
        if self.epochs > 1:
            prior = prior + self.attack.invariance * set_distance(images.unflatten(1, (self.epochs, -1)), self._filters)
        return self.attack.reshape(distance) + (prior if self.prior_factor is None else self.prior_factor * prior)

    @cached_property
    def taken(self) -> TakenImages:
        """Which images each of a client's steps takes: as granted, or a guess that stays the same."""
        observation = self.observation
        assert observation.client is not None
        steps = observation.order or guessed(observation.client, observation.trials, observation.device)
        return TakenImages.of(steps, observation.count)

    @property
    def epochs(self) -> int:
        """How many sets of images are unknown: with ``local=separate`` one for each epoch."""
        return self.taken.epochs if self.attack.local == "separate" and self.observation.client is not None else 1

    @cached_property
    def _filters(self) -> Tensor:
        """The filters by which sets of images are compared."""
        like = next(iter(self.observation.gradient.values()))
        return set_filters(self.observation.image_shape[0]).to(like)

    def explicit(self, unknowns: Unknowns, evaluation: Evaluation) -> tuple[Tensor, Unknowns] | None:
        """Return value and gradient by the kernels, for the image itself, labels, and total variation; else None."""
        if not self._is_explicit or set(unknowns) - {"image", "label"}:
            return None
        self._report(evaluation)
        images, logits = (unknowns[name].detach() if name in unknowns else None for name in ("image", "label"))
        assert images is not None
        with torch.enable_grad():
            leaf = None if logits is None else logits.requires_grad_()
            labels = self._labels(leaf)
        known = labels.detach() if labels.requires_grad else labels  # the same tensor each time is made ready once
        gap = isinstance(self._from_observed, FromGaps)
        found = self.evaluator.comparison(self._filled(unknowns, evaluation), images, known, self._observed, gap)
        value, by_dots, by_squares = self._derived(found)
        by_image, by_labels = found.derivative(by_dots, by_squares, labels.requires_grad)
        gradient = {"image": by_image.view(images.shape)}
        if leaf is not None:
            gradient["label"] = torch.zeros_like(leaf)
            if by_labels is not None:
                (gradient["label"],) = torch.autograd.grad(labels, leaf, by_labels.view(labels.shape))
        if self.attack.tv:
            weight = self.attack.tv if self.prior_factor is None else self.attack.tv * self.prior_factor
            each = torch.full_like(value, weight) if isinstance(weight, float) else weight
            gradient["image"] = by_image = gradient["image"].contiguous()
            value = value + weight * add_variation(images, each, by_image)
        return value, {name: gradient[name] for name in unknowns}

    def _derived(self, found: GradientComparison) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reshaped distance [T] and its derivatives by both results of a comparison."""
        distance = self._from_observed
        assert isinstance(distance, FromProducts | FromGaps)
        if isinstance(distance, FromProducts) and distance.derived and self._keeps_distance:
            return distance.derived(found.dots, found.squares)
        given = (found.squares,) if isinstance(distance, FromGaps) else (found.dots, found.squares)
        with torch.enable_grad():
            leaves = [rows.detach().requires_grad_() for rows in given]
            value = self.attack.reshape(distance.of(*leaves))
            by = torch.autograd.grad(value.sum(), leaves)
        return value.detach(), found.dots if len(by) == 1 else by[0], by[-1]

    @cached_property
    def _keeps_distance(self) -> bool:
        """Whether the attack minimises the distance itself."""
        return type(self.attack).reshape is MatchingProblem.reshape

    @cached_property
    def _is_explicit(self) -> bool:
        """Whether the objective is made of what ``explicit`` knows, and nothing else."""
        kind, adaptive = type(self.attack), self.observation.adaptive
        usual = all(
            getattr(kind, name) is getattr(MatchingProblem, name) for name in ("render", "prior", "penalty", "factor")
        )
        encoded = adaptive is not None and adaptive.encode is not None
        wide = min(self.observation.image_shape[-2:]) > 1 or not self.attack.tv
        return usual and wide and not encoded and self._compares

    def _prior(self, images: Tensor) -> Tensor:
        """Return the attack's prior [T]; the usual one, total variation, by the kernels where they serve."""
        usual = type(self.attack).prior is MatchingProblem.prior
        if usual and self.attack.tv and self.evaluator.path == "lanes" and min(images.shape[-2:]) > 1:
            return self.attack.tv * variation(images)
        return self.attack.prior(images)

    def _report(self, evaluation: Evaluation) -> None:
        """Tell the user how far the search is; a number beyond it is of an evaluation that only compares."""
        done = evaluation if isinstance(evaluation, int) else max(evaluation, default=0)
        planned = self.attack.planned
        if self.observation.tick is not None and done <= planned:
            self.observation.tick(self.restart * planned + done, self.attack.restarts * planned)

    def match(self, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
        """Return the match [T] of these unknowns by ``judge``, the less the better; infinite for a negative rate.

        The prior is added only to a likelihood, which needs it: under strong noise, the most likely image is noise.
        """
        images, logits = self.render(unknowns)
        match = self._distance(images, logits, unknowns, evaluation, judge=True)
        if self.null_likelihood is not None:
            match = self.attack.reshape(match) + self._prior(images)
        factor = self.attack.factor(unknowns)
        return match if factor is None else torch.where(factor > 0, match, torch.inf)

    def render(self, unknowns: Unknowns) -> tuple[Tensor, Tensor | None]:
        """Return the images [T, C, H, W] of these unknowns, and the label logits [T, K] if labels are optimised.

        Of a batch: [T, B, C, H, W] and [T, B, K].
        """
        return self.attack.render(unknowns, self.observation)

    def cap_by_null(self, match: Tensor) -> Tensor:
        """Return ``match`` [T], but no more than a gradient of zeros has, if it is a likelihood.

        A rate that is learned can turn any gradient into an update of zero, so a start may not count as worse.
        """
        likelihood = self.null_likelihood
        return (
            match
            if likelihood is None
            else torch.minimum(match, self.attack.reshape(likelihood / self.likelihood_scale))
        )

    def _distance(
        self, images: Tensor, logits: Tensor | None, unknowns: Unknowns, evaluation: Evaluation, judge: bool = False
    ) -> Tensor:
        images, labels = self._encoded(images, self._labels(logits), evaluation)
        factor, adaptive = self.attack.factor(unknowns), self.observation.adaptive
        if factor is None and not judge and self._compares:
            return self._compared(images, labels, unknowns, evaluation)
        gradient = self._masked(self.dummy(images, labels, unknowns, evaluation))
        if adaptive is not None and adaptive.models_release:
            unit, back = self._units(factor)
            gradient = scaled(gradient, unit)
            if adaptive.release is not None:
                gradient = adaptive.release(self._dummies(gradient, images, labels, unknowns, evaluation))
            gradient = self._released(adaptive, gradient)
            if adaptive.likelihood is not None:
                return adaptive.likelihood(gradient, self._sent, self.observation.weights) / self.likelihood_scale
            gradient = scaled(gradient, back)
        elif factor is None:
            gradient = self._resized(gradient)
        observed = self._observed
        if not self.attack.per_tensor:
            gradient, observed = pack(gradient), self._packed
        if factor is not None and self.observation.size is not None:
            factor = factor * self.observation.size
        if judge:
            return self.attack.judge(gradient, observed, factor)
        if factor is None:
            return self._from_observed(gradient)
        return self.attack.distance(gradient, scaled(observed, factor))

    def ratio(self, unknowns: Unknowns) -> Tensor:
        """Return [T], |g'| / |g| for the dummy gradient and what was sent, in its ``unit``."""
        found = []
        for some, own in self.parts(unknowns):
            images, logits = some.render(own)
            with torch.no_grad():
                labels = some._labels(logits)
                gradient = some._masked(some._gradient(some._filled(own, 0), images, labels, 0))
            observed = some.observation.gradient
            sizes = [torch.stack([squared_norm(x[name]) for name in observed]).sum(0) for x in (gradient, observed)]
            found.append((sizes[0] / sizes[1]).sqrt())
        ratio = torch.cat(found)
        return ratio if self.observation.size is None else ratio / self.observation.size

    def _labels(self, logits: Tensor | None) -> Tensor:
        """Return the labels [T], or class probabilities [T, K], of the dummy gradient; of a batch [T, B], [T, B, K]."""
        if self.observation.targets is not None:
            return self.observation.targets
        if self.observation.labels is not None:
            return self.observation.labels
        assert logits is not None, "an attack that optimises labels renders their logits"
        return head_of(self.observation.model).probabilities(logits)

    def _encoded(self, images: Tensor, labels: Tensor, evaluation: Evaluation) -> tuple[Tensor, Tensor]:
        """Return the images and labels that the network runs on, as the adaptive attacker has them encoded."""
        adaptive = self.observation.adaptive
        if adaptive is None or adaptive.encode is None:
            return images, labels
        encoded, named = adaptive.encode(images, labels, self.rng.generators(self._purposes("encode", evaluation)))
        granted = self.observation.threat.labels == "known"  # a label that was inferred is an encoded one
        return encoded, named if granted else labels

    def _dummies(
        self, gradient: Gradient, images: Tensor, labels: Tensor, unknowns: Unknowns, evaluation: Evaluation
    ) -> Dummies:
        """Return what a release is simulated on: dummy gradients in the units in which they are sent."""

        def generators(number: int) -> list[torch.Generator]:
            return self.rng.generators(self._purposes(f"release {number}", evaluation))

        return Dummies(gradient, images.detach(), labels.detach(), self._filled(unknowns, evaluation), generators)

    def _masked(self, gradient: Gradient) -> Gradient:
        """Return the dummy gradient, with zeros at the entries that are unknown of the observed one."""
        shown = self.observation.shown
        if shown is None:
            return gradient
        return {
            name: torch.where(shown[name], value, 0.0) if name in shown else value for name, value in gradient.items()
        }

    def _resized(self, gradient: Gradient) -> Gradient:
        """Return the dummy gradient with the norm of the observed one in the trials whose size says nothing."""
        size = self.observation.size
        if size is None:
            return gradient
        observed = self.observation.gradient
        squares = (torch.stack([squared_norm(x[name]) for name in observed]).sum(0) for x in (gradient, observed))
        own, other = map(root, squares)
        return scaled(gradient, torch.where(size == 1, 1.0, other / own.clamp(min=torch.finfo(own.dtype).tiny)))

    def _units(self, factor: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """Return the factor from the mean gradient to what is sent, and that from there to what is matched.

        The first is a known or learned rate.
        """
        unit, size = self.observation.sent_unit, self.observation.size
        if unit is not None:
            return unit, 1 / unit if size is None else 1 / unit / size
        assert factor is not None, "``prepare`` refuses to model a release in its own units without a rate"
        learned = self.observation.unit / factor
        return learned, 1 / learned

    def _compared(self, images: Tensor, labels: Tensor, unknowns: Unknowns, evaluation: Evaluation) -> Tensor:
        """Return the distance of a dummy gradient that is as it is: by the kernels, which need not write it."""
        distance = self._from_observed
        assert isinstance(distance, FromProducts | FromGaps)
        gap = isinstance(distance, FromGaps)
        tensors = self._filled(unknowns, evaluation)
        dots, squares = self.evaluator.compare(tensors, images, labels, self._observed, gap)
        return distance.of(squares) if isinstance(distance, FromGaps) else distance.of(dots, squares)

    @cached_property
    def _compares(self) -> bool:
        """Whether the kernels can compare the dummy gradient with the observed one, without anything in between."""
        observation = self.observation
        adaptive, threat = observation.adaptive, observation.threat
        repeats = self.attack.repeats and threat.shares == "weights"
        as_it_is = observation.shown is None and observation.size is None and not repeats
        return (
            self.evaluator.path == "lanes"
            and fills(observation.count)
            and as_it_is
            and (adaptive is None or not adaptive.models_release)
            and set(self._observed) <= set(self.evaluator.names)
            and isinstance(self._from_observed, FromProducts | FromGaps)
        )

    @cached_property
    def _from_observed(self) -> Callable[[Gradient], Tensor]:
        """The distance from the observed gradient, whose own part is computed once.

        An attack may have another ``distance`` than the one that it is derived from, whose ``distance_from`` then does
        not count.
        """
        observed = self._observed if self.attack.per_tensor else self._packed
        own = next(vars(kind) for kind in type(self.attack).__mro__ if {"distance", "distance_from"} & set(vars(kind)))
        if "distance_from" not in own:
            return partial(self.attack.distance, observed=observed)
        return self.attack.distance_from(observed)

    @cached_property
    def _observed(self) -> Mapping[str, Tensor]:
        """The observed gradient, with the trials innermost in memory if dummy gradients are so."""
        return self._laid_out(self.observation.gradient)

    @cached_property
    def _fixed(self) -> Mapping[str, Tensor]:
        """Every fixed tensor of the network, those of each trial's own laid out as ``_observed``."""
        own = self._own
        apart = {name: value for name, value in self.tensors.items() if value.ndim > own[name].ndim}
        return {**self.tensors, **self._laid_out(apart)}

    def _laid_out(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        path, like = self.evaluator.path, next(iter(self.observation.gradient.values()))
        # transformers multiply rows of tokens, whose gradients torch lays out as usual
        tokens = any(isinstance(module, nn.LayerNorm) for module in self.evaluator.model.modules())
        if path != "lanes" and (path != "batched" or tokens or not enough(self.observation.trials, like)):
            return tensors
        return {name: innermost(value) for name, value in tensors.items()}

    @cached_property
    def _packed(self) -> Gradient:
        return pack(self._observed)

    @cached_property
    def _sent(self) -> Mapping[str, Tensor]:
        """The gradient or update in the units in which it was sent."""
        return scaled(scaled(self.observation.gradient, self.observation.unit), self.observation.size)

    @cached_property
    def likelihood_scale(self) -> Tensor:
        """The divisor [T] of a likelihood, by which it becomes comparable to the weighted total variation.

        It is the negative log-likelihood of a gradient of zeros, which makes it relative as a distance is; or more, if
        the noise is so strong that the total variation must get its weight in the posterior (maximum a posteriori): an
        image of N values and total variation v has the negative log-density N v / ROUGHNESS.
        """
        unlikely, tv = self.null_likelihood, self.attack.tv
        assert unlikely is not None
        values = math.prod((*self.observation.places, *self.observation.image_shape))
        least = values / (ROUGHNESS * tv) if tv else torch.finfo(unlikely.dtype).tiny
        return unlikely.clamp(min=least)

    @cached_property
    def null_likelihood(self) -> Tensor | None:
        """The negative log-likelihood [T] of a gradient of zeros; None if there is no likelihood."""
        adaptive = self.observation.adaptive
        if adaptive is None or adaptive.likelihood is None:
            return None
        zeros = self._released(adaptive, {name: torch.zeros_like(value) for name, value in self._sent.items()})
        return adaptive.likelihood(zeros, self._sent, self.observation.weights)

    def _released(self, adaptive: AdaptiveAttacker, gradient: Gradient) -> Gradient:
        """Return a gradient, in the units in which it is sent, as the adaptive attacker has it released."""
        if adaptive.surrogate is None:
            return gradient
        return self._masked(adaptive.surrogate(gradient, self._sent, self.observation.weights))

    def parts(self, unknowns: Unknowns) -> Iterator[tuple[Self, Unknowns]]:
        """Yield the objective and the unknowns of as many trials at a time as fit into memory."""
        trials = self.observation.trials
        size = self.observation.slots or trials
        for begin in range(0, trials, size):
            part = range(begin, min(begin + size, trials))
            some = self if size >= trials else self.select(part)
            yield some, {name: value[begin : part.stop].detach() for name, value in unknowns.items()}

    def select(self, rows: Sequence[int]) -> Self:
        """Return the objective of only these trials."""
        own = self._own
        index = torch.tensor(list(rows), device=self.observation.device)

        def take(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: take_rows(value, index) if value.ndim > own[name].ndim else value
                for name, value in tensors.items()
            }

        observation = replace(
            self.observation,
            weights=take(self.observation.weights),
            gradient=take(self.observation.gradient),
            labels=None if self.observation.labels is None else self.observation.labels[index],
            counts=None if self.observation.counts is None else self.observation.counts[index],
            order=tuple(rows[index] for rows in self.observation.order),
            targets=None if self.observation.targets is None else self.observation.targets[index],
            shown=None if self.observation.shown is None else take(self.observation.shown),
            size=None if self.observation.size is None else self.observation.size[index],
            statistics={name: value[index] for name, value in self.observation.statistics.items()},
        )
        return replace(
            self,
            observation=observation,
            tensors=take(self.tensors),
            rng=self.rng.select(rows),
            draws={place: value[index] for place, value in self.draws.items()},
            prior_factor=None if self.prior_factor is None else self.prior_factor[index],
        )

    def with_path(self) -> Self:
        """Return the objective with the evaluation path that serves its network; raises Unsupported."""
        observation = self.observation
        unknowns = {
            SECRET_PREFIX + secret.name: draw(
                secret, self._own[secret.name], self.rng, "probe", observation.dtype, observation.places
            )
            for secret in observation.secrets
            if secret.fresh or secret.optimised
        }
        tensors = self._filled(unknowns, 0)
        shape, classes = observation.image_shape, observation.num_classes
        # secrets are optimised, and local steps repeated, through weights, by which the kernels do not differentiate
        repeats = self.attack.repeats and observation.threat.shares == "weights"
        lanes = 0 if observation.secrets or repeats else observation.slots or observation.trials
        path = choose_path(self.evaluator, tensors, shape, classes, observation.count, lanes=lanes)
        return replace(self, evaluator=replace(self.evaluator, path=path))

    def dummy(self, images: Tensor, labels: Tensor, unknowns: Unknowns, evaluation: Evaluation) -> Gradient:
        """Return the gradient [T, *shape] of images [T, ..., C, H, W] and labels; under ``no_grad`` it has no graph.

        If local steps are repeated, it is the mean of their gradients, or the update in the units of what was sent.
        """
        tensors, threat = self._filled(unknowns, evaluation), self.observation.threat
        repeats = self.attack.repeats and threat.shares == "weights"
        if self.observation.client is not None and repeats:
            return self._trained(tensors, images, labels, unknowns, evaluation)
        steps = threat.local_steps if repeats else 1
        if steps == 1:
            return self._gradient(tensors, images, labels, evaluation)
        factor = self.attack.factor(unknowns)
        trained = tuple(name for name, parameter in self.evaluator.model.named_parameters() if parameter.requires_grad)
        every = replace(self, evaluator=replace(self.evaluator, names=trained))
        total: Gradient = {}
        for step in range(steps):
            if step:
                tensors = tensors | self._fresh(unknowns, evaluation, step)
            gradient = every._gradient(tensors, images, labels, evaluation, step)
            total = {name: total[name] + gradient[name] if total else gradient[name] for name in self.evaluator.names}
            move = scaled(gradient, threat.learning_rate if factor is None else 1 / factor)
            tensors = tensors | {name: tensors[name] - move[name] for name in trained}
        return {name: value / steps for name, value in total.items()}

    def _trained(
        self, tensors: dict[str, Tensor], images: Tensor, labels: Tensor, unknowns: Unknowns, evaluation: Evaluation
    ) -> Gradient:
        """Return the update of a client's training on dummy images, in the units of what was sent.

        Args:
            tensors: of the network, before the training.
            images: [T, B, C, H, W] or, of several sets, [T, E B, C, H, W]; of one image without B.
            labels: [T, B] or [T, B, K]; of one image without B.
            unknowns: of the evaluation.
            evaluation: its number.
        """
        observation = self.observation
        client, factor, rate = observation.client, self.attack.factor(unknowns), observation.threat.learning_rate
        assert client is not None
        trained = tuple(name for name, parameter in self.evaluator.model.named_parameters() if parameter.requires_grad)
        every = replace(self, evaluator=replace(self.evaluator, names=trained))
        optimiser, state, before = client.optimiser(rate or 1.0), ClientState(), tensors
        if optimiser.kind != "sgd":
            optimiser = replace(optimiser, softness=SOFTNESS)
        trials = torch.arange(len(images), device=images.device)[:, None]
        fresh = [secret.name for secret in observation.secrets if secret.fresh]
        for step, (rows, epoch) in enumerate(zip(self.taken.steps, self.taken.earlier)):
            if step:
                tensors = tensors | self._fresh(unknowns, evaluation, step)
            some, used = (images, labels), tensors
            if observation.count > 1:
                at = rows if self.epochs == 1 else epoch * observation.count + rows
                some = images[trials, at], labels[trials, rows]
                used = tensors | {name: tensors[name][trials, rows] for name in fresh}
            gradient = every._gradient(used, *some, evaluation, step)
            moved, state = optimiser.moved({name: tensors[name] for name in trained}, gradient, state)
            if rate is None and factor is not None:  # of a step at rate 1
                change = scaled({name: tensors[name] - moved[name] for name in trained}, 1 / factor)
                moved = {name: tensors[name] - change[name] for name in trained}
            tensors = tensors | moved
        kept = 1 - (0.0 if rate is None else optimiser.decayed(client.steps))
        update = {name: kept * before[name] - tensors[name] for name in self.evaluator.names}
        if rate is not None:
            return scaled(update, 1 / (observation.sent_unit or rate * client.steps))
        return scaled(update, None if factor is None else factor / observation.rate_unit)

    def _gradient(
        self, tensors: Mapping[str, Tensor], images: Tensor, labels: Tensor, evaluation: Evaluation, step: int = 0
    ) -> Gradient:
        """Return the gradient of images and labels at these tensors, in one of the local steps."""
        differentiable = torch.is_grad_enabled()

        with torch.enable_grad():
            return self.evaluator.gradient(
                tensors,
                images,
                labels,
                create_graph=differentiable,
                generators=self._generators(evaluation, step),
                known=self.draws if step == 0 else {},
            )

    def _generators(self, evaluation: Evaluation, step: int = 0) -> Generators | MadeDraws:
        """Return what makes the draws of the network's random layers in a step of an evaluation."""

        def generators(evaluation: Evaluation = evaluation) -> list[torch.Generator]:
            return self.rng.generators(self._purposes("layers", evaluation, step))

        made = None if self.buffer is None else self.buffer.layers(step, len(self.rng.keys), generators)
        return made or generators

    def _filled(self, unknowns: Unknowns, evaluation: Evaluation) -> dict[str, Tensor]:
        """Return every tensor of the network: fixed, optimised, and drawn for this evaluation."""
        names = {secret.name: SECRET_PREFIX + secret.name for secret in self.observation.secrets}
        optimised = {name: unknowns[own] for name, own in names.items() if own in unknowns}
        return {**self._fixed, **optimised, **self._fresh(unknowns, evaluation)}

    def _fresh(self, unknowns: Unknowns, evaluation: Evaluation, step: int = 0) -> dict[str, Tensor]:
        """Return the secrets that are drawn for one of the local steps of this evaluation."""
        drawn = [
            secret
            for secret in self.observation.secrets
            if secret.fresh and SECRET_PREFIX + secret.name not in unknowns
        ]
        return {secret.name: self._drawn(secret, evaluation, step) for secret in drawn}

    def _drawn(self, secret: Secret, evaluation: Evaluation, step: int) -> Tensor:
        """Return the draws [T, *shape] of a secret for one of the local steps of an evaluation."""

        def made(rng: Rng, evaluation: Evaluation) -> Tensor:
            purposes, observation = self._purposes("pass", evaluation, step), self.observation
            return draw(secret, self._own[secret.name], rng, purposes, observation.dtype, observation.places)

        if self.buffer is None:
            return made(self.rng, evaluation)
        on_host = replace(self.rng, device=torch.device("cpu"))
        return self.buffer.take(f"{secret.name} {step}", lambda number: made(on_host, number))

    def _purposes(self, of: str, evaluation: Evaluation, step: int = 0) -> list[str]:
        """Return the purpose of a draw by trial: the part that it is of, the evaluation, and the local step."""
        if self.attack.compares:
            evaluation = 0
        each = [evaluation] * len(self.rng.keys) if isinstance(evaluation, int) else evaluation
        return [f"{of} {number}" + (f" step {step}" if step else "") for number in each]

    @cached_property
    def _own(self) -> dict[str, Tensor]:
        return tensors_of(self.evaluator.model)


def draw(
    secret: Secret,
    like: Tensor,
    rng: Rng,
    purpose: str | Sequence[str],
    dtype: torch.dtype,
    places: tuple[int, ...] = (),
) -> Tensor:
    """Return the attacker's own draws [T, *shape] of a secret, shaped as in the architecture.

    Of a fresh one each image of a batch (``Observation.places``) has its own: [T, B, *shape].
    """
    shape = (*places, *like.shape) if secret.fresh else tuple(like.shape)
    name = secret.name
    purposes = f"{purpose} {name}" if isinstance(purpose, str) else [f"{own} {name}" for own in purpose]
    rows = [secret.law.draw(shape, generator) for generator in rng.generators(purposes)]
    return torch.stack(rows).to(rng.device, dtype)


def evaluate(objective: MatchingObjective, unknowns: Unknowns) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the match [T], the images and the label logits of these unknowns, in parts that fit into memory."""
    values, images, logits = [], [], []
    for some, own in objective.parts(unknowns):
        values.append(some.match(own, FINAL_EVALUATION).detach())
        with torch.no_grad():
            image, logit = some.render(own)
        images.append(image)
        logits += [] if logit is None else [logit]
    return torch.cat(values), torch.cat(images), torch.cat(logits) if logits else None
