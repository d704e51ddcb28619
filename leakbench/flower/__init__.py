"""leakbench beside Flower (extra ``fl``): simulate an app in this process, put a defense into one, record its updates.

Names are imported on first use: ``import leakbench.flower`` needs no Flower, and the first name that is taken from it
without Flower being installed raises a LeakbenchError. Only ``simulate`` with workers needs Ray.
"""

import importlib.metadata
import importlib.util
import os
import re

import lazy_loader

from leakbench.errors import LeakbenchError

OLDEST = (1, 41)
"""The oldest version of Flower that is served; the extra ``fl`` asks for it."""

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def require(*, ray: bool = False) -> None:
    """Turn the telemetry of Flower and Ray off, unless the environment sets it.

    Args:
        ray: whether Ray is needed, too.

    Raises:
        LeakbenchError: Flower, or Ray if it is needed, is not installed, or Flower is too old.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    oldest = ".".join(map(str, OLDEST))
    if importlib.util.find_spec("flwr") is None:
        raise LeakbenchError(f"Flower is not installed; pip install 'flwr>={oldest}'")
    version = importlib.metadata.version("flwr")
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST:
        raise LeakbenchError(
            f"Flower {version} is too old, {oldest} is the oldest served; pip install 'flwr>={oldest}'"
        )
    if ray and importlib.util.find_spec("ray") is None:
        raise LeakbenchError(f"Ray is not installed; pip install 'flwr[simulation]>={oldest}', or give workers=0")


def __getattr__(name: str) -> object:
    if name in __all__:
        require()
    return _load(name)
