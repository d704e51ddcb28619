"""The images of a recorded update of several images, from the layer that takes their pixels."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from leakbench.attacks.analytic import pixel_layers
from leakbench.attacks.disaggregation import disaggregate
from leakbench.attacks.shared_errors import shared_errors
from leakbench.audit.given import Update
from leakbench.audit.layers import InferredLabels, last_in_use
from leakbench.audit.recipe import StatedRecipe
from leakbench.audit.update_facts import UpdateFacts
from leakbench.core.rng import generator, seeded
from leakbench.engine.worker import png
from leakbench.gradients.counts import (
    class_counts,
    is_far,
    label_counts,
    label_counts_of_update,
    largest_remainders,
    mean_feature,
    moved_logits,
)
from leakbench.gradients.losses import CROSS_ENTROPY, head_of
from leakbench.gradients.low_rank import LowRank
from leakbench.gradients.plain import without_checkpointing
from leakbench.observation import Observation

DISAGGREGATE = "disaggregate"
"""What pages call the way in which the images were derived."""

MIN_AGREEMENT = 0.97
"""The images count as recovered if this share of units is switched on where, and only where, there is an error."""


@dataclass(frozen=True)
class BatchFindings:
    """The images of a local training that follow from one layer in closed form.

    Attributes:
        layer: its name.
        images: [N, C, H, W], in no order; values in [0, 1] if they are right.
        agreement: the least share of units, over all images, that is on where and only where there is an error.
        errors: [M, N], of each image at the layer's output, summed over the steps.
    """

    layer: str
    images: Tensor
    agreement: float
    errors: Tensor

    @property
    def recovered(self) -> bool:
        """Whether the update itself shows that the images are right."""
        return self.agreement >= MIN_AGREEMENT

    def pictures(self) -> tuple[bytes, ...]:
        """Return each image as a PNG."""
        return tuple(png(image) for image in self.images)


def batch_findings(
    observation: Observation, update: Update, shown: UpdateFacts, factor: float = 1.0
) -> BatchFindings | None:
    """Return the images of an update that shows several; None if no layer leaks them.

    Args:
        observation: the update without weight decay, as an attacker sees it.
        update: the update as it was recorded.
        shown: what it shows by itself.
        factor: what the gradient of the observation was divided by, since momentum enlarges the update.
    """
    one = shown.shown
    if one is None or not one.pixels or one.rank < 2 or not one.conclusive:
        return None
    weight, bias = (f"{one.layer}.{part}" for part in ("weight", "bias"))
    if bias not in observation.gradient or not bool(torch.isfinite(observation.gradient[bias]).all()):
        return None
    rank = LowRank(one.rank, one.rank, 0.0, one.noise / factor)
    change, offset = (observation.gradient[name][0].double() for name in (weight, bias))
    before = [(update.before[weight].double(), update.before[bias].double())]
    if update.kind != "gradient":
        before.append((before[0][0] - update.change[weight].double(), before[0][1] - update.change[bias].double()))
    try:
        shared = shared_errors(observation, 0, one.layer)
    except Exception:  # whatever the user's network raises on a batch
        shared = None
    found = disaggregate(change, offset, rank, before, generator("audit", DISAGGREGATE), shared)
    if not found.complete:
        return None
    order, slope, shift = pixel_layers(observation)[one.layer]
    pixels = torch.empty_like(found.inputs)
    pixels[:, order] = (found.inputs - shift) / slope
    images = pixels.view(-1, *observation.image_shape).float()
    if not bool(torch.isfinite(images).all()):
        return None
    return BatchFindings(one.layer, images, found.agreement(*before), found.errors)


PUBLIC_IMAGES = 32
"""The number of images of noise whose probabilities serve if the images themselves are not known."""

LEAST_COUNT, LEAST_SHARE = -0.75, -0.05
"""A count below this, and below this share of all, contradicts the stated learning rate and steps."""


LEAST_DIRECTION = 1e-6
"""A layer shows the classes of an image if the smallest of the logits' directions there is this large, relative to the
largest one."""


@dataclass(frozen=True)
class EstimatedCounts:
    """How often each class occurs among the images of an update, by an estimate.

    Attributes:
        counts: one for each class; empty if there is none.
        layer: the layer whose errors of each image show them; empty if they follow from the last bias.
        several: whether an image may have several of the classes, or none: the counts are then of images.
    """

    counts: tuple[int, ...] = ()
    layer: str = ""
    several: bool = False


def estimated_counts(
    network: nn.Module,
    observation: Observation,
    update: Update,
    shown: UpdateFacts,
    batch: BatchFindings | None,
    recipe: StatedRecipe,
    factor: float = 1.0,
) -> EstimatedCounts:
    """Return how often each class occurs among the images of an update, by an estimate.

    The probabilities are those of the recovered images, or of noise, at the weights before and after the training.

    Args:
        network: the network, with the weights before.
        observation: the update without weight decay, as an attacker sees it.
        update: the update as it was recorded.
        shown: what it shows by itself.
        batch: the images, if they follow from it.
        recipe: what is stated of the training.
        factor: what the gradient of the observation was divided by, since momentum enlarges the update.
    """
    one, last = shown.shown, last_in_use(network, observation)
    head = head_of(network)
    several, none = head.several, EstimatedCounts()
    if head.loss != CROSS_ENTROPY and not head.single and not several:
        return none
    if shown.zero_sum is False or shown.loss:  # not the loss that these estimates are for
        return none
    known = batch is not None and batch.recovered
    if batch is not None and known:
        try:
            has = classes_of_errors(network, batch)
        except Exception:  # whatever the user's network raises on a batch
            has = None
        if has is not None:
            return EstimatedCounts(tuple(has.sum(0).tolist()), batch.layer, several)
    bias = observation.gradient.get(f"{last}.bias")
    count = recipe.images or (shown.images if one is not None and one.conclusive else None)
    if count is None or count < 2 or shown.rule == "sign" or recipe.optimizer not in (None, "sgd"):
        return none
    if bias is None or bias.shape[1] != observation.num_classes:
        return none
    if shown.zero_sum is None and not several and not recipe.images:
        return none
    with seeded("audit", "labels"):
        coarse = torch.rand(PUBLIC_IMAGES, observation.image_shape[0], 3, 3)
        noise = nn.functional.interpolate(coarse, observation.image_shape[1:])
        images = batch.images if batch is not None and known else noise
        try:
            public = _probabilities(network, images.to(observation.dtype), update, None if known else last)
        except Exception:  # whatever the user's network raises on a batch
            return none
    optimiser, steps = recipe.optimiser(), recipe.steps or shown.steps
    change, unit = factor * bias[0].double(), 1.0 if update.kind == "gradient" else None
    if optimiser is not None and steps is not None:
        unit = optimiser.unit(steps)
    change = change * len(change) if several else change  # the loss is the mean over the outputs
    values = None if unit is None else count * (public - change / unit)
    if unit is not None and values is not None and _possible(values, count, several):
        rule = class_counts if several else label_counts
        return EstimatedCounts(tuple(rule(change / unit, public, count).tolist()), several=several)
    found = label_counts_of_update(change, public, count) if unit is None and not several else None
    return none if found is None else EstimatedCounts(tuple(found.tolist()))


def _possible(values: Tensor, images: int, several: bool) -> bool:
    """Return whether one row of estimated counts [E, K] has none that contradicts the stated rate and steps."""
    slack = max(-LEAST_COUNT, -LEAST_SHARE * images)
    beyond = (-values).amax(1)
    if several:  # others sum to the number of images
        beyond = torch.maximum(beyond, (values - images).amax(1))
    return float(beyond.min()) <= slack


def classes_of_errors(network: nn.Module, batch: BatchFindings) -> Tensor | None:
    """Return which classes [N, K] bool each image has, by the error of the image at the layer's output.

    The error of an image is the sum, over the steps, of the derivatives of the loss by the layer's output; that of the
    weights before the training has nearly its direction. By the cross-entropy, the class whose derivative is most like
    it is the label. By the binary cross-entropy of several outputs, the error is the sum of the logits' directions
    times p - y, up to a positive factor: the image has the classes whose coefficients are negative.

    Args:
        network: the network, with the weights before.
        batch: the images.

    Returns:
        None if the layer does not run on one vector for each image, or has too few directions for the classes.
    """
    probe, taken = copy.deepcopy(network), list[Tensor]()
    probe.get_submodule(batch.layer).register_forward_hook(lambda _, inputs, output: taken.append(output))
    with without_checkpointing():
        logits = probe(batch.images.to(next(probe.parameters())))
    if len(taken) != 1 or taken[0].shape != batch.errors.T.shape:
        return None
    rows = []
    for column in logits.unbind(1):
        (row,) = torch.autograd.grad(column.sum(), taken[0], retain_graph=True)
        rows.append(row.double())
    by_logit = torch.stack(rows)  # [K, N, M]
    head = head_of(network)
    if head.several:
        directions, errors = by_logit.permute(1, 2, 0), batch.errors.T.double()[..., None]
        sizes = torch.linalg.svdvals(directions)
        if directions.shape[1] < directions.shape[2] or bool((sizes[:, -1] <= LEAST_DIRECTION * sizes[:, 0]).any()):
            return None
        return torch.linalg.lstsq(directions, errors).solution[..., 0] < 0
    mean = torch.einsum("nk,knm->nm", torch.softmax(logits.detach().double(), 1), by_logit)
    likeness = torch.cosine_similarity(mean - by_logit, batch.errors.T.double(), dim=2)
    return nn.functional.one_hot(likeness.argmax(0), len(rows)).bool()


def counted(
    labels: InferredLabels, estimate: EstimatedCounts, true: Sequence[int] | None, classes: int
) -> InferredLabels:
    """Return inferred labels with the counts, compared with the true labels if these are known.

    Counts of images that may have several classes are not compared: the true labels are one for each image.
    """
    labels, counts = replace(labels, layer=estimate.layer), estimate.counts
    if estimate.several:
        return replace(labels, having=counts, among=0 if true is None else len(true))
    if true is None:
        return replace(labels, counts=counts)
    if not counts:
        right = None
        if len(true) == 1 and labels.inferred is not None:
            right = int(labels.inferred[0] == true[0])
        return replace(labels, correct=right, among=len(true))
    found, sent = torch.bincount(torch.tensor(true), minlength=classes), torch.tensor(counts)
    if int(sent.sum()) > len(true):  # of several inputs of each image, or the list lacks some: more would fit by chance
        sent = largest_remainders(sent, len(true))
    overlap = torch.minimum(found, sent).sum()
    return replace(labels, counts=counts, counted=int(overlap), among=len(true))


def _probabilities(network: nn.Module, images: Tensor, update: Update, last: str | None) -> Tensor:
    """Return estimates [E, K] of the mean probabilities of a client's images from those of other images.

    Of an update of weights, the mean of those before and after.

    Args:
        network: with the weights before.
        images: [P, C, H, W], the other images.
        update: as it was recorded.
        last: the name of the last layer, to whose gradient's mean feature the features of these images are moved for
            a second estimate; None: there is none.
    """
    probe = copy.deepcopy(network)
    models = [_estimates(probe, images, update, last)]
    if update.kind != "gradient":
        for name, change in update.change.items():
            with torch.no_grad():
                probe.get_parameter(name).sub_(change.nan_to_num(0.0, 0.0, 0.0))
        models.append(_estimates(probe, images, update, last))
    return _joined(models)


def _joined(models: Sequence[tuple[Tensor | None, Tensor | None]]) -> Tensor:
    """Return the means over models of their estimates, of those that every model has: [E, K]."""
    kinds = [[one for one in kind if one is not None] for kind in zip(*models)]
    return torch.stack([torch.stack(kind).mean(0) for kind in kinds if len(kind) == len(models)])


def _estimates(
    network: nn.Module, images: Tensor, update: Update, last: str | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the mean probabilities [K] of images, and of the same with moved features.

    Without the gradient of a last layer there is no second one; if the features are far from the batch's, no first one.
    """
    taken, head = list[Tensor](), head_of(network)
    layer = network.get_submodule(last) if last is not None else None
    hook = None if layer is None else layer.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    with torch.no_grad(), without_checkpointing():
        found = head.probabilities(network(images).double()).mean(0)
    if hook is not None:
        hook.remove()
    weight, bias = (update.change.get(f"{last}.{part}") for part in ("weight", "bias"))
    plain = isinstance(layer, nn.Linear) and layer.bias is not None and len(taken) == 1 and taken[0].ndim == 2
    if not plain or weight is None or bias is None or not bool(torch.isfinite(weight).all()):
        return found, None
    assert isinstance(layer, nn.Linear)
    mean = mean_feature(weight, bias)
    if mean is None:
        return found, None
    moved = moved_logits(taken[0], mean, layer.weight.detach(), layer.bias.detach())
    return (None if is_far(taken[0], mean) else found), head.probabilities(moved).mean(0)
