"""The command line: what it says, what it writes, and how it ends."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch

import leakbench
from leakbench import attacks, datasets, defenses, metrics, models
from leakbench.cli.main import main
from leakbench.cli.run import MatrixOptions
from leakbench.core.types import PRESETS
from leakbench.plan.matrix import load_suite
from leakbench.store.run_file import FILE, Store

SCRIPT = Path(sys.executable).with_name("leakbench")
KINDS = {
    "attacks": attacks.registry,
    "defenses": defenses.registry,
    "models": models.registry,
    "datasets": datasets.registry,
    "metrics": metrics.registry,
}
SMALL = ("--attack", "random", "--defense", "none", "--model", "lenet", "--dataset", "samples(size=12)")
COMMANDS = [
    (),
    ("run",),
    ("run", "matrix"),
    ("run", "sharing"),
    ("run", "curves"),
    ("run", "paper"),
    ("report",),
    ("show",),
    ("diff",),
    ("audit",),
    ("audit", "model"),
    ("audit", "update"),
    ("leaderboard",),
    ("list",),
    ("assets",),
    ("assets", "fetch"),
]
COMMANDS += [("list", kind) for kind in (*KINDS, "suites", "threats")]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working folder, an empty cache, and registries that are put back afterwards."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LEAKBENCH_HOME", str(tmp_path / "cache"))
    for name in ("FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    kept = {kind: (registry.names(), dict(registry._classes)) for kind, registry in KINDS.items()}
    modules = set(sys.modules)
    yield folder
    for kind, (_, classes) in kept.items():
        KINDS[kind]._classes.clear()
        KINDS[kind]._classes.update(classes)
    for name in set(sys.modules) - modules:
        if name.startswith("leakbench_plugin_"):
            del sys.modules[name]


@pytest.fixture
def cli(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run a command line in this process, as the console script does."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["leakbench", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        code = end.value.code
        return Done(0 if code is None else int(code), *capsys.readouterr())

    return run


def one_thread(**more: str) -> dict[str, str]:
    """The environment of a process whose torch uses one thread: more would wait for each other in small networks."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(done: Done, *words: str) -> None:
    """Assert that a command ended with one line on stderr that holds these words, and with nothing on stdout."""
    assert done.code == 2
    lines = done.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]
    assert done.out == ""


# Help and lists


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(cli, command):
    done = cli(*command, "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Usage: ")
    assert "\x1b" not in done.out
    assert len(done.out.splitlines()) > 5


def test_help_names_every_axis_and_every_kind(cli):
    text = cli("run", "matrix", "--help").out
    for option in (
        *("attack", "defense", "model", "dataset", "threat", "images", "seeds", "floors"),
        *("suite", "scale", "threshold", "name", "out", "device", "chunk", "strict", "plugin"),
    ):
        assert f"--{option}" in text
    listing = cli("list", "--help").out
    assert all(re.search(rf"^  {kind} ", listing, re.M) for kind in (*KINDS, "suites"))


def test_the_version(cli):
    assert cli("--version") == Done(0, f"leakbench {leakbench.__version__}\n", "")


@pytest.mark.parametrize("kind", KINDS)
def test_lists_show_names_options_defaults_and_references(cli, kind):
    done = cli("list", kind)
    assert (done.code, done.err) == (0, "")
    blocks = dict(re.findall(r"^(\S+)\n((?: .*\n)+)", done.out, re.M))
    registry = KINDS[kind]
    assert list(blocks) == registry.names()
    for name, block in blocks.items():
        cls = registry.get(name)
        assert cls.summary()
        assert cls.summary() in block
        assert cls.reference in block
        for option in registry.fields(cls):
            assert re.search(rf"^      {option}: .+ \((required|default .+)\)$", block, re.M)
        if kind == "metrics":
            assert f"convention: {cls.convention}" in block


