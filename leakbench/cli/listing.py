"""``leakbench list``: the registered components, with options, defaults and references."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List components, suites and threat models.", no_args_is_help=True)

COMPONENTS = {
    "attacks": "List the attacks, with their options and references.",
    "defenses": "List the defenses, with their options and adaptive attacks.",
    "models": "List the models, with their options and references.",
    "datasets": "List the datasets, with their options and references.",
    "metrics": "List the metrics, with their conventions and references.",
    "generators": "List the generators, with their options and shipped weights.",
}
"""The packages of components, and the help of the command that lists each."""

Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", help="A Python file that registers components; it is run. Repeatable.")
]


def _command(kind: str, text: str) -> None:
    """Register the command that lists the components of a kind."""

    @app.command(kind, help=text)
    def show(plugin: Plugins = None) -> None:
        from leakbench.core.registry import load_plugin

        for path in plugin or []:
            load_plugin(path)
        _show(kind)


for _kind, _text in COMPONENTS.items():
    _command(_kind, _text)


@app.command()
def suites() -> None:
    """List the matrices that ship with leakbench, with their axes and scales."""
    from leakbench.plan import matrix

    for name in matrix.suites():
        axes = matrix.load_suite(name)
        typer.echo(name)
        words = {"default": "default scale", "scale": "scales"}
        for axis, value in axes.items():
            if axis == "rows":
                typer.echo(f"    rows: {len(value)}, each with its own axes")
            elif axis != "name":  # of the table of scales, only their names
                axis = words.get(axis, axis)
                typer.echo(f"    {axis}: {', '.join(map(str, value)) if isinstance(value, (list, dict)) else value}")


@app.command()
def threats() -> None:
    """List the threat models by name."""
    from leakbench.core.types import PRESETS

    for name, preset in PRESETS.items():
        typer.echo(f"{name}\n    {preset.describe()}")


def _show(kind: str) -> None:
    from leakbench.core.registry import option_text
    from leakbench.defenses.adaptive import CONTROLS, SIMULATE, SIMULATED
    from leakbench.defenses.base import by_informed

    registry = import_module(f"leakbench.{kind}").registry
    for name in registry.names():
        cls = registry.get(name)
        typer.echo(f"{name}\n    {cls.summary()}")
        for field in registry.fields(cls).values():
            default = "required" if field.name in registry.required(cls) else f"default {option_text(field.default)}"
            typer.echo(f"      {field.name}: {registry.type_text(cls, field.name)} ({default})")
        convention = getattr(cls, "convention", "")
        if convention:
            typer.echo(f"    convention: {convention}")
        if kind == "defenses":
            attackers = {} if registry.required(cls) else by_informed(cls())
            for informed, attacker in attackers.items():
                typer.echo(f"    adaptive attack (informed={str(informed).lower()}): {attacker.description}")
            if name in CONTROLS:
                typer.echo("    adaptive attack: nothing to model")
            else:
                typer.echo(f"    adaptive attack (informed={SIMULATE}): {SIMULATED}")
        for word in ("assumes", "cost", "fails", "reference"):
            if getattr(cls, word):
                typer.echo(f"    {word}: {getattr(cls, word)}")
    if kind == "generators":
        _show_weights()


def _show_weights() -> None:
    from leakbench.generators import parse
    from leakbench.generators.dcgan import SHIPPED

    typer.echo("Weights that ship with leakbench:")
    for name in SHIPPED:
        card = parse(f"dcgan:{name}").card()
        typer.echo(
            f"dcgan:{name}\n    trained on {card.data}\n    licence: {card.licence}\n    SHA-256: {card.checksum}"
        )
