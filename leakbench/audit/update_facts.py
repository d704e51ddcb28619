"""What a recorded update shows by itself: the optimiser's rule, images, steps, weight decay, what else was sent.

All of it follows from the two models, before any attack. A sentence is made only if the numbers prove it.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from leakbench.attacks.analytic import pixel_layers, widths
from leakbench.audit.given import RecordedKind, Update
from leakbench.core.rng import seeded
from leakbench.core.text import english, plural
from leakbench.gradients.losses import head_of, training_loss
from leakbench.gradients.low_rank import BiasChange, LowRank, bias_change, decay_error, low_rank, rounding_error
from leakbench.gradients.plain import without_checkpointing
from leakbench.models.surgery import linears
from leakbench.observation import Observation

SIGN_RULES = "Adam, AdamW, RMSprop, Adagrad, signSGD or SGD on gradients clipped by value"

LARGE, COUNTED = 0.15, 1e-3
"""Changes above these shares of the network's largest one are large, and count. Others had next to no gradient."""

SHARE_LARGE = 0.75
"""Changes have nearly one size if this share of those that count is large. Measured: by SGD at most 0.71 in networks
of some hundred weights and 0.1 in larger ones; by Adam 0.83 or more; by several steps of RMSprop or Adagrad 0.61 or
more, so that these are not always recognised."""

OWN_SHARE_LARGE = 0.85
"""The same by the largest change of each tensor, for layers with learning rates of their own; the largest of them is
flat. Measured: by Adam and its kind 0.85 or more in one step, or in several on one image; by SGD at most 0.75."""

TENSORS_LARGE = 0.75
"""In this share of the weights, at least half of the changes that count are large: all layers have Adam's size."""

ONE_SIZE = 0.05
"""In a flat tensor, half of the large changes are this close to their median, relative to it."""

FLAT_ROWS = 0.8
"""Or this share of them is to the median of its row: several steps of Adam on one image leave a size in each row."""

MAX_CONTROL_IMAGES = 33
"""The most public images in the test of what a layer can show."""

CONTROL_ROUNDING = 1e4
"""The rounding of a gradient adds up over the layers to less than this many times that of its numbers."""

CLEAR_OF_ERROR = 5.0
"""Decays differ if they are further apart than this many standard errors."""

SAME_DECAY = 1e-3
"""And further than this share of them."""

SUM_TOLERANCE = 1e-2
"""The share of the last layer's change up to which the sum of its rows counts as zero."""

BIAS_TOLERANCE = 1e-3
"""The share of the bias's change that may be outside of the directions of the weight's."""


@dataclass(frozen=True)
class LayerRank:
    """The change of a linear layer's weight that ran on one vector for each image.

    Attributes:
        layer: its name.
        pixels: whether its input is the image.
        rank: the rank of the change once weight decay is removed: by SGD, at most the number of different inputs.
        low: whether that is a low rank; otherwise ``rank`` is the full one and shows nothing.
        conclusive: whether more inputs would have given a larger rank, by a test on public images.
        fits: whether the change of the bias fits to that of the weight as under SGD; true without a bias.
        decay: the share of this layer's weight that its change contains beside the gradients; 0 if none was found.
        decay_error: the standard error of that share; infinite if the layer does not show it.
        bias_decays: whether its bias has the same decay; None if that makes no difference.
        noise: see ``LowRank``.
    """

    layer: str
    pixels: bool
    rank: int
    low: bool
    conclusive: bool
    fits: bool
    decay: float
    decay_error: float
    bias_decays: bool | None
    noise: float

    @property
    def decay_in_words(self) -> str:
        """The size of the decay with the digits that are certain, at most three."""
        certain = abs(self.decay) / (6 * self.decay_error) if self.decay_error else math.inf
        return f"{abs(self.decay):.{1 + (certain >= 100) + (certain >= 1000)}g}"

    def same_decay(self, other: "LayerRank") -> bool:
        """Return whether the decays of two layers are equal as far as their errors tell."""
        apart = abs(self.decay - other.decay)
        return apart <= CLEAR_OF_ERROR * (self.decay_error + other.decay_error) + SAME_DECAY * abs(other.decay)


