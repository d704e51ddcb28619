"""What a client can see of the weights that a server sent: whether a layer was crafted to keep images apart.

Three scores for each weight matrix (of a convolution, its filters are the rows), none of which needs an image:

- *copies*: the share of the rows that are a multiple of another row. An imprint measures one functional with all rows.
- *evenness*: sorted biases of a layer that was drawn or trained have gaps as irregular as those of independent draws;
  quantiles of images have gaps that change slowly. The score is how many standard errors the gaps are too regular.
- *balance*: of trap weights, exactly half of each row is negative, or the sums of the rows are all alike. The score is
  how many powers of ten the variance over the rows is below any that independent signs have by chance.

A server that knows these scores can avoid them (``reports/malicious`` has what was tried). They are evidence of
crafting if high, and no proof of honesty if low.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import chi2
from torch import Tensor

from leakbench.errors import BadOption, MissingAsset
from leakbench.models.weights import state_dict_of

MIN_ROWS = 16
"""Layers with fewer rows are not judged: their scores vary too much."""
MIN_INPUTS = 8
"""Likewise of rows with fewer entries."""

PARALLEL = 1e-3
"""Two rows are multiples of each other if the sine of their angle is at most this."""
DEAD = 1e-6
"""A row is dead if its norm is at most this share of the largest."""

COPIES, EVENNESS, BALANCE = 0.05, 6.0, 0.3
"""The scores from which on a layer counts as crafted. Set on other networks than those of ``FALSE_ALARMS``."""

EXPONENTIAL_GAPS = (2 * math.log(2), 1.17)
"""Mean and standard deviation of the absolute difference of the logarithms of two independent exponential gaps."""

GRID = 16
"""Gaps are judged if the median one is at least this many steps between neighbouring numbers of the biases' type."""

CHANCE = 1e-6
"""The probability of a smaller variance, by chance, than that with which a variance is compared."""

BLOCK_ROWS = 1024
"""How many rows are compared with all others at a time."""


@dataclass(frozen=True)
class LayerScore:
    """The scores of one weight matrix.

    Attributes:
        name: of the weight in the file.
        rows: how many rows it has; likewise ``inputs``.
        copies: the share of its rows that are multiples of another one.
        evenness: how many standard errors the gaps of its sorted biases are more regular than those of independent
            draws; 0 without biases.
        balance: by how many powers of ten the variance of its rows' sums, or of their numbers of negative entries, is
            below what one in a million matrices with independent signs has.
        dead: the share of its rows that are zero. Trained networks have some too: it does not count.
    """

    name: str
    rows: int
    inputs: int
    copies: float
    evenness: float
    balance: float
    dead: float

    @property
    def score(self) -> float:
        """The largest of the scores, each relative to its threshold; crafted from 1 on."""
        return max(self.copies / COPIES, self.evenness / EVENNESS, self.balance / BALANCE)

    @property
    def reasons(self) -> list[str]:
        """Why the layer counts as crafted, in words; empty if it does not."""
        found = []
        if self.copies >= COPIES:
            found.append(
                f"{round(self.copies * self.rows)} of {self.rows} rows are multiples of another row, as in an imprint "
                "(Fowl et al. 2022)"
            )
        if self.evenness >= EVENNESS:
            found.append(
                f"its biases are spaced like quantiles: their gaps are {self.evenness:.1f} standard errors more "
                "regular than those of independent draws, as in an imprint (Fowl et al. 2022)"
            )
        if self.balance >= BALANCE:
            found.append(
                "the rows are balanced: half of each is negative, or their sums are alike, with a variance "
                f"{10**self.balance:,.1f} times below what chance explains, as in trap weights (Boenisch et al. 2023)"
            )
        return found


@dataclass(frozen=True)
class ReceivedWeights:
    """The scores of a file of weights.

    Attributes:
        file: its path.
        layers: the scores of its weight matrices, in the order of the file.
        skipped: how many weight matrices were too small to be judged.
    """

    file: str
    layers: tuple[LayerScore, ...]
    skipped: int

    @property
    def crafted(self) -> list[LayerScore]:
        """The layers that count as crafted, the most conspicuous first."""
        return sorted((one for one in self.layers if one.score >= 1), key=lambda one: -one.score)

    @property
    def score(self) -> float:
        """The largest score of a layer; 0 without any."""
        return max((one.score for one in self.layers), default=0.0)


