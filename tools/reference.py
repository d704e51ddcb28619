"""Write the pages of docs/reference from the registries and the command line.

python tools/reference.py          write them
python tools/reference.py --check  say which are out of date, and exit with 1
"""

from __future__ import annotations

import json
import re
import sys
from inspect import cleandoc
from pathlib import Path
from typing import Any

import typer

import leakbench
from leakbench.cli.main import app
from leakbench.core.registry import Registry, option_text
from leakbench.core.types import PRESETS
from leakbench.defenses.base import by_informed
from leakbench.report.display import escape

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"
HEAD = "<!-- Written by tools/reference.py; change the components, and run `make reference`. -->\n\n"
WORDS = {"assumes": "It assumes", "cost": "It costs", "fails": "What defeats it"}


def pages() -> dict[str, str]:
    """Return every page: file name -> Markdown."""
    kinds: dict[str, Registry[Any]] = {
        "attacks": leakbench.attacks.registry,
        "defenses": leakbench.defenses.registry,
        "models": leakbench.models.registry,
        "datasets": leakbench.datasets.registry,
        "clients": leakbench.clients.registry,
        "metrics": leakbench.metrics.registry,
        "generators": leakbench.generators.registry,
    }
    made = {f"{name}.md": HEAD + _cards(name.capitalize(), registry) for name, registry in kinds.items()}
    return {**made, "threats.md": HEAD + _threats(), "cli.md": HEAD + _commands()}


def _cards(title: str, registry: Registry[Any]) -> str:
    parts = [f"# {title}"]
    for name in registry.names():
        cls = registry.get(name)
        if not cls.__module__.startswith("leakbench."):
            continue  # a plugin that happens to be installed
        text = cleandoc(cls.__doc__ or "").partition("\nAttributes:")[0].strip()
        parts += [f"## {name}", *_paragraphs(text)]
        if getattr(cls, "convention", ""):
            parts.append(f"**Convention**: {escape(cls.convention)}")
        parts += [f"**{words}**: {_plain(getattr(cls, word))}" for word, words in WORDS.items() if getattr(cls, word)]
        if registry.kind == "defense":
            parts.append(_adaptive(registry, cls))
        parts.append(_options(registry, cls))
        if cls.reference:
            parts.append(f"**Reference**: {escape(cls.reference)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _paragraphs(text: str) -> list[str]:
    return [_plain(paragraph) for paragraph in text.split("\n\n")]


def _plain(text: str) -> str:
    """Return a docstring's words as Markdown: literals stay literals."""
    return escape(text).replace("&#96;&#96;", "`")


def _adaptive(registry: Registry[Any], cls: type[Any]) -> str:
    attackers = {} if registry.required(cls) else by_informed(cls())
    if not attackers:
        return "**Adaptive attacker**: none."
    lines = [f"- `informed = {json.dumps(name)}`: {escape(one.description)}." for name, one in attackers.items()]
    return "\n".join(["**Adaptive attacker**, by what asks for it in a threat model:", "", *lines])


def _meanings(cls: type[Any]) -> dict[str, str]:
    """Return option -> what the docstring of the class, or of one that it derives from, says of it."""
    found: dict[str, str] = {}
    for kind in reversed(cls.__mro__):
        _, _, listed = cleandoc(kind.__dict__.get("__doc__") or "").partition("\nAttributes:\n")
        for entry in re.split(r"\n(?=    \S)", f"\n{listed}")[1:]:
            name, colon, text = entry.strip().partition(": ")
            if colon:
                found[name] = " ".join(text.split())
    return found


def _options(registry: Registry[Any], cls: type[Any]) -> str:
    fields = registry.fields(cls)
    if not fields:
        return ""
    meanings = _meanings(cls)
    rows = ["| option | values | default | meaning |", "|:--|:--|:--|:--|"]
    for field in fields.values():
        default = "required" if field.name in registry.required(cls) else f"`{option_text(field.default)}`"
        values, meaning = escape(registry.type_text(cls, field.name)), _plain(meanings.get(field.name, ""))
        rows.append(f"| `{field.name}` | {values} | {default} | {meaning} |")
    return "\n".join(rows)


def _threats() -> str:
    parts = ["# Threat models by name"]
    for name, preset in PRESETS.items():
        parts += [f"## {name}", escape(preset.describe())]
    return "\n\n".join(parts) + "\n"


def _commands() -> str:
    root = typer.main.get_command(app)
    return "\n\n".join(["# The command line", *_command("leakbench", root)]) + "\n"


def _command(path: str, command: Any) -> list[str]:
    children = getattr(command, "commands", {})
    parts = [f"## {path}", *_paragraphs(cleandoc(command.help or ""))]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not getattr(one, "hidden", False)]
    usage = [path, *(_metavar(one) for one in arguments)]
    parts.append(f"```text\n{' '.join(usage)}{' COMMAND' if children else ''}{' [OPTIONS]' if options else ''}\n```")
    rows = [f"| {_names(one)} | {_plain(getattr(one, 'help', None) or '')} |" for one in [*arguments, *options]]
    if rows:
        parts.append("\n".join(["| option | meaning |", "|:--|:--|", *rows]))
    for name, child in children.items():
        if not child.hidden:
            parts += _command(f"{path} {name}", child)
    return parts


def _metavar(argument: Any) -> str:
    word: str = argument.metavar or str(argument.name).upper()
    return word if argument.required or word.startswith("[") else f"[{word}]"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_metavar(parameter)}`"
    both = [*parameter.opts, *parameter.secondary_opts]
    return ", ".join(f"`{name}`" for name in both)


def main() -> int:
    """Write the pages, or compare them."""
    check = sys.argv[1:] == ["--check"]
    stale = []
    for name, text in pages().items():
        file = FOLDER / name
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run `make reference`")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
