"""What every registered component must be, whatever it does; and the random source they all draw from."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

import pytest
import torch
from conftest import ALL_DEFENSES, ATTACKS, CLASSES, DEFENSES, SHAPE, examples, watch
from pydantic import TypeAdapter, ValidationError

from leakbench import attacks, datasets, defenses, generators, metrics, models
from leakbench.core.registry import Registry
from leakbench.core.rng import Rng, generator
from leakbench.defenses import Step
from leakbench.errors import BadOption, LeakbenchError, MissingAsset
from leakbench.victim import build

REGISTRIES: list[Registry[Any]] = [
    attacks.registry,
    datasets.registry,
    defenses.registry,
    generators.registry,
    metrics.registry,
    models.registry,
]
EVERYTHING = [
    pytest.param(registry, name, id=f"{registry.kind}-{name}") for registry in REGISTRIES for name in registry.names()
]
BASES = {"Attack", "Dataset", "Defense", "Generator", "Metric", "Model"}


def made(registry: Registry[Any], name: str) -> Any:
    """Return the component with its defaults; what has none gets the first value of its type that fits."""
    cls = registry.get(name)
    needed = {
        field.name: "somewhere"
        for field in registry.fields(cls).values()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    return registry.build(name, needed)


@pytest.mark.parametrize(("registry", "name"), EVERYTHING)
def test_it_is_a_documented_frozen_dataclass(registry: Registry[Any], name: str) -> None:
    cls = registry.get(name)
    assert cls.name == name
    assert name == name.lower()
    assert issubclass(cls, registry.base)
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert "__doc__" in vars(cls)
    summary = cls.summary()
    assert summary.endswith(".")
    assert 10 < len(summary) <= 120
    assert not summary.startswith(f"{cls.__name__}(")
    assert isinstance(cls.version, int)
    if registry in (attacks.registry, defenses.registry):
        assert cls.assumes, "`list` says what it assumes"
        assert cls.cost, "`list` says what it costs"
        assert cls.fails, "`list` says what defeats it"
    assert cls.version >= 1
    floor = getattr(cls, "floor", False)
    if registry.kind in ("attack", "defense", "model") and name != "none" and not floor:
        assert cls.reference.strip()


@pytest.mark.parametrize(("registry", "name"), EVERYTHING)
def test_every_option_is_documented_typed_and_checked(registry: Registry[Any], name: str) -> None:
    cls = registry.get(name)
    hints = typing.get_type_hints(cls, include_extras=True)
    documents = " ".join(base.__doc__ or "" for base in cls.__mro__ if base.__module__.startswith("leakbench"))
    component = made(registry, name)
    for option, field in registry.fields(cls).items():
        assert f"{option}:" in documents or f"``{option}``" in documents or option in documents, option
        TypeAdapter(hints[option]).validate_python(getattr(component, option))
        assert registry.type_text(cls, option)
        if field.default is not dataclasses.MISSING:
            TypeAdapter(hints[option]).validate_python(field.default)
        with pytest.raises(BadOption, match=option):
            registry.build(name, {**component.options(), option: object()})


@pytest.mark.parametrize(("registry", "name"), EVERYTHING)
def test_a_step_outside_a_bound_is_refused(registry: Registry[Any], name: str) -> None:
    cls = registry.get(name)
    for option, hint in typing.get_type_hints(cls, include_extras=True).items():
        for extra in getattr(hint, "__metadata__", ()):
            for constraint in getattr(extra, "metadata", ()):
                for word, wrong in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0)):
                    bound = getattr(constraint, word, None)
                    if bound is not None:
                        with pytest.raises(BadOption):
                            registry.build(name, {option: bound + wrong})


@pytest.mark.parametrize(("registry", "name"), EVERYTHING)
def test_its_spec_and_settings_say_what_it_is(registry: Registry[Any], name: str) -> None:
    component = made(registry, name)
    assert registry.parse(registry.spec(component)) == component
    assert registry.parse(component) is component
    assert hash(component) == hash(registry.parse(registry.spec(component)))
    assert component.options().keys() == registry.fields(registry.get(name)).keys()
    if any(value == "somewhere" for value in component.options().values()):
        with pytest.raises(LeakbenchError, match="somewhere"):
            component.settings()  # what identifies a file needs the file
        return
    try:
        settings = component.settings()
    except MissingAsset:
        if registry is not generators.registry:
            raise
        return  # weights that are not here are what identifies it
    assert settings["name"] == name
    assert settings["version"] == registry.get(name).version
    assert json.loads(json.dumps(settings)) == settings
    # every option counts: another value makes other settings
    for option, value in alternatives(registry, name).items():
        assert registry.build(name, {**component.options(), option: value}).settings() != settings, option


def alternatives(registry: Registry[Any], name: str) -> dict[str, Any]:
    """Return another value that fits for every option that is a number, a choice or a flag."""
    cls, component = registry.get(name), made(registry, name)
    found = {}
    for option, hint in typing.get_type_hints(cls, include_extras=True).items():
        if option not in registry.fields(cls):
            continue
        current = getattr(component, option)
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        candidates = [*choices, 2, 16, 0.25, True, False]
        for candidate in candidates:
            try:
                fits = TypeAdapter(hint).validate_python(candidate, strict=True)
            except ValidationError:
                continue
            if fits != current:
                found[option] = candidate
                break
    return found


def test_other_values_are_found_for_the_test_above() -> None:
    assert alternatives(attacks.registry, "ig").keys() == {
        "steps", "lr", "tv", "restarts", "labels", "secrets", "boxed", "signed", "local",
        "invariance",
    }  # fmt: skip


@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("spec", ATTACKS)
def test_an_attack_checks_and_answers_in_shape(spec: str, defense: str) -> None:
    attack = attacks.parse(spec)
    observation = watch("lenet", defense, trials=3)
    assert attack.check(observation) is None
    found = attack(observation, Rng(("a", "b", "c")))
    assert found.images.shape == (3, *SHAPE)
    assert found.images.dtype == torch.float32
    assert not found.images.requires_grad
    assert found.path in ("lanes", "batched", "one-at-a-time", "")
    assert (found.path == "") == attack.floor
    if found.labels is not None:
        assert found.labels.dtype == torch.int64
        assert found.labels.shape == (3,)
        assert bool(((found.labels >= 0) & (found.labels < CLASSES)).all())
    if found.objective is not None:
        assert found.objective.shape == (3,)
        assert not found.objective.requires_grad
    if found.failed is not None:
        assert found.failed.dtype == torch.bool
        assert found.failed.shape == (3,)
        assert bool(torch.isfinite(found.images[~found.failed]).all())
    if found.evaluations is not None:
        assert found.evaluations.dtype == torch.int64
        assert bool((found.evaluations > 0).all())
    if attack.floor and attack.name != "prior":  # which states that it reads the label off the gradient, as ggl does
        assert found.labels is None, "a floor has no way of knowing the label"


@pytest.mark.parametrize("defense", ALL_DEFENSES)
def test_a_defense_keeps_shapes_dtypes_and_devices(defense: str) -> None:
    method = defenses.parse(defense)
    network = build(models.parse("lenet"), method, SHAPE, CLASSES, "weights")
    x, y = method.encode(*examples(method), torch.Generator().manual_seed(0))
    assert x.shape == (1, *SHAPE)
    assert x.dtype == torch.float32
    assert len(y) == 1
    assert method.loss(network, x, y).shape == (1,)
    sent = method.release(Step(network, x, y, method), torch.Generator().manual_seed(0))
    for name, value in sent.items():
        assert value.shape == network.get_parameter(name).shape
        assert value.dtype == torch.float32
        assert not value.requires_grad
    again = method.release(Step(network, x, y, method), torch.Generator().manual_seed(0))
    assert all(torch.equal(sent[name], again[name]) for name in sent)
    names = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for secret in method.secrets(network):
        assert secret.name in names
        draw = secret.law.draw((3, 2), torch.Generator().manual_seed(0))
        assert draw.shape == (3, 2)
        assert torch.equal(draw, secret.law.draw((3, 2), torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", models.names())
def test_a_model_says_whether_its_weights_are_fresh(name: str) -> None:
    assert models.parse(name).fresh_weights() is False
    assert models.registry.build(name, {"fresh": "true"}).fresh_weights() is True


def test_bases_are_abstract() -> None:
    for registry in REGISTRIES:
        assert registry.base.__name__ in BASES
        assert registry.group == f"leakbench.{registry.kind}s"
        hidden = [n for n in dir(registry.base) if getattr(getattr(registry.base, n), "__isabstractmethod__", False)]
        assert hidden or registry.kind == "defense", "only a defense's hooks all have a default"


# the random source


def test_draws_depend_on_the_key_and_the_purpose_alone() -> None:
    whole = Rng(("a", "b", "c"))
    normal = whole.normal("start", (2, 3))
    assert normal.shape == (3, 2, 3)
    assert torch.equal(Rng(("c",)).normal("start", (2, 3))[0], normal[2])
    assert torch.equal(Rng(("b", "a")).normal("start", (2, 3)), normal[[1, 0]])
    assert torch.equal(whole.select([2, 0]).normal("start", (2, 3)), normal[[2, 0]])
    whole.uniform("other", (5,))
    assert torch.equal(whole.normal("start", (2, 3)), normal), "no draw advances another"
    assert not torch.equal(whole.normal("label", (2, 3)), normal)
    assert not torch.equal(normal[0], normal[1])


def test_forks_are_independent_of_their_parent_and_of_each_other() -> None:
    rng = Rng(("a", "b"))
    draws = [source.normal("x", (500,)) for source in (rng, rng.fork("1"), rng.fork("2"), rng.fork("1").fork("2"))]
    rows = torch.cat(draws)
    off = torch.corrcoef(rows)[~torch.eye(len(rows), dtype=torch.bool)]
    assert float(off.abs().max()) < 5 / 500**0.5
    assert torch.equal(rng.fork("1").select([1]).normal("x", (3,)), rng.select([1]).fork("1").normal("x", (3,)))


def test_the_laws_of_the_draws() -> None:
    rng = Rng(tuple(map(str, range(50))))
    normal, uniform = rng.normal("n", (400,)), rng.uniform("u", (400,))
    n = normal.numel()
    assert float(normal.mean()) == pytest.approx(0, abs=5 / n**0.5)
    assert float(normal.square().mean()) == pytest.approx(1, abs=5 * (2 / n) ** 0.5)
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=5 * (1 / 12 / n) ** 0.5)


def test_a_generator_is_a_function_of_its_key() -> None:
    assert generator("a", 1).initial_seed() == generator("a", "1").initial_seed()
    seeds = {generator(*key).initial_seed() for key in [("a", "b"), ("ab",), ("a", "", "b"), ("b", "a"), ("a",), ()]}
    assert len(seeds) == 6
    # the numbers are part of the format of a run: a change would change every trial
    assert generator("client", 0).initial_seed() == 2001474577176657575


def test_seeding_does_not_reach_beyond_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: seen.append(seed))
    watch("lenet")
    attacks.parse("ig(steps=1)")(watch("lenet"), Rng(("a", "b")))
    assert seen == []
