"""breaching (PyPI, the extra ``bench``) driven one image at a time by its own ``reconstruct``.

Its configurations ``invertinggradients`` and ``deepleakage`` are taken as they are, but for what makes the work the
same: the number of iterations, the weight of the total variation, no normalisation of images, the factor 1/2 that its
squared distance has and DLG's has not, and the start. The differences that remain are its own: its total variation
pads the border, and its L-BFGS goes on to the last outer step, at one evaluation each, where nothing moves any more.
A network in training mode runs without running statistics; one in evaluation mode is given them. Nothing is logged.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.speed.reference import Found


def available() -> str:
    """Return an empty string where breaching can be imported, else why not."""
    if importlib.util.find_spec("breaching") is None:
        return "breaching is not installed; pip install breaching"
    return ""


def version() -> str:
    """Return the version of breaching."""
    return importlib.metadata.version("breaching")


class _Counted(nn.Module):
    """Cross-entropy that knows how often it was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.cross_entropy(logits, labels)


def ig(
    network: nn.Module, observed: Sequence[Tensor], label: Tensor, start: Tensor, *, steps: int, tv: float = 1e-4
) -> Found:
    """Run its ``invertinggradients``; see ``reference.ig``."""
    options = [f"optim.max_iterations={steps}", f"regularization.total_variation.scale={tv}"]
    classes = len(observed[-1])
    return _reconstruct("invertinggradients", options, network, observed, label, classes, start)


def dlg(network: nn.Module, observed: Sequence[Tensor], start: Tensor, start_label: Tensor, *, steps: int) -> Found:
    """Run its ``deepleakage``; see ``reference.dlg``. The start of the label is its own, from torch's generator."""
    options = [f"optim.max_iterations={steps}", "objective.scale=2.0"]
    return _reconstruct("deepleakage", options, network, observed, None, start_label.shape[1], start)


def _reconstruct(
    name: str,
    options: list[str],
    network: nn.Module,
    observed: Sequence[Tensor],
    label: Tensor | None,
    classes: int,
    start: Tensor,
) -> Found:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import breaching
        from omegaconf import OmegaConf

        config = breaching.get_attack_config(name, overrides=options)
        setup = {"dtype": start.dtype, "device": start.device}
        attacker = breaching.attacks.prepare_attack(network, _Counted(), config, setup)
        channels = start.shape[1]
        about = {
            "modality": "vision",
            "task": "classification",
            "shape": list(start.shape[1:]),
            "classes": classes,
            "mean": [0.0] * channels,
            "std": [1.0] * channels,
        }
        # with buffers, its copy of the network is in evaluation mode; without, in training mode
        buffers = None if network.training else list(network.buffers())
        payload = {"parameters": list(network.parameters()), "buffers": buffers, "metadata": OmegaConf.create(about)}
        shared = {
            "gradients": list(observed),
            "buffers": None,
            "metadata": {"num_data_points": 1, "labels": label, "local_hyperparams": None},
        }
        result, stats = attacker.reconstruct([payload], [shared], server_secrets={}, initial_data=start)
    values = stats["Trial_0_Val"]
    diverged = not values or not math.isfinite(min(values)) or (len(values) > 1 and min(values) >= values[0])
    return Found(result["data"].detach(), attacker.loss_fn.calls, diverged)


def warm_up() -> None:
    """Import breaching and read its configurations once, so that no measurement pays for that."""
    network = nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.Sigmoid(), nn.Flatten(), nn.Linear(32, 3))
    loss = nn.functional.cross_entropy(network(torch.rand(1, 3, 4, 4)), torch.tensor([0]))
    observed = torch.autograd.grad(loss, list(network.parameters()))
    ig(network, observed, torch.tensor([0]), torch.rand(1, 3, 4, 4), steps=2)
    dlg(network, observed, torch.rand(1, 3, 4, 4), torch.zeros(1, 3), steps=1)