def read_received(path: str) -> ReceivedWeights:
    """Return the scores of the weights in a file: ``.safetensors``, a state dict of ``torch.save``, or ``.npz``.

    Raises:
        MissingAsset: there is no such file.
        CorruptAsset: it cannot be read as plain tensors.
        BadOption: no layer in it can be judged.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingAsset(f"--received {path!r} does not exist; give the file of the weights that the server sent")
    layers, skipped = scores(state_dict_of(file, f"--received {path!r}"))
    if not layers:
        raise BadOption(
            f"--received {path!r} has no weight matrix of at least {MIN_ROWS} rows and {MIN_INPUTS} inputs that is "
            "finite; give the whole state dict"
        )
    return ReceivedWeights(path, tuple(layers), skipped)


def scores(state: Mapping[str, Tensor]) -> tuple[list[LayerScore], int]:
    """Return the scores of the weight matrices of a state dict, and how many are too small or not finite.

    A tensor of two or more axes is a matrix with one row for each place of its first axis. The biases of ``X.weight``
    are ``X.bias``.
    """
    found, skipped = [], 0
    for name, value in state.items():
        if value.ndim < 2 or not value.is_floating_point() or not value.numel():
            continue
        matrix = value.detach().flatten(1).double()
        if len(matrix) < MIN_ROWS or matrix.shape[1] < MIN_INPUTS or not bool(torch.isfinite(matrix).all()):
            skipped += 1
            continue
        bias = state.get(f"{name.removesuffix('weight')}bias") if name.endswith("weight") else None
        found.append(layer_score(name, matrix, bias))
    return found, skipped


def layer_score(name: str, weight: Tensor, bias: Tensor | None = None) -> LayerScore:
    """Return the scores of a weight matrix [M, D] with its biases [M], if it has any."""
    rows, inputs = weight.shape
    norms = weight.norm(dim=1)
    live = weight[norms > DEAD * norms.max()]
    return LayerScore(
        name,
        rows,
        inputs,
        copies=_copies(live) / rows,
        evenness=0.0 if bias is None or bias.shape != (rows,) else _evenness(bias.double()),
        balance=_balance(live),
        dead=1 - len(live) / rows,
    )


def _copies(weight: Tensor) -> int:
    """Return how many rows are multiples of another row."""
    if len(weight) < 2:
        return 0
    unit = weight / weight.norm(dim=1, keepdim=True)
    count = 0
    for start in range(0, len(unit), BLOCK_ROWS):
        part = unit[start : start + BLOCK_ROWS]
        cosine = (part @ unit.T).abs()
        cosine[torch.arange(len(part)), torch.arange(start, start + len(part))] = 0
        count += int((cosine >= math.sqrt(1 - PARALLEL**2)).any(1).sum())
    return count


def _evenness(bias: Tensor) -> float:
    """Return how many standard errors the gaps of sorted biases are too regular for independent draws.

    Gaps of independent draws from any smooth distribution are locally exponential: the logarithms of two neighbouring
    ones differ by 2 log 2 on average.
    """
    gaps = bias.unique().diff()
    if not bool(torch.isfinite(gaps).all()) or len(gaps) < MIN_ROWS - 1 or float(gaps.median()) < GRID * _step(bias):
        return 0.0
    mean, deviation = EXPONENTIAL_GAPS
    difference = gaps.log().diff().abs()
    return max(0.0, (mean - float(difference.mean())) * len(difference) ** 0.5 / deviation)


def _step(bias: Tensor) -> float:
    """Return how far the numbers near a typical bias are apart, in the coarsest type that holds all biases."""
    types = (torch.bfloat16, torch.float16, torch.float32)
    kind = next((one for one in types if torch.equal(bias.to(one).double(), bias)), torch.float64)
    return float(bias.abs().median()) * torch.finfo(kind).eps


def _balance(weight: Tensor) -> float:
    """Return by how many powers of ten sums or signs vary less over the rows than independent signs do by chance."""
    if len(weight) < MIN_ROWS:
        return 0.0
    weight = weight / weight.norm(dim=1, keepdim=True)
    inputs = (weight != 0).double().sum(1)
    ratios = [float(weight.sum(1).var()), float(((weight < 0).sum(1) / inputs.clamp(min=1).sqrt()).var()) * 4]
    free = len(weight) - 1
    return max(0.0, math.log10(float(chi2.ppf(CHANCE, free)) / free / max(min(ratios), 1e-12)))
