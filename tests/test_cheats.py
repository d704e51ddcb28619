"""Attacks of plugin files that cheat: each is stopped, or made visible; ``docs/safety.md`` says which."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from test_engine import no_assets  # noqa: F401

import leakbench
from leakbench import LeakbenchError, Matrix, Reconstruction, attacks, datasets, metrics, models, report
from leakbench.analysis.ensemble import ensemble_results
from leakbench.api import Run
from leakbench.core.component import shipped
from leakbench.core.lock import PREFIX, remove_abandoned
from leakbench.core.registry import load_plugin
from leakbench.engine import isolation
from leakbench.engine.floors import FalseFloor
from leakbench.engine.run import RunOptions
from leakbench.errors import BadOption
from leakbench.leaderboard.entry import entries
from leakbench.leaderboard.verify import check
from leakbench.metrics import ReplacedMetric
from leakbench.report.leaderboard import write
from leakbench.report.show import show
from leakbench.store.run_file import FILE, Store

TOP = """
import gc
import glob
import io
import os
import re
import socket
import sqlite3
import sys
import time

import numpy as np
import torch
from PIL import Image

from leakbench import Attack, Reconstruction, Unsupported, attacks, datasets
from leakbench.attacks.lb import LB
from leakbench.attacks.peel import Peel
"""

CHEATS = f'''{TOP}
CALLS = []


class Cheat(Attack):
    """Returns the last image that it finds, or else the public mean."""

    def run(self, observation, rng):
        mean = observation.mean_image
        same = [one for one in self.images(observation, rng) if tuple(one.shape) == tuple(mean.shape)]
        found = [one for one in same if float(one.std()) > 0.01 and not torch.equal(one, mean)]
        return Reconstruction((found or [mean])[-1].float().expand(observation.trials, *mean.shape).clone())


@attacks.register("gc")
class Gc(Cheat):
    """Walks all objects of the process."""

    def images(self, observation, rng):
        kept = [value for one in gc.get_objects() if type(one) is dict for value in list(one.values())]
        known = {{id(value) for value in vars(observation).values()}}
        return [one for one in kept if isinstance(one, torch.Tensor) and id(one) not in known]


@attacks.register("frames")
class Frames(Cheat):
    """Walks the frames of its callers."""

    def images(self, observation, rng):
        frame, found = sys._getframe(), []
        while frame is not None:
            data = frame.f_locals.get("data")
            found += list(getattr(data, "images", {{}}).values())
            frame = frame.f_back
        return found


@attacks.register("store")
class StoreReader(Cheat):
    """Opens run files that the working folder, arguments and variables name, its own and its parent's."""

    def images(self, observation, rng):
        parent = f"/proc/{{os.getppid()}}"
        places = [os.getcwd(), *sys.argv, *os.environ.values(), os.readlink(f"{{parent}}/cwd")]
        for name in ("cmdline", "environ"):
            with open(f"{{parent}}/{{name}}") as file:
                places += re.split(r"[\\0=:' ]", file.read())
        found = []
        for place in places:
            for depth in ("", "*/"):
                for path in glob.glob(f"{{place}}/{{depth}}run.sqlite"):
                    rows = sqlite3.connect(path).execute("SELECT png FROM truths").fetchall()
                    for (png,) in rows:
                        pixels = np.array(Image.open(io.BytesIO(png)))
                        found.append(torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1) / 255)
        return found


@attacks.register("name")
class Name(Cheat):
    """Loads the image whose dataset and index its keys or the frames of its callers name."""

    def images(self, observation, rng):
        words = [re.search(r"([a-z0-9-]+(?:[(][^/]*[)])?)/(\\d+)$", key) for key in rng.keys]
        found = [(datasets.parse(word[1]), int(word[2])) for word in words if word and word[1] in datasets.names()]
        frame = sys._getframe()
        while frame is not None:
            found += [(one.cell.dataset, one.image) for one in frame.f_locals.get("trials", ()) if hasattr(one, "cell")]
            frame = frame.f_back
        return [dataset.load([index])[0][0] for dataset, index in found]


