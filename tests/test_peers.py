"""Attacks of other papers (GradInversion, cocktail party, April, deep image prior), and float64 where they can."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import CLASSES, SHAPE, clients, rand, watch
from torch import Tensor, nn
from torch.nn import functional as F

from leakbench import attacks, datasets, defenses, metrics, models
from leakbench.api import run
from leakbench.attacks.dip import DeepImagePrior
from leakbench.attacks.disaggregate import layer_changes
from leakbench.attacks.gradinversion import GradInversion, consensus, granted_statistics
from leakbench.attacks.matching import double, total_variation
from leakbench.attacks.matching.objective import evaluate
from leakbench.clients.local import Local
from leakbench.core.rng import Rng
from leakbench.core.types import PRESETS, ThreatModel
from leakbench.engine.batch_size import repeated
from leakbench.errors import Unsupported
from leakbench.gradients.normalisation import batch_normalisations
from leakbench.models import OwnModule
from leakbench.observation import Observation
from leakbench.plan.matrix import Matrix, parse_threat
from leakbench.victim import Client, observe

BARE = "vit(first=bare, patch=2, dim=32, depth=2, init=uniform(0.5))"
SIGMOID = "mlp(hidden=32, activation=sigmoid, init=default)"


def in_double(spec: str, shape: tuple[int, int, int] = SHAPE) -> OwnModule:
    """Return a network whose parameters are in float64, which clients and attackers then compute in."""
    torch.manual_seed(0)
    return OwnModule("own", models.parse(spec).build(shape, CLASSES).double())


def photographs(count: int, size: int = 12) -> Client:
    """Return a client with crops of photographs."""
    images, labels = datasets.parse(f"samples(size={size})").load([4 * place for place in range(count)])
    rows = [(image, int(label) % CLASSES) for image, label in zip(images, labels)]
    return Client(*rows[0], "w", "client", (), tuple(rows[1:]))


def see(model: models.Model | str, client: Client, threat: str = "paper", defense: str = "none") -> Observation:
    training = {"training": Local(batch=client.count)} if client.count > 1 else {}
    mean = torch.full(client.image.shape, 0.5)
    return observe(
        models.parse(model), defenses.parse(defense), parse_threat(threat), [client], CLASSES, mean, **training
    )


# April


def test_april_solves_for_the_image_in_float64() -> None:
    who = clients(2, shape=SHAPE, classes=CLASSES)
    truth = torch.stack([client.image for client in who])
    seen = observe(in_double(BARE), defenses.parse("none"), ThreatModel(), who, CLASSES, torch.full(SHAPE, 0.5))
    assert seen.dtype == torch.float64
    attack = attacks.parse("april")
    attack.check(seen)
    found = attack(seen, Rng(("a", "b")))
    torch.testing.assert_close(found.images, truth.double(), atol=1e-6, rtol=0)
    assert float(found.objective.max()) < 1e-8
    assert found.labels.tolist() == [client.label for client in who]
    noisy = replace(seen, gradient={name: value + 1e-3 * value.norm() for name, value in seen.gradient.items()})
    assert float(attack(noisy, Rng(("a", "b"))).objective.min()) > 1e-4, "the class token tells that it is wrong"


def test_april_says_what_it_needs() -> None:
    april = attacks.parse("april")
    assert float(april(watch(BARE), Rng(("a", "b"))).objective.max()) < 1e-3
    with pytest.raises(Unsupported, match="the defense puts a layer behind the patches"):
        april.preflight(watch(BARE, "norm-only"))
    for model, reason in (
        ("lenet", "use model=vit"),
        (BARE.replace("bare", "standard"), "behind a normalisation and beside a skip connection"),
        (BARE.replace("dim=32", "dim=16"), "needs tokens of width 17 for 17 tokens and patches of 4 values"),
    ):
        with pytest.raises(Unsupported, match=reason):
            april.preflight(watch(model))


def test_aprils_search_matches_the_angle_of_the_position_embedding() -> None:
    standard = BARE.replace("bare", "standard")
    client = clients(1, shape=SHAPE, classes=CLASSES)[0]
    seen = observe(in_double(standard), defenses.parse("none"), ThreatModel(), [client], CLASSES, torch.zeros(SHAPE))
    attack = attacks.parse("april-search(tv=0)")
    objective = attack._objective(seen, Rng(("a",)))
    assert float(objective({"image": client.image[None].double()}, 0).detach()) < 1e-12
    twice = {name: 2 * value for name, value in seen.gradient.items()}
    assert float(attack.distance(twice, seen.gradient)) == pytest.approx(1), "the angle is the same"
    turned = seen.gradient | {"position": -seen.gradient["position"]}
    apart = float(attack.distance(turned, seen.gradient) - replace(attack, angle=0).distance(turned, seen.gradient))
    assert apart == pytest.approx(2)
    with pytest.raises(Unsupported, match="april-search needs a network with a position embedding"):
        attack.preflight(watch("lenet"))
    hidden = {name: value for name, value in seen.gradient.items() if name != "position"}
    with pytest.raises(Unsupported, match="needs the gradient of 'position', and it was not sent"):
        attack.preflight(replace(seen, gradient=hidden))


@pytest.mark.long
def test_aprils_search_comes_nearer_and_serves_batches() -> None:
    standard = BARE.replace("bare", "standard")
    client = clients(1, shape=SHAPE, classes=CLASSES)[0]
    seen = observe(in_double(standard), defenses.parse("none"), ThreatModel(), [client], CLASSES, torch.zeros(SHAPE))
    begun = attacks.parse("april-search(steps=1)")(seen, Rng(("a",)))
    found = attacks.parse("april-search(steps=9)")(seen, Rng(("a",)))
    assert float(found.objective) < 0.9 * float(begun.objective)
    assert found.labels.tolist() == [client.label]
    batch = photographs(2, SHAPE[1])
    found = attacks.parse("april-search(steps=1)")(see(standard, batch), Rng(("a",)))
    assert found.images.shape == (1, *batch.images.shape)


def test_the_vit_is_torchs_encoder() -> None:
    """Against torch's own multi-head attention, with the same weights."""
    torch.manual_seed(0)
    network = models.parse("vit(patch=2, dim=32, depth=1)").build(SHAPE, CLASSES).double()
    block = network.blocks[0]
    twin = nn.TransformerEncoderLayer(32, 4, 128, 0.0, F.gelu, batch_first=True, norm_first=True).double()
    own = block.attention
    with torch.no_grad():
        for part in ("weight", "bias"):
            joined = torch.cat([getattr(layer, part) for layer in (own.query, own.key, own.value)])
            getattr(twin.self_attn, f"in_proj_{part}").copy_(joined)
            for mine, theirs in (
                (own.output, twin.self_attn.out_proj), (block.first, twin.linear1), (block.last, twin.linear2),
                (block.norms[0], twin.norm1), (block.norms[1], twin.norm2),
            ):  # fmt: skip
                getattr(theirs, part).copy_(getattr(mine, part))
    tokens = torch.randn(2, 17, 32, dtype=torch.float64)
    torch.testing.assert_close(block(tokens), twin(tokens))
    with pytest.raises(Unsupported, match="into patches of 3x3"):
        models.parse("vit(patch=3, dim=32)").build(SHAPE, CLASSES)


