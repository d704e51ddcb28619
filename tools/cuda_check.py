"""What must hold of leakbench on a GPU: ``python tools/cuda_check.py --out FOLDER``, eight minutes on a large one.

Each part is done whatever became of the others, unless it would begin after ``--seconds``. The lines are PASS, FAIL,
INFO (a measurement) and SKIP; ``check.json`` and ``check.md`` have all of them with the name of the device. Nothing is
fetched: the images are those that ship with leakbench. ``--device pretend`` runs the parts that need no real GPU on the
pretended one of the tests, and ``--small`` in small.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import leakbench
from leakbench import attacks, datasets, models
from leakbench.attacks.base import prepare
from leakbench.attacks.matching import GradientMatching, MatchingObjective, double
from leakbench.core.compiled import SWITCH
from leakbench.core.device import accelerator, device_named, empty_cache
from leakbench.core.rng import Rng, seeded
from leakbench.engine import run as engine
from leakbench.engine.progress import NullProgress
from leakbench.gradients import full_precision
from leakbench.optim import Unknowns, graph, value_and_gradient

ROOT = Path(__file__).resolve().parents[1]
DATA = datasets.parse("samples")
IMAGE = DATA.image_shape
SALT = "5eed" * 8
"""From which clients draw the same on every device."""
LARGE = 2**18
"""Rows and channels beyond the limits of 65,535 that some kernels have."""


@dataclass(frozen=True)
class Line:
    """One result of the check.

    Attributes:
        kind: PASS, FAIL, INFO or SKIP.
        part: the part of the check.
        name: of what was checked.
        text: the figures.
        seconds: since the check began.
    """

    kind: str
    part: str
    name: str
    text: str
    seconds: float


Found = Iterator[tuple[str, str, str]]
"""The kind, name and text of a part's lines."""


@dataclass(frozen=True)
class Check:
    """The machine that is checked.

    Attributes:
        device: of the attacks.
        small: small sizes, for a dry run.
    """

    device: torch.device
    small: bool

    @property
    def real(self) -> bool:
        """Whether this is a GPU, and neither a CPU nor a pretended one."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if (module := accelerator(self.device)) is not None:
            module.synchronize(self.device)


def verdict(holds: bool, name: str, text: str = "") -> tuple[str, str, str]:
    """Return a line that passes or fails."""
    return ("PASS" if holds else "FAIL"), name, text


def network(spec: str) -> nn.Module:
    """Return a network for the images, always with the same weights."""
    with seeded("cuda check"):
        return models.parse(spec).build(IMAGE, DATA.num_classes)


CPU = torch.device("cpu")


def observed(spec: str, device: torch.device, trials: int, **case: Any) -> leakbench.Observation:
    """Return what a server on a device sees of some images."""
    images, labels = DATA.load([index % len(DATA) for index in range(trials)])
    data = {"num_classes": DATA.num_classes, "mean_image": DATA.mean(), "salt": SALT}
    return leakbench.observe(network(spec), images, labels, device=str(device), **data, **case)


def watched(spec: str, device: torch.device, trials: int, **case: Any) -> leakbench.Observation:
    """Return on a device what a server sees of clients on the CPU: the same digits for every device."""
    return observed(spec, CPU, trials, **case).to(device)


def problem(
    attack: str, spec: str, device: torch.device, exact: bool, trials: int = 2, **case: Any
) -> tuple[MatchingObjective, Unknowns]:
    """Return the objective of a gradient matching attack, and its start."""
    method, known = prepare(attacks.parse(attack), watched(spec, device, trials, **case))
    assert isinstance(method, GradientMatching)
    rng = Rng(tuple(map(str, range(trials))), known.device)
    objective = method._objective(double(known) if exact else known, rng).with_path()
    return objective, method._begin(objective)


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error in the Euclidean norm."""
    one, other = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


def largest_error(found: tuple[Tensor, Unknowns], expected: tuple[Tensor, Unknowns]) -> float:
    """Return the largest relative error of a value and its gradients."""
    return max([error(found[0], expected[0]), *(error(found[1][name], expected[1][name]) for name in expected[1])])


TESTS = ("tests/test_graph.py", "tests/test_faults.py", "-k", "test_graph or gpu")
"""The project's own tests that need a GPU, and what is beside them."""


