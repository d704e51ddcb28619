"""``leakbench list``: the registered components, with options, defaults and references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leakbench.core.text import english, plural

if TYPE_CHECKING:
    from leakbench.core.component import Component
    from leakbench.core.registry import Registry

app = typer.Typer(help="List components, suites and threat models.", no_args_is_help=True)

COMPONENTS = {
    "attacks": "List the attacks, with their options and references.",
    "defenses": "List the defenses, with their options and adaptive attacks.",
    "clients": "List how clients train, with the options.",
    "models": "List the models, with their options and references.",
    "datasets": "List the datasets, with their options and references.",
    "metrics": "List the metrics, with their conventions and references.",
    "generators": "List the generators, with their options and shipped weights.",
}
"""The packages of components, and the help of the command that lists each."""

Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", help="A Python file that registers components; it is run. Repeatable.")
]
Name = Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this one.", show_default=False)]


def _command(kind: str, text: str) -> None:
    """Register the command that lists the components of a kind."""

    @app.command(kind, help=text)
    def show(
        name: Name = None,
        short: Annotated[bool, typer.Option("--short", help="One line for each.")] = False,
        plugin: Plugins = None,
    ) -> None:
        from leakbench.core.registry import load_plugin

        for path in plugin or []:
            load_plugin(path)
        registry = import_module(f"leakbench.{kind}").registry
        classes = [registry.get(name)] if name else [registry.get(each) for each in registry.names()]
        for cls in classes:
            if short:
                typer.echo(f"{cls.name}: {cls.summary()}")
            else:
                _card(kind, registry, cls)
        if kind == "generators" and not name and not short:
            _show_weights()


for _kind, _text in COMPONENTS.items():
    _command(_kind, _text)


@app.command()
def suites(name: Name = None) -> None:
    """List the matrices that ship with leakbench; of one, show the axes and scales."""
    from leakbench.plan import matrix

    if name:
        _suite(name, matrix.load_suite(name))
        return
    rows = []
    for each in matrix.suites():
        axes = matrix.load_suite(each)
        parts = [{**part, "attacks": _attacks(part)} for part in matrix.expand(axes)]
        counts = [
            plural(len({str(spec) for part in parts for spec in part[axis]}), axis.removesuffix("s"))
            for axis in ("attacks", "defenses", "models", "datasets")
            if all(axis in part for part in parts)
        ]
        scales = [f"{scale} (default)" if scale == axes.get("default") else scale for scale in axes.get("scale", {})]
        rows.append((each, english(counts), ", ".join(scales) or "–"))
    _table(("suite", "crosses", "scales"), rows)
    typer.echo("leakbench list suites NAME shows the axes of one.")


def _attacks(axes: Mapping[str, Any]) -> list[object]:
    """Return the attacks of a matrix, or of all stages of an ensemble."""
    return [attack for stage in axes.get("stages", [axes]) for attack in stage["attacks"]]


def _suite(name: str, axes: Mapping[str, Any]) -> None:
    typer.echo(name)
    words = {"default": "default scale", "scale": "scales"}
    for axis, value in axes.items():
        if axis == "stages":
            for number, stage in enumerate(value, 1):
                grants = ", ".join(map(_grant, stage.get("threats", ["paper"])))
                typer.echo(f"    stage {number}: {', '.join(map(str, stage['attacks']))}; threats: {grants}")
        elif axis == "rows":
            typer.echo(f"    rows: {len(value)}, each with its own axes")
        elif axis != "name":  # of the table of scales, only their names
            axis = words.get(axis, axis)
            typer.echo(f"    {axis}: {', '.join(map(str, value)) if isinstance(value, (list, dict)) else value}")


def _grant(threat: object) -> str:
    """Return a threat model of a matrix file as --threat takes it in a shell."""
    from leakbench.plan.matrix import parse_threat

    spec = parse_threat(threat).spec()
    return f'"{spec}"' if "=" in spec else spec


@app.command()
def threats(name: Name = None) -> None:
    """List the threat models by what sets each apart; of one, show the description."""
    from leakbench.core.types import PRESETS
    from leakbench.plan.matrix import parse_threat

    if name:
        typer.echo(f"{name}\n    {parse_threat(name).describe()}")
        return
    usual = PRESETS["paper"]
    typer.echo(f"paper\n    {usual.describe()}\nThe others, by what is different:")
    known = set(usual.describe().removesuffix(".").split(". "))
    for preset, threat in PRESETS.items():
        if preset != "paper":
            own = [words for words in threat.describe().removesuffix(".").split(". ") if words not in known]
            typer.echo(f"{preset}\n    {'. '.join(own) or 'The same as paper'}.")


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows under heads, each column as wide as its longest text."""
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    for row in (heads, *rows):
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())


def _card(kind: str, registry: Registry[Any], cls: type[Component]) -> None:
    """Print all that a component states of itself."""
    from leakbench.core.registry import option_text
    from leakbench.defenses.adaptive import CONTROLS, SIMULATE, SIMULATED
    from leakbench.defenses.base import by_informed

    typer.echo(f"{cls.name}\n    {cls.summary()}")
    for field in registry.fields(cls).values():
        default = "required" if field.name in registry.required(cls) else f"default {option_text(field.default)}"
        typer.echo(f"      {field.name}: {registry.type_text(cls, field.name)} ({default})")
    convention = getattr(cls, "convention", "")
    if convention:
        typer.echo(f"    convention: {convention}")
    if kind == "defenses":
        attackers = {} if registry.required(cls) else by_informed(cls())  # type: ignore[arg-type]
        for informed, attacker in attackers.items():
            typer.echo(f"    adaptive attack (informed={str(informed).lower()}): {attacker.description}")
        if cls.name in CONTROLS:
            typer.echo("    adaptive attack: nothing to model")
        else:
            typer.echo(f"    adaptive attack (informed={SIMULATE}): {SIMULATED}")
    for word in ("assumes", "cost", "fails", "reference"):
        if getattr(cls, word):
            typer.echo(f"    {word}: {getattr(cls, word)}")


def _show_weights() -> None:
    from leakbench.generators import parse
    from leakbench.generators.dcgan import SHIPPED

    typer.echo("Weights that ship with leakbench:")
    for name in SHIPPED:
        card = parse(f"dcgan:{name}").card()
        typer.echo(
            f"dcgan:{name}\n    trained on {card.data}\n    licence: {card.licence}\n    SHA-256: {card.checksum}"
        )