# the cocktail party


def test_size_and_sign_of_the_unmixed_images_follow_from_the_bias() -> None:
    client = photographs(4)
    (layer,) = layer_changes(see(SIGMOID, client))
    assert layer.shown.rank == 4
    left, sizes, rows = torch.linalg.svd(layer.change, full_matrices=False)
    rows, truth = layer.pixels(rows[:4], shifted=False), client.images.flatten(1).double()
    share = left[:, :4].T @ layer.errors / sizes[:4]
    unmixing = torch.linalg.lstsq(rows.T, (truth + layer.bounds[0]).T).solution.T
    multiples = torch.tensor([2.0, -3.0, 0.1, 5.0], dtype=torch.float64)[:, None] * unmixing
    torch.testing.assert_close(layer.scaled(multiples @ rows, multiples @ share), truth, atol=1e-3, rtol=0)


@pytest.mark.parametrize("threat", ["paper", "shares=weights", "count=hidden"])
def test_the_cocktail_party_separates_a_batch_behind_a_sigmoid(threat: str) -> None:
    client = photographs(3)
    found = attacks.parse("cocktail(steps=250)")(see(SIGMOID, client, threat), Rng(("a",)))
    assert found.images.shape == (1, 3, 3, 12, 12)
    error = torch.cdist(found.images[0].flatten(1), client.images.flatten(1)).square() / 432
    assert int((error.min(0).values < 0.01).sum()) >= 2, error
    assert found.findings["inputs"].tolist() == [3]
    with pytest.raises(Unsupported, match="linear layer that takes the pixels"):
        attacks.parse("cocktail").preflight(see("lenet", client))


def test_the_cocktail_party_serves_secure_aggregation_and_no_noise() -> None:
    client = photographs(4)
    seen = see(SIGMOID, client, defense="secagg(clients=2)")
    assert attacks.parse("cocktail(steps=5)")(seen, Rng(("a",))).findings["inputs"].tolist() == [4]
    noisy = attacks.parse("cocktail(steps=5)")(see(SIGMOID, client, defense="noise(scale=0.1)"), Rng(("a",)))
    assert noisy.failed.tolist() == [True]
    assert "not of low rank" in noisy.reasons[0]


