"""leakbench beside Flower (extra ``fl``): simulate an app in this process, put a defense into one, record its updates.

Names are imported on first use: ``import leakbench.flower`` needs no Flower, and the first name that is taken from it
without Flower being installed raises a LeakbenchError that names the missing packages.
"""

import importlib.util
import os

import lazy_loader

from leakbench.errors import LeakbenchError

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def require() -> None:
    """Turn the telemetry of Flower and Ray off, unless the environment sets it.

    Raises:
        LeakbenchError: the extra is not installed.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    missing = [name for name in ("flwr", "ray") if importlib.util.find_spec(name) is None]
    if missing:
        raise LeakbenchError(f"{' and '.join(missing)} is not installed; pip install 'leakbench[fl]'")


def __getattr__(name: str) -> object:
    if name in __all__:
        require()
    return _load(name)