@dataclass(frozen=True)
class UpdateFacts:
    """What a recorded update shows by itself.

    Attributes:
        rule: ``sgd`` if the change of a layer is of the kind that SGD leaves, with or without momentum and weight
            decay; ``sign`` if the entries have nearly one size, as after a step of Adam, RMSprop or signSGD; else
            ``unknown``.
        layers: the linear layers that were sent and run once, in order of registration.
        others: whether weights were sent of layers that do not show their decay.
        zero_sum: whether the rows of the last layer's change sum to zero, as those of the cross-entropy do under SGD;
            None if that was not tested.
        steps: how many batches the BatchNorm layers counted; None if no counter was sent.
        statistics: the layers whose running statistics were sent and moved.
        precision: see ``Update``.
        kind: what was recorded.
        loss: the name of the stated loss if its rows do not sum to zero, and those of the change do; else empty.
    """

    rule: Literal["sgd", "sign", "unknown"]
    layers: tuple[LayerRank, ...]
    others: bool
    zero_sum: bool | None
    steps: int | None
    statistics: tuple[str, ...]
    precision: str
    kind: RecordedKind
    loss: str = ""

    @property
    def shown(self) -> LayerRank | None:
        """The layer that shows most: the one that takes the pixels, or that with the largest rank; None if none does.

        The ranks of other rules than SGD show nothing.
        """
        low = [one for one in self.layers if one.low and one.fits and one.rank] if self.rule == "sgd" else []
        best = [one for one in low if one.pixels] or low
        return max(best, key=lambda one: (one.rank > 1, one.conclusive, one.rank), default=None)

    @property
    def decays(self) -> tuple[tuple[LayerRank, ...], ...]:
        """The layers that show a decay, or that they have none, in groups of one decay; the surest is first in each.

        The groups are in order of their surest layer. There is none under another rule than SGD.
        """
        shown = [one for one in self.layers if self.rule == "sgd" and math.isfinite(one.decay_error)]
        groups: list[list[LayerRank]] = []
        for one in sorted(shown, key=lambda one: one.decay_error):
            group = next((group for group in groups if one.same_decay(group[0])), None)
            if group is None:
                groups.append([one])
            elif one.decay or not group[0].decay:  # else its rounding hides whether it has the decay of the group
                group.append(one)
        return tuple(map(tuple, groups))

    @property
    def images(self) -> int | None:
        """The least number of different images, copies that differ counted; None if the update shows none."""
        one = self.shown
        if one is None or (one.rank == 1 and not one.conclusive):
            return None
        return one.rank if one.pixels or one.rank == 1 or self.steps == 1 else None

    @property
    def one_image(self) -> bool | None:
        """Whether the client trained on one image; None if the update does not show it."""
        if self.images is not None:
            return self.images == 1
        return False if self.shown is not None and self.shown.rank > 1 and self.steps == 1 else None

    @property
    def several_steps(self) -> bool | None:
        """Whether the client took several steps; None if the update does not show it."""
        if self.steps is not None and self.steps > 1:
            return True
        inner = [one for one in self.layers if one.low and one.fits and one.conclusive and not one.pixels]
        if self.images == 1 and inner:
            return any(one.rank > 1 for one in inner)
        return None if self.steps is None else False

    def contradictions(self, local_steps: int) -> tuple[str, ...]:
        """Return in sentences what contradicts the assumption of one image in ``local_steps`` steps of SGD."""
        return tuple(self._contradictions(local_steps))

    def _contradictions(self, local_steps: int) -> Iterator[str]:
        one = self.shown
        if self.rule == "sign":
            yield (
                f"The changed values have nearly one size, as {SIGN_RULES} leave them: closed forms, which hold for "
                "SGD, do not apply, and ranks do not show the number of images."
            )
        elif self.rule == "unknown" and any(layer.conclusive for layer in self.layers):
            yield (
                "The changes of the linear layers do not have the low ranks that SGD leaves on few images: the client "
                "used more images or steps than these layers can show, or another optimiser (such as Adam), or single "
                "values were changed (by noise, clipping, pruning or quantisation)."
            )
        elif one is not None and one.rank > 1:
            least = f"the change of layer {one.layer} has rank {one.rank}"
            if self.images is not None:
                copies = "; copies that differ, such as flipped ones, count" if one.pixels else ""
                yield (
                    f"Under SGD, the client used several images: at least {self.images} different ones, since {least}"
                    f"{copies}."
                )
            else:
                yield f"Under SGD, the client used several images or several steps: {least}."
        if self.zero_sum is False and self.rule != "sign":
            yield (
                "The rows of the last layer's change do not sum to zero: the client used another loss than the "
                "cross-entropy, or another optimiser than SGD, or single values were changed (by noise, clipping, "
                "pruning or quantisation)."
            )
        if self.loss:
            yield (
                f"Stated: the loss {self.loss}. The rows of the last layer's change sum to zero, as the cross-entropy "
                f"leaves them and {self.loss} does not."
            )
        grown = next((group for group in self.decays if group[0].decay < 0), None)
        if grown is not None:
            yield (
                f"Beside the gradients, the weights of {layers_in_words(grown)} grew by {grown[0].decay_in_words} of "
                "their size, which no weight decay does: the weights before and after may be swapped."
            )
        if self.steps is not None and self.steps > 1 and self.steps != local_steps:
            yield f"The client trained on {self.steps} batches, by the counters of its BatchNorm layers."
        elif self.several_steps and local_steps == 1 and self.steps is None:
            yield "The client took several steps on its image: layers above the first one changed by several inputs."

    def facts(self) -> tuple[tuple[str, str], ...]:
        """Return what a page states, as (name, value)."""
        return (
            ("images", self._images()),
            ("steps", self._steps()),
            ("optimiser", self._rule()),
            ("weight decay", self._decay()),
            ("running statistics", self._statistics()),
            ("precision of the record", f"{self.precision}{'' if self.precision == 'float32' else ', by its values'}"),
        )

    def _images(self) -> str:
        one = self.shown
        if self.rule == "sign":
            return "not shown: ranks count images only under SGD"
        if one is None and any(layer.conclusive for layer in self.layers):
            return "not shown: no change of a linear layer has a low rank"
        if one is None and self.layers:
            return "not shown: in this network, a step on several images looks like one image's in every linear layer"
        if one is None:
            return "not shown: no linear layer was sent that runs once"
        taken = f"layer {one.layer}{', which takes the pixels,' if one.pixels else ''}"
        if one.rank == 1 and one.conclusive:
            return f"one image{'' if one.pixels else ' in one step'} explains the change of {taken.rstrip(',')}"
        if one.rank == 1:
            return f"not shown: the change of {taken} by several images looks like one image's, too"
        copies = "; differing copies of an image, such as flipped ones, count" if one.pixels else ""
        exact = "" if one.conclusive else ", the largest that this layer shows"
        least = f"at least {self.images} different images" if self.images else "several images or several steps"
        return f"under SGD, {least}: the change of {taken} has rank {one.rank}{exact}{copies}"

    def _steps(self) -> str:
        if self.steps is not None:
            return (
                f"{plural(self.steps, 'batch').replace('batchs', 'batches')}, by the counters of the BatchNorm layers"
            )
        if self.several_steps is None:
            return "not shown: no counter of a BatchNorm layer was sent"
        if self.several_steps:
            return "several: layers above the first one changed by several inputs"
        return "one explains the changes of all linear layers"

    def _rule(self) -> str:
        if self.rule == "sgd":
            return "as by SGD (any momentum): the changes of linear layers have low ranks"
        if self.rule == "sign":
            return f"the changed values have nearly one size, as {SIGN_RULES} leave them"
        if not any(layer.conclusive for layer in self.layers):
            return "not shown: no linear layer can show it"
        return "not shown: no change of a linear layer has a low rank"

    def _decay(self) -> str:
        found = self.decays
        if not found:
            return "not shown"
        parts = [self._decayed(group) for group in found]
        still = [one for one in self.layers if one.bias_decays is False]
        if still:
            parts.append(f"the {'bias' if len(still) == 1 else 'biases'} of {layers_in_words(still)} did not decay")
        if not self._all_show_decay:
            same = f"that of {layers_in_words(found[0][:1])}" if len(found) > 1 else "the same"
            taken = f" and are taken to have {same}" if len(found) > 1 or found[0][0].decay else ""
            parts.append(f"other layers do not show it{taken}")
        return "; ".join(parts)

    @property
    def _all_show_decay(self) -> bool:
        return not self.others and sum(map(len, self.decays)) == len(self.layers)

    def _decayed(self, group: Sequence[LayerRank]) -> str:
        owners, first = layers_in_words([one for one in self.layers if one in group]), group[0]
        if not first.decay:
            everywhere = len(self.decays) == 1 and self._all_show_decay
            return f"none{'' if everywhere else f' in {owners}'} that exceeds the rounding of the record"
        if self.kind == "gradient":
            sign = "" if first.decay > 0 else "minus "
            return f"the gradient of {owners} contains {sign}{first.decay_in_words} times the weights"
        moved = "shrank" if first.decay > 0 else "grew"
        return f"the weights of {owners} {moved} by {first.decay_in_words} of their size beside the gradients' steps"

    def _statistics(self) -> str:
        if not self.statistics:
            return "none was sent that changed"
        return (
            f"sent by {plural(len(self.statistics), 'layer')}; they leak the means and variances of the private "
            f"batches by channel ({english(self.statistics[:3])}{', ...' if len(self.statistics) > 3 else ''})"
        )


