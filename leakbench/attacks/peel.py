"""Peel: the image in closed form, from the last layer back to the first."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from leakbench.attacks.base import Attack, register
from leakbench.attacks.batch_labels import batch_labels, classifiers
from leakbench.attacks.fill import fill_in
from leakbench.attacks.matching import Positive, analytic_labels
from leakbench.attacks.matching.problem import SIGN_LOSSES
from leakbench.attacks.peeling.beginnings import all_beginnings, beginnings, most_begun, withheld
from leakbench.attacks.peeling.chain import Chain, find_chain
from leakbench.attacks.peeling.estimate import undo_linear
from leakbench.attacks.peeling.layers import Activation, ChainLayer, Convolution, Dropout, Normalisation, Reshape
from leakbench.attacks.peeling.network import Network
from leakbench.attacks.peeling.opened import opened, reconstruction
from leakbench.attacks.peeling.priors import Smooth
from leakbench.attacks.peeling.scale import clue
from leakbench.attacks.peeling.trace import trace
from leakbench.attacks.peeling.undo import Known, State, undo
from leakbench.core.component import LATER
from leakbench.core.device import SHARE, free_memory
from leakbench.core.rng import Rng
from leakbench.core.types import Reconstruction
from leakbench.errors import Unsupported
from leakbench.gradients.evaluate import tensors_of
from leakbench.gradients.losses import head_of
from leakbench.observation import Observation

MAX_UNKNOWNS = 12288
"""The most unknowns that a layer may have: any system may have to be factored, which takes N^3 operations, and N^2
numbers ``MATRIX_COPIES`` times."""

MATRIX_COPIES = 7
"""How many matrices of the largest system are held for each trial if it is factored."""

VECTOR_COPIES = 60
"""How many vectors of the largest system conjugate gradients hold for each trial, with windows of 25 pixels."""

GUESS_ROUNDS = 20
"""How often withheld values of the linear layer's input are guessed anew; two to four rounds bring them ten times
closer."""


@register("peel")
@dataclass(frozen=True)
class Peel(Attack):
    """Peel: closed form, layer by layer, through activations and normalisations of unknown scale and shift.

    The lowest linear layer with a bias gives its input f = (dL/dW)^T d / |d|^2 and dL/df = W^T d, with d = dL/db. Below
    it each convolution gives its input a by weighted least squares on w * a = s - b and corr(e, a) = dL/dw together,
    with s its output and e the error there. Before a normalisation of one image they are w * a = sigma z + m and
    corr(h, a) = sigma dL/dw, with sigma and m of each channel unknown too; z is the standardised channel and h the
    error through the normalisation, so that neither key nor lock is needed. All in float64. An image that meets such a
    normalisation first has lost its contrast, but for what the normalisation's eps shows where scale and shift are
    public; elsewhere it is returned with the brightness of the public mean.

    A network with ReLUs and residual connections is no such chain. There the gradient by the weight of a convolution of
    stride 1 with as many channels as places gives the convolution's input and the error at its output, up to a factor
    that the gradient of a shift below gives. Below it, masks and errors are exact or wrong: each layer's input is the
    least-squares solution of its weight gradient's equations, and where it is positive the ReLU below is open. The
    image is then searched for whose forward pass gives the lowest inputs that were recovered. Below a max-pool of the
    first layers, the positions of the maxima are sampled with it. If no descent begins, as behind other activations and
    group normalisation or much noise, the image is searched for from inputs that are known up to a factor. A contrast
    that these do not show follows from the classifier's gradients. If an adaptive attacker knows that only some entries
    were sent, equations are solved without the others, and layers of few positions are completed to their rank if that
    does not begin a descent. The scale and shift of a key-lock on the way are searched for with the image, whose
    contrast then follows from the law of the scale only, roughly.

    Dropout is undone if its mask follows from the gradient: a dropped value is in no equation, and the error there is
    0. Dropped pixels are filled in from their neighbours.

    Attributes:
        precision: the relative error that is assumed of the gradient, float32's by default; the larger one that the
            gradient of the linear layer shows by itself counts instead.
        roughness: the standard deviation by which neighbouring pixels are assumed to differ, for pixels that the
            equations do not determine.
        colour: how much less the differences between an image's colours are assumed to change than their mean.
        variances: of the values of a layer, by which the equations of the layer below are weighted: conditional ones,
            each as if all other values were known, or marginal ones, which take Cholesky factors and three times as
            long. Conditional ones are better under noise.
        search: in a ReLU network, the unit in which the iterations from the layer inputs to the image are counted: the
            steps of the first search by Adam, and those after which L-BFGS ends if they brought nothing.
    """

    # 2: networks with ReLUs, which were unsupported, or searched less thoroughly; 3: conditional variances, and in
    # networks with ReLUs a last search that ends when it brings nothing more; 4: masks behind noise by their odds;
    # 5: a descent by the entries of a pruned gradient that were sent; 6: weak
    # directions of a ReLU's output below statistics of the image follow from the open ReLUs above; 7: the error that
    # goes around a convolution inside a residual block, heads without the gradients of normalisations, and values whose
    # errors are rounding count whatever the others' are; 8: a misfit of inputs up to a factor that has no rounding and
    # is relative to their differences, and a contrast by the classifier; 9: behind a key-lock, the levels of its
    # channels before the image, smoothness relative to what they leave, and the contrast of the lock's law; 10: updates
    # of unknown learning rate, which were unsupported, ReLUs below average pooling, where a descent ended, those
    # that are written otherwise or have a ceiling, and leaky ReLUs below statistics of the image;
    # 11: L-BFGS by ever less total variation below a max-pool, in place of Adam, and 0 for values that only rounding
    # makes positive; 12: values above exact ones are computed from these, a search below statistics of the image that
    # ended wrong begins elsewhere, and its image keeps to [0, 1]; 13: that search is longer
    version: ClassVar[int] = 13
    reference: ClassVar[str] = (
        "in the family of Zhu and Blaschko 2021, R-GAP, ICLR, arXiv 2010.07733; "
        "the way through a normalisation of unknown scale and shift is this package's own"
    )
    assumes: ClassVar[str] = (
        "A chain of linear layers, convolutions, invertible activations (sigmoid, tanh, leaky ReLU) and batch "
        "normalisation of one image, with a gradient that is nearly exact; or a network, best of ReLUs, with a "
        "convolution of stride 1, a kernel above 1x1 and at least as many channels as places, or with a "
        "linear layer that takes all values, maxima or averages of a ReLU's output."
    )
    cost: ClassVar[str] = (
        "One least-squares problem a layer, in float64; a search only in ReLU networks, whose gradient is of the first "
        "layers alone. Before a normalisation of one image, time grows with the cube of a layer's inputs."
    )
    fails: ClassVar[str] = (
        "ReLUs in narrow or depthwise networks (unsupported). Below a pool of the first layers, an image is close "
        "but not exact. In a chain, noise of 1e-3 of the gradient hides detail, of 0.1 the whole image, and behind a "
        "secret normalisation less noise is enough; a wide ReLU network needs noise of the gradient's size. Channels "
        "behind a closed gate are lost."
    )
    batches: ClassVar[bool] = True
    updates: ClassVar[bool] = True  # all that it computes is of the gradient up to its size
    precision: Annotated[float, Field(gt=0, le=1)] = 3e-7
    roughness: Positive = 0.1
    colour: Positive = field(default=0.15, metadata=LATER)
    search: Annotated[int, Field(ge=1)] = field(default=200, metadata=LATER)
    variances: Literal["conditional", "marginal"] = field(default="conditional", metadata=LATER)

    def check(self, observation: Observation) -> None:
        """Raise Unsupported if the network is neither a chain of layers that can be undone, nor a ReLU network."""
        served(observation)

    def probe(self, observation: Observation, rng: Rng) -> int | None:
        """Undo the layers down to the topmost convolution."""
        chain = served(observation)
        if isinstance(chain, Network):
            return None
        convolutions = [index for index, layer in enumerate(chain.layers) if isinstance(layer, Convolution)]
        if not convolutions:
            return None
        rows = _rows(observation, chain.masks, 0, observation.trials)
        self._peel(replace(chain, layers=chain.layers[convolutions[-1] :]), rows, rounds=0)
        return observation.trials * self._bytes(chain, observation)

    def run(self, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the image of every trial; only the search in a ReLU network draws from rng."""
        chain = served(observation)
        if isinstance(chain, Network):
            return self._descend(chain, observation, rng)
        trials = observation.trials
        size = observation.slots or max(
            1, int(SHARE * free_memory(observation.device) / self._bytes(chain, observation))
        )
        bounds = [(begin, min(begin + size, trials)) for begin in range(0, trials, size)]
        parts = [self._peel(chain, _rows(observation, chain.masks, *each), GUESS_ROUNDS) for each in bounds]
        images, seen = (torch.cat([part[at] for part in parts]).view(trials, *observation.image_shape) for at in (0, 1))
        images = fill_in(images, seen, observation.mean_image, self.colour)
        return Reconstruction(
            images=images.to(observation.dtype),
            labels=read_labels(observation),
            objective=torch.cat([misfit for *_, misfit in parts]).to(observation.dtype),
            failed=~torch.isfinite(images.flatten(1)).all(1),
            path="batched",
        )

    def _descend(self, network: Network, observation: Observation, rng: Rng) -> Reconstruction:
        """Return the image of every trial of a ReLU network; a trial of which nothing is recovered has failed."""
        parts = [each.restored(self.search) for each in opened(network, observation, rng)]
        return reconstruction(parts, observation, read_labels(observation))

    def _bytes(self, chain: Chain, observation: Observation) -> int:
        """Return how many bytes the largest system takes for each trial."""
        largest = max((prod(layer.inputs) for layer in chain.layers if isinstance(layer, Convolution)), default=1)
        normalised = any(isinstance(layer, Normalisation) for layer in chain.layers)
        factored = normalised or self.variances == "marginal" or observation.device.type != "cpu"
        return 8 * (MATRIX_COPIES * largest**2 if factored else VECTOR_COPIES * largest)

    def _peel(self, chain: Chain, observation: Observation, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the input of the lowest layer [T, ...], bool for what dropout left of it, and a misfit [T].

        The misfit is that of the lowest convolution's equations. Withheld values are guessed anew ``rounds`` times.
        """
        tensors, sent, layers = observation.weights, observation.gradient, chain.layers
        curved = [isinstance(layer, Activation) for layer in layers if not isinstance(layer, Reshape)]
        value, error, noise = undo_linear(
            tensors[chain.weight],
            sent[chain.weight],
            sent[chain.bias],
            self.precision,
            never_zero=bool(curved) and curved[-1],
        )
        prior = Smooth(observation.mean_image.double(), self.roughness, self.colour)
        known = Known(tensors, sent, noise, prior, marginal=self.variances == "marginal")
        top = State(value, error, torch.zeros_like(noise.relative))
        highest = max((index for index, layer in enumerate(layers) if isinstance(layer, Convolution)), default=0)
        state = _undo(layers, range(highest, len(layers)), top, known)
        # Withheld values were guessed. A guess enters the convolution's equations only by the slope of activations, so
        # the solution, carried forward to the linear layer, gives a better guess. A secret normalisation prevents that.
        guessed = value.variance.isinf()
        secret = any(isinstance(layer, Normalisation) and layer.secret for layer in layers[highest:])
        for _ in range(rounds if bool(guessed.any()) and not secret else 0):
            features = state.value.mean
            for layer in layers[highest:]:
                features = layer.forward(features, tensors)
            value = replace(value, mean=torch.where(guessed, features.flatten(1), value.mean))
            state = _undo(layers, range(highest, len(layers)), replace(top, value=value), known)
        state = _undo(layers, range(highest), state, known)
        dropped = any(isinstance(layer, Dropout) for layer in layers)
        seen = state.value.variance.isfinite() if dropped else torch.ones_like(state.value.mean, dtype=torch.bool)
        return state.value.mean, seen, state.misfit


def _undo(layers: Sequence[ChainLayer], part: range, state: State, known: Known) -> State:
    """Return the state at the input of a part of the chain from that at its output."""
    for index in reversed(part):
        state = undo(layers[index], state, replace(known, below=layers[:index]))
    return state


def served(observation: Observation) -> Chain | Network:
    """Return the chain of an observation, or the steps of its network if they include ReLUs that can be passed.

    Raises:
        Unsupported: neither can be undone.
    """
    if observation.count == 0:
        raise Unsupported("peel needs the number of images, which is hidden; use count=known")
    try:
        if observation.count > 1:
            raise Unsupported("peel undoes a chain of layers for one image")
        return served_chain(observation)
    except Unsupported as error:
        network = Network(trace(observation), [secret.name for secret in observation.secrets])
        reason = refusal(network, observation)
        if reason is None:
            return network
        raise Unsupported(f"{error}; {reason}") from error


def refusal(network: Network, observation: Observation) -> str | None:
    """Return why a network cannot be undone through its ReLUs; None if it may be."""
    sent, count = observation.gradient, observation.count
    places = all_beginnings(network, sent) if count == 1 else beginnings(network, sent, count)
    if not places and count > 1 and (most := most_begun(network, sent)):
        return (
            f"nor does a convolution behind a ReLU give its own input of each of {count} images: one needs as many "
            f"channels as the batch has places, which is so for at most {most}; give a client at most {most}"
        )
    if not places and (missing := withheld(network, sent, count)):
        return f"nor was the gradient of {missing[0]} sent, which would give that layer's input"
    if not places and count > 1:
        return (
            "nor does a convolution of stride 1 with a kernel above 1x1, behind a ReLU, whose zeros tell images apart, "
            "give its own input: one needs as many channels as the batch has places"
        )
    if not places:
        return (
            "nor does a convolution of stride 1 with a kernel above 1x1 give its own input: one needs as many channels "
            "as places"
        )
    for place in sorted(network.below(places[0])):
        name = network.steps[place].name
        if network.unknown(place):
            return f"nor can an image be searched for below {name}, whose random draws do not follow from the gradient"
        if place in network.hidden - network.locked:
            return f"nor can an image be searched for below {name}, which has secrets"
    return None


def served_chain(observation: Observation) -> Chain:
    """Return the chain of an observation; raise Unsupported if it cannot be undone."""
    chain = find_chain(observation)
    for index, layer in enumerate(chain.layers):
        if not isinstance(layer, Convolution):
            continue
        unknowns = prod(layer.inputs)
        if unknowns > MAX_UNKNOWNS:
            raise Unsupported(
                f"peel solves for up to {MAX_UNKNOWNS} values at once, and {layer.name} takes {unknowns}; "
                "use smaller images"
            )
        if all(isinstance(lower, Reshape) for lower in chain.layers[:index]):
            continue  # the prior determines what the equations of an image do not
        dropped = _dropped(chain, index)
        known = prod(layer.outputs) - dropped
        if layer.weight in observation.gradient:
            taps = prod(layer.geometry.kernel) * layer.outputs[0] // layer.geometry.groups
            known += layer.inputs[0] * min(taps, layer.inputs[1] * layer.inputs[2])
        if known < unknowns:
            why = f", {dropped} of whose outputs dropout hides" if dropped else ""
            raise Unsupported(f"peel has {known} equations for the {unknowns} values that {layer.name} takes{why}")
        upper = chain.layers[index + 1] if index + 1 < len(chain.layers) else None
        if isinstance(upper, Normalisation):
            clue(layer, chain.layers[:index], not upper.secret, observation.gradient)
    return chain


def _dropped(chain: Chain, index: int) -> int:
    """Return how many outputs of a convolution dropout hides, in the trial where these are the most.

    Raises:
        Unsupported: it hides single values of a channel from whose statistics a secret is inferred.
    """
    count = 0
    for layer in chain.layers[index + 1 :]:
        if isinstance(layer, Convolution):
            break
        if isinstance(layer, Dropout):
            kept = chain.masks[layer.kept]
            share = 1 - kept.double().flatten(1).mean(1)
            count += round(float(share.max()) * prod(layer.inputs))
            upper = chain.layers[index + 1]
            if isinstance(upper, Normalisation) and upper.secret and prod(kept.shape[2:]) > kept.shape[2]:
                raise Unsupported(
                    f"peel infers the secrets of {upper.name} from all values of a channel, and {layer.name} drops some"
                )
    return count


def _rows(observation: Observation, masks: Mapping[str, Tensor], begin: int, end: int) -> Observation:
    """Return the observation of some trials in float64; a tensor that all trials share is still held once.

    Tensors that only an adaptive attacker's relaxed network has are left out. Masks of dropout are added.
    """
    own = tensors_of(observation.model)

    def part(name: str, value: Tensor) -> Tensor:
        if value.ndim > own[name].ndim:
            shared = value.stride(0) == 0
            value = value[begin:end]
            if shared:
                return value[:1].double().expand(value.shape)
        return value.double() if value.is_floating_point() else value

    return replace(
        observation,
        weights={name: part(name, value) for name, value in observation.weights.items() if name in own}
        | {name: mask[begin:end] for name, mask in masks.items()},
        gradient={name: part(name, value) for name, value in observation.gradient.items()},
    )


def read_labels(observation: Observation) -> Tensor | None:
    """Return [T] int64 ([T, B] of batches): the granted labels, or those that the gradient shows; None without any.

    With a hard label and cross-entropy, only the true class has a negative derivative by its logit, which is that by
    the last layer's bias.
    """
    if observation.labels is not None:
        return observation.labels
    if observation.places:
        with contextlib.suppress(Unsupported):
            return batch_labels(observation)
        return None
    head = head_of(observation.model)
    plain = not head.single and head.loss in SIGN_LOSSES
    for name in classifiers(observation, observation.num_classes) if plain else ():
        bias = observation.gradient.get(f"{name}.bias")
        if bias is not None and bool(bias.any()):
            return bias.argmin(1)
    with contextlib.suppress(Unsupported):
        return analytic_labels(observation)
    return None
