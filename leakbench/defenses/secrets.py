"""The secrets of clients, drawn from their distributions."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from leakbench.core.rng import generator
from leakbench.core.types import Secret
from leakbench.errors import BadOption


def drawn_secrets(
    secrets: Sequence[Secret],
    tensors: Mapping[str, Tensor],
    key: str,
    *purpose: object,
    trained: bool = False,
    rows: int = 0,
) -> dict[str, Tensor]:
    """Return a client's secrets by name; of a ``trained`` network only the fresh ones are drawn.

    Args:
        secrets: of the client's defense.
        tensors: every tensor of its network, in which nothing was drawn.
        key: of the client's draws.
        purpose: of these draws, for those after the first.
        trained: the other secrets are those of ``tensors``.
        rows: if given, each image of a pass gets a draw of its own of a fresh secret: [rows, *shape].

    Raises:
        BadOption: a secret is not a tensor of the network.
    """
    drawn = {}
    for secret in secrets:
        if secret.name not in tensors:
            raise BadOption(f"the defense names the secret {secret.name!r}, which is not a tensor of its network")
        own = tensors[secret.name]
        if trained and not secret.fresh:
            drawn[secret.name] = own.detach().clone()
            continue
        rng = generator(key, "secret", secret.name, *purpose)
        drawn[secret.name] = secret.law.draw((rows, *own.shape) if secret.fresh and rows else tuple(own.shape), rng)
    return drawn
