"""Components from elsewhere: an installed package, a file, and every example of CONTRIBUTING.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from test_cli import KINDS, SCRIPT, cli, one_thread, place, refused, written  # noqa: F401

from leakbench import Matrix, datasets, defenses
from leakbench.core.registry import load_plugin

PACKAGE = Path(__file__).parent / "plugin"
GUIDE = Path(__file__).parent.parent / "CONTRIBUTING.md"
MEMBERS = {
    "attacks": "first-layer",
    "defenses": "signs",
    "models": "softmax",
    "datasets": "dots",
    "metrics": "worst_pixel",
}


# An installed package


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the example package was installed, without a network."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    flags = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *flags, "--target", folder / "site", folder / "source"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "site"


COMMANDS = """
import sys
from leakbench.cli.main import app
for kind in sys.argv[1].split():
    print("##", kind)
    app(["list", kind], standalone_mode=False)
print("## run")
app(sys.argv[2:], standalone_mode=False)
"""


@pytest.fixture(scope="module")
def crossed(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a process with the package says of each kind and of a run, and the folder of the run."""
    axes = ["--attack", "first-layer", "--attack", "ig(steps=2)", "--defense", "none", "--defense", "signs"]
    axes += ["--defense", "keylock(length=9)", "--model", "softmax", "--model", "lenet", "--dataset", "dots"]
    command = ["run", "matrix", *axes, "--images", "2", "--no-floors", "--out", "x"]
    folder = tmp_path_factory.mktemp("crossed")
    path = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, " ".join(MEMBERS), *command],
        capture_output=True,
        text=True,
        env=one_thread(PYTHONPATH=path),
        cwd=folder,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, folder / "x"


@pytest.mark.long
def test_an_installed_package_is_listed(crossed):
    parts = dict(re.findall(r"^## (\w+)\n((?:(?!## ).*\n)+)", crossed[0], re.M))
    assert list(parts) == [*MEMBERS, "run"]
    for kind, name in MEMBERS.items():
        names = re.findall(r"^(\S+)$", parts[kind], re.M)
        assert names.count(name) == 1
        shipped = {name for name in KINDS[kind].names() if KINDS[kind].get(name).__module__.startswith("leakbench.")}
        assert shipped < set(names)
    assert (
        "signs\n    Send nothing of each gradient entry but its sign.\n      scale: float > 0 (default 1.0)\n"
        in (parts["defenses"])
    )
    assert "reference: Bernstein et al. 2018, signSGD, ICML" in parts["defenses"]


@pytest.mark.long
def test_an_installed_package_is_crossed_with_everything(crossed, cli, place):  # noqa: F811
    shutil.copytree(crossed[1], "x")
    results = pd.read_csv("x/results.csv").set_index(["model", "defense", "attack", "dataset"]).sort_index()
    status = results.groupby(level=["model", "defense", "attack"])["status"].unique().map(list).to_dict()
    assert status["softmax", "none", "first-layer"] == ["ok"]
    assert status["softmax", "signs", "first-layer"] == ["ok"]
    assert status["lenet", "none", "first-layer"] == ["unsupported"]
    assert status["softmax", "keylock(length=9)", "ig(steps=2)"] == ["unsupported"]
    assert set(results.index.get_level_values("dataset")) == {"dots"}
    scored = results[results["status"].isin(["ok", "failed"])]
    assert scored["worst_pixel"].between(0, 1).all()
    # one linear layer and one image: the gradient is the image
    exact = results.xs(("softmax", "none", "first-layer"), level=("model", "defense", "attack"))
    assert (exact["worst_pixel"] < 1e-4).all()
    assert (exact["psnr"] > 80).all()
    signs = results.xs(("softmax", "signs", "first-layer"), level=("model", "defense", "attack"))
    assert (signs["worst_pixel"] > 0.1).all()
    report = Path("x/report.md").read_text()
    for name in MEMBERS.values():
        assert name.replace("_", r"\_") in report or name in report
    assert "0 is exact, 1 the worst" in report

    # the run can be read where the package is not installed
    for file in ("report.md", "results.csv"):
        Path("x", file).rename(file)
    done = cli("report", "x")
    assert (done.code, done.err) == (0, "")
    for file in ("report.md", "results.csv"):
        assert Path("x", file).read_text() == Path(file).read_text()


