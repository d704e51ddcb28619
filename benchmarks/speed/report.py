"""Tables and plots of what was measured: ``python -m benchmarks.speed.report`` writes them again from the data."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.readme import fill
from benchmarks.speed.machine import ROOT
from benchmarks.speed.measure import Ratio, median, per_iteration, ratio, set_up
from benchmarks.speed.work import BREACHING, LEAKBENCH, REFERENCE, TITLES, groups_of
from leakbench.analysis.statistics import bootstrap_interval, effective_groups, share_interval, wilson_interval

KINDS = ("cpu", "cuda")
BEGIN, END = "<!-- speed: begin, written by make bench -->", "<!-- speed: end -->"
NOTHING = "Nothing has been measured yet; `make bench` does it."
MEMORY_TARGET = 1.5
"""GiB beyond importing torch, IG, LeNet, 64 trials."""

PEAKS = {"product": "Matrix product", "best": "The better one of a matrix product and a convolution"}
FIRST_LAYER_WORDS = "; five of the first layer, by whose input the loss is not differentiated"

EXACT_WORDS = "breaching runs its `invertinggradients` on the same image for as long as the closed form took."

LEGEND = """## How it was measured

- All subjects run in one process and take turns in every round; the order rotates. A ratio is one of medians over
  rounds, with the least and the largest ratio of a round in brackets. Each subject runs a short and a long time, and
  the difference counts: what a call costs once is in *set-up*.
- **reference** is `benchmarks/speed/reference.py`: the same attack in plain torch, one image at a time.
- **breaching** (PyPI) is driven one image at a time by its own `reconstruct`, on the same network, images, starts,
  iterations and objective; `benchmarks/speed/peer.py` names the differences that remain.
