"""leakbench measures what shared gradients leak in federated learning.

Names are imported on first use, so that ``import leakbench`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from leakbench.version import __version__

if TYPE_CHECKING:
    from leakbench import attacks, datasets, defenses, flower, generators, metrics, models
    from leakbench.api import attack, keylock, observe
    from leakbench.attacks.base import Attack
    from leakbench.datasets.base import Dataset
    from leakbench.defenses.base import Defense, Step
    from leakbench.engine import Run, run
    from leakbench.errors import LeakbenchError, Unsupported
    from leakbench.generators.base import Generator
    from leakbench.matrix import Matrix
    from leakbench.metrics.base import Metric
    from leakbench.models.base import Model
    from leakbench.rng import Rng
    from leakbench.types import Gradient, Normal, Observation, Reconstruction, Secret, ThreatModel, Uniform

_HOME = {
    "Attack": "leakbench.attacks.base",
    "Dataset": "leakbench.datasets.base",
    "Defense": "leakbench.defenses.base",
    "Generator": "leakbench.generators.base",
    "Gradient": "leakbench.types",
    "LeakbenchError": "leakbench.errors",
    "Matrix": "leakbench.matrix",
    "Metric": "leakbench.metrics.base",
    "Model": "leakbench.models.base",
    "Normal": "leakbench.types",
    "Observation": "leakbench.types",
    "Reconstruction": "leakbench.types",
    "Rng": "leakbench.rng",
    "Secret": "leakbench.types",
    "Run": "leakbench.engine",
    "Step": "leakbench.defenses.base",
    "ThreatModel": "leakbench.types",
    "Uniform": "leakbench.types",
    "Unsupported": "leakbench.errors",
    "attack": "leakbench.api",
    "keylock": "leakbench.api",
    "observe": "leakbench.api",
    "run": "leakbench.engine",
}
_PACKAGES = ("attacks", "datasets", "defenses", "flower", "generators", "metrics", "models")

__all__ = [
    "Attack",
    "Dataset",
    "Defense",
    "Generator",
    "Gradient",
    "LeakbenchError",
    "Matrix",
    "Metric",
    "Model",
    "Normal",
    "Observation",
    "Reconstruction",
    "Rng",
    "Run",
    "Secret",
    "Step",
    "ThreatModel",
    "Uniform",
    "Unsupported",
    "__version__",
    "attack",
    "attacks",
    "datasets",
    "defenses",
    "flower",
    "generators",
    "keylock",
    "metrics",
    "models",
    "observe",
    "run",
]


def __getattr__(name: str) -> object:
    if name in _PACKAGES:
        return importlib.import_module(f"leakbench.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'leakbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
