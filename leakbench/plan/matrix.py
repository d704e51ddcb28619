"""The matrix: the cross product of attacks, defenses, models, datasets and more; from TOML, options or Python."""

import difflib
import itertools
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SkipValidation, ValidationError
from torch import nn

from leakbench import attacks, clients, datasets, defenses, metrics, models
from leakbench.attacks import Attack
from leakbench.clients import LocalTraining
from leakbench.clients.local import ONE_IMAGE, Local
from leakbench.core.registry import split_options
from leakbench.core.text import plural
from leakbench.core.types import HONEST, PRESETS, ThreatModel
from leakbench.datasets import Dataset
from leakbench.defenses import Defense
from leakbench.defenses.adaptive import CONTROLS, SIMULATE
from leakbench.defenses.base import by_informed
from leakbench.errors import BadOption
from leakbench.metrics import Metric
from leakbench.models import Model, OwnModule, crafted
from leakbench.plan.trial import Cell, Trial


def axis(name: str, parse: Callable[[Any], Any]) -> BeforeValidator:
    """Return what makes a component of each item of an axis, or of its single item; BadOption for an empty axis."""

    def components(value: object) -> tuple[Any, ...]:
        items = value if isinstance(value, (list, tuple)) else [value]
        if not items:
            raise BadOption(f"{name} is empty; name at least one")
        return tuple(parse(item) for item in items)

    return BeforeValidator(components)


def _model(value: object) -> Model:
    if isinstance(value, nn.Module):
        return OwnModule(type(value).__name__, value)
    return models.parse(value)  # type: ignore[arg-type]


def parse_threat(value: object) -> ThreatModel:
    """Return the threat model of a preset's name, a table, or text such as ``labels=known, reveals=key+lock``."""
    if isinstance(value, ThreatModel):
        return value
    if isinstance(value, str):
        if value in PRESETS:
            return PRESETS[value]
        if "=" not in value:
            close = difflib.get_close_matches(value, PRESETS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(PRESETS)}"
            raise BadOption(f"unknown threat model {value!r}; {hint}")
        table: dict[str, object] = dict(split_options(value, f"threat {value!r}"))
        if isinstance(table.get("reveals"), str):
            table["reveals"] = [part for part in str(table["reveals"]).split("+") if part]
        value = table
    if not isinstance(value, Mapping):
        raise BadOption(f"threat {value!r} must be a preset's name or a table of {', '.join(_Threat.model_fields)}")
    try:
        return _Threat.model_validate(dict(value)).build()
    except ValidationError as error:
        raise BadOption(f"threat {dict(value)!r}: {_explain(error, _Threat)}") from None


class _Threat(BaseModel):
    """The fields of a threat model as TOML writes them."""

    model_config = ConfigDict(extra="forbid")
    labels: Literal["inferred", "counts", "known"] = "inferred"
    reveals: frozenset[str] = frozenset()
    informed: Annotated[
        bool | Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")], Field(union_mode="left_to_right")
    ] = False
    shares: Literal["gradient", "weights"] = "gradient"
    optimises: bool = False
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01
    local_steps: Annotated[int, Field(ge=1, le=10_000)] = 1
    rate: Literal["hidden", "known"] = "hidden"
    server: Annotated[str, AfterValidator(lambda value: crafted.spec(crafted.parse(value)))] = HONEST
    count: Literal["known", "hidden"] = "known"
    recipe: Literal["known", "hidden"] = "known"
    order: Literal["hidden", "known"] = "hidden"
    statistics: Literal["running", "sent", "exact"] = "running"

    def build(self) -> ThreatModel:
        local = sorted(self.model_fields_set & {"learning_rate", "local_steps", "rate"})
        if self.shares == "gradient" and local:
            raise BadOption(f"threat: {local[0]} is for clients that share weights; add shares=weights")
        return ThreatModel(**self.model_dump())


PositiveInt = Annotated[int, Field(ge=1, le=2**63 - 1, strict=True)]
Indices = PositiveInt | Annotated[list[Annotated[int, Field(ge=0, le=2**63 - 1, strict=True)]], Field(min_length=1)]
"""A number of images or seeds (the first ones), or a list of them."""

MAX_TRIALS = 10_000_000
"""No matrix has more trials, and no plan more trainings."""

FLOORS = ("random", "grey", "mean")
"""The floors that a matrix adds to its attacks."""

BATCH_FLOORS = (*FLOORS, "others")
"""Those of clients of several images."""

