"""Attack one's own network in a few calls: ``observe`` a client step, ``attack`` the observation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leakbench import attacks, defenses
from leakbench.attacks import Attack
from leakbench.defenses import Defense
from leakbench.errors import BadOption
from leakbench.gradients import full_precision
from leakbench.matrix import parse_threat
from leakbench.models import OwnModule
from leakbench.rng import Rng
from leakbench.types import Observation, Reconstruction, ThreatModel
from leakbench.victim import Client, build, check_reveals, groups_of
from leakbench.victim import observe as observe_clients


def observe(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    defense: str | Defense = "none",
    threat: str | ThreatModel = "paper",
    num_classes: int | None = None,
    mean_image: Tensor | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Observation:
    """Run one client step for each image, each a batch of one, and return what a server may see of them.

    Args:
        model: maps images [B, C, H, W] in [0, 1] to logits [B, K]; used in its mode, with its weights, and not changed.
        images: [T, C, H, W] in [0, 1], the private images.
        labels: [T] int64.
        defense: what every client does.
        threat: what the attacker is granted.
        num_classes: K; by default it is read off the model's output.
        mean_image: [C, H, W] in [0, 1], public knowledge of what images look like; grey by default.
        seed: what the clients' own draws come from.
        device: where the observation's tensors go.

    Raises:
        BadOption: shapes or ranges do not fit.
        Unsupported: model and defense do not go together.
    """
    if images.ndim != 4 or labels.shape != (len(images),):
        raise BadOption(f"images {tuple(images.shape)} and labels {tuple(labels.shape)}; give [T, C, H, W] and [T]")
    if len(images) == 0:
        raise BadOption("there are no images; give at least one")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise BadOption(f"images range from {low:g} to {high:g}; give them in [0, 1]")
    kinds = [tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()]
    images, labels = images.detach().cpu().to(kinds[0] if kinds else torch.float32), labels.detach().cpu()
    if num_classes is None:
        with torch.no_grad():
            num_classes = OwnModule("model", model).logits(images[:1]).shape[1]
    if not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise BadOption(
            f"labels range from {int(labels.min())} to {int(labels.max())}; give them in 0 to {num_classes - 1}"
        )
    method, granted = defenses.parse(defense), parse_threat(threat)
    own = OwnModule(type(model).__name__, model)
    image_shape = (images.shape[1], images.shape[2], images.shape[3])
    check_reveals([granted], groups_of(method, build(own, method, image_shape, num_classes, "own")))
    clients = [
        Client(image, int(label), "own", f"client/{seed}/{index}")
        for index, (image, label) in enumerate(zip(images, labels))
    ]
    return observe_clients(
        own,
        method,
        granted,
        clients,
        num_classes,
        torch.full_like(images[0], 0.5) if mean_image is None else mean_image,
        device,
    )


def attack(method: str | Attack, observation: Observation, *, seed: int = 0) -> Reconstruction:
    """Attack every trial of an observation at once.

    Args:
        method: a spec such as ``ig(steps=1000)``, or an Attack.
        observation: what the server saw.
        seed: what the attacker's own draws come from.

    Raises:
        Unsupported: the attack cannot serve this observation; the message says why.
    """
    rng = Rng(tuple(f"attack/{seed}/{row}" for row in range(observation.trials)), observation.device)
    with full_precision():
        return attacks.parse(method)(observation, rng)