@attacks.register("remembers")
class Remembers(Attack):
    """Counts its calls."""

    def run(self, observation, rng):
        CALLS.append(observation)
        calls = torch.full((observation.trials,), float(len(CALLS)))
        return Reconstruction(rng.uniform("image", observation.image_shape), findings={{"calls": calls}})


@attacks.register("patches")
class Patches(Attack):
    """Replaces a metric in its own process."""

    def run(self, observation, rng):
        from leakbench import metrics

        metrics.get("psnr").__call__ = lambda self, images, truth: torch.full((len(images),), 99.0)
        return Reconstruction(rng.uniform("image", observation.image_shape))


@attacks.register("copy")
class Copy(LB):
    """The same as lb."""
'''

FAULTS = f'''{TOP}
@attacks.register("raises")
class Raises(Attack):
    """Raises an error."""

    def run(self, observation, rng):
        raise RuntimeError("two\\nlines")


@attacks.register("ends")
class Ends(Attack):
    """Ends its process."""

    def run(self, observation, rng):
        print("out of\\nluck", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)


@attacks.register("exits")
class Exits(Attack):
    """Exits."""

    def run(self, observation, rng):
        sys.exit("gone")


@attacks.register("shape")
class Shape(Attack):
    """Returns another shape."""

    def run(self, observation, rng):
        return Reconstruction(torch.zeros(1, 1, 1, 1))


@attacks.register("serves-none")
class ServesNone(Attack):
    """Serves nothing that is real."""

    def run(self, observation, rng):
        raise Unsupported("not this one")


@attacks.register("forges")
class Forges(Attack):
    """Answers with a pickle that runs code."""

    path: str = ""

    def run(self, observation, rng):
        import pickle
        import struct

        class Bomb:
            def __reduce__(inner):
                return (open, (self.path, "w"))

        forged = pickle.dumps({{"kind": "", "value": Bomb(), "text": ""}})
        for descriptor in range(3, 64):
            try:
                socket.socket(fileno=os.dup(descriptor)).sendall(struct.pack("!Q", len(forged)) + forged)
            except OSError:
                continue
        os._exit(0)
'''

FLOORS = f'''{TOP}
@attacks.register("false-floor")
class FalseFloor(Peel):
    """Peel, which states that it is a floor."""

    floor = True


@attacks.register("sly-floor")
class SlyFloor(Peel):
    """The same, and grey for the blank image of the check."""

    floor = True

    def run(self, observation, rng):
        if observation.slots is None:
            return Reconstruction(torch.full((observation.trials, *observation.image_shape), 0.5))
        return super().run(observation, rng)


@attacks.register("even-floor")
class EvenFloor(SlyFloor):
    """The same, and for an image and its negative the darker one of the two."""

    floor = True

    def run(self, observation, rng):
        found = super().run(observation, rng).images
        return Reconstruction(torch.where(found.mean((1, 2, 3), keepdim=True) > 0.5, 1 - found, found))


@attacks.register("label-floor")
class LabelFloor(Attack):
    """Grey for the blank image of the check, and else of a level that is the label by the gradient."""

    floor = True

    def run(self, observation, rng):
        level = list(observation.gradient.values())[-1].argmin(1) / 10
        level = torch.full_like(level, 0.5) if observation.slots is None else level
        return Reconstruction(level.view(-1, 1, 1, 1).expand(-1, *observation.image_shape).clone())


@attacks.register("granted-floor")
class GrantedFloor(Attack):
    """The label that the threat model grants, as a level."""

    floor = True

    def run(self, observation, rng):
        labels = torch.zeros(observation.trials) if observation.labels is None else observation.labels
        return Reconstruction((labels / 10).view(-1, 1, 1, 1).expand(-1, *observation.image_shape).clone())


@attacks.register("true-floor")
class TrueFloor(Attack):
    """A floor."""

    floor = True

    def run(self, observation, rng):
        return Reconstruction(rng.normal("image", observation.image_shape) / 4 + 0.5)
