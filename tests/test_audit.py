"""The audit of one's own network, and of a recorded update."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from test_cli import cli, place, refused  # noqa: F401
from test_html import NASTY, Tags
from torch import nn

import leakbench
from leakbench import Unsupported, datasets
from leakbench.analysis.ensemble import AttackerStats, EnsembleResult
from leakbench.attacks.peeling.chain import Chain
from leakbench.audit import AuditedNetwork, FailRule, factory
from leakbench.audit.findings import Audit, DefenseFindings, ImageFinding, NetworkFacts
from leakbench.audit.given import classes_of
from leakbench.audit.layers import ClosedFormLeaks, InferredLabels, LayerShare, closed_forms, labels_of, shares
from leakbench.core.registry import load_plugin
from leakbench.core.types import PRESETS
from leakbench.engine.progress import Display
from leakbench.errors import BadOption
from leakbench.plan import matrix as plan
from leakbench.report.audit import html, markdown, verdict
from leakbench.report.page import picture
from leakbench.store.run_file import FILE, Store

NETS = """
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 20), nn.Sigmoid(), nn.Linear(20, 70))

def pooled():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 70))

def batch():
    return nn.Sequential(nn.Flatten(), nn.Linear(432, 8), nn.BatchNorm1d(8), nn.Linear(8, 70))

class Branched(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(432, 9), nn.Linear(432, 9), nn.Linear(9, 70)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1).flatten(1)
        return self.last(self.one(x).relu() + self.two(x).relu())

def moving():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, 70))

class Blind(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(432, 70)

    def forward(self, x):
        return self.last(x.detach().round().flatten(1))

def two():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(400, 2))

def flat_two():
    return nn.Sequential(nn.Flatten(), nn.Linear(432, 2))

def straight_two():
    return nn.Sequential(nn.Flatten(), nn.Linear(432, 9), nn.Linear(9, 2))

def curved_two():
    return nn.Sequential(nn.Flatten(), nn.Linear(432, 9), nn.Sigmoid(), nn.Linear(9, 2))

def convolved():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 70, 10), nn.Flatten())

def exposed():
    convolutions = nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 1, 1), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64 * 36, 70))

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 70))

def frozen():
    return build().requires_grad_(False)

def fails():
    raise RuntimeError("no")

