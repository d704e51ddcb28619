"""``report.md``: the settings of a run, its tables and pictures, and how to read them."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import pandas as pd

from leakbench.analysis.controls import control_gains
from leakbench.analysis.failures import defense_failures
from leakbench.analysis.summary import ANY, BLOCK, blocks, strongest, without_repeats
from leakbench.analysis.verdict import inconclusive
from leakbench.core.text import ABSENT, decimals, number, plural, with_interval
from leakbench.metrics import NOT_LEAKAGE
from leakbench.models.weights import Checkpoint
from leakbench.plan.matrix import RECOVERY
from leakbench.report.differences import differences
from leakbench.report.display import escape, gain_text, leakage_table, to_markdown
from leakbench.report.page import render_markdown
from leakbench.report.public import public_tables
from leakbench.report.run import Picture, RunData
from leakbench.store.records import MetricInfo, Statement, StoredComponent

MAIN_METRICS = ("psnr", "ssim", "lpips_vgg", "lpips_alex", "mse", "psnr_aligned", "ssim_aligned", "label_correct")
"""The metrics that a table starts with; others follow in the order in which they were recorded."""

PAPER_PREFIX = "paper_"
"""The names of metrics in the convention of published code begin with this."""

SHORT_METRICS = ("psnr", "ssim", "lpips_vgg", "ssim_aligned")
"""The metrics of the table that is seen first, which has at most eight columns; the whole table is folded."""

_ENCODED = ("psnr_encoded", "ssim_encoded")
_RANKED = ("psnr", "lpips_vgg", "psnr_aligned")
_VERDICTS = ("lpips_vgg", "lpips_alex")
_MAX_REASONS = 25
_LPIPS = {
    "lpips_vgg": MetricInfo("lpips_vgg", False, "LPIPS distance, VGG-16 features, 0 for equal images", ""),
    "lpips_alex": MetricInfo("lpips_alex", False, "LPIPS distance, AlexNet features, 0 for equal images", ""),
}


PROOFS = {"proved": "images proved, a client", "expected_share": "share expected by theory"}
"""The findings of attacks that a report shows, and what they are."""


def markdown(
    run: RunData,
    pictures: Sequence[Picture] = (),
    heatmaps: Mapping[tuple[str, str], str] = MappingProxyType({}),
    galleries: Mapping[tuple[str, str], str] = MappingProxyType({}),
) -> str:
    """Return the report of a run; it depends on nothing but its arguments.

    Args:
        run: all that the report shows.
        pictures: its grids.
        heatmaps: (dataset, model) -> the path of the heat map of recovered images (``charts.heatmap``).
        galleries: (dataset, model) -> the path of the pictures of one image (``gallery.gallery``).
    """
    summary = run.summary
    weights, images, flaws = trained(run.components), notes(run.components), _inconclusive(run)
    shown, last, public = [], None, dict(public_tables(run))
    recovered = run.ensembles if RECOVERY in run.trials else []
    for block_of, block in blocks(summary):
        dataset, model, threat = block_of
        results = run.results[(run.results[list(BLOCK)] == list(block_of)).all(axis=1)]
        shown.append(
            {
                "heading": [dataset, model] if last != (dataset, model) else [],
                "heatmap": heatmaps.get((dataset, model), ""),
                "gallery": galleries.get((dataset, model), ""),
                "images": images.get(dataset, ""),
                "inconclusive": flaws.get((dataset, model), ""),
                "weights": weights.get(model, ""),
                "results": [one for one in recovered if (one.dataset, one.model) == (dataset, model)],
                "threat": threat,
                "granted": run.threats.get((threat, dataset), ""),
                **_tables(block, run.metrics),
                **_controls(results, run),
                "proofs": _proofs(results, run),
                "public": to_markdown(public[block_of]) if block_of in public else "",
                "differences": differences(run.results, block_of, run.metrics, run.threshold is not None),
                "failures": defense_failures(results),
                **_reasons(results),
                "pictures": [picture for picture in pictures if picture.block == block_of],
            }
        )
        last = (dataset, model)
    return render_markdown(
        "report.md.j2",
        name=run.name,
        about=run.about(),
        blocks=shown,
        **(_legend(run, summary, pictures) if shown else {}),
    )


def _proofs(results: pd.DataFrame, run: RunData) -> str:
    """Return by attack and defense how many images a client are proved, and the share that theory expects."""
    found = run.findings[run.findings["name"].isin(PROOFS)]
    rows = results[["trial", "attack", "defense"]].merge(found, on="trial")
    if rows.empty:
        return ""
    table = rows.pivot_table("value", ["attack", "defense"], "name", "mean", sort=False)
    shown = table[[name for name in PROOFS if name in table]].rename(columns=PROOFS).reset_index()
    cells = {name: [number(value, 2) for value in shown[name]] for name in shown.columns[2:]}
    return to_markdown(shown.assign(**cells))


def _inconclusive(run: RunData) -> dict[tuple[str, str], str]:
    """Return why defenses cannot be compared, by dataset and model; empty if nothing was measured."""
    if RECOVERY not in run.trials:
        return {}
    known = any(not math.isnan(one.share) for one in run.ensembles)
    return inconclusive(run.ensembles, run.components) if known else {}


def _tables(block: pd.DataFrame, metrics: Sequence[MetricInfo]) -> dict[str, object]:
    """Return the tables of one dataset, model and threat model."""
    standard = [metric for metric in _standard(metrics) if metric.name not in _ENCODED or _has(block, metric.name)]
    paper = [metric for metric in metrics if metric.name.startswith(PAPER_PREFIX)]
    return {
        "main": _short(block, standard),
        "whole": to_markdown(leakage_table(block, standard, ["psnr"] if "psnr" in block else [])),
        "gains": _gains(block, standard),
        "floors": _floors(block, standard),
        "attacked": bool((~block["floor"].astype(bool)).any()),
        "strongest": _strongest(block, standard),
        "paper": to_markdown(leakage_table(block, paper)) if paper else "",
    }


def _short(block: pd.DataFrame, metrics: Sequence[MetricInfo]) -> str:
    """Return the table with ``SHORT_METRICS``; the trials that failed or have no score are beside their number."""
    some = [metric for metric in metrics if metric.name in SHORT_METRICS]
    shown = leakage_table(block, some, ["psnr"] if "psnr" in block else [])
    failed, unscored = shown.pop("failed"), shown.pop("no score")
    shown["n"] = [
        ", ".join([n, *([f"{bad} failed"] if bad != "0" else []), *([why] if why != "0" else [])])
        for n, bad, why in zip(shown["n"], failed, unscored)
    ]
    return to_markdown(shown)


def _standard(metrics: Sequence[MetricInfo]) -> list[MetricInfo]:
    """Return the metrics of the main table: ``MAIN_METRICS`` first; LPIPS is there even if it was not computed."""
    known = _LPIPS | {metric.name: metric for metric in metrics if not metric.name.startswith(PAPER_PREFIX)}
    names = dict.fromkeys((*MAIN_METRICS, *known))
    return [known[name] for name in names if name in known and name not in NOT_LEAKAGE]


def _has(block: pd.DataFrame, name: str) -> bool:
    """Return whether any cell has a value of a metric."""
    return name in block and bool(block[name].notna().any())


def _gained(block: pd.DataFrame, metrics: Sequence[MetricInfo]) -> list[str]:
    """Return the metrics in which an attack has a gain over a floor."""
    return [metric.name for metric in metrics if _has(block, f"{metric.name} gain")]


def _gains(block: pd.DataFrame, metrics: Sequence[MetricInfo]) -> list[dict[str, str]]:
    """Return the rows of gains over the best floor in the metrics beside ``psnr``."""
    names = [name for name in _gained(block, metrics) if name != "psnr"]
    places = {name: decimals(block[name]) for name in names}
    attacks = block[~block["floor"].astype(bool)].to_dict("records") if names else []
    return [
        {axis: row[axis] for axis in ("attack", "defense")}
        | {name: gain_text(row, name, places[name]) for name in names}
        for row in attacks
    ]


def _floors(block: pd.DataFrame, metrics: Sequence[MetricInfo]) -> list[tuple[str, list[str]]]:
    """Return the best floors in each metric."""
    floors = {name: block[f"{name} floor"].unique() for name in _gained(block, metrics)}
    return [(name, [floor for floor in own if floor]) for name, own in floors.items()]


def _strongest(block: pd.DataFrame, metrics: Sequence[MetricInfo]) -> str:
    """Return the table that has, per defense, the attack that gains most over the best floor."""
    attacks = block[~block["floor"].astype(bool)]
    names = [name for name in _gained(block, metrics) if name in _RANKED]
    if not names or attacks["attack"].nunique() < 2:
        return ""
    shown = pd.DataFrame({"defense": attacks["defense"].drop_duplicates()})
    broken = attacks.groupby("defense")["broken"].sum()
    for name in sorted(names, key=_RANKED.index):
        best, places = strongest(block, name).set_index("defense"), decimals(block[name])
        texts = {
            defense: "no attack beats the floor"
            if row["floor"]
            else f"{row['attack']}: {with_interval(row['gain'], row['low'], row['high'], places, sign=True)}"
            for defense, row in best.iterrows()
        }
        shown[f"by {name}"] = [_with_failure(texts.get(one), int(broken[one])) for one in shown["defense"]]
    return to_markdown(shown, left=1 + len(names))


def _with_failure(text: str | None, broken: int) -> str:
    """Return the strongest attack on a defense, and that the defense failed in some trials if it did."""
    if not broken:
        return text or ABSENT
    return f"{text} (the defense failed in {plural(broken, 'trial')})" if text else "the defense failed"


def _controls(results: pd.DataFrame, run: RunData) -> dict[str, object]:
    """Return the gains of attacks with a generator over its floor and over their controls, and the verdicts on them."""
    metrics = _standard(run.metrics)
    gains = control_gains(results, run.components, metrics)
    names = [metric.name for metric in metrics if any(metric.name in gain.values for gain in gains)]
    places = {name: decimals(gain.values[name][0] for gain in gains if name in gain.values) for name in names}
    absent = dict.fromkeys(names, ABSENT)
    rows = [
        {"attack": gain.attack, "defense": gain.defense, "over": gain.control, **absent}
        | {name: with_interval(*gain.values[name], places[name], sign=True) for name in names if name in gain.values}
        for gain in gains
    ]
    verdicts = [(gain, name, *gain.values[name][1:]) for gain in gains for name in _VERDICTS if name in gain.values]
    return {"controls": rows, "verdicts": verdicts}


def _reasons(results: pd.DataFrame) -> dict[str, object]:
    """Return why trials failed or have no score, each reason once."""
    columns = ["attack", "defense", "status", "reason"]
    bad = without_repeats(results[results["status"] != "ok"])
    groups = bad.groupby(columns, sort=False).size().reset_index(name="trials").values.tolist()
    return {"reasons": groups[:_MAX_REASONS], "more_reasons": max(0, len(groups) - _MAX_REASONS)}


def _legend(run: RunData, summary: pd.DataFrame, pictures: Sequence[Picture]) -> dict[str, object]:
    """Return the values of the legend."""
    metrics = [*_standard(run.metrics), *(m for m in run.metrics if m.name.startswith(PAPER_PREFIX))]
    seeds, shown = run.results["seed"].nunique(), len({picture.seed for picture in pictures})
    return {
        "metrics": [[m.name, "higher" if m.higher_is_better else "lower", m.convention, m.note] for m in metrics],
        "components": [[one.kind, one.spec, options(one), str(one.version)] for one in run.components],
        "stated": stated(run.components),
        "missing": [m.name for m in metrics if "lpips" in m.name and not _has(summary, m.name)],
        "aligned": [m.name for m in metrics if m.name in ("psnr_aligned", "ssim_aligned")],
        "encoded": list(_ENCODED) if any(_has(summary, name) for name in _ENCODED) else [],
        "trained": bool(trained(run.components)),
        "pictures": len(pictures),
        "seeds": seeds,
        "shown_seeds": shown,
        "ANY": ANY,
        "ABSENT": ABSENT,
    }


def options(component: StoredComponent) -> str:
    """Return every option of a component as ``name=value``."""
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in component.options.items())


def stated(components: Iterable[StoredComponent]) -> str:
    """Return a table, in Markdown, with the note of every defense and its adaptive attackers; empty without any."""
    own = [(one.spec, one.statement) for one in components if one.kind == "defense" and one.statement is not None]
    rows = [[spec, statement.note or ABSENT, _attackers(statement)] for spec, statement in own]
    return render_markdown("stated.md.j2", rows=rows) if rows else ""


def notes(components: Iterable[StoredComponent]) -> dict[str, str]:
    """Return what a reader must know of the images of each dataset that has a note."""
    return {one.spec: one.statement.note for one in components if one.kind == "dataset" and one.statement is not None}


def _attackers(statement: Statement) -> str:
    words = [said if name == "true" else f'"{name}": {said}' for name, said in statement.informed.items()]
    return "; ".join(words) or "none stated"


def trained(components: Iterable[StoredComponent]) -> dict[str, str]:
    """Return one sentence, in Markdown, on each model that has trained weights."""
    return {one.spec: _sentence(one.checkpoint) for one in components if one.checkpoint is not None}


def _sentence(checkpoint: Checkpoint) -> str:
    file, training = escape(checkpoint.file), checkpoint.training
    if training is None:
        return f"Trained weights: {file}; the file states neither stage nor accuracy."
    accuracy = f"{100 * training.test_accuracy:.2f} %"
    stage, dataset = escape(training.stage), escape(training.dataset)
    behind = f" behind {escape(training.defense)}, with that client's own secrets" if training.defense else ""
    return f"Trained weights: {file}, stage {stage}, test accuracy {accuracy} on {dataset}{behind}."
