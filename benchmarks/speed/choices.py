"""Why the kernels are C++, and smaller registers: ``python -m benchmarks.speed.choices [OUT]``.

It writes choices.md and choices.csv: the convolutions of two layers by the C++ kernels and written for numba
(``numba_maps.py``), and steps of IG with kernels for AVX-512, for AVX2 and without kernels, all on one thread. numba is
no dependency of leakbench: ``pip install numba``. Every library is built anew, in a temporary cache, which takes most
of the four minutes.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed import machine
from benchmarks.speed.numba_maps import LANES, MAPS, Layer, Map, Tile, padded_sizes, source

OUT = machine.ROOT / "reports" / "speed"
LAYERS = (
    Layer("LeNet's second, 12 to 12, 5x5, stride 2, 16x16", 12, 12, 5, 2, 2, 16),
    Layer("ResNet-20's, 16 to 16, 3x3, 32x32", 16, 16, 3, 1, 1, 32),
)
TILES: dict[Map, tuple[Tile, Tile]] = {
    "forward": (Tile(3, 4), Tile(2, 8)),
    "input gradient": (Tile(2, 8), Tile(3, 4)),
    "weight gradient": (Tile(4, 8), Tile(2, 8, 3)),
}
"""The fastest of those tried, for each layer."""
TRIALS = (16, 64)
MAP_ROUNDS, STEP_ROUNDS = 9, 3
MAP_SECONDS = 0.03
"""Of the calls of a subject in a round."""
SHARE = 0.8
"""The part of the gain from which on numba would have been taken."""

CPP, NUMBA = "C++", "numba"
WIDE, NARROW, NONE = "AVX-512", "AVX2", "without kernels"
MARCH = {WIDE: "-march=native", NARROW: "-march=x86-64-v3"}
WORKS = (("lenet", 32, 60, 15), ("resnet20", 16, 6, 3))
"""Model, trials, and the steps that are timed with kernels and without."""


@dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
        kind: ``map`` (GF/s), ``build`` (seconds) or ``step`` (milliseconds).
        what: the layer and map, the start, or the model.
        trials: how many at once; 0 of a build.
        subject: who.
        round: in which round.
        value: the number.
    """

    kind: str
    what: str
    trials: int
    subject: str
    round: int
    value: float


def build_kernels() -> list[Row]:
    """Return the seconds until the C++ kernels are there, in this process."""
    from leakbench.gradients.lanes.library import Kernels, found_or_reason

    begun = time.perf_counter()
    found = found_or_reason()
    seconds = time.perf_counter() - begun
    if not isinstance(found, Kernels):
        raise SystemExit(f"there are no kernels: {found.reason}")
    return [Row("build", "", 0, CPP, 0, seconds)]


def numba_map(folder: Path, layer: Layer, which: Map) -> Callable[..., None]:
    """Return the map of a layer by numba, whose compiled code it keeps beside the source in a folder."""
    import numba

    name = f"numba_map_{LAYERS.index(layer)}_{MAPS.index(which)}"
    file = folder / f"{name}.py"
    if not file.exists():
        file.write_text(source(layer, which, TILES[which][LAYERS.index(layer)]), encoding="utf-8")
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    made: Callable[..., None] = numba.njit(fastmath=True, error_model="numpy", cache=True)(module.run)
    return made


