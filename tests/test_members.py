"""Batches: which reconstruction is of which image, and how often each label occurs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from leakbench import datasets
from leakbench.gradients.counts import (
    class_counts,
    is_far,
    label_counts,
    label_counts_by_embedding,
    label_counts_by_weight,
    label_counts_of_update,
    largest_remainders,
    mean_feature,
    moved_probabilities,
)
from leakbench.metrics.aligned import AlignedPSNR, align
from leakbench.metrics.extremes import BestLPIPSVGG, BestMSE, BestPSNR, Extreme, WorstAlignedPSNR, WorstMSE, WorstPSNR
from leakbench.metrics.members import (
    MAX_DECOYS,
    BatchMetric,
    Identified,
    LabelCounts,
    MemberScores,
    RecoveredShare,
    ScoredBatches,
    aligned_errors,
    assign,
    count_overlap,
    matched,
)


def noise(count: int, seed: int) -> Tensor:
    return torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_the_assigned_error_is_that_of_the_best_brightness_and_contrast() -> None:
    images, truth = noise(3, 0) * 0.2 + 0.4, noise(4, 1)
    for row, column in itertools.product(range(3), range(4)):
        fitted = align(images[row : row + 1], truth[column : column + 1])
        error = float((fitted - truth[column]).square().mean())
        assert float(aligned_errors(images, truth)[row, column]) == pytest.approx(error, rel=0.02)
    odd = torch.stack([torch.full((1, 6, 6), 0.3), torch.full((1, 6, 6), torch.nan)])
    assert torch.allclose(aligned_errors(odd, truth), truth.double().flatten(1).var(1, correction=0).expand(2, 4))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_assignment_is_the_best_of_all_and_ignores_the_order(count: int) -> None:
    images, truth = noise(count, 2), noise(5, 3)
    costs = aligned_errors(images, truth)
    best = min(
        sum(float(costs[row, column]) for row, column in enumerate(columns))
        for columns in itertools.permutations(range(5), count)
    )
    places = assign(images, truth)
    assert sum(float(costs[int(row), column]) for column, row in enumerate(places) if row >= 0) == pytest.approx(best)
    assert int((places >= 0).sum()) == count
    order = torch.randperm(count, generator=torch.Generator().manual_seed(4))
    assert torch.equal(matched(images[order], truth), matched(images, truth))


def test_images_come_back_in_their_order_and_missing_ones_are_grey() -> None:
    truth = noise(4, 5)
    back = matched(0.3 * truth[[2, 0]] + 0.1, truth)
    assert torch.allclose(back[[0, 2]], 0.3 * truth[[0, 2]] + 0.1)
    assert bool((back[[1, 3]] == 0.5).all())
    assert bool((matched(truth[:0], truth) == 0.5).all())
    scores = MemberScores(AlignedPSNR()(back, truth), higher_is_better=True)
    assert scores.best == pytest.approx(100)
    assert scores.worst < scores.mean < scores.best
    assert scores.share(60) == 0.5
    assert MemberScores(torch.tensor([1.0, 3.0]), higher_is_better=False).worst == 3
    with pytest.raises(ValueError, match="give at most as many"):
        assign(noise(5, 0), truth)


def scored(images: Tensor, truth: Tensor, decoys: Tensor, values: dict[str, Tensor] | None = None) -> ScoredBatches:
    """Return batches after the assignment, whose labels are those of three classes in turn."""
    labels = torch.arange(truth.shape[1]).remainder(3).expand(truth.shape[:2])
    return ScoredBatches(images, truth, None, labels, decoys, values or {})


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_an_image_is_identified_if_no_other_of_the_batch_and_no_decoy_is_nearer(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leakbench.metrics.members.CHUNK_PIXELS", chunk)
    rng = torch.Generator().manual_seed(0)
    truth, decoys = torch.rand(2, 3, 1, 8, 8, generator=rng), torch.rand(MAX_DECOYS + 2, 1, 8, 8, generator=rng)
    images = truth.clone()
    images[0, 1] = truth[0, 2]  # nearest to another image of its batch
    images[1, 0] = 0.7 * decoys[5] + 0.1  # nearest to a decoy, at any brightness and contrast
    images[1, 1] = 0.5  # nearest to none
    assert Identified().of_batches(scored(images, truth, decoys)).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert Identified().of_batches(scored(images, truth, decoys[:0])).tolist() == pytest.approx([2 / 3, 1 / 3])
    images[1, 0] = 0.7 * truth[1, 0] + 0.3 * decoys[MAX_DECOYS - 1]
    assert Identified().of_batches(scored(images, truth, decoys))[1] == pytest.approx(2 / 3)
    images[1, 0] = decoys[MAX_DECOYS + 1]  # beyond the most that count
    beyond = Identified().of_batches(scored(images, truth, decoys))[1]
    everyone = _nearest_by_correlation(images[1], torch.cat([truth[1], decoys[:MAX_DECOYS]]))
    assert beyond == pytest.approx(sum(everyone[row] == row for row in (0, 2)) / 3)


def _nearest_by_correlation(images: Tensor, candidates: Tensor) -> list[int]:
    found = []
    for image in images:
        values = [abs(torch.corrcoef(torch.stack([image.flatten(), one.flatten()]))[0, 1]) for one in candidates]
        found.append(int(torch.stack(values).nan_to_num(-1).argmax()))
    return found


@pytest.mark.parametrize(
    ("metric", "name", "expected"),
    [(BestMSE(), "mse", 1.0), (WorstMSE(), "mse", 3.0), (BestPSNR(), "psnr", 3.0), (WorstPSNR(), "psnr", 1.0),
     (BestLPIPSVGG(), "lpips_vgg", 1.0)],
)  # fmt: skip
def test_the_best_image_of_a_batch_leaks_most(metric: Extreme, name: str, expected: float) -> None:
    truth = torch.rand(1, 3, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    values = {name: torch.tensor([[1.0, 3.0, 2.0]]).double()}
    assert metric.of_batches(scored(truth, truth, truth[0], values)).tolist() == [expected]
    assert metric.higher_is_better == metric.of.higher_is_better
    assert not metric.usual


@pytest.mark.parametrize("metric", [RecoveredShare(), WorstAlignedPSNR(), LabelCounts()])
def test_a_metric_of_batches_has_no_value_without_what_it_needs(metric: BatchMetric) -> None:
    truth = torch.rand(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert metric.of_batches(scored(truth, truth, truth[0])).isnan().all()


@pytest.mark.parametrize("images", [1, 4, 16, 64])
def test_counts_are_exact_if_the_probabilities_do_not_depend_on_the_image(images: int) -> None:
    rng = torch.Generator().manual_seed(images)
    probabilities = torch.softmax(torch.randn(10, generator=rng), 0)
    labels = torch.randint(10, (images,), generator=rng)
    true = torch.bincount(labels, minlength=10)
    gradient = probabilities - true / images
    assert torch.equal(label_counts(gradient, probabilities, images), true)
    update = label_counts_of_update(0.37 * gradient, probabilities, images)
    assert (update is None) if images >= 10 else torch.equal(update, true)


def test_counts_of_images_that_may_have_several_classes_are_each_by_itself() -> None:
    """Their sum is no number of images, and none is below 0 or above that."""
    rng = torch.Generator().manual_seed(0)
    probabilities, has = torch.rand(10, generator=rng), torch.rand(8, 10, generator=rng) < 0.3
    gradient = probabilities - has.double().mean(0)
    assert torch.equal(class_counts(gradient, probabilities, 8), has.sum(0))
    assert torch.equal(class_counts(gradient, torch.stack([probabilities.roll(3), probabilities]), 8), has.sum(0))
    assert class_counts(torch.tensor([-2.0, 2.0]), torch.tensor([0.5, 0.5]), 8).tolist() == [8, 0]


def test_remainders_give_whole_numbers_of_the_sum() -> None:
    values = torch.tensor([[0.4, 0.4, -3.0, 0.2], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    found = largest_remainders(values, 7)
    assert found.tolist()[0] == [3, 3, 0, 1]
    assert found.sum(1).tolist() == [7, 7, 7]
    assert found.tolist()[1] == [2, 2, 2, 1]
    assert count_overlap(torch.tensor([3, 3, 0, 1]), torch.tensor([2, 3, 2, 0])) == pytest.approx(5 / 7)


def test_of_several_estimates_that_with_the_nearest_whole_numbers_counts() -> None:
    probabilities = torch.softmax(torch.randn(10, generator=torch.Generator().manual_seed(0)), 0)
    true = torch.tensor([2, 0, 0, 1, 3, 0, 0, 1, 0, 1])
    gradient = probabilities - true / 8
    wrong = probabilities.roll(3)
    assert not torch.equal(label_counts(gradient, wrong, 8), true)
    for estimates in ([wrong, probabilities], [probabilities, wrong]):
        assert torch.equal(label_counts(gradient, torch.stack(estimates), 8), true)
        assert torch.equal(label_counts_of_update(0.37 * gradient, torch.stack(estimates), 8), true)


def test_the_features_of_public_images_are_moved_to_those_of_the_batch() -> None:
    torch.manual_seed(0)
    last = nn.Linear(64, 10).double()
    spread = 0.05 * torch.randn(40, 64).double()
    features, public = (3 + spread[:16]).clamp(min=0), (1 + spread[16:]).clamp(min=0)
    labels = torch.arange(16) % 10
    loss = nn.functional.cross_entropy(last(features), labels)
    by_weight, by_bias = torch.autograd.grad(loss, [last.weight, last.bias])
    mean = mean_feature(by_weight, by_bias)
    assert mean is not None
    torch.testing.assert_close(mean, features.mean(0), rtol=0.05, atol=0)
    assert mean_feature(by_weight[:2], by_bias[:2]) is None  # of two classes nothing would be left over
    assert mean_feature(torch.randn(10, 64).double(), by_bias) is None
    assert is_far(public, mean)
    assert not is_far(features, mean)
    true = torch.bincount(labels, minlength=10)
    moved = moved_probabilities(public, mean, last.weight.detach(), last.bias.detach())
    assert torch.equal(label_counts(by_bias, moved, 16), true)
    assert not torch.equal(label_counts(by_bias, torch.softmax(last(public), 1).mean(0), 16), true)


def test_counts_of_an_untrained_network_by_bias_weight_and_embedding() -> None:
    """The rule by public probabilities is right for all labels; the others for most."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(432, 64), nn.ReLU())
    last = nn.Linear(64, 10)
    images, labels = datasets.parse("samples(size=12)").load(range(40))
    labels = labels % 10
    with torch.no_grad():
        features = body(images[24:])
        probabilities = torch.softmax(last(features), 1)
    overlaps: list[tuple[float, float, float]] = []
    for rows in (range(8), range(8, 16), range(8, 24)):
        count, true = len(rows), torch.bincount(labels[rows], minlength=10)
        loss = nn.functional.cross_entropy(last(body(images[rows])), labels[rows])
        by_weight, by_bias = torch.autograd.grad(loss, [last.weight, last.bias])
        found = (
            label_counts(by_bias, probabilities.mean(0), count),
            label_counts_by_weight(by_weight, features, probabilities, count),
            label_counts_by_embedding(by_weight, by_bias, last.weight.detach(), last.bias.detach(), count),
        )
        assert all(int(one.sum()) == count for one in found)
        overlaps.append(tuple(float(count_overlap(one, true)) for one in found))
    by_bias_, by_weight_, embedded = (sum(each) / 3 for each in zip(*overlaps))
    assert by_bias_ == 1
    assert by_weight_ > 0.7
    assert embedded > 0.7