EVERY = "every"
"""The value of ``informed`` in a threat model of a matrix that asks for every adaptive attacker of each defense."""

RECOVERY = "ssim_aligned"
"""The metric by which an image counts as recovered."""

AttackAxis = Annotated[tuple[SkipValidation[Attack], ...], axis("attacks", attacks.parse)]
ThreatAxis = Annotated[tuple[SkipValidation[ThreatModel], ...], axis("threats", parse_threat)]
ClientAxis = Annotated[tuple[SkipValidation[LocalTraining], ...], axis("clients", clients.parse)]
MetricAxis = Annotated[tuple[SkipValidation[Metric], ...], axis("metrics", metrics.parse)]


class Axes(BaseModel):
    """A frozen model that raises BadOption, one line, if its fields are not valid."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, /, **axes: Any) -> None:
        try:
            super().__init__(**axes)
        except ValidationError as error:
            raise BadOption(f"{type(self).__name__.lower()}: {_explain(error, type(self))}") from None


class Stage(Axes):
    """A step of an ensemble: attacks that meet every defense, under each threat model, before the next step begins.

    Raises:
        BadOption: one line on the first field that is not valid.
    """

    attacks: AttackAxis
    threats: ThreatAxis = (PRESETS["paper"],)


def _stage(value: object) -> Stage:
    if isinstance(value, Stage):
        return value
    if not isinstance(value, Mapping):
        raise BadOption(f"stage {value!r} must be a table; write [[stages]] with attacks = [...] and threats = [...]")
    return Stage(**{str(key): item for key, item in value.items()})


class Matrix(Axes):
    """A cross product of components, images and seeds; each axis takes specs, components, or both.

    Attributes:
        name: the run's name.
        attacks: specs such as ``ig(steps=1000)`` or Attack objects.
        defenses: specs or Defense objects.
        models: specs, Model objects, or networks (``nn.Module``) from images in [0, 1] to logits.
        datasets: specs or Dataset objects.
        threats: presets' names, tables or ThreatModel objects. ``informed = "every"`` asks for every adaptive attacker
            of each defense, ``simulate`` last, and leaves out defenses with nothing to model.
        stages: instead of attacks and threats: an ensemble that runs one stage after another, the cheapest first.
        threshold: in [0, 1]; a trial is skipped if another one, behind the same defense, has recovered its image with a
            ``ssim_aligned`` of at least this. So the truth decides which trials are still run, and never what an
            attack returns. None: every trial is run.
        images: n for the images 0 to n-1 of each dataset, or a list of indices.
        seeds: n for the seeds 0 to n-1, or a list.
        floors: add the floors ``random``, ``grey`` and ``mean`` (behind no defense, since they use no gradient) unless
            they are named: the scores of an attack are read against them.
        metrics: specs or Metric objects, beside those of every run. They change no trial and no trial's id.
        clients: specs or LocalTraining objects: how many images a client has, and how it trains. The images are cut
            into consecutive batches, so that every client trains on the same ones.
        batch: numbers of images, in place of ``clients``: ``local(batch=N)`` for each.

    Raises:
        BadOption: one line on the first field that is not valid.
    """

    name: Annotated[str, Field(max_length=100, pattern=r"^\w[\w .()=,+-]*$")] = "matrix"
    attacks: AttackAxis = ()
    defenses: Annotated[tuple[SkipValidation[Defense], ...], axis("defenses", defenses.parse)]
    models: Annotated[tuple[SkipValidation[Model], ...], axis("models", _model)]
    datasets: Annotated[tuple[SkipValidation[Dataset], ...], axis("datasets", datasets.parse)]
    threats: ThreatAxis = (PRESETS["paper"],)
    stages: Annotated[tuple[SkipValidation[Stage], ...], axis("stages", _stage)] = ()
    threshold: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    images: Indices = 8
    seeds: Indices = [0]
    floors: bool = True
    metrics: MetricAxis = ()
    clients: ClientAxis = (ONE_IMAGE,)

    def __init__(self, /, **axes: Any) -> None:
        named = [axis for axis in ("attacks", "threats") if axis in axes]
        if axes.get("stages") and named:
            raise BadOption(f"matrix: both stages and {named[0]} are given; give {named[0]} in every stage")
        if "batch" in axes:
            if "clients" in axes:
                raise BadOption("matrix: both clients and batch are given; write batch=N in the specs of the clients")
            axes["clients"] = _batches(axes.pop("batch"))
        super().__init__(**axes)
        if not self.attacks and not self.stages:
            raise BadOption(f"matrix: {_missing('attacks')}")
        for client, stage in itertools.product(self.clients, self.steps):
            for threat in stage.threats:
                clients.check_threat(client, threat)
        self._check_informed()
        self._check_metrics()

    @property
    def steps(self) -> tuple[Stage, ...]:
        """The stages; without any, the one that attacks and threats make."""
        return self.stages or (Stage(attacks=self.attacks, threats=self.threats),)

    def _check_metrics(self) -> None:
        """Raise BadOption if a metric that is named is defined for the images of no dataset."""
        for metric in self.metrics:
            shapes = [dataset.image_shape for dataset in self.datasets]
            if all(min(shape[1:]) < metric.smallest for shape in shapes):
                raise BadOption(
                    f"matrix: metric {metric.name!r} is {metric.note(shapes[0])}; leave it out or use larger images"
                )

    def __repr__(self) -> str:
        """Return the name and the first members of each axis, in one or two lines."""
        said = self.describe()
        axes: dict[str, list[str]] = {
            "attack": [attack for stage in said.get("stages", [said]) for attack in stage["attacks"]],
            **{noun: said[f"{noun}s"] for noun in ("defense", "model", "dataset")},
            "threat model": [threat for stage in said.get("stages", [said]) for threat in stage["threats"]],
        }
        parts = [
            f"{plural(len(names), noun)} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
            for noun, names in ((noun, list(dict.fromkeys(names))) for noun, names in axes.items())
        ]
        for noun, chosen in (("image", self.images), ("seed", self.seeds)):
            parts.append(plural(chosen if isinstance(chosen, int) else len(chosen), noun))
        return f"Matrix({self.name!r}: {', '.join(parts)})"

    __str__ = __repr__

    def _check_informed(self) -> None:
        """Raise BadOption if a threat model asks for an adaptive attacker that no defense has."""
        named = {SIMULATE, *(variant for defense in self.defenses for variant in _informed(defense))} - {True}
        known = ["true", EVERY, *sorted(map(str, named))]
        for threat in (threat for stage in self.steps for threat in stage.threats):
            if isinstance(threat.informed, str) and threat.informed not in known:
                raise BadOption(
                    f"threat: informed={threat.informed!r} is not valid: no defense of the matrix has such an adaptive "
                    f"attacker; write {' or '.join(known)}"
                )
        if not self.stages and not any(behind for _, behind in self._grants(self.threats)):
            raise BadOption(
                f"threat: informed={self.threats[0].informed!r} is not valid: no defense of the matrix has anything to "
                "model; add a defense that has, or a threat model with informed=false"
            )

    def trials(self) -> tuple[Trial, ...]:
        """Return every trial of the cross product once, in the order of stages and axes.

        Raises:
            BadOption: there would be more than ``MAX_TRIALS``.
        """
        images, seeds = numbers_of(self.images), numbers_of(self.seeds)
        cells = [
            Cell(dataset, model, defense, attack, threat, client)
            for stage in self.steps
            for dataset, model, client, (threat, behind) in itertools.product(
                self.datasets, self.models, self.clients, tuple(self._grants(stage.threats))
            )
            for defense, attack in [*self._floors(model, client), *itertools.product(behind, stage.attacks)]
        ]
        check_count("trials", len(cells), images, seeds)
        pairs = itertools.product(self.datasets, self.clients)
        members = {(datasets.spec(dataset), client): members_of(dataset, client, images) for dataset, client in pairs}
        trials = (
            Trial(cell, own[0], seed, own[1:])
            for cell in cells
            for seed, own in itertools.product(seeds, members[cell.specs["dataset"], cell.client])
        )
        return tuple({trial.id: trial for trial in trials}.values())

    def _grants(self, threats: Sequence[ThreatModel]) -> Iterator[tuple[ThreatModel, tuple[Defense, ...]]]:
        """Yield these threat models, each with the defenses that are attacked under it."""
        for threat in threats:
            if threat.informed == SIMULATE:  # a control has nothing to model
                yield threat, tuple(defense for defense in self.defenses if SIMULATE in _informed(defense))
                continue
            if threat.informed != EVERY:
                yield threat, self.defenses
                continue
            variants = dict.fromkeys(variant for defense in self.defenses for variant in _informed(defense))
            for variant in sorted(variants, key=lambda variant: variant == SIMULATE):
                behind = tuple(defense for defense in self.defenses if variant in _informed(defense))
                yield replace(threat, informed=variant, name=""), behind

    def _floors(self, model: Model, client: LocalTraining) -> list[tuple[Defense, Attack]]:
        """Return the added floors; they use no gradient, so they run behind the defense of a checkpoint, or none."""
        named = {attack.name for stage in self.steps for attack in stage.attacks}
        floors = FLOORS if client.count == 1 else BATCH_FLOORS
        wanted = [floor for floor in floors if self.floors and floor not in named]
        checkpoint = model.checkpoint()
        behind = (checkpoint.defense if checkpoint else "") or "none"
        return [(defenses.parse(behind), attacks.parse(floor)) for floor in wanted]

    def describe(self) -> dict[str, Any]:
        """Return the matrix as plain JSON values: specs in place of components."""
        stages: list[dict[str, Any]] = [
            {"attacks": [attacks.spec(one) for one in stage.attacks], "threats": [one.spec() for one in stage.threats]}
            for stage in self.steps
        ]
        found: dict[str, Any] = {
            "name": self.name,
            **({"stages": stages} if self.stages else stages[0]),
            "defenses": [defenses.spec(defense) for defense in self.defenses],
            "models": [models.spec(model) for model in self.models],
            "datasets": [datasets.spec(dataset) for dataset in self.datasets],
            "images": self.images,
            "seeds": self.seeds,
            "floors": self.floors,
        }
        found |= {} if self.clients == (ONE_IMAGE,) else {"clients": [clients.spec(one) for one in self.clients]}
        found |= {} if self.threshold is None else {"threshold": self.threshold}
        return found | ({"metrics": [metrics.spec(metric) for metric in self.metrics]} if self.metrics else {})


def numbers_of(chosen: int | Sequence[int]) -> Sequence[int]:
    """Return the images or seeds that a matrix names: 0 to n - 1 for a number n, or a list as it is."""
    return range(chosen) if isinstance(chosen, int) else chosen


def members_of(dataset: Dataset, client: LocalTraining, images: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the indices of the images of each client, cut from these.

    Raises:
        BadOption: they do not fill a batch, or one of them is named twice.
    """
    if client.count == 1 and not client.needs_labels:
        return [(index,) for index in images]
    if len(set(images)) < len(images):
        twice = next(index for place, index in enumerate(images) if index in images[:place])
        raise BadOption(f"client {clients.spec(client)!r}: images names {twice} twice; name each image once")
    labels: dict[int, int] = {}
    if client.needs_labels:
        labels = dict(zip(images, dataset.load(list(images))[1].tolist()))
    try:
        return client.members(list(images), labels)
    except BadOption as error:
        raise BadOption(f"client {clients.spec(client)!r}: {error}") from None