def measure_maps(folder: Path, rounds: int) -> list[Row]:
    """Return the seconds until numba's maps are compiled or loaded, and the GF/s of both in turn for some rounds.

    numba is called once for all blocks of 16 trials, the kernels once a block.
    """
    import torch

    from leakbench.gradients.lanes.library import kernels

    torch.set_num_threads(1)
    sys.path.insert(0, str(folder))  # numba finds a module's code again by its name
    rows, seconds = [], 0.0
    found = kernels() if rounds else None
    for layer in LAYERS:
        for which in MAPS:
            run = numba_map(folder, layer, which)
            for trials in TRIALS:
                blocks = trials // LANES
                a, b, ours, theirs = _tensors(layer, which, blocks)
                channels, _, _, whole = padded_sizes(layer, which)
                given = [
                    tensor.view(-1).numpy() for tensor in (a, b, theirs, torch.zeros(channels, whole, whole, LANES))
                ]
                begun = time.perf_counter()
                run(*given, blocks)
                seconds += time.perf_counter() - begun
                if found is None:
                    break
                calls = [_call(found, layer, which, a[n], b[n], ours[n]) for n in range(blocks)]
                subjects: dict[str, Callable[[], object]] = {
                    CPP: lambda: [call() for call in calls],  # noqa: B023
                    NUMBA: lambda: run(*given, blocks),  # noqa: B023
                }
                subjects[CPP]()
                gap = float((ours - theirs).abs().max() / ours.abs().max())
                if gap > 1e-4:
                    raise SystemExit(f"{layer.title}, {which}: numba's numbers differ by {gap:.1e} of the largest")
                work = 2 * layer.products * trials / 1e9
                counts = {name: max(1, round(MAP_SECONDS / _time(subject, 3))) for name, subject in subjects.items()}
                for turn in range(rounds):
                    for name in sorted(subjects, reverse=bool(turn % 2)):
                        each = _time(subjects[name], counts[name])
                        rows.append(Row("map", f"{layer.title}, {which}", trials, name, turn, work / each))
    return [Row("build", "", 0, NUMBA, 0, seconds), *rows]


def _time(call: Callable[[], object], count: int) -> float:
    begun = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begun) / count


def _tensors(layer: Layer, which: Map, blocks: int) -> list[Any]:
    """Return both operands, and two places for the result, [blocks, *shape, LANES]."""
    import torch

    image = (layer.channels, layer.side, layer.side)
    weight = (layer.outputs, layer.channels, layer.kernel, layer.kernel)
    error = (layer.outputs, layer.rows, layer.rows)
    first, second, out = {
        "forward": (image, weight, error),
        "input gradient": (error, weight, image),
        "weight gradient": (image, error, weight),
    }[which]
    rng = torch.Generator().manual_seed(0)
    given = [torch.randn(blocks, *shape, LANES, generator=rng) for shape in (first, second)]
    return [*given, *(torch.zeros(blocks, *out, LANES) for _ in range(2))]


