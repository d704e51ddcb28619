"""The input and the output error of a convolution from its weight gradient alone, by the shifts of its kernel.

Derivation, for one image with input h [C, P_in] and error d [O, P_out] (dL/d output):

1. The gradient at tap k is D_k = d S_k h^T, with S_k the 0/1 matrix that says which position tap k reads.
2. The stacked D_k have rank P_in if h has, so their right singular vectors V give an invertible M = h^T V.
3. With Y = M^-1 this is D_k V Y = d S_k for all k: linear and homogeneous in Y and d, and PSD once d is eliminated.
4. Two solutions differ by a pair (Z, R) with S_k Z = R S_k; zero padding leaves only multiples of the identity
   (``Lattice.ambiguity``). So the null vector is unique, and d and h are known up to one factor.
5. For B images the null space has dimension B: d and h are known up to a B x B mixing of the images.
6. Inputs behind a ReLU have zeros, which determine the mixing (``unmixing.py``).

Nothing above or below the convolution enters: no weight, label, activation or normalisation. Related: ESPRIT (Roy and
Kailath 1989) recovers frequencies from one shift; here several shifts with a boundary recover all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from leakbench.attacks.peeling.factors import ConvolutionFactors, NotFactorised
from leakbench.attacks.peeling.krylov import bytes_held, lowest_eigenvectors
from leakbench.attacks.peeling.lattice import Lattice
from leakbench.attacks.peeling.reduced import ReducedGradient, misfit, solve_inputs
from leakbench.attacks.peeling.unmixing import unmix
from leakbench.core.device import free_memory
from leakbench.core.text import plural
from leakbench.errors import BadOption

CLEAR_GAP = 100.0
"""Singular values s_r and s_r+1 with at least this ratio say that the rank is r."""

MAX_NULL_RATIO = 0.2
"""The largest eigenvalue of the null space over the next one, up to which the factorisation counts as one."""

MAX_UNKNOWNS = 160_000
"""The most unknowns P_in * rank that are solved for; a product of the solver then takes about a second."""

NOT_SENT = NotFactorised("the gradient of the weight was not sent")

ROUNDING = 1e-13
"""Eigenvalues up to this count as 0; the largest is at most 1."""

SOLVER_ERROR = 1e-10
"""The relative error of inputs that the eigenvalue solver leaves."""

EPSILON = {torch.float64: 1e-13, torch.float32: 3e-8, torch.float16: 1e-4, torch.bfloat16: 1e-3}
"""The singular values, relative to the largest, that rounding makes of zero."""


def factorise_convolution(
    gradient: Tensor | None, lattice: Lattice, rng: torch.Generator, images: int = 1
) -> ConvolutionFactors | NotFactorised:
    """Return the inputs and errors of a convolution from the gradient of its weight.

    It applies if the kernel's shifts determine them (``Lattice.ambiguity``), and the gradient's rank is B P_in, which
    needs C / groups >= B P_in. For several images, inputs must be >= 0 and have zeros, as behind a ReLU. Noise is
    tolerated: at 1e-2 of the gradient the input has an error of some 1e-2. The linear algebra is in float64.

    Args:
        gradient: dL/dw [O, C / groups, *kernel], added (or averaged) over the images; None if it was not sent.
        lattice: the convolution's geometry.
        rng: a generator on the CPU, for the start of the eigenvalue solver and the search for the mixing.
        images: B.

    Raises:
        BadOption: the gradient's shape contradicts the geometry, or ``images`` is not positive.

    Example:
        >>> layer = torch.nn.Conv2d(64, 32, 3, padding=1)
        >>> private = torch.randn(1, 64, 4, 4, generator=torch.Generator().manual_seed(0)).relu()
        >>> (gradient,) = torch.autograd.grad(layer(private).square().sum(), layer.weight)
        >>> found = factorise_convolution(gradient, Lattice.of(layer, (4, 4)), torch.Generator().manual_seed(1))
        >>> unit = private.square().mean().sqrt()
        >>> bool((found.inputs * unit - private).abs().max() < 1e-5)
        True
    """
    refused = refuse(gradient, lattice, images)
    if refused is not None or gradient is None:
        return refused or NOT_SENT
    parts = []
    values = gradient.detach().cpu()
    size = torch.stack(values.aminmax()).abs().amax().double().clamp(min=1e-300)
    for part in values.chunk(lattice.groups):
        # taps come first in memory, as all products below take them: one copy in place of one for each
        by_tap = part.flatten(2).permute(2, 0, 1)
        by_tap = torch.empty(by_tap.shape, dtype=torch.float64).copy_(by_tap).div_(size)
        own = by_tap.permute(1, 2, 0).unflatten(2, lattice.kernel)
        found = _factorise_group(own, lattice.undilated(), rng, images * lattice.phases, gradient.dtype)
        if isinstance(found, NotFactorised):
            return found
        parts.append(found)
    return ConvolutionFactors(
        inputs=torch.cat([part.inputs for part in parts], 1),
        variance=torch.cat([part.variance for part in parts], 1),
        errors=size * torch.cat([part.errors for part in parts], 1),
        rank_gap=min(part.rank_gap for part in parts),
        null_ratio=max(part.null_ratio for part in parts),
        misfit=max(part.misfit for part in parts),
        phases=lattice.phases,
        groups=lattice.groups,
    )


def refuse(gradient: Tensor | None, lattice: Lattice, images: int, *, low_rank: bool = False) -> NotFactorised | None:
    """Return why a factorisation is refused before any linear algebra, or None.

    Args:
        gradient: dL/dw [O, C / groups, *kernel]; None if it was not sent.
        lattice: the convolution's geometry.
        images: B.
        low_rank: fewer channels than positions do not matter.

    Raises:
        BadOption: the gradient's shape contradicts the geometry, or ``images`` is not positive.
    """
    if images < 1:
        raise BadOption(f"images={images} must be at least 1")
    if gradient is None:
        return NOT_SENT
    if gradient.shape[2:] != lattice.kernel or len(gradient) % lattice.groups:
        shape = list(gradient.shape)
        raise BadOption(f"a gradient {shape} is none of {lattice} in {lattice.groups} groups; expected [O, C, *kernel]")
    if not bool(torch.isfinite(torch.stack(gradient.aminmax())).all()):
        return NotFactorised("the gradient has values that are not finite")
    rank, channels = images * lattice.inputs, gradient.shape[1]
    if channels < rank and not low_rank:
        by_group = " of a group" if lattice.groups > 1 else ""
        return NotFactorised(
            f"{channels} channels{by_group} are fewer than {images} x {lattice.inputs} positions, so that the "
            "gradient's rank cannot reach the number of positions"
        )
    if lattice.undilated().inputs * rank > MAX_UNKNOWNS:
        return NotFactorised(f"{lattice.undilated().inputs * rank} unknowns are more than {MAX_UNKNOWNS}")
    held, free = (
        bytes_held(lattice.undilated().inputs * rank, images * lattice.phases),
        free_memory(torch.device("cpu")),
    )
    if held > free:
        sizes = f"{held / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        return NotFactorised(f"the eigenvectors of {lattice.undilated().inputs * rank} unknowns take {sizes}")
    ambiguity = lattice.undilated().ambiguity()
    if ambiguity > 1:
        return NotFactorised(f"{lattice}: its shifts leave {ambiguity} dimensions of the input undetermined")
    return None


def _factorise_group(
    gradient: Tensor, lattice: Lattice, rng: torch.Generator, images: int, dtype: torch.dtype
) -> ConvolutionFactors | NotFactorised:
    """Return the factors of a gradient [O, C, *kernel] without groups and dilation."""
    mixed = factorise_mixed(gradient, lattice, rng, images, dtype)
    if isinstance(mixed, NotFactorised):
        return mixed
    by_tap = gradient.flatten(2).permute(2, 0, 1)
    parts = separate(mixed.errors, lambda errors: solve_inputs(by_tap, errors, lattice), rng)
    if isinstance(parts, NotFactorised):
        return parts
    inputs, variance, errors = parts
    return ConvolutionFactors(
        inputs=inputs.unflatten(2, lattice.image),
        variance=variance.unflatten(2, lattice.image),
        errors=errors.mT.unflatten(2, lattice.output),
        rank_gap=mixed.rank_gap,
        null_ratio=mixed.null_ratio,
        misfit=misfit(by_tap, errors, inputs, lattice),
    )


@dataclass(frozen=True)
class MixedErrors:
    """The errors of a convolution up to a linear mixing of the images, or of the sub-lattices of a dilation.

    Attributes:
        errors: [B, P_out, O]; each is a mixture of the errors of all images.
        rank_gap: see ``ConvolutionFactors``.
        null_ratio: see ``ConvolutionFactors``.
    """

    errors: Tensor
    rank_gap: float
    null_ratio: float


def factorise_mixed(
    gradient: Tensor, lattice: Lattice, rng: torch.Generator, images: int, dtype: torch.dtype
) -> MixedErrors | NotFactorised:
    """Return steps 1 to 5 of the derivation.

    Args:
        gradient: dL/dw [O, C, *kernel], float64, finite.
        lattice: the geometry, without groups and dilation.
        rng: of the start of the eigenvalue solver.
        images: B.
        dtype: in which the gradient was sent.
    """
    if not bool(gradient.any()):
        return NotFactorised("the gradient is zero, at least of one group")
    rank = images * lattice.inputs
    reduced = ReducedGradient.of(gradient, lattice, images, rank)
    gap = clear_rank(reduced.singular, rank, dtype)
    if isinstance(gap, NotFactorised):
        return gap
    values, solutions = lowest_eigenvectors(reduced.product, lattice.inputs * reduced.rank, images, rng)
    # N has orthonormal columns, so the form has no eigenvalue above 1, and smaller ones than this are rounding
    last, following = (max(float(value), ROUNDING) for value in values[images - 1 : images + 1])
    if last > MAX_NULL_RATIO * following:
        return NotFactorised(
            f"{plural(images, 'eigenvalue')} should vanish, and the last is {last / following:.2g} of the next: too "
            "much noise, another number of images, or another geometry",
            last / following,
        )
    return MixedErrors(reduced.expand(reduced.errors(solutions)).mT, gap, last / following)


def separate(
    errors: Tensor, solve: Callable[[Tensor], tuple[Tensor, Tensor]], rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor] | NotFactorised:
    """Return the inputs, their variances and the errors of each image from mixtures: step 6 of the derivation.

    Args:
        errors: [B, P_out, O], mixed.
        solve: returns inputs [B, C, P_in] and their variances for errors; NaN in channels that are not determined.
        rng: of the search.

    Returns:
        Inputs and variances [B, C, P_in], and errors [B, P_out, O], with inputs of root mean square 1 and positive sum.
    """
    inputs, variance = solve(errors)
    known = torch.isfinite(inputs).all(0).all(1)
    spread = variance[:, known].mean(0).sqrt()
    directions = unmix(inputs[:, known].permute(1, 2, 0).flatten(0, 1), spread.flatten(), rng)
    images = len(errors)
    if len(directions) < images:
        return NotFactorised(
            f"{len(directions)} of {images} images were found: their inputs, which are known up to a mixing, have too "
            "few zeros"
        )
    if images > 1:
        errors = torch.einsum("ba,apq->bpq", torch.linalg.inv(directions).mT, errors)
        inputs, variance = solve(errors)
        known = torch.isfinite(inputs).all(0).all(1)
    seen = inputs[:, known]
    size = seen.square().mean((1, 2), keepdim=True).sqrt() * seen.sum((1, 2), keepdim=True).sign()
    return inputs / size, variance / size.square() + SOLVER_ERROR**2, errors * size


def clear_rank(singular: Tensor, rank: int, dtype: torch.dtype) -> float | NotFactorised:
    """Return s_r / s_r+1, or why the singular values contradict a rank.

    A ratio of 100 or more at another place than r, with nothing but rounding below it, is a contradiction. Without any,
    the gradient is noisy, and it is for the caller to find out whether its largest r singular values are enough.

    Args:
        singular: all singular values, descending.
        rank: r.
        dtype: of the gradient, whose rounding makes zeros of singular values small ones.
    """
    floor = EPSILON.get(dtype, EPSILON[torch.float32]) * float(singular[0])
    if len(singular) < rank:
        return NotFactorised(f"the gradient has {int((singular > floor).sum())} independent rows, and needs {rank}")
    # what is far below the floor is rounding, whatever its ratios are
    gaps = singular[:-1].clamp(min=floor / CLEAR_GAP) / singular[1:].clamp(min=floor / CLEAR_GAP)
    gap = float(gaps[rank - 1]) if len(gaps) >= rank else torch.inf
    if gap >= CLEAR_GAP and float(singular[rank - 1]) > floor:
        return gap
    # in noise, a ratio says nothing unless rounding alone is below it
    clear = ((gaps >= CLEAR_GAP) & (singular[1:] <= CLEAR_GAP * floor)).nonzero().flatten()
    found = int(clear[-1]) + 1 if len(clear) else int((singular > floor).sum())
    if found < rank:
        return NotFactorised(f"the gradient has rank {found}, and {rank} is needed: the input's rank is too low", gap)
    if len(clear):
        return NotFactorised(f"the gradient has rank {found} instead of {rank}: more images, or another size", gap)
    return gap
