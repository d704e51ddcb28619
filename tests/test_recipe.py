"""What is stated of a client's training, by options or by a recording, and what a recorded update contradicts."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
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
from test_update_facts import SGD, convolutional, mlp, read, recorded, short  # noqa: F401
from torch import Tensor

from leakbench import datasets
from leakbench.analysis.ensemble import AttackerStats, EnsembleResult
from leakbench.audit.batch import BatchFindings, EstimatedCounts, counted, estimated_counts
from leakbench.audit.fail_rule import FailRule
from leakbench.audit.findings import DefenseFindings
from leakbench.audit.given import first_channels
from leakbench.audit.layers import ClosedFormLeaks, InferredLabels
from leakbench.audit.members import Returned, check_truth, compared, nearest_copies, read_labels_file
from leakbench.audit.recipe import FACTS, RecordedFolder, StatedRecipe, check_recording, read_recording
from leakbench.audit.run import _compared, _observation, search_words, together
from leakbench.audit.update_facts import UpdateFacts
from leakbench.errors import BadOption
from leakbench.metrics import of_run
from leakbench.report.audit import verdict

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
        ({"momentum": -0.5}, "--momentum -0.5 must be"),
        ({"momentum": "much"}, "--momentum 'much' must be"),
        ({"weight_decay": -1.0}, "--weight-decay -1 must be"),
        ({"rate": 10**400}, "--rate 10+[.]+0+ must be"),
        ({"local_epochs": 0}, "--local-epochs 0 must be a whole number"),
        ({"local_steps": 10**14}, "--local-steps 100000000000000 must be a whole number from 1 to 1,000,000"),
        ({"images": 10**6, "local_batch": 1, "local_epochs": 2}, "2000000 batches, more than 1,000,000"),
        ({"local_epochs": 3, "local_steps": 2}, "--local-steps 2 are fewer than --local-epochs 3"),
        ({"optimizer": "lion"}, "--optimizer 'lion' is none of sgd"),
    ],
)
def test_an_impossible_recipe_is_refused(values: dict, words: str) -> None:
    with pytest.raises(BadOption, match=words):
        StatedRecipe(**values)


@pytest.fixture(scope="module")
def of_twelve(tmp_path_factory: pytest.TempPathFactory) -> UpdateFacts:
    """Return what the update of ``RIGHT`` shows."""
    folder = tmp_path_factory.mktemp("twelve")
    return recorded(folder, mlp(), partial(SGD["momentum"], dampening=0.0), 12, 4, 2)[1]


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
            "Stated: adam. The changes of linear layers have low ranks, as SGD leaves them, and adam only if",
        ),
        (StatedRecipe(weight_decay=0.0), "Stated: no weight decay."),
        (StatedRecipe(12, 4, 2, momentum=0.9, weight_decay=0.01, rate=0.02), "Stated: weight decay 0.01"),
    ],
)
def test_statements_are_compared_with_what_the_models_show(
    of_twelve: UpdateFacts, recipe: StatedRecipe, words: str
) -> None:
    found = " ".join(recipe.contradictions(of_twelve))
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


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("batch", [None, 4])
def test_a_search_says_how_an_update_by_momentum_is_taken(tmp_path: Path, momentum: float, batch: int | None) -> None:
    """Without the batches, no step can be repeated: the update is divided by (1 + 1.9 + ... + 4.686) / 6."""
    update, facts = recorded(tmp_path, mlp(), partial(SGD["momentum"], dampening=0.0), 12, 4, 2)
    recipe = StatedRecipe(12, batch, local_steps=6, momentum=momentum, rate=0.02)
    threat, factor = recipe.threat()
    alone = _observation(mlp(), update, (3, 12, 12), 70, threat, factor)
    seen = together(alone, recipe, facts, (), factor)
    words = search_words(seen, batch is not None, recipe)
    assert ("after division of the update by 2.97, by which momentum 0.9 enlarges" in words) == (
        momentum > 0 and batch is None
    )
    assert (
        "6 steps of plain SGD at learning rate 0.02, each on all of them, of which they match the mean" in words
    ) == (batch is None)
    own = next(iter(seen.gradient))
    assert torch.allclose(seen.gradient[own] * (factor if batch is None else 1.0), update.change[own][None])
    assert search_words(alone, False, recipe) == ""


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
            assert ("were not all separated from each other" in unproven) == theirs
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
        ({"batch": 40}, "states something impossible: batch 40 is larger than examples 12"),
        ({"lr": "fast"}, "states something impossible: lr 'fast' is no number; correct it"),
        ({"examples": 0}, "states something impossible: examples 0 must be"),
        ({"examples": "12"}, "examples '12' is no number; correct it, or leave it out"),
        ({"examples": 12.5}, "examples 12.5 must be a whole number"),
        ({"momentum": -0.9}, "momentum -0.9 must be"),
        ({"lr": math.nan}, "lr nan must be"),
        ({"epochs": 0}, "impossible: epochs 0 must be"),
        ({"steps": 9}, "steps 9 contradicts 12 images in batches of 4 for 2 epochs"),
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


def test_a_recording_is_refused_for_what_it_states_itself(tmp_path: Path) -> None:
    """What options state beside it is no fault of the recording; the page says what contradicts that."""
    _, facts = recorded(tmp_path, mlp(), SGD["plain"], 6, 6, 1)
    check_recording(RecordedFolder("there", "before", "after", StatedRecipe(6, 6, 1)), facts)
    few = "states at most 5 inputs, and the arrays show 6 different ones"
    with pytest.raises(BadOption, match=f"--recording 'there': facts.json {few}; correct facts.json"):
        check_recording(RecordedFolder("there", "before", "after", StatedRecipe(5, 5, 1)), facts)
    counted = replace(facts, steps=4)
    check_recording(RecordedFolder("there", "before", "after", StatedRecipe(local_steps=4)), counted)
    with pytest.raises(BadOption, match="states 5 batches, and the counters of the BatchNorm layers show 4"):
        check_recording(RecordedFolder("there", "before", "after", StatedRecipe(local_steps=5)), counted)


class Clipped(torch.optim.SGD):
    """SGD on gradients whose values are clipped."""

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            torch.nn.utils.clip_grad_value_(group["params"], 1e-6)
        super().step()


@pytest.mark.parametrize(
    ("make", "stated", "words"),
    [
        (partial(Clipped, lr=100.0), "SGD", "Stated: SGD. The changed values have nearly one size, as Adam"),
        (partial(torch.optim.Adam, lr=0.02, eps=1.0), "Adam", "Stated: adam. The changes of linear layers have low"),
    ],
)
def test_an_optimiser_that_the_arrays_make_doubtful_is_no_refusal(
    cli,  # noqa: F811
    nets: Path,  # noqa: F811
    short: None,  # noqa: F811
    make: Callable[..., torch.optim.Optimizer],
    stated: str,
    words: str,
) -> None:
    """SGD on clipped values looks like Adam, and Adam with a large eps like SGD: what is stated can be true."""
    recorded(nets, mlp(), make, 2, 2, 1)
    (nets / "nets.py").write_text("from test_update_facts import mlp\n")
    folder(nets, {"examples": 2, "batch": 2, "epochs": 1, "optimizer": stated, "momentum": None, "weight_decay": 0})
    command = ("audit", "--plugin", "nets.py", "--model", "mlp", "--size", "12", "--budget", "quick", "--out", "out")
    done = cli(*command, "--recording", "recording")
    assert done.code == 0
    page = (nets / "out" / "audit.md").read_text()
    assert words in page
    assert ("or SGD on gradients clipped by value" in page) == (stated == "SGD")
    assert ("only if each of its steps is nearly in proportion" in page) == (stated == "Adam")


def test_a_recording_that_cannot_be_read_is_refused(cli, nets: Path) -> None:  # noqa: F811
    recorded(nets, mlp(), partial(SGD["momentum"], dampening=0.0), 12, 4, 2)
    (nets / "nets.py").write_text("from test_update_facts import mlp\n")
    own = folder(nets)
    command = ("audit", "--plugin", "nets.py", "--model", "mlp", "--size", "12", "--out", "out", "--recording")
    for text in ("{", "", "[" * 200_000, '{"lr": 1' + "0" * 5000 + "}"):
        (own / FACTS).write_text(text)
        refused(cli(*command, "recording"), "malformed JSON", "record it again, or give --before and --after")
    (own / FACTS).write_text('{"lr": 1' + "0" * 400 + "}")
    refused(cli(*command, "recording"), "lr 1", "must be a finite learning rate")
    (own / FACTS).write_text("[]")
    refused(cli(*command, "recording"), "is no JSON object")
    refused(cli(*command, "recording", "--before", "before.pt"), "--recording and --before are both given")
    (own / "after.safetensors").unlink()
    refused(cli(*command, "recording"), "has no after.safetensors")
    refused(cli(*command, "absent"), "has no facts.json")
    assert not (nets / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gradient", "--local-epochs", "2"), "--gradient is the gradient of one step"),
        (("--gradient", "--momentum", "0.9"), "--gradient is the gradient of one step"),
        (("--images", "few"), "--images 'few' is no whole number"),
        (("--label", "1", "--labels", "x"), "--label and --labels are both given"),
        (("--labels", "absent.txt"), "--labels 'absent.txt' does not exist"),
        (("--labels", "five.txt", "--images", "12"), "'five.txt' has 5 labels, and 12 images are stated; give as many"),
        (("--labels", "words.txt"), "line 2: 'cat' is no whole number"),
        (("--label", "99"), "--label 99 is no class of the network; give 0 to 69"),
        (("--local-epochs", "0"), "'--local-epochs': Input should be greater than or equal to 1"),
        (("--images", "12", "--local-batch", "20"), "--local-batch 20 is larger than --images 12"),
        (("--momentum", "-0.5"), "--momentum -0.5 must be from 0 to below 1"),
        (("--truth", "one.png", "--images", "12"), "--truth has 1 image, and --images or the recording states 12"),
        (("--truth", "nothing"), "--truth 'nothing' is a folder without image files"),
        (("--size", "13"), "takes no image of shape (3, 13, 13)"),
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
    (nets / "five.txt").write_text("1\n" * 5)
    (nets / "words.txt").write_text("1\ncat\n")
    (nets / "nothing").mkdir()
    Image.new("RGB", (12, 12)).save(nets / "one.png")
    refused(cli("audit", "--plugin", "nets.py", "--model", "mlp", "--out", "out", *FILES, *options), words)
    assert not (nets / "out").exists()


BROKEN: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "extra": ("after", lambda own: own | {"9.weight": torch.ones(2)}, "has the extra tensor '9.weight'"),
    "transposed": (
        "after",
        lambda own: own | {"1.weight": own["1.weight"].T},
        "'1.weight' of shape (432, 64), not (64",
    ),
    "scalar": ("after", lambda own: own | {"1.bias": torch.tensor(1.0)}, "'1.bias' of shape (), not (64,)"),
    "none": ("after", lambda own: {}, "has no tensor"),
    "whole numbers": ("after", lambda own: own | {"1.bias": torch.ones(64).long()}, "holds torch.int64, no real numb"),
    "eight bits": ("after", lambda own: {k: v.to(torch.float8_e5m2) for k, v in own.items()}, "of at least 16 bits"),
    "complex": ("before", lambda own: own | {"1.bias": torch.ones(64).cfloat()}, "holds torch.complex64, no real"),
    "lacking": ("before", lambda own: {k: v for k, v in own.items() if k != "1.bias"}, "lacks '1.bias'"),
    "NaN": ("before", lambda own: own | {"1.bias": torch.full((64,), torch.nan)}, "values that are not finite"),
    "list": (
        "after",
        lambda own: list(own.values())[:-1],
        "has 5 arrays without names, and the network's state dict 6",
    ),
    "unchanged": ("after", lambda own: torch.load("before.pt"), "hold the same trained parameters"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_an_update_that_is_none_of_the_network_is_refused(cli, nets: Path, fault: str) -> None:  # noqa: F811
    recorded(nets, mlp(), SGD["plain"], 1, 1, 1)
    (nets / "nets.py").write_text("from test_update_facts import mlp\n")
    arm, change, words = BROKEN[fault]
    torch.save(change(torch.load(f"{arm}.pt")), f"{arm}.pt")
    refused(cli("audit", "--plugin", "nets.py", "--model", "mlp", "--out", "out", *FILES), f"--{arm} '{arm}.pt'", words)
    assert not (nets / "out").exists()


def test_weights_of_zeros_are_no_record(cli, nets: Path) -> None:  # noqa: F811
    recorded(nets, mlp(), SGD["plain"], 1, 1, 1)
    torch.save({name: torch.zeros_like(one) for name, one in mlp().state_dict().items()}, nets / "after.pt")
    (nets / "nets.py").write_text("from test_update_facts import mlp\n")
    done = cli("audit", "--plugin", "nets.py", "--model", "mlp", "--out", "out", *FILES)
    refused(done, "--after 'after.pt' holds only zeros, which no training leaves; record it again")
    assert not (nets / "out").exists()


@pytest.mark.parametrize(("size", "channels"), [((12, 12), 3), ((12, 36), 1), ((12, 18), None), (None, None)])
def test_a_linear_layer_that_takes_the_pixels_shows_the_channels(size: tuple | None, channels: int | None) -> None:
    assert first_channels(mlp(), None if size is None else size[0] * size[1]) == channels


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_an_update_of_mixed_types_and_layouts_is_read(tmp_path: Path) -> None:
    own = mlp()
    _, facts = recorded(tmp_path, mlp(), SGD["plain"], 3, 3, 1)
    for name, convert in (("1.weight", Tensor.to_sparse), ("1.bias", Tensor.double)):
        state = torch.load(tmp_path / "after.pt")
        torch.save(state | {name: convert(state[name])}, tmp_path / "after.pt")
    assert read(tmp_path, own)[1] == facts


@pytest.mark.parametrize("factor", [0.5, 0.9, 0.999])
def test_an_update_of_decay_alone_is_refused(cli, nets: Path, factor: float) -> None:  # noqa: F811
    """Attacks of what is left would all fail, and say nothing of it."""
    state = mlp().state_dict()
    torch.save(state, nets / "before.pt")
    torch.save({name: factor * value for name, value in state.items()}, nets / "after.pt")
    (nets / "nets.py").write_text("from test_update_facts import mlp\n")
    command = ("audit", "--plugin", "nets.py", "--model", "mlp", "--size", "12", "--out", "out")
    refused(cli(*command, "--before", "before.pt", "--after", "after.pt"), "by weight decay alone")
    assert not (nets / "out").exists()


def test_weights_that_grew_are_said_to_be_swapped_perhaps(tmp_path: Path) -> None:
    own = mlp()
    recorded(tmp_path, mlp(), partial(SGD["momentum"], dampening=0.0), 12, 4, 2)
    (tmp_path / "before.pt").rename(tmp_path / "old.pt")
    (tmp_path / "after.pt").rename(tmp_path / "before.pt")
    (tmp_path / "old.pt").rename(tmp_path / "after.pt")
    _, facts = read(tmp_path, own)
    assert "the weights before and after may be swapped" in " ".join(facts.contradictions(6))
    assert "grew by" in dict(facts.facts())["weight decay"]
    assert "weight decay" not in " ".join(RIGHT.contradictions(facts))


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_label_counts_of_an_update_with_momentum_take_its_whole_size(tmp_path: Path, momentum: float) -> None:
    """The update that attackers are given is divided by what momentum enlarges it by; that is not done twice."""
    own, labels = mlp(3), torch.tensor([0] * 9 + [1, 1, 2])
    images, _ = datasets.parse("samples(size=12)").load(range(12))
    torch.save(own.state_dict(), tmp_path / "before.pt")
    optimiser = torch.optim.SGD(own.parameters(), lr=1e-3, momentum=momentum)
    for step in range(8):
        optimiser.zero_grad()
        rows = torch.arange(step % 2, 12, 2)
        torch.nn.functional.cross_entropy(own(images[rows]), labels[rows]).backward()
        optimiser.step()
    torch.save(own.state_dict(), tmp_path / "after.pt")
    update, shown = read(tmp_path, mlp(3))
    recipe = StatedRecipe(12, 6, 4, optimizer="sgd", momentum=momentum, rate=1e-3)
    threat, factor = recipe.threat()
    seen = _observation(mlp(3), update, (3, 12, 12), 3, threat, factor)
    assert estimated_counts(mlp(3), seen, update, shown, None, recipe, factor).counts == (9, 2, 1)
    assert estimated_counts(mlp(3), seen, update, shown, None, recipe).counts != (9, 2, 1)


def test_long_trainings_are_not_repeated() -> None:
    assert StatedRecipe(1000, 1, 1, rate=0.1).client() is not None
    assert StatedRecipe(1001, 1, 1, rate=0.1).client() is None


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
    for text, words in (
        ("a.png,1\na.png,2\n", "has several labels of the image 'a.png'"),
        ("a.png,1\n2\n", "has labels with and without names"),
    ):
        file.write_text(text)
        with pytest.raises(BadOption, match=words):
            read_labels_file(str(file), 3)


@pytest.mark.parametrize(("counts", "right"), [((2, 4, 2), 4), ((0, 0, 8), 1), ((1, 2, 1), 4), ((0, 1, 0), 1)])
def test_counts_of_more_inputs_than_labels_are_compared_by_shares(counts: tuple[int, ...], right: int) -> None:
    """A client that flips its 4 images has 8 inputs: as many labels as possible of 8 are no evidence."""
    found = counted(InferredLabels(None, None), EstimatedCounts(counts), [0, 1, 1, 2], 3)
    assert (found.counted, found.among) == (right, 4)


def test_a_client_that_changes_its_images_has_several_inputs_of_each() -> None:
    truth = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = torch.cat([truth[[2, 1]].flip(3), truth[[1, 0, 2]]])
    check_truth(inputs, truth, 2)
    with pytest.raises(BadOption, match=r"--truth has 3 images, .* 5; .*, or state --local-epochs if it changed them"):
        check_truth(inputs, truth, None)
    with pytest.raises(BadOption, match=r"--truth has 3 images, .* 5; give a folder of all images .* trained on$"):
        check_truth(inputs, truth, 1)
    kept = nearest_copies(inputs, truth)
    assert torch.equal(kept, truth[[1, 0, 2]])
    assert compared([Returned("disaggregate", kept)], truth, 0.6).share == 1.0
    assert torch.equal(nearest_copies(truth[:2], truth), truth[:2])


def test_every_metric_of_an_image_is_measured_beside_all_private_images() -> None:
    truth = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    result = EnsembleResult("d", "m", "the recorded update", 1, 1, 1, 0, 0.0, math.nan, math.nan, ())
    behind = DefenseFindings(result, ClosedFormLeaks((), (), InferredLabels(None, None)), "", 0.0, {}, ())
    near = (0.9 * truth + 0.05)[[1]]
    found = _compared(behind, compared([Returned("ig", near)], truth, 0.6, of_run()), {})
    assert found.scores["mse"] == pytest.approx(float((near - truth[[1]]).square().mean()))
    assert found.scores["psnr"] == pytest.approx(-10 * math.log10(found.scores["mse"]))
    assert found.scores["psnr_aligned"] > 60
    assert "label_correct" not in found.scores
    rule = FailRule.parse("psnr > 99", found.scores)
    assert found.judged(rule)
    assert found.value(rule) == found.scores["psnr"]
    assert not behind.judged(rule)


@pytest.mark.long
def test_the_update_of_a_client_that_flips_its_images_is_compared_with_all_of_them(
    cli,  # noqa: F811
    nets: Path,  # noqa: F811
    short: None,  # noqa: F811
) -> None:
    images, labels = datasets.parse("samples(size=12)").load(range(3))
    network = wide()
    torch.save(network.state_dict(), nets / "before.pt")
    optimiser = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    for given in (images, images.flip(3)):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(network(given), labels).backward()
        optimiser.step()
    torch.save(network.state_dict(), nets / "after.pt")
    (nets / "nets.py").write_text("from test_disaggregation import wide\ndef build(): return wide()\n")
    (nets / "truth").mkdir()
    for number, image in enumerate(images):
        Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()).save(nets / "truth" / f"{number}.png")
    (nets / "labels.txt").write_text("\n".join(map(str, labels.tolist())))
    command = ("audit", "--plugin", "nets.py", "--model", "build", "--mode", "eval", *FILES, "--truth", "truth")
    refused(cli(*command, "--out", "out"), "--truth has 3 images, and the update shows at least 6", "--local-epochs")
    assert not (nets / "out").exists()
    rule = ("--fail-if", "psnr > 200", "--local-epochs", "2", "--labels", "labels.txt")
    done = cli(*command, "--out", "out", *rule)
    page = (nets / "out" / "audit.md").read_text()
    assert (done.code, "PASSED" in done.out) == (0, True)
    assert "The server recovers 100 % of the 3 images, in closed form" in page
    assert "The update gives 6 different inputs, and --truth has 3 images" in page
    assert "3 of the 3 labels are right" in page
    assert "No convolution sent the gradient of its weight." in page
    alone = cli(*command[:-1], "truth/0.png", "--out", "alone")
    assert alone.code == 0
    assert "The private image of --truth is not compared" in (nets / "alone" / "audit.md").read_text()


def test_the_images_of_an_attack_with_options_count_under_its_short_name() -> None:
    truth = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    stats = (AttackerStats("analytic", 0, 0, 0, 0, 0, {}, None, 0.0), AttackerStats("ig", 1, 0, 0, 0, 0, {}, None, 0.0))
    result = EnsembleResult("d", "m", "the recorded update", 1, 1, 1, 0, 0.0, math.nan, math.nan, stats)
    behind = DefenseFindings(result, ClosedFormLeaks((), (), InferredLabels(None, None)), "", 0.0, {}, ())
    beside = compared([Returned("ig(steps=150)", truth[[2, 0]])], truth, 0.6)
    found = _compared(behind, beside, {"ig(steps=150)": "ig", "analytic": "analytic"})
    assert [(one.attacker, one.recovered, one.tried) for one in found.result.attackers] == [
        ("analytic", 0, 0),
        ("ig", 2, 3),
    ]
    assert verdict(found) == "The server recovers 67 % of the 3 images. The first attack to succeed is ig."
    batch = BatchFindings("fc", truth[1:2], 0.5, torch.ones(4, 1))
    both = compared([Returned("disaggregate", truth[1:2]), Returned("ig(steps=150)", truth[[2, 0]])], truth, 0.6)
    found = _compared(replace(behind, batch=batch), both, {"ig(steps=150)": "ig"})
    words = "The server recovers 100 % of the 3 images, 1 of them in closed form from the change of layer fc."
    assert verdict(found) == words


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
