"""MixUp and CutMix: torchvision's pictures for the same shares and boxes, pairs and weights by the documented rules."""

import pytest
import torch
from pretending import Pretending, elsewhere
from torch import Tensor
from torchvision.transforms import v2

from vitkit.contracts import UNLABELLED
from vitkit.data.preprocess import Preprocessing
from vitkit.data.split import ImageSplit
from vitkit.errors import UsageError
from vitkit.transforms.augment import HorizontalFlip
from vitkit.transforms.mixup import CutMix, Mix, MixUp

ALL = [MixUp(), CutMix(), Mix(), Mix(per="batch"), Mix(p=0.5), MixUp(same_class=True), CutMix(same_class=True)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int, *shape: int) -> Tensor:
    return torch.rand(n, *(shape or (3, 16, 20)), generator=generator(5))


def same_outcome(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def boxes(given: Tensor, mixed: Tensor, partners: Tensor) -> Tensor:
    """Where pixels are the partner's, `(b h w)`."""
    return ((mixed == given[partners]) & (mixed != given)).all(1)


def test_mixup_is_torchvisions_for_the_same_share_and_partner():
    given, labels = images(9), torch.arange(9) % 4
    mixed, partners, weights = MixUp(0.7)(given, labels, generator())
    assert weights.dtype == torch.float32
    reference = v2.MixUp(num_classes=4)
    for i in range(9):
        pair = [int(partners[i]), i]  # torchvision's partner is the one before in the batch
        params = {"labels": labels[pair], "batch_size": 2, "lam": float(weights[i])}
        torch.testing.assert_close(mixed[i], reference.transform(given[pair], params)[1])
        ours = weights[i] * one_hot(labels[i], 4) + (1 - weights[i]) * one_hot(labels[partners[i]], 4)
        torch.testing.assert_close(ours, reference._mixup_label(labels[pair], lam=float(weights[i]))[1])


def test_cutmix_is_torchvisions_for_the_same_box_and_partner():
    given, labels = images(40), torch.arange(40)
    mixed, partners, weights = CutMix()(given, labels, generator())
    reference, areas = v2.CutMix(num_classes=40), []
    for i, box in enumerate(boxes(given, mixed, partners)):
        rows, columns = box.any(1).nonzero()[:, 0].tolist(), box.any(0).nonzero()[:, 0].tolist()
        if not rows:
            assert torch.equal(mixed[i], given[i])
            assert weights[i] == 1
            continue
        x1, y1, x2, y2 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        pair = [int(partners[i]), i]
        params = {"labels": labels[pair], "batch_size": 2, "box": (x1, y1, x2, y2)}
        assert torch.equal(mixed[i], reference.transform(given[pair], params)[1])
        areas.append((x2 - x1) * (y2 - y1) / (16 * 20))
        assert float(weights[i]) == pytest.approx(1 - areas[-1], abs=1e-6)
    assert max(areas) > 0.5
    assert min(areas) < 0.1


def test_the_box_of_a_drawn_share_is_torchvisions(monkeypatch):
    share = torch.linspace(0, 1, 50)
    monkeypatch.setattr("vitkit.transforms.mixup._beta", lambda *_: share)
    drawn = generator()
    maps, weights = CutMix().maps(images(50), drawn)
    drawn = generator()
    y, x = (torch.randint(side, (50, 1), generator=drawn)[:, 0].tolist() for side in (16, 20))
    reference = v2.CutMix(num_classes=2)
    for i in range(50):
        numbers = iter([torch.tensor([x[i]]), torch.tensor([y[i]])])
        with monkeypatch.context() as patch:
            patch.setattr(reference, "_dist", type("Fixed", (), {"sample": lambda *_, i=i: share[i]})())
            patch.setattr(torch, "randint", lambda *_, numbers=numbers, **__: next(numbers))
            expected = reference.make_params([images(1)])
        x1, y1, x2, y2 = expected["box"]
        inside = torch.zeros(16, 20)
        inside[y1:y2, x1:x2] = 1
        assert torch.equal(maps[i], 1 - inside)
        assert float(weights[i]) == pytest.approx(expected["lam_adjusted"], abs=1e-6)


def one_hot(label: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(label, classes).float()


@pytest.mark.parametrize("mix", ALL, ids=repr)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 16])
def test_each_image_has_another_for_its_partner_and_is_the_partner_of_another(mix, n):
    given, labels = images(n), torch.zeros(n, dtype=torch.int64)
    for seed in range(5):
        mixed, partners, weights = mix(given, labels, generator(seed))
        assert mixed.shape == given.shape
        assert mixed.dtype == torch.float32
        assert sorted(partners.tolist()) == list(range(n))
        assert ((weights >= 0) & (weights <= 1)).all()
        assert n == 1 or not (partners == torch.arange(n)).any()
    if n == 1:
        assert torch.equal(mixed, given)
        assert weights.tolist() == [1.0]