number = 3
"""
RECOVERED = "The server recovers the image. The first attack to succeed is analytic."
DATA = ("--data", "samples(size=12)", "--first", "7", "--budget", "quick")
FILES = ("--before", "before.pt", "--after", "after.pt", "--size", "12")


@pytest.fixture
def nets(place: Path) -> Path:  # noqa: F811
    """A plugin with factories."""
    (place / "nets.py").write_text(NETS)
    return place


@pytest.mark.parametrize(
    ("result", "inconclusive", "words"),
    [
        (
            {"share": 0.0},
            "Inconclusive: x.",
            "Inconclusive: x. No attack recovered an image (95 % interval 0 % to 50 %",
        ),
        ({"share": 0.0, "groups": 2}, "", "n = 4 in 2 groups). That does not prove"),
        ({"share": 0.5}, "", "The server recovers 50 % of the images"),
        ({"share": math.nan, "images": 0, "by_floor": 4}, "", "Inconclusive: a floor, which uses no gradient"),
    ],
)
def test_an_audit_that_recovers_nothing_is_inconclusive_without_a_control(
    result: dict[str, Any], inconclusive: str, words: str
) -> None:
    values = {"images": 4, "groups": 4, "targets": 4, "by_floor": 0, "low": 0.0, "high": 0.5, "attackers": ()} | result
    found = DefenseFindings(
        EnsembleResult("d", "m", "noise", **values),
        ClosedFormLeaks((), (), InferredLabels(None, None)),
        "",
        math.nan,
        {},
        (),
        inconclusive=inconclusive,
    )
    assert words in verdict(found)
    facts = NetworkFacts(1, 2, (3, 8, 8), training=True, image_norms=0, running_norms=0)
    audit = Audit("n", (), facts, 4, "quick", (), (), (found,), (), (), 0.6, rule=FailRule("recovered", ">", 0.6))
    assert audit.undecided().startswith("a floor, which uses no gradient") == ("a floor" in words)


def test_an_audit_says_whether_the_attackers_recover_anything_undefended(cli, nets: Path) -> None:  # noqa: F811
    audited = ("--plugin", "nets.py", "--model", "build", *DATA, "--images", "1")
    for out, defenses, flaw in (
        ("with", ("none", "noise(scale=10)"), ""),
        ("without", ("noise(scale=10)",), "Inconclusive: there is no positive control, since none was not attacked."),
    ):
        named = [word for one in defenses for word in ("--defense", one)]
        assert cli("audit", *audited, *named, "--out", out).code == 0
        text = (nets / out / "audit.md").read_text()
        (line,) = [line for line in text.splitlines() if line.startswith("- Defense **noise")]
        assert line.startswith(f"- Defense **noise(scale=10.0)**: {flaw + ' ' if flaw else ''}No attack recovered")


def test_whatever_is_in_a_name_is_text_on_both_pages() -> None:
    stats = AttackerStats(NASTY, 1, 0, 0, 0, 0, {NASTY: 1}, 5, 0.5)
    picture = ImageFinding(0, None, None, NASTY, math.nan, math.nan, None)
    shares = (LayerShare(NASTY, NASTY, 3, 0, 1.0),)
    labels = InferredLabels(None, None)
    result = EnsembleResult(NASTY, NASTY, NASTY, 1, 1, 1, 0, 0.0, 0.0, 1.0, (stats,))
    leaks = ClosedFormLeaks(shares, (), labels)
    behind = DefenseFindings(result, leaks, NASTY, 0.0, {}, (picture,), (NASTY,))
    facts = NetworkFacts(5, 2, (3, 12, 12), True, 0, 0)
    threats = ((PRESETS["paper"], True),)
    found = Audit(
        NASTY, ((NASTY, NASTY),), facts, 1, NASTY, ((NASTY,),), threats, (behind,), (NASTY,), ((NASTY, NASTY),), 0.6
    )
    for text in (html(found, NASTY), markdown(found, NASTY)):
        assert "<script>alert" not in text
        assert "<!--" not in text
    assert len(Tags(html(found, NASTY)).texts("script")) == 1


def audit(cli, name: str, *more: object):  # noqa: F811
    return cli("audit", "--plugin", "nets.py", "--model", name, "--out", "out", *more)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("recovered > 0.1", FailRule("recovered", ">", 0.1)),
        ("psnr>=20", FailRule("psnr", ">=", 20)),
        (" mse <= 1e-3 ", FailRule("mse", "<=", 1e-3)),
        ("labels<.5", FailRule("labels", "<", 0.5)),
    ],
)
def test_a_rule_is_parsed(text: str, rule: FailRule) -> None:
    assert FailRule.parse(text, ["psnr", "mse"]) == rule
    assert FailRule.parse(str(rule), ["psnr", "mse"]) == rule


@pytest.mark.parametrize(
    "text",
    ["", "recovered", "recovered > x", "recovered > 0.1 or 1", "leak > 1", "recovered == 1", "__import__('os') > 1"],
)
def test_another_text_than_a_rule_is_refused(text: str) -> None:
    with pytest.raises(BadOption, match="--fail-if"):
        FailRule.parse(text, ["psnr"])


@pytest.mark.parametrize("sign", [">", ">=", "<", "<="])
def test_a_rule_holds_as_its_sign_says(sign: str) -> None:
    rule = FailRule("recovered", sign, 0.5)
    expected = {
        ">": [False, False, True],
        ">=": [False, True, True],
        "<": [True, False, False],
        "<=": [True, True, False],
    }
    assert [rule.holds(value) for value in (0.4, 0.5, 0.6)] == expected[sign]
    assert not rule.holds(math.nan)


def test_an_audit_that_leaks_fails(cli, nets: Path) -> None:  # noqa: F811
    done = audit(cli, "build", *DATA, "--defense", "none", "--defense", "clip", "--fail-if", "recovered > 0.5")
    assert done.code == 1
    assert "FAILED: --fail-if 'recovered > 0.5' is true (none: 1; clip: 1)." in done.out
    text = (nets / "out" / "audit.md").read_text()
    assert "Layer 1: its input, the image itself, follows exactly from the layer's gradient" in text
    assert "Leaks exactly, without any search: 2 of 2 labels, the input of layer 1 " in text
    assert "The label is inferred from what was sent, correctly for 2 of 2 images." in text
    assert "**known-label** (not run)" in text
    assert "## Not tried" in text
    page = (nets / "out" / "audit.html").read_text()
    assert "default-src &#39;none&#39;" in page
    assert picture(b"") in page
    assert page.count("<figure") == 4
    assert audit(cli, "build", *DATA, "--fail-if", "recovered > 0.5").code == 1
    assert (nets / "out" / "audit.md").read_text() != text


def test_an_audit_that_passes_claims_no_safety(cli, nets: Path) -> None:  # noqa: F811
    done = audit(cli, "pooled", *DATA, "--images", "1", "--fail-if", "recovered > 0.5")
    assert (done.code, done.err.count("error")) == (0, 0)
    assert "PASSED, but inconclusive: --fail-if 'recovered > 0.5' is false (none: 0). The attackers recover" in done.out
    page = (nets / "out" / "audit.md").read_text()
    assert "inconclusive" in page.split("\n")[2]
    assert "**loss**: the cross-entropy of the logits and the label" in page
    assert "- **analytic**: A linear layer that takes every pixel once" in page
    assert "Leaks exactly, without any search: the label" in done.out
    (line,) = [line for line in done.out.splitlines() if line.startswith("expected time: at most about")]
    assert "of searches for 1 image (ig(steps=150)" in line
    assert done.out.index(line) < done.out.index("[1/")
    assert "That does not prove that the images are safe" in done.out
    assert audit(cli, "pooled", *DATA, "--images", "1", "--fail-if", "labels > 0.5").code == 1


def test_pixels_that_leak_in_closed_form_count_as_recovered(cli, nets: Path) -> None:  # noqa: F811
    done = audit(cli, "Branched", *DATA, "--fail-if", "recovered > 0.5")
    assert (done.code, "The server recovers 100 % of the images" in done.out) == (1, True)
    assert "The first attack to succeed is analytic" in done.out
    text = (nets / "out" / "audit.md").read_text()
    assert "Layer one: its input, the image itself, follows exactly" in text


def test_attackers_that_broke_are_no_pass(cli, nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def broken(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("leakbench.attacks.peel._rows", broken)
    monkeypatch.setattr("leakbench.attacks.peel.served_chain", lambda observation: Chain((), "", ""))
    done = audit(cli, "pooled", *DATA, "--images", "1", "--fail-if", "recovered > 0.5")
    assert (done.code, "cannot be judged" in done.err) == (2, True)
    assert "1 trial of peel (paper) ended in an error (RuntimeError: out of luck)" in done.err
    assert "out of luck" in (nets / "out" / "audit.html").read_text()
    assert audit(cli, "pooled", *DATA, "--images", "1", "--fail-if", "labels > 0.5").code == 1  # crossed all the same


def test_a_threat_model_of_ones_own_is_on_the_page(cli, nets: Path) -> None:  # noqa: F811
    threat = "labels=known, shares=weights, rate=known, local_steps=2"
    assert audit(cli, "build", *DATA, "--images", "1", "--threat", threat, "--budget", "quick").code == 0
    text = (nets / "out" / "audit.md").read_text()
    assert "2 steps of SGD on its image with learning rate 0.01" in text
    assert "**paper** (not run)" in text


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("batch", DATA, ["statistics over a batch", "--mode eval"]),
        ("Blind", DATA, ["no attacker could attack", "does not make it safe"]),
        ("build", ("--data", "samples(size=16)"), ["takes no image of shape (3, 16, 16)"]),
        ("fails", DATA, ["cannot be called without arguments: RuntimeError: no"]),
        ("number", DATA, ["no callable 'number'"]),
        ("absent", DATA, ["is in 0 of the plugins"]),
        ("no.such.module:build", DATA, ["package.module:NAME", "import failed"]),
        ("build", (*DATA, "--normalise", "0.5"), ["MEAN/STD"]),
        ("build", (*DATA, "--normalise", "0.5/0"), ["positive"]),
        ("build", (*DATA, "--normalise", "0,0/1,1"), ["2 means", "3 channels"]),
        ("build", (*DATA, "--fail-if", "recovered"), ["--fail-if"]),
        ("build", (*DATA, "--checkpoint", "absent.pt"), ["absent.pt"]),
        ("build", (*DATA, "--rate", "0.1"), ["--rate is an option of leakbench audit update"]),
        ("build", (*DATA, "--local-steps", "1"), ["--local-steps is an option of leakbench audit update"]),
        ("build", (*DATA, "--delta"), ["--delta is an option of leakbench audit update"]),
        ("build", (*FILES, "--device", "cpu"), ["--device is an option of leakbench audit model"]),
        ("build", (*FILES, "--checkpoint", "a.pt"), ["--checkpoint is an option of leakbench audit model"]),
        ("build", (*FILES, "--threshold", "0.5"), ["--threshold is for the comparison with --truth"]),
        ("build", (), ["neither --data nor --before"]),
        ("build", ("--before", "a.npz", "--size", "12"), ["--after is not given; give both, or --recording"]),
        ("build", ("--before", "a.npz", "--after", "b.npz"), ["Missing option '--size'"]),
        ("build", ("--before", "a.npz", "--after", "b.npz", "--size", "12"), ["a.npz", "does not exist"]),
    ],
)
def test_bad_input_is_one_line_and_two(cli, nets: Path, name: str, more: tuple[str, ...], words: list[str]) -> None:  # noqa: F811
    done = audit(cli, name, *more)
    assert done.code == 2
    assert [line for line in done.err.splitlines() if line.startswith("error: ")] == done.err.splitlines()[-1:]
    for word in words:
        assert word in done.err
    assert not (nets / "out" / "audit.md").exists()


@pytest.fixture
def recorded(nets: Path, cli) -> nn.Module:  # noqa: F811
    """The files of an update of one image, in every format, and its truth."""
    load_plugin(nets / "nets.py")
    network = factory("build", [nets / "nets.py"])
    images, _ = datasets.parse("samples(size=12)").load([3])
    Image.fromarray((images[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(nets / "truth.png")
    _write(nets, "before", network)
    step(network, [3], 0.1)
    _write(nets, "after", network)
    return network


def step(network: nn.Module, indices: list[int], rate: float) -> None:
    """Take a client's step on images of the samples."""
    _descend(network, *datasets.parse("samples(size=12)").load(indices), rate)