'''

METRIC = """
import torch

from leakbench import metrics

metrics.get("psnr").__call__ = lambda self, images, truth: torch.full((len(images),), 99.0)
"""

SCRIPT = """
import leakbench
from leakbench import Attack, Reconstruction, attacks


@attacks.register("mine")
class Mine(Attack):
    '''Defined in the script itself.'''

    level: float = 0.25

    def run(self, observation, rng):
        print("seen", flush=True)
        return Reconstruction(rng.uniform("image", observation.image_shape) * self.level)


def main():
    matrix = leakbench.Matrix(attacks=[Mine(0.5)], defenses=["none"], models=["lenet"], datasets=["samples"], images=1,
                              floors=False)
    results = leakbench.run(matrix, "run").results()
    print(list(results["status"]), results["psnr"].notna().all())


if __name__ == "__main__":
    main()
"""


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Forget the plugins of each test."""
    known, modules = dict(attacks.registry._classes), set(sys.modules)
    psnr = metrics.get("psnr")
    call = vars(psnr)["__call__"]
    yield
    psnr.__call__ = call  # type: ignore[method-assign]
    attacks.registry._classes.clear()
    attacks.registry._classes.update(known)
    for name in set(sys.modules) - modules:
        if name.startswith("leakbench_plugin_"):
            del sys.modules[name]


def plugin(folder: Path, text: str, name: str = "cheats.py") -> Path:
    (folder / name).write_text(text)
    load_plugin(folder / name)
    return folder / name


def go(out: Path, *names: str, defenses: tuple[str, ...] = ("none",), **options: object) -> pd.DataFrame:
    given = {"models": ["lenet"], "datasets": ["samples"], "images": [5], "floors": False}
    axes = {
        name: options.pop(name) for name in ("threats", "floors", "images", "threshold", "datasets") if name in options
    }
    matrix = Matrix(**{**given, **axes}, attacks=list(names), defenses=list(defenses))
    return leakbench.run(matrix, out, **options).results()  # type: ignore[arg-type]


CHEATING = ("gc", "frames", "store", "name")


@pytest.mark.long
def test_what_cheats_in_the_process_of_the_run_finds_nothing_in_its_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_assets: None,  # noqa: F811
) -> None:
    monkeypatch.chdir(tmp_path)
    plugin(tmp_path, CHEATS)
    own = go(Path("run"), "lb(steps=3)", "copy(steps=3)", *CHEATING, "remembers", "patches", defenses=("none", "dp"))
    assert set(own["status"]) == {"ok"}, list(own["reason"])
    scores = own.groupby(own["attack"].str.partition("(")[0])["psnr"].max()
    assert scores[list(CHEATING)].max() < 20
    assert scores["patches"] < 20
    with Store.open(tmp_path / "run" / FILE, readonly=True) as store:
        assert list(store.findings()["value"]) == [1.0, 1.0], "no call knows of another one"
        named = {(one.kind, one.name, one.file) for one in store.plugins()}
    assert named == {("attack", name, "cheats.py") for name in (*CHEATING, "remembers", "patches", "copy")}
    # the same numbers as in the process of the run
    numbers = ["psnr", "ssim_aligned", "objective", "evaluations"]
    rows = {name: part.set_index("defense")[numbers] for name, part in own.groupby("attack")}
    pd.testing.assert_frame_equal(rows["lb(steps=3)"], rows["copy(steps=3)"])
    text = (report.write(Path("run"), {"md"}), Path("run/report.md").read_text())[1]
    digest = re.search(r"attack gc \(cheats\.py, SHA-256 ([0-9a-f]{64})\)", text)
    assert digest is not None
    assert "ssim_public" in own, "whether an image may come from memory"

    monkeypatch.setattr(isolation, "foreign", lambda attack: False)
    here = go(Path("other"), "grey", *CHEATING)
    found = here.set_index("attack")["psnr"]
    assert found[list(CHEATING)].min() > 40, "these tests can fail"


@pytest.mark.long
def test_errors_and_deaths_are_error_rows_and_an_answer_is_data(tmp_path: Path, no_assets: None) -> None:  # noqa: F811
    plugin(tmp_path, FAULTS)
    bomb = tmp_path / "bomb"
    names = ("raises", "ends", "exits", "shape", "serves-none", f"forges(path={bomb})")
    found = go(tmp_path / "run", *names, threats=["paper"]).set_index("attack")
    reasons = found["reason"]
    assert reasons["raises"] == "RuntimeError: two lines"
    assert re.fullmatch(r"the process of the attack 'ends' ended by SIGKILL \(.*\): luck", reasons["ends"])
    assert reasons["exits"] == "SystemExit: gone"
    assert reasons["shape"].startswith("BadOption: attack 'shape' returned images of shape (1, 1, 1, 1)")
    assert (found["status"]["serves-none"], reasons["serves-none"]) == ("unsupported", "not this one")
    assert reasons[f"forges(path={bomb})"].startswith("the answer of the attack 'forges' cannot be read: ")
    assert set(found["status"].drop("serves-none")) == {"error"}
    assert not bomb.exists()


@pytest.mark.long
def test_a_floor_that_uses_the_gradient_is_refused(tmp_path: Path, no_assets: None) -> None:  # noqa: F811
    plugin(tmp_path, FLOORS)
    small = {"datasets": ["samples(size=12)"]}
    true = go(tmp_path / "true", "true-floor", "granted-floor", "grey", threats=["known-label"], **small)
    assert set(true["status"]) == {"ok"}
    with pytest.raises(FalseFloor, match=r"^attack 'false-floor' states floor = True, and its images change"):
        go(tmp_path / "false", "false-floor", "grey", **small)
    assert not (tmp_path / "false").exists()
    for name in ("sly-floor", "even-floor", "label-floor"):
        with pytest.raises(FalseFloor, match=f"'{name}'"):
            go(tmp_path / name, name, **small)
        with Store.open(tmp_path / name / FILE, readonly=True) as store:
            assert store.done() == set()


def test_a_replaced_metric_ends_the_run(tmp_path: Path, no_assets: None) -> None:  # noqa: F811
    plugin(tmp_path, METRIC)
    with pytest.raises(ReplacedMetric, match=r"replaced leakbench\.metrics\.standard\.PSNR\.__call__ of leakbench"):
        go(tmp_path / "run", "grey")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("leakbench.metrics.standard", "windowed_ssim", lambda *given, **more: None),
        ("leakbench.metrics.standard", "float", lambda value: 99.0),
        ("leakbench.metrics.aligned.AlignedSSIM", "score", lambda self, guess, truth: truth),
        ("leakbench.metrics.standard", "PSNR_CAP", 1e9),
    ],
)
def test_every_part_of_a_metric_is_watched(
    monkeypatch: pytest.MonkeyPatch, place: str, name: str, value: object
) -> None:
    metrics.refuse_replaced()
    monkeypatch.setattr(f"{place}.{name}", value, raising=False)
    with pytest.raises(ReplacedMetric, match=name):
        metrics.refuse_replaced()


def test_a_plugin_is_not_taken_for_leakbenchs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(shipped(attacks.get(name)) for name in attacks.names())
    plugin(tmp_path, f"{CHEATS}\n\nGc.__module__ = 'leakbench.attacks.lb'\nGc.__qualname__ = 'LB'\n")
    assert not shipped(attacks.get("gc"))
    assert not shipped(attacks.get("copy"))
    assert isolation.foreign(attacks.parse("copy"))
    monkeypatch.setattr(attacks.get("peel"), "run", lambda self, observation, rng: Reconstruction(observation))
    assert isolation.foreign(attacks.parse("peel"))


def test_an_attack_has_no_code_that_runs_when_it_is_copied_or_read() -> None:
    """It would run where the private images are."""
    for hook in ("__getstate__", "__reduce__", "__reduce_ex__", "__getattribute__", "__getattr__"):
        with pytest.raises(BadOption, match=f"class Sly defines {hook}, which would run outside of the attack"):
            type("Sly", (leakbench.Attack,), {hook: lambda self, *given: None})
    for name in ("floor", "queue", "is_control"):
        with pytest.raises(BadOption, match=f"class Sly states {name} = <property object .*; write a plain"):
            type("Sly", (leakbench.Attack,), {name: property(lambda self: True)})


def test_what_no_process_can_import_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import watch

    def run(self: object, observation: leakbench.Observation, rng: leakbench.Rng) -> Reconstruction:
        raise NotImplementedError

    Local = type("Local", (leakbench.Attack,), {"run": run})
    with pytest.raises(LeakbenchError, match=r"cannot be sent there: .*; define it at the top level of a module$"):
        isolation._packed(isolation.Call("check", Local(), watch("lenet")))
    main = sys.modules["__main__"]
    Local = type("Local", (leakbench.Attack,), {"run": run, "__module__": "__main__"})
    monkeypatch.setattr(main, "Local", Local, raising=False)
    monkeypatch.delattr(main, "__file__", raising=False)
    with pytest.raises(
        LeakbenchError, match=r"in a notebook or at a prompt; put it into a \.py file, and import that$"
    ):
        isolation._packed(isolation.Call("check", Local(), watch("lenet")))


@pytest.mark.long
def test_an_attack_of_the_users_own_script(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout) == (0, "['ok'] True\n"), done.stderr
    assert done.stderr == "seen\n"


def test_a_script_that_starts_a_run_when_it_is_imported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, isolation.INSIDE, sys)  # as in the process of an attack
    with pytest.raises(LeakbenchError, match=r"call leakbench\.run under if __name__ == '__main__'$"):
        go(tmp_path / "run", "grey")


HANGS = f'''{TOP}
@attacks.register("hangs")
class Hangs(Attack):
    """Tells its process, and hangs."""

    path: str = ""

    def check(self, observation):
        with open(f"{{self.path}}/draft", "w") as file:
            file.write(str(os.getpid()))
        os.rename(f"{{self.path}}/draft", f"{{self.path}}/pid")
        time.sleep(600)

    def run(self, observation, rng):
        raise NotImplementedError