- **DLG** is run to its end: the outer steps are up, nothing moves, or the objective is not finite. leakbench does all
  trials in every round, the others an equal share in each, so that all do the same trials. A success is a PSNR of at
  least the value stated; its brackets hold a 95 % interval by photograph (Wilson's), of which the images are crops. The
  brackets of gains hold the ratios of rounds, by the time of an evaluation; an evaluation counts as an iteration.
- **Peak memory** is that of a fresh process, beyond what it held after importing torch.
"""


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the data of every device that was measured, by kind."""
    files = {kind: folder / f"{kind}.json" for kind in KINDS}
    return {kind: json.loads(file.read_text(encoding="utf-8")) for kind, file in files.items() if file.exists()}


def write(folder: Path, readme: Path | None = None) -> None:
    """Write a folder's README.md and plots from its data, and the table of the top README between its markers."""
    folder.mkdir(parents=True, exist_ok=True)
    data = load(folder)
    for kind, measured in data.items():
        plot(measured, folder / f"{kind}.png")
    (folder / "README.md").write_text(page(data, parity(folder)), encoding="utf-8")
    if readme is not None:
        fill(readme, summary(data), BEGIN, END)


def summary(data: dict[str, dict[str, Any]]) -> str:
    """Return the table of the top README, for every device that was measured."""
    parts = []
    for measured in data.values():
        machine = measured["machine"]
        lines = []
        for row in [*measured["works"], *([measured["ending"]] if measured["ending"] else [])]:
            line = _ending(row) if "rounds" in row else _work(row)
            if line["seconds"] is None:
                continue
            share = line.get("share")
            lines.append(
                {
                    "work": f"{row['title']}, by the success" if "rounds" in row else row["title"],
                    "trials at once": row.get("slots", row["trials"]),
                    "against breaching": _ratio(line["breaching"], row["missing"].get(BREACHING)),
                    "against one at a time": _ratio(line["reference"], None),
                    "trials × iterations a second": _number(line.get("rate")),
                    "share of the arithmetic floor": "" if share is None else f"{100 * share:.0f} %",
                }
            )
        threads = f", {machine['threads']} threads" if measured["kind"] == "cpu" else ""
        title = f"{machine['device']}{threads}, torch {machine['torch']}"
        if machine["breaching"]:
            title += f", breaching {machine['breaching']}"
        parts.append(f"{title}:\n\n{_table(lines)}{_memory_line(measured)}")
    return "\n\n".join(parts) if parts else NOTHING


def page(data: dict[str, dict[str, Any]], parities: dict[str, Any] | None = None) -> str:
    """Return reports/speed/README.md."""
    parts = ["# Speed", "Written by `make bench`; the data are beside this page."]
    if not data:
        parts.append(NOTHING)
    for kind, measured in data.items():
        parts += _device(kind, measured)
    if parities:
        parts.append(_parity(parities))
    if data or parities:
        parts.append(LEGEND.strip())
    return "\n\n".join(parts) + "\n"


def _device(kind: str, measured: dict[str, Any]) -> list[str]:
    machine = measured["machine"]
    about = (
        f"{machine['cores']} cores of {machine['processor']}, {machine['threads']} threads, "
        f"{machine['memory_gib']} GiB, {machine['system']}; Python {machine['python']}, torch {machine['torch']}, "
        f"torchvision {machine['torchvision']}, breaching {machine['breaching'] or 'not installed'}, leakbench "
        f"{machine['leakbench']} at {machine['commit']}; load average {_list(machine['load'])} before and "
        f"{_list(measured['load_after'])} after; scale `{measured['scale']}`, {machine['date']}, "
        f"{measured['minutes']:.1f} minutes."
    )
    parts = [f"## {machine['device']}", about]
    rates = [rate for row in measured["works"] for rate in row["rates"]]
    if rates:
        parts.append(
            f"{PEAKS[measured.get('peak', 'product')]} in float32, measured in every round: "
            f"{median(rates) / 1e9:.0f} GFLOP/s "  # type: ignore[operator]
            f"({min(rates) / 1e9:.0f}–{max(rates) / 1e9:.0f}). *Share of floor*: the "
            "least arithmetic of an iteration at this rate, over the time that the iteration took. The least are seven "
            "forward passes (1 forward, 2 backward, 4 for the derivative of the backward pass"
            f"{FIRST_LAYER_WORDS if 'peak' in measured else ''}; for GRNN three passes of its generator besides)."
        )
    parts += ["### Iterations", _table(_work_lines(measured["works"]))]
    if measured["ending"]:
        parts += [f"### {measured['ending']['title']}, to the end", *_ending_lines(measured["ending"])]
    if measured.get("exact"):
        parts += ["### Closed forms, one image", _table(_exact_lines(measured["exact"])), EXACT_WORDS]
    notes = [
        f"{row['title']}: {name} is left out: {reason}."
        for row in [*measured["works"], *([measured["ending"]] if measured["ending"] else [])]
        for name, reason in row["missing"].items()
    ]
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    if measured["memory"]:
        parts += ["### Peak memory", _table(_memory_lines(measured["memory"]))]
    if measured["growth"]:
        parts += ["### Growth", f"![How time and memory grow]({kind}.png)"]
        parts += [_growth_table(curve) for curve in measured["growth"]]
    return parts


def _work(row: dict[str, Any]) -> dict[str, Any]:
    """Return what a row of iterations comes to."""
    each = {name: per_iteration(times) for name, times in row["subjects"].items()}
    own = each.get(LEAKBENCH, [])
    seconds = median(own)
    return {
        "each": each,
        "seconds": seconds,
        "rate": None if not seconds else 1 / seconds,
        "share": floor_share(row["flops"], row["rates"], own),
        BREACHING: ratio(each[BREACHING], own) if BREACHING in each else None,
        REFERENCE: ratio(each[REFERENCE], own) if REFERENCE in each else None,
    }


def _exact_lines(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "attack": row["title"],
            "seconds": _number(row["seconds"]),
            "PSNR, dB": "every bit" if row["psnr"] is None else f"{row['psnr']:.1f}",
            "breaching, iterations": row.get("missing") or f"{row['steps']:,}",
            "breaching, seconds": "" if "missing" in row else _number(row["peer_seconds"]),
            "breaching, PSNR, dB": "" if "missing" in row else f"{row['peer_psnr']:.1f}",
        }
        for row in rows
    ]


def floor_share(flops: int | None, rates: Sequence[float], seconds: Sequence[float | None]) -> float | None:
    """Return the median over rounds of the least time that the arithmetic takes over the time that was taken."""
    return median([flops / rate / one if flops and one else None for rate, one in zip(rates, seconds)])


