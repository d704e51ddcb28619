"""The curves over noise and precision: their defenses, their table and their figure."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import watch
from PIL import Image
from test_engine import Tiny, go, no_assets  # noqa: F401

from leakbench import defenses, report
from leakbench.analysis.summary import summarise
from leakbench.defenses.noise import SMOOTHING
from leakbench.errors import BadOption
from leakbench.plan.matrix import Matrix, expand, load_suite
from leakbench.report import curves
from leakbench.report.figure import saved
from leakbench.store.records import StoredComponent
from leakbench.store.run_file import FILE, Store

STRENGTHS = ["none", "noise(scale=1e-5, relative=true)", "noise(relative=true, scale=0.2)", "quantise(bits=half)"]
STRENGTHS += ["quantise(bits=2)", "quantise(bits=8)"]


def matrix(own: list[str] = STRENGTHS, **axes: object) -> Matrix:
    given = {"attacks": ["ig(steps=2)"], "models": ["lenet"], "datasets": [Tiny()], "images": 2, "defenses": own}
    return Matrix(**{**given, **axes})


def components(own: list[str]) -> list[StoredComponent]:
    parsed = [defenses.parse(spec) for spec in own]
    return [StoredComponent("defense", defenses.spec(one), one.version, one.options()) for one in parsed]


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_relative_noise_is_in_units_of_each_tensors_root_mean_square(kind: str) -> None:
    plain = watch("lenet", trials=3).gradient
    sent = watch("lenet", f"noise(scale=0.1, relative=true, kind={kind})", trials=3).gradient
    small = watch("lenet", f"noise(scale=1e-3, relative=true, kind={kind})", trials=3).gradient
    for name, value in plain.items():
        unit = value.flatten(1).square().mean(1).sqrt()
        noise = (sent[name] - value).flatten(1)
        torch.testing.assert_close(
            (small[name] - value).flatten(1) * 100, noise, rtol=0.01, atol=float(unit.max()) / 1e3
        )
        if noise.shape[1] > 500:
            ratio = noise.square().mean(1).sqrt() / unit
            torch.testing.assert_close(ratio, torch.full_like(ratio, 0.1), rtol=0.2, atol=0)


def test_who_knows_of_relative_noise_weighs_each_tensor_by_its_own(float64: None) -> None:
    defense = defenses.parse("noise(scale=0.5, relative=true)")
    observed = {"a": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([[30.0, 40.0]]), "zero": torch.zeros(1, 2)}
    dummy = {name: value + 1 for name, value in observed.items()}
    variances = [0.25 * 12.5 / 1.25, 0.25 * 1250 / 1.25, 1.0]
    expected = sum(2 / (2 * variance) for variance in variances)
    assert float(defense.attackers()["default"].likelihood(dummy, observed, {})) == pytest.approx(expected, rel=1e-12)
    laplace = defenses.parse("noise(scale=0.5, relative=true, kind=laplace)")
    expected = sum(2 * 2**0.5 * ((1 / variance + SMOOTHING**2) ** 0.5 - SMOOTHING) for variance in variances)
    assert float(laplace.attackers()["default"].likelihood(dummy, observed, {})) == pytest.approx(expected, rel=1e-12)


def test_levels_go_from_exact_to_inexact() -> None:
    own = [*STRENGTHS, "noise(scale=0.1)", "noise(scale=0.1, relative=true, kind=laplace)", "norm-only"]
    found = curves.levels(components(own[::-1]))
    assert [level.label for level in found if level.kind == "noise"] == ["0", "1e-5", "2e-1"]
    assert [level.label for level in found if level.kind == "precision"] == ["float32", "half", "8 bits", "2 bits"]
    assert curves.kinds(components(STRENGTHS)) == ["noise", "precision"]
    assert curves.kinds(components(STRENGTHS[:4])) == ["noise"]
    assert curves.kinds(components(["none", "norm-only", "noise(scale=0.1)", "noise(scale=0.2)"])) == []


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
def test_the_suite_has_both_curves(scale: str) -> None:
    (axes,) = expand(load_suite("curves"), scale)
    plan = Matrix(**axes)
    curves.check([plan])
    found = curves.levels(components([defenses.spec(one) for one in plan.defenses]))
    noise = ["0", "1e-6", "1e-5", "1e-4", "1e-3", "1e-2", "1e-1"]
    assert [level.label for level in found if level.kind == "noise"] == noise
    assert [attack.name for attack in plan.attacks] == ["peel", "lb", "ig"]


def test_a_matrix_without_a_curve_is_refused() -> None:
    with pytest.raises(BadOption, match="fewer than 2 strengths"):
        curves.check([matrix(["none", "noise(scale=0.1, relative=true)", "quantise(bits=4)"])])
    with pytest.raises(BadOption, match="leave the threshold out"):
        curves.check([matrix(threshold=0.5)])


@pytest.mark.long
def test_a_run_over_strengths_has_a_table_and_a_figure(tmp_path: Path) -> None:
    results = go(matrix(), tmp_path)
    written = [path.relative_to(tmp_path).as_posix() for path in report.write(tmp_path)]
    (picture,) = [name for name in written if name.startswith("grids/curves-")]
    assert written[-1] == "curves.md"
    text = (tmp_path / "curves.md").read_text(encoding="utf-8")
    assert f"]({picture})" in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    cells = {row[0]: row for row in rows}
    assert {"0", "1e-5", "2e-1", "float32", "half", "8 bits", "2 bits"} < set(cells)
    means = results.groupby("defense")["ssim_aligned"].mean()
    assert float(cells["2 bits"][7].split()[0].replace("−", "-")) == pytest.approx(means["quantise(bits=2)"], abs=1e-3)
    assert cells["0"][5:] == cells["float32"][5:]
    image = Image.open(BytesIO((tmp_path / picture).read_bytes()))
    assert min(image.size) > 500
    before = (tmp_path / picture).read_bytes()
    with Store.open(tmp_path / FILE, readonly=True) as store:
        (page,) = curves.pages(summarise(store.results(), store.metrics()), store.components())
        assert saved(curves.figure(page)) == before
        other = results[results["defense"].isin(["none", "quantise(bits=2)"])].assign(threat="optimises=true")
        both = pd.concat([results, other], ignore_index=True)
        (same,) = curves.pages(summarise(both, store.metrics()), store.components())
        assert (same.block, same.file) == (page.block, page.file), "one strength alone makes no curve"