def _descend(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, rate: float) -> None:
    loss = nn.functional.cross_entropy(network(images), labels)
    with torch.no_grad():
        for parameter, by in zip(network.parameters(), torch.autograd.grad(loss, list(network.parameters()))):
            parameter -= rate * by


def _write(folder: Path, arm: str, network: nn.Module) -> None:
    state = {name: value.clone() for name, value in network.state_dict().items()}
    save_file(state, folder / f"{arm}.safetensors")
    save_file({str(index): value for index, value in enumerate(state.values())}, folder / f"{arm}-numbered.safetensors")
    torch.save(state, folder / f"{arm}.pt")
    arrays = [value.numpy() for value in state.values()]
    np.savez(folder / f"{arm}.npz", *arrays)
    np.savez(folder / f"{arm}-named.npz", **{name: value.numpy() for name, value in state.items()})


@pytest.mark.parametrize("suffix", [".safetensors", "-numbered.safetensors", ".pt", ".npz", "-named.npz"])
def test_a_recorded_update_is_audited(cli, nets: Path, recorded: nn.Module, suffix: str) -> None:  # noqa: F811
    files = ("--before", f"before{suffix}", "--after", f"after{suffix}", "--size", "12", "--rate", "0.1")
    more = ("--truth", "truth.png", "--label", "3", "--budget", "quick", "--fail-if", "recovered > 0.5")
    done = audit(cli, "build", *files, *more)
    assert (done.code, RECOVERED in done.out) == (1, True)
    text = (nets / "out" / "audit.md").read_text()
    assert "**label**: inferred: class 3, which is correct" in text
    assert "tested: one image explains the change of layer 1, which takes the pixels" in text
    assert "given: 0.1; 1 step of plain SGD" in text


