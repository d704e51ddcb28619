"""How often each label occurs in a batch, by the gradient of the last layer.

The derivative of the mean cross-entropy by the logits of image i is (p_i - y_i) / B, and their sum over the batch is
the gradient by the last bias: the mean probabilities less the counts over B. An untrained network gives nearly the
same probabilities for any image, so those of public images serve; or, if its features of these differ from those of the
batch, the probabilities of public features moved to the mean feature of the batch, which the gradient shows too. Counts
are whole numbers: of several estimates of the probabilities, the one whose counts are nearest to whole numbers serves.
"""

import torch
from torch import Tensor

SHRINKAGE = 1e-3
"""What is added to the variances of public features, relative to their mean, so that the covariance has an inverse."""

FAR = 0.2
"""The distance of the means of public features and of a batch's, relative to the latter, from which on the former do
not stand for the latter. Measured on other images: up to 0.13 in networks that normalise each batch, where they serve
best; from 0.23 on in others, where moved ones do."""

MOST_LEFT = 0.3
"""The most that a common feature may leave over of the gradient of the last weight. Measured on other images: 0.07 to
0.22 in residual networks without training, 0.3 to 0.6 in fully connected ones."""

LEAST_GRADIENT = 1e-12
"""In place of an entry of the bias's gradient that is 0, in a quotient."""


def largest_remainders(values: Tensor, total: int) -> Tensor:
    """Return the whole numbers of this sum that are nearest to the shares of ``values`` in it, by largest remainders.

    Args:
        values: [..., K]; negative ones count as 0. If none is positive, all are equal.
        total: their sum, at least 0.

    Returns:
        [..., K] int64.
    """
    values = values.double().clamp(min=0)
    size = values.sum(-1, keepdim=True)
    equal = torch.full_like(values, 1 / values.shape[-1])
    shares = total * torch.where(size > 0, values / torch.where(size > 0, size, 1.0), equal)
    whole = shares.floor()
    rank = (shares - whole).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (whole + (rank < total - whole.sum(-1, keepdim=True))).long()


def label_counts(by_bias: Tensor, public: Tensor, images: int) -> Tensor:
    """Return the counts by n = B (p - dL/db), which sum to B, from the gradient of the last bias.

    Args:
        by_bias: [K], dL/db of the mean loss.
        public: [K], the mean probabilities of public images; or several estimates of those of the batch, [E, K].
        images: B.

    Returns:
        [K] int64.
    """
    estimates = public.double().view(-1, public.shape[-1])
    return _nearest(images * (estimates - by_bias.double()), images)


def label_counts_of_update(change: Tensor, public: Tensor, images: int) -> Tensor | None:
    """Return the counts from the change of the last bias if its unit, the sum of the learning rates, is not known.

    In a batch of fewer images than classes a class is missing; the unit is the least one for which no count is
    negative.

    Args:
        change: [K], the bias before less that after, without decay; a positive multiple of dL/db.
        public: [K] or [E, K], as for ``label_counts``.
        images: B.

    Returns:
        [K] int64; None if no class need be missing.
    """
    if images >= public.shape[-1]:
        return None
    estimates = public.double().view(-1, public.shape[-1])
    unit = (change.double() / (images * estimates)).amax(1, keepdim=True)
    return _nearest(images * estimates - change.double() / unit, images)


def class_counts(by_bias: Tensor, public: Tensor, images: int) -> Tensor:
    """Return how many images have each class, under the binary cross-entropy of several outputs.

    The derivative of the sum of the outputs' losses by the logits of image i is (p_i - y_i) / B, so that
    n = B (p - dL/db) as for ``label_counts``. An image may have several classes, or none: each count is by itself the
    nearest whole number from 0 to B.

    Args:
        by_bias: [K], dL/db of the mean over the images of the sum over the outputs.
        public: [K] or [E, K], as for ``label_counts``.
        images: B.

    Returns:
        [K] int64.
    """
    values = images * (public.double().view(-1, public.shape[-1]) - by_bias.double())
    counts = values.round().clamp(0, images).long()
    return counts[(values - counts).square().sum(1).argmin()]


def _nearest(values: Tensor, images: int) -> Tensor:
    """Return the counts [K] of the row of values [E, K] that is nearest to whole numbers; the first one of equals."""
    counts = largest_remainders(values, images)
    return counts[(values - counts).square().sum(1).argmin()]