def _work_lines(rows: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    lines = []
    for row in rows:
        line = _work(row)
        for name in (LEAKBENCH, REFERENCE, BREACHING):
            if name not in row["subjects"]:
                continue
            times = row["subjects"][name]
            seconds, first = median(line["each"][name]), set_up(times)
            share = floor_share(row["flops"], row["rates"], line["each"][name])
            target = dict(zip((BREACHING, REFERENCE), row["target"])).get(name)
            lines.append(
                {
                    "work": row["title"],
                    "subject": name,
                    "trials at once": str(times["trials"]),
                    "trials × iterations a second": _number(1 / seconds if seconds else None),
                    "ms an iteration": _number(seconds * 1e3 if seconds else None),
                    "leakbench's gain": "" if name == LEAKBENCH else _ratio(line[name], None),
                    "target": "" if target is None else f"≥ {target:g}×",
                    "share of floor": "" if share is None else f"{100 * share:.1f} %",
                    "set-up, s": _number(first),
                }
            )
    return lines


def _ending(row: dict[str, Any]) -> dict[str, Any]:
    """Return what DLG to its end comes to: seconds a success, by subject, and their ratios."""
    total: dict[str, dict[str, float]] = {}
    for turn in row["rounds"]:
        for name, done in turn.items():
            sums = total.setdefault(name, dict.fromkeys(done, 0.0))
            for key, value in done.items():
                sums[key] += value
    each = {name: sums["seconds"] / sums["successes"] if sums["successes"] else None for name, sums in total.items()}
    result: dict[str, Any] = {"total": total, "each": each, "seconds": each.get(LEAKBENCH)}
    own = total.get(LEAKBENCH)
    for name in (BREACHING, REFERENCE):
        result[name] = None
        if own and name in total and each[name] and each[LEAKBENCH]:
            # the trials of a round differ, so that its ratio is taken by the evaluation
            work = (total[name]["evaluations"] / total[name]["successes"]) / (own["evaluations"] / own["successes"])
            rounds = [
                work
                * (turn[name]["seconds"] / turn[name]["evaluations"])
                / (turn[LEAKBENCH]["seconds"] / turn[LEAKBENCH]["evaluations"])
                for turn in row["rounds"]
            ]
            result[name] = Ratio(each[name] / each[LEAKBENCH], min(rounds), max(rounds))
    if own:
        result["rate"] = own["evaluations"] / own["seconds"]
    return result


def _ending_lines(row: dict[str, Any]) -> list[str]:
    result = _ending(row)
    targets = dict(zip((BREACHING, REFERENCE), row["target"]))
    lines = []
    for name, sums in result["total"].items():
        passes = len(row["rounds"]) if name == LEAKBENCH else 1
        trials = round(sums["trials"] / passes)
        groups = effective_groups(list(Counter(groups_of(range(trials))).values()))
        low, high = wilson_interval(round(sums["successes"] / passes) / trials, groups)
        target = targets.get(name)
        lines.append(
            {
                "subject": name,
                "trials": f"{sums['trials'] / passes:.0f}",
                "successes": f"{sums['successes'] / passes:.3g} ({100 * low:.0f}–{100 * high:.0f} %)",
                "diverged": f"{sums['diverged'] / passes:.3g}",
                "evaluations a trial": f"{sums['evaluations'] / sums['trials']:.0f}",
                "ms an evaluation": _number(1e3 * sums["seconds"] / sums["evaluations"]),
                "s a success": _number(result["each"][name]),
                "leakbench's gain": "" if name == LEAKBENCH else _ratio(result[name], None),
                "target": "" if target is None else f"≥ {target:g}×",
            }
        )
    order = {name: place for place, name in enumerate((LEAKBENCH, REFERENCE, BREACHING))}
    lines.sort(key=lambda line: order[line["subject"]])
    text = (
        f"{row['trials']} trials of at most {row['steps']} outer steps; a success is a PSNR of at least "
        f"{row['success_db']:g} dB. leakbench works on {row['slots']} at a time; where one ends, the next begins."
    )
    return [text, _table(lines)]


def _memory_lines(rows: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "work": row["title"],
            "trials at once": str(row["trials"]),
            "side": str(row["side"]),
            "process, GiB": row["error"] or f"{row['bytes'] / 2**30:.2f}",
            **({"device, GiB": f"{row['device_bytes'] / 2**30:.2f}"} if row["device_bytes"] is not None else {}),
            "target": f"< {MEMORY_TARGET:g}" if _is_memory_case(row) else "",
        }
        for row in rows
    ]


def _is_memory_case(row: dict[str, Any]) -> bool:
    """Return whether a row is the one that has a target."""
    return (row["attack"], row["model"], row["trials"], row["side"]) == ("ig", "lenet", 64, 32)


def _memory_line(measured: dict[str, Any]) -> str:
    """Return a paragraph on the peak memory of the case that has a target, where it was measured."""
    for row in measured["memory"]:
        if _is_memory_case(row) and row["bytes"] is not None:
            on = "" if row["device_bytes"] is None else f", and {row['device_bytes'] / 2**30:.2f} GiB of the device"
            return (
                f"\n\nPeak memory of {row['title']}, {row['trials']} trials at once: {row['bytes'] / 2**30:.2f} GiB "
                f"for the whole process beyond importing torch{on}."
            )
    return ""


