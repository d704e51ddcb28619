"""A malicious server as a threat model: what is granted, said and attacked, apart from an honest server's rows."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import CLASSES, SHAPE, clients, watch
from test_isolation import Private

from leakbench import attacks, defenses, metrics, models
from leakbench.analysis.ensemble import by_server, server_of
from leakbench.api import run
from leakbench.clients.local import Local
from leakbench.core.rng import Rng
from leakbench.core.types import PRESETS, ThreatModel
from leakbench.defenses import Step
from leakbench.errors import BadOption, Unsupported
from leakbench.observation import Observation
from leakbench.plan.matrix import Matrix, parse_threat
from leakbench.plan.trial import target
from leakbench.victim import Client, observe

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


def batch_of(count: int, row: int) -> Client:
    """Return a client with images of different brightness."""
    rng = torch.Generator().manual_seed(row)
    images = 0.5 * torch.rand(count, *SHAPE, generator=rng) + 0.5 * torch.rand(count, 1, 1, 1, generator=rng)
    own = [(image, place % CLASSES) for place, image in enumerate(images)]
    return Client(*own[0], "w", f"client {row}", (), tuple(own[1:]))


def see(size: int, server: str, defense: str = "none", **granted: object) -> tuple[Observation, torch.Tensor]:
    """Return what a malicious server sees of two batches, and their images [2, B, C, H, W]."""
    who = [batch_of(size, row) for row in range(2)]
    threat = ThreatModel(server=server, **granted)
    seen = observe(
        models.parse("lenet"), defenses.parse(defense), threat, who, CLASSES, torch.full(SHAPE, 0.5),
        public=torch.cat([batch_of(200, 9).images, batch_of(200, 10).images]), training=Local(batch=size),
    )  # fmt: skip
    return seen, torch.stack([client.images for client in who])


@pytest.mark.parametrize(("server", "attack", "least"), [("imprint", "imprint", 14), ("trap(rows=256)", "trap", 3)])
@pytest.mark.parametrize("defense", ["none", "secagg(clients=4)"])
def test_images_of_a_batch_are_recovered_and_proved(server: str, attack: str, least: int, defense: str) -> None:
    seen, truth = see(16, server, defense)
    assert seen.count == 16
    found = attacks.parse(attack)(seen, Rng(("a", "b")))
    assert found.images.shape == (2, 16, *SHAPE)
    for row in range(2):
        own = found.images[row].nan_to_num(9.0).flatten(1)
        error = torch.cdist(own.double(), truth[row].flatten(1).double()).square() / own.shape[1]
        right = int((error.min(0).values < 1e-4).sum())
        assert right >= least
        assert least / 2 <= int(found.findings["proved"][row]) <= right


def test_what_an_imprint_expects_stands_beside_what_it_proves() -> None:
    found = attacks.parse("imprint")(see(16, "imprint(bins=64)")[0], Rng(("a", "b")))
    assert found.findings["expected_share"].tolist() == pytest.approx([(1 - 1 / 64) ** 15] * 2)
    hidden = attacks.parse("imprint")(see(16, "imprint(bins=64)", count="hidden")[0], Rng(("a", "b")))
    assert hidden.findings["proved"].tolist() == [0, 0], "the errors are of a mean over an unknown number"
    assert hidden.images.shape[1] >= 8


def test_secure_aggregation_shows_the_sum_alone() -> None:
    """It is the mean of the clients' own gradients; no attack on one client's gradient is offered."""
    seen, truth = see(8, "honest", "secagg(clients=4)")
    plain, _ = see(8, "honest")
    for name, value in seen.gradient.items():
        torch.testing.assert_close(value, plain.gradient[name], rtol=1e-4, atol=1e-7)
    assert seen.count == 8
    assert truth.shape[1] == 8
    with pytest.raises(Unsupported, match="serves clients of one image"):
        attacks.parse("analytic").preflight(seen)
    with pytest.raises(Unsupported, match="divides the images among 3 clients, and there are 8; use batch=3"):
        see(8, "honest", "secagg(clients=3)")
    with pytest.raises(Unsupported, match="use a threat model with shares=gradient"):
        see(8, "honest", "secagg(clients=4)", shares="weights")


def test_clients_of_a_sum_normalise_by_their_own_statistics() -> None:
    step = Step(
        models.parse("lenet-bn").build(SHAPE, CLASSES), torch.rand(4, *SHAPE), torch.arange(4), defenses.parse("none")
    )
    parts = step.by_part(2)
    for part in range(2):
        rows = slice(2 * part, 2 * part + 2)
        own = Step(step.model, step.images[rows], step.labels[rows], defenses.parse("none")).gradient()
        assert all(torch.equal(parts[name][part], value) for name, value in own.items())


def test_an_honest_network_is_no_imprint() -> None:
    for model, reason in (("lenet", "this network has none"), ("mlp", "do not measure one functional")):
        with pytest.raises(Unsupported, match=reason):
            attacks.parse("imprint").preflight(watch(model))


@pytest.mark.long
def test_a_malicious_server_attacks_clients_of_several_images_in_a_run(tmp_path) -> None:
    matrix = Matrix(
        attacks=["imprint", "others"], defenses=["none", "secagg(clients=2)"], models=["lenet"],
        datasets=["samples(size=12)"], threats=["server=imprint(bins=256)"], clients=["local(batch=4)"], images=8,
        metrics=["psnr", "recovered_share"], threshold=0.6,
    )  # fmt: skip
    done = run(matrix, tmp_path / "run")
    table = done.results()
    own = table[table["attack"] == "imprint"].set_index("defense")
    assert own["status"].eq("ok").all()
    for defense in ("none", "secagg(clients=2)"):
        assert float(own.loc[defense, "psnr"].mean()) > 40
    assert float(table[table["attack"] == "others"]["psnr"].max()) < 25
    done.report(["md"])
    assert "A malicious server, which crafted the network" in (tmp_path / "run" / "report.md").read_text()


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


@pytest.mark.parametrize("defense", ["none", "secagg(clients=4)"])
@pytest.mark.parametrize("server", ["honest", "imprint(bins=8)", "trap(rows=16)"])
def test_no_image_and_no_single_gradient_is_reachable_behind_a_server(server: str, defense: str) -> None:
    seen, truth = see(8, server, defense)
    private = Private(
        {f"image {row} {n}": truth[row, n] for row in range(2) for n in range(8)}, (), ("client 0", "client 1")
    )
    if defense != "none":
        private.tensors |= single_gradients(server)
    assert private.found_in(seen) == []
    assert private.found_in((seen, truth)) != []
    assert private.found_in((seen, list(private.tensors.values()))) != []


def single_gradients(server: str) -> dict[str, torch.Tensor]:
    """Return the gradients of the clients of whom ``secagg(clients=4)`` sends the sum, of two images each."""
    found = {}
    for row in range(2):
        whole = batch_of(8, row)
        images = [(whole.image, whole.label), *whole.others]
        for place in range(0, 8, 2):
            (first, label), other = images[place : place + 2]
            client = Client(first, label, whole.weights_key, f"client {row}", (), (other,))
            alone = observe(
                models.parse("lenet"), defenses.parse("none"), ThreatModel(server=server), [client], CLASSES,
                torch.full(SHAPE, 0.5), public=torch.cat([batch_of(200, 9).images, batch_of(200, 10).images]),
                training=Local(batch=2),
            )  # fmt: skip
            found |= {f"{name} of {row} {place}": value[0] for name, value in alone.gradient.items()}
    return found


@pytest.mark.parametrize("granted", ["running", "sent"])
def test_no_statistics_of_the_batch_are_reachable_that_were_not_granted(granted: str) -> None:
    exact = watch("lenet-bn", "none", "statistics=exact").statistics
    private = Private({f"{name} {row}": value[row] for name, value in exact.items() for row in range(2)}, (), ())
    seen = watch("lenet-bn", "none", f"statistics={granted}")
    assert exact
    assert private.found_in(seen) == []
    assert private.found_in((seen, dict(exact))) != []


def test_a_report_prints_what_is_proved_beside_what_theory_expects(tmp_path: Path) -> None:
    axes = {"attacks": ["imprint"], "defenses": ["none"], "models": ["lenet"], "datasets": ["samples(size=12)"]}
    run(Matrix(**axes, threats=[IMPRINT], batch=[4], images=4, floors=False), tmp_path).report()
    page = (tmp_path / "report.md").read_text()
    (row,) = re.findall(r"\| imprint +\| none +\| +([\d.]+) \| +([\d.]+) \|\n", page[page.index("**Proofs**") :])
    assert float(row[0]) >= 2
    assert row[1] == f"{(1 - 1 / 16) ** 3:.2f}"