def update_facts(network: nn.Module, update: Update, observation: Observation) -> UpdateFacts:
    """Return what a recorded update shows by itself.

    Args:
        network: the network, with the weights before.
        update: the record.
        observation: the same as an attacker sees it; its gradient is ``update.change``, each tensor [1, *shape].
    """
    finite = {name: value for name, value in update.change.items() if bool(torch.isfinite(value).all())}
    names = _layers(finite, network, observation)
    pixels = pixel_layers(observation)
    ranks = {name: low_rank(*_weight(name, finite, update)) for name in names}
    biases = {name: _bias(name, found, finite, update) for name, found in ranks.items()}
    able, zero_sum = _control(network, observation, ranks)
    layers = tuple(
        LayerRank(
            layer=name,
            pixels=name in pixels,
            rank=found.rank,
            low=found.low,
            conclusive=name in able,
            fits=biases[name].outside <= BIAS_TOLERANCE,
            decay=found.decay,
            decay_error=decay_error(*_weight(name, finite, update), found),
            bias_decays=biases[name].decays,
            noise=found.noise,
        )
        for name, found in ranks.items()
    )
    last = next(reversed(names), None)
    sums = _zero_sum(last, finite, update) if zero_sum and last is not None else None
    summed = (
        bool(sums) and last is not None and len(finite[f"{last}.weight"]) > 2
    )  # two rows have opposite signs anyway
    proof = [
        one
        for one in layers
        if one.low and one.fits and (one.conclusive or summed) and (sums is not False or one.pixels)
    ]
    rule: Literal["sgd", "sign", "unknown"] = "sign" if _one_size(finite) else "sgd" if proof else "unknown"
    counted = [int(v) - int(update.before[n]) for n, v in update.sent.items() if n.endswith("num_batches_tracked")]
    return UpdateFacts(
        rule=rule,
        layers=layers,
        others=any(value.dim() > 1 and name.rpartition(".")[0] not in ranks for name, value in update.change.items()),
        zero_sum=sums,
        steps=max(counted) if counted and update.kind == "weights" and max(counted) > 0 else None,
        statistics=_moved(update),
        precision=update.precision,
        kind=update.kind,
        loss="" if zero_sum else _other_loss(network, last, finite, update),
    )


