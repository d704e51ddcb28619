"""The label that the gradient of a classifier's last layer reveals."""

from __future__ import annotations

from torch import Tensor

from leakbench.errors import Unsupported
from leakbench.models.surgery import linears
from leakbench.observation import Observation


def analytic_labels(observation: Observation) -> Tensor:
    """Return [T] int64, the row of the classifier's gradient with the smallest sum (Zhao et al. 2020, iDLG, section 3).

    Exact for one image, a hard label, cross-entropy and a classifier whose inputs are not negative, because only the
    true class has a negative derivative of the loss by its logit.
    """
    gradient = _classifier_gradient(observation)
    return gradient.flatten(2).sum(2).argmin(1) if gradient.ndim > 2 else gradient.argmin(1)


def _classifier_gradient(observation: Observation) -> Tensor:
    """Return the observed gradient of the classifier's weight [T, K, D] or, if withheld, its bias [T, K].

    The classifier is the last linear layer with one output for each class and a gradient that is not zero: a layer
    that is not in use has none.
    """
    for name, layer in reversed(linears(observation.model).items()):
        for tensor in ("weight", "bias"):
            gradient = observation.gradient.get(f"{name}.{tensor}")
            if gradient is not None and layer.out_features == observation.num_classes and bool(gradient.any()):
                return gradient
    raise Unsupported(
        "the label cannot be inferred from the gradient: no gradient of a linear classifier was sent, or one of zeros; "
        "use labels=joint, or a threat model with labels=known"
    )
