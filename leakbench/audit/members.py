"""All private images of a recorded update beside what attackers returned, after one assignment."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from leakbench.core.images import decoded
from leakbench.core.text import plural
from leakbench.core.types import Reconstruction
from leakbench.errors import BadOption, MissingAsset
from leakbench.metrics.aligned import AlignedPSNR, AlignedSSIM
from leakbench.metrics.base import Metric, Truth
from leakbench.metrics.members import MemberScores, assign, matched

COPY = 0.95
"""Private images with this ``ssim_aligned`` to each other count as copies."""


@dataclass(frozen=True)
class Returned:
    """The images that one attacker returned.

    Attributes:
        attacker: its name.
        images: [M, C, H, W], in no order.
        floor: whether it used no gradient.
    """

    attacker: str
    images: Tensor
    floor: bool = False


@dataclass(frozen=True)
class Member:
    """One private image and the best that an attacker returned of it.

    Attributes:
        truth: [C, H, W] in [0, 1].
        guess: [C, H, W]; None if none was assigned to it.
        attacker: the name of the attacker.
        ssim: ``ssim_aligned``; NaN if there is none, or if images are too small for it.
        psnr: ``psnr_aligned`` in dB; NaN if there is none.
        recovered: whether it counts as recovered: by the threshold, and better than every floor.
    """

    truth: Tensor
    guess: Tensor | None
    attacker: str
    ssim: float
    psnr: float
    recovered: bool


@dataclass(frozen=True)
class ComparedImages:
    """All private images of a client beside the reconstructions.

    Attributes:
        members: one for each private image, in their order.
        recovered: by attacker, how many it recovers.
        floor: the largest share that one floor has above the threshold; NaN without a floor.
        scores: by metric, the values of the best reconstruction of each image that has one.
    """

    members: tuple[Member, ...]
    recovered: Mapping[str, int]
    floor: float
    scores: Mapping[str, MemberScores]

    @property
    def share(self) -> float:
        """The share of the private images that are recovered; NaN if images are too small for ``ssim_aligned``."""
        if min(self.members[0].truth.shape[-2:]) < AlignedSSIM.smallest:
            return math.nan
        return sum(one.recovered for one in self.members) / len(self.members)


def compared(
    returned: Sequence[Returned], truth: Tensor, threshold: float, metrics: Sequence[Metric] = ()
) -> ComparedImages:
    """Return private images beside what attackers returned, each attacker's images assigned to them once.

    Fewer images than there are private ones are assigned to the nearest, so that a smooth image can be like one by
    chance. They count only if they are nearer to it than every other private image is.

    Args:
        returned: what attackers and floors returned.
        truth: [B, C, H, W] in [0, 1].
        threshold: the ``ssim_aligned`` from which an image counts as recovered.
        metrics: those of ``scores``.
    """
    scored = [(one, *_scores(one.images.to(truth), truth)) for one in returned if len(one.images)]
    floors = [(ssim, psnr) for one, _, ssim, psnr, _ in scored if one.floor]
    least = torch.full((len(truth),), -math.inf, dtype=torch.float64)
    bar = [torch.stack([pair[place] for pair in floors]).amax(0) if floors else least for place in (0, 1)]
    chance = [torch.maximum(*pair) for pair in zip(bar, _others(truth))] if len(truth) > 1 else bar
    best: list[Member] = [Member(one, None, "", math.nan, math.nan, False) for one in truth]
    counts: dict[str, int] = {}
    for one, pairs, ssim, psnr, assigned in scored:
        if one.floor:
            continue
        least_ssim, least_psnr = chance if len(one.images) < len(truth) else bar
        good = assigned & (ssim >= threshold) & (ssim > least_ssim) & (psnr > least_psnr)
        counts[one.attacker] = int(good.sum())
        for place in assigned.nonzero().flatten().tolist():
            found = Member(
                truth[place], pairs[place], one.attacker, float(ssim[place]), float(psnr[place]), bool(good[place])
            )
            if best[place].guess is None or (found.recovered, found.psnr) > (best[place].recovered, best[place].psnr):
                best[place] = found
    return ComparedImages(
        members=tuple(best),
        recovered=counts,
        floor=max((float((ssim >= threshold).double().mean()) for ssim, _ in floors), default=math.nan),
        scores=_best_scores([one for one in best if one.guess is not None], metrics),
    )


def _best_scores(known: Sequence[Member], metrics: Sequence[Metric]) -> dict[str, MemberScores]:
    """Return by metric the values of reconstructions that attackers returned, of those metrics that have all of them.

    A metric that needs more than two images (labels, what was released) has none, nor one whose weights are missing.
    """
    guesses = [(one.guess, one.truth) for one in known if one.guess is not None]
    if not guesses:
        return {}
    images, truth = (torch.stack(each).float() for each in zip(*guesses))
    beside = Truth(truth, torch.full((len(truth),), -1))
    found = {}
    for metric in metrics:
        try:
            values = metric.score(Reconstruction(images), beside)
        except (ValueError, MissingAsset):
            continue
        if not bool(values.isnan().any()):
            found[metric.name] = MemberScores(values, metric.higher_is_better)
    return found


def _scores(images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the assigned images [B, C, H, W], their SSIM and PSNR [B] float64, and which images have one [B]."""
    pairs, assigned = matched(images, truth), assign(images, truth) >= 0
    small = min(truth.shape[-2:]) < AlignedSSIM.smallest
    ssim = torch.full((len(truth),), math.nan) if small else AlignedSSIM()(pairs, truth)
    return pairs, ssim.double(), AlignedPSNR()(pairs, truth).double(), assigned


