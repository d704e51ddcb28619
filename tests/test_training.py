"""Training behind a defense: what is trained, what is released, what is kept, and what a report says of it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COPIED, randn
from torch import Tensor, nn
from typer.testing import CliRunner

import leakbench
from leakbench import attacks, datasets, defenses, models
from leakbench.analysis.statistics import wilson_interval
from leakbench.cli.accuracy import TrainOptions
from leakbench.cli.main import app
from leakbench.core.types import Gradient
from leakbench.datasets import Dataset
from leakbench.datasets.images import read
from leakbench.defenses import Defense
from leakbench.defenses.base import Step, UpdateStep
from leakbench.errors import DEFENSE_FAILED, BadOption, CorruptAsset, LeakbenchError, Unsupported
from leakbench.models.weights import stated
from leakbench.plan.matrix import Matrix, expand
from leakbench.plan.matrix import load as load_axes
from leakbench.report import accuracy as report
from leakbench.report.compare import SIDES, published
from leakbench.store.provenance import Provenance
from leakbench.training import Accuracy, Arm, NullTrainingProgress, TrainingRecord, train
from leakbench.training.arm import Outcome, Round, TrainingSession, View, start
from leakbench.training.clients import begin, local_round
from leakbench.training.data import augmented, batches, load, partition
from leakbench.training.files import RECORD, STATE, plain, read_state
from leakbench.training.run import ARMS_FOLDER
from leakbench.training.settings import Tradeoff
from leakbench.training.steps import Kept, Score, Trainee, descend, evaluate, rule, train_round
from leakbench.training.thief import Theft
from leakbench.victim import Client, build, observe


@datasets.register("halves")
@dataclass(frozen=True)
class Halves(Dataset):
    """Grey images of 8 x 8 pixels, bright in one of two halves: class 0 above, class 1 below."""

    num_classes = 2
    image_shape = (1, 8, 8)

    def __len__(self) -> int:
        return 80

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        labels = torch.tensor([index // 5 % 2 for index in indices])
        noise = torch.stack([randn(1, 8, 8, seed=index) for index in indices]) / 5
        halves = torch.zeros(len(indices), 1, 8, 8)
        for row, label in enumerate(labels):
            halves[row, :, 4 * int(label) : 4 * int(label) + 4] = 0.6
        return (halves + 0.2 + noise).clamp(0, 1), labels

    def mean(self) -> Tensor:
        return torch.full((1, 8, 8), 0.5)


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

SMALL: dict[str, Any] = {
    "models": ["lenet"],
    "datasets": ["halves"],
    "defenses": ["none"],
    "rounds": 3,
    "batch": 16,
    "lr": 0.05,
    "thief": 2,
}


def study(**options: Any) -> Accuracy:
    return Accuracy(**{**SMALL, **options})


def arm(defense: str = "none", **options: Any) -> Arm:
    return study(defenses=[defense], **options).arms()[0]


def session(defense: str = "none", **options: Any) -> TrainingSession:
    return start(arm(defense, **options))


def numbers(record: TrainingRecord) -> list[Any]:
    """Everything measured, but not how long it took."""
    rounds = plain([replace(one, seconds=0.0) for one in record.outcome.rounds])
    return [rounds, record.outcome.best, record.outcome.thefts, record.outcome.stages]


class Stop(NullTrainingProgress):
    """Stops a training as Ctrl-C does, after so many rounds."""

    def __init__(self, after: int) -> None:
        self.after = after

    def round(self, one: Round) -> None:
        if one.number == self.after:
            raise KeyboardInterrupt


# settings


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "fedavg", "fraction": 0.2}, "fraction=0.2 of 3 clients selects no client; give at least 0.333"),
        ({"momentum": 0}, "nesterov=true needs a momentum above 0"),
        ({"validation": 0}, "select='validation' needs held-out images"),
        ({"round": 3}, "unknown key 'round'; did you mean 'rounds'?"),
        ({"mode": "federated"}, "mode='federated' is not valid"),
        ({"augment": ["flop"]}, "augment="),
        ({"models": []}, "models is empty"),
    ],
)
def test_an_invalid_recipe_is_refused_in_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadOption) as error:
        study(**options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "fedavg", "clients": 99}, "99 clients are more than the 58 training images of 'halves'"),
        ({"mode": "fedavg", "clients": 10, "split": "shards", "shards": 9}, "with 9 shards each"),
        ({"images": 5}, "validation=0.1 of 5 images holds none out"),
    ],
)
def test_too_few_images_are_told_before_anything_is_trained(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadOption, match=words):
        train(study(**options).arms(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_flower_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LeakbenchError, match=r"pip install 'flwr>="):
        train(study(mode="fedavg").arms(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_arm_is_known_by_what_its_numbers_depend_on() -> None:
    assert "clients" not in arm().settings["recipe"]  # there are none
    assert arm(mode="fedavg").id != arm(mode="fedavg", clients=7).id
    assert len({arm().id, arm("noise").id, arm(lr=0.1).id, arm(seeds=[1]).id, arm(mode="fedavg").id}) == 5


def test_the_learning_rate_falls_at_the_milestones() -> None:
    recipe = arm(milestones=[1, 3], lr=1.0, gamma=0.5).recipe
    assert [recipe.rate(number) for number in (1, 2, 3, 4)] == [1, 0.5, 0.5, 0.25]


# data


def test_parts_are_apart_and_the_same_for_every_defense() -> None:
    recipe = arm().recipe
    data = load(datasets.parse("halves"), recipe, 0)
    assert [len(data.train), len(data.validation), len(data.test)] == [58, 6, 16]
    rows = [image.numpy().tobytes() for part in (data.train, data.validation, data.test) for image in part.pixels]
    assert len(set(rows)) == 80
    assert torch.equal(data.test.labels, read(datasets.parse("halves"), range(0, 80, 5)).labels)
    assert not torch.equal(data.train.pixels, load(datasets.parse("halves"), recipe, 1).train.pixels)


def test_clients_have_as_many_images_each_and_none_twice() -> None:
    labels = torch.arange(60) % 6
    for split in ("iid", "shards"):
        parts = partition(labels, arm(mode="fedavg", clients=4, split=split).recipe, 0)
        assert [len(part) for part in parts] == [len(parts[0])] * 4
        assert len(set(torch.cat(parts).tolist())) == sum(map(len, parts))
    assert max(len(labels[part].unique()) for part in parts) <= 4  # two pieces of 7 or 8 rows meet 2 labels each
    iid = partition(labels, arm(mode="fedavg", clients=4).recipe, 0)
    assert sum(map(len, iid)) == 60


def test_augmentation_moves_each_image_by_itself() -> None:
    pixels = (255 * torch.rand(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))).to(torch.uint8)
    assert torch.equal(augmented(pixels, (), torch.Generator()), pixels)
    flipped = augmented(pixels, ("flip",), torch.Generator().manual_seed(1))
    kinds = [(torch.equal(new, old), torch.equal(new, old.flip(2))) for new, old in zip(flipped, pixels)]
    assert {(True, False), (False, True)} == set(kinds)
    cropped = augmented(pixels, ("crop",), torch.Generator().manual_seed(1))
    padded = nn.functional.pad(pixels, (4, 4, 4, 4))
    for new, old in zip(cropped, padded):
        assert any(torch.equal(new, old[:, top : top + 8, left : left + 8]) for top in range(9) for left in range(9))
    assert len({new.numpy().tobytes() for new in cropped}) == 6


def test_batches_hold_every_image_once() -> None:
    data = load(datasets.parse("halves"), arm().recipe, 0)
    found = list(batches(data.train, 16, (), torch.Generator().manual_seed(0)))
    assert [len(y) for _, y in found] == [16, 16, 16, 10]
    images = torch.cat([x for x, _ in found]).mul(255).round().to(torch.uint8)
    assert sorted(map(bytes, images.flatten(1).numpy())) == sorted(map(bytes, data.train.pixels.flatten(1).numpy()))


# steps


def test_a_single_image_that_is_left_over_and_cannot_be_normalised_is_told() -> None:
    own = session()
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    trainee = Trainee.of(network, own.trainee.defense)
    images = replace(own.data.train, pixels=own.data.train.pixels[:5], labels=own.data.train.labels[:5])
    recipe = own.arm.recipe
    with pytest.raises(Unsupported, match=r"a batch of 1 image has one value .* leave no single image over"):
        train_round(
            trainee,
            images,
            recipe.model_copy(update={"batch": 4}),
            Kept(),
            key=("test",),
            number=1,
            defended=True,
            classes=2,
        )


def test_a_step_is_that_of_sgd_on_what_the_defense_released() -> None:
    own = session("clip(norm=0.05)")
    trainee, recipe = own.trainee, own.arm.recipe
    x, y = next(batches(own.data.train, 16, (), torch.Generator().manual_seed(0)))
    x = x.double()
    trainee.network.double()
    twin = build(own.arm.model, own.arm.defense, (1, 8, 8), 2, "training/0").train().double()
    plain = torch.optim.SGD(twin.parameters(), recipe.rate(1), 0.9, nesterov=True, weight_decay=5e-4)
    state = Kept()
    for _ in range(3):
        loss, state = descend(trainee, rule(recipe, 1), state, x, y, torch.Generator(), defended=True, classes=2)
        released = own.arm.defense.release(Step(twin, x, y, own.arm.defense), torch.Generator())
        for name, parameter in twin.named_parameters():
            parameter.grad = released[name]
        expected = nn.functional.cross_entropy(twin(x), y)
        plain.step()
        assert loss == pytest.approx(float(expected.detach()))
    for name, value in trainee.parameters().items():
        torch.testing.assert_close(value, twin.get_parameter(name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        "none",
        "noise",
        "clip",
        "prune",
        "dp",
        "quantise",
        "mixup",
        "ats",
        "norm-only",
        "top-k",
        "censor",
        "dcs(steps=2)",
    ],
)
def test_every_defense_trains_and_its_loss_is_finite(spec: str) -> None:
    own = session(spec)
    before = own.trainee.shared()
    x, y = next(batches(own.data.train, 8, (), torch.Generator().manual_seed(0)))
    rng = torch.Generator().manual_seed(0)
    loss, _ = descend(own.trainee, rule(own.arm.recipe, 1), Kept(), x, y, rng, defended=True, classes=2)
    assert 0 < loss < 100
    moved = {name: float((value - before[name]).abs().max()) for name, value in own.trainee.shared().items()}
    assert moved["classifier.weight"] > 0
    assert own.trainee.shared().keys() == before.keys()


def test_top_k_adds_what_it_did_not_send_to_the_next_gradient() -> None:
    own = session("top-k(keep=0.1)", weight_decay=0, momentum=0, nesterov=False, lr=1e-9)
    x, y = next(batches(own.data.train, 8, (), torch.Generator().manual_seed(0)))
    gradient = Step(own.trainee.network, x, y, defenses.parse("none")).gradient()
    kept = Kept()
    for number in range(1, 4):  # at this rate the network stays the same, and so does the gradient
        kept = descend(own.trainee, rule(own.arm.recipe, 1), kept, x, y, torch.Generator(), defended=True, classes=2)[1]
        sent = defenses.parse(f"top-k(keep=0.1, rounds={number})").release(
            UpdateStep(own.arm.defense, gradient, gradient), torch.Generator()
        )
        for name, value in kept.memory.items():
            assert bool((value[sent[name] != 0] == 0).all())
            assert float((sent[name] != 0).double().mean()) <= 0.1 + 1 / value.numel()
    before, total = own.trainee.defense, {name: 3 * value for name, value in gradient.items()}
    sums = {name: torch.zeros_like(value) for name, value in gradient.items()}
    memory: Gradient = {}
    for _ in range(3):
        found = before.feedback(UpdateStep(before, gradient, gradient), memory, torch.Generator())
        assert found is not None
        sums, memory = {name: sums[name] + value for name, value in found[0].items()}, found[1]
    for name, value in total.items():
        torch.testing.assert_close(sums[name] + memory[name], value)
        torch.testing.assert_close(kept.memory[name], memory[name], rtol=1e-3, atol=1e-6)


def test_noise_is_of_its_scale_and_dp_clips_each_example() -> None:
    own = session("dp(clip=0.01, noise_multiplier=0)", weight_decay=0, momentum=0, nesterov=False, lr=1.0)
    before = own.trainee.shared()
    x, y = next(batches(own.data.train, 8, (), torch.Generator().manual_seed(0)))
    sgd = rule(own.arm.recipe, 1)
    descend(own.trainee, sgd, Kept(), x, y, torch.Generator(), defended=True, classes=2)
    after = own.trainee.shared()
    assert sum(float((after[name] - before[name]).square().sum()) for name in after) ** 0.5 <= 0.0101


def test_precode_draws_noise_for_every_example_and_keeps_its_buffer() -> None:
    own = session("precode(k=5)")
    seen: list[Tensor] = []

    def watch(module: nn.Module, inputs: object) -> None:
        if hasattr(module, "noise"):
            seen.append(module.noise)

    hooks = [module.register_forward_pre_hook(watch) for module in own.trainee.network.modules()]
    x, y = next(batches(own.data.train, 16, (), torch.Generator().manual_seed(0)))
    sgd, state, rng = rule(own.arm.recipe, 1), Kept(), torch.Generator().manual_seed(0)
    for _ in range(2):
        state = descend(own.trainee, sgd, state, x, y, rng, defended=True, classes=2)[1]
    assert [tuple(noise.shape) for noise in seen] == [(16, 5), (16, 5)]
    assert len(torch.cat(seen).unique()) == 160
    score = evaluate(own.trainee, own.data.test, "once")
    assert evaluate(own.trainee, own.data.test, "once") == score
    assert evaluate(own.trainee, own.data.test, "again").loss != score.loss  # the noise stays on in evaluation
    for hook in hooks:
        hook.remove()
    assert not own.trainee.lasting
    assert tuple(dict(own.trainee.network.named_buffers())[own.trainee.secrets[0].name].shape) == (5,)


def test_an_evaluation_is_in_evaluation_mode_and_changes_nothing() -> None:
    own = session("norm-only")
    before = {name: value.clone() for name, value in own.trainee.network.state_dict().items()}
    score = evaluate(own.trainee, own.data.test)
    assert own.trainee.network.training
    assert all(torch.equal(value, before[name]) for name, value in own.trainee.network.state_dict().items())
    network = own.trainee.network.eval()
    logits = network(own.data.test.pixels.float() / 255)
    assert score.correct == int((logits.argmax(1) == own.data.test.labels).sum())
    assert score.loss == pytest.approx(
        float(nn.functional.cross_entropy(logits, own.data.test.labels).detach()), rel=1e-5
    )


# a client's round


def rounds_of(own: TrainingSession, count: int) -> list[dict[str, Tensor]]:
    """What one client sends in each of so many rounds, the global model being the last that it sent."""
    trainee = own.trainee
    kept = begin(trainee, 0, own.arm, own.initial)
    shared, sent = trainee.shared(), []
    for number in range(1, count + 1):
        out, kept = local_round(
            trainee, own.data.train, own.arm.recipe, kept, shared, client=0, number=number, seed=0, classes=2
        )
        shared = out.shared
        sent.append(shared)
    return sent


def test_one_client_alone_trains_as_a_single_party_does(tmp_path: Path) -> None:
    (record,) = train([arm()], tmp_path)
    federated = rounds_of(session(mode="fedavg", clients=1), 3)[-1]
    network = models.parse("lenet").build((1, 8, 8), 2)
    from leakbench.models.weights import load as load_weights

    load_weights(network, str(record.folder / "100-percent.safetensors"))
    for name, value in network.state_dict().items():
        torch.testing.assert_close(federated[name], value, rtol=1e-4, atol=1e-6)


def test_no_secret_is_sent_and_the_key_never_moves() -> None:
    own = session("keylock(length=9)", mode="fedavg", clients=2)
    trainee = own.trainee
    first = begin(trainee, 0, own.arm, own.initial)
    names = {secret.name for secret in trainee.secrets}
    sent, kept = local_round(
        trainee, own.data.train, own.arm.recipe, first, trainee.shared(), client=0, number=1, seed=0, classes=2
    )
    assert not names & sent.shared.keys()
    assert kept.private.keys() == names
    (key,) = [name for name in names if name.endswith("key")]
    assert torch.equal(kept.private[key], first.private[key])
    assert not torch.equal(
        kept.private[key], begin(trainee, 1, own.arm, own.initial).private[key]
    )  # another client, another key
    locks = names - {key}
    assert any(not torch.equal(kept.private[name], first.private[name]) for name in locks)
    assert all(torch.equal(first.private[name], own.initial[name]) for name in locks)  # the server's first lock
    assert locks <= kept.momentum.keys()


def test_the_defense_acts_on_the_update_that_is_sent() -> None:
    plain = session("none", mode="fedavg", clients=2)
    before = plain.trainee.shared()
    free = rounds_of(plain, 1)[0]
    norm = sum(float((free[name] - before[name]).square().sum()) for name in free) ** 0.5
    clipped = rounds_of(session(f"clip(norm={norm / 4})", mode="fedavg", clients=2), 1)[0]
    for name, value in clipped.items():
        torch.testing.assert_close(value - before[name], (free[name] - before[name]) / 4, rtol=1e-3, atol=1e-6)
    dp = session("dp(clip=0.001, noise_multiplier=0)", mode="fedavg", clients=2)
    update = {name: randn(*value.shape, seed=1) for name, value in dp.trainee.parameters().items()}
    step = UpdateStep(dp.arm.defense, before, update)
    released = dp.arm.defense.release(step, torch.Generator())
    assert sum(float(value.square().sum()) for value in released.values()) ** 0.5 == pytest.approx(0.001, rel=1e-3)


def test_defenses_of_weights_act_on_what_is_sent() -> None:
    plain = session("none", mode="fedavg", clients=2)
    before = plain.trainee.shared()
    free = rounds_of(plain, 1)[0]
    sent = rounds_of(session("weight-sparsify(ratio=0.5)", mode="fedavg", clients=2), 1)[0]
    shared = [name for name in plain.trainee.parameters() if name in before]
    zeros = {
        kind: sum(int((state[name] == 0).sum()) for name in shared) for kind, state in (("free", free), ("sent", sent))
    }
    assert zeros["sent"] > zeros["free"] + 0.2 * sum(before[name].numel() for name in shared)


def test_what_a_defense_withholds_does_not_move() -> None:
    class Silentium(Defense):
        def release(self, step: Step, rng: torch.Generator) -> Gradient:
            return {"classifier.bias": step.gradient()["classifier.bias"]}

    own = session(mode="fedavg", clients=1)
    trainee = Trainee.of(own.trainee.network, Silentium())
    before = trainee.shared()
    sent, _ = local_round(
        trainee,
        own.data.train,
        own.arm.recipe,
        begin(trainee, 0, own.arm, own.initial),
        before,
        client=0,
        number=1,
        seed=0,
        classes=2,
    )
    moved = {name for name, value in sent.shared.items() if not torch.equal(value, before[name])}
    assert moved == {"classifier.bias"}


# whole trainings


def test_a_training_learns_and_two_of_one_seed_give_the_same_numbers(tmp_path: Path) -> None:
    arms = study(defenses=["none", "keylock(length=9)", "noise"], rounds=8).arms()
    first, second = train(arms, tmp_path / "a"), train(arms, tmp_path / "b")
    assert [numbers(one) for one in first] == [numbers(one) for one in second]
    assert first[0].outcome.chosen().accuracy("test") >= 0.9
    assert first[0].outcome.rounds[-1].loss < first[0].outcome.rounds[0].loss / 2
    for one in first:
        assert one.outcome.status == "ok"
        assert not (one.folder / STATE).exists()
        assert [stage.name for stage in one.outcome.stages] == ["initial", "1 epoch", "25 %", "100 %", "best"]
        for stage in one.outcome.stages:
            training = stated(str(one.folder / stage.file)).training
            assert training is not None
            assert training.test_accuracy == stage.accuracy
    other = train(study(seeds=[1]).arms(), tmp_path / "c")
    assert numbers(other[0]) != numbers(first[0])


def test_a_training_that_broke_is_resumed_after_its_last_round(tmp_path: Path) -> None:
    class Break(NullTrainingProgress):
        def round(self, one: Round) -> None:
            if one.number == 3:
                raise RuntimeError("out of memory")

    arms = study(rounds=4, defenses=["top-k"]).arms()  # which keeps a memory
    (whole,) = train(arms, tmp_path / "whole")
    (broken,) = train(arms, tmp_path / "cut", progress=Break())
    assert (broken.outcome.status, broken.outcome.reason) == ("error", "RuntimeError: out of memory")
    assert (broken.folder / STATE).exists()
    assert len(read_state(broken.folder / STATE)["rounds"]) == 3
    (cut,) = train(arms, tmp_path / "cut")
    assert numbers(cut) == numbers(whole)


def test_a_resumed_training_gives_the_same_numbers(tmp_path: Path) -> None:
    arms = study(defenses=["keylock(length=9)"], rounds=5, augment=["flip"]).arms()
    whole = train(arms, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(arms, tmp_path / "cut", progress=Stop(2))
    folder = tmp_path / "cut" / ARMS_FOLDER / arms[0].folder
    assert (folder / STATE).exists()
    assert not (folder / RECORD).exists()
    for name in (f".{STATE}.1", ".best.safetensors.part", "clients/.0-1.pt.77"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"half a file of a start that was killed")
    cut = train(arms, tmp_path / "cut")
    assert not list(folder.rglob(".*"))
    assert numbers(cut[0]) == numbers(whole[0])
    for stage in whole[0].outcome.stages:
        assert (cut[0].folder / stage.file).read_bytes() == (whole[0].folder / stage.file).read_bytes()
    seen: list[Arm] = []

    class Watch(NullTrainingProgress):
        def begin(self, arm: Arm, number: int, arms: int) -> None:
            seen.append(arm)

    assert [numbers(one) for one in train(arms, tmp_path / "cut", progress=Watch())] == [numbers(cut[0])]
    assert not seen


def test_convolutions_of_a_training_on_cuda_are_deterministic(tmp_path: Path) -> None:
    seen = []

    class Watch(NullTrainingProgress):
        def round(self, one: Round) -> None:
            seen.append((torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32))

    before = torch.backends.cudnn.deterministic
    train(study(rounds=1).arms(), tmp_path, progress=Watch())
    assert seen == [(True, False)]
    assert torch.backends.cudnn.deterministic == before


@defenses.register("killed-in-training")
@dataclass(frozen=True)
class Killed(Defense):
    """None, but its process kills itself in the release that the environment counts to."""

    def release(self, step: Step, rng: torch.Generator) -> Gradient:
        left = int(os.environ.get("LEAKBENCH_TEST_KILL", "0"))
        os.environ["LEAKBENCH_TEST_KILL"] = str(left - 1)
        if left == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step.gradient()


def killed(mode: str) -> Sequence[Arm]:
    return study(mode=mode, defenses=["killed-in-training"], rounds=4).arms()


def train_until_killed(mode: str, kill: int, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ["LEAKBENCH_TEST_KILL"] = str(kill)
    train(killed(mode), out)


@pytest.mark.parametrize(
    ("mode", "kill"),
    # 58 images are 4 steps an epoch: the second step of the third; and the second of three clients in the third round
    [pytest.param("centralised", 10, marks=pytest.mark.long), pytest.param("fedavg", 8, marks=pytest.mark.fl)],
)
def test_a_killed_training_is_resumed_to_the_same_record(tmp_path: Path, mode: str, kill: int) -> None:
    if mode == "fedavg":
        pytest.importorskip("flwr")
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = COPIED.Process(target=train_until_killed, args=(mode, kill, cut))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    arms = killed(mode)
    folder = cut / ARMS_FOLDER / arms[0].folder
    assert not (folder / RECORD).exists()
    assert len(read_state(folder / STATE)["rounds"]) == 2
    ((resumed,), (uncut,)) = (train(arms, out) for out in (cut, whole))
    assert numbers(resumed) == numbers(uncut)
    assert [stage.file for stage in resumed.outcome.stages] == [stage.file for stage in uncut.outcome.stages]
    for stage in uncut.outcome.stages:
        assert (resumed.folder / stage.file).read_bytes() == (uncut.folder / stage.file).read_bytes()


def test_a_folder_is_trained_in_by_one_process_at_a_time(tmp_path: Path) -> None:
    class Second(NullTrainingProgress):
        def round(self, one: Round) -> None:
            with pytest.raises(LeakbenchError, match="being run by another process"):
                train(study(seeds=[1]).arms(), tmp_path)

    assert len(train(study(rounds=1).arms(), tmp_path, progress=Second())) == 1
    assert len(train(study(rounds=1, seeds=2).arms(), tmp_path)) == 2


def test_every_stage_has_a_checkpoint_however_short_the_training_is(tmp_path: Path) -> None:
    (one,) = train(study(rounds=1).arms(), tmp_path)
    stages = {stage.name: stage for stage in one.outcome.stages}
    assert list(stages) == ["initial", "1 epoch", "25 %", "100 %", "best"]
    assert {stages[name].number for name in ("1 epoch", "25 %", "100 %", "best")} == {1}
    assert {"1-epoch.safetensors", "25-percent.safetensors"} <= {path.name for path in one.folder.iterdir()}


def test_a_damaged_state_is_told_in_one_line(tmp_path: Path) -> None:
    (own,) = study().arms()
    folder = tmp_path / ARMS_FOLDER / own.folder
    folder.mkdir(parents=True)
    (folder / STATE).write_bytes(b"not a state")
    with pytest.raises(CorruptAsset, match="remove it to start the training again"):
        train([own], tmp_path)


def test_what_cannot_be_trained_is_a_record_with_a_reason(tmp_path: Path) -> None:
    @defenses.register("breaks-in-training")
    @dataclass(frozen=True)
    class Breaks(Defense):
        """Raises in its third step."""

        def release(self, step: Step, rng: torch.Generator) -> Gradient:
            raise RuntimeError("no\nluck")

    found = train(study(defenses=["soteria", "breaks-in-training", "none"], rounds=1).arms(), tmp_path)
    statuses = [(one.outcome.status, one.outcome.reason) for one in found]
    assert statuses[0] == ("unsupported", "soteria is defined for one image, and the batch has 16")
    assert statuses[1] == ("error", "RuntimeError: no luck")
    assert statuses[2] == ("ok", "")
    text = report.write(tmp_path)[-1].read_text()
    assert "soteria, seed 0: unsupported: soteria is defined for one image" in text
    assert "RuntimeError: no luck" in text


def test_a_broken_release_ends_its_own_training_in_one_line(tmp_path: Path) -> None:
    @defenses.register("nan-in-training")
    @dataclass(frozen=True)
    class Broken(Defense):
        """Sends no number."""

        def release(self, step: Step, rng: torch.Generator) -> Gradient:
            return {name: value * torch.nan for name, value in step.gradient().items()}

    broken, none = train(study(defenses=["nan-in-training", "none"], rounds=1).arms(), tmp_path)
    assert (broken.outcome.status, broken.outcome.rounds) == ("error", ())
    assert broken.outcome.reason.startswith(f"{DEFENSE_FAILED}'nan-in-training' released ")
    assert "not finite" in broken.outcome.reason
    assert none.outcome.status == "ok"
    assert broken.outcome.reason in report.write(tmp_path)[-1].read_text().replace("\\", "")


def test_a_training_that_diverges_says_so_and_keeps_its_numbers(tmp_path: Path) -> None:
    (one,) = train(study(lr=1e30, rounds=4).arms(), tmp_path)
    assert one.outcome.status == "failed"
    assert "the training loss was nan" in one.outcome.reason
    assert len(one.outcome.rounds) < 4
    assert "(diverged)" in report.write(tmp_path)[-1].read_text()


def test_the_best_round_is_the_first_of_the_highest_accuracy(tmp_path: Path) -> None:
    for select, part in (("validation", "validation"), ("test", "test")):
        (one,) = train(study(select=select, rounds=4).arms(), tmp_path / select)
        values = [each.accuracy(part) for each in one.outcome.rounds]
        assert one.outcome.best == values.index(max(values)) + 1
        assert (one.outcome.rounds[0].views[0].validation is None) == (select == "test")
        assert one.outcome.images == (58 if select == "validation" else 64)
    assert "chosen on the test images, as the paper does" in report.write(tmp_path / "test")[-1].read_text()
    (one,) = train(study(select="last").arms(), tmp_path / "last")
    assert one.outcome.best == 3


def scored(defense: str, seed: int, views: dict[str, int], zero: Sequence[int] = ()) -> TrainingRecord:
    """Return the record of one round of fedavg: of 10,000 test images, so many right in the view of each holder."""
    own = arm(defense, mode="fedavg", seeds=[seed])
    seen = tuple(View(name, None, Score(0.1, correct, 10_000)) for name, correct in views.items())
    stolen = (Theft("zero lock", tuple(zero), 10_000),) if zero else ()
    outcome = Outcome("ok", "", (Round(1, 0.01, 0.1, seen, 1.0),), 1, (), stolen)
    made = Provenance("0.1", "abc", False, {"torch": "2"}, "3.11", "cpu", 2, "leakbench run accuracy", "{}")
    return TrainingRecord(own.specs, own.recipe.settings(), seed, own.settings, outcome, made, Path(own.folder))


def test_the_interval_of_an_accuracy_is_by_group(tmp_path: Path) -> None:
    (one,) = train(study(datasets=["samples(size=8)"], rounds=1).arms(), tmp_path)
    count = one.outcome.chosen().views[0].test.count
    assert len(one.outcome.groups) == 7
    assert sum(one.outcome.groups) == count == 13
    value, low, high = report.interval([one])
    assert (low, high) == wilson_interval(value, 13**2 / sum(size**2 for size in one.outcome.groups))
    ungrouped = report.interval([replace(one, outcome=replace(one.outcome, groups=()))])
    assert high - low > ungrouped.high - ungrouped.low + 0.1
    assert tuple(report.interval([scored("none", 0, {"global": 9000})])) == (0.9, *wilson_interval(0.9, 10_000))


def test_what_a_client_loses_is_told_against_the_undefended_of_its_seed() -> None:
    found = [
        scored("none", 0, {"global": 9781}),
        scored("none", 1, {"global": 9779}),
        scored("keylock", 0, {"client 1": 9690, "client 3": 9625}, zero=[892] * 5),
        scored("keylock", 1, {"client 1": 9781}, zero=[1135] * 5),
        scored("keylock", 2, {"client 1": 9500}, zero=[980, 981]),
    ]
    text = report.markdown(report.blocks_of(found), published(), "run")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert [row[1:5] for row in rows if len(row) == 6 and row[2].startswith("client ")] == [
        ["0", "client 1", "96.90", "+0.91"],
        ["0", "client 3", "96.25", "+1.56"],
        ["1", "client 1", "97.81", "−0.02"],
        ["2", "client 1", "95.00", "–"],
    ]
    (zero,) = [row for row in rows if row[1:2] == ["zero lock"]]
    assert zero[3] == "4"  # one a seed where the key makes no difference, and both of seed 2


def printed(one: TrainingRecord, **thefts: Sequence[int]) -> TrainingRecord:
    """Return a record at a place of the paper's tables, LeNet on MNIST at 32, with thefts by kind."""
    stolen = tuple(Theft(kind.replace("_", " "), tuple(correct), 10_000) for kind, correct in thefts.items())
    specs = {**one.specs, "model": "lenet(init=default)", "dataset": "mnist(size=32, channels=3)"}
    return replace(one, specs=specs, outcome=replace(one.outcome, thefts=stolen))