def _other_loss(network: nn.Module, last: str | None, change: Mapping[str, Tensor], update: Update) -> str:
    """Return the name of the stated loss if the rows of the last layer's change should not sum to zero, and do."""
    head = head_of(network)
    if head.loss not in ("bce", "mse") or head.single or last is None or len(change[f"{last}.weight"]) < 3:
        return ""
    return head.name if _zero_sum(last, change, update) else ""


def without_decay(update: Update, facts: UpdateFacts) -> Update:
    """Return an update whose change does not contain the weight decay that was found, with its share of rounding.

    A layer that does not show its own is taken to have that of the layer that shows it best.
    """
    shown = {one.layer: one for group in facts.decays for one in group}  # the surest one first
    if not any(one.decay for one in shown.values()):
        return update
    change = {}
    for name, value in update.change.items():
        layer = shown.get(name.rpartition(".")[0], facts.decays[0][0])
        decays = value.dim() > 1 or layer.bias_decays is not False
        change[name] = value - layer.decay * update.before[name] if decays else value
    # the rounding stays as large as it was, and is a larger share of what is left
    sizes = [{name: _norm(value) for name, value in one.items()} for one in (update.change, change)]
    rounding = {
        name: share * sizes[0][name] / sizes[1][name] if sizes[1][name] else math.inf
        for name, share in update.rounding.items()
    }
    return replace(update, change=change, rounding=rounding)