def _growth_table(curve: dict[str, Any]) -> str:
    lines = []
    for index, point in enumerate(curve["points"]):
        line = {"trials at once" if curve["axis"] == "trials" else "side": str(point["value"])}
        for name in (LEAKBENCH, REFERENCE, BREACHING):
            # what goes one at a time does not depend on T, and was measured at the first point
            alone = curve["axis"] == "trials" and name != LEAKBENCH and index > 0
            times = point["subjects"].get(name) or (curve["points"][0]["subjects"].get(name) if alone else None)
            if times is None:
                continue
            each = per_iteration(times)
            seconds, share = median(each), floor_share(point["flops"], curve["rates"], each)
            line[f"{name}, ms"] = _number(seconds * 1e3 if seconds else None)
            line[f"{name}, share of floor"] = "" if share is None else f"{100 * share:.1f} %"
        lines.append(line)
    at = "" if curve["axis"] == "trials" else f", {curve['trials']} trials at once"
    title = f"IG, {TITLES[curve['model']]}{at}, time of an iteration of one trial:"
    return f"{title}\n\n{_table(lines)}{_bound(curve)}"


def _bound(curve: dict[str, Any]) -> str:
    """Return the times of a step of one trial and of many, and the gain where many share it; of a growth with T."""
    if curve["axis"] != "trials":
        return ""
    measured = {
        point["value"]: seconds
        for point in curve["points"]
        if (seconds := median(per_iteration(point["subjects"][LEAKBENCH])))
    }
    if len(measured) < 2 or min(measured) != 1:
        return ""
    best = min(measured, key=lambda trials: measured[trials])
    others = {
        name: seconds
        for name in (REFERENCE, BREACHING)
        if (times := curve["points"][0]["subjects"].get(name)) and (seconds := median(per_iteration(times)))
    }
    slower = [f"{measured[1] / own:.3g}× as long as {name}" for name, own in others.items() if measured[1] > own]
    gains = f" One trial by itself is slower here: it takes {' and '.join(slower)}." if slower else ""
    over = [f"{seconds / measured[best]:.3g}× over {name}" for name, seconds in others.items()]
    gains += f" At T = {best} the gain is {' and '.join(over)}." if over else ""
    return (
        f"\n\nA step of one trial takes {_number(measured[1] * 1e3)} ms, with dispatch of its operations and lanes of "
        f"a register that hold no trial; of {best} it takes {_number(measured[best] * 1e3)} ms a trial.{gains}"
    )


def parity(folder: Path) -> dict[str, Any] | None:
    """Return the data of the success rates, where they were measured."""
    file = folder / "parity.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def outcomes(trials: dict[str, dict[str, Any]], threshold: float) -> dict[str, list[float]]:
    """Return by ``success`` and ``diverged`` a 1 for each trial that was or did, else a 0.

    Args:
        trials: the outcome of each by its number.
        threshold: the PSNR of a success, in dB.
    """
    return {
        "success": [float(one["psnr"] is not None and one["psnr"] >= threshold) for one in trials.values()],
        "diverged": [float(one["diverged"]) for one in trials.values()],
    }


def _parity(parities: dict[str, Any]) -> str:
    lines = []
    for case in parities["cases"].values():
        alone = case["trials"]["one-at-a-time"]
        both = {number: one for number, one in case["trials"]["batched"].items() if number in alone}
        if not both:
            continue
        groups = groups_of(map(int, both))
        found = [outcomes(trials, case["success_db"]) for trials in (both, {number: alone[number] for number in both})]
        for what in ("success", "diverged"):
            batched, single = (own[what] for own in found)
            differences = [a - b for a, b in zip(batched, single)]
            lines.append(
                {
                    "attack": case["spec"],
                    "network": case["model"],
                    "share": f"PSNR ≥ {case['success_db']:g} dB" if what == "success" else "diverged",
                    "batched": _share(batched, groups),
                    "one at a time": _share(single, groups),
                    "difference, points": _difference(differences, groups),
                }
            )
    if not lines:
        return "## Success rates\n\nNothing has been compared to its end yet."
    machine = parities["machine"]
    text = (
        "In float32 two orders of summation part ways, so rates are compared, not pixels: the same images, weights and "
        "starts, batched by leakbench and one at a time by the reference. The images are crops of 7 photographs, and "
        "the 95 % intervals are by photograph; differences are paired by trial. "
        f"{machine['device']}, torch {machine['torch']}, leakbench at {', '.join(parities['commits'])}, "
        f"{machine['date']}."
    )
    return f"## Success rates\n\n{text}\n\n{_table(lines)}"


