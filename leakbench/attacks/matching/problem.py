"""The problem of gradient matching: the options of an attack, and the parts that it may define."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from leakbench.attacks.base import Attack
from leakbench.attacks.batch_labels import classifiers
from leakbench.attacks.matching.tensors import scaled, total_variation
from leakbench.core.component import LATER, Count, NonNegative, Positive
from leakbench.core.rng import Rng
from leakbench.core.types import Gradient
from leakbench.errors import Unsupported
from leakbench.gradients.losses import CROSS_ENTROPY, head_of
from leakbench.observation import Observation
from leakbench.optim import Unknowns

StatisticsOf = Callable[[Tensor], Mapping[str, tuple[Tensor, Tensor, int]]]
"""Images -> mean and biased variance [T, C] of what each batch normalisation takes, and the number of values."""


@dataclass(frozen=True)
class MatchingProblem(Attack):
    """A distance between the dummy and the observed gradient, plus total variation, as a function of the image.

    One that optimises other unknowns than the image overrides ``start`` and ``render``. ``observation.labels`` then
    holds the labels in use: the granted ones, those inferred from the gradient, or None if soft labels are optimised.

    Attributes:
        steps: the solver's steps.
        lr: the solver's step size.
        tv: the weight of the image's total variation; with a likelihood of strong noise, the posterior's weight counts
            instead.
        restarts: independent starts; the one that matches best (``judge``) is returned.
        labels: used if the threat model does not grant the label: ``joint`` optimises soft labels with the image,
            ``analytic`` infers the label from the last layer's gradient.
        secrets: the defense's secrets that are not revealed: ``sample`` draws them from their distributions (a key
            once; noise at every evaluation, as the network itself would, or once if the solver ``compares``
            evaluations); ``optimise`` starts from such a draw and optimises those that are inputs of the network (a
            key, noise), and samples those that are weights.
        local: used if a client takes several steps before it sends its weights: ``summed`` matches one gradient, at the
            weights before, to the mean of all steps; ``unrolled`` repeats the client's steps with the dummy, by the
            learning rate that was granted or is learned, the optimiser and its options included. Which images of
            several a step takes is a guess, unless it is granted. ``separate`` does the same with a set of dummies for
            each epoch, so that no order need be guessed, and returns their means (Dimitrov et al. 2022).
        invariance: the weight, with ``separate``, of how far the sets are from each other (``sets.set_distance``).
    """

    steps: Count = 300
    lr: Positive = 1.0
    tv: NonNegative = 0.0
    restarts: Count = 1
    labels: Literal["joint", "analytic"] = "joint"
    secrets: Literal["sample", "optimise"] = "sample"
    local: Literal["summed", "unrolled", "separate"] = field(default="summed", metadata=LATER)
    invariance: NonNegative = field(default=0.1, metadata=LATER)

    per_tensor: ClassVar[bool] = False

    @property
    def repeats(self) -> bool:
        """Whether it repeats the client's local steps."""
        return self.local != "summed"

    @abstractmethod
    def distance(self, gradient: Gradient, observed: Mapping[str, Tensor]) -> Tensor:
        """Return the distance [T] of each dummy gradient [T, *shape] from the observed one.

        Both are packed (``pack``), since most distances treat all parameters alike; an attack whose distance does not
        sets ``per_tensor`` and gets them by name.
        """

    def distance_from(self, observed: Mapping[str, Tensor]) -> Callable[[Gradient], Tensor]:
        """Return ``distance`` from an observed gradient as a function of the dummy gradient.

        An attack overrides it to compute only once what depends on the observed gradient only.
        """
        return partial(self.distance, observed=observed)

    def judge(self, gradient: Gradient, observed: Mapping[str, Tensor], factor: Tensor | None) -> Tensor:
        """Return the measure [T] by which restarts are compared, and an end with its start: the distance.

        Args:
            gradient: as for ``distance``.
            observed: as for ``distance``, without the factor.
            factor: what ``factor`` returned.
        """
        return self.distance(gradient, scaled(observed, factor))

    def reshape(self, distance: Tensor) -> Tensor:
        """Return what is minimised beside the prior: an increasing function of a distance or likelihood [T]; itself."""
        return distance

    @property
    def planned(self) -> int:
        """How many evaluations a search makes at most, for the display of its progress."""
        return self.steps

    @property
    def compares(self) -> bool:
        """Whether the solver compares evaluations, so that all of them must use the same draws."""
        return False

    def factor(self, unknowns: Unknowns) -> Tensor | None:
        """Return the learned factor [T] (1 / rate) that makes an update comparable to a gradient; None for 1."""
        return None

    def findings(self, unknowns: Unknowns) -> Mapping[str, Tensor]:
        """Return further numbers [T] that the attack found, by name."""
        return {}

    def start(self, observation: Observation, rng: Rng) -> Unknowns:
        """Return the start, name -> [T, *shape]: image, and label logits if labels are optimised.

        Both are drawn from N(0, 1). Of a batch: [T, B, *shape].
        """
        places = observation.places
        start = {"image": rng.normal("image", (*places, *observation.image_shape)).to(observation.dtype)}
        if observation.labels is None:
            start["label"] = rng.normal("label", (*places, observation.num_classes)).to(observation.dtype)
        return start

    def render(self, unknowns: Unknowns, observation: Observation) -> tuple[Tensor, Tensor | None]:
        """Return images [T, C, H, W], and label logits [T, K] if labels are optimised; differentiable.

        Of a batch: [T, B, C, H, W] and [T, B, K].
        """
        return unknowns["image"], unknowns.get("label")

    def read_labels(self, observation: Observation) -> Tensor:
        """Return the labels [T] of ``labels=analytic``, by the published rule; raises Unsupported."""
        return analytic_labels(observation)

    def prior(self, images: Tensor) -> Tensor:
        """Return the term [T] that is added to the distance for images [T, ..., C, H, W]: weighted total variation."""
        return self.tv * total_variation(images) if self.tv else images.new_zeros(len(images))

    def penalty(self, images: Tensor, observation: Observation, statistics: StatisticsOf) -> Tensor | None:
        """Return a further term [T] for images [T, ..., C, H, W], which depends on more than the images; None for none.

        Args:
            images: as ``render`` returns them.
            observation: of these trials.
            statistics: returns what each batch normalisation takes of images (``Evaluator.statistics``).
        """
        return None


