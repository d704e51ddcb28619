"""The verdicts on the paper's claims: rules on intervals, and the findings of the committed results."""

from __future__ import annotations

import re

import pytest
from torch import nn

from benchmarks import claims
from benchmarks.claims import FAILS, HOLDS, OPEN
from leakbench import defenses, models
from leakbench.analysis.ensemble import EnsembleResult
from leakbench.report.compare import published


def share(low: float, high: float, value: float = 0.5) -> EnsembleResult:
    return EnsembleResult("mnist", "lenet", "keylock", 8, 8, 8, 0, value, low, high, ())


def test_an_attack_is_stopped_only_where_it_recovers_undefended_images() -> None:
    strong, weak, none = share(0.68, 1.0), share(0.02, 0.47), share(0.0, 0.32)
    assert claims.stopped(none, strong) == HOLDS
    assert claims.stopped(none, weak) == claims.stopped(none, none) == OPEN
    assert claims.stopped(weak, strong) == HOLDS  # one of eight: not reliable, and far fewer
    assert claims.stopped(share(0.07, 0.6), strong) == FAILS
    assert claims.more(strong, none)
    assert not claims.more(weak, none)


def test_an_attack_recovers_or_fails_by_the_papers_budget() -> None:
    assert claims.recovers(share(0.53, 0.98), full_budget=False) == HOLDS
    assert claims.recovers(share(0.0, 0.49), full_budget=False) == OPEN
    assert claims.recovers(share(0.0, 0.49), full_budget=True) == FAILS
    assert claims.recovers(share(0.2, 0.7), full_budget=True) == OPEN


def test_the_key_is_judged_beside_an_attacker_with_the_locks_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"T0": share(0.0, 0.32), "T1": share(0.14, 0.69), "T3": share(0.68, 1.0), "T4": share(0.53, 0.98)}
    found["reveals=lock, informed=true"] = found["T4"]
    monkeypatch.setattr(claims, "shares", lambda *given: [found[given[1].rpartition("threat=")[2]]] * 2)
    assert claims.key_matters().verdict == OPEN
    assert claims.lock_is_safe().verdict == FAILS
    found["T1"] = found["T0"]
    assert claims.key_matters().verdict == HOLDS


def test_an_attack_that_one_dataset_does_not_stop_is_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"mnist": (share(0.31, 0.86), share(0.68, 1.0)), "cifar10": (share(0.0, 0.19), share(0.0, 0.19))}

    def shares(_: str, conditions: str, names: list[str]) -> list[EnsembleResult]:
        return [found[name]["none" in conditions] for name in names]

    monkeypatch.setattr(claims, "shares", shares)
    assert claims.ggl_is_stopped().verdict == FAILS
    found["mnist"] = (share(0.0, 0.32), share(0.68, 1.0))
    assert claims.ggl_is_stopped().verdict == OPEN


def test_costs_and_thieves_are_judged_by_their_intervals() -> None:
    assert [claims.kept(*ends) for ends in ((2.0, 0.1), (3.0, 2.1), (2.5, 1.0))] == [HOLDS, FAILS, OPEN]
    assert [claims.useless(*ends, 10) for ends in ((8.0, 20.0), (21.0, 40.0), (12.0, 24.0))] == [HOLDS, FAILS, OPEN]


def test_one_dataset_that_fails_decides_and_one_that_is_open_keeps_it_open() -> None:
    assert claims.combined([HOLDS, HOLDS]) == HOLDS
    assert claims.combined([HOLDS, OPEN]) == OPEN
    assert claims.combined([HOLDS, OPEN, FAILS]) == FAILS


def test_shares_are_written_in_images_or_in_per_cent_if_seeds_differ() -> None:
    assert claims.words(share(0.53, 0.98, 7 / 8)) == "7 of 8 [53, 98]"
    assert claims.words(share(0.87, 1.0, 0.984375)) == "98 % of 8 [87, 100]"


@pytest.mark.parametrize(("spec", "side", "stated"), [("lenet", 32, 0), ("resnet20(shortcut=conv)", 32, 1)])
def test_the_locks_share_of_the_parameters_is_counted(spec: str, side: int, stated: int) -> None:
    network = defenses.parse("keylock").wrap(models.parse(spec).build((3, side, side), 10))
    sizes = {name: one.numel() for name, one in network.named_parameters()}
    lock = sum(module.weight.numel() + module.bias.numel() for module in locked(network))
    key = sum(size for name, size in sizes.items() if name.endswith("key"))
    assert f"{100 * lock / (sum(sizes.values()) - key):.1f}" == claims.SHARES[stated]


def locked(network: nn.Module) -> list[nn.Linear]:
    """Return the linear layers that turn the key into scale and shift."""
    names = ("scale", "shift")
    return [one for name, one in network.named_modules() if isinstance(one, nn.Linear) and name.endswith(names)]


def test_every_claim_has_its_figure_its_section_and_its_command() -> None:
    rows = claims.claims(published())
    text = " ".join(one.words for one in rows)
    stated = [
        *("DLG fails", "GRNN recovers", "stops DLG", "stops GRNN", "stops GGL", "lock's gradient is safe"),
        *("Sharing the key", "accuracy is kept", "useless without the key", "share of the parameters"),
    ]
    for word in stated:
        assert word in text
    assert all(re.fullmatch(r"4\.[234]|abstract", one.section) for one in rows)
    assert all(one.command.startswith("leakbench run ") and one.printed for one in rows)