@pytest.mark.long
def test_an_installed_package_that_does_not_import_is_named(tmp_path, place):  # noqa: F811
    info = tmp_path / "site" / "broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[leakbench.defenses]\nmine = broken_plugin\n")
    (tmp_path / "site" / "broken_plugin.py").write_text("raise RuntimeError('not\\ntoday')\n")
    done = subprocess.run(
        [SCRIPT, "list", "defenses"],
        capture_output=True,
        text=True,
        env=one_thread(PYTHONPATH=str(tmp_path / "site")),
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"error: the plugin 'broken_plugin' .*'mine'.* not today; repair or uninstall it\n", done.stderr
    )


# A file


TOPK = re.search(r"```python\n(.*?TopK.*?)```", GUIDE.read_text(encoding="utf-8"), re.S).group(1)


def test_a_file_outside_the_repository(cli, place, tmp_path):  # noqa: F811
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    (elsewhere / "topk.py").write_text(TOPK)
    plugin = ("--plugin", elsewhere / "topk.py")
    assert "topk" not in cli("list", "defenses").out.splitlines()
    done = cli("list", "defenses", *plugin)
    assert (done.code, done.err) == (0, "")
    (block,) = re.findall(r"^topk\n((?: .*\n)+)", done.out, re.M)
    assert block.startswith("    Send only the largest share of the entries")
    assert "      keep: float > 0, <= 1 (default 0.1)\n" in block
    assert "    reference: Aji and Heafield 2017" in block

    axes = ("--attack", "random", "--defense", "none", "--defense", "topk", "--defense", "topk(keep=0.01)")
    axes += ("--model", "lenet", "--dataset", "samples(size=12)", "--images", 2, "--no-floors", "--out", "x")
    done = cli("run", "matrix", *axes, *plugin)
    assert (done.code, done.err) == (0, "")
    results = pd.read_csv("x/results.csv")
    assert results.groupby("defense")["status"].unique().map(list).to_dict() == {
        "none": ["ok"],
        "topk": ["ok"],
        "topk(keep=0.01)": ["ok"],
    }
    report = Path("x/report.md").read_text()
    assert "topk(keep=0.01)" in report
    refused(cli("run", "matrix", *axes, *plugin, "--defense", "topk(keep=2)"), "'topk'", "keep='2'", "1")


def test_topk_sends_the_largest_share(place, tmp_path):  # noqa: F811
    import torch

    from leakbench import observe

    (tmp_path / "topk.py").write_text(TOPK)
    load_plugin(tmp_path / "topk.py")
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(100, 5))
    image = torch.rand(1, 1, 10, 10, generator=torch.Generator().manual_seed(1))
    label = torch.tensor([2])
    whole = observe(network, image, label).gradient
    part = observe(network, image, label, defense="topk(keep=0.02)").gradient
    assert part.keys() == whole.keys()
    for name, value in part.items():
        kept = value != 0
        assert int(kept.sum()) == max(1, round(0.02 * value.numel()))
        assert torch.equal(value[kept], whole[name][kept])
        assert float(whole[name][~kept].abs().max()) <= float(value[kept].abs().min())


