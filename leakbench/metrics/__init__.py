"""The registered metrics, one file for each convention."""

from collections.abc import Collection

# imported to be registered, in the order in which they are listed
from leakbench.metrics import standard, lpips, aligned, label, paper, encoded, perceptual, public, release  # isort: skip  # noqa: F401
from leakbench.metrics import members, extremes  # isort: skip  # noqa: F401
from leakbench.metrics import intact
from leakbench.metrics.base import Metric, Truth, register, registry
from leakbench.metrics.intact import ReplacedMetric

get = registry.get
names = registry.names
parse = registry.parse
spec = registry.spec

NOT_LEAKAGE = frozenset({"ssim_public", "psnr_encoded_floor", "ssim_encoded_floor", "release_cosine"})
"""The metrics that judge others, or the defense: no table of leakage shows them."""


def of_run(named: Collection[str] = (), batches: bool = False) -> list[Metric]:
    """Return the metrics of a run: those of every run, and those it names, in the order of their columns.

    A run with clients of several images has those of batches, too.
    """
    return [parse(name) for name in names() if get(name).default or name in named or (batches and _of_batches(name))]


def _of_batches(name: str) -> bool:
    """Return whether every run with clients of several images has a metric."""
    metric = get(name)
    return issubclass(metric, members.BatchMetric) and metric.usual


_SHIPPED = intact.snapshot()


def refuse_replaced() -> None:
    """Raise ReplacedMetric if a part of the metrics that ship with leakbench was replaced since they were imported."""
    intact.refuse_replaced(_SHIPPED)


__all__ = [
    "Metric",
    "ReplacedMetric",
    "Truth",
    "get",
    "names",
    "of_run",
    "parse",
    "refuse_replaced",
    "register",
    "registry",
    "spec",
]
