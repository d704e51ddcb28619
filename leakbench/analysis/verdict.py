"""What allows a verdict on defenses: the attackers of the suite that ran, and a positive control without a defense."""

import math
from collections.abc import Iterable, Sequence
from functools import cache

import pandas as pd

from leakbench import attacks, defenses
from leakbench.analysis.ensemble import EnsembleResult
from leakbench.analysis.recovery import TARGET, judged
from leakbench.core.component import as_json
from leakbench.core.text import name_of
from leakbench.defenses.adaptive import CONTROLS, SIMULATE
from leakbench.errors import LeakbenchError
from leakbench.plan.matrix import EVERY, Matrix, expand, load_suite, parse_threat
from leakbench.store.records import Statement, StoredComponent

SUITE = "worst-case"
"""The suite whose attackers must have run before a page speaks of the worst case."""

CONTROL = "none"
"""The defense behind which attackers must recover images, or they would recover nothing behind any defense."""

BUDGET = ("steps", "restarts", "budget")
"""The options of attacks of which more is a stronger attacker; all others must be the suite's."""

Scene = tuple[str, str, str]
"""Dataset, model and defense, as the trials name them."""


def missing_attackers(
    trials: pd.DataFrame, components: Iterable[StoredComponent], threshold: float, scale: str | None = None
) -> dict[Scene, list[str]]:
    """Return which attackers of the suite did not run behind each defense, in words; an empty list if all of them did.

    An attacker ran if each of its trials has ended without an error, or was skipped since the image was recovered; an
    attack with more steps than the suite's counts too. The attackers of a defense are the suite's attacks, each
    oblivious and in the role of every adaptive attacker of the defense.

    Args:
        trials: every planned trial (``Store.trials``).
        components: what each spec stands for (``Store.components``).
        threshold: by which trials were skipped.
        scale: of the suite; its default for None.
    """
    known = {(one.kind, one.spec): one for one in components}
    own = judged(trials, threshold)[~trials["floor"].to_numpy(dtype=bool)]
    found: dict[Scene, list[str]] = {}
    for (dataset, model, defense), block in own.groupby(["dataset", "model", "defense"], sort=False):
        done = block["recovered"].groupby([block[axis] for axis in TARGET]).transform("any") & (block["status"] == "")
        ended = block.assign(ended=~block["status"].isin(("", "error")) | done)
        ran = [
            (known["attack", str(attack)], str(threat))
            for (attack, threat), trials_of in ended.groupby(["attack", "threat"], sort=False)
            if trials_of["ended"].all()
        ]
        variants = _variants(known["defense", str(defense)])
        wanted = [
            (attack, variant)
            for attack, informed in _suite(scale)
            for variant in ([""] if not informed else variants if informed == EVERY else variants[-1:])
        ]
        found[str(dataset), str(model), str(defense)] = [
            attack.name + (f" ({'adaptive' if variant == 'true' else variant})" if variant else "")
            for attack, variant in wanted
            if not any(_serves(one, threat, attack, variant) for one, threat in ran)
        ]
    return found


@cache
def _suite(scale: str | None) -> list[tuple[attacks.Attack, bool | str]]:
    """Return each attacker of the suite in its order: the attack, and ``informed`` of its threat model."""
    stages = Matrix(**expand(load_suite(SUITE), scale)[0]).stages
    return [(attack, threat.informed) for stage in stages for attack in stage.attacks for threat in stage.threats]


def _variants(defense: StoredComponent) -> list[str]:
    """Return the adaptive attackers of a defense, as threat models name them, ``simulate`` last; none for a control.

    Old runs did not record the stated ones.
    """
    if defense.name in CONTROLS:
        return []
    try:
        stated = defense.statement or Statement.of(defenses.parse(defense.plain))
    except LeakbenchError:  # a plugin that is not here
        return [SIMULATE]
    return [*stated.informed, SIMULATE]


def _serves(ran: StoredComponent, threat: str, attack: attacks.Attack, variant: str) -> bool:
    """Return whether an attack that ran under a threat model is an attacker of the suite, with at least its budget."""
    try:
        granted = parse_threat(threat.partition(" [")[0])
    except LeakbenchError:  # of a version of leakbench with other threat models
        return False
    informed = str(granted.informed).lower() if granted.informed else ""
    if ran.name != attack.name or granted.shares != "gradient" or informed != variant:
        return False
    needed = as_json(attack.options())
    own = needed | as_json(attacks.parse(attack.name).options()) | dict(ran.options)
    return all(own[name] >= value if name in BUDGET else own[name] == value for name, value in needed.items())


def inconclusive(found: Sequence[EnsembleResult], components: Iterable[StoredComponent]) -> dict[tuple[str, str], str]:
    """Return by dataset and model why nothing can be concluded of its defenses, in one sentence; empty if it can.

    Attackers that recover nothing behind ``none`` show nothing by recovering nothing behind a defense. The control of a
    network that was trained behind a defense is one of the same architecture that was trained without: weights as they
    were drawn are no control of trained ones, which are harder to attack, and the other way round. The only defense of
    a network needs none if images are recovered behind it.
    """
    families = {one.spec: _family(one) for one in components if one.kind == "model"}
    controls: dict[tuple[str, str], list[EnsembleResult]] = {}
    for one in found:
        if name_of(one.defense) == CONTROL:
            controls.setdefault((one.dataset, families.get(one.model, one.model)), []).append(one)
    verdicts = {}
    for dataset, model in dict.fromkeys((one.dataset, one.model) for one in found):
        own = controls.get((dataset, families.get(model, model)), [])
        exact = [one for one in own if one.model == model] or own
        measured = [
            one.share for one in found if (one.dataset, one.model) == (dataset, model) and not math.isnan(one.share)
        ]
        leaks = len(measured) == 1 and measured[0] > 0  # nothing is compared, and the attackers do recover images
        verdicts[dataset, model] = "" if leaks else control_flaw([one.share for one in exact])
    return verdicts


def control_flaw(shares: Sequence[float]) -> str:
    """Return what is wrong with a positive control, in one sentence; empty if nothing.

    Args:
        shares: of images recovered behind ``none``, NaN without a score; empty if it was not attacked.
    """
    if not shares:
        return f"Inconclusive: there is no positive control, since {CONTROL} was not attacked."
    if not any(share > 0 for share in shares):
        return "Inconclusive: the attackers recover no image even without a defense."
    return ""


def _family(model: StoredComponent) -> str:
    """Return a model's name and options, and of its trained weights only whether it has some."""
    options = sorted((name, str(value)) for name, value in model.options.items() if name != "weights")
    return f"{model.name} {options} {'trained' if model.options.get('weights') else 'drawn'}"