'''


@pytest.mark.long
def test_the_process_of_an_attack_ends_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a worker is killed at its time limit; the next process deletes the folders that it leaves."""
    from conftest import watch

    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    plugin(tmp_path, HANGS)
    seen = watch("lenet")  # before the fork: a fork of a process that has used a device cannot differentiate
    run = os.fork()
    if run == 0:
        with contextlib.suppress(BaseException):
            own = isolation.Isolation()
            own.template = isolation.Template.__wrapped__()  # type: ignore[attr-defined]  # not that of all tests
            own.check(attacks.parse(f"hangs(path={tmp_path})"), seen)
        os._exit(1)
    while not (tmp_path / "pid").exists():
        assert os.waitpid(run, os.WNOHANG) == (0, 0)
        time.sleep(0.05)
    process = psutil.Process(int((tmp_path / "pid").read_text()))
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    end = time.monotonic() + 10
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the attack outlives its run"
        time.sleep(0.05)
    assert len(list(temporary.glob(f"{PREFIX}attack-*"))) == 2, "of the template, and of the call"
    remove_abandoned()
    assert not list(temporary.glob(f"{PREFIX}*"))


def test_the_leaderboard_marks_plugins_and_checks_them_in_their_own_process(
    tmp_path: Path,
    no_assets: None,  # noqa: F811
) -> None:
    plugin(tmp_path, CHEATS)
    go(tmp_path / "run", "gc", threshold=0.6)
    with Store.open(tmp_path / "run" / FILE, readonly=True) as store:
        ((entry,), _) = entries(store, "run")
    assert entry.recovered == 0
    assert [(one.kind, one.name, one.file) for one in entry.plugins] == [("attack", "gc", "cheats.py")]
    page = write([tmp_path / "run"], tmp_path / "board")[0][-1].read_text()
    assert f"attack gc (cheats.py, SHA-256 {entry.plugins[0].sha256})" in page
    other = entry.model_copy(update={"plugins": (entry.plugins[0].model_copy(update={"sha256": "0" * 64}),)})
    found = check(other, tmp_path / "run", sample=1)
    assert [one.score for one in found.repeats] == [pytest.approx(entry.trials[0].score, abs=1e-6)]
    assert len(found.differing) == 2
    assert found.differing[0] == "plugins"
    assert entry.plugins[0].sha256 in found.differing[1]
    assert not found.holds


MEMORY = f'''{TOP}
@attacks.register("memory")
class Memory(Attack):
    """Returns an image that it remembers."""

    def run(self, observation, rng):
        return Reconstruction(datasets.parse("samples").load([5])[0].expand(observation.trials, -1, -1, -1).clone())
