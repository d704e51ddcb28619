"""``leakbench list``: what is registered, with options, defaults and references."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from leakbench.core.registry import Registry

app = typer.Typer(help="List what is registered.", no_args_is_help=True)

Plugin = Annotated[
    list[Path] | None, typer.Option("--plugin", help="A Python file that registers components; it is run. Repeatable.")
]


@app.command()
def attacks(plugin: Plugin = None) -> None:
    """List the attacks, with options, defaults and references."""
    from leakbench.attacks import registry

    _show(registry, plugin)


@app.command()
def defenses(plugin: Plugin = None) -> None:
    """List the defenses, with options, defaults and references."""
    from leakbench.defenses import registry

    _show(registry, plugin)


@app.command()
def models(plugin: Plugin = None) -> None:
    """List the models, with options, defaults and references."""
    from leakbench.models import registry

    _show(registry, plugin)


@app.command()
def datasets(plugin: Plugin = None) -> None:
    """List the datasets, with options, defaults and references."""
    from leakbench.datasets import registry

    _show(registry, plugin)


@app.command()
def metrics(plugin: Plugin = None) -> None:
    """List the metrics, with their conventions and references."""
    from leakbench.metrics import registry

    _show(registry, plugin)


@app.command()
def generators(plugin: Plugin = None) -> None:
    """List the generators, with options, defaults and references, and the weights that ship."""
    from leakbench.generators import parse, registry
    from leakbench.generators.dcgan import SHIPPED

    _show(registry, plugin)
    typer.echo("Weights that ship with leakbench:")
    for name in SHIPPED:
        card = parse(f"dcgan:{name}").card()
        typer.echo(
            f"dcgan:{name}\n    trained on {card.data}\n    licence: {card.licence}\n    SHA-256: {card.checksum}"
        )


@app.command()
def suites() -> None:
    """List the matrices that ship with leakbench."""
    from leakbench.plan import matrix

    for name in matrix.suites():
        axes = matrix.load_suite(name)
        typer.echo(name)
        for axis, value in axes.items():
            if axis != "name":
                typer.echo(f"    {axis}: {', '.join(map(str, value)) if isinstance(value, list) else value}")


@app.command()
def threats() -> None:
    """List the threat models that have a name."""
    from leakbench.core.types import PRESETS

    for name, preset in PRESETS.items():
        typer.echo(f"{name}\n    {preset.describe()}")


def _show(registry: Registry[Any], plugins: list[Path] | None) -> None:
    from leakbench.core.registry import load_plugin, option_text
    from leakbench.defenses.adaptive import by_informed

    for path in plugins or []:
        load_plugin(path)
    for name in registry.names():
        cls = registry.get(name)
        typer.echo(f"{name}\n    {cls.summary()}")
        for field in registry.fields(cls).values():
            default = "required" if field.name in registry.required(cls) else f"default {option_text(field.default)}"
            typer.echo(f"      {field.name}: {registry.type_text(cls, field.name)} ({default})")
        convention = getattr(cls, "convention", "")
        if convention:
            typer.echo(f"    convention: {convention}")
        if registry.kind == "defense":
            attackers = {} if registry.required(cls) else by_informed(cls().attackers())
            for informed, attacker in attackers.items():
                typer.echo(f"    adaptive attack (informed={str(informed).lower()}): {attacker.description}")
            if not attackers:
                typer.echo("    adaptive attack: none")
        for word in ("assumes", "cost", "fails", "reference"):
            if getattr(cls, word):
                typer.echo(f"    {word}: {getattr(cls, word)}")