def test_a_list_writes_defaults_as_a_spec_does(cli):
    text = cli("list", "attacks").out
    assert re.search(r"^      steps: int >= 1 \(default 4000\)$", text, re.M)
    assert re.search(r"^      boxed: bool \(default true\)$", text, re.M)
    assert re.search(r"^      labels: joint \| analytic \(default analytic\)$", text, re.M)
    assert re.search(r"^      weights: .*none.* \(default none\)$", cli("list", "models").out, re.M)


def test_suites_and_threats(cli):
    table = cli("list", "suites").out
    assert re.search(r"^suite +crosses +scales\n", table)
    assert re.search(r"^quick +4 attacks, 7 defenses, 1 model and 1 dataset +–$", table, re.M)
    assert re.search(r"^curves .* cpu \(default\), smoke$", table, re.M)
    assert re.search(r"^quick\n    models: lenet", cli("list", "suites", "quick").out, re.M)
    assert (
        '    stage 2: lb(steps=200, secrets=optimise); threats: "informed=every"' in cli("list", "suites", "quick").out
    )
    refused(cli("list", "suites", "quik"), "'quik'", "quick")
    text = cli("list", "threats").out
    assert re.search(r"^known-label\n    The label is known\.$", text, re.M)
    assert text.count("An honest-but-curious server sees the shared gradient") == 1
    assert cli("list", "threats", "T4").out == f"T4\n    {PRESETS['T4'].describe()}\n"


def test_a_list_shows_one_component_or_one_line_for_each(cli):
    every = cli("list", "defenses").out
    card = cli("list", "defenses", "prune").out
    assert card.startswith("prune\n")
    assert card in every
    assert len(card) < len(every) / 5
    refused(cli("list", "defenses", "prunee"), "did you mean 'prune'")
    lines = cli("list", "attacks", "--short").out.splitlines()
    assert [line.split(":")[0] for line in lines] == attacks.registry.names()
    (line,) = cli("list", "attacks", "ig", "--short").out.splitlines()
    assert line == next(each for each in lines if each.startswith("ig:"))


# Runs


def test_a_run_from_options(cli, place):
    options = ("--images", 1, "--seeds", 2, "--defense", "noise(scale=0.02)", "--threat", "known-label")
    done = cli("run", "matrix", *SMALL, *options, "--out", "x", "--device", "cpu", "--chunk", 1, "--no-floors")
    assert (done.code, done.err) == (0, "")
    assert written(place)[:3] == ["x", "x/grids", f"x/grids/{sorted((place / 'x/grids').iterdir())[0].name}"]
    assert {"x/report.md", "x/results.csv", f"x/{FILE}"} <= set(written(place))
    results = pd.read_csv("x/results.csv")
    assert len(results) == 4
    assert set(results["defense"]) == {"none", "noise(scale=0.02)"}
    assert set(results["seed"]) == {0, 1}
    assert set(results["threat"]) == {"known-label"}
    assert set(results["status"]) == {"ok"}
    lines = done.out.splitlines()
    assert "\x1b" not in done.out
    assert "\r" not in done.out
    assert "4 trials" in lines
    assert sum(line.startswith("[") for line in lines) == 4
    assert any(line.startswith("[4/4] random against noise(scale=0.02), lenet on samples(size=12)") for line in lines)
    assert [line for line in lines if "assets fetch lpips" in line]
    assert lines[-1] == "report: x/report.md"
    assert any("random" in line and "noise" in line for line in lines[-12:])
    with Store.open(place / "x" / FILE, readonly=True) as store:
        (session,) = store.sessions()
    assert session.provenance.command.startswith("leakbench run matrix --attack random --defense none")
    assert "'noise(scale=0.02)'" in session.provenance.command

    again = cli("run", "matrix", *SMALL, *options, "--out", "x", "--device", "cpu", "--chunk", 1, "--no-floors")
    assert again.code == 0
    assert "4 trials, 4 of them done before" in again.out
    assert "[" not in "".join(line[0] for line in again.out.splitlines() if line)
    pd.testing.assert_frame_equal(pd.read_csv("x/results.csv"), results)


