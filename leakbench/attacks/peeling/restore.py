"""The images of one trial of a ReLU network: the descent, and the search from what it recovered."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from leakbench.attacks.peeling.contrast import classifier_input, with_contrast
from leakbench.attacks.peeling.descent import Feature, Recovered, inputs_alone, recover
from leakbench.attacks.peeling.inversion import BELOW, MAX_ERROR, chosen, invert
from leakbench.attacks.peeling.network import Network
from leakbench.attacks.peeling.pooling import MAX_WINDOWS, find_stem, pooled, restore_pooled


@dataclass(frozen=True)
class Restored:
    """The images that one trial was trained on, as far as they were found.

    Attributes:
        images: [B, C, H, W], in an order of their own; grey if none were found.
        misfits: [B], how far the layer inputs that the images give are from the recovered ones, squared and relative.
        evaluations: of the search.
        reason: why no image was found, a line that names the layer; empty if they were.
    """

    images: Tensor
    misfits: Tensor
    evaluations: int = 0
    reason: str = ""


def restore(
    network: Network,
    searched: Network,
    sent: Mapping[str, Tensor],
    noise: Tensor,
    rng: torch.Generator,
    steps: int,
    note: Callable[[str], None] | None = None,
    spreads: Mapping[str, float] | None = None,
) -> Restored:
    """Return the images that one step was trained on, from the gradient of their mean loss.

    Args:
        network: the trial's, in float64 on the CPU.
        searched: the same, of the floating type and on the device of the search for the images.
        sent: the trial's gradient on the CPU, by name; NaN in entries that were not sent.
        noise: [B, C, H, W] standard normal of the search's type, for B images.
        rng: of the factorisation.
        steps: of the search (``inversion.invert``).
        note: called with a line if a search cannot be recorded on a GPU.
        spreads: the standard deviation of an entry's error in tensors of which it is known.
    """
    found = recover(network, sent, rng, len(noise), spreads)
    used = chosen(found.features)
    if not used and len(noise) == 1:
        used = chosen(inputs_alone(network, sent, rng))
    if not used:
        grey = torch.full_like(noise, 0.5)
        return Restored(grey, grey.new_full((len(grey),), torch.nan), reason=failure(network, found))
    whole = {name: value for name, value in sent.items() if bool(torch.isfinite(value).all())}
    lowest = used[-1]
    # which position gave a ceiling does not follow from it
    capped = bool((lowest.value >= BELOW * network.ceiling(lowest.place)).any())
    stem = None if capped else find_stem(searched, lowest.place)
    windows = lowest.value[:, 0].numel()
    if stem is not None and lowest.error is not None and stem.needs <= set(whole) and windows <= MAX_WINDOWS:
        own = find_stem(network, lowest.place)
        assert own is not None
        known = pooled(own, lowest.value, lowest.error, whole)
        draws = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=rng)))
        images, misfit, spent = restore_pooled(stem, known, noise, draws, steps, note)
        return Restored(images, misfit.expand(len(noise)), spent)
    restored = images_of(network, searched, used, noise, steps, whole, note)
    seen = classifier_input(network, sent) if all(each.free for each in used) else None
    if seen is None:
        return restored
    return replace(restored, images=with_contrast(searched, restored.images, *seen))


def images_of(
    network: Network,
    searched: Network,
    used: Sequence[Feature],
    noise: Tensor,
    steps: int,
    sent: Mapping[str, Tensor],
    note: Callable[[str], None] | None = None,
) -> Restored:
    """Return the images that give recovered values, searched for one by one unless their statistics are mixed.

    Args:
        network: the trial's.
        searched: the same, of the floating type and on the device of the search.
        used: recovered values, of B images each, the highest first.
        noise: as for ``restore``, and so are the others.
        steps: of the search.
        sent: the trial's gradient; it counts in the search for a single image.
        note: called with a line if a search cannot be recorded on a GPU.
    """
    below = network.below(*(each.place for each in used))
    if any(network.steps[place].kind == "normalisation" for place in below):
        # statistics of the batch: all images at once
        images, misfit, spent = invert(searched, used, noise, steps, None, note)
        return Restored(images, misfit.expand(len(noise)), spent)
    alone = sent if len(noise) == 1 else None
    each = [
        invert(searched, _of_image(used, row), noise[row : row + 1], steps, alone, note) for row in range(len(noise))
    ]
    return Restored(
        torch.cat([image for image, _, _ in each]),
        torch.cat([misfit for _, misfit, _ in each]),
        sum(count for _, _, count in each),
    )


def _of_image(features: Sequence[Feature], row: int) -> list[Feature]:
    """Return the recovered values of one image."""
    return [replace(each, value=each.value[row : row + 1]) for each in features]


def failure(network: Network, found: Recovered) -> str:
    """Return why nothing of what was recovered can be used, in a line that names the layer at which that begins."""
    for each in found.features:
        error = max(value for value in (each.deviation, each.check, each.balance, 0.0) if value == value)
        if error > MAX_ERROR:
            return f"the descent fails at {network.reader(each.place)}, whose input has an error of about {error:.1g}"
    return f"nothing was recovered: {found.reason}" if found.reason else "nothing was recovered exactly enough"
