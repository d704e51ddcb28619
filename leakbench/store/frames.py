"""Rows of the run file as the components and the tables that readers ask for."""

import functools
import hashlib
import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd
from pydantic import TypeAdapter

from leakbench import attacks, datasets
from leakbench.core.text import name_of
from leakbench.errors import LeakbenchError
from leakbench.models.base import with_mode
from leakbench.models.weights import Checkpoint
from leakbench.plan.trial import split_label
from leakbench.store.records import Statement, StoredComponent

BEFORE = ("trial", "dataset", "model", "defense", "attack", "threat", "image", "seed", "status", "seconds")
"""The columns of the results before the metrics."""
AFTER = ("reason", "objective", "evaluations", "floor", "path", "group")
"""The columns of the results after the metrics."""

SPECS = ("dataset", "model", "threat", "defense", "attack")
"""The columns that name a component or a threat model, in the order by which results are sorted."""

TRIALS = (
    "SELECT trials.id AS trial, image, seed, coalesce(status, '') AS status, seconds, coalesce(reason, '') AS reason,"
    " objective, evaluations, floor, coalesce(path, '') AS path, cell_id FROM trials JOIN cells ON cells.id = cell_id"
    " LEFT JOIN results ON trials.id = trial_id WHERE floor != 2 ORDER BY position, trials.rowid"
)
"""The query for the first argument of ``trials``; ``CONTROLS`` is that for controls."""

CONTROLS = TRIALS.replace("floor != 2", "floor = 2")


def components(cells: Sequence[sqlite3.Row], stated: Callable[[str], Mapping[str, str]]) -> list[StoredComponent]:
    """Return every dataset, model, defense and attack of some cells.

    Args:
        cells: rows of the table ``cells``.
        stated: returns what was recorded of components of a kind, both JSON, by their settings (``Store.stated``).
    """
    checkpoints = {settings: _CHECKPOINT.validate_json(text) for settings, text in stated("checkpoint").items()}
    found = []
    for kind in ("dataset", "model", "defense", "attack"):
        statements = {settings: _STATEMENT.validate_json(text) for settings, text in stated(kind).items()}
        for spec, text, variant in dict.fromkeys(_variants(cells, kind).values()):
            own = json.loads(text)
            found.append(
                StoredComponent(
                    kind=kind,
                    spec=_labelled(spec, variant),
                    version=int(own["version"]),
                    options={name: value for name, value in own.items() if name not in ("name", "version")},
                    checkpoint=checkpoints.get(text) if kind == "model" else None,
                    statement=statements.get(text),
                    variant=variant,
                )
            )
    return found


def trials(
    rows: Sequence[sqlite3.Row],
    cells: Sequence[sqlite3.Row],
    scores: Sequence[sqlite3.Row],
    metrics: list[str],
    groups: Mapping[str, str],
) -> pd.DataFrame:
    """Return one row per trial: ``BEFORE``, the metrics, ``AFTER``.

    Args:
        rows: what ``TRIALS`` returns.
        cells: rows of the table ``cells``.
        scores: rows of (trial, metric, value).
        metrics: the names of the metrics, in order.
        groups: what was recorded of the groups of images (``Store.stated``).
    """
    own = [column for column in (*BEFORE, *AFTER) if column not in (*SPECS, "group")]
    planned = {column: [row[column] for row in rows] for column in own}
    groups_of = _groups(cells, groups)
    planned["group"] = [groups_of[row["cell_id"]](row["image"]) for row in rows]
    for axis in SPECS:
        labels = {cell: _labelled(spec, variant) for cell, (spec, _, variant) in _variants(cells, axis).items()}
        planned[axis] = [labels[row["cell_id"]] for row in rows]
    frame = pd.DataFrame(planned).astype(
        dict.fromkeys(("trial", *SPECS, "status", "reason", "path"), "str")
        | dict.fromkeys(("image", "seed", "group"), "int64")
        | {"seconds": "float64", "objective": "float64", "evaluations": "Int64", "floor": "bool"}
    )
    values = pd.DataFrame([tuple(row) for row in scores], columns=["trial", "metric", "value"])
    wide = values.pivot(index="trial", columns="metric", values="value").reindex(index=frame["trial"], columns=metrics)
    for name in metrics:
        frame[name] = wide[name].to_numpy(dtype="float64")
    return frame[[*BEFORE, *metrics, *AFTER]]


