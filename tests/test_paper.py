"""The figures of the FedKL paper: all of them, in its convention, and beside those of a run."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import made
import pytest
from click.testing import Result
from typer.testing import CliRunner

import leakbench
from leakbench import defenses
from leakbench.cli.main import app
from leakbench.core.text import name_of
from leakbench.errors import BadOption
from leakbench.plan.matrix import expand, load
from leakbench.report import compare, files
from leakbench.store.frames import from_csv
from leakbench.store.run_file import FILE, Store
from leakbench.training import records

REPORTS = Path(__file__).parents[1] / "reports"
PAPER = compare.published()


def rows_of(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading."""
    lines = text.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")][2:]


def test_every_printed_figure_is_there() -> None:
    assert sum(len(one.scores) for one in PAPER.table6) == 130
    assert len(PAPER.table1) == 47
    assert sum(len((one.accuracy, one.gap)) for one in PAPER.table3) == 110
    assert list(PAPER.proportions.values()) == ["22.43", "10.49", "6.46", "1.15", "0.61", "0.097"]
    for table in (PAPER.table1, PAPER.table3, PAPER.table6):
        places = [(one.place, getattr(one, "key_source", ""), getattr(one, "training", "")) for one in table]
        assert len(set(places)) == len(places)


def test_the_figures_obey_the_papers_own_convention() -> None:
    """PSNR is 10 log10(255^2 / MSE), up to the mean over images: that of logarithms is at least that of the mean."""
    for one in PAPER.table6:
        stated = 10 * math.log10(255**2 / float(one.mse))
        assert stated - 0.04 <= float(one.psnr) <= stated + 8
        if one.keylock == "with":
            assert float(one.psnr) == pytest.approx(stated, abs=0.16)
        assert one.implied == pytest.approx(2 * stated - 48.131, abs=0.001)
    random = {one.place: float(one.accuracy) for one in PAPER.table3 if one.key_source == "random"}
    for row in PAPER.table3:
        assert float(row.gap) == pytest.approx(float(row.accuracy) - random[row.place], abs=0.011)


def test_what_is_set_beside_a_figure_has_its_place_and_grants_no_key() -> None:
    results = from_csv(REPORTS / "table6" / "results.csv")
    text = files.comparison(results).markdown
    scores, others = rows_of(text, "In the paper's convention"), rows_of(text, "Rows that the paper does not have")
    lines = [row for row in scores if row[4] == "paper"]
    assert [row[-5:] for row in lines] == [list(one.scores) for one in PAPER.table6]
    ours = [row for row in scores if row[4] == "this run"]
    assert {row[6] for row in ours} == {"T0", "T1", "T0, T1"}
    assert {row[6] for row in ours if row[5].endswith(", none")} == {"T0, T1", "T1"}  # the same trials
    assert all(cell for row in ours for cell in row[-5:])
    assert sum(row[4] == "not in this run" for row in scores) == 26 - 10
    assert {row[4] for row in others} == {"T0", "T1", "T5"}
    assert {row[3] for row in others if row[4] != "T5" and not row[0].startswith("ggl")} == {"norm-only"}
    start = scores.index(next(row for row in scores if row[:4] == ["grnn", "lenet", "mnist, 32", "with"]))
    assert [row[4] for row in scores[start : start + 3]] == ["paper", "this run", "this run"]
    assert scores[start][9:] == ["103.46", "28.00", "0.69", "0.45", "0.108"]


def test_images_of_another_size_are_not_set_beside_a_figure() -> None:
    places = {compare.place_of(specs(dataset), ("model", "dataset")) for dataset in ("mnist", "mnist(size=32)")}
    assert places == {("lenet", "mnist", "28", "with"), ("lenet", "mnist", "32", "with")}
    large = compare.place_of(specs("imagenet(path=data/imagenet, size=256)"), ("model", "dataset"))
    assert large == ("lenet", "imagenet", "256", "with")
    assert compare.place_of({**specs("samples"), "defense": "clip"}, ("dataset",)) == ("samples", "", "")


