"""leakbench beside Flower (extra ``fl``): simulate an app in this process, put a defense into one, record its updates.

Names are imported on first use: ``import leakbench.flower`` needs no Flower, and the first name that is taken from it
without Flower being installed raises a LeakbenchError that says what to install.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import TYPE_CHECKING

from leakbench.errors import LeakbenchError

if TYPE_CHECKING:
    from leakbench.flower.mods import mod, restore
    from leakbench.flower.recording import record
    from leakbench.flower.simulation import Failure, simulate

_HOME = {
    "Failure": "leakbench.flower.simulation",
    "mod": "leakbench.flower.mods",
    "record": "leakbench.flower.recording",
    "restore": "leakbench.flower.mods",
    "simulate": "leakbench.flower.simulation",
}

__all__ = ["Failure", "mod", "record", "require", "restore", "simulate"]


def require() -> None:
    """Turn the telemetry of Flower and Ray off, unless the environment says otherwise; also where Flower was imported.

    Raises:
        LeakbenchError: the extra is not installed.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    loaded = sys.modules.get("flwr.supercore.telemetry")
    if loaded is not None:  # Flower was imported before, and read the environment then
        loaded.FLWR_TELEMETRY_ENABLED = os.environ["FLWR_TELEMETRY_ENABLED"]  # type: ignore[attr-defined]
    missing = [name for name in ("flwr", "ray") if importlib.util.find_spec(name) is None]
    if missing:
        raise LeakbenchError(f"{' and '.join(missing)} is not installed; pip install 'leakbench[fl]'")


def __getattr__(name: str) -> object:
    if name in _HOME:
        require()
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'leakbench.flower' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
