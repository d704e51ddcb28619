"""Normalisation of each trial's channels by their own mean and variance, with first and second derivatives.

BatchNorm on a batch of one image is this. Written with elementary operations its second derivative takes some sixty
passes over the activations; in closed form it takes a tenth of that. With z the normalised input, r the reciprocal
standard deviation, means over positions, and P u = u - mean(u) - z mean(u z), which is symmetric:

    y = gamma z + beta,    dL/dx = gamma r P d,    dL/dgamma = sum(d z),    dL/dbeta = sum(d)    for d = dL/dy.

The derivatives of <v, dL/dx> + <v_gamma, dL/dgamma> + <v_beta, dL/dbeta> are, with m = mean(d z) and k = mean(v z),

    by d:      gamma r P v + v_gamma z + v_beta
    by x:      v_gamma r P d - gamma r (m r P v + k r P d + r mean(v P d) z)
    by gamma:  sum(v r P d).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from leakbench.gradients.bilinear import inner
from leakbench.gradients.lanes import maps

LONE = ("more than 1 value per channel", "more than 1 spatial element")
"""Parts of what torch says of a normalisation that has a single value of a channel."""


def lone_value(error: BaseException) -> bool:
    """Return whether an error is that of a normalisation by a step's own statistics, of a single value."""
    return isinstance(error, ValueError) and any(part in str(error) for part in LONE)


def normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return gamma z + beta [*R, N] for rows x [*R, N], weight gamma [*R] and bias beta [*R].

    Rows are [R, N], or [T, C, N] with the trials innermost in memory (``maps.are_served``).
    """
    out: Tensor = Normalise.apply(x, weight, bias, eps)
    return out


class Normalise(Function):
    """See ``normalise``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Normalise, scale and shift."""
        z, scale = _standardise(x, eps)
        ctx.save_for_backward(x, z, scale, weight)
        return torch.addcmul(bias[..., None], z, weight[..., None])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients by x, weight and bias."""
        return *NormaliseGradient.apply(grads[0], *ctx.saved_tensors), None


class NormaliseGradient(Function):
    """d [*R, N], x, z, r [*R] and gamma [*R] give the gradients by x [*R, N], gamma [*R] and beta [*R].

    z and r are functions of x; their share in the derivative is given with the one by x.
    """

    @staticmethod
    def forward(ctx: Any, d: Tensor, x: Tensor, z: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project."""
        projected, dot, total = _project(d, z, r)
        ctx.save_for_backward(z, r, weight, projected, dot)
        return projected * weight[..., None], dot, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients by d, x and weight."""
        v, by_weight, by_bias = grads
        z, r, weight, projected, dot = ctx.saved_tensors
        count = z.shape[-1]
        own, own_dot, _ = _project(v, z, r)
        cross = inner(v, projected) if v.ndim == 2 else (v * projected).sum(2)
        scale = weight * r / count
        by_d = torch.addcmul(by_bias[..., None], z, by_weight[..., None]).addcmul_(own, weight[..., None])
        by_x = own * (-scale * dot)[..., None]
        by_x.addcmul_(projected, (by_weight - scale * own_dot)[..., None]).addcmul_(z, (-scale * cross)[..., None])
        return by_d, by_x, None, None, cross


def _standardise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return z [*R, N] and r [*R]."""
    if x.ndim > 2:
        return maps.standardise(x, eps)
    z, _, scale = torch.native_batch_norm(x[None], None, None, None, None, True, 0.0, eps)
    return z[0], scale


def _project(u: Tensor, z: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return r P u [*R, N], sum(u z) [*R] and sum(u) [*R]."""
    if u.ndim > 2:
        return maps.project(u, z, r)
    mean, one = torch.zeros_like(r), torch.ones_like(r)
    out, dot, total = torch.ops.aten.native_batch_norm_backward(
        u[None].contiguous(), z[None], r, None, None, mean, one, True, 0.0, [True, True, True]
    )
    return out[0], dot, total


def batch_normalisations(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Return every batch normalisation by name, in order of registration."""
    kind = nn.modules.batchnorm._BatchNorm
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}
