"""The matrix: what is written is what is run, and a trial's name says what it was."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from leakbench import attacks, datasets, defenses, models
from leakbench.attacks.dlg import DLG
from leakbench.attacks.ig import IG
from leakbench.core.types import PRESETS, ThreatModel
from leakbench.errors import BadOption
from leakbench.models import OwnModule
from leakbench.plan.matrix import FLOORS, Matrix, axes_from_options, expand, load, load_suite, parse_threat, suites
from leakbench.plan.trial import Trial

AXES: dict[str, Any] = {"attacks": ["dlg"], "defenses": ["none"], "models": ["lenet"], "datasets": ["samples"]}


def matrix(**axes: Any) -> Matrix:
    return Matrix(**{**AXES, "floors": False, **axes})


def one(**axes: Any) -> Trial:
    (trial,) = matrix(images=[0], **axes).trials()
    return trial


def write(path: Path, text: str) -> Path:
    file = path / "matrix.toml"
    file.write_text(text, encoding="utf-8")
    return file


TOML = """
name = "mine"
attacks = ["dlg(steps=5)", "ig(steps=7, lr=0.2)"]
defenses = ["none", "noise(scale=0.1, kind=laplace)"]
models = "lenet"
datasets = ["samples"]
threats = ["paper", { labels = "known", reveals = ["key", "lock"] }, "labels=known, informed=true"]
images = [3, 1]
seeds = 2
floors = false
"""


def test_a_toml_file_is_the_matrix_it_states(tmp_path: Path) -> None:
    read = Matrix(**load(write(tmp_path, TOML)))
    assert read.name == "mine"
    assert read.attacks == (DLG(steps=5), IG(steps=7, lr=0.2))
    assert read.models == (models.parse("lenet"),)
    assert read.threats == (
        ThreatModel(),
        ThreatModel("known", frozenset({"key", "lock"})),
        ThreatModel("known", informed=True),
    )
    trials = read.trials()
    assert len(trials) == 2 * 2 * 1 * 1 * 3 * 2 * 2
    again = Matrix(**read.describe())
    assert [trial.id for trial in again.trials()] == [trial.id for trial in trials]
    assert json.loads(json.dumps(read.describe())) == read.describe()


def test_text_components_and_python_are_the_same_trial() -> None:
    spec = matrix(attacks=["ig(steps=5, lr=0.25)"]).trials()
    built = matrix(attacks=[IG(steps=5, lr=0.25)]).trials()
    assert [trial.id for trial in spec] == [trial.id for trial in built]
    assert matrix(attacks="ig(steps=5, lr=0.25)").trials() == spec
    assert matrix(attacks=[IG(steps=5, lr=0.25), "ig(steps=5, lr=2.5e-1)"]).trials() == spec


@given(value=st.floats(min_value=1e-300, allow_nan=False, allow_infinity=False))
def test_a_float_in_text_and_in_python_make_the_same_trial(value: float) -> None:
    assert one(attacks=IG(lr=value)).id == one(attacks=f"ig(lr={value!r})").id
    assert (
        one(defenses=f"noise(scale={value})").id == one(defenses=defenses.registry.build("noise", {"scale": value})).id
    )


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"atacks": ["dlg"]}, "unknown key 'atacks'; did you mean 'attacks'?"),
        ({"zzz": 1}, "known: "),
        ({"attacks": ["dlgg"]}, "did you mean 'dlg'"),
        ({"attacks": ["dlg(stesp=3)"]}, "did you mean 'steps'"),
        ({"attacks": ["dlg(steps=x)"]}, "steps='x' is not valid"),
        ({"attacks": 3}, "of type int"),
        ({"attacks": []}, "attacks is empty"),
        ({"threats": []}, "threats is empty"),
        ({"defenses": [["none"]]}, "of type list"),
        ({"models": ["letne"]}, "did you mean 'lenet'"),
        ({"datasets": ["sample"]}, "did you mean 'samples'"),
        ({"threats": ["papr"]}, "did you mean 'paper'"),
        ({"threats": ["paper2", "zzzz"]}, "unknown threat model"),
        ({"threats": [{"labels": "some"}]}, "'inferred', 'counts' or 'known'"),
        ({"threats": [{"reveals": 3}]}, "reveals=3 is not valid"),
        ({"threats": [{"reveals": [3]}]}, "is not valid"),
        ({"threats": [{"reveal": ["key"]}]}, "did you mean 'reveals'"),
        ({"threats": ["labels=known, labels=known"]}, "given twice"),
        ({"threats": [7]}, "must be a preset's name or a table"),
        ({"threats": ["informed=perhaps"]}, "no defense of the matrix has such an adaptive attacker; write true"),
        (
            {"threats": [{"informed": "splize"}], "defenses": ["none", "precode"]},
            "write true or every or omit or simulate or splice",
        ),
        ({"threats": [{"informed": 2}]}, "informed=2 is not valid"),
        ({"threats": ["shares=all"]}, "'gradient' or 'weights'"),
        ({"threats": ["shares=weights, rate=some"]}, "'hidden' or 'known'"),
        ({"threats": ["shares=weights, learning_rate=0"]}, "learning_rate='0' is not valid"),
        ({"threats": ["shares=weights, local_steps=0"]}, "local_steps='0' is not valid"),
        ({"threats": ["learning_rate=0.1"]}, "add shares=weights"),
        ({"images": 0}, "images"),
        ({"images": []}, "images"),
        ({"images": [-1]}, "images"),
        ({"images": "many"}, "images='many' is not valid"),
        ({"images": 1.5}, "images"),
        ({"seeds": [0, "x"]}, "seeds"),
        ({"name": ""}, "name"),
        ({"name": 3}, "name=3 is not valid"),
        ({"floors": "perhaps"}, "floors"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadOption) as raised:
        Matrix(**{**AXES, **axes})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("axis", sorted(AXES))
def test_a_missing_axis_is_told(axis: str) -> None:
    with pytest.raises(BadOption, match=f"{axis} is missing"):
        Matrix(**{name: value for name, value in AXES.items() if name != axis})


def test_bad_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="is not TOML"):
        load(write(tmp_path, "attacks = ["))
    with pytest.raises(BadOption, match="cannot be read"):
        load(tmp_path / "none.toml")
    with pytest.raises(BadOption, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(BadOption, match="UTF-8"):
        load(tmp_path / "latin.toml")
    with pytest.raises(BadOption) as raised:
        load(write(tmp_path, "a = " + "[" * 5000))
    assert "\n" not in str(raised.value)


@given(text=st.text())
def test_junk_toml_only_ever_raises_bad_option(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "junk.toml"
    file.write_text(text.encode("utf-8", "ignore").decode(), encoding="utf-8")
    with pytest.raises(BadOption):  # text that happens to be TOML has no axes
        Matrix(**load(file))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(axis=st.sampled_from([*AXES, "threats"]), value=JSON)
def test_junk_axes_only_ever_raise_bad_option(axis: str, value: object) -> None:
    try:
        Matrix(**{**AXES, axis: value})
    except BadOption as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


def test_suites_that_ship_are_matrices() -> None:
    assert "quick" in suites()
    for name in suites():
        axes = load_suite(name)
        for scale in axes.get("scale", [None]):
            assert all(Matrix(**row).trials() for row in expand(axes, scale))
    with pytest.raises(BadOption, match="unknown suite 'quik'"):
        load_suite("quik")


def test_axes_from_the_command_line() -> None:
    assert axes_from_options({"attacks": ["dlg"], "defenses": [], "images": ["3"], "seeds": ["1,2"]}) == {
        "attacks": ["dlg"],
        "images": 3,
        "seeds": [1, 2],
    }
    assert axes_from_options({"images": ["4", "6"]}) == {"images": [4, 6]}
    for bad in ("x", "", "1,,2", "1.5"):
        with pytest.raises(BadOption, match="is not a number"):
            axes_from_options({"images": [bad]})


# trials


def test_trials_are_unique_and_in_the_order_of_the_axes() -> None:
    made = matrix(attacks=["ig", "dlg", "ig"], images=[5, 2, 5], seeds=[1, 0], threats=["known-label", "paper"])
    trials = made.trials()
    ids = [trial.id for trial in trials]
    assert len(set(ids)) == len(ids) == 2 * 2 * 2 * 2
    found = [(trial.cell.threat.labels, trial.cell.attack.name, trial.seed, trial.image) for trial in trials]
    assert found == list(itertools.product(["known", "inferred"], ["ig", "dlg"], [1, 0], [5, 2]))
    assert [trial.id for trial in made.trials()] == ids


def test_counts_are_ranges() -> None:
    trials = matrix(images=3, seeds=2).trials()
    assert [(trial.seed, trial.image) for trial in trials] == [(s, i) for s in range(2) for i in range(3)]


def test_floors_are_added_once_and_behind_no_defense() -> None:
    made = matrix(attacks=["dlg", "grey"], defenses=["noise", "none"], images=[0], floors=True)
    found = [(trial.cell.defense.name, trial.cell.attack.name) for trial in made.trials()]
    extra = [floor for floor in FLOORS if floor != "grey"]
    assert found == [
        *[("none", name) for name in extra],
        ("noise", "dlg"),
        ("noise", "grey"),
        ("none", "dlg"),
        ("none", "grey"),
    ]
    assert all(attacks.get(name).floor for name in FLOORS)


def test_an_id_is_a_short_hash_and_the_settings_are_json() -> None:
    trial = one()
    assert len(trial.id) == 16
    assert set(trial.id) <= set("0123456789abcdef")
    assert json.loads(json.dumps(trial.cell.settings)) == trial.cell.settings
    later = ("invariance", "local", "solver")
    options = {name: value for name, value in DLG().options().items() if name not in later}
    assert trial.cell.settings["attack"] == {**options, "name": "dlg", "version": DLG.version}
    assert trial.cell.specs == {
        "dataset": "samples",
        "model": "lenet",
        "defense": "none",
        "attack": "dlg",
        "threat": "paper",
    }


def test_spelled_out_defaults_make_the_same_trial() -> None:
    plain = one().id
    for axis, registry in (("attacks", attacks.registry), ("defenses", defenses.registry), ("models", models.registry)):
        component = registry.parse(AXES[axis][0])
        assert one(**{axis: [registry.build(component.name, component.options())]}).id == plain
    assert one(threats=[{"labels": "inferred", "reveals": [], "informed": False, "shares": "gradient"}]).id == plain


def elsewhere(trial: Trial, **components: Any) -> Trial:
    """The same image and seed in another cell."""
    return dataclasses.replace(trial, cell=dataclasses.replace(trial.cell, **components))


def test_any_change_makes_another_trial() -> None:
    base = one()
    others = [
        dataclasses.replace(base, seed=1),
        dataclasses.replace(base, image=1),
        *(elsewhere(base, threat=threat) for threat in (
            ThreatModel("known"), ThreatModel(reveals=frozenset({"key"})), ThreatModel(informed=True),
            ThreatModel(shares="weights"), ThreatModel(optimises=True), ThreatModel(reveals=frozenset({"key", "lock"})),
            ThreatModel(shares="weights", learning_rate=0.1), ThreatModel(shares="weights", local_steps=5),
            ThreatModel(shares="weights", rate="known"),
        )),
        *(elsewhere(base, attack=attack) for attack in (
            DLG(steps=301), DLG(lr=0.5), DLG(tv=1e-6), DLG(restarts=2), DLG(labels="analytic"), DLG(secrets="optimise"),
            attacks.parse("idlg"), attacks.parse("ig"),
        )),
        *(elsewhere(base, defense=defenses.parse(spec)) for spec in (
            "noise", "noise(scale=0.02)", "noise(kind=laplace)", "precode", "keylock", "keylock(gate=none)",
            "norm-only",
        )),
        *(elsewhere(base, model=models.parse(spec)) for spec in (
            "lenet(init=default)", "lenet(fresh=true)", "lenet-bn", "lenet-bn(mode=eval)", "resnet20",
        )),
        elsewhere(base, dataset=datasets.parse("samples(size=16)")),
    ]  # fmt: skip
    ids = [trial.id for trial in [base, *others]]
    assert len(set(ids)) == len(ids)


def test_a_new_version_makes_another_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    before = one().id
    for cls in (DLG, type(defenses.parse("none")), type(models.parse("lenet")), type(datasets.parse("samples"))):
        with monkeypatch.context() as patch:
            patch.setattr(cls, "version", cls.version + 1)
            assert one().id != before
    assert one().id == before


@pytest.mark.long
def test_ids_are_the_same_in_another_process() -> None:
    axes = {
        "attacks": ["dlg", "ig(lr=0.3)"],
        "defenses": ["keylock"],
        "threats": [{"reveals": ["lock", "key", "noise"], "labels": "known"}],
        "models": ["lenet"],
        "datasets": ["samples"],
        "images": 2,
    }
    mine = [trial.id for trial in Matrix(**axes).trials()]
    code = f"from leakbench.plan.matrix import Matrix; print(*(t.id for t in Matrix(**{axes!r}).trials()))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.split() == mine


def test_ones_own_network_is_a_model() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 7))
    trial = one(models=network)
    assert isinstance(trial.cell.model, OwnModule)
    assert trial.cell.model.label == "Sequential"
    assert trial.id == one(models=[OwnModule("Sequential", network)]).id
    before = trial.id
    with torch.no_grad():
        network[1].bias += 1
    assert one(models=network).id != before
    assert one(models=OwnModule("other", network)).id != one(models=network).id


# threat models


NAMES = st.sampled_from(["key", "lock", "lock-weights", "noise", "key-weights"])
GRANTS = {
    "labels": st.sampled_from(["inferred", "known"]),
    "reveals": st.frozensets(NAMES, max_size=4),
    "informed": st.booleans(),
    "optimises": st.booleans(),
}
LOCAL = {
    "learning_rate": st.sampled_from([0.01, 0.1, 0.00025]),
    "local_steps": st.integers(1, 100),
    "rate": st.sampled_from(["hidden", "known"]),
}
THREATS = st.one_of(
    st.builds(ThreatModel, **GRANTS), st.builds(ThreatModel, shares=st.just("weights"), **GRANTS, **LOCAL)
)


@given(threat=THREATS)
def test_a_threat_model_can_be_written_and_read_again(threat: ThreatModel) -> None:
    assert parse_threat(threat.spec()) == threat
    assert parse_threat(threat.settings()) == threat
    assert parse_threat(threat) is threat
    assert json.loads(json.dumps(threat.settings())) == threat.settings()
    assert threat.describe().endswith(".")


@given(text=st.text())
def test_junk_threats_only_ever_raise_bad_option(text: str) -> None:
    for spec in (text, f"labels={text}", f"reveals={text}", f"{text}=known"):
        try:
            found = parse_threat(spec).spec()
        except BadOption as error:
            found = str(error).replace("\n", "")[:0]
        assert isinstance(found, str)


def test_presets() -> None:
    assert parse_threat("paper") == ThreatModel()
    assert parse_threat("known-label") == ThreatModel("known")
    for name, preset in PRESETS.items():
        assert preset.spec() == name
    words = ThreatModel("known", frozenset({"lock", "key"}), True).describe()
    assert "The label is known" in words
    assert "key, lock" in words
    assert "knows the defense and models" in words


def test_whole_numbers_in_python_make_the_trial_that_text_makes() -> None:
    axes = {"defenses": "none", "models": "lenet", "datasets": "samples", "images": 1, "floors": False}
    (text,) = Matrix(attacks="dlg(lr=1)", **axes).trials()
    (built,) = Matrix(attacks=DLG(lr=1), **axes).trials()
    assert built.id == text.id


def test_a_threat_table_with_other_keys_is_told() -> None:
    with pytest.raises(BadOption):
        parse_threat({1: "known"})


def test_every_informed_attacker_of_every_defense() -> None:
    chosen = matrix(
        defenses=["none", "precode", "noise"], threats=["paper", "labels=known, informed=every"], images=[0]
    )
    met = [(str(trial.cell.threat.informed), trial.cell.defense.name) for trial in chosen.trials()]
    assert met == [
        *(("False", name) for name in ("none", "precode", "noise")),
        *(("True", name) for name in ("precode", "noise")),
        ("splice", "precode"),
        ("omit", "precode"),
        ("simulate", "precode"),
        ("simulate", "noise"),
    ]
    assert {trial.cell.threat.labels for trial in chosen.trials()[3:]} == {"known"}
    by_name = matrix(defenses=["precode"], threats=["labels=known, informed=splice"], images=[0])
    assert chosen.trials()[5].id == by_name.trials()[0].id
    for informed in ("every", "simulate"):
        with pytest.raises(
            BadOption, match=f"'{informed}' is not valid: no defense of the matrix has anything to model"
        ):
            matrix(threats=[f"informed={informed}"])
