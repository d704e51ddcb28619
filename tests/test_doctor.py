"""``leakbench doctor``: what it finds, and what it says to do about it."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from test_cli import cli, place  # noqa: F401

from leakbench import assets
from leakbench.cli.doctor import INSTALLED_EXTRAS, _requirements


def test_an_installation_that_works_has_no_fault(cli, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("LEAKBENCH_HOME", str(tmp_path))
    done = cli("doctor")
    assert (done.code, done.err) == (0, "")
    lines = dict(re.findall(r"^(?:ok|absent) +([^:\n]+(?::\d+)?): (.*)$", done.out, re.M))
    assert len(lines) == len(done.out.splitlines())
    assert lines["torch"] == importlib.metadata.version("torch")
    assert lines["cache"].startswith(str(tmp_path))
    assert lines["dataset mnist"] == "not fetched; leakbench assets fetch mnist"
    assert {name for name in assets.names() if any(line.endswith(f" {name}") for line in lines)} == set(assets.names())


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("version", r'fault   torch: 2\.13\.0 is installed, and .*!=2\.13\.\*.* is required; pip install "torch'),
        ("absent", r'fault   torch: is not installed; pip install "torch'),
        ("broken", r"fault   torchvision: cannot be imported \(libcudart is missing\); pip install"),
    ],
)
def test_a_fault_has_its_command_and_an_exit_code(cli, monkeypatch, fault, line):  # noqa: F811
    version, imported = importlib.metadata.version, importlib.import_module

    def versions(name: str) -> str:
        if name == "torch" and fault == "absent":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.13.0" if name == "torch" and fault == "version" else version(name)

    def modules(name: str) -> ModuleType:
        if name == "torchvision" and fault == "broken":
            raise OSError("libcudart\nis missing")
        return imported(name)

    monkeypatch.setattr(importlib.metadata, "version", versions)
    monkeypatch.setattr(importlib, "import_module", modules)
    done = cli("doctor")
    assert done.code == 1
    assert re.search(f"^{line}", done.out, re.M)


def test_requirements_are_those_of_the_package_and_of_each_extra():
    needed = _requirements("")
    assert any(one.startswith("torch") and "2.13" in one for one in needed)
    assert not any(one.startswith(("flwr", "ray", "pytest")) for one in needed)
    assert _requirements("fl")[0].startswith("flwr[simulation]>=")
    assert [re.split("[<>=]", one)[0] for one in _requirements("ray")] == ["ray"]


def test_every_extra_of_users_is_checked():
    stated = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {*INSTALLED_EXTRAS, "dev", "bench", "fuzz"} == set(stated["optional-dependencies"])