# GradInversion


def test_statistics_of_batch_normalisations_are_those_of_hooks() -> None:
    seen = double(see("lenet-bn", photographs(3)))
    objective = attacks.parse("gradinversion")._objective(seen, Rng(("a",)))
    images = rand(1, 3, 3, 12, 12, seed=4).double()
    network = models.parse("lenet-bn").build((3, 12, 12), CLASSES).double()
    network.load_state_dict(
        {
            name: value[0] if value.ndim > own.ndim else value
            for (name, own), value in zip(
                network.state_dict().items(), (seen.weights[name] for name in network.state_dict())
            )
        }
    )
    taken: dict[str, Tensor] = {}
    for name, layer in batch_normalisations(network).items():
        layer.register_forward_pre_hook(
            lambda _, given, name=name: taken.update({name: given[0].transpose(0, 1).flatten(1)})
        )
    network(images[0])
    for path in ("batched", "one-at-a-time"):
        found = replace(objective.evaluator, path=path).statistics(objective.tensors, images)
        assert found.keys() == taken.keys()
        for name, (mean, variance, count) in found.items():
            torch.testing.assert_close(mean[0], taken[name].mean(1), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(variance[0], taken[name].var(1, correction=0), rtol=1e-10, atol=1e-12)
            assert count == taken[name].shape[1]


@pytest.mark.parametrize("shares", ["gradient", "weights"])
def test_what_statistics_a_threat_model_grants(shares: str) -> None:
    client = photographs(3)
    seen = {
        kind: double(see("lenet-bn", client, f"shares={shares}, statistics={kind}"))
        for kind in ("running", "sent", "exact")
    }
    assert not seen["running"].statistics
    assert set(seen["sent"].statistics) == {
        f"{name}.{part}"
        for name in batch_normalisations(seen["sent"].model)
        for part in ("running_mean", "running_var")
    }
    assert {value.shape for value in repeated(seen["sent"], 3, False).statistics.values()} == {(3, 12)}
    granted = {kind: granted_statistics(own) for kind, own in seen.items()}
    attack = attacks.parse("gradinversion")
    objective = attack._objective(replace(seen["exact"], labels=torch.zeros(1, 3, dtype=torch.int64)), Rng(("a",)))
    truth = objective.evaluator.statistics(objective.tensors, client.images[None].double())
    for name, (mean, variance, count) in truth.items():
        for kind, correction in (("exact", 0), ("sent", 1)):
            own = granted[kind][name]
            assert own[2] == correction
            torch.testing.assert_close(own[0], mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own[1], variance * count / (count - correction), rtol=1e-4, atol=1e-5)
        assert granted["running"][name][0].abs().max() == 0, "an untrained network has running means of 0"

    def penalty(images: Tensor, kind: str) -> float:
        found = attack.penalty(images, seen[kind], lambda own: objective.evaluator.statistics(objective.tensors, own))
        assert found is not None
        return float(found)

    images = client.images[None].double()
    assert penalty(images, "exact") < 1e-6
    assert penalty(images, "sent") < 1e-5
    assert penalty(1 - images, "exact") > 1e-3
    assert penalty(images, "running") > 1e-3


def test_a_threat_model_says_what_statistics_it_grants() -> None:
    assert "statistics" not in PRESETS["paper"].settings()
    threat = parse_threat("statistics=exact")
    assert parse_threat(threat.spec()) == threat
    assert "knows the means and variances by which the client's first step normalised" in threat.describe()
    assert "sends the running statistics" in parse_threat("shares=weights, statistics=sent").describe()
    assert "and sends no running statistics" not in parse_threat("shares=weights, statistics=sent").describe()
    with pytest.raises(Unsupported, match="use statistics=running"):
        see("lenet-bn", photographs(4), "statistics=exact", "secagg(clients=2)")


def test_a_group_of_seeds_is_drawn_to_its_mean_and_the_best_is_returned() -> None:
    image = rand(1, 1, 8, 8, seed=1)
    group = torch.cat([image, image.roll((1, -2), (-2, -1)), image])
    torch.testing.assert_close(consensus(group, 3), image.expand(3, -1, -1, -1))
    seen = watch("lenet-bn", trials=2)
    one, alone = (attacks.parse(f"gradinversion(steps=4, seeds={seeds})") for seeds in (3, 1))
    found = one(seen, Rng(("a", "b")))
    assert found.images.shape == (2, *SHAPE)
    assert found.evaluations.tolist() == [18, 18]
    assert set(found.findings) == {"group_spread"}
    assert alone(seen, Rng(("a", "b"))).evaluations.tolist() == [6, 6]
    tight = attacks.parse("gradinversion(steps=15, seeds=3, group=10)")(seen, Rng(("a", "b")))
    loose = attacks.parse("gradinversion(steps=15, seeds=3, group=0)")(seen, Rng(("a", "b")))
    assert bool((tight.findings["group_spread"] < 0.8 * loose.findings["group_spread"]).all())
    assert isinstance(one, GradInversion)


@pytest.mark.long
def test_batch_statistics_are_granted_in_a_run(tmp_path) -> None:
    matrix = Matrix(
        attacks=["gradinversion(steps=5, seeds=2)", "grey"], defenses=["none", "secagg(clients=2)"],
        models=["lenet-bn"], datasets=["samples(size=12)"], threats=["statistics=sent", "statistics=exact", "paper"],
        clients=["local(batch=2)"], images=4,
    )  # fmt: skip
    table = run(matrix, tmp_path / "run").results()
    own = table[table["attack"].str.startswith("gradinversion")].set_index(["defense", "threat"])["status"]
    served = ["ok", "failed"]  # five steps need not come nearer
    assert own.loc["none"].isin(served).all()
    refused = own.loc["secagg(clients=2)"]
    assert refused[~refused.index.str.startswith("paper")].eq("unsupported").all()
    assert refused[refused.index.str.startswith("paper")].isin(served).all()


def test_gradinversion_minimises_the_logarithm_of_a_distance_beside_its_priors() -> None:
    seen = watch("lenet-bn", trials=2)
    plain, log = (attacks.parse(f"gradinversion(statistics=0, l2=0, tv={tv})") for tv in (0, 2))
    images = rand(2, *SHAPE, seed=3)
    value, distance = (one._objective(seen, Rng(("a", "b")))({"image": images}, 0).detach() for one in (log, plain))
    torch.testing.assert_close(value, distance + 2 * total_variation(images))
    match, _, _ = evaluate(plain._objective(seen, Rng(("a", "b"))), {"image": images})
    torch.testing.assert_close(distance, match.log(), rtol=1e-4, atol=1e-4)


# deep image prior


def test_the_generator_of_dip_is_its_formula_and_has_its_derivative() -> None:
    seen = double(watch("lenet", trials=2))
    attack = attacks.parse("dip(width=3)")
    assert isinstance(attack, DeepImagePrior)
    unknowns = attack.start(seen, Rng(("a", "b")))
    images, _ = attack.render(unknowns, seen)
    for t in range(2):
        x = unknowns["noise"][t : t + 1]
        for name in ("0", "1", "full"):
            x = F.interpolate(x, scale_factor=2, mode="nearest") if name != "full" else x
            x = F.conv2d(x, unknowns[f"{name}.weight"][t].permute(2, 3, 0, 1), padding=1)
            x = F.leaky_relu(
                (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True, correction=0) + 1e-5).sqrt(), 0.2
            )
        wanted = torch.sigmoid(F.conv2d(x, unknowns["last.weight"][t].permute(2, 3, 0, 1), padding=1))
        torch.testing.assert_close(images[t : t + 1], wanted, rtol=1e-9, atol=1e-12)
    objective = attack._objective(seen, Rng(("a", "b"))).with_path()
    weight = unknowns["last.weight"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(unknowns | {"last.weight": weight}, 0).sum(), [weight])
    along = rand(*weight.shape, seed=2).double() - 0.5
    values = [
        objective(unknowns | {"last.weight": weight.detach() + h * along}, 0).sum().detach() for h in (-1e-5, 1e-5)
    ]
    assert float((values[1] - values[0]) / 2e-5) == pytest.approx(float((slope * along).sum()), rel=1e-6)


# the attackers of a malicious server


@pytest.mark.parametrize(("server", "attack"), [("imprint(bins=256)", "imprint"), ("trap(rows=64)", "trap")])
def test_a_malicious_server_is_exact_in_float64(server: str, attack: str) -> None:
    client = photographs(2)
    seen = see(in_double("lenet", (3, 12, 12)), client, f"server={server}")
    assert seen.dtype == torch.float64
    found = attacks.parse(attack)(seen, Rng(("a",)))
    error = torch.cdist(found.images[0].nan_to_num(9).flatten(1), client.images.flatten(1).double()).min(0).values
    assert float(error.min()) < 1e-9


def test_secure_aggregation_is_the_mean_in_float64() -> None:
    client = photographs(4)
    model = in_double("lenet", (3, 12, 12))
    plain, summed = (see(model, client, defense=defense) for defense in ("none", "secagg(clients=2)"))
    for name, value in plain.gradient.items():
        torch.testing.assert_close(summed.gradient[name], value, rtol=1e-12, atol=1e-14)
    assert float(metrics.parse("psnr")(client.images, client.images).min()) == 100