def tests(check: Check) -> Found:
    """Run the project's own tests of a GPU, in a process of their own; without one, those that need it are skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", *TESTS]
        done = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, capture_output=True, text=True)
        if not report.exists():
            yield "FAIL", "tests", f"they did not run: {done.stdout[-300:]} {done.stderr[-300:]}"
            return
        cases = list(ElementTree.parse(report).iter("testcase"))
    yield verdict(bool(cases), "tests", f"{len(cases)} found")
    for case in cases:
        kinds = {"failure": "FAIL", "error": "FAIL", "skipped": "SKIP"}
        outcome = next((child for child in case if child.tag in kinds), None)
        text = "" if outcome is None else str(outcome.get("message", ""))[:300]
        yield "PASS" if outcome is None else kinds[outcome.tag], str(case.get("name")), text


def evaluations(check: Check) -> Found:
    """Compare an evaluation with the CPU: 1e-8 in float64; 2e-4 in float32, 2e-3 with ReLUs. TF32 would show 1e-3."""
    specs = ["lenet", "lenet-bn", "mlp", "resnet20(activation=sigmoid)", "resnet20"]
    if not check.small:
        specs += ["resnet18(stem=cifar, max_pool=false, activation=sigmoid)", "vgg16(dropout=0)"]
    for spec in specs:
        several = spec in ("lenet", "resnet20(activation=sigmoid)") and not (check.small and spec != "lenet")
        for attack in ("ig", "lb", "grnn") if several else ("ig",):
            for exact in (True, False) if attack != "lb" else (True,):
                limit = 1e-8 if exact else 2e-3 if spec in ("resnet20", "vgg16(dropout=0)") else 2e-4
                results, paths = [], []
                for device in (CPU, check.device):
                    objective, start = problem(attack, spec, device, exact, threat="known-label")
                    results.append(value_and_gradient(objective, start, 0))
                    paths.append(objective.evaluator.path)
                worst = largest_error(results[1], results[0])
                name = f"{attack} {spec} float{64 if exact else 32}"
                text = f"relative error {worst:.1e}, below {limit:g}; path {paths[0]}, on the device {paths[1]}"
                yield verdict(worst < limit and paths[0] == paths[1], name, text)


CLIENTS: Sequence[tuple[str, str, int, int]] = (
    ("lenet", "none", 256, 8),
    ("resnet20(activation=sigmoid)", "noise(scale=0.001)", 128, 4),
    ("resnet18(stem=cifar, max_pool=false)", "none", 64, 2),
    ("resnet18(stem=cifar, max_pool=false)", "soteria", 16, 1),
)
"""A network, a defense, and how many clients are timed together on the device and one at a time on the CPU."""


def clients(check: Check) -> Found:
    """Time the steps of clients, all together on the device and one at a time on the CPU; compare the gradients: 1e-3.

    Soteria's zeros are compared by their number: rounding can part two scores that are nearly equal.
    """
    cases = [("lenet", "none", 4, 4), ("lenet", "soteria", 4, 4)] if check.small else CLIENTS
    for spec, defense, most, alone in cases:
        together = most if check.real or check.small else most // 8
        found, seconds = [], []
        for device, trials in ((CPU, alone), (check.device, together)):
            if device != CPU:
                observed(spec, device, 2, defense=defense)  # what is compiled, chosen and compared once
            check.synchronize()
            begin = time.perf_counter()
            found.append(observed(spec, device, trials, defense=defense).gradient)
            check.synchronize()
            seconds.append((time.perf_counter() - begin) / trials)
        here, there = ({name: value[:alone].cpu() for name, value in one.items()} for one in found)
        masked = [list(here)[-2]] if defense == "soteria" else []
        scale = max(float(value.norm()) for value in here.values())
        worst = max(float((there[name] - here[name]).norm()) / scale for name in here if name not in masked)
        zeros = all(abs(int((there[n] == 0).sum() - (here[n] == 0).sum())) <= here[n][0].numel() // 50 for n in masked)
        times = [f"{1e3 * value:.1f} ms" for value in seconds]
        text = f"{times[1]} a client of {together} together, {times[0]} one at a time on the CPU"
        yield verdict(worst < 1e-3 and zeros, f"{spec} {defense}", f"{text}; relative error {worst:.1e}")


RECORDED: Sequence[tuple[str, Mapping[str, Any], bool]] = (
    ("ig", {}, True),
    ("grnn", {}, True),
    ("dlg(solver=adam, lr=0.1)", {}, True),
    ("ig", {"defense": "keylock"}, True),
    ("ig", {"defense": "precode"}, True),
    ("ig", {"defense": "noise", "threat": "informed=simulate"}, False),
    ("ig", {}, True),
)
"""Attacks, and whether their evaluations can be recorded; the one that cannot must spoil nothing for the next."""


def recordings(check: Check) -> Found:
    """Compare recorded evaluations with others at another point: 1e-4; memory and streams are as before afterwards."""
    if check.device.type == "cpu":
        yield "SKIP", "recordings", "a CPU has none"
        return
    module = accelerator(check.device)
    assert module is not None
    for attack, case, expected in RECORDED:
        notes: list[str] = []
        objective, start = problem(attack, "lenet", check.device, exact=False, **case)
        evaluate = graph.recorded(objective, start, notes.append)
        empty_cache(check.device)  # torch before 2.12 raises here if a recording failed
        other = {name: value + 0.1 * torch.randn(value.shape).to(value) for name, value in start.items()}
        worst = largest_error(evaluate(other, 0), value_and_gradient(objective, other, 0))
        recorded = evaluate.__name__ == "replay"
        text = f"{'recorded' if recorded else 'not recorded'}, relative error {worst:.1e} {' '.join(notes)}"
        yield verdict((recorded or not expected) and worst < 1e-4, f"{attack} {dict(case)}", text)
        if check.real:
            current = module.current_stream() == module.default_stream()
            yield verdict(current, "the current stream is the default one afterwards")


def sizes(check: Check) -> Found:
    """Compare kernels at sizes beyond 65,535 and with thousands of groups with the same on the CPU."""
    rows = 4096 if check.small else LARGE
    rng = torch.Generator().manual_seed(0)
    one, other = torch.randn(rows, 1, 64, generator=rng), torch.randn(rows, 64, 1, generator=rng)
    worst = error(torch.bmm(one.to(check.device), other.to(check.device)), torch.bmm(one, other))
    yield verdict(worst < 1e-5, f"products of {rows} rows", f"relative error {worst:.1e}")
    wide = one.view(1, rows, 64)
    worst = error(
        F.batch_norm(wide.to(check.device), None, None, training=True), F.batch_norm(wide, None, None, training=True)
    )
    yield verdict(worst < 1e-4, f"batch normalisation of {rows} channels", f"relative error {worst:.1e}")
    for groups in (64,) if check.small else (256, 1024, 4096):
        for channels in (1, 3):
            x, w = (
                torch.randn(1, groups * channels, 32, 32, generator=rng),
                torch.randn(groups * 12, channels, 5, 5, generator=rng),
            )
            found = F.conv2d(x.to(check.device), w.to(check.device), None, 2, 2, 1, groups)
            worst = error(found, F.conv2d(x, w, None, 2, 2, 1, groups))
            name = f"convolution of {groups} groups of {channels} channels"
            yield verdict(worst < 1e-4, name, f"relative error {worst:.1e}")


class Notes(NullProgress):
    """Keeps the lines for the user."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        """Keep a line."""
        self.lines.append(line)


def run(matrix: leakbench.Matrix, check: Check, **options: Any) -> tuple[Any, list[str]]:
    """Return the results of a matrix on the device, and the lines for the user."""
    notes = Notes()
    with tempfile.TemporaryDirectory() as folder:
        engine.run(matrix, folder, engine.RunOptions(device=str(check.device), **options), progress=notes)
        return leakbench.Run(Path(folder)).results(), notes.lines


def memory(check: Check) -> Found:
    """Run 1,024 trials of dlg, of 2.5 MB each for 100 pairs, in 1.5 GB: they are halved, and then all are ok."""
    if not check.real:
        yield "SKIP", "memory", "only a real GPU has a pool of memory"
        return
    problem("dlg", "lenet", check.device, exact=False)  # what libraries take once
    whole = torch.cuda.get_device_properties(check.device).total_memory
    empty_cache(check.device)
    share = (torch.cuda.memory_reserved(check.device) + 1.5e9) / whole
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), check.device)
    try:
        matrix = leakbench.Matrix(
            attacks=["dlg(steps=1)"], defenses=["none"], models=["lenet"], datasets=["samples"], images=64,
            seeds=list(range(16)), floors=False,
        )  # fmt: skip
        results, notes = run(matrix, check, chunk=1024)
        halved = [line for line in notes if "do not fit" in line]
        holds = bool((results["status"] != "error").all()) and 0 < len(set(halved)) <= 4
        yield verdict(holds, "out of memory", f"{results['status'].value_counts().to_dict()} {halved[:4]}")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, check.device)


def searches(check: Check) -> Found:
    """Compare short searches in float64 with the CPU: the images differ by less than 1e-4."""
    cases: list[tuple[str, dict[str, Any]]] = [
        ("ig(steps=20)", {}),
        ("lb(steps=20)", {}),
        ("dlg(steps=1)", {}),
        ("grnn(steps=5)", {}),
        ("dlm(steps=1, restarts=1)", {"threat": "weights"}),
        ("dlm+(steps=1)", {"threat": "weights"}),
        ("peel", {}),
        ("peel", {"defense": "keylock"}),
        ("ig(steps=5)", {"defense": "precode"}),
    ]
    for attack, case in cases[:4] if check.small else cases:
        images = [
            leakbench.attack(attack, double(watched("lenet", device, 2 if check.small else 4, **case))).images
            for device in (CPU, check.device)
        ]
        worst = error(images[1], images[0])
        yield verdict(worst < 1e-4, f"{attack} {case}", f"relative difference of images {worst:.1e}")


def again(check: Check) -> Found:
    """Run the same twice: this says whether runs on this device give the same bytes."""
    for attack in ("ig(steps=200)", "dlg(steps=5)", "lb(steps=60)", "grnn(steps=20)", "peel"):
        if check.small and attack != "ig(steps=200)":
            continue
        spec = "ig(steps=10)" if check.small else attack
        seen = observed("lenet", check.device, 2 if check.small else 8)
        one, two = (leakbench.attack(spec, seen).images.cpu() for _ in range(2))
        same = torch.equal(one, two)
        text = (
            "the same bytes" if same else f"NOT the same bytes: pixels differ by {float((one - two).abs().max()):.1e}"
        )
        yield "PASS" if same else "INFO", f"{spec} twice", text


def speed(check: Check) -> Found:
    """Time an iteration: expected are 0.5 ms for ig on LeNet up to 256 trials, and 3 to 20 ms on ResNet-20."""
    module = accelerator(check.device)
    rows = [("ig", "lenet", (16, 64, 256, 1024)), ("ig", "resnet20", (16, 64, 256))]
    rows += [("dlg", "lenet", (16, 64, 256, 1024)), ("lb", "lenet", (64,)), ("grnn", "lenet", (64, 256, 1024))]
    for attack, spec, counts in rows[:1] if check.small else rows:
        for trials in counts[:1] if check.small else counts:
            seen = observed(spec, check.device, 2 if check.small else trials)

            def timed(steps: int, attack: str = attack, seen: leakbench.Observation = seen) -> tuple[float, float]:
                check.synchronize()
                begin = time.perf_counter()
                found = leakbench.attack(f"{attack}(steps={steps})", seen)
                check.synchronize()
                assert found.evaluations is not None
                return time.perf_counter() - begin, float(found.evaluations.float().mean())

            short, long = (1, 4) if attack == "dlg" else (4, 8) if check.small else (100, 300)
            if module is not None:
                module.reset_peak_memory_stats(check.device)
            timed(short)
            (begin, few), (end, many) = timed(short), timed(long)
            ms = 1e3 * (end - begin) / max(1.0, many - few)
            peak = 0.0 if module is None else module.max_memory_allocated(check.device) / 2**30
            text = (
                f"{ms:.2f} ms an iteration, {1e3 * trials / ms:,.0f} trials x iterations a second, peak {peak:.2f} GiB"
            )
            yield "INFO", f"{attack} {spec} T={trials}", text


RATES: Mapping[tuple[str, str], int] = {
    ("dlg(steps=60)", "none"): 6,
    ("dlg(steps=60)", "noise"): 1,
    ("dlg(steps=60)", "precode"): 0,
    ("dlg(steps=60)", "keylock"): 0,
    ("ig(steps=500)", "none"): 1,
    ("ig(steps=500)", "noise"): 0,
    ("ig(steps=500)", "precode"): 0,
    ("ig(steps=500)", "keylock"): 0,
    ("peel", "none"): 16,
    ("peel", "noise"): 8,
    ("peel", "precode"): 16,
    ("peel", "keylock"): 9,
}
"""Of how many of 16 images attacks reach an aligned SSIM of 0.6 on a CPU (``--device cpu --parts matrix``)."""

MOST_APART = 3
"""By how many images a count may differ: an image near the threshold goes to either side by rounding."""


def recovered(results: Any) -> dict[tuple[str, str], int]:
    """Return how many images each attack recovers behind each defense, without the floors."""
    cells = results[results["attack"].str.match("dlg|ig|peel")].groupby(["attack", "defense"])["ssim_aligned"]
    return {key: int((values >= 0.6).sum()) for key, values in cells}


def matrix(check: Check) -> Found:
    """Run a matrix end to end, with one worker and with two; as many images are recovered as on a CPU, within 3."""
    plan = leakbench.Matrix(
        attacks=["ig(steps=5)", "peel"] if check.small else ["dlg(steps=60)", "ig(steps=500)", "peel"],
        defenses=["none", "precode"] if check.small else ["none", "noise(scale=0.01)", "precode", "keylock"],
        models=["lenet"],
        datasets=["samples"],
        images=2 if check.small else 16,
    )
    expected = recovered(run(plan, replace(check, device=CPU), salt=SALT)[0]) if check.small else RATES
    for workers in (1,) if check.small else (1, 2):
        begin = time.perf_counter()
        results, _ = run(plan, check, workers=workers, salt=SALT)
        wrong = results[results["status"] == "error"]
        text = f"{time.perf_counter() - begin:.0f} s, {results['status'].value_counts().to_dict()}"
        yield verdict(not len(wrong), f"{workers} workers", f"{text} {sorted(set(wrong['reason']))[:3]}")
        peel = results[(results["attack"] == "peel") & (results["defense"] == "none")]["psnr"].mean()
        yield verdict(float(peel) > 60, "peel without a defense", f"{float(peel):.1f} dB, about 100 on a CPU")
        found = recovered(results)
        for key in sorted(found.keys() | expected.keys()):
            here, there = found.get(key, -1), expected.get(key, -1)
            near = min(here, there) >= 0 and abs(here - there) <= MOST_APART
            text = f"{here} of {plan.images} images recovered, {there} on a CPU"
            yield verdict(near, f"{' behind '.join(key)}, {workers} workers", text)


PARTS: Sequence[Callable[[Check], Found]] = (
    *(tests, evaluations, recordings, sizes, memory, searches, clients, again, speed, matrix),
)


def done(check: Check, parts: Sequence[str], seconds: float) -> Iterator[Line]:
    """Yield the lines of all parts, as they are found."""
    begin = time.perf_counter()
    for part in PARTS:
        name = part.__name__

        def line(kind: str, what: str, text: str, name: str = name) -> Line:
            return Line(kind, name, what, " ".join(text.split()), round(time.perf_counter() - begin, 1))

        if parts and name not in parts:
            continue
        if time.perf_counter() - begin > seconds:
            yield line("SKIP", name, f"more than {seconds:g} s are over")
            continue
        try:
            with full_precision():
                for found in part(check):
                    yield line(*found)
        except Exception as problem:
            traceback.print_exc()
            yield line("FAIL", name, f"{type(problem).__name__}: {str(problem)[:300]}")
        gc.collect()
        empty_cache(check.device)


def page(device: str, lines: Sequence[Line]) -> str:
    """Return the Markdown page of a check."""
    failed = sum(line.kind == "FAIL" for line in lines)
    versions = f"torch {torch.__version__}, leakbench {leakbench.__version__}"
    head = f"# Check on {device}\n\n{versions}: {len(lines)} lines, {failed} failed.\n"
    rows = [f"| {line.seconds:.0f} | {line.kind} | {line.part} | {line.name} | {line.text} |" for line in lines]
    return "\n".join([head, "| s | | part | what | figures |", "|--:|:--|:--|:--|:--|", *rows, ""])


def main() -> int:
    """Run the check; return 1 if a line failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=440, help="no part begins later")
    parser.add_argument("--out", type=Path, default=Path("runs/cuda-check"))
    parser.add_argument("--parts", default="", help="some of: " + ", ".join(part.__name__ for part in PARTS))
    parser.add_argument("--small", action="store_true", help="small sizes")
    given = parser.parse_args()
    os.environ[SWITCH] = "off"  # the compiled kernels are a path of the CPU, which no GPU has
    if given.device.startswith("pretend"):
        sys.path.insert(0, str(ROOT / "tests" / "device"))
        import pretend

        pretend.install()
    device = device_named(given.device)
    given.out.mkdir(parents=True, exist_ok=True)
    lines: list[Line] = []
    named = engine._named(device)
    for line in done(Check(device, given.small), [part for part in given.parts.split(",") if part], given.seconds):
        lines.append(line)
        print(f"{line.seconds:6.1f} {line.kind} {line.part}: {line.name}: {line.text}", flush=True)
        contents = {"device": named, "torch": torch.__version__, "lines": [asdict(one) for one in lines]}
        (given.out / "check.json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
        (given.out / "check.md").write_text(page(named, lines), encoding="utf-8")
    return int(any(line.kind == "FAIL" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