def test_beside_the_papers_figures_it_says_where_the_recipe_is_another() -> None:
    one, paper = printed(scored("keylock", 0, {"client 1": 9690})), published()
    text = report.markdown(report.blocks_of([one]), paper, "run")
    assert "The paper's recipe differs: " in text
    assert (
        "rounds 200 (here 3), batch 64 (here 16), lr 0.01 (here 0.05), milestones 60, 120 and 160 (here none)" in text
    )
    same = replace(one, recipe={**one.recipe, **paper.recipe})
    text = report.markdown(report.blocks_of([same]), paper, "run")
    assert "The recipe is that of the paper, as far as it is published. The paper's networks" in text
    elsewhere = report.markdown(report.blocks_of([scored("keylock", 0, {"client 1": 9690})]), paper, "run")
    assert "Beside Ren et al." not in elsewhere  # the paper has no such network and dataset


def test_tables_1_and_3_of_the_paper_are_beside_the_accuracies() -> None:
    random = {"fresh key, fresh lock": [892, 3346], "fresh key, initial lock": [2101, 5107]}
    found = [
        printed(scored("none", 0, {"global": 9780})),
        printed(scored("norm-only", 0, {"global": 9700})),
        printed(scored("keylock", 0, {"client 1": 9690, "client 2": 9710}), **random),
    ]
    blocks = report.blocks_of(found)
    text = report.markdown(blocks, published(), "run")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "mnist, 32" in line]
    assert [row[3:6] for row in rows if row[0] == "federated"] == [
        ["without", "98.14", "97.80 [97.49, 98.07]"],
        ["with", "97.45", "97.00 [96.65, 97.32]"],
        ["cost, points (without − with)", "+0.69", "+0.80"],
    ]
    by_key = {row[2]: row[3:7] for row in rows if row[0] == "lenet"}
    assert by_key["client 0"] == ["97.88", "87.43", "96.90", "75.71"]
    assert by_key["client 2"] == ["97.66", "87.21", "", "–"]  # the run has two clients
    assert by_key["average"][:3] == ["97.45", "87.00", "97.00"]
    assert by_key["random: fresh key, fresh lock"][0] == by_key["random: fresh key, initial lock"][0] == "10.45"
    assert by_key["random: fresh key, fresh lock"][2] == "21.19 ± 17.35 (8.92 to 33.46)"
    assert by_key["random: fresh key, initial lock"][2] == "36.04 ± 21.26 (21.01 to 51.07)"
    assert "97.45 for lenet on mnist (the mean of its rows is 97.81). It takes" in text
    assert not [row for row in rows if "not in this run" in row]


