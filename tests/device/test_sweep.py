"""Every attack, defense and model that ships, under four kinds of threat models, on the pretended GPU and on the CPU.

Both attack what clients sent that took their steps on the CPU; the steps of clients on the device are compared apart.

By default every attack meets every defense and every model, and threat models take turns; ``SWEEP=full`` crosses all.
"""

from __future__ import annotations

import itertools
import os
import re
from types import ModuleType

import pytest
from conftest import ALL_DEFENSES, ATTACKS, FLAT, MODELS, ON_WEIGHTS
from test_device import attacked, compared, gpu, same, seen, stepped  # noqa: F401

from leakbench.core.types import Reconstruction
from leakbench.errors import LeakbenchError

THREATS = ("paper", "known-label", "weights", "informed=true")
NETWORKS = [*MODELS, *FLAT]

ROUNDED = {
    **{f"{name}(steps=1)": f"{name}(steps=3, solver=adam, lr=0.1)" for name in ("dlg", "idlg")},
    "peel": "peel(search=20)",
}
"""Long searches amplify the last digits too far: 20 iterations of L-BFGS in float32, which ``lb`` has in float64,
and the 400 at the end of ``peel`` on a ReLU network (images differ by 3e-7 after 40, and by 5e-3 after 400)."""

FLIPS = {"quantise": 0.01}
"""The share of a client's entries that may differ: one between two levels goes to either, by the last digit."""

SMOOTH = {"svt-privacy": "svt-privacy(gamma=0.01)"}
"""An entry that the last digit moves over the threshold changes all later draws; smaller noise makes it unlikely."""

Case = tuple[str, str, str, str]


def cases() -> list[Case]:
    """Return attack, defense, model and threat model of each comparison."""
    own = [ROUNDED.get(attack, attack) for attack in (*ATTACKS, "analytic")]
    if os.environ.get("SWEEP") == "full":
        return list(itertools.product(own, [*ALL_DEFENSES, *ON_WEIGHTS], NETWORKS, THREATS))
    pairs = [(attack, defense, "lenet") for attack in own for defense in ALL_DEFENSES]
    pairs += [(attack, "none", model) for attack in own for model in NETWORKS if model != "lenet"]
    found = [(*pair, threat) for pair, threat in zip(pairs, itertools.cycle(THREATS))]
    return found + [(attack, defense, "lenet", "weights") for attack in own for defense in ON_WEIGHTS]


def outcome(attack: str, defense: str, model: str, threat: str, device: str) -> Reconstruction | str:
    """Return what an attack reconstructs on a device, or why it is refused."""
    try:
        return attacked(attack, seen(device, model, defense, threat))
    except LeakbenchError as error:
        return f"{type(error).__name__}: {error}"


def clients_steps() -> list[tuple[str, str, str]]:
    """Return model, defense and threat model of each comparison of clients."""
    pairs = [("lenet", SMOOTH.get(defense, defense)) for defense in (*ALL_DEFENSES, *ON_WEIGHTS)]
    pairs += [(model, defense) for model in NETWORKS if model != "lenet" for defense in ("none", "soteria")]
    return [(*pair, threat) for pair in pairs for threat in ("paper", "weights")]


@pytest.mark.device
@pytest.mark.parametrize("case", clients_steps(), ids=" ".join)
def test_the_step_of_clients_on_a_gpu_is_that_on_the_cpu(gpu: ModuleType, case: tuple[str, str, str]) -> None:  # noqa: F811
    try:
        compared(*case, flips=FLIPS.get(case[1], 0.0))
    except LeakbenchError as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            stepped("cpu", *case)


@pytest.mark.device
@pytest.mark.parametrize("case", cases(), ids=" ".join)
def test_the_outcome_on_a_gpu_is_that_on_the_cpu(gpu: ModuleType, case: Case) -> None:  # noqa: F811
    here, there = (outcome(*case, device) for device in ("cpu", "pretend:1"))
    if isinstance(here, str) or isinstance(there, str):
        assert here == there
    else:
        same(here, there)