def layers_in_words(layers: Sequence[LayerRank]) -> str:
    """Return ``layers 1 and 3``: three of them by name, in this order."""
    names, more = [one.layer for one in layers[:3]], len(layers) - 3
    listed = english([*names, *([f"{more} more"] if more > 0 else [])])
    return f"{'layer' if len(layers) == 1 else 'layers'} {listed}"


def _norm(value: Tensor) -> float:
    return float(value.nan_to_num(0.0, 0.0, 0.0).double().norm())


def _layers(change: Mapping[str, Tensor], network: nn.Module, observation: Observation) -> list[str]:
    """Return the linear layers that run on one vector of an image and whose weight was sent, whole, and changed.

    A weight that several layers share changes by the inputs of all of them.
    """
    taken = widths(observation)
    users = Counter(id(one) for module in network.modules() for one in module.parameters(recurse=False))
    return [
        name
        for name, layer in linears(network).items()
        if taken.get(name) == layer.in_features
        and bool(change.get(f"{name}.weight", torch.zeros(1)).any())
        and users[id(layer.weight)] == 1
    ]


def _weight(name: str, change: Mapping[str, Tensor], update: Update) -> tuple[Tensor, Tensor, float]:
    """Return the change of a layer's weight, the weight before, and the rounding error of an entry of the change."""
    value, before = change[f"{name}.weight"].double(), update.before[f"{name}.weight"].double()
    held = torch.zeros_like(before) if update.kind == "gradient" else before
    return value, before, rounding_error(held, value, update.eps)


def _bias(name: str, found: LowRank, change: Mapping[str, Tensor], update: Update) -> BiasChange:
    """Return how the change of a layer's bias fits to that of its weight; without one, nothing is outside."""
    bias = change.get(f"{name}.bias")
    if bias is None:
        return BiasChange(None, 0.0)
    value, before, _ = _weight(name, change, update)
    return bias_change(value - found.decay * before, bias, update.before[f"{name}.bias"], found, update.eps)


def _zero_sum(last: str, change: Mapping[str, Tensor], update: Update) -> bool:
    """Return whether the rows of a layer's change sum to zero once the best multiple of the weights is removed."""
    value, before = (one[f"{last}.weight"].double() for one in (change, update.before))
    own, total = value.sum(0), before.sum(0)
    square = float(total @ total)
    rest = own - (float(own @ total) / square if square else 0.0) * total
    rounding = 30 * update.eps * float(before.norm())
    return float(rest.norm()) <= SUM_TOLERANCE * float(value.norm()) + rounding