def _batches(value: object) -> list[LocalTraining]:
    """Return a client for each number of images."""
    sizes: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value]
    if not sizes:
        raise BadOption("batch is empty; name at least one number of images, such as batch = [1, 8]")
    for size in sizes:
        if isinstance(size, bool) or not str(size).isdecimal() or not int(size) >= 1:
            raise BadOption(f"batch={size!r} is not a number of images; write batch = [1, 8], or --batch 8")
    return [Local(batch=int(size)) for size in sizes]


def _informed(defense: Defense) -> tuple[bool | str, ...]:
    """Return the values of ``informed`` that ask for each adaptive attacker of a defense; none for a control."""
    return () if defense.name in CONTROLS else (*by_informed(defense), SIMULATE)


def check_count(what: str, others: int, *axes: Sequence[int]) -> None:
    """Raise BadOption if a cross product is too large to be held in memory.

    Args:
        what: the noun of what is counted.
        others: how many there are for each element of the product of the axes.
        axes: images, seeds; they may be ranges of any length.
    """
    count = others
    for axis in axes:
        count *= axis.stop if isinstance(axis, range) else len(axis)
    if count > MAX_TRIALS:
        raise BadOption(f"{count:,} {what} are too many; give fewer images or seeds, for at most {MAX_TRIALS:,}")