def test_floors_are_added(cli):
    assert cli("run", "matrix", *SMALL, "--images", 1, "--out", "x").code == 0
    assert set(pd.read_csv("x/results.csv")["attack"]) == {"random", "grey", "mean"}


TOML = """
name = "mine"
attacks = ["mean", "grey"]
defenses = ["none", "norm-only"]
models = ["lenet"]
datasets = ["samples(size=12)"]
threats = ["paper", { labels = "known" }]
images = [3, 5]
seeds = 1
floors = false
"""


def test_a_run_from_a_file_and_options_override_it(cli, place):
    (place / "m.toml").write_text(TOML)
    done = cli("run", "matrix", "m.toml")
    assert (done.code, done.err) == (0, "")
    results = pd.read_csv("runs/mine/results.csv")
    assert len(results) == 16
    assert set(results["image"]) == {3, 5}
    assert set(results["threat"]) == {"paper", "known-label"}

    done = cli("run", "matrix", "m.toml", "--attack", "random", "--images", "0,4", "--threat", "paper", "--name", "b")
    assert done.code == 0
    results = pd.read_csv("runs/b/results.csv")
    assert set(results["attack"]) == {"random"}
    assert set(results["defense"]) == {"none", "norm-only"}
    assert set(results["image"]) == {0, 4}
    assert set(results["threat"]) == {"paper"}
    assert "b" in (place / "runs/b/report.md").read_text().splitlines()[0]


def test_a_suite_by_name_with_options(cli, place):
    over = ("--attack", "mean", "--dataset", "samples(size=12)", "--images", 1)
    done = cli("run", "matrix", "--suite", "quick", *over)
    assert (done.code, done.err) == (0, "")
    suite = leakbench.Matrix(**load_suite("quick"))
    results = pd.read_csv("runs/quick/results.csv")
    assert set(results[results["attack"] == "mean"]["defense"]) == {defenses.spec(d) for d in suite.defenses}
    assert set(results["model"]) == {models.spec(model) for model in suite.models}


@pytest.mark.long
def test_the_worst_case_over_an_ensemble(cli, place):
    suite = ("--suite", "worst-case", "--scale", "smoke", "--dataset", "samples(size=12)", "--images", 1)
    over = ("--attack", "ig(steps=1)", "--attack", "ig(steps=2)", "--defense", "none", "--defense", "precode(k=6)")
    done = cli("run", "matrix", *suite, *over, "--threshold", 0)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == "report: runs/worst-case-smoke/worst-case.md"
    assert re.search(r"^\| none +\| ", done.out, re.M)
    results = pd.read_csv("runs/worst-case-smoke/results.csv")
    assert set(results["status"]) == {"ok"}
    rows = (place / "runs/worst-case-smoke/worst-case.md").read_text(encoding="utf-8").splitlines()
    for defense, informed in (("none", False), ("precode(k=6)", True)):  # the one states informed attackers
        met = "".join(row for row in rows if row.startswith(f"| {defense} "))
        assert all((f"informed={name}" in met) == informed for name in ("true", "splice", "omit")), defense
    (place / "runs/worst-case-smoke/worst-case.md").unlink()
    assert "runs/worst-case-smoke/worst-case.md" in cli("report", "runs/worst-case-smoke").out.splitlines()
    again = cli("run", "matrix", *suite, *over, "--threshold", 0)
    assert "[" not in "".join(line[0] for line in again.out.splitlines() if line)


