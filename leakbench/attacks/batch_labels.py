"""The labels of a batch: how often each class occurs, granted or inferred from the last layer (``gradients.counts``).

The order of the images within a batch changes no gradient, so that the labels of equal counts may be in any order.
"""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leakbench.core.rng import generator, seeded
from leakbench.errors import Unsupported
from leakbench.gradients.counts import (
    is_far,
    label_counts,
    label_counts_by_weight,
    label_counts_of_update,
    mean_feature,
    moved_probabilities,
)
from leakbench.gradients.evaluate import tensors_of
from leakbench.gradients.losses import CROSS_ENTROPY, head_of
from leakbench.gradients.plain import without_checkpointing
from leakbench.models.surgery import linears
from leakbench.observation import Observation

PUBLIC_IMAGES = 32
"""The number of images of coarse noise whose probabilities and features stand for those of public images."""

COARSE = 3
"""The pixels of that noise along each side, before it is enlarged."""


def batch_labels(observation: Observation) -> Tensor:
    """Return labels [T, B] int64 in ascending order, of the granted counts or the inferred ones.

    Raises:
        Unsupported: the counts are not granted and cannot be inferred.
    """
    counts = observation.counts
    counts = inferred_counts(observation) if counts is None else counts
    classes = torch.arange(observation.num_classes, device=observation.device)
    return torch.stack([classes.repeat_interleave(own) for own in counts.to(observation.device)])


def inferred_counts(observation: Observation) -> Tensor:
    """Return [T, K] int64, how often each class occurs, by the gradient of the last layer's bias, or of its weight.

    Raises:
        Unsupported: no gradient of the last layer was sent; the number of images is hidden; or neither the learning
            rate is known nor, in a batch of at least as many images as there are classes, can it be inferred.
    """
    head = head_of(observation.model)
    if head.single or head.loss != CROSS_ENTROPY:
        raise Unsupported("the label counts follow from the cross-entropy of several logits only; use labels=counts")
    name, weight, bias = _last_layer(observation)
    if observation.count == 0:
        raise Unsupported("the label counts need the number of images, which is hidden; use count=known")
    rows = []
    for trial in range(observation.trials):
        models = models_of(observation, trial)
        public = [_run(observation, tensors, name) for tensors in models]
        size = 1.0 if observation.size is None else float(observation.size[trial])
        found: Tensor | None
        if bias is None:
            assert weight is not None
            if observation.sent_unit is None:
                raise Unsupported(
                    "no gradient of the last layer's bias was sent, and the learning rate is hidden; use "
                    "labels=counts, or rate=known"
                )
            features, probabilities = (torch.cat([one[part] for one in public]) for part in (0, 1))
            found = label_counts_by_weight(weight[trial] * size, features, probabilities, observation.count)
        else:
            estimates = [torch.stack([own.double().mean(0) for _, own in public]).mean(0)]
            mean = None if weight is None else mean_feature(weight[trial], bias[trial])
            if mean is not None:
                layers = [(own[f"{name}.weight"], own[f"{name}.bias"]) for own in models]
                moved = [moved_probabilities(features, mean, *layer) for (features, _), layer in zip(public, layers)]
                away = any(is_far(features, mean) for features, _ in public)
                estimates = [*([] if away else estimates), torch.stack(moved).mean(0)]
            expected = torch.stack(estimates)
            if observation.sent_unit is None:
                found = label_counts_of_update(bias[trial], expected, observation.count)
            else:
                unit = observation.unit / observation.sent_unit  # of an attack that works on the mean step of an update
                found = label_counts(bias[trial] * size * unit, expected, observation.count)
        if found is None:
            raise Unsupported(
                f"the label counts of {observation.count} images do not follow from an update of unknown learning "
                "rate, as no class need be missing; use labels=counts, or rate=known"
            )
        rows.append(found)
    return torch.stack(rows)


def _last_layer(observation: Observation) -> tuple[str, Tensor | None, Tensor | None]:
    """Return the classifier's name, and the gradients [T, K, D] of its weight and [T, K] of its bias."""
    for name in classifiers(observation, observation.num_classes):
        weight, bias = (observation.gradient.get(f"{name}.{part}") for part in ("weight", "bias"))
        if weight is not None or bias is not None:
            return name, weight, bias
    raise Unsupported(
        "the label counts cannot be inferred: no gradient of a linear classifier was sent; use labels=counts"
    )


def classifiers(observation: Observation, outputs: int) -> list[str]:
    """Return the linear layers of this many outputs on which the logits depend, the last first.

    An auxiliary head and one that is not in use are left out. Their gradient does not show it: behind noise, that of
    such a head is not zero. One layer alone is returned as it is.
    """
    layers = [name for name, one in reversed(linears(observation.model).items()) if one.out_features == outputs]
    if len(layers) < 2:
        return layers
    tensors = {name: value.clone() for name, value in models_of(observation, 0)[0].items()}
    weights = [tensors[f"{name}.weight"].requires_grad_() for name in layers]
    model, noise = copy.deepcopy(observation.model), public_noise(observation)
    with torch.enable_grad(), seeded("public noise"), without_checkpointing():
        logits: Tensor = functional_call(model, tensors, (noise,))
        found = torch.autograd.grad(logits.sum(), weights, allow_unused=True)
    return [name for name, value in zip(layers, found) if value is not None]


def models_of(observation: Observation, trial: int) -> list[dict[str, Tensor]]:
    """Return the tensors of a trial's network, zeros for secrets: of an update, before and after the training."""
    own, sent, threat = tensors_of(observation.model), observation.gradient, observation.threat
    before = {name: _of(observation.weights.get(name), value, trial, observation) for name, value in own.items()}
    if threat.shares != "weights":
        return [before]
    size = 1.0 if observation.size is None else float(observation.size[trial])
    scale = observation.unit * size
    moved = {name: value - scale * sent[name][trial] if name in sent else value for name, value in before.items()}
    return [before, moved]


def public_noise(observation: Observation) -> Tensor:
    """Return images [P, C, H, W] of coarse noise in [0, 1], the same ones for every trial."""
    coarse = torch.rand(PUBLIC_IMAGES, observation.image_shape[0], COARSE, COARSE, generator=generator("public noise"))
    return nn.functional.interpolate(coarse, observation.image_shape[1:]).to(observation.device, observation.dtype)


def _run(observation: Observation, tensors: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    """Return features [P, D] and probabilities [P, K] of noise images by these tensors of the network."""
    taken: list[Tensor] = []
    model = copy.deepcopy(observation.model)

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        taken.append(inputs[0].detach())

    model.get_submodule(layer).register_forward_pre_hook(keep)
    noise = public_noise(observation)
    with torch.no_grad(), seeded("public noise"), without_checkpointing():
        logits: Tensor = functional_call(model, {name: value.clone() for name, value in tensors.items()}, (noise,))
    return taken[-1].flatten(1), torch.softmax(logits.double(), 1)


def _of(value: Tensor | None, own: Tensor, trial: int, observation: Observation) -> Tensor:
    """Return a tensor of one trial's network; zeros for a secret."""
    if value is None:
        return torch.zeros(own.shape, dtype=observation.dtype, device=observation.device)
    value = value[trial] if value.ndim > own.ndim else value
    return value[0] if value.ndim > own.ndim else value