def mean_feature(by_weight: Tensor, by_bias: Tensor) -> Tensor | None:
    """Return the mean feature [D] of a batch by the gradient of its last layer, [K, D] and [K], in whichever unit.

    dL/dW is the sum of the errors times the features; if these were equal, it would be dL/db times the feature, which
    least squares give. None if too much of dL/dW is left over, as features that differ by class leave it. Of two
    classes nothing is ever left over, so that it shows nothing.
    """
    by_weight, by_bias = by_weight.double(), by_bias.double()
    if len(by_bias) <= 2 or not bool(by_bias.any()):
        return None
    mean = by_bias @ by_weight / by_bias.square().sum()
    rest = by_weight - by_bias[:, None] * mean
    return mean if float(rest.norm()) <= MOST_LEFT * float(by_weight.norm()) else None


def moved_probabilities(features: Tensor, mean: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the mean probabilities [K] of public features that are moved to another mean.

    The mean over the rows of ``moved_logits``, each made probabilities by the softmax.
    """
    return torch.softmax(moved_logits(features, mean, weight, bias), 1).mean(0)


def moved_logits(features: Tensor, mean: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the logits [P, K] of public features that are moved to another mean.

    Features of which none is negative, those of a ReLU, stay so.

    Args:
        features: [P, D], what the last layer takes of public images.
        mean: [D], the mean feature of a batch.
        weight: [K, D] and ``bias`` [K], the layer.
    """
    features = features.double()
    moved = features - features.mean(0) + mean
    moved = moved.clamp(min=0) if bool((features >= 0).all()) else moved
    return moved @ weight.double().T + bias.double()


def is_far(features: Tensor, mean: Tensor) -> bool:
    """Return whether public features [P, D] are so far from the mean feature [D] of a batch that they do not serve."""
    return float((features.double().mean(0) - mean).norm()) > FAR * float(mean.norm())


def label_counts_by_weight(by_weight: Tensor, features: Tensor, probabilities: Tensor, images: int) -> Tensor:
    """Return the counts where no gradient of a bias was sent, by least squares.

    dL/dW is the mean of p h^T less that of y h^T. With public features of mean f and covariance C, the second is about
    n f^T / B; generalised least squares gives n = B (E[p h^T] - dL/dW) w with w = C^-1 f / (f^T C^-1 f).

    Args:
        by_weight: [..., K, D], dL/dW of the mean loss.
        features: [P, D], what the last layer takes of public images.
        probabilities: [P, K], their probabilities.
        images: B.

    Returns:
        [..., K] int64.
    """
    features, probabilities = features.double(), probabilities.double()
    middle = features.mean(0)
    rest = features - middle
    spread = rest.T @ rest / len(rest)
    ridge = SHRINKAGE * spread.diagonal().mean() + torch.finfo(spread.dtype).eps * middle.square().mean()
    weight = torch.linalg.solve(spread + ridge * torch.eye(len(spread), dtype=spread.dtype), middle)
    weight = weight / (middle @ weight)
    expected = probabilities.T @ features / len(features)
    return largest_remainders(images * ((expected - by_weight.double()) @ weight), images)


def label_counts_by_embedding(by_weight: Tensor, by_bias: Tensor, weight: Tensor, bias: Tensor, images: int) -> Tensor:
    """Return the counts of iLRG, for comparison: Ma et al. 2023, Instance-wise Batch Label Restoration, ICLR.

    The row of a class over its derivative of the bias is an embedding of the class, whose probabilities the last layer
    gives; with them, B dL/db and B are linear in the counts.

    Args:
        by_weight: [K, D], dL/dW of the mean loss.
        by_bias: [K], dL/db.
        weight: [K, D], W.
        bias: [K], b.
        images: B.

    Returns:
        [K] int64.
    """
    by_weight, by_bias = by_weight.double(), by_bias.double()
    divisor = torch.where(by_bias.abs() > LEAST_GRADIENT, by_bias, LEAST_GRADIENT)
    embedded = torch.softmax(by_weight / divisor[:, None] @ weight.double().T + bias.double(), 1)
    classes = len(by_bias)
    system = torch.cat([torch.ones(1, classes, dtype=torch.float64), embedded.T - torch.eye(classes).double()])
    known = torch.cat([torch.tensor([1.0]).double(), by_bias]) * images
    return largest_remainders(torch.linalg.pinv(system) @ known, images)
