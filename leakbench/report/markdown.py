"""``report.md``: what the run was, its tables and pictures, and how to read them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from leakbench.analysis.controls import control_gains
from leakbench.analysis.summary import ANY, BLOCK, strongest, summarise, without_repeats
from leakbench.core.text import ABSENT, decimals, english, number, with_interval
from leakbench.models.weights import Checkpoint
from leakbench.report.about import about
from leakbench.report.differences import differences
from leakbench.report.md import escape, table
from leakbench.store.records import MetricInfo, RunSession, Statement, StoredComponent, threshold_of

MAIN = ("psnr", "ssim", "lpips_vgg", "lpips_alex", "mse", "psnr_aligned", "ssim_aligned", "label_correct")
"""The metrics that a table starts with; others follow in the order they were recorded."""

FETCH = "leakbench assets fetch lpips-vgg lpips-alex"
"""The command that fetches the weights of LPIPS."""

_PAPER = "paper_"
_ENCODED = ("psnr_encoded", "ssim_encoded")
_RANKED = ("psnr", "lpips_vgg", "psnr_aligned")
_VERDICTS = ("lpips_vgg", "lpips_alex")
_REASONS = 25
_KNOWN = {
    "lpips_vgg": MetricInfo("lpips_vgg", False, "LPIPS distance, VGG-16 features, 0 for equal images", ""),
    "lpips_alex": MetricInfo("lpips_alex", False, "LPIPS distance, AlexNet features, 0 for equal images", ""),
}


@dataclass(frozen=True)
class Picture:
    """A grid that the report shows: which block it belongs to, its path from the report, and what it shows."""

    block: tuple[str, str, str]
    path: str
    title: str
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """All of a run that a report says.

    Attributes:
        name: what the run is called.
        planned: how many trials were planned.
        results: one row per trial with a result (``Store.results``).
        threats: threat model -> what it grants, in words.
        components: what each spec stands for.
    """

    name: str
    sessions: Sequence[RunSession]
    planned: int
    results: pd.DataFrame
    metrics: Sequence[MetricInfo]
    threats: Mapping[str, str]
    components: Sequence[StoredComponent] = ()


def markdown(run: Run, pictures: Sequence[Picture] = ()) -> str:
    """Return the report of a run; it depends on nothing but its arguments."""
    parts = [f"# Leakage report: {escape(run.name)}", about(run.sessions, run.results, run.planned)]
    if not len(run.results):
        return "\n\n".join([*parts, "No trial has ended yet: there is nothing to show."]) + "\n"
    summary = summarise(run.results, run.metrics)
    words, images = trained(run.components), notes(run.components)
    heading = None
    for key, block in summary.groupby(list(BLOCK), sort=False):
        dataset, model, threat = (str(part) for part in key)
        if heading != (dataset, model):
            heading = (dataset, model)
            parts += [f"## {escape(dataset)}, {escape(model)}", escape(images.get(dataset, "")), words.get(model, "")]
        results = run.results[(run.results[list(BLOCK)] == [dataset, model, threat]).all(axis=1)]
        parts += [f"### Threat model: {escape(threat)}", escape(run.threats.get(threat, ""))]
        parts += _tables(block, run.metrics)
        parts += _controls(results, run)
        parts += differences(run.results, (dataset, model, threat), run.metrics, threshold_of(run.sessions) is not None)
        parts += _reasons(results)
        shown = [picture for picture in pictures if picture.block == (dataset, model, threat)]
        parts += [f"![{escape(picture.title)}]({picture.path})" for picture in shown]
    parts += _legend(run, summary, pictures)
    return "\n\n".join(part for part in parts if part) + "\n"


def _tables(block: pd.DataFrame, metrics: Sequence[MetricInfo]) -> list[str]:
    """Return the tables of one dataset, model and threat model."""
    standard = [metric for metric in _standard(metrics) if metric.name not in _ENCODED or _has(block, metric.name)]
    paper = [metric for metric in metrics if metric.name.startswith(_PAPER)]
    parts = [_main_table(block, standard), _gain_table(block, standard), _strongest_table(block, standard)]
    if paper:
        parts += [
            "**In the conventions of published code** (`paper_*`; never compare these columns with those above):",
            _paper_table(block, paper),
        ]
    return parts


def _standard(metrics: Sequence[MetricInfo]) -> list[MetricInfo]:
    """Return the metrics of the main table: those of ``MAIN`` first; LPIPS has its columns even where it is absent."""
    known = _KNOWN | {metric.name: metric for metric in metrics if not metric.name.startswith(_PAPER)}
    return [known[name] for name in dict.fromkeys((*MAIN, *known)) if name in known]


def _has(block: pd.DataFrame, name: str) -> bool:
    """Return whether any cell has a value of a metric."""
    return name in block and bool(block[name].notna().any())


def _header(metric: MetricInfo) -> str:
    return f"{escape(metric.name)} {'↑' if metric.higher_is_better else '↓'}"


def _cell(row: pd.Series) -> list[str]:
    attack = f"{escape(row['attack'])} (floor)" if row["floor"] else escape(row["attack"])
    return [attack, escape(row["defense"])]


def _counts(row: pd.Series) -> list[str]:
    """Return n, how many diverged, and how many have no score, by why."""
    unscored = ", ".join(f"{row[status]} {status}" for status in ("unsupported", "error") if row[status])
    return [str(row["n"]), str(row["failed"]), unscored or "0"]


def _value(row: pd.Series, name: str, places: int | None, interval: bool) -> str:
    """Return a mean, with the number of trials it is over where not all of the scored ones have it."""
    if name not in row or pd.isna(row[name]):
        return "" if name in _KNOWN else ABSENT
    text = with_interval(row[name], row[f"{name} low"], row[f"{name} high"], places) if interval else ""
    text = text or number(row[name], places)
    return text if row[f"{name} n"] == row["ok"] + row["failed"] else f"{text} (n={row[f'{name} n']})"


def _gain(row: pd.Series, name: str, places: int | None) -> str:
    if row["floor"]:
        return "floor"
    return with_interval(row[f"{name} gain"], row[f"{name} gain low"], row[f"{name} gain high"], places, sign=True)


def _places(block: pd.DataFrame, name: str) -> int | None:
    return decimals(block[name]) if name in block else 2


def _main_table(block: pd.DataFrame, metrics: Sequence[MetricInfo]) -> str:
    places = {metric.name: _places(block, metric.name) for metric in metrics}
    gain = ["psnr"] if "psnr" in block else []
    headers = ["attack", "defense", "n", "failed", "no score"]
    for metric in metrics:
        headers += [_header(metric)]
        headers += [f"{escape(metric.name)} gain over floor"] if metric.name in gain else []
    rows = []
    for _, row in block.iterrows():
        cells = _cell(row) + _counts(row)
        for metric in metrics:
            cells.append(_value(row, metric.name, places[metric.name], interval=True))
            cells += [_gain(row, metric.name, places[metric.name])] if metric.name in gain else []
        rows.append(cells)
    return table(headers, rows, left=2)


def _gain_table(block: pd.DataFrame, metrics: Sequence[MetricInfo]) -> str:
    """Return the gains over the best floor in the other metrics, and which floors these were."""
    attacks = block[~block["floor"].astype(bool)]
    if not len(attacks):
        return ""
    gained = [m.name for m in metrics if m.name in block and attacks[f"{m.name} gain"].notna().any()]
    if not gained:
        return "No floor has a score here, so no gain is shown: add the attacks grey and mean to the matrix."
    floors = [
        f"{escape(name)}: {english(escape(floor) for floor in attacks[f'{name} floor'].unique() if floor)}"
        for name in gained
    ]
    others = [name for name in gained if name != "psnr"]
    rows = [_cell(row) + [_gain(row, name, _places(block, name)) for name in others] for _, row in attacks.iterrows()]
    gains = table(["attack", "defense", *(escape(name) for name in others)], rows, left=2) if others else ""
    title = (
        "**Gain over the best floor**, mean per image with its 95 % interval; above 0 means that the attack leaks more "
        "than the floor:"
    )
    return "\n\n".join([*([title, gains] if gains else []), f"Best floor in each metric: {'; '.join(floors)}."])


def _strongest_table(block: pd.DataFrame, metrics: Sequence[MetricInfo]) -> str:
    """Return, per defense, the attack that gains most."""
    attacks = block[~block["floor"].astype(bool)]
    known = {metric.name for metric in metrics} & set(block.columns)
    names = [name for name in _RANKED if name in known and attacks[f"{name} gain"].notna().any()]
    if not names or attacks["attack"].nunique() < 2:
        return ""
    best = {name: strongest(block, name).set_index("defense") for name in names}
    rows = []
    for defense in attacks["defense"].drop_duplicates():
        cells = [escape(defense)]
        for name in names:
            if defense not in best[name].index:
                cells.append(ABSENT)
                continue
            row = best[name].loc[defense]
            places = _places(block, name)
            gain = with_interval(row["gain"], row["low"], row["high"], places, sign=True)
            cells.append("no attack beats the floor" if row["floor"] else f"{escape(row['attack'])}: {gain}")
        rows.append(cells)
    title = "**Strongest attack behind each defense**, by its gain over the best floor:"
    return f"{title}\n\n{table(['defense', *(f'by {escape(name)}' for name in names)], rows, left=1 + len(names))}"


def _controls(results: pd.DataFrame, run: Run) -> list[str]:
    """Return what attacks with a generator gain over its floor and over their controls, and whether that is shown."""
    metrics = _standard(run.metrics)
    gains = control_gains(results, run.components, metrics)
    if not gains:
        return []
    named = [metric.name for metric in metrics if any(metric.name in gain.values for gain in gains)]
    places = {name: decimals(gain.values[name][0] for gain in gains if name in gain.values) for name in named}
    rows, verdicts = [], []
    for gain in gains:
        names = [escape(gain.attack), escape(gain.defense), escape(gain.control)]
        cells = [
            with_interval(*gain.values[name], places[name], sign=True) if name in gain.values else ABSENT
            for name in named
        ]
        rows.append(names + cells)
        for name in _VERDICTS:
            if name in gain.values:
                verdicts.append(f"{names[0]} behind {names[1]}, over {names[2]}: {_verdict(name, *gain.values[name])}")
    title = (
        "**What the gradient adds to the generator**: the gain over images that the same generator draws without the "
        "gradient, and over the same search for the gradient of another image; mean per image with its 95 % interval, "
        "above 0 where more leaks:"
    )
    compared = table(["attack", "defense", "over", *(escape(name) for name in named)], rows, left=3)
    return [title, compared, "\n".join(f"- {verdict}" for verdict in verdicts)]


def _verdict(name: str, mean: float, low: float, high: float) -> str:
    """Return in words whether a gain is there."""
    if low > 0:
        return f"a gain in {escape(name)}."
    if high < 0:
        return f"no gain in {escape(name)}: it is worse."
    return f"no gain is shown in {escape(name)}: its interval holds 0, or is undefined."


def _paper_table(block: pd.DataFrame, metrics: Sequence[MetricInfo]) -> str:
    places = {metric.name: _places(block, metric.name) for metric in metrics}
    rows = [
        _cell(row) + _counts(row) + [_value(row, metric.name, places[metric.name], interval=True) for metric in metrics]
        for _, row in block.iterrows()
    ]
    return table(["attack", "defense", "n", "failed", "no score", *map(_header, metrics)], rows, left=2)


def _reasons(results: pd.DataFrame) -> list[str]:
    """Return why trials failed or have no score, each reason once."""
    bad = without_repeats(results[results["status"] != "ok"])
    if not len(bad):
        return []
    groups = bad.groupby(["attack", "defense", "status", "reason"], sort=False).size().reset_index(name="trials")
    rows = [
        [escape(row["attack"]), escape(row["defense"]), row["status"], escape(row["reason"]), str(row["trials"])]
        for row in groups.head(_REASONS).to_dict("records")
    ]
    more = f"\n\nAnd {len(groups) - _REASONS} more; `results.csv` has them all." if len(groups) > _REASONS else ""
    title = "**Trials that failed or have no score, and why**:"
    return [f"{title}\n\n{table(['attack', 'defense', 'status', 'reason', 'trials'], rows, left=4)}{more}"]


def _options(component: StoredComponent) -> str:
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in component.options.items())


def _legend(run: Run, summary: pd.DataFrame, pictures: Sequence[Picture]) -> list[str]:
    """Return the explanation of every column, and what to remember."""
    metrics = [*_standard(run.metrics), *(m for m in run.metrics if m.name.startswith(_PAPER))]
    missing = [m.name for m in metrics if "lpips" in m.name and (m.name not in summary or summary[m.name].isna().all())]
    words = [
        "## How to read this",
        "Metrics. ↑ marks a metric whose higher values mean more leakage (a reconstruction closer to the private "
        "image), ↓ one whose lower values do.",
        table(
            ["metric", "more leakage is", "convention", "note"],
            [
                [escape(m.name), "higher" if m.higher_is_better else "lower", escape(m.convention), escape(m.note)]
                for m in metrics
            ],
            left=4,
        ),
    ]
    if run.components:
        rows = [
            [component.kind, escape(component.spec), escape(_options(component)), str(component.version)]
            for component in run.components
        ]
        words += [
            "What each name stands for, with every option, those left at their default included:",
            table(["kind", "name", "options", "version"], rows, left=4),
            stated(run.components),
        ]
    if missing:
        words.append(
            f"{english(map(escape, missing))} {'is' if len(missing) == 1 else 'are'} empty: not computed in this run. "
            f"Where the weights of LPIPS are missing, `{FETCH}` fetches them; then run into a new folder, "
            "since trials that are done are not scored again."
        )
    aligned = [name for name in ("psnr_aligned", "ssim_aligned") if any(m.name == name for m in metrics)]
    points = [
        "**n** counts every trial that ended, one per image and seed. **failed**: the attack diverged: its search "
        "became non-finite, or ended no closer to the observed gradient than it began. Such a trial is scored as the "
        "plain grey image (which in PSNR can be more than the attack's own image) and stays in every mean. "
        "**no score**: the attack does not support this case "
        "(unsupported) or broke (error); such a trial counts in n and is in no mean, so a mean is over n less these, "
        "or over the number in brackets where fewer have the metric.",
        "**[low, high]** is a 95 % percentile bootstrap interval of the mean: 2000 resamples of the images and, "
        f"within each, of its seeds. **[{ABSENT}]**: undefined, for there is one image only or a value is infinite. "
        f"**{ABSENT}**: there is no value.",
        "**floor**: an attack that uses no gradient (a grey image, the mean image of the dataset, ...). It is the same "
        f"behind every defense, so it is shown once, with {escape(ANY)} as its defense.",
        "**gain over floor**: the mean over images and seeds of what the attack leaks beyond the best floor on the "
        "same images and seeds; the sign is such that above 0 always means more leakage, also for ↓ metrics. The best "
        "floor is chosen per metric. An attack below its floor (gain below 0) leaks nothing that the floor does not: "
        "no defense is ranked as leaking less than the floor.",
    ]
    if aligned:
        points.append(
            f"**{english(map(escape, aligned))}** {'is' if len(aligned) == 1 else 'are'} taken after the best global "
            "brightness and contrast fit to the private image. BatchNorm on a batch of one image makes the contrast "
            "unidentifiable: there, a perfect structure has a poor plain psnr, so look at the aligned columns."
        )
    if any(_has(summary, name) for name in _ENCODED):
        points.append(
            f"**{english(map(escape, _ENCODED))}** compare, aligned, with the image that the client trained on, where "
            "a defense changes the image before the step; every other metric compares with the image as it was. What "
            "leaks is the former: where it is high and the others are low, look at the pictures, for a shift or a "
            "blend of two images hides little from the eye."
        )
    if trained(run.components):
        points.append(LEGEND)
    if pictures:
        shown, seeds = len({picture.seed for picture in pictures}), run.results["seed"].nunique()
        fewer = f" Of the {seeds} seeds, the first {shown} are shown." if shown < seeds else ""
        points.append(
            "**Pictures** show the first images by index, never a choice. Reconstructions are as the attack returned "
            "them, clamped to [0, 1], without any fit of contrast; small images are enlarged without smoothing, images "
            "of more than 128 pixels are reduced. A red frame marks a trial that diverged." + fewer
        )
    return [*filter(None, words), "\n".join(f"- {point}" for point in points)]


_TITLE = (
    "What the defenses state of themselves: what a reader must know of their options, and what an attacker does who is "
    'informed of them (`informed = true` in a threat model; a further one by its name, `informed = "NAME"`):'
)


def stated(components: Iterable[StoredComponent]) -> str:
    """Return a table, in Markdown, with a row for every defense; empty where the run holds no such words."""
    own = [(one.spec, one.statement) for one in components if one.kind == "defense" and one.statement is not None]
    rows = [[escape(spec), escape(statement.note) or ABSENT, _attackers(statement)] for spec, statement in own]
    return f"{_TITLE}\n\n{table(['defense', 'note', 'informed attacker'], rows, left=3)}" if rows else ""


def notes(components: Iterable[StoredComponent]) -> dict[str, str]:
    """Return what a reader must know of the images of each dataset that has a note."""
    return {one.spec: one.statement.note for one in components if one.kind == "dataset" and one.statement is not None}


def _attackers(statement: Statement) -> str:
    words = [escape(said if name == "true" else f'"{name}": {said}') for name, said in statement.informed.items()]
    return "; ".join(words) or "none stated"


LEGEND = (
    "**Trained weights**: stage and test accuracy are as the file stated them when the run was started; they were not "
    "measured in this run. Unless it says that the network was trained behind the defense, they are of the "
    "network without a defense, and what a defense adds to it is untrained."
)


def trained(components: Iterable[StoredComponent]) -> dict[str, str]:
    """Return one sentence, in Markdown, on each model that has trained weights."""
    return {one.spec: _words(one.checkpoint) for one in components if one.checkpoint is not None}


def _words(checkpoint: Checkpoint) -> str:
    file, training = escape(checkpoint.file), checkpoint.training
    if training is None:
        return f"Trained weights: {file}; stage and accuracy not stated in the file."
    accuracy = f"{100 * training.test_accuracy:.2f} %"
    stage, dataset = escape(training.stage), escape(training.dataset)
    behind = f" behind {escape(training.defense)}, with that client's own secrets" if training.defense else ""
    return f"Trained weights: {file}, stage {stage}, test accuracy {accuracy} on {dataset}{behind}."