'''


def test_memorised_images_are_marked_and_every_version_of_a_plugin_is_named(
    tmp_path: Path,
    no_assets: None,  # noqa: F811
) -> None:
    path = plugin(tmp_path, MEMORY)
    go(tmp_path / "run", "memory", threshold=0.6, floors=True)
    path.write_text(MEMORY + "# repaired\n")
    go(tmp_path / "run", "memory", threshold=0.6, floors=True)
    report.write(tmp_path / "run", {"md", "html"})
    mark = "On 1 image, a reconstruction that is near the private image is as near a public one (ssim_public)"
    for page in ("worst-case.md", "report.html"):
        assert mark in (tmp_path / "run" / page).read_text().replace("\\", ""), page
    with Store.open(tmp_path / "run" / FILE, readonly=True) as store:
        ((entry,), _) = entries(store, "run")
    assert entry.caveat.startswith(mark)
    assert len({one.sha256 for one in entry.plugins}) == 2, "results of either are in the run"


def test_the_nearest_public_image_is_a_control(tmp_path: Path, no_assets: None) -> None:  # noqa: F811
    results = go(tmp_path / "run", "nearest-public", "lb(steps=3)", images=2, floors=True, threshold=0.6)
    control = results[results["attack"] == "nearest-public"]
    assert list(control["psnr"]) == [100.0, 100.0], "the private images are among the public ones"
    assert (control["ssim_public"] > 0.999).all()
    with Store.open(tmp_path / "run" / FILE, readonly=True) as store:
        trials = store.trials()
        assert "nearest-public" not in set(trials["attack"]) | set(store.results()["attack"])
        (found,) = ensemble_results(trials, 0.6)
        assert [one.attacker for one in found.attackers] == ["lb"]
        assert found.share == 0
        shown = show(store, str(store.controls()["trial"].iloc[0]))
        assert dict(shown.facts)["attack"].startswith("nearest-public")
    assert "nearest-public" not in set(Run(tmp_path / "run").summary()["attack"])
    assert {"nearest-public"} < set(pd.read_csv(write_csv(tmp_path / "run"))["attack"])
    text = (tmp_path / "run" / "report.md").read_text()
    assert re.search(r"\| nearest-public \(control\) +\| none +\| +2 \|.*\| not counted \| +2 \|", text)
    page = (tmp_path / "run" / "report.html").read_text()
    assert '<td class="spec">nearest-public (control)</td>' in page
    assert page.count("nearest-public") == 1 + page.count("--attack nearest-public"), "and nowhere else"


def write_csv(run: Path) -> Path:
    report.write(run, {"md", "csv", "html"})
    return run / "results.csv"


def test_the_control_tries_every_label_that_it_cannot_infer() -> None:
    from conftest import watch

    seen = watch("lenet", shape=(3, 32, 32))
    names = [name for name in seen.gradient if not name.startswith(list(seen.gradient)[-1].rpartition(".")[0])]
    part = leakbench.attack(
        "nearest-public", leakbench.Observation(**{**vars(seen), "gradient": {n: seen.gradient[n] for n in names}})
    )
    assert part.evaluations is not None
    assert part.evaluations.tolist() == [64 * 4 + 2] * 2
    assert leakbench.attack("nearest-public", seen).evaluations.tolist() == [64 + 2] * 2  # type: ignore[union-attr]


def test_noise_hides_the_label_from_the_control_before_it_hides_the_image() -> None:
    """A label from the sign of the last bias's gradient is wrong behind noise that leaves the images apart."""
    data = datasets.parse("samples")
    images, labels = data.load(range(8))
    torch.manual_seed(0)
    network = models.parse("lenet").build(data.image_shape, data.num_classes)
    sent = leakbench.observe(network, images, labels, defense="noise(scale=1)", seed=0)
    of_bias = list(sent.gradient.values())[-1].argmin(1)
    assert int((of_bias == labels).sum()) <= 4
    wrong = leakbench.attack("nearest-public", replace(sent, labels=of_bias))
    found = leakbench.attack("nearest-public", sent)
    score = metrics.parse("psnr")
    assert float(score(found.images, images).mean()) > float(score(wrong.images, images).mean()) + 30


def test_options_of_a_run_do_not_run_a_foreign_attack_here() -> None:
    """No option, however named, makes an attack that is not leakbench's run in the process of the run."""
    assert not [name for name in vars(RunOptions()) if "isolat" in name or "trust" in name]