def _control(network: nn.Module, observation: Observation, ranks: Mapping[str, LowRank]) -> tuple[set[str], bool]:
    """Return the layers in which more images would have shown, and whether the last one's rows sum to zero.

    The gradient of a batch of public images is tested. In a stack of linear layers before two classes, say, any batch
    looks like one image, and so it does in a layer of one output or input.
    """
    most = max((found.rank for found in ranks.values() if found.low), default=1)
    count = min(most + 1, MAX_CONTROL_IMAGES)
    found = _public_gradient(network, observation, list(ranks), count, torch.float64)
    found = found or _public_gradient(network, observation, list(ranks), count, observation.dtype)
    able = set()
    for name, value in found.items():
        layer = name.removesuffix(".weight")
        if min(value.shape) == 1:
            continue
        error = rounding_error(torch.zeros_like(value), value, float(torch.finfo(value.dtype).eps))
        control = low_rank(value, torch.zeros_like(value), CONTROL_ROUNDING * error)
        if not control.low or control.rank > ranks[layer].rank or control.rank >= count:
            able.add(layer)
    last = found.get(f"{next(reversed(list(ranks)), '')}.weight")
    return able, last is not None and float(last.sum(0).norm()) <= SUM_TOLERANCE * float(last.norm())


def _public_gradient(
    network: nn.Module, observation: Observation, layers: Sequence[str], count: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the gradient of these layers' weights on a batch of public images, without those of zeros.

    It is empty if the network cannot be run on a batch or in this precision; in float64, few images are lost in the
    rounding.
    """
    probe = copy.deepcopy(network).to(dtype)
    named = {f"{name}.weight": probe.get_parameter(f"{name}.weight") for name in layers}
    named = {name: value for name, value in named.items() if value.requires_grad}
    with seeded("audit", "control"):
        coarse = torch.rand(count, observation.image_shape[0], 3, 3)
        images = nn.functional.interpolate(coarse, observation.image_shape[1:])
        images = (images + torch.rand(images.shape)) / 2  # without noise, they have few dimensions
        labels = torch.arange(count) % observation.num_classes
        try:
            with without_checkpointing():
                loss = training_loss(probe, images.to(dtype), labels).mean()
            values = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        except Exception:  # whatever the user's network raises
            return {}
    return {name: value for name, value in zip(named, values) if value is not None and bool(value.any())}


def _one_size(change: Mapping[str, Tensor]) -> bool:
    """Return whether the changed values of a network's weights have nearly one size, or one in each of the weights.

    Layers with learning rates of their own have sizes of their own. Weights of which nothing changed were not trained.
    """
    weights = [value.abs() for value in change.values() if value.dim() > 1 and bool(value.any())]
    if not weights:
        return False
    tops = torch.tensor([float(value.max()) for value in weights])
    if len(weights) > 1 and _are_large(weights, tops.amax().expand(len(tops)), SHARE_LARGE):
        return True
    share = SHARE_LARGE if len(weights) == 1 else OWN_SHARE_LARGE
    most = max(weights, key=Tensor.numel)
    flat = _flat(most.flatten()[None]) >= 0.5 or _flat(most.flatten(1)) >= FLAT_ROWS
    return flat and _are_large(weights, tops, share)


def _are_large(weights: Sequence[Tensor], tops: Tensor, share: float) -> bool:
    """Return whether so large a share of the sizes that count is large, by the size that belongs to each tensor."""
    large = torch.tensor([float((value > LARGE * top).sum()) for value, top in zip(weights, tops)])
    counted = torch.tensor([float((value > COUNTED * top).sum()) for value, top in zip(weights, tops)])
    if float(large.sum()) < share * float(counted.sum()):
        return False
    return float((2 * large >= counted.clamp(min=1)).double().mean()) >= TENSORS_LARGE


def _flat(sizes: Tensor) -> float:
    """Return which share of the large values [R, N] is near the median of those of its row."""
    rows = [row[row > LARGE * float(row.max())] for row in sizes if bool(row.any())]
    middles = [float(row.median()) for row in rows]
    near = sum(int(((row - middle).abs() <= ONE_SIZE * middle).sum()) for row, middle in zip(rows, middles))
    return near / sum(map(len, rows))


def _moved(update: Update) -> tuple[str, ...]:
    """Return the layers whose running mean or variance was sent and is not what it was before."""
    found = dict.fromkeys(
        name.rpartition(".")[0]
        for name, value in update.sent.items()
        if name.endswith(("running_mean", "running_var"))
        and not torch.equal(value.to(update.before[name]), update.before[name])
    )
    return tuple(found)