def test_curves_over_noise_and_precision(cli, place):
    strengths = ("--defense", "quantise(bits=2)", "--defense", "quantise(bits=8)", "--defense", "none")
    small = ("--attack", "ig(steps=1)", "--dataset", "samples(size=12)", "--images", 1)
    done = cli("run", "curves", "--scale", "smoke", *small, *strengths)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == "report: runs/curves-smoke/curves.md"
    assert len(list((place / "runs/curves-smoke/grids").glob("curves-*.png"))) == 1
    refused(cli("run", "curves", "--out", "x", *small, "--defense", "none"), "fewer than 2", "relative=true")
    refused(cli("run", "curves", "--scale", "huge"), "'huge'", "cpu, smoke")
    (place / "m.toml").write_text(TOML)
    refused(cli("run", "curves", "m.toml", "--out", "x"), "fewer than 2")
    assert not (place / "x").exists()


def test_without_a_file_or_options_the_suite_quick_runs(cli, place, monkeypatch):
    seen = []

    def stop(matrix, out, options, progress, command):
        seen.append((matrix, out, options))
        raise leakbench.LeakbenchError("enough; this is a test")

    monkeypatch.setattr("leakbench.engine.run.run", stop)
    refused(cli("run", "matrix"), "enough")
    refused(cli("run", "matrix", "--suite", "quick", "--device", "cpu", "--strict"), "enough")
    (bare, out, options), (named, _, given) = seen
    assert bare == named == leakbench.Matrix(**load_suite("quick"))
    assert out == Path("runs/quick")
    assert (options.device, options.chunk, options.strict) == ("auto", None, False)
    assert (given.device, given.strict) == ("cpu", True)


@pytest.mark.parametrize("suite", ["curves", "sharing"])
def test_the_command_of_a_suite_runs_the_suite(cli, place, monkeypatch, suite):
    seen = []

    def stop(matrix, *_, **options):
        seen.append((matrix, options.get("strict")))
        raise leakbench.LeakbenchError("enough; this is a test")

    monkeypatch.setattr("leakbench.engine.run.run", stop)
    monkeypatch.setattr("leakbench.engine.run.check", stop)  # first, if there are several matrices
    options = ("--scale", "cpu", "--attack", "ig(steps=1)", "--dataset", "samples", "--images", 3, "--floors")
    refused(cli("run", suite, *options), "enough")
    refused(cli("run", "matrix", "--suite", suite, *options), "enough")
    assert seen[0] == seen[1]
    assert seen[0][0].name == {"curves": "curves", "sharing": "sharing-cpu"}[suite]
    assert seen[0][0].images == 3


# Bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--attack", "dlgg"), ["attack 'dlgg'", "did you mean 'dlg'?"]),
        (("--defense", "nois(scale=1)"), ["defense 'nois'", "did you mean 'noise'?"]),
        (("--model", "lenett"), ["model 'lenett'", "did you mean 'lenet'?"]),
        (("--dataset", "sample"), ["dataset 'sample'", "did you mean 'samples'?"]),
        (("--dataset", "zzz"), ["dataset 'zzz'", "known: ", "samples"]),
        (("--threat", "papr"), ["threat model 'papr'", "did you mean 'paper'?"]),
        (("--threat", "labels=unknown"), ["labels='unknown'", "inferred", "known"]),
        (("--threat", "label=known"), ["'label'", "did you mean 'labels'?"]),
        (("--threat", "reveals=key"), ["'key'", "not a secret"]),
        (("--attack", "ig(stepz=3)"), ["'ig'", "'stepz'", "did you mean 'steps'?"]),
        (("--attack", "ig(steps=many)"), ["'ig'", "steps='many'", "integer"]),
        (("--attack", "ig(steps=0)"), ["'ig'", "steps='0'", "1"]),
        (("--attack", "ig(steps"), ["'ig(steps'"]),
        (("--attack", "ig(steps=1, steps=2)"), ["'steps'", "twice"]),
        (("--attack", "ig(3)"), ["'3'", "option=value"]),
        (("--attack", ""), ["attack", "''"]),
        (("--defense", "noise(scale=-1)"), ["'noise'", "scale='-1'"]),
        (("--defense", "noise(scale=0.1, kind=cauchy)"), ["kind='cauchy'", "gaussian", "laplace"]),
        (("--dataset", "samples(size=12.5)"), ["'samples'", "size='12.5'"]),
        (("--dataset", "mnist"), ["'mnist'", "leakbench assets fetch mnist"]),
        (("--model", "lenet(weights=none-such.pt)"), ["none-such.pt"]),
        (("--images", "many"), ["--images 'many'", "0,3,5"]),
        (("--images", "0"), ["images=0"]),
        (("--images", "-1"), ["images=-1"]),
        (("--images", "2,-1"), ["images"]),
        (("--images", "65"), ["index 64", "samples", "0 to 63"]),
        (("--images", "1,100000"), ["index 100000", "samples", "0 to 63"]),
        (("--seeds", "x"), ["--seeds 'x'"]),
        (("--seeds", "-3"), ["seeds=-3"]),
        (("--device", "tpu"), ["'tpu'", "cpu"]),
        (("--suite", "quik"), ["'quik'", "quick"]),
        (("--threshold", "1.5"), ["threshold='1.5'", "less than or equal to 1"]),
        (("--threshold", "-0.1"), ["threshold='-0.1'", "greater than or equal to 0"]),
        (("--threshold", "nan"), ["threshold='nan'", "finite"]),
        (("--threshold", "most"), ["threshold='most'", "valid number"]),
        (("--plugin", "none.py"), ["'none.py'", "does not exist"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options_are_one_line_and_write_nothing(cli, place, change, words):
    given = dict(zip(SMALL[::2], SMALL[1::2]))
    given |= dict([change])
    refused(cli("run", "matrix", *(part for pair in given.items() for part in pair)), *words)
    assert written(place) == []


def test_a_defense_without_an_adaptive_attacker_is_one_line(cli, place):
    refused(cli("run", "matrix", *SMALL, "--attack", "dlg", "--threat", "informed=true"), "'none'", "informed=false")
    assert written(place) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_absent_is_one_line(cli, place):
    refused(cli("run", "matrix", *SMALL, "--device", "cuda"), "'cuda'", "--device cpu")
    assert written(place) == []


@pytest.mark.parametrize("axis", ["attack", "defense", "model", "dataset"])
def test_an_axis_that_is_not_given_is_that_of_quick_and_named(capsys, axis):
    given = {key[2:]: [value] for key, value in zip(SMALL[::2], SMALL[1::2]) if key[2:] != axis}
    (plan,) = MatrixOptions(**given).matrices()
    quick = load_suite("quick")
    if axis == "attack":
        stages = [[attack.name for attack in stage.attacks] for stage in plan.stages]
        assert stages == [[spec.split("(")[0] for spec in stage["attacks"]] for stage in quick["stages"]]
        usual = list(dict.fromkeys(attack for stage in quick["stages"] for attack in stage["attacks"]))
    else:
        usual = quick[f"{axis}s"]
        assert [component.name for component in getattr(plan, f"{axis}s")] == [spec.split("(")[0] for spec in usual]
    assert all(len(getattr(plan, f"{name}s")) == 1 for name in given)
    said = capsys.readouterr().err
    assert said == f"not given, and taken from the suite quick: {axis}s {', '.join(usual)}\n"


def test_another_matrix_in_the_same_folder_is_named(cli, place):
    assert cli("run", "matrix", *SMALL, "--name", "one").code == 0
    again = cli("run", "matrix", *SMALL, "--name", "one")
    assert "another matrix" not in again.err
    changed = [{"grey": "mean"}.get(word, word) for word in SMALL]
    other = cli("run", "matrix", *changed, "--images", "1", "--seeds", "3,", "--name", "one")
    assert re.search(r"^note: runs/one already has \d+ trials? of another matrix, .*--out FOLDER", other.err, re.M)
    stated = cli("run", "matrix", *changed, "--images", "1", "--seeds", "4,", "--name", "one", "--out", "runs/one")
    assert "another matrix" not in stated.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("attacks = [", ["m.toml", "not TOML"]),
        ("\x00", ["m.toml", "not TOML"]),
        (TOML + "atacks = []", ["'atacks'", "did you mean 'attacks'?"]),
        (TOML.replace('"mean", "grey"', '"mena"'), ["'mena'", "did you mean 'mean'?"]),
        (TOML.replace('"mean", "grey"', "3"), ["attack 3"]),
        (TOML.replace('["mean", "grey"]', "[]"), ["attacks is empty"]),
        (TOML.replace("[3, 5]", '"two"'), ["images='two'"]),
        (TOML.replace("[3, 5]", "[]"), ["images"]),
        (TOML.replace("seeds = 1", "seeds = 0"), ["seeds=0"]),
        (TOML.replace("floors = false", 'floors = "perhaps"'), ["floors='perhaps'"]),
        (TOML.replace('labels = "known"', 'label = "known"'), ["'label'", "'labels'"]),
        (TOML.replace('{ labels = "known" }', "7"), ["threat 7"]),
        (TOML.replace('name = "mine"', "name = 3"), ["name=3"]),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_a_bad_file_is_one_line(cli, place, text, words):
    (place / "m.toml").write_text(text)
    refused(cli("run", "matrix", "m.toml"), *words)
    assert written(place) == ["m.toml"]


def test_bad_files_and_folders_are_one_line(cli, place):
    (place / "m.toml").write_text(TOML)
    (place / "latin").write_bytes("name = 'ü'".encode("latin-1"))
    (place / "file").write_text("mine")
    before = written(place)
    refused(cli("run", "matrix", "none.toml"), "'none.toml'", "No such file")
    refused(cli("run", "matrix", place), "Is a directory")
    refused(cli("run", "matrix", "latin"), "'latin'", "UTF-8")
    refused(cli("run", "matrix", "m.toml", "--suite", "quick"), "'m.toml'", "'quick'", "give one")
    refused(cli("run", "matrix", "m.toml", "--out", "file"), "file")
    refused(cli("run", "matrix", "m.toml", "--out", "file/x"), "file")
    assert written(place) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "matrix", "--chunk", "0"),
        ("run", "matrix", "--chunk", "few"),
        ("run", "matrix", "--atack", "ig"),
        ("run", "matrix", "a.toml", "b.toml"),
        ("run", "matrices"),
        ("list", "nothing"),
        ("report",),
        ("nothing",),
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2(cli, place, arguments):
    done = cli(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert written(place) == []


# Reports


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    axes = {"attacks": ["mean"], "defenses": ["none"], "models": ["lenet"], "datasets": ["samples(size=12)"]}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LEAKBENCH_HOME", str(folder / "cache"))
        leakbench.run(leakbench.Matrix(name="done", images=2, **axes), folder / "run", device="cpu")
    return folder / "run"


def test_a_report_of_a_run(cli, place, finished):
    shutil.copytree(finished, place / "x")
    assert written(place) == ["x", f"x/{FILE}"]
    before = (place / "x" / FILE).read_bytes()
    done = cli("report", "x", "--format", "csv")
    assert done == Done(0, "x/results.csv\n", "")
    assert written(place) == ["x", "x/results.csv", f"x/{FILE}"]
    done = cli("report", "x", "--format", "md")
    assert (done.code, done.err) == (0, "")
    assert "x/report.md" in done.out.splitlines()
    done = cli("report", "x")
    for line in done.out.splitlines():
        assert (place / line).is_file()
    assert {"x/report.md", "x/results.csv"} < set(done.out.splitlines())
    assert (place / "x" / FILE).read_bytes() == before


def test_a_report_that_cannot_be_made_is_one_line(cli, place, finished):
    shutil.copytree(finished, place / "x")
    (place / "foreign").mkdir()
    (place / "foreign" / FILE).write_text("a text of some length")
    (place / "empty").mkdir()
    before = written(place)
    refused(cli("report", "x", "--format", "pdf"), "'pdf'", "md, csv")
    refused(cli("report", "none"), f"none/{FILE}")
    refused(cli("report", "empty"), f"empty/{FILE}")
    refused(cli("report", "foreign"), f"foreign/{FILE}", "not an SQLite file")
    refused(cli("report", f"x/{FILE}"), FILE)
    refused(cli("run", "matrix", *SMALL, "--out", "foreign"), f"foreign/{FILE}", "not an SQLite file")
    assert written(place) == before


# Disk


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let no file grow beyond this many bytes: what a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_the_run_is_resumed_later(cli, place):
    arguments = ("run", "matrix", *SMALL, "--no-floors", "--images", 20, "--chunk", 2, "--out", "x")
    with files_up_to(250_000):
        done = cli(*arguments)
    assert done.code == 2
    assert re.fullmatch(rf"error: x/{re.escape(FILE)}: .*resume.*\n", done.err)
    with Store.open(place / "x" / FILE, readonly=True) as store:
        before = store.done()
    assert 0 < len(before) < 20
    done = cli(*arguments)
    assert (done.code, done.err) == (0, "")
    assert f"20 trials, {len(before)} of them done before" in done.out
    assert len(pd.read_csv("x/results.csv")) == 20


def test_a_report_that_does_not_fit_the_disk_is_one_line(cli, place, finished):
    shutil.copytree(finished, place / "x")
    with files_up_to(100):
        done = cli("report", "x")
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"error: x/\S+ cannot be written: .*\n", done.err)
    assert written(place / "x") == [FILE]


# Processes


HELP = """
import sys, leakbench, leakbench.cli.main
heavy = {'torch', 'pandas', 'numpy', 'matplotlib', 'pydantic', 'skimage', 'lpips'}
assert not heavy & set(sys.modules), 'import'
for command in ('--help', 'run matrix --help', 'check --help'):
    sys.argv = ['leakbench', *command.split()]
    try:
        leakbench.cli.main.main()
    except SystemExit as end:
        assert not end.code, end
    heavy = {'torch', 'pandas', 'numpy', 'matplotlib', 'scipy', 'ray'} | (heavy if command == '--help' else set())
    assert not heavy & set(sys.modules), command
"""


def test_help_and_import_need_no_torch():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Usage: leakbench") == 3


def test_the_console_script_tells_errors_in_one_line(place):
    done = subprocess.run([SCRIPT, "assets", "fetch", "none"], capture_output=True, text=True)  # needs no torch
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: .*'none'.*\n", done.stderr)


SLOW = """
import time

from leakbench import Defense, defenses


@defenses.register("slow")
class Slow(Defense):
    '''Takes its time.'''

    def release(self, step, rng):
        time.sleep(0.15)
        return step.gradient()
"""


@pytest.mark.long
def test_ctrl_c_ends_with_the_line_that_goes_on(place):
    (place / "slow.py").write_text(SLOW)
    given = dict(zip(SMALL[::2], SMALL[1::2])) | {"--defense": "slow", "--images": "40", "--chunk": "2"}
    given |= {"--plugin": "slow.py", "--out": "a run"}
    arguments = ["run", "matrix", "--no-floors", *(part for pair in given.items() for part in pair)]
    running = subprocess.Popen(
        [SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=one_thread(PYTHONUNBUFFERED="1"),
        # a shell lets what it starts in the background ignore the signal, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in running.stdout:
            if line.startswith("["):
                running.send_signal(signal.SIGINT)
                break
        out, err = running.communicate(timeout=120)
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == 130
    (told,) = re.findall(r"^stopped: (\d+) of 40 trials are done; to resume: (leakbench run matrix .*)\n$", err)
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    with Store.open(place / "a run" / FILE, readonly=True) as store:
        assert len(store.done()) == int(told[0]) > 0
    assert written(place / "a run") == [FILE]
    assert told[1].startswith(f"{SCRIPT.name} {' '.join(arguments[:3])}")
    assert "--out 'a run'" in told[1]


# Scales, rows and the key-lock study


ROWS = """
attacks = ["random"]
models = ["lenet"]
datasets = ["samples(size=12)"]
floors = false
rows = [{ defenses = ["none"] }, { defenses = ["keylock(length=5)"], threats = ["T1", "T5"] }]
[scale.smoke]
images = 1
[scale.full]
images = 20
"""


def test_a_scale_of_a_matrix_runs_all_its_rows_into_one_folder(cli, place):
    (place / "m.toml").write_text(ROWS)
    done = cli("run", "matrix", "m.toml", "--scale", "smoke", "--out", "x", "--device", "cpu")
    assert (done.code, done.err) == (0, "")
    assert "matrix 1 of 2: 1 trial" in done.out
    assert "matrix 2 of 2: [2/2] random against keylock(length=5), lenet on samples(size=12)" in done.out
    results = pd.read_csv("x/results.csv")
    found = list(zip(results["defense"], results["threat"], results["image"]))
    assert sorted(found) == [("keylock(length=5)", "T1", 0), ("keylock(length=5)", "T5", 0), ("none", "paper", 0)]
    done = cli("run", "matrix", "m.toml", "--scale", "smoke", "--images", 2, "--out", "x", "--device", "cpu")
    assert done.code == 0
    assert len(pd.read_csv("x/results.csv")) == 6
    refused(cli("run", "matrix", "m.toml"), "--scale (smoke, full)")
    refused(cli("run", "matrix", "m.toml", "--scale", "big"), "'big'", "known: smoke, full")
    refused(cli("run", "matrix", *SMALL, "--scale", "cpu"), "'cpu'", "it has none")


@pytest.mark.long
def test_the_study_of_sharing_writes_its_own_report(cli, place):
    options = ("--attack", "ig(steps=2)", "--dataset", "samples(size=12)", "--images", 1, "--device", "cpu")
    done = cli("run", "sharing", *options, "--out", "x")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == "report: x/sharing.md"
    text = (place / "x/sharing.md").read_text()
    for arm in ("none", "norm-only", "nothing", "nothing, lock weights known", "key", "lock", "lock, key derived"):
        assert f"| {arm} " in text
    assert "x/grids/sharing-001-samples-size-12-lenet-ig-steps-2.png" in written(place)
    (place / "x/sharing.md").unlink()
    assert "x/sharing.md" in cli("report", "x").out.splitlines()
    assert (place / "x/sharing.md").read_text() == text
    compared = cli("report", "x", "--compare", "paper")
    assert (compared.code, compared.err) == (0, "")
    assert compared.out.splitlines()[-1] == "x/paper.md"
    assert "not in this run" in (place / "x/paper.md").read_text()
    refused(cli("run", "sharing", "--scale", "big"), "'big'", "known: smoke, cpu, full")
    assert cli("report", "x", "--compare", "other").code == 2


def test_an_error_that_nobody_foresaw_has_a_code_of_its_own(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("leakbench.report.show.show", broken)
    shutil.copy(Path(__file__).parent / "schemas" / "2.sqlite", FILE)
    done = cli("show", ".", "a")
    assert (done.code, done.out) == (70, "")
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("error: ZeroDivisionError: by zero; this is a bug")


def test_what_a_folder_of_trainings_has_no_page_of_is_refused(
    cli, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "trained").mkdir()
    monkeypatch.setattr("leakbench.report.accuracy.trained", lambda out: True)
    for option in (("--figures",), ("--format", "html")):
        refused(cli("report", "trained", *option), f"{option[0]} is of a run of attacks")