BROKEN = {
    "syntax": ("def f(:\n", ["SyntaxError", "line 1"]),
    "exception": ("raise KeyError('gone')\n", ["KeyError", "gone"]),
    "import": ("import no_such_module\n", ["ModuleNotFoundError", "no_such_module"]),
    "attribute": ("from leakbench import NoSuchThing\n", ["ImportError", "NoSuchThing"]),
    "duplicate": (TOPK.replace('"topk"', '"noise"'), ["'noise' is registered twice", "leakbench.defenses.noise"]),
    "base": ('from leakbench import defenses\n\n@defenses.register("x")\nclass X:\n    pass\n', ["'x'", "Defense"]),
    "kind": (TOPK.replace("@defenses", "@attacks").replace("Step, defenses", "Step, attacks"), ["'topk'", "Attack"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_line(cli, place, tmp_path, case):  # noqa: F811
    text, words = BROKEN[case]
    (tmp_path / "broken.py").write_text(text)
    axes = ("--attack", "random", "--defense", "none", "--model", "lenet", "--dataset", "samples")
    refused(cli("run", "matrix", *axes, "--plugin", tmp_path / "broken.py"), "broken.py", *words)
    refused(cli("list", "defenses", "--plugin", tmp_path / "broken.py"), "broken.py", *words)
    assert written(place) == []


LABEL_ONLY = re.search(r"```python\n(import torch\n.*?LabelOnly.*?)```", GUIDE.read_text(encoding="utf-8"), re.S).group(
    1
)


@pytest.mark.long
def test_an_attack_that_overrides_call_still_runs(cli, place):  # noqa: F811
    """As attacks were written before they defined ``run``: one line says what to rename."""
    Path("new.py").write_text(LABEL_ONLY.replace("label-only", "new"))
    Path("old.py").write_text(LABEL_ONLY.replace("label-only", "old").replace("def run(", "def __call__("))
    tables = []
    for file in ("new", "old"):
        axes = ("--attack", file, "--defense", "none", "--model", "lenet", "--dataset", "samples(size=12)")
        out = ("--images", 2, "--no-floors", "--plugin", f"{file}.py", "--out", file)
        done = cli("run", "matrix", *axes, *out)
        note = "note: class LabelOnly overrides __call__; rename it to run\n"
        assert (done.code, done.err) == (0, note if file == "old" else "")
        tables.append(pd.read_csv(f"{file}/results.csv").drop(columns=["trial", "attack", "seconds"]))
    pd.testing.assert_frame_equal(*tables)
    sub = LABEL_ONLY + "\n\nclass Sub(LabelOnly):\n    def __call__(self, seen, rng):\n        return "
    helper = "self.base(seen, rng)\n\n    def base(self, seen, rng):\n        return "
    for before in ("", helper):
        Path("super.py").write_text(f"{sub}{before}super().__call__(seen, rng)\n")
        words = "calls it of another attack; rename both to run"
        refused(cli("list", "attacks", "--plugin", "super.py"), "class Sub", words)


@pytest.mark.long
def test_an_attack_whose_mixin_has_call_still_runs(cli, place):  # noqa: F811
    mixin = "class Mixin:\n    __call__ = LabelOnly.run\n\n\n"
    attack = '@attacks.register("mixed")\nclass Mixed(Mixin, Attack):\n    """The same."""\n'
    Path("mixed.py").write_text(f"{LABEL_ONLY}    _none = None\n\n\n{mixin}{attack}    _bias = LabelOnly._bias\n")
    axes = ("--attack", "mixed", "--defense", "none", "--model", "lenet", "--dataset", "samples(size=12)")
    done = cli("run", "matrix", *axes, "--images", 1, "--no-floors", "--plugin", "mixed.py", "--out", "mixed")
    assert (done.code, done.err) == (0, "note: class Mixed overrides __call__; rename it to run\n")
    assert list(pd.read_csv("mixed/results.csv")["status"]) == ["ok"]


UNDO = """
    informed = "ignores the zeros"

    def undo(self, observed, weights):
        return {name: value.where(value != 0, float("nan")) for name, value in observed.items()}
"""


@pytest.mark.parametrize("mixin", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_defense_that_has_the_hooks_of_an_attacker_still_runs(cli, place, mixin):  # noqa: F811
    """As defenses were written before ``AdaptiveAttacker``; one line says what to change."""
    stated = "{'default': leakbench.AdaptiveAttacker('ignores the zeros', undo=undo)}"
    top = f"import leakbench\n\ndef undo{UNDO.partition('def undo')[2].replace('self, ', '')}\n\n{TOPK}"
    new = f"{top}\n    def attackers(self):\n        return {stated}\n"
    Path("new.py").write_text(new.replace('"topk"', '"new"'))
    old = TOPK.replace("(Defense)", "(Mixin, Defense)").replace("@defenses", f"class Mixin:{UNDO}\n\n@defenses", 1)
    Path("old.py").write_text((old if mixin else TOPK + UNDO).replace('"topk"', '"old"'))
    tables = []
    for file in ("new", "old"):
        axes = ("--attack", "lb(steps=3)", "--defense", file, "--model", "lenet", "--dataset", "samples(size=12)")
        more = ("--threat", "informed=true", "--images", 1, "--no-floors", "--plugin", f"{file}.py", "--out", file)
        done = cli("run", "matrix", *axes, *more)
        note = "note: class TopK defines informed, undo; return an AdaptiveAttacker from attackers() instead\n"
        assert (done.code, done.err) == (0, note if file == "old" else "")
        tables.append(pd.read_csv(f"{file}/results.csv").drop(columns=["trial", "defense", "seconds"]))
    pd.testing.assert_frame_equal(*tables)
    assert list(tables[0]["status"]) == ["ok"]


OLD = {
    "relax": (
        TOPK + "\n    def relax(self, model, hidden):\n        return model\n",
        ["class TopK", "relax", "attackers()"],
    ),
    "attackers": (
        TOPK + "\n    informed = 'x'\n\n    def attackers(self):\n        return {'other': self}\n",
        ["class TopK", "informed", "AdaptiveAttacker"],
    ),
    "module": ("from leakbench.types import Gradient\n", ["leakbench.types has moved", "leakbench.core.types"]),
    "package": ("from leakbench.store import Store\n", ["leakbench.store has moved", "leakbench.store.run_file"]),
}


@pytest.mark.parametrize("case", OLD)
def test_a_plugin_of_old_is_told_what_to_change(cli, place, case):  # noqa: F811
    text, words = OLD[case]
    Path("old.py").write_text(text)
    refused(cli("list", "defenses", "--plugin", "old.py"), "old.py", *words)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("attackers(self):\n        return {'default': leakbench.AdaptiveAttacker(None)}", "description is None"),
        ("note(self):\n        return None", "note() returned None"),
    ],
)
def test_a_statement_that_is_no_text_is_one_line(cli, place, method, words):  # noqa: F811
    """A run file with it could not be read again."""
    Path("mute.py").write_text(f"import leakbench\n{TOPK}\n    def {method}\n")
    axes = ("--attack", "random", "--defense", "topk", "--model", "lenet", "--dataset", "samples")
    refused(cli("run", "matrix", *axes, "--plugin", "mute.py", "--out", "run"), words)
    assert written(place) == ["mute.py"]


@pytest.mark.parametrize("name", ["'every'", "'False'", "True"])
def test_the_name_of_an_attacker_is_no_value_of_informed(cli, place, name):  # noqa: F811
    """``informed`` in a threat model could not ask for it."""
    method = f"attackers(self):\n        return {{{name}: leakbench.AdaptiveAttacker('x')}}\n"
    Path("named.py").write_text(f"import leakbench\n{TOPK}\n    def {method}")
    axes = ("--attack", "random", "--defense", "topk", "--model", "lenet", "--dataset", "samples")
    refused(cli("run", "matrix", *axes, "--plugin", "named.py", "--out", "run"), "named", name, "choose another name")
    assert written(place) == ["named.py"]


@pytest.mark.parametrize("returned", ['{"other": self}', "None", '{"default": "topk"}'])
def test_attackers_that_are_no_adaptive_attackers_are_one_line(cli, place, returned):  # noqa: F811
    Path("old.py").write_text(f"{TOPK}\n    def attackers(self):\n        return {returned}\n")
    words = ("defense 'topk'", "attackers() returned", "return AdaptiveAttacker objects by name")
    done = cli("list", "defenses", "--plugin", "old.py")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert all(word in done.err for word in words)
    axes = ("--attack", "random", "--defense", "topk", "--model", "lenet", "--dataset", "samples")
    for threat in ("informed=false", "informed=true", "informed=every"):
        refused(cli("run", "matrix", *axes, "--threat", threat, "--plugin", "old.py", "--out", "run"), *words)
    assert written(place) == ["old.py"]


def test_a_file_that_is_missing_or_no_python_is_one_line(cli, place, tmp_path):  # noqa: F811
    refused(cli("list", "attacks", "--plugin", "none.py"), "'none.py'", "does not exist")
    refused(cli("list", "attacks", "--plugin", tmp_path), str(tmp_path), "does not exist")
    (tmp_path / "text").write_text("x = 1\n")
    refused(cli("list", "attacks", "--plugin", tmp_path / "text"), "text", "must end in .py")


# CONTRIBUTING.md


BLOCKS = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.S | re.M)
ADAPTIVE = next(block for block in BLOCKS if "AdaptiveAttacker(" in block)
EXAMPLES = "\n\n".join(block for block in BLOCKS if block != ADAPTIVE)
NAMES = dict(re.findall(r'^@(\w+)\.register\("(.+)"\)$', EXAMPLES, re.M))


def test_the_guide_has_one_example_of_each_kind():
    assert len(BLOCKS) == 6, "and a defense with an adaptive attacker"
    assert set(NAMES) == set(MEMBERS)
    assert 15 <= len(TOPK.split("\n\n\n", 1)[1].strip().splitlines()) <= 22


@pytest.mark.parametrize("kind", NAMES)
def test_every_example_of_the_guide_runs(cli, place, kind):  # noqa: F811
    (code,) = (block for block in BLOCKS if f"@{kind}.register" in block and block != ADAPTIVE)
    (place / "example.py").write_text(code)
    name = NAMES[kind]
    done = cli("list", kind, "--plugin", "example.py")
    assert (done.code, done.err) == (0, "")
    assert name in done.out.splitlines()

    given = {"attacks": "mean", "defenses": "none", "models": "lenet", "datasets": "samples"}
    given |= {kind: name} if kind in given else {}
    axes = [part for axis, value in given.items() for part in (f"--{axis.rstrip('s')}", value)]
    done = cli("run", "matrix", *axes, "--images", 2, "--no-floors", "--plugin", "example.py", "--out", "x")
    assert (done.code, done.err) == (0, "")
    results = pd.read_csv("x/results.csv")
    assert list(results["status"]) == ["ok", "ok"]
    assert results["psnr"].notna().all()
    report = Path("x/report.md").read_text()
    assert name in report or name.replace("_", r"\_") in report
    if kind == "metrics":
        assert results[name].between(0, 1).all()
    else:
        assert set(results[kind.rstrip("s")]) == {name}
    if kind == "attacks":
        assert (results["label_correct"] == 1).all()


def test_the_adaptive_attacker_of_the_guide(cli, place):  # noqa: F811
    assert len(ADAPTIVE.strip().splitlines()) <= 40
    Path("unit.py").write_text(ADAPTIVE)
    listed = cli("list", "defenses", "--plugin", "unit.py").out
    assert "adaptive attack (informed=true): scales each tensor of the dummy gradient to length 1\n" in listed
    axes = ("--attack", "lb(steps=60)", "--defense", "unit-length", "--model", "lenet", "--dataset", "samples(size=12)")
    threats = ("--threat", "paper", "--threat", "informed=true", "--images", 2, "--no-floors")
    done = cli("run", "matrix", *axes, *threats, "--plugin", "unit.py", "--out", "x")
    assert (done.code, done.err) == (0, "")
    results = pd.read_csv("x/results.csv").set_index(["threat", "image"])
    assert set(results["status"]) == {"ok"}
    assert (results.loc["informed=true", "psnr"] > results.loc["paper", "psnr"] + 3).all(), "knowing of it helps"


def test_the_examples_of_the_guide_meet_each_other(cli, place):  # noqa: F811
    (place / "examples.py").write_text(EXAMPLES)
    load_plugin("examples.py")
    axes = [part for kind, name in NAMES.items() if kind != "metrics" for part in (f"--{kind.rstrip('s')}", name)]
    done = cli("run", "matrix", *axes, "--images", 4, "--out", "x", "--name", "all")
    assert (done.code, done.err) == (0, "")
    results = pd.read_csv("x/results.csv")
    assert set(results["status"]) == {"ok"}
    assert results["max_error"].between(0, 1).all()
    matrix = Matrix(attacks=["mean"], defenses=["topk"], models=["lenet"], datasets=["stripes(size=8)"])
    stripes = matrix.datasets[0]
    images, labels = stripes.load(range(len(stripes)))
    assert len({image.numpy().tobytes() for image in images}) == len(stripes) == 8
    assert labels.tolist() == [0, 1] * 4
    assert datasets.spec(stripes) == "stripes(size=8)"
    assert defenses.spec(matrix.defenses[0]) == "topk"


def test_the_commands_of_the_guide_exist(cli):  # noqa: F811
    text = GUIDE.read_text(encoding="utf-8")
    makefile = GUIDE.with_name("Makefile").read_text()
    for target in set(re.findall(r"\bmake ([a-z-]+)\b", text)) - {"says"}:
        assert re.search(rf"^{target}:", makefile, re.M), target
    options = set(re.findall(r"(--[a-z]+)", text))
    shown = cli("run", "matrix", "--help").out + cli("list", "defenses", "--help").out
    tools = ("benchmarks/scale/__main__.py", "benchmarks/recheck.py", "tools/fuzz.py")
    shown += "".join((GUIDE.parent / tool).read_text() for tool in tools)
    assert options
    assert all(option in shown for option in options)
    for path in re.findall(r"`((?:leakbench|tests)/[\w/.]+)`", text):
        assert (GUIDE.parent / path).exists() or path.endswith("topk.py"), path
