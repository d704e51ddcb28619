"""A malicious server as a threat model: what is granted, said and attacked, apart from an honest server's rows."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from conftest import CLASSES, SHAPE, clients, watch

from leakbench import attacks, metrics
from leakbench.analysis.ensemble import by_server, server_of
from leakbench.api import run
from leakbench.core.rng import Rng
from leakbench.core.types import PRESETS, ThreatModel
from leakbench.errors import BadOption, Unsupported
from leakbench.plan.matrix import Matrix, parse_threat
from leakbench.plan.trial import target

IMPRINT = "server=imprint(bins=16)"


def test_a_malicious_server_is_named_first_and_changes_no_honest_id() -> None:
    threat = parse_threat(f"labels=known, {IMPRINT}")
    assert threat.server == "imprint(bins=16)"
    assert threat.describe().startswith(
        "A malicious server, which crafted the network that it handed out (imprint(bins=16)), sees"
    )
    assert parse_threat(threat.spec()) == threat
    assert "server" not in ThreatModel().settings()
    assert PRESETS["paper"].describe().startswith("An honest-but-curious server")
    assert parse_threat("server=imprint(bins=512)").spec() == "server=imprint"
    with pytest.raises(BadOption, match="unknown server 'loki'; known: honest, imprint, trap"):
        parse_threat("server=loki")
    with pytest.raises(BadOption, match="option bins='1' is not valid"):
        parse_threat("server=imprint(bins=1)")


@pytest.mark.parametrize("model", ["lenet", "mlp(hidden=64)", "resnet20(width=4)"])
@pytest.mark.parametrize(("server", "attack"), [("imprint(bins=16)", "imprint"), ("trap(rows=64)", "trap")])
def test_one_image_is_recovered_and_proved(model: str, server: str, attack: str) -> None:
    seen = watch(model, "none", f"server={server}", trials=3)
    truth = torch.stack([client.image for client in clients(3, shape=SHAPE, classes=CLASSES)])
    own = attacks.parse(attack)
    own.check(seen)
    found = own(seen, Rng(("a", "b", "c")))
    assert float(metrics.parse("psnr")(found.images, truth).min()) > 60
    if "resnet" not in model:  # it normalises by the statistics of the batch
        assert found.findings["proved"].tolist() == [1, 1, 1]
        assert found.objective.tolist() == [0, 0, 0]


@pytest.mark.parametrize("defense", ["keylock(length=9)", "noise(scale=1e-4, relative=true)", "precode(k=6)"])
def test_a_layer_before_all_others_is_read_behind_defenses(defense: str) -> None:
    seen = watch("lenet", defense, IMPRINT)
    truth = torch.stack([client.image for client in clients(2, shape=SHAPE, classes=CLASSES)])
    found = attacks.parse("imprint")(seen, Rng(("a", "b")))
    assert float(metrics.parse("psnr")(found.images, truth).min()) > 40


def test_an_honest_network_is_no_imprint() -> None:
    for model, reason in (("lenet", "this network has none"), ("mlp", "do not measure one functional")):
        with pytest.raises(Unsupported, match=reason):
            attacks.parse("imprint").preflight(watch(model))


@pytest.mark.long
def test_a_crafted_network_is_another_target_and_another_row(tmp_path) -> None:
    matrix = Matrix(
        attacks=["imprint", "grey"], defenses=["none"], models=["lenet"], datasets=["samples(size=8, channels=1)"],
        threats=["paper", IMPRINT], images=2, threshold=0.6,
    )  # fmt: skip
    honest, malicious = (
        target(next(trial.cell for trial in matrix.trials() if trial.cell.threat.server == server).settings, 0, 0)
        for server in ("honest", "imprint(bins=16)")
    )
    assert honest != malicious
    done = run(matrix, tmp_path / "run")
    table = done.results()
    own = table[table["attack"] == "imprint"]
    assert own[own["threat"] == "paper"]["status"].eq("unsupported").all()
    crafted = own[own["threat"] == IMPRINT]
    assert crafted["status"].eq("ok").all()
    assert float(crafted["psnr"].min()) > 60
    models = by_server(table)["model"].unique().tolist()
    assert models == ["lenet", "lenet, crafted by a malicious server: imprint(bins=16)"]
    done.report(["md"])
    text = (tmp_path / "run" / "report.md").read_text()
    assert "A malicious server, which crafted the network" in text


def test_the_server_of_a_spec() -> None:
    assert server_of("labels=known, server=imprint(bins=64, functional=random), informed=true") == (
        "imprint(bins=64, functional=random)"
    )
    assert server_of("server=trap with local(batch=8)") == "trap"
    assert server_of("paper") == ""
    frame = pd.DataFrame({"model": ["a", "a"], "threat": ["paper", "server=trap"]})
    assert by_server(frame)["model"].tolist() == ["a", "a, crafted by a malicious server: trap"]