def test_the_comparison_of_a_run_has_every_figure_of_tables_1_and_3() -> None:
    blocks, paper = report.blocks_of([printed(scored("none", 0, {"global": 9780}))]), published()
    first, third = report.beside_table1(blocks, paper, whole=True), report.beside_table3(blocks, paper, whole=True)
    figures = [row["paper"] for row in first if "cost" not in row["key-lock"]]
    assert figures == [one.accuracy for one in paper.table1]
    shown = [(row["paper"], row["gap"]) for row in third if "initial lock" not in row["key"]]
    assert shown == [(one.accuracy, one.gap) for one in paper.table3]
    assert {row["lock, % of parameters"] for row in third} == set(paper.proportions.values())
    assert sum(row.get("settings") == "not in this run" for row in first) == 47 - 1


@pytest.mark.parametrize("name", ["table1", "table3", "tradeoff", "dlm-cost"])
def test_the_scales_of_the_benchmarks_are_trainings(name: str) -> None:
    file = load_axes(BENCHMARKS / f"{name}.toml")
    kind = Tradeoff if "tradeoff" in name or "cost" in name else Accuracy
    for scale in file["scale"]:
        assert [arm for row in expand(file, scale) for arm in kind(**row).arms()]


def test_the_wide_scale_of_table_3_reuses_the_trainings_of_scale_cpu() -> None:
    file = load_axes(BENCHMARKS / "table3.toml")
    arms = {scale: [arm for row in expand(file, scale) for arm in Accuracy(**row).arms()] for scale in ("cpu", "wide")}
    assert [(one.specs["defense"], one.seed) for one in arms["cpu"]] == [("none", 0), ("keylock", 0)]
    assert {one.id for one in arms["cpu"]} < {one.id for one in arms["wide"]}
    assert len(arms["wide"]) == 6