def test_an_update_of_unknown_rate_is_attacked_by_those_that_need_none(cli, nets: Path, recorded: nn.Module) -> None:  # noqa: F811
    _record(nets, "two", 1)
    done = audit(cli, "two", *FILES, "--budget", "quick")
    assert (done.code, done.err) == (0, "")
    text = (nets / "out" / "audit.md").read_text()
    assert re.search(r"^\| dlm\+ +\| 0 +\| 1 ", text, re.M)
    assert "**learning rate**: not known" in text


@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_the_closed_form_needs_no_rate(cli, nets: Path, recorded: nn.Module, decay: float) -> None:  # noqa: F811
    """The gradient up to its size gives the image; a share of the weights beside it, as of weight decay, is removed."""
    network = factory("exposed", [nets / "nets.py"])
    _write(nets, "before", network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    step(network, [3], 0.1)
    for name, value in network.state_dict().items():
        value -= 0.1 * decay * before[name]
    _write(nets, "after", network)
    done = audit(cli, "exposed", *FILES, "--truth", "truth.png", "--budget", "quick")
    assert (done.code, done.err) == (0, "")
    assert "The server recovers the image. The first attack to succeed is peel." in done.out
    assert "**learning rate**: not known" in (nets / "out" / "audit.md").read_text()


def test_what_was_not_measured_is_not_passed(cli, nets: Path, recorded: nn.Module) -> None:  # noqa: F811
    network = factory("pooled", [nets / "nets.py"])
    _write(nets, "before", network)
    step(network, [3], 0.1)
    _write(nets, "after", network)
    more = ("--size", "12", "--budget", "quick", "--rate", "0.1", "--fail-if", "recovered > 0.5")
    done = audit(cli, "pooled", "--before", "before.npz", "--after", "after.npz", *more)
    assert (done.code, "cannot be judged" in done.err, "--truth" in done.err) == (2, True, True)
    assert "How close these are to the private image was not measured" in (nets / "out" / "audit.md").read_text()


def test_pixels_in_a_recorded_update_need_no_truth_to_be_judged(cli, nets: Path, recorded: nn.Module) -> None:  # noqa: F811
    done = audit(cli, "build", *FILES, "--budget", "quick", "--fail-if", "recovered > 0.5")
    assert (done.code, RECOVERED in done.out) == (1, True)
    assert "derived in closed form: no other image explains the update" in (nets / "out" / "audit.md").read_text()


def test_the_threshold_of_a_recorded_update_is_the_one_that_is_shown(cli, nets: Path, recorded: nn.Module) -> None:  # noqa: F811
    more = ("--truth", "truth.png", "--threshold", "0.93", "--budget", "quick")
    assert audit(cli, "build", *FILES, *more).code == 0
    assert "if its SSIM is at least 0.93 after" in (nets / "out" / "audit.md").read_text()


def test_an_update_that_is_lost_in_rounding_is_not_judged(cli, nets: Path, recorded: nn.Module) -> None:  # noqa: F811
    network = factory("build", [nets / "nets.py"])
    _write(nets, "before", network)
    step(network, [3], 1e-6)
    _write(nets, "after", network)
    done = audit(cli, "build", *FILES, "--truth", "truth.png", "--budget", "quick", "--fail-if", "psnr > 99")
    assert (done.code, "rounding of the recorded numbers may account for" in done.err) == (2, True)


def test_running_statistics_alone_are_no_update(cli, nets: Path, recorded: nn.Module) -> None:  # noqa: F811
    network = factory("moving", [nets / "nets.py"])
    _write(nets, "before", network)
    network(torch.rand(4, 3, 12, 12))
    _write(nets, "after", network)
    refused(audit(cli, "moving", *FILES), "the same trained parameters")


def test_an_update_of_two_images_is_not_judged(cli, nets: Path, recorded: nn.Module) -> None:  # noqa: F811
    network = factory("build", [nets / "nets.py"])
    step(network, [3, 9], 0.1)
    _write(nets, "two", network)
    np.savez(nets / "few.npz", np.zeros(3))
    refused(audit(cli, "build", "--before", "few.npz", "--after", "two.pt", "--size", "12"), "1 arrays without names")
    files = ("--before", "before.pt", "--after", "two.pt", "--size", "12", "--rate", "0.1", "--budget", "quick")
    done = audit(cli, "build", *files, "--truth", "truth.png", "--fail-if", "psnr > 90")
    assert (done.code, "used several images: at least 2" in done.err) == (2, True)


@pytest.mark.parametrize(("name", "images"), [("two", 16), ("flat_two", 16), ("straight_two", 16), ("flat_two", 1)])
def test_two_outputs_do_not_show_whether_there_is_one_image(
    cli,  # noqa: F811
    nets: Path,
    recorded: nn.Module,
    name: str,
    images: int,
) -> None:
    """The rows of their gradients are multiples of each other, whatever the batch was."""
    _record(nets, name, images)
    files = ("--before", "before.pt", "--after", "after.pt", "--size", "12", "--rate", "0.1", "--budget", "quick")
    truth = ("--truth", "truth.png") if name == "two" else ()
    done = audit(cli, name, *files, *truth, "--fail-if", "recovered > 0.1")
    assert (done.code, "cannot be judged" in done.err) == (2, True)
    text = (nets / "out" / "audit.md").read_text()
    assert "was not tested: in this network, a step on several images looks like one image" in text
    assert "**one image per step**: not tested" in text
    assert "follows exactly" not in text


@pytest.mark.parametrize(("images", "code"), [(1, 1), (16, 2)])
def test_a_layer_before_two_outputs_shows_whether_there_is_one_image(
    cli,  # noqa: F811
    nets: Path,
    recorded: nn.Module,
    images: int,
    code: int,
) -> None:
    _record(nets, "curved_two", images)
    files = ("--before", "before.pt", "--after", "after.pt", "--size", "12", "--budget", "quick")
    done = audit(cli, "curved_two", *files, "--fail-if", "recovered > 0.1")
    assert (done.code, "do not have the low ranks" in (nets / "out" / "audit.md").read_text()) == (code, code == 2)


def test_labels_that_no_rule_reads_are_not_judged(cli, nets: Path) -> None:  # noqa: F811
    more = ("--images", "1", "--threat", "known-label", "--fail-if", "labels > 0.5")
    done = audit(cli, "convolved", *DATA, *more)
    assert (done.code, "no closed-form rule infers the labels" in done.err) == (2, True)
    assert "No closed-form rule infers the label from what was sent." in (nets / "out" / "audit.md").read_text()


def test_an_image_smaller_than_the_window_of_ssim_is_compared_by_the_others(
    cli,  # noqa: F811
    nets: Path,
    recorded: nn.Module,
) -> None:
    _record(nets, "small", 1, size=8)
    files = ("--before", "before.pt", "--after", "after.pt", "--size", "8", "--truth", "truth.png", "--budget", "quick")
    done = audit(cli, "small", *files, "--fail-if", "recovered > 0.5")
    assert (done.code, "larger images if the metric needs them" in done.err) == (2, True)
    assert audit(cli, "small", *files, "--fail-if", "psnr > 1").code == 1


def test_an_update_of_a_frozen_network_is_refused(cli, nets: Path, recorded: nn.Module) -> None:  # noqa: F811
    refused(audit(cli, "frozen", *FILES), "no trained parameter")


def _record(nets: Path, name: str, images: int, size: int = 12) -> None:
    network = factory(name, [nets / "nets.py"])
    _write(nets, "before", network)
    drawn = torch.rand(images, 3, size, size, generator=torch.Generator().manual_seed(0))
    _descend(network, drawn, torch.arange(images) % 2, 0.1)
    _write(nets, "after", network)


@pytest.mark.fl
def test_a_recording_of_a_flower_app_is_audited(cli, nets: Path) -> None:  # noqa: F811
    """An app whose clients train on one image each, recorded by the strategy's wrapper: what the server sees."""
    leakbench.flower.require()
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg

    load_plugin(nets / "nets.py")
    client, server = ClientApp(), ServerApp()
    network = factory("Branched", [nets / "nets.py"])

    @client.train()
    def train(message: Message, context: Context) -> Message:
        own = copy.deepcopy(network)
        own.load_state_dict(message.content["arrays"].to_torch_state_dict())
        step(own, [int(context.node_config["partition-id"])], 0.1)
        reply = {"arrays": ArrayRecord(own.state_dict()), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(reply), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = leakbench.flower.record(FedAvg(fraction_evaluate=0.0), nets / "updates", rounds=[1])
        strategy.start(grid, ArrayRecord(network.state_dict()), num_rounds=1)

    leakbench.flower.simulate(server, client, 2)
    folders = sorted((nets / "updates" / "round-0001").iterdir())
    assert len(folders) == 2
    for number, folder in enumerate(folders):
        image = datasets.parse("samples(size=12)").load([number])[0][0]
        Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(nets / "truth.png")
        files = ("--before", folder / "before.safetensors", "--after", folder / "after.safetensors", "--size", "12")
        done = audit(
            cli, "Branched", *files, "--truth", "truth.png", "--budget", "quick", "--fail-if", "recovered > 0.5"
        )
        assert (done.code, RECOVERED in done.out) == (1, True)


@pytest.mark.fl
def test_a_recording_of_the_quick_start_is_of_several_images_and_is_not_judged(cli, nets: Path) -> None:  # noqa: F811
    leakbench.flower.require()
    from flwr.serverapp.strategy import FedAvg

    import tests.flower_app as app

    (nets / "nets.py").write_text("from tests.flower_app import network as quick_start\n")
    strategy = leakbench.flower.record(FedAvg(fraction_evaluate=0.0), nets / "updates", rounds=[1])
    server, _ = app.server_app(strategy, rounds=1)
    leakbench.flower.simulate(server, app.client_app(), app.CLIENTS)
    folder = sorted((nets / "updates" / "round-0001").iterdir())[0]
    files = ("--before", folder / "before.safetensors", "--after", folder / "after.safetensors", "--size", "8")
    more = ("--channels", "1", "--rate", "0.1", "--budget", "quick", "--fail-if", "recovered > 0.1")
    done = audit(cli, "quick_start", *files, *more)
    assert done.code == 2
    assert "used several images" in (nets / "out" / "audit.md").read_text()


def test_an_update_without_a_truth_is_a_run_like_any_other(cli, nets: Path, recorded: nn.Module) -> None:  # noqa: F811
    """It is resumed, found complete and reported; no picture takes the place of the private image."""
    _record(nets, "two", 1)
    files = ("--before", "before.pt", "--after", "after.pt", "--size", "12", "--rate", "0.1", "--budget", "quick")
    command = ("audit", "update", "--plugin", "nets.py", "--model", "two", "--out", "out", *files)
    assert cli(*command).code == 0
    text = (nets / "out" / "audit.md").read_text()
    with Store.open(nets / "out" / FILE, readonly=True) as store:
        before = store.results()
    assert cli(*command).code == 0
    assert (nets / "out" / "audit.md").read_text() == text
    with Store.open(nets / "out" / FILE, readonly=True) as store:
        pd.testing.assert_frame_equal(store.results(), before)
        assert len(store.sessions()) == 2
        ended = before[before["status"] == "ok"]
        assert set(ended["attack"]) >= {"peel", "ig(steps=150)"}
        assert ended["psnr"].isna().all()
        pictures = store.images(ended["trial"])
        assert all(one.truth is None and one.reconstruction for one in pictures.values())
        assert {one.label for one in store.records().values()} == {None}
    assert (cli("check", "out").code, cli("report", "out", "--format", "html").code) == (0, 0)
    assert len(Tags((nets / "out" / "report.html").read_text()).texts("h1")) == 1


def test_a_label_that_is_not_known_has_no_score(cli, nets: Path, recorded: nn.Module) -> None:  # noqa: F811
    assert audit(cli, "build", *FILES, "--truth", "truth.png", "--budget", "quick").code == 0
    with Store.open(nets / "out" / FILE, readonly=True) as store:
        results = store.results()
    found = results[results["attack"] == "analytic"].iloc[0]
    assert found["ssim_aligned"] > 0.99
    assert math.isnan(found["label_correct"])


@pytest.mark.parametrize("change", ["name", "shape", "nan", "same", "pickle"])
def test_a_foreign_update_is_refused(cli, nets: Path, recorded: nn.Module, change: str) -> None:  # noqa: F811
    state = torch.load(nets / "after.pt", weights_only=True)
    if change == "name":
        state["other"] = state.pop("1.weight")
    elif change == "shape":
        state["1.weight"] = state["1.weight"][:3]
    elif change == "nan":
        state["1.bias"][0] = math.nan
    torch.save(state, nets / "bad.pt")
    if change == "same":
        (nets / "bad.pt").write_bytes((nets / "before.pt").read_bytes())
    if change == "pickle":
        (nets / "bad.pt").write_bytes(pickle.dumps({"1.weight": print}))
    files = ("bad.pt", "after.pt") if change == "nan" else ("before.pt", "bad.pt")
    done = audit(cli, "build", "--before", files[0], "--after", files[1], "--size", "12", "--rate", "0.1")
    refused(done, "bad.pt")


def test_an_update_with_values_that_are_not_finite_is_attacked_without_them(cli, nets: Path, recorded: nn.Module):  # noqa: F811
    state = torch.load(nets / "after.pt", weights_only=True)
    state["1.weight"][0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    torch.save(state, nets / "broken.pt")
    files = ("--before", "before.pt", "--after", "broken.pt", "--size", "12", "--rate", "0.1", "--finite")
    done = audit(cli, "build", *files, "--budget", "quick")
    assert done.code == 0
    page = (nets / "out" / "audit.md").read_text()
    assert "3 of the " in page
    assert "not finite (NaN or infinite)" in page
    with Store.open(nets / "out" / FILE, readonly=True) as store:
        assert "error" not in set(store.results()["status"])


def test_a_normalisation_is_in_front_and_stays_fixed() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5))
    own = AuditedNetwork("own", plain, normalise="0.5,0.4,0.3/0.2,0.25,0.3").model(3)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3]))
    network = own.build((3, 8, 8), 5)
    assert torch.allclose(network(x), plain((x - mean) / std), atol=1e-5)
    assert network[1].training
    assert not network[0].training
    assert not list(network[0].parameters())
    assert classes_of(own, (3, 8, 8)) == 5
    with pytest.raises(Unsupported, match="takes no image"):
        classes_of(own, (3, 9, 9))


