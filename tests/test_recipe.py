"""What is stated of a client's training, by options or by a recording, and what a recorded update contradicts."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_audit import nets  # noqa: F401
from test_cli import cli, place, refused  # noqa: F401
from test_disaggregation import wide
from test_update_facts import SGD, convolutional, mlp, recorded, short  # noqa: F401

from leakbench import datasets
from leakbench.audit.members import Returned, compared, read_labels_file
from leakbench.audit.recipe import FACTS, StatedRecipe, read_recording
from leakbench.errors import BadOption

FILES = ("--before", "before.pt", "--after", "after.pt", "--size", "12", "--budget", "quick")
RIGHT = StatedRecipe(12, 4, 2, optimizer="sgd", momentum=0.9, weight_decay=5e-4, rate=0.02)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"images": 4, "local_batch": 8}, "--local-batch 8 is larger than --images 4"),
        ({"images": 0}, "--images 0 must be a whole number"),
        ({"images": 8, "local_batch": 4, "local_epochs": 2, "local_steps": 3}, "--local-steps 3 contradicts 8 images"),
        ({"optimizer": "adam", "momentum": 0.9}, "--momentum 0.9 is of SGD"),
        ({"momentum": 1.0}, "--momentum 1 must be"),
        ({"rate": 0.0}, "--rate 0 must be"),
        ({"weight_decay": -1.0}, "--weight-decay -1 must be"),
    ],
)
def test_an_impossible_recipe_is_refused(values: dict, words: str) -> None:
    with pytest.raises(BadOption, match=words):
        StatedRecipe(**values)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (RIGHT, ""),
        (StatedRecipe(12, None, 2), ""),
        (StatedRecipe(5, 5, 2), "at least 12 different inputs, more than 5 images in 2 epochs can have"),
        (StatedRecipe(6), "the client used more images, or changed them from epoch to epoch"),
        (StatedRecipe(16, 4, 1), "Stated: 16 images. The change of layer 1 shows 12 beyond the rounding"),
        (
            StatedRecipe(optimizer="adam"),
            "Stated: adam. The changes of linear layers have the low ranks that SGD leaves",
        ),
        (StatedRecipe(weight_decay=0.0), "Stated: no weight decay."),
        (StatedRecipe(12, 4, 2, momentum=0.9, weight_decay=0.01, rate=0.02), "Stated: weight decay 0.01"),
    ],
)
def test_statements_are_compared_with_what_the_models_show(tmp_path: Path, recipe: StatedRecipe, words: str) -> None:
    _, facts = recorded(tmp_path, mlp(), partial(SGD["momentum"], dampening=0.0), 12, 4, 2)
    found = " ".join(recipe.contradictions(facts))
    assert words in found
    assert bool(found) == bool(words)


def test_stated_batches_and_sgd_are_compared_with_counters_and_sizes(tmp_path: Path) -> None:
    _, facts = recorded(tmp_path, convolutional(3), SGD["momentum"], 16, 8, 2)
    assert StatedRecipe(16, 8, 2).contradictions(facts) == (
        "Stated: 16 images. What holds for the update from one image does not apply.",
    )
    assert "show 4 batches" in " ".join(StatedRecipe(16, 8, 3).contradictions(facts))
    _, facts = recorded(tmp_path, mlp(), torch.optim.Adam, 4, 4, 1)
    assert "Stated: SGD. The changed values have nearly one size" in " ".join(
        StatedRecipe(optimizer="sgd").contradictions(facts)
    )


def test_momentum_enlarges_the_update_of_a_constant_gradient() -> None:
    threat, factor = StatedRecipe(32, 16, 2, optimizer="sgd", momentum=0.9, rate=0.01).threat()
    assert (threat.local_steps, threat.rate, threat.learning_rate) == (4, "known", 0.01)
    assert factor == pytest.approx((1 + 1.9 + 2.71 + 3.439) / 4)
    threat, factor = StatedRecipe(4, 4, 2, optimizer="adam", rate=0.01).threat()
    assert (threat.local_steps, threat.unit, factor) == (2, None, 1)


def folder(nets: Path, change: dict | None = None) -> Path:  # noqa: F811
    """Write a folder as ``leakbench.flower.record`` does."""
    own = nets / "recording"
    own.mkdir(exist_ok=True)
    for arm in ("before", "after"):
        save_file(torch.load(nets / f"{arm}.pt"), own / f"{arm}.safetensors")
    facts = {"examples": 12, "batch": 4, "epochs": 2, "lr": 0.02, "optimizer": "SGD", "momentum": 0.9}
    (own / FACTS).write_text(json.dumps({**facts, "weight_decay": 5e-4, **(change or {})}))
    return own


@pytest.mark.long
def test_a_recording_is_audited_with_its_recipe_and_judged_by_all_images(
    cli,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    nets: Path,  # noqa: F811
    short: None,  # noqa: F811
) -> None:
    recorded(nets, wide(), partial(SGD["momentum"], dampening=0.0), 12, 4, 2)
    (nets / "nets.py").write_text("from test_disaggregation import wide\ndef build(): return wide()\n")
    own = folder(nets)
    assert read_recording(str(own)).recipe == RIGHT
    (nets / "truth").mkdir()
    images, labels = datasets.parse("samples(size=12)").load(range(12))
    for number, image in enumerate(images):
        Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(nets / "truth" / f"{number:02}.png")
    (nets / "labels.txt").write_text("\n".join(str(int(label)) for label in labels))
    command = (
        "audit",
        "--plugin",
        "nets.py",
        "--model",
        "build",
        "--size",
        "12",
        "--budget",
        "quick",
        "--mode",
        "eval",
    )
    given = ("--recording", "recording", "--truth", "truth", "--labels", "labels.txt", "--out", "out")
    done = cli(*command, *given, "--fail-if", "labels < 1")
    page = (nets / "out" / "audit.md").read_text()
    assert (done.code, "PASSED" in done.out) == (0, True)
    assert "The server recovers 100 % of the 12 images, in closed form" in page
    assert "12 of the 12 labels are right" in page
    assert "12 images, batches of 4, 2 epochs, optimiser sgd, learning rate 0.02, momentum 0.9 and weight decay" in page
    assert "Stated" not in page
    assert page.count("| disaggregate |") == 13  # twelve images, and the table of attacks
    assert re.search(r"\| disaggregate +\| 12 +\| 12 ", page)
    assert "the images themselves, follow together from its change in closed form (by disaggregate): 12 images." in page
    assert "its inputs: 12 images" in page
    assert "Layer 2: its input, the image itself, does not" not in page
    shutil.copytree(nets / "truth", nets / "strangers")
    for file in (nets / "strangers").iterdir():
        Image.fromarray(np.random.default_rng(int(file.stem)).integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(file)
    other = cli(*command, "--recording", "recording", "--truth", "strangers", "--out", "none")
    assert other.code == 2
    assert "error: none of the 12 images that follow from the update is one of the 12 of --truth" in other.err
    assert not (nets / "none" / "audit.md").exists()
    with monkeypatch.context() as patch:  # the same images, which nothing shows to be right
        patch.setattr("leakbench.audit.batch.MIN_AGREEMENT", 1.1)
        for truth, theirs in (("strangers", True), ("truth", False)):
            assert cli(*command, "--recording", "recording", "--truth", truth, "--out", f"un{truth}").code == 0
            unproven = (nets / f"un{truth}" / "audit.md").read_text()
            assert ("None of the 12 images that disaggregate returned is one of --truth" in unproven) == theirs
            assert "were not all separated from each other" in unproven
            assert ("The server recovers 100 % of the 12 images, in closed form" in unproven) != theirs
    assert len(re.findall("SSIM (1.00|0.99),", page)) == 12
    wrong = cli(*command, "--recording", "recording", "--images", "7", "--out", "other")
    refused(wrong, "--images 7 contradicts --recording 'recording', which states examples 12")
    (nets / "labels.txt").write_text("1\n2\n")
    refused(cli(*command, *given[:-1], "other"), "has 2 labels, and --truth 12 images")
    (nets / "truth" / "00.png").unlink()
    refused(cli(*command, *given[:-1], "other"), "--truth has 11 images, and --images or the recording states 12")
    unstated = ("--before", "before.pt", "--after", "after.pt", "--truth", "truth", "--out", "other")
    refused(cli(*command, *unstated), "--truth has 11 images, and the update shows at least 12")
    assert not (nets / "other").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"examples": 3, "batch": 3}, "states at most 6 inputs, and the arrays show 12"),
        ({"batch": 40}, "states something impossible: --local-batch 40 is larger"),
        ({"lr": "fast"}, "states lr 'fast', which is no number"),
        ({"sha256": {"before": "00"}}, "is of other arrays than before.safetensors"),
    ],
)
def test_a_recording_that_contradicts_its_arrays_is_refused(
    cli,  # noqa: F811
    nets: Path,  # noqa: F811
    change: dict,
    words: str,
) -> None:
    recorded(nets, mlp(), partial(SGD["momentum"], dampening=0.0), 12, 4, 2)
    (nets / "nets.py").write_text("from test_update_facts import mlp\n")
    folder(nets, change)
    command = ("audit", "--plugin", "nets.py", "--model", "mlp", "--size", "12", "--out", "out", "--recording")
    refused(cli(*command, "recording"), words)
    assert not (nets / "out").exists()
    (nets / "recording" / FACTS).write_text("{")
    refused(cli(*command, "recording"), "malformed JSON")
    refused(cli(*command, "absent"), "has no facts.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gradient", "--local-epochs", "2"), "--gradient is the gradient of one step"),
        (("--gradient", "--momentum", "0.9"), "--gradient is the gradient of one step"),
        (("--images", "few"), "--images 'few' is no whole number"),
        (("--label", "1", "--labels", "x"), "--label and --labels are both given"),
        (("--labels", "absent.txt"), "--labels 'absent.txt' does not exist"),
    ],
)
def test_options_of_a_recipe_that_cannot_be_are_refused(
    cli,  # noqa: F811
    nets: Path,  # noqa: F811
    options: tuple[str, ...],
    words: str,
) -> None:
    recorded(nets, mlp(), SGD["plain"], 1, 1, 1)
    (nets / "nets.py").write_text("from test_update_facts import mlp\n")
    refused(cli("audit", "--plugin", "nets.py", "--model", "mlp", "--out", "out", *FILES, *options), words)
    assert not (nets / "out").exists()


def test_values_that_are_not_finite_are_refused_without_the_option(cli, nets: Path) -> None:  # noqa: F811
    recorded(nets, mlp(), SGD["plain"], 1, 1, 1)
    state = torch.load(nets / "after.pt")
    state["1.weight"][0, :2] = torch.nan
    torch.save(state, nets / "after.pt")
    (nets / "nets.py").write_text("from test_update_facts import mlp\n")
    done = cli("audit", "--plugin", "nets.py", "--model", "mlp", "--out", "out", *FILES)
    refused(
        done, "2 values are not finite (NaN or infinite), the first in '1.weight'; record it again, or give --finite"
    )
    assert not (nets / "out").exists()


def test_labels_are_read_by_order_or_by_name(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_text("2\n0\n")
    assert read_labels_file(str(file), 3, ["a.png", "b.png"]) == (2, 0)
    file.write_text("b.png,1\na.png,2\n")
    assert read_labels_file(str(file), 3, ["a.png", "b.png"]) == (2, 1)
    for text, words in (("3\n", "3 is no class"), ("x\n", "'x' is no whole number"), ("", "is empty")):
        file.write_text(text)
        with pytest.raises(BadOption, match=words):
            read_labels_file(str(file), 3)


def test_every_attackers_images_are_assigned_once_and_beat_the_floors() -> None:
    rng = torch.Generator().manual_seed(0)
    truth = torch.rand(3, 1, 16, 16, generator=rng)
    right = Returned("good", truth[[2, 0]])
    copies = Returned("copies", truth[[1, 1]])
    found = compared([right, copies, Returned("floor", torch.full((1, 1, 16, 16), 0.5), True)], truth, 0.6)
    assert [one.recovered for one in found.members] == [True, True, True]
    assert found.recovered == {"good": 2, "copies": 1}
    assert (found.share, found.floor) == (1.0, 0.0)
    mixed = Returned("mixed", 0.25 * truth[:1] + 0.75 * truth[1:2])
    near = torch.cat([truth[:1], 0.6 * truth[:1] + 0.4 * truth[1:2]])  # alike, and the mixture is not nearer to either
    assert compared([Returned("same", near[:1])], near, 0.6).share == 0.5
    assert compared([mixed], near, 0.1).share == 0.0
    beaten = compared([right, Returned("floor", truth, True)], truth, 0.6)
    assert (beaten.share, beaten.floor) == (0.0, 1.0)