def ended(planned: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of trials that have a result, in the order of ``Store.results``."""
    ranks = {f"{axis} rank": pd.factorize(planned[axis])[0] for axis in SPECS}
    found = planned.assign(**ranks)[planned["status"] != ""]
    return found.sort_values([*ranks, "seed", "image", "trial"], ignore_index=True)[list(planned.columns)]


def _groups(cells: Sequence[sqlite3.Row], recorded: Mapping[str, str]) -> dict[int, Callable[[int], int]]:
    """Return by cell the function from an image to its group: as recorded, or else as its dataset states it now."""
    texts = {cell["id"]: json.dumps(json.loads(cell["settings"])["dataset"], sort_keys=True) for cell in cells}
    found = {text: _group_of(text, recorded.get(text)) for text in set(texts.values())}
    return {cell: found[text] for cell, text in texts.items()}


def _group_of(settings: str, recorded: str | None) -> Callable[[int], int]:
    if recorded is not None:
        known = _GROUPS.validate_json(recorded)
        return lambda image: known.get(image, image)
    options = {name: value for name, value in json.loads(settings).items() if name not in ("name", "version")}
    try:
        return functools.cache(datasets.registry.build(json.loads(settings)["name"], options).group)
    except LeakbenchError:  # of a plugin that is not here, or of a folder
        return lambda image: image


def _variants(cells: Sequence[sqlite3.Row], axis: str) -> dict[int, tuple[str, str, str]]:
    """Return by cell: the spec of an axis, its settings (JSON), and a variant if others have the same spec.

    The variant is a version, or a hash of the settings if another one has the same version. Cells of one spec follow
    each other.
    """
    texts = {cell["id"]: json.dumps(json.loads(cell["settings"])[axis], sort_keys=True) for cell in cells}
    by_spec: dict[str, dict[str, object]] = {}
    specs = {cell["id"]: cell[axis] for cell in cells}
    if axis == "model":
        specs = {name: with_mode(spec, json.loads(texts[name])) for name, spec in specs.items()}
    for cell in cells:
        text = texts[cell["id"]]
        by_spec.setdefault(specs[cell["id"]], {})[text] = json.loads(text).get("version")
    found = {}
    rank = {spec: place for place, spec in enumerate(by_spec)}
    for cell in sorted(cells, key=lambda cell: rank[specs[cell["id"]]]):
        spec = specs[cell["id"]]
        text, alike = texts[cell["id"]], by_spec[spec]
        unique = list(alike.values()).count(alike[text]) == 1
        apart = f"version {alike[text]}" if unique else f"settings {hashlib.sha256(text.encode()).hexdigest()[:6]}"
        found[cell["id"]] = (spec, text, "" if len(alike) == 1 else apart)
    return found


def _labelled(spec: str, variant: str) -> str:
    """Return the name of a spec in the results, which no other component of the run has."""
    return f"{spec} [{variant}]" if variant else spec


_CHECKPOINT = TypeAdapter(Checkpoint)
_STATEMENT = TypeAdapter(Statement)
_GROUPS = TypeAdapter(dict[int, int])


def from_csv(file: Path, read: Callable[[str], bool] = lambda column: True) -> pd.DataFrame:
    """Return the results of a ``results.csv`` as ``Store.results`` has them, without those of controls.

    Args:
        file: the CSV of a report, also of an older version, which lacks the column ``group``.
        read: whether a column is read; all others are left out.
    """
    data = pd.read_csv(file, keep_default_na=False, na_values=[""], usecols=read)
    kinds = {spec: attacks.get(name_of(spec)) for spec in data["attack"].unique()}
    data = data[~data["attack"].map({spec: kind.is_control for spec, kind in kinds.items()})]
    if "group" not in data:
        places = data[["dataset", "image"]].drop_duplicates().itertuples(index=False, name=None)
        groups = {(spec, image): datasets.parse(split_label(spec)[0]).group(image) for spec, image in places}
        data = data.assign(group=[groups[place] for place in zip(data["dataset"], data["image"])])
    floors = data["attack"].map({spec: kind.floor for spec, kind in kinds.items()})
    return data.assign(floor=floors, reason=data["reason"].astype("str").fillna(""), path="")