class _Plan(BaseModel):
    """Axes, and rows of axes."""

    model_config = ConfigDict(extra="allow")
    rows: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None

    @property
    def axes(self) -> dict[str, Any]:
        return self.model_extra or {}


class _File(_Plan):
    """The keys of a matrix file beside the axes."""

    scale: dict[str, _Plan] = {}
    default: str | None = None


def expand(axes: Mapping[str, Any], scale: str | None = None) -> list[dict[str, Any]]:
    """Return the axes of each matrix that a file describes, one for each of its ``rows``.

    A table ``[scale.NAME]`` replaces axes (images, attacks with fewer steps, ...) for that scale, and each ``[[rows]]``
    makes a matrix of its own of the axes that it states and those that all rows share. All matrices go into one run.
    ``default`` names the scale that is used if none is chosen.

    Args:
        axes: the contents of the file, from ``load``.
        scale: which of the file's scales; None for a file without any.

    Raises:
        BadOption: the file has no such scale, has scales of which none was chosen, or has other keys.
    """
    try:
        file = _File.model_validate(dict(axes))
    except ValidationError as error:
        raise BadOption(f"matrix: {_explain(error, _File)}") from None
    known = f"known: {', '.join(file.scale)}" if file.scale else "it has none; leave --scale out"
    scale = file.default if scale is None else scale
    if scale is None and file.scale:
        raise BadOption(f"the matrix has several scales; choose one with --scale ({', '.join(file.scale)})")
    if scale is not None and scale not in file.scale:
        raise BadOption(f"unknown scale {scale!r}; {known}")
    chosen = file if scale is None else file.scale[scale]
    shared = {**file.axes, **chosen.axes}
    return [{**shared, **row} for row in chosen.rows or file.rows or [{}]]