def _call(found: Any, layer: Layer, which: Map, a: Any, b: Any, out: Any) -> Callable[[], None]:
    """Return the call of the C++ kernels for a block, in the layout that they work in, so that nothing is copied."""
    import torch

    from leakbench.gradients.lanes.geometry import Geometry
    from leakbench.gradients.lanes.maps import _op, _Operand

    def pair(size: int) -> tuple[int, int]:
        return size, size

    geometry = Geometry(
        stride=pair(layer.stride),
        padding=pair(layer.padding),
        dilation=pair(1),
        groups=1,
        image=pair(layer.side),
        kernel=pair(layer.kernel),
    )
    op = _op(geometry, layer.channels, layer.outputs)
    number, order = {
        "forward": (2, (a, b, out)),
        "input gradient": (0, (out, b, a)),
        "weight gradient": (1, (a, out, b)),
    }[which]
    operands = [_Operand(own.data_ptr(), 1, 0, LANES, own.numel() // LANES) for own in order]
    pointers = [ctypes.byref(op), ctypes.c_long(number), *map(ctypes.byref, operands)]
    sizes = [ctypes.c_long(size) for size in (1, LANES, 1)]
    return lambda: found.run("map", torch.float32, *pointers, *sizes, lanes=LANES)


def measure_steps(subject: str, turn: int) -> list[Row]:
    """Return the milliseconds of a step of IG on each network, with the kernels of this process."""
    import torch

    import leakbench
    from benchmarks.speed.measure import clock
    from benchmarks.speed.work import scene
    from leakbench.core import compiled
    from leakbench.gradients.lanes.library import kernels

    torch.set_num_threads(1)
    compiled.OPTIONS = tuple(MARCH.get(subject, one) if one.startswith("-march") else one for one in compiled.OPTIONS)
    found = kernels()
    size = {WIDE: 64, NARROW: 32, NONE: None}[subject]
    if (found and found.vector_bytes) != size:
        raise SystemExit(f"{subject}: the registers have {found and found.vector_bytes} bytes, not {size}")
    rows = []
    for model, trials, many, few in WORKS:
        where = scene("ig", model, trials, 32, "cpu")

        def run(steps: int) -> float:
            return clock(lambda: leakbench.attack(f"ig(steps={steps})", where.observation, seed=0), where.device)  # noqa: B023

        steps = few if subject == NONE else many
        run(2)
        rows.append(Row("step", model, trials, subject, turn, 1e3 * (run(2 + steps) - run(2)) / steps))
    return rows


def apart(arguments: Sequence[str], **environment: str) -> list[Row]:
    """Return what a process of its own measures, of one thread."""
    command = [sys.executable, "-m", "benchmarks.speed.choices", *arguments]
    own = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=machine.ROOT, env=own, stdout=subprocess.PIPE, text=True, check=True)
    return [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def wide_numba() -> dict[str, str]:
    """Return the environment in which numba takes registers of 64 bytes, where it would take those of 32."""
    from llvmlite import binding

    features = f"{binding.get_host_cpu_features().flatten()},-prefer-256-bit"
    return {"NUMBA_CPU_NAME": binding.get_host_cpu_name(), "NUMBA_CPU_FEATURES": features}


def measure(rounds: int, turns: int) -> list[Row]:
    """Measure everything in processes of their own, with a cache of their own."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        cache = {"XDG_CACHE_HOME": name, "NUMBA_CACHE_DIR": f"{name}/numba", **wide_numba()}
        for start in ("first", "later"):
            rows += [Row(**{**asdict(row), "what": start}) for row in apart(["--build"], **cache)]
        for start, count in (("first", 0), ("later", rounds)):
            found = apart(["--maps", name, "--rounds", str(count)], **cache)
            rows += [Row(**{**asdict(row), "what": start}) if row.kind == "build" else row for row in found]
        subjects = [WIDE, NARROW, NONE] if _has_wide() else [NARROW, NONE]
        apart(["--steps", NARROW, "0"], **cache)  # builds what the first round would else wait for
        for turn in range(turns):
            for subject in subjects[turn % len(subjects) :] + subjects[: turn % len(subjects)]:
                off = {"LEAKBENCH_KERNELS": "off" if subject == NONE else "on"}
                rows += apart(["--steps", subject, str(turn)], **cache, **off)
    return rows


def _has_wide() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and " avx512f " in info.read_text()


def page(rows: Sequence[Row], about: machine.Machine, version: str) -> str:
    """Return the page of the measurements."""

    def middle(kind: str, what: str, trials: int, subject: str) -> float:
        return median(r.value for r in rows if (r.kind, r.what, r.trials, r.subject) == (kind, what, trials, subject))

    def rounds(kind: str) -> int:
        return len({row.round for row in rows if row.kind == kind})

    cases = list(dict.fromkeys((row.what, row.trials) for row in rows if row.kind == "map"))
    kept = [middle("map", *case, NUMBA) / middle("map", *case, CPP) for case in cases]
    lines = [
        "# Why the kernels are C++, and smaller registers",
        "",
        f"One thread of {about['processor']}, torch {about['torch']}, numba {version}, commit {about['commit']}. "
        "Written by `python -m benchmarks.speed.choices`; every number of a round is in `choices.csv`.",
        "",
        "## C++ and numba",
        "",
        f"The same maps with the trials innermost, in blocks of {LANES} trials in float32, each trial with a weight of "
        f"its own: GF/s, median of {rounds('map')} rounds in turn, products with zeros of the padding counted. The C++ "
        "kernels serve any layer. For numba, a source is written for each map of each layer "
        "(`benchmarks/speed/numba_maps.py`), in the fastest form found: all sizes are constants, and the products of "
        "all taps for several outputs and pixels stand in the loop over lanes. The C++ kernels are called through "
        "Python for each block, numba once for all.",
        "",
        "| convolution | trials | C++ | numba | numba keeps |",
        "|:--|--:|--:|--:|--:|",
    ]
    for (what, trials), share in zip(cases, kept):
        ours, theirs = (middle("map", what, trials, subject) for subject in (CPP, NUMBA))
        lines.append(f"| {what} | {trials} | {ours:.0f} | {theirs:.0f} | {100 * share:.0f} % |")
    builds = [f"{middle('build', start, 0, subject):.2g}" for subject in (CPP, NUMBA) for start in ("first", "later")]
    lines += [
        "",
        f"The rule was: numba, if it keeps at least {100 * SHARE:.0f} % of the gain. It keeps "
        f"{100 * median(kept):.0f} % (median of these cases; {100 * min(kept):.0f} to {100 * max(kept):.0f} %), and at "
        f"least {100 * SHARE:.0f} % in {sum(share >= SHARE for share in kept)} of {len(kept)}: by these maps alone, "
        f"{'numba would do' if median(kept) >= SHARE else 'C++ it is'}. numba compiles every map of every layer by "
        f"itself, {middle('build', 'first', 0, NUMBA) / (len(LAYERS) * len(MAPS)):.1f} s each, and whole evaluations "
        "of a network, which the kernels run, were not written for it. C++ was kept: one build of "
        f"{builds[0]} s serves every network, where numba compiles for each new one, and is a dependency more.",
        "",
        "Seconds until they can be called, in a new process:",
        "",
        "| | what is built | first | later |",
        "|:--|:--|--:|--:|",
        f"| C++ | all kernels, float32 and float64, for registers of two sizes | {builds[0]} | {builds[1]} |",
        f"| numba | these {len(LAYERS) * len(MAPS)} maps, float32 | {builds[2]} | {builds[3]} |",
        "",
        "## Registers",
        "",
        f"Milliseconds of a step of IG for all trials, median of {rounds('step')} rounds in turn: kernels for AVX-512 "
        f"(`{MARCH[WIDE]}`, 64 bytes), for AVX2 on the same processor (`{MARCH[NARROW]}`, 32 bytes), and torch's "
        "operations.",
        "",
    ]
    subjects = list(dict.fromkeys(row.subject for row in rows if row.kind == "step"))
    subjects.sort(key=(WIDE, NARROW, NONE).index)
    lines += [f"| network | trials | {' | '.join(subjects)} |", "|:--|--:|" + "--:|" * len(subjects)]
    for model, trials in dict.fromkeys((row.what, row.trials) for row in rows if row.kind == "step"):
        times = {subject: middle("step", model, trials, subject) for subject in subjects}
        cells = [f"{one:.3g}" for one in times.values()]
        cells[:-1] = [
            f"{cell} ({times[NONE] / one:.1f}× as fast)" for cell, one in zip(cells[:-1], list(times.values())[:-1])
        ]
        lines.append(f"| {model} | {trials} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write data and page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.choices", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=OUT, help="reports/speed if it is not given")
    parser.add_argument("--rounds", type=int, default=MAP_ROUNDS, help="of the maps")
    parser.add_argument("--turns", type=int, default=STEP_ROUNDS, help="rounds of the steps")
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--maps", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.build or chosen.maps or chosen.steps:
        if chosen.build:
            found = build_kernels()
        elif chosen.maps:
            found = measure_maps(chosen.maps, chosen.rounds)
        else:
            found = measure_steps(chosen.steps[0], int(chosen.steps[1]))
        print(json.dumps([asdict(row) for row in found]))
        return
    try:
        import numba
    except ImportError:
        parser.error("numba is not installed; pip install numba")
    rows = measure(chosen.rounds, chosen.turns)
    chosen.out.mkdir(parents=True, exist_ok=True)
    with (chosen.out / "choices.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    text = page(rows, machine.describe("cpu"), numba.__version__)
    (chosen.out / "choices.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
