"""The network that clients run under a defense, and its public tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from leakbench import defenses
from leakbench.core.device import out_of_memory
from leakbench.core.rng import seeded
from leakbench.core.types import Secret
from leakbench.defenses.base import Defense
from leakbench.defenses.secrets import drawn_secrets
from leakbench.errors import BadOption, DefenseFailed, LeakbenchError, words
from leakbench.gradients.evaluate import tensors_of
from leakbench.models.base import Model
from leakbench.models.module import network_dtype
from leakbench.models.surgery import with_buffers
from leakbench.models.weights import load


def build(
    model: Model, defense: Defense, image_shape: tuple[int, int, int], num_classes: int, weights_key: str
) -> nn.Module:
    """Return the network that clients run under a defense; the part it shares with no defense has the same weights.

    Raises:
        BadOption: the model's checkpoint was trained behind another defense.
        DefenseFailed: the defense's ``wrap`` raises an error, or returns no network.
    """
    plain = plain_network(model, image_shape, num_classes, weights_key)
    with seeded(weights_key, "defense"), blamed(defense):
        network = defense.wrap(plain)
    if not isinstance(network, nn.Module):
        raise DefenseFailed(f"{defense.name!r} wraps the network as {type(network).__name__}; return an nn.Module")
    checkpoint = model.checkpoint()
    if checkpoint is not None and checkpoint.defense:
        if defenses.parse(checkpoint.defense).settings() != defense.settings():
            raise BadOption(
                f"the checkpoint {checkpoint.file!r} is of a network trained behind {checkpoint.defense!r}; attack it "
                f"behind that defense, and not behind {defenses.spec(defense)!r}"
            )
        load(network, checkpoint.file, secrets=True)
    return network


def plain_network(model: Model, image_shape: tuple[int, int, int], num_classes: int, weights_key: str) -> nn.Module:
    """Return the network before a defense wraps it."""
    with seeded(weights_key, "model"):
        return with_buffers(model.build(image_shape, num_classes))


@contextmanager
def blamed(defense: Defense) -> Iterator[None]:
    """Turn an error of a defense's own code into DefenseFailed."""
    try:
        yield
    except LeakbenchError:
        raise
    except (Exception, SystemExit) as error:
        if out_of_memory(error):
            raise
        raise DefenseFailed(f"{defense.name!r} raised {words(error)}") from error


def groups_of(defense: Defense, network: nn.Module) -> set[str]:
    """Return the groups of secrets of a defense's network, by which a threat model reveals them."""
    with blamed(defense):
        return {secret.group for secret in defense.secrets(network)}


def public_tensors(
    networks: Sequence[nn.Module], secret: Collection[str], device: torch.device | str
) -> dict[str, Tensor]:
    """Return the parameters [T, *shape] and buffers of T clients' networks by name, without the secret ones.

    Parameters have stride 0 along T if all clients have one network; buffers are [*shape] if all are equal.
    """
    first = networks[0]
    shared = all(network is first for network in networks)
    tensors: dict[str, Tensor] = {}
    for name, parameter in first.named_parameters():
        if name in secret:
            continue
        if shared:
            tensors[name] = parameter.detach().to(device)[None].expand(len(networks), *parameter.shape)
        else:
            tensors[name] = torch.stack([network.get_parameter(name).detach() for network in networks]).to(device)
    for name, buffer in first.named_buffers():
        if name not in secret:
            rows = [network.get_buffer(name) for network in networks]
            same = all(torch.equal(buffer, row) for row in rows)
            tensors[name] = (buffer if same else torch.stack(rows)).detach().clone().to(device)
    return tensors


def draw_secrets(
    network: nn.Module,
    secrets: Sequence[Secret],
    key: str,
    *purpose: object,
    trained: bool = False,
    rows: int = 0,
    like: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Draw this client's secrets into its network, and return them; of a ``trained`` network only the fresh ones.

    If ``rows`` is given, each image of a pass gets a draw of its own of a fresh secret: [rows, *shape], with the shapes
    of the network ``like``, in which nothing was drawn.
    """
    tensors = tensors_of(network)
    drawn = drawn_secrets(secrets, tensors_of(like or network), key, *purpose, trained=trained, rows=rows)
    for secret in secrets:
        if secret.fresh and rows:
            module, _, tensor = secret.name.rpartition(".")
            setattr(network.get_submodule(module), tensor, drawn[secret.name])
        else:
            with torch.no_grad():
                tensors[secret.name].copy_(drawn[secret.name])
    return drawn


def typed(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return encoded images, and labels that are probabilities, in the type of the network."""
    kind = network_dtype(network)
    return images.to(kind), labels.to(kind) if labels.is_floating_point() else labels