def _share(values: Sequence[float], groups: Sequence[int]) -> str:
    low, high = share_interval(values, groups)
    share = sum(values) / len(values)
    return f"{sum(values):.0f}/{len(values)} = {100 * share:.0f} % ({100 * low:.0f}–{100 * high:.0f})"


def _difference(values: Sequence[float], groups: Sequence[int]) -> str:
    """Return the mean of paired differences with its interval, bold if 0 is outside; no interval for one group."""
    low, high = bootstrap_interval(values, groups=groups)
    text = f"{100 * sum(values) / len(values):+.0f}"
    if low != low:
        return text
    text += f" ({100 * low:+.0f} to {100 * high:+.0f})"
    return text if low <= 0 <= high else f"**{text}**"


def plot(measured: dict[str, Any], file: Path) -> None:
    """Draw how the time of an iteration and the peak memory grow with T and with the side of the images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = measured["growth"]
    rows = [row for row in measured["memory"] if row["bytes"] is not None and row["side"] == 32]
    count = len(curves) + bool(rows)
    if not count:
        return
    across = min(2, count)
    figure = Figure(figsize=(5.2 * across, 3.8 * -(-count // across) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(-(-count // across), across, squeeze=False).flatten()
    for panel in panels[count:]:
        panel.set_axis_off()
    for panel, curve in zip(panels, curves):
        _draw_curve(panel, curve)
    if curves:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    if rows:
        panel, on_device = panels[count - 1], measured["kind"] == "cuda"
        for model, style in (("lenet", "o-"), ("resnet20", "s--")):
            own = [row for row in rows if row["model"] == model]
            sizes = [(row["device_bytes"] if on_device else row["bytes"]) / 2**30 for row in own]
            if own:
                panel.plot([row["trials"] for row in own], sizes, style, color="#0072b2", label=TITLES[model])
        _log_axes(panel, sorted({row["trials"] for row in rows}))
        panel.set_xlabel("trials at once")
        panel.set_ylabel("GiB of the device" if on_device else "GiB beyond importing torch")
        panel.set_title("Peak memory of IG", fontsize=11)
        panel.legend(fontsize=9)
    figure.savefig(file, dpi=100, metadata={"Software": None})


def _draw_curve(panel: Any, curve: dict[str, Any]) -> None:
    """Draw the time of an iteration along an axis; what goes one at a time does not depend on T, and is level."""
    colours = {LEAKBENCH: "#0072b2", REFERENCE: "#d55e00", BREACHING: "#5b5b5b"}
    labels = {LEAKBENCH: "leakbench", REFERENCE: "plain torch, one at a time", BREACHING: "breaching"}
    trials, values = curve["axis"] == "trials", [point["value"] for point in curve["points"]]
    for name, colour in colours.items():
        found = [
            (point["value"], seconds * 1e3)
            for point in curve["points"]
            if name in point["subjects"] and (seconds := median(per_iteration(point["subjects"][name])))
        ]
        if found and trials and name != LEAKBENCH:
            found = [(value, found[0][1]) for value in values]
        if found:
            style = "--" if trials and name != LEAKBENCH else "o-"
            panel.plot(*zip(*found), style, color=colour, label=labels[name])
    rate = median(curve["rates"])
    if rate:
        least = [point["flops"] / rate * 1e3 for point in curve["points"]]
        panel.plot(values, least, ":", color="black", label="arithmetic floor")
    _log_axes(panel, values)
    panel.set_xlabel("trials at once" if trials else "side of the images, pixels")
    panel.set_ylabel("ms for an iteration of one trial")
    where = "" if trials else f", {curve['trials']} trials at once"
    panel.set_title(f"IG, {TITLES[curve['model']]}{where}", fontsize=11)


def _log_axes(panel: Any, values: Sequence[int]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(list(values), [str(value) for value in values])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.grid(alpha=0.3)


def _table(lines: Sequence[dict[str, Any]]) -> str:
    return tabulate(list(lines), headers="keys", tablefmt="github", disable_numparse=True) if lines else NOTHING


def _ratio(value: Ratio | None, reason: str | None) -> str:
    if value is None:
        return f"– ({reason})" if reason else "–"
    return f"{_number(value.value)}× ({_number(value.low)}–{_number(value.high)})"


def _number(value: float | None) -> str:
    """Return three significant digits without an exponent, or an empty string."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _list(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "reports" / "speed"
    write(target, ROOT / "README.md" if target.resolve() == ROOT / "reports" / "speed" else None)