def specs(dataset: str) -> dict[str, str]:
    return {"model": "lenet(init=default)", "dataset": dataset, "defense": "keylock(lock_init=uniform)"}


def test_the_committed_comparison_is_that_of_the_committed_results(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_bytes((REPORTS / "table6" / "results.csv").read_bytes())
    written = files.write_comparison(tmp_path)
    assert written.read_text(encoding="utf-8") == (REPORTS / "table6" / "paper.md").read_text(encoding="utf-8")


# The rows of the tables

FOLDER = Path(leakbench.__file__).parent / "plan" / "paper"
FILES = ("batchnorm", "table1", "table3", "table4", "table5", "table6", "table7")
SMALL = [("mnist", "32"), ("cifar10", "32"), ("cifar100", "32")]
LARGE = [("cifar10", "256"), ("cifar100", "256"), ("imagenet", "256")]
PICTURES = {(attack, "lenet", *data) for attack in ("dlg", "grnn") for data in SMALL}
PICTURES |= {(attack, "resnet20", *data) for attack in ("dlg", "grnn") for data in SMALL}
PICTURES |= {(attack, "resnet18", *data) for attack in ("dlg", "grnn") for data in LARGE}
GGL = ("ggl", "resnet18", "imagenet", "256")
SHARED = {("grnn", "lenet", *data) for data in SMALL} | {("grnn", "resnet18", *data) for data in LARGE} | {GGL}
BATCHNORM = {
    (attack, model, *data) for attack in ("dlg", "ig") for model in ("lenet", "lenet-bn") for data in SMALL[1:]
}
ROWS = {
    "table1": {(*one.place[:4], one.keylock) for one in PAPER.table1},
    "table3": {(*one.place[:4], "with") for one in PAPER.table3},
    "table4": PICTURES,
    "table5": {GGL},
    "table6": {one.place[:4] for one in PAPER.table6},
    "table7": SHARED,
    "batchnorm": BATCHNORM,
}
"""What each table of the paper has: attack or mode, model, dataset, side, and of trainings without or with key-lock."""


def cells(name: str, scale: str) -> set[tuple[str, ...]]:
    """Return what the rows of a table's file have at a scale; of trainings without those behind the control."""
    found: set[tuple[str, ...]] = set()
    for row in expand(load(FOLDER / f"{name}.toml"), scale):
        firsts = row.get("attacks") or [row.get("mode", "centralised")]
        locks = row["defenses"] if "attacks" not in row else ["keylock"]
        for first, model, dataset, defense in itertools.product(firsts, row["models"], row["datasets"], locks):
            place = compare.place_of({"model": model, "dataset": dataset, "defense": defense}, ("model", "dataset"))
            if place[-1]:
                found.add((name_of(first), *(place if "attacks" not in row else place[:-1])))
    return found


@pytest.mark.parametrize("name", FILES)
def test_full_has_the_papers_rows_and_smoke_each_of_them(name: str) -> None:
    full = cells(name, "full")
    extra = {one for one in full if one[-1] == "without"} if name == "table3" else set()
    assert full - extra == ROWS[name]
    smoke = {tuple(part for part in one if not part.isdigit()) for one in cells(name, "smoke")}
    assert smoke == {tuple(part for part in one if not part.isdigit()) for one in ROWS[name]}


@pytest.mark.parametrize("name", FILES)
def test_a_training_has_relu_gates_and_an_attacked_cifar_network_sigmoids(name: str) -> None:
    for scale in ("smoke", "cpu", "full"):
        for row in expand(load(FOLDER / f"{name}.toml"), scale):
            sigmoid = {spec for spec in row["defenses"] if "gate" in spec}
            cifar = any(name_of(model) in ("resnet20", "resnet32") for model in row["models"])
            assert sigmoid == ({"keylock(gate=sigmoid)"} if cifar and "attacks" in row else set())
    assert defenses.parse("keylock").settings()["gate"] == "relu"


def test_the_files_are_found_where_commands_name_them() -> None:
    for name in FILES:
        assert (REPORTS.parent / "benchmarks" / f"{name}.toml").read_text() == (FOLDER / f"{name}.toml").read_text()


# The command


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with small data of the form of MNIST, CIFAR and ImageNet."""
    made.make(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["run", *arguments, "--scale", "smoke", "--device", "cpu"])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("batchnorm", marks=pytest.mark.long),
        pytest.param("table4", marks=pytest.mark.long),
        "table5",
        pytest.param("table6", marks=pytest.mark.full),
        pytest.param("table7", marks=pytest.mark.long),
    ],
)
def test_every_row_of_attacks_runs_in_small(name: str, place: Path) -> None:
    table = name.removeprefix("table")
    done = run("paper", "--table", table)
    assert done.exit_code == 0, done.output
    folder = place / "runs" / "paper-smoke" / name
    with Store.open(folder / FILE, readonly=True) as store:
        results = store.results()
    attacked = results[~results["floor"]]
    kinds = zip(attacked["attack"].map(name_of), attacked["model"].map(name_of), attacked["dataset"].map(name_of))
    assert set(kinds) == {one[:3] for one in ROWS[name]}
    assert set(attacked["defense"].map(name_of)) == {"none", "keylock"}
    assert set(attacked["status"]) <= {"ok", "failed"}  # an attack of two steps may diverge
    assert (attacked["status"] == "ok").groupby(attacked["attack"]).any().all()
    assert "Beside the paper" in (folder / "paper.md").read_text(encoding="utf-8")


def test_the_rows_of_table_6_are_rows_of_tables_4_and_5() -> None:
    """So that they run in small with those."""
    others = [row for name in ("table4", "table5") for row in small(name)]
    assert all(row in others for row in small("table6"))


def small(name: str) -> list[dict[str, object]]:
    return [{**row, "name": ""} for row in expand(load(FOLDER / f"{name}.toml"), "smoke")]


@pytest.mark.long
def test_every_centralised_training_runs_in_small(place: Path) -> None:
    done = run("accuracy", str(FOLDER / "table1.toml"), "--mode", "centralised", "--out", "out")
    assert done.exit_code == 0, done.output
    trained(place / "out", {one for one in ROWS["table1"] if one[0] == "centralised"})


@pytest.mark.fl
def test_every_training_runs_in_small(place: Path) -> None:
    done = run("paper", "--table", "1", "--table", "2", "--table", "3")
    assert done.exit_code == 0, done.output
    folder = place / "runs" / "paper-smoke" / "trainings"
    trained(folder, ROWS["table1"] | ROWS["table3"])
    assert "Beside the paper: trainings" in (folder / "paper.md").read_text(encoding="utf-8")


def trained(folder: Path, rows: set[tuple[str, ...]]) -> None:
    """Assert that a folder has a finished training of each of these rows, and no other."""
    found = records(folder)
    assert {one.outcome.status for one in found} == {"ok"}
    places = {(str(one.recipe["mode"]), *compare.place_of(one.specs, ("model", "dataset"))) for one in found}
    assert {(*one[:3], one[4]) for one in places} == {(*one[:3], one[4]) for one in rows}
    assert len(found) == len(rows)


def test_what_is_wrong_with_the_options_is_told_before_a_run(place: Path) -> None:
    with pytest.raises(BadOption, match="unknown table '8'; known: 1, 2, 3, 4, 5, 6, 7, batchnorm"):
        CliRunner().invoke(app, ["run", "paper", "--table", "8"], catch_exceptions=False)
    (place / "data").rename(place / "elsewhere")
    with pytest.raises(BadOption, match=r"data/imagenet' does not exist"):
        CliRunner().invoke(app, ["run", "paper", "--table", "4"], catch_exceptions=False)
    assert not (place / "runs").exists()