# a thief


def test_every_way_of_being_wrong_is_kept_apart(tmp_path: Path) -> None:
    (one,) = train(study(defenses=["keylock(length=64)"], rounds=8, thief=5, lr=0.1).arms(), tmp_path)
    found = {theft.kind: theft for theft in one.outcome.thefts}
    assert list(found) == ["own key and lock", "fresh key, initial lock", "fresh key, fresh lock", "zero lock"]
    assert [len(theft.correct) for theft in found.values()] == [1, 5, 5, 5]
    own = found["own key and lock"].correct[0]
    assert own == one.outcome.chosen().views[0].test.correct
    assert own >= 14
    zero = set(found["zero lock"].correct)
    assert len(zero) == 1  # the output is constant: the share of one class
    assert zero <= {8}
    assert min(found["fresh key, fresh lock"].correct) < own


# what is attacked


@pytest.mark.parametrize("spec", ["none", "noise", "precode(k=5)", "keylock(length=9)", "norm-only"])
def test_a_checkpoint_is_attacked_with_its_defense_and_secrets(tmp_path: Path, spec: str) -> None:
    (one,) = train(study(defenses=[spec]).arms(), tmp_path)
    file = str(one.folder / "best.safetensors")
    model, defense = models.parse(f'lenet(weights="{file}")'), defenses.parse(spec)
    wraps = type(defense).wrap is not Defense.wrap
    checkpoint = stated(file)
    assert checkpoint.training is not None
    assert checkpoint.defense == (spec if wraps else "")
    network = build(model, defense, (1, 8, 8), 2, "any")
    trainee = Trainee.of(network, defense)
    data = load(datasets.parse("halves"), arm().recipe, 0)
    if not any(secret.fresh for secret in trainee.secrets):
        assert evaluate(trainee, data.test).correct == one.outcome.chosen().views[0].test.correct
    images, labels = datasets.parse("halves").load([0])
    client = Client(images[0], int(labels[0]), "w", "c")
    seen = observe(model, defense, leakbench.ThreatModel(), [client], 2, torch.full((1, 8, 8), 0.5))
    shared = trainee.shared()
    for name, value in seen.weights.items():
        torch.testing.assert_close(value if value.shape == shared[name].shape else value[0], shared[name])
    private = trainee.private()
    assert not private.keys() & seen.weights.keys()
    if private:
        granted = leakbench.ThreatModel(reveals=frozenset({"key", "lock"}))
        told = observe(model, defense, granted, [client], 2, torch.full((1, 8, 8), 0.5))
        for name, value in private.items():
            assert torch.equal(told.weights[name][0], value)
        assert any(float(told.gradient[name].abs().max()) > 0 for name in private if name in told.gradient)