SIGN_LOSSES = (CROSS_ENTROPY, "bce", "nll")
"""The losses whose derivative by a logit is negative only at the true class."""


def analytic_labels(observation: Observation) -> Tensor:
    """Return [T] int64, the row of the classifier's gradient with the smallest sum (Zhao et al. 2020, iDLG, section 3).

    Exact for one image, a hard label, cross-entropy and a classifier whose inputs are not negative, because only the
    true class has a negative derivative of the loss by its logit. The classifier is the last linear layer with one
    output for each class on which the logits depend, and a gradient that is not zero. The gradient is that of
    its weight [T, K, D] or, if that was withheld, of its bias [T, K]. The same holds for the binary cross-entropy and
    the negative log-likelihood; of one logit the sign gives the label.

    Raises:
        Unsupported: no such gradient was sent, or the network is trained by a loss without this rule.
    """
    head = head_of(observation.model)
    if head.loss not in SIGN_LOSSES:
        raise Unsupported(
            f"the label cannot be inferred from the gradient of the loss {head.name}; use labels=joint, or a threat "
            "model with labels=known"
        )
    outputs = 1 if head.single else observation.num_classes
    for name in classifiers(observation, outputs):
        for tensor in ("weight", "bias"):
            gradient = observation.gradient.get(f"{name}.{tensor}")
            if gradient is not None and bool(gradient.any()):
                rows = gradient.flatten(2).sum(2) if gradient.ndim > 2 else gradient
                return (rows[:, 0] < 0).long() if head.single else rows.argmin(1)
    raise Unsupported(
        "the label cannot be inferred from the gradient: no gradient of a linear classifier was sent, or one of zeros; "
        "use labels=joint, or a threat model with labels=known"
    )
