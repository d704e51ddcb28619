"""How strongly each feature of a layer depends on an image."""

import warnings

import torch
from torch import Tensor, nn

from leakbench.errors import Unsupported

JACOBIAN_ROWS = 64
"""How many rows of a Jacobian are computed at a time."""


def layer_input_of(model: nn.Module, x: Tensor, y: Tensor | None = None, *, layer: str) -> Tensor:
    """Return what a linear layer of a network takes: [B, D] for images x [B, C, H, W].

    Raises:
        Unsupported: the network does not call the layer once, on one vector an image.
    """
    linear, inputs = model.get_submodule(layer), list[Tensor]()
    assert isinstance(linear, nn.Linear)
    hook = linear.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    try:
        model(x)
    finally:
        hook.remove()
    if len(inputs) != 1 or inputs[0].numel() != len(x) * linear.in_features:
        raise Unsupported("soteria needs a classifier that takes one vector, once")
    return inputs[0].view(len(x), -1)


def sensitivity(model: nn.Module, layer: str, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return r [D], what a linear layer of a network takes, and |d r_i / d x|_2 [D] for an image x [1, C, H, W].

    Raises:
        Unsupported: the network does not call the layer once, on one vector.
    """
    x = image.detach().clone().requires_grad_()
    features = layer_input_of(model, x, layer=layer).flatten()
    norms = []
    with warnings.catch_warnings():
        # an operation that vmap has no rule for is looped over, which it says every time
        warnings.filterwarnings("ignore", "There is a performance drop")
        for rows in torch.eye(len(features), dtype=features.dtype, device=features.device).split(JACOBIAN_ROWS):
            (part,) = torch.autograd.grad(features, x, rows, retain_graph=True, is_grads_batched=True)
            norms.append(part.flatten(1).norm(dim=1))
    return features.detach(), torch.cat(norms)
