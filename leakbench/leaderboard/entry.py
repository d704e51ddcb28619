"""Entries of a leaderboard: the worst case of one defense as JSON of a fixed schema."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from leakbench.analysis import pareto as utility
from leakbench.analysis.ensemble import (
    RECOVERED,
    UNPROVEN,
    AttackerStats,
    EnsembleResult,
    attacked_by,
    ensemble_results,
    floor_share,
)
from leakbench.analysis.recovery import caveat
from leakbench.analysis.verdict import inconclusive, missing_attackers
from leakbench.core.files import StrictModel, first_fault
from leakbench.core.text import plural
from leakbench.errors import BadOption, one_line
from leakbench.leaderboard.protocol import judge, protocols
from leakbench.plan.matrix import RECOVERY
from leakbench.store.connection import decoding
from leakbench.store.records import PluginFile, run_name, threshold_of
from leakbench.store.run_file import Store

SCHEMA_FILE = "entry.schema.json"
"""The name of the JSON Schema beside the entries."""


_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0)]
_Text = Annotated[str, Field(min_length=1, max_length=2000)]
_Name = Annotated[
    _Text, AfterValidator(lambda name: name.replace(" (informed)", " (adaptive)"))
]  # as entries once said


class Attacker(StrictModel):
    """The counts of one attacker of the ensemble."""

    name: _Name
    recovered: Annotated[_Count, Field(description="images, once for each seed, that it was the first to recover")]
    tried: Annotated[_Count, Field(description="trials with a score")]
    failed: Annotated[_Count, Field(description="trials that diverged, part of tried")]
    skipped: Annotated[_Count, Field(description="trials not run, since the image had been recovered")]
    evaluations: Annotated[_Count | None, Field(description="of the objective; null if it counts none")]


class TrialOf(StrictModel):
    """One trial, to verify the entry by."""

    id: Annotated[str, Field(pattern="^[0-9a-f]{16}$", description="the hash of every resolved setting")]
    attack: _Text
    threat: _Text
    image: _Count
    seed: int
    status: Literal["ok", "failed", "unsupported"]
    score: Annotated[float | None, Field(description="ssim_aligned; null if there is none")]


class Plugin(StrictModel):
    """A component of the run that is not part of leakbench."""

    kind: _Text
    name: _Text
    file: Annotated[str, Field(max_length=2000, description="the file that defines it; empty if it is in none")]
    sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$", description="the SHA-256 of this file")]


class Cost(StrictModel):
    """The test accuracy behind the defense, if the run has a training study."""

    accuracy: _Share
    without: Annotated[_Share | None, Field(description="that without any defense; null if it was not measured")]


class Entry(StrictModel):
    """The worst case behind one defense, for one dataset and model."""

    schema_: Annotated[Literal["leakbench-leaderboard-2"], Field(alias="schema")] = "leakbench-leaderboard-2"
    run: _Text
    dataset: _Text
    model: _Text
    defense: _Text
    settings: Annotated[dict[str, Any], Field(description="every option of dataset, model and defense, with versions")]
    threshold: Annotated[_Share, Field(description="the ssim_aligned that an image needs to be recovered")]
    images: Annotated[int, Field(ge=1, description="attacked images, without those that a floor recovers")]
    groups: Annotated[int, Field(ge=1, description="independent groups that the images are in")]
    by_floor: Annotated[_Count, Field(description="images left out: a floor reaches the threshold on them")]
    recovered: Annotated[_Share, Field(description="share of the images that at least one attacker recovered")]
    low: Annotated[_Share, Field(description="lower end of the 95 % interval of the share")]
    high: _Share
    floor: Annotated[
        _Share | None, Field(description="share on which the best floor reaches the threshold; null if none was run")
    ]
    missing: Annotated[list[_Text], Field(description="attackers of the suite worst-case that did not run")]
    protocol: Annotated[
        str, Field(description="the protocol that the attacks are of, by which entries are ranked; empty if of none")
    ] = ""
    departures: Annotated[
        tuple[_Text, ...],
        Field(description="how they differ from the protocol of this dataset and model; empty if there is none"),
    ] = ()
    inconclusive: Annotated[str, Field(description="why attackers that recover nothing show nothing; empty if they do")]
    caveat: Annotated[str, Field(description="why to doubt that images count as recovered; empty without a doubt")]
    best_attacker: Annotated[
        _Name | None,
        Field(description="the attacker that was first to recover most images; null if none recovered any"),
    ]
    attackers: list[Attacker]
    adaptive: Annotated[
        tuple[_Text, ...], Field(description="adaptive attackers that ran, or had no image left to recover")
    ] = ()
    unadaptive: Annotated[str, Field(description="why no adaptive attacker ran; empty if one did")] = ""
    cosine: Annotated[
        tuple[float, float | None, float | None] | None,
        Field(description="of what clients sent and their gradient: mean, 95 % interval; null if not measured"),
    ] = None
    useless: Annotated[bool, Field(description="whether what clients sent does not correlate with their gradient")] = (
        False
    )
    accuracy: Cost | None = None
    salt: Annotated[
        str, Field(pattern="^([0-9a-f]{32})?$", description="of the run's keys; empty: they named the images")
    ] = ""
    versions: Annotated[list[_Text], Field(description="of leakbench, with the commit if it ran from a checkout")]
    plugins: Annotated[
        tuple[Plugin, ...], Field(description="components of the run that are not part of leakbench")
    ] = ()
    trials: Annotated[list[TrialOf], Field(min_length=1)]

    @property
    def attacked_by(self) -> str:
        """Which adaptive attackers ran, in a few words."""
        return attacked_by(self.defense, self.adaptive)

    @property
    def foreign(self) -> list[str]:
        """The attacks and metrics that are not part of leakbench, with the files that define them, in words."""
        judging = [one for one in self.plugins if one.kind in ("attack", "generator", "metric")]
        return [PluginFile(**one.model_dump()).words for one in judging]


def schema() -> str:
    """Return the JSON Schema of an entry."""
    described = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Entry.model_json_schema(by_alias=True)}
    return json.dumps(described, indent=1) + "\n"


def read(path: Path) -> Entry:
    """Return the entry in a JSON file.

    Raises:
        BadOption: there is no such file, or it does not match the schema.
    """
    try:
        return Entry.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadOption(f"{path} cannot be read: {error.strerror}; give the JSON file of an entry") from None
    except ValidationError as error:
        raise BadOption(f"{path} is not an entry of a leaderboard: {first_fault(error)}; see {SCHEMA_FILE}") from None


def entries(store: Store, name: str, studies: Sequence[utility.Study] = ()) -> tuple[list[Entry], list[str]]:
    """Return the entries of a run: one for each dataset, model and defense of which no trial is missing or an error.

    Args:
        store: the run file.
        name: the run's, if it has none of its own.
        studies: the utility of the trainings beside it.

    Returns:
        The entries, and a line on each defense without one.
    """
    sessions = store.sessions()
    limit = threshold_of(sessions)
    threshold = RECOVERED if limit is None else limit
    trials, components = store.trials(), {(one.kind, one.spec): one for one in store.components()}
    versions = list(dict.fromkeys(_version(session.provenance) for session in sessions))
    found, missing = [], []
    results = ensemble_results(trials, threshold)
    lacking = missing_attackers(trials, components.values(), threshold)
    of_protocols = [
        (one, missing_attackers(trials, components.values(), threshold, one.scale))
        for one in protocols()
        if any(one.covers(dataset, model) for dataset, model, _ in lacking)
    ]
    flaws = inconclusive(results, components.values())
    for one in results:
        if ("model", one.model) not in components:  # a network that a malicious server crafted is no entry
            missing.append(one_line(f"{one.defense}, on {one.dataset}, {one.model} (run {run_name(sessions, name)})"))
            continue
        scene = trials[(trials["dataset"] == one.dataset) & (trials["model"] == one.model)]
        own = scene[(scene["defense"] == one.defense) & ~scene["floor"] & (scene["status"] != "")]
        broken = int((own["status"] == "error").sum())
        if one.open or broken or not one.images:
            waiting = [f"{plural(one.open, 'trial')} not run yet"] if one.open else []
            failed = [f"{plural(broken, 'trial')} ended in an error"] if broken else []
            failed += [f"the defense failed on {plural(one.broken, 'image')}"] if one.broken else []
            floors = [f"a floor recovers {plural(one.by_floor, 'image')}"] if one.by_floor else []
            reasons = waiting + failed or floors or ["no attacker has a score"]
            where = f"{one.defense}, on {one.dataset}, {one.model}"
            missing.append(one_line(f"{where} (run {run_name(sessions, name)}): {' and '.join(reasons)}"))
            continue
        floor = floor_share(scene, threshold)
        specs = {kind: getattr(one, kind) for kind in ("dataset", "model", "defense")}
        known = {kind: components[kind, spec] for kind, spec in specs.items()}
        best = max(one.attackers, key=lambda stats: stats.recovered)
        rows = own.rename(columns={"trial": "id", RECOVERY: "score"})[list(TrialOf.model_fields)]
        rows = rows.assign(score=rows["score"].astype(object).where(rows["score"].notna(), None))
        planned = scene[scene["floor"] | (scene["defense"] == one.defense)]
        judged_by = [
            (candidate, absent[one.dataset, one.model, one.defense])
            for candidate, absent in of_protocols
            if candidate.covers(one.dataset, one.model)
        ]
        protocol, departures = judge(judged_by, planned, components.values(), threshold)
        with decoding(store.path):
            entry = Entry(
                run=run_name(sessions, name),
                **specs,
                settings={kind: {"version": item.version, **item.options} for kind, item in known.items()},
                threshold=threshold,
                images=one.images,
                groups=one.groups,
                by_floor=one.by_floor,
                recovered=one.share,
                low=one.low,
                high=one.high,
                floor=None if math.isnan(floor) else floor,
                missing=lacking[one.dataset, one.model, one.defense],
                protocol=protocol,
                departures=tuple(departures),
                inconclusive=flaws[one.dataset, one.model] or (UNPROVEN if one.unproven else ""),
                caveat=caveat(scene),
                best_attacker=best.attacker if best.recovered else None,
                attackers=[_attacker(stats) for stats in one.attackers],
                adaptive=one.adaptive,
                unadaptive=one.unadaptive,
                cosine=_cosine(one),
                useless=one.useless,
                accuracy=_cost(studies, one.model, one.defense),
                salt=store.salt() or "",
                versions=versions,
                plugins=tuple(Plugin(**asdict(one)) for one in store.plugins()),
                trials=[TrialOf.model_validate(row) for row in rows.to_dict("records")],
            )
        found.append(entry)
    return found, missing


def _version(source: Any) -> str:
    commit = "" if source.commit is None else f" at commit {source.commit}"
    return f"leakbench {source.version}{commit}{' with uncommitted changes' if source.dirty else ''}"


def _cosine(one: EnsembleResult) -> tuple[float, float | None, float | None] | None:
    """Return the cosine of a result without NaN, which JSON lacks."""
    mean, low, high = one.cosine
    return (mean, None if math.isnan(low) else low, None if math.isnan(high) else high) if one.measured else None


def _attacker(stats: AttackerStats) -> Attacker:
    counts = {name: getattr(stats, name) for name in Attacker.model_fields if name != "name"}
    return Attacker(name=stats.attacker, **counts)


def _cost(studies: Sequence[utility.Study], model: str, defense: str) -> Cost | None:
    """Return the accuracy behind a defense from the first study of the attacked model; None if no study has it."""
    for study in studies:
        values = {point.label: point.utility.value for point in study.points}
        if any(point.label == defense and model in point.models for point in study.points):
            return Cost(accuracy=values[defense], without=values.get("none"))
    return None