def test_layers_shares_and_closed_forms_are_those_of_the_gradient() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Sigmoid(), nn.Linear(6, 4))
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 3, 1])
    seen = leakbench.observe(network, images, labels)
    found = shares(seen)
    assert [one.layer for one in found] == ["1", "3"]
    assert sum(one.share for one in found) == pytest.approx(1)
    sizes = [
        seen.gradient[f"{name}.{part}"].double().flatten(1).square().sum(1)
        for name in "13"
        for part in ("weight", "bias")
    ]
    assert found[0].share == pytest.approx(float(((sizes[0] + sizes[1]) / sum(sizes)).mean()))
    first, second = closed_forms(
        seen, {"1": list(images), "3": list(torch.sigmoid(network[1](images.flatten(1))).detach())}
    )
    assert (first.pixels, first.exact, second.pixels, second.exact) == (True, True, False, True)
    assert 0 < first.error < 1e-4
    wrong = closed_forms(seen, {"1": list(images.flip(0)), "3": [torch.zeros(6)] * 3})
    assert [one.exact for one in wrong] == [False, False]
    assert labels_of(seen, [0, 3, 2]).correct == 2


def test_a_layer_is_conclusive_only_with_independent_rows() -> None:
    """Two opposite rows, as a classifier's gradient of two classes has, look like one image whatever the batch was."""
    inputs = torch.rand(2, 48, generator=torch.Generator().manual_seed(2))
    mixed = inputs.mean(0)
    rows = {
        "opposite": torch.stack([mixed, -mixed, 0 * mixed]),
        "one row": torch.stack([mixed, 0 * mixed, 0 * mixed]),
        "independent": torch.stack([inputs[0], inputs[1], -inputs.sum(0)]),
        "independent, without a sum of zero": torch.stack([inputs[0], inputs[1], 0 * mixed]),
    }
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    seen = leakbench.observe(network, torch.rand(1, 3, 4, 4), torch.tensor([0]))
    found = {}
    for name, weight in rows.items():
        gradient = {"1.weight": weight[None], "1.bias": torch.tensor([[0.5, -0.5, 0.0]])}
        found[name] = closed_forms(dataclasses.replace(seen, gradient=gradient), None)[0].conclusive
    assert found == {
        "opposite": False,
        "one row": False,
        "independent": True,
        "independent, without a sum of zero": True,
    }


def test_progress_moves_within_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 4000, 40))
    monkeypatch.setattr("leakbench.engine.progress.time.monotonic", lambda: float(next(clock)))
    for terminal in (False, True):
        written = io.StringIO()
        with Display(Console(file=written, force_terminal=terminal, width=200)) as display:
            trials = plan.Matrix(
                attacks=["ig(steps=5)"],
                defenses=["none"],
                models=["lenet"],
                datasets=["samples"],
                images=2,
                floors=False,
            ).trials()
            display.begin(1, trials)
            network = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
            seen = leakbench.observe(network, torch.rand(2, 3, 4, 4), [0, 1])
            leakbench.attack("ig(steps=5, restarts=2)", dataclasses.replace(seen, tick=partial(display.move, 1)))
            assert 0 < display.bar.tasks[0].completed < 2 if terminal else display.bar.tasks[0].completed == 0
        assert "ig(steps=5) against none, lenet on samples: step 3 of 10" in written.getvalue() or terminal