def _others(truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each image the SSIM and PSNR, [B] each, of the other one that is nearest to it, without copies."""
    found = []
    for place, image in enumerate(truth):
        real = image.expand(len(truth), *image.shape)
        small = min(truth.shape[-2:]) < AlignedSSIM.smallest
        ssim = torch.zeros(len(truth)).double() if small else AlignedSSIM()(truth, real).double()
        psnr = AlignedPSNR()(truth, real).double()
        other = (ssim < COPY) & (torch.arange(len(truth)) != place)
        found.append(torch.stack([torch.where(other, one, -torch.inf).amax() for one in (ssim, psnr)]))
    scores = torch.stack(found)
    return scores[:, 0], scores[:, 1]


def check_truth(images: Tensor, truth: Tensor, epochs: int | None) -> None:
    """Raise BadOption if there are fewer private images than an update shows.

    A client that changes its images from epoch to epoch, as by flips, has up to ``epochs`` inputs of each.
    """
    if len(images) > len(truth) * (epochs or 1):
        changed = "" if epochs is not None else ", or state --local-epochs if it changed them from epoch to epoch"
        raise BadOption(
            f"--truth has {plural(len(truth), 'image')}, and the update shows at least {len(images)}; give a folder of "
            f"all images that the client trained on{changed}"
        )


def nearest_copies(images: Tensor, truth: Tensor) -> Tensor:
    """Return at most one image for each private one: of several inputs of it in an update, the nearest.

    Args:
        images: [M, C, H, W] that an update itself shows to be right, so that the truth chooses among inputs of the
            client, and not among guesses.
        truth: [B, C, H, W] in [0, 1].
    """
    if len(images) <= len(truth):
        return images
    places = assign(truth, images)  # of each image, the private one
    return images[places >= 0]


def pixels_of(picture: bytes, channels: int) -> Tensor | None:
    """Return [1, C, H, W] in [0, 1] of a PNG of a run; None if it has other channels."""
    image = decoded(picture)
    if image is None:
        return None
    values = torch.from_numpy(np.array(image)).float() / 255
    values = values[None] if values.dim() == 2 else values.permute(2, 0, 1)
    return values[None] if len(values) == channels else None


def read_labels_file(path: str, classes: int, names: Sequence[str] | None = None) -> tuple[int, ...]:
    """Return the labels of a client's images, from a text file.

    Each line has the label of one image, in the order of the images' names; or the name of the image's file, a comma or
    a tab, and its label, in any order.

    Args:
        path: of the file.
        classes: of the network.
        names: of the files of the private images; None if they are not given.

    Raises:
        MissingAsset: there is no such file.
        BadOption: a line has no label of the network, or the labels are not as many as the images.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingAsset(f"--labels {path!r} does not exist; give a text file with one label a line")
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadOption(f"--labels {path!r} cannot be read ({type(error).__name__}); write it in UTF-8") from None
    found: list[tuple[str, int]] = []
    for number, line in enumerate(lines, 1):
        name, _, text = line.replace("\t", ",").rpartition(",")
        try:
            label = int(text)
        except ValueError:
            raise BadOption(f"--labels {path!r}, line {number}: {text!r} is no whole number; write a label") from None
        if not 0 <= label < classes:
            raise BadOption(f"--labels {path!r}, line {number}: {label} is no class; give 0 to {classes - 1}")
        found.append((name.strip(), label))
    if not found:
        raise BadOption(f"--labels {path!r} is empty; write one label a line")
    seen: set[str] = set()
    for name, _ in found:
        if bool(name) != bool(found[0][0]):
            raise BadOption(f"--labels {path!r} has labels with and without names; write NAME,LABEL in every line")
        if name and name in seen:
            raise BadOption(f"--labels {path!r} has several labels of the image {name!r}; write one")
        seen.add(name)
    if names is not None and len(found) != len(names):
        raise BadOption(f"--labels {path!r} has {len(found)} labels, and --truth {len(names)} images; give as many")
    if names is not None and found[0][0]:
        by_name = dict(found)
        missing = next((name for name in names if name not in by_name), None)
        if missing is not None:
            raise BadOption(f"--labels {path!r} has no label of the image {missing!r}; add it")
        return tuple(by_name[name] for name in names)
    return tuple(label for _, label in found)