def override(axes: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the axes of a matrix, some of them replaced by given ones.

    In a matrix of stages, given threat models replace those of every stage. Given attacks replace all stages: each
    becomes a stage of its own, under all threat models of the former stages.
    """
    replaced = {"clients", "batch"} if {"clients", "batch"} & set(given) else set()  # two ways to say one thing
    merged = {**{axis: value for axis, value in axes.items() if axis not in replaced}, **given}
    stages = axes.get("stages")
    if not isinstance(stages, list) or not all(isinstance(stage, Mapping) for stage in stages):
        return merged  # without stages, or with some that ``Matrix`` refuses
    threats = merged.pop("threats", None)
    if "attacks" in given:
        threats = threats or [threat for stage in stages for threat in stage.get("threats", ["paper"])]
        merged["stages"] = [{"attacks": [attack], "threats": threats} for attack in merged.pop("attacks")]
    elif threats is not None:
        merged["stages"] = [{**stage, "threats": threats} for stage in stages]
    return merged


def load(path: str | Path) -> dict[str, Any]:
    """Return the contents of a TOML file: the axes of a matrix, for ``Matrix(**axes)``, or a file for ``expand``.

    Raises:
        BadOption: the file does not exist or is not TOML.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise BadOption(
            f"the matrix file {str(path)!r} cannot be read: {reason}; give the path of a TOML file"
        ) from None
    return _parse_toml(text, str(path))


def suites() -> list[str]:
    """Return the names of the suites that ship with the package."""
    folder = resources.files("leakbench.plan") / "suites"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_suite(name: str) -> dict[str, Any]:
    """Return the axes of a suite that ships with the package; raise BadOption if there is none of this name."""
    if name not in suites():
        raise BadOption(f"unknown suite {name!r}; known: {', '.join(suites())}")
    text = (resources.files("leakbench.plan") / "suites" / f"{name}.toml").read_text(encoding="utf-8")
    return _parse_toml(text, f"suite {name}")


def _parse_toml(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadOption(f"the matrix {where!r} is not TOML: {' '.join(str(error).split())}") from None


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first error of pydantic as one line."""
    first = next((one for one in error.errors() if one["type"] == "extra_forbidden"), error.errors()[0])
    where = ".".join(str(part) for part in first["loc"][:1])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, BadOption):
        return str(cause)
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(where, model.model_fields, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(model.model_fields)}"
        return f"unknown key {where!r}; {hint}"
    if first["type"] == "missing":
        return _missing(where)
    return f"{where}={first['input']!r} is not valid: {' '.join(str(first['msg']).split())}"


def _missing(axis: str) -> str:
    return f"{axis} is missing; name at least one, for example with --{axis.rstrip('s')} or {axis} = [...]"


def axes_from_options(options: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the axes that command-line options state; an option that was not given is absent."""
    axes: dict[str, Any] = {name: list(values) for name, values in options.items() if values}
    for name in ("images", "seeds"):
        if name in axes:
            axes[name] = _indices(name, axes[name])
    return axes


def _indices(name: str, values: list[str]) -> int | list[int]:
    text = ",".join(values)
    try:
        numbers = [int(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        raise BadOption(f"--{name} {text!r} is not a number; write --{name} 8, or a list such as 0,3,5") from None
    return numbers[0] if len(numbers) == 1 and "," not in text else numbers