@pytest.mark.parametrize("mix", ALL, ids=repr)
def test_an_empty_batch_stays_empty(mix):
    mixed, partners, weights = mix(images(4)[:0], torch.zeros(0, dtype=torch.int64), generator())
    assert (mixed.shape, partners.shape, weights.shape) == ((0, 3, 16, 20), (0,), (0,))


@pytest.mark.parametrize("mix", ALL, ids=repr)
def test_choices_come_from_the_generator_alone_and_what_is_given_stays(mix):
    given, labels = images(16), torch.arange(16) % 3
    before, state = given.clone(), torch.get_rng_state()
    first = mix(given, labels, generator(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert same_outcome(first, mix(given, labels, generator(3)))
    assert not same_outcome(first, mix(given, labels, generator(4)))
    assert torch.equal(given, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_image_has_a_share_and_a_box_of_its_own():
    for mix in (MixUp(), Mix(per="batch", cutmix_share=0.0)):
        weights = mix(images(200), torch.arange(200), generator())[2]
        assert len(weights.unique()) == 200
        assert 0.4 < weights.mean() < 0.6
    narrow = MixUp(50.0)(images(200), torch.arange(200), generator())[2]
    assert (narrow - 0.5).abs().max() < 0.25
    at_either_end = MixUp(0.01)(images(200), torch.arange(200), generator())[2]
    assert ((at_either_end < 0.05) | (at_either_end > 0.95)).float().mean() > 0.9
    assert at_either_end.isfinite().all()
    given = images(60)
    mixed, partners, _ = CutMix()(given, torch.arange(60), generator())
    assert len({tuple(box.flatten().tolist()) for box in boxes(given, mixed, partners)}) > 40


@pytest.mark.parametrize("per", ["image", "batch"])
def test_a_choice_falls_for_each_image_or_for_the_batch(per):
    given, mixes, kinds = images(100), Mix(p=0.75, cutmix_share=0.5, per=per), []
    for seed in range(8 if per == "image" else 120):
        mixed, partners, weights = mixes(given, torch.arange(100), generator(seed))
        changed = (mixed != given).flatten(1)
        # A box has pixels of both, a blend almost none of either; a box may also be empty.
        cut = boxes(given, mixed, partners).flatten(1).any(1) & ~changed.all(1)
        assert torch.equal(weights == 1, ~changed.any(1))
        kinds.append(torch.stack([~changed.any(1), cut, changed.any(1) & ~cut]).float().mean(1))
    shares = torch.stack(kinds)
    if per == "image":
        torch.testing.assert_close(shares.mean(0), torch.tensor([0.27, 0.35, 0.38]), atol=0.06, rtol=0)
    else:
        assert ((shares[:, 0] == 1) | (shares[:, 2] > 0.95) | (shares[:, 2] < 0.05)).all()
        assert 0.15 < (shares[:, 0] == 1).float().mean() < 0.38
        assert 0.25 < (shares[:, 2] > 0.95).float().mean() < 0.5


def test_images_of_one_class_alone_and_hidden_labels_among_themselves():
    labels = torch.tensor([0, 1, 1, 0, 2, UNLABELLED, 1, UNLABELLED, 0, UNLABELLED])
    given = images(10)
    for seed in range(20):
        mixed, partners, weights = MixUp(same_class=True)(given, labels, generator(seed))
        assert torch.equal(labels[partners], labels)
        alone = (labels == 2) | (labels == UNLABELLED)
        assert torch.equal(partners == torch.arange(10), alone)
        assert torch.equal(mixed[alone], given[alone])
        assert (weights[alone] == 1).all()
        partners = MixUp()(given, labels, generator(seed))[1]
        assert torch.equal(labels[partners] == UNLABELLED, labels == UNLABELLED)
        assert not (partners == torch.arange(10)).any()


@pytest.mark.parametrize("mix", [MixUp(), CutMix(), Mix()], ids=repr)
def test_all_views_of_an_image_are_mixed_alike(mix):
    views = images(6, 2, 3, 8, 8)
    views[:, 1] = 1 - views[:, 0]
    mixed, partners, weights = mix(views, torch.arange(6), generator())
    torch.testing.assert_close(mixed[:, 1], 1 - mixed[:, 0])
    alone = mix(views[:, 0], torch.arange(6), generator())
    assert same_outcome(alone, (mixed[:, 0], partners, weights))


def split(n: int = 50) -> ImageSplit:
    pixels = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=generator())
    return ImageSplit(pixels, torch.arange(n), Preprocessing((1, 8, 8), (0.4,), (0.3,)))


def test_batches_bring_the_partners_labels_and_the_weights():
    batches = split().batches(8, shuffle=True, mix=MixUp())
    plain = split().batches(8, shuffle=True)
    for batch, unmixed in zip(batches.epoch(1, seed=2), plain.epoch(1, seed=2), strict=True):
        assert torch.equal(batch["labels"], unmixed["labels"])
        assert batch["partners"].dtype == torch.int64
        assert sorted(batch["partners"].tolist()) == batch["labels"].tolist()
        place = {int(label): i for i, label in enumerate(batch["labels"])}
        partners = unmixed["images"][[place[int(label)] for label in batch["partners"]]]
        # Normalising is linear: mixed before or after, pictures are the same.
        torch.testing.assert_close(batch["images"], torch.lerp(partners, unmixed["images"], batch["weights"].view(-1, 1, 1, 1)))
        assert "partners" not in unmixed


def test_mixing_changes_no_augmentation_and_an_epoch_can_be_entered_anywhere():
    def made(mix, **options):
        return list(split().batches(8, shuffle=True, augment=HorizontalFlip(), views=2, mix=mix).epoch(3, seed=1, **options))

    whole, late = made(Mix()), made(Mix(), start=4)
    for one, other in zip(whole[4:], late, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("images", "labels", "partners", "weights"))
    assert whole[0]["images"].shape == (8, 2, 1, 8, 8)
    torch.testing.assert_close(made(Mix(p=0.0))[0]["images"], made(None)[0]["images"])
    ranks = [made(Mix(), rank=rank, world=2)[0] for rank in (0, 1)]
    for rank in ranks:
        assert set(rank["partners"].tolist()) == set(rank["labels"].tolist())


def test_batches_keep_hidden_labels_apart():
    for batch in split().mask_labels(0.5).batches(9, shuffle=True, mix=Mix()).epoch(0):
        assert torch.equal(batch["partners"] == UNLABELLED, batch["labels"] == UNLABELLED)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MixUp(0.0), "alpha is 0.0; expected a finite positive number"),
        (lambda: CutMix(-1.0), "alpha is -1.0; expected a finite positive number"),
        (lambda: Mix(cutmix=0.0), "cutmix is 0.0; expected a finite positive number"),
        (lambda: Mix(p=1.5), "p is 1.5; expected a number in [0, 1]"),
        (lambda: Mix(cutmix_share=-0.1), "cutmix_share is -0.1; expected a number in [0, 1]"),
        (lambda: Mix(per="epoch"), "per is 'epoch'; expected 'image', 'batch'"),
        (lambda: MixUp()(images(4), torch.arange(3), generator()), "images are (4, 3, 16, 20) and labels (3,); expected"),
    ],
)
def test_what_makes_no_sense_is_refused(make, said):
    with pytest.raises(UsageError) as caught:
        make()
    assert said in str(caught.value)


@pytest.mark.parametrize("mix", [MixUp(0.4), CutMix(0.4), Mix()], ids=lambda mix: type(mix).__name__)
def test_images_are_mixed_on_a_device_without_fp64(mix):
    images, labels = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    with Pretending():
        mixed, partners, weights = mix(elsewhere(images), elsewhere(labels), torch.Generator().manual_seed(1))
        again = mix(elsewhere(images), elsewhere(labels), torch.Generator().manual_seed(1))[0]
    assert mixed.shape == images.shape
    assert torch.equal(mixed.cpu(), again.cpu())
    assert partners.cpu().sort().values.tolist() == list(range(6))
    assert len(set(weights.tolist())) > 3
    assert all(0 <= weight <= 1 for weight in weights.tolist())