def test_the_matrix_attacks_the_checkpoint_of_a_defended_network(tmp_path: Path) -> None:
    (one,) = train(study(defenses=["keylock(length=9)"], rounds=1).arms(), tmp_path)
    model = f'lenet(weights="{one.folder / "best.safetensors"}")'
    axes: dict[str, Any] = {"attacks": ["ig(steps=20)"], "models": [model], "datasets": ["halves"], "images": 1}
    run = leakbench.run(Matrix(defenses=["keylock(length=9)"], **axes), tmp_path / "run")
    results = run.results()
    assert set(results["status"]) == {"ok"}
    assert len(results) == 4  # and three floors
    run.report()
    assert "behind keylock(length=9), with that client" in (tmp_path / "run" / "report.md").read_text()
    for other in ("none", "keylock(length=8)"):
        with pytest.raises(BadOption, match="is of a network trained behind 'keylock"):
            leakbench.run(Matrix(defenses=[other], floors=False, **axes), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_training_begins_with_a_checkpoint_of_its_own_model(tmp_path: Path) -> None:
    (one,) = train(study(rounds=6).arms(), tmp_path / "first")
    file = one.folder / "best.safetensors"
    (two,) = train(study(models=[f'lenet(weights="{file}")'], rounds=1, lr=1e-9).arms(), tmp_path / "second")
    assert two.outcome.rounds[0].views[0].test.correct == one.outcome.chosen().views[0].test.correct
    with pytest.raises(BadOption, match="it is of another network"):
        train(study(models=[f'resnet20(weights="{file}")']).arms(), tmp_path / "third")
    assert not (tmp_path / "third").exists()


# the command


def toml(tmp_path: Path) -> Path:
    file = tmp_path / "small.toml"
    text = 'models = ["lenet"]\ndatasets = ["halves"]\nrounds = 2\nbatch = 16\nlr = 0.05\nthief = 2\n'
    file.write_text(text + 'defenses = ["none"]\n[scale.smoke]\nrounds = 1\n[scale.cpu]\nname = "other"\n')
    return file


def test_the_command_trains_and_reports(tmp_path: Path) -> None:
    file, out = toml(tmp_path), tmp_path / "out"
    line = ["run", "accuracy", str(file), "--scale", "smoke", "--defense", "none", "--defense", "keylock(length=9)"]
    result = CliRunner().invoke(app, [*line, "--seeds", "2", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "report:" in result.output
    text = (out / "accuracy.md").read_text()
    assert (out / "accuracy.csv").read_text().count("\n") == 1 + 4
    assert len(list((out / "curves").glob("*.png"))) == 1
    assert "| keylock(length=9)" in text
    assert "fresh key, initial lock" in text
    for record in (out / ARMS_FOLDER).glob(f"*/{RECORD}"):
        assert json.loads(record.read_text())["provenance"]["version"] == leakbench.__version__
    (out / "accuracy.md").unlink()
    again = CliRunner().invoke(app, ["report", str(out)], catch_exceptions=False)
    assert again.exit_code == 0
    assert (out / "accuracy.md").read_text() == text


@pytest.mark.parametrize(
    ("shared", "options", "words"),
    [
        ("clients = 3\n", [], "clients=3 is an option of fedavg"),
        ("", ["--fraction", "0.5"], "fraction=0.5 is an option of fedavg"),
        ("", ["--split", "iid", "--mode", "centralised"], "split='iid' is an option of fedavg"),
        (
            'mode = "fedavg"\nclients = 3\n',
            ["--mode", "centralised", "--local-epochs", "2"],
            "local_epochs=2 is an option of",
        ),
    ],
)
def test_options_of_fedavg_are_refused_where_they_change_nothing(
    tmp_path: Path, shared: str, options: list[str], words: str
) -> None:
    file = toml(tmp_path)
    file.write_text(shared + file.read_text())
    line = ["run", "accuracy", str(file), "--scale", "smoke", "--out", str(tmp_path / "out"), *options]
    result = CliRunner().invoke(app, line)
    assert isinstance(result.exception, BadOption)
    assert words in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_options_of_fedavg_may_be_shared_by_rows_of_both_modes(tmp_path: Path) -> None:
    file = toml(tmp_path)
    rows = '[[scale.both.rows]]\nmode = "fedavg"\n[[scale.both.rows]]\n'
    file.write_text('clients = 3\nsplit = "shards"\n' + file.read_text() + "[scale.both]\n" + rows)
    plans, _ = TrainOptions(file, "both", fraction=0.7).plans(Accuracy)
    assert [(one.mode, one.clients, one.fraction) for one in plans] == [("fedavg", 3, 0.7), ("centralised", 3, 1.0)]
    (alone,), _ = TrainOptions(toml(tmp_path), "smoke", rounds=2).plans(Accuracy)
    assert [arm.id for arm in plans[1].arms()] == [arm.id for arm in alone.arms()]
    (own,), _ = TrainOptions(BENCHMARKS / "table3.toml", "cpu", mode="centralised").plans(Accuracy)
    assert own.mode == "centralised"


@pytest.mark.parametrize("kind", ["accuracy", pytest.param("tradeoff", marks=pytest.mark.long)])
def test_the_command_exits_with_1_if_every_training_failed(tmp_path: Path, kind: str) -> None:
    file, out = toml(tmp_path), tmp_path / "out"
    if kind == "tradeoff":
        file.write_text(file.read_text().replace('"halves"', '"samples(size=16, channels=1)"') + ATTACK)
    line = ["run", kind, str(file), "--scale", "smoke", "--out", str(out)]
    result = CliRunner().invoke(app, [*line, "--defense", "soteria"], catch_exceptions=False)
    assert result.exit_code == 1
    assert "the only training failed; the first: unsupported: soteria is defined for one image" in result.output
    assert "soteria, seed 0: unsupported" in (out / "accuracy.md").read_text()
    assert not (out / "tradeoff.md").exists()
    assert CliRunner().invoke(app, ["report", str(out)], catch_exceptions=False).exit_code == 0
    both = CliRunner().invoke(app, [*line, "--defense", "soteria", "--defense", "none"], catch_exceptions=False)
    assert both.exit_code == 0
    assert (out / "tradeoff.md").exists() == (kind == "tradeoff")


ATTACK = '[attack]\nattacks = ["peel"]\nimages = 1\nfloors = false\n'


def test_the_command_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leakbench.training import centralised

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(centralised, "train", stop)
    result = CliRunner().invoke(app, ["run", "accuracy", str(toml(tmp_path)), "--scale", "cpu", "--out", str(tmp_path)])
    assert result.exit_code == 130
    assert "stopped: 0 of 1 trainings are done; to resume: leakbench" in result.output


def test_the_figures_of_the_paper_that_ship_are_of_known_components() -> None:
    paper = published()
    for figure in (*paper.table1, *paper.table3, *paper.table6):
        assert figure.model in models.names()
        assert figure.dataset in datasets.names()
    assert {figure.attack for figure in paper.table6} <= set(attacks.names())
    sides = {name: side for name, side in SIDES.items() if name != "imagenet"}  # which needs a folder
    assert sides == {name: str(datasets.parse(name).image_shape[1]) for name in sides}
