"""Batches: whole epochs, entered anywhere, shared by ranks; labels hidden; pixels as they should be."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lazy_images import Lazy
from torchvision.transforms import v2

from vitkit.contracts import UNLABELLED, Batches, Split
from vitkit.data.dataloader import ImageBatches, View
from vitkit.data.preprocess import Preprocessing
from vitkit.data.split import ImageSplit, proportional_indices
from vitkit.errors import UsageError
from vitkit.seeding import derive_seed
from vitkit.transforms.augment import Compose, HorizontalFlip, Noise, RandomAffine, RandomResizedCrop
from vitkit.transforms.mixup import MixUp

AUGMENT = Compose([RandomAffine(degrees=20, translate=0.1), HorizontalFlip(), Noise(0.1)])


def split(n: int = 50, channels: int = 1, size: int = 8, classes: int = 5) -> ImageSplit:
    """Image i is filled with the value i."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, channels, size, size).contiguous()
    preprocessing = Preprocessing((channels, size, size), (0.0,) * channels, (1 / 255,) * channels)
    return ImageSplit(images, torch.arange(n) % classes, preprocessing)


def numbers(batch) -> list[int]:
    return batch["images"][:, 0, 0, 0].round().int().tolist()


def same(a, b) -> bool:
    return all(
        torch.equal(x["images"], y["images"]) and torch.equal(x["labels"], y["labels"])
        for x, y in zip(a, b, strict=True)
    )


def test_it_follows_the_contract():
    assert isinstance(split(), Split)
    assert isinstance(split().batches(4), Batches)


def test_images_are_what_the_preparation_says_and_labels_go_with_them():
    images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8)
    preprocessing = Preprocessing((3, 8, 8), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    labels = torch.arange(9)
    batches = list(ImageSplit(images, labels, preprocessing).batches(4).epoch(0))
    found = torch.cat([batch["images"] for batch in batches])
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocessing.mean, preprocessing.std)])
    torch.testing.assert_close(found, normalise(images))
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), labels)
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 1]


def test_an_epoch_shows_each_image_once_in_an_order_of_its_own():
    batches = split().batches(8, shuffle=True)
    epochs = [[number for batch in batches.epoch(e, seed=3) for number in numbers(batch)] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))
    members = [[set(epoch[i : i + 8]) for i in range(0, 50, 8)] for epoch in epochs]
    assert members[0] != members[1]
    for batch in batches.epoch(0):
        assert batch["labels"].tolist() == [number % 5 for number in numbers(batch)]


def test_the_same_numbers_give_the_same_batches_and_others_give_others():
    batches = split().batches(8, shuffle=True, augment=AUGMENT, views=2)
    first = list(batches.epoch(4, seed=1))
    assert same(first, list(batches.epoch(4, seed=1)))
    torch.manual_seed(99)  # the global random state plays no part
    assert same(first, list(batches.epoch(4, seed=1)))
    for other in (batches.epoch(4, seed=2), batches.epoch(5, seed=1), batches.epoch(4, seed=1, rank=1, world=2)):
        assert not torch.equal(first[0]["images"][:4], next(other)["images"][:4])


@pytest.mark.parametrize("start", [0, 1, 5, 6, 7, 20])
def test_an_epoch_can_be_entered_anywhere(start):
    batches = split().batches(8, shuffle=True, augment=AUGMENT)
    assert same(list(batches.epoch(2, seed=7))[start:], list(batches.epoch(2, seed=7, start=start)))


def test_entering_late_makes_none_of_the_earlier_batches():
    calls = []

    def count(images, generator):
        calls.append(len(images))
        return images

    assert len(list(split().batches(8, augment=count).epoch(0, start=5))) == 2
    assert calls == [8, 2]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_a_shuffled_epoch_equally_and_without_overlap(world, drop_last):
    batches = split(n=50).batches(4, shuffle=True, drop_last=drop_last)
    for number in range(3):
        ranks = [[numbers(batch) for batch in batches.epoch(number, rank=r, world=world)] for r in range(world)]
        assert len({len(rank) for rank in ranks}) == 1  # as many steps on each: none waits for another for ever
        seen = sorted(number for rank in ranks for batch in rank for number in batch)
        step = 4 * world if drop_last else world
        assert len(seen) == len(set(seen)) == 50 // step * step
        for step in zip(*ranks, strict=True):
            sizes = {len(batch) for batch in step}
            assert len(sizes) == 1
            assert sizes != {0}


def test_images_left_out_so_that_shares_are_equal_differ_between_epochs():
    batches = split(n=51).batches(4, shuffle=True)
    left_out = []
    for number in range(4):
        seen = {n for rank in range(4) for batch in batches.epoch(number, rank=rank, world=4) for n in numbers(batch)}
        left_out.append(frozenset(range(51)) - seen)
    assert {len(rows) for rows in left_out} == {3}
    assert len(set(left_out)) == 4


@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_without_shuffling_every_image_comes_exactly_once(world):
    ranks = [[numbers(batch) for batch in split(n=50).batches(4).epoch(0, rank=r, world=world)] for r in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(number for rank in ranks for batch in rank for number in batch) == list(range(50))


@pytest.mark.parametrize("world", [2, 4])
def test_a_plain_mean_over_equal_shares_has_the_gradient_of_one_device(world):
    data = split(n=8 * world + world, channels=3)
    weight = torch.randn(3 * 64, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def gradients(batches):
        return [
            torch.autograd.grad(F.cross_entropy(batch["images"].flatten(1) / 255 @ weight, batch["labels"]), weight)[0]
            for batch in batches
        ]

    one = gradients(data.batches(4 * world, shuffle=True).epoch(1))
    parts = [gradients(data.batches(4, shuffle=True).epoch(1, rank=rank, world=world)) for rank in range(world)]
    assert len(one) == 3
    for expected, *found in zip(one, *parts, strict=True):
        torch.testing.assert_close(torch.stack(found).mean(0), expected, atol=1e-5, rtol=0)


def test_ranks_together_hold_the_batch_of_one_device():
    one = split().batches(8, shuffle=True).epoch(3)
    two = [split().batches(4, shuffle=True).epoch(3, rank=rank, world=2) for rank in (0, 1)]
    for whole, *parts in zip(one, *two, strict=True):
        assert sorted(numbers(whole)) == sorted(number for part in parts for number in numbers(part))


def test_evaluation_keeps_the_order_over_ranks():
    parts = zip(*(split().batches(4).epoch(0, rank=rank, world=3) for rank in range(3)), strict=True)
    assert [number for step in parts for part in step for number in numbers(part)] == list(range(50))


def test_its_length_is_that_of_an_epoch_on_this_many_ranks(monkeypatch):
    assert len(split().batches(8)) == 7
    assert len(split().batches(8, drop_last=True)) == 6
    monkeypatch.setattr("vitkit.data.dataloader.world_size", lambda: 4)
    batches = split().batches(8, drop_last=True)
    assert len(batches) == len(list(batches.epoch(0, rank=1, world=4))) == 1
    assert len(split().batches(64, drop_last=True)) == 0


def test_views_of_an_image_lie_beside_each_other():
    batch = next(split(channels=3).batches(6, augment=AUGMENT, views=4).epoch(0))
    assert batch["images"].shape == (6, 4, 3, 8, 8)
    assert batch["labels"].shape == (6,)
    assert (batch["images"][5, 0] != batch["images"][5, 1]).any()
    plain = next(split().batches(6, views=3).epoch(0))["images"]
    assert torch.equal(plain[:, 0], plain[:, 2])
    assert plain[:, 1, 0, 0, 0].round().int().tolist() == list(range(6))


def test_augmentation_happens_on_pixels_between_zero_and_one():
    def look(images, generator):
        assert images.dtype == torch.float32
        assert 0 <= images.min() <= images.max() <= 1
        return images

    assert len(list(split().batches(25, augment=look, views=2).epoch(0))) == 2


def test_autocast_does_not_reach_into_batches():
    batches = split(channels=3).batches(8, augment=AUGMENT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = list(batches.epoch(0))
    assert same(inside, list(batches.epoch(0)))
    assert inside[0]["images"].dtype == torch.float32


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("views", 0), ("batch_size", -3)])
def test_sizes_below_one_are_refused(name, value):
    with pytest.raises(UsageError, match=f"{name} is {value}; expected at least 1"):
        ImageBatches(split(), **({"batch_size": 4} | {name: value}))


def test_padding_surrounds_with_black_and_resizing_is_antialiased():
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8)
    padded = Preprocessing((1, 32, 32), (0.0,), (1.0,), "pad").pixels(images)
    assert torch.equal(padded[:, :, 2:30, 2:30], images / 255)
    assert padded.count_nonzero() == images.count_nonzero()
    for fit, size in (("resize", 32), ("resize", 14), ("pad", 20)):  # padding cannot make an image smaller
        found = Preprocessing((1, size, size), (0.0,), (1.0,), fit).pixels(images)
        expected = v2.functional.resize(images / 255, [size, size], antialias=True)
        torch.testing.assert_close(found, expected)


def test_a_preparation_survives_json():
    preprocessing = Preprocessing((3, 16, 24), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "pad")
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing
    for change in ({"mean": [0.1]}, {"fit": "stretch"}, {"shape": [3, 16]}, {"std": None}):
        with pytest.raises(UsageError, match="preprocessing is .*; expected shape, mean, std and fit"):
            Preprocessing.from_json(preprocessing.to_json() | change)


def test_taking_some_takes_of_every_class_alike():
    some = split(n=50, classes=5).stratified_subset(20, seed=1)
    assert some.labels.bincount().tolist() == [4] * 5
    assert torch.equal(some.images[:, 0, 0, 0] % 5, some.labels)
    assert torch.equal(some.images, split().stratified_subset(20, seed=1).images)
    assert not torch.equal(some.images, split().stratified_subset(20, seed=2).images)
    assert len(split().stratified_subset(1000)) == 50
    with pytest.raises(UsageError, match="count is 0; expected at least 1"):
        split().stratified_subset(0)


def test_a_rare_class_gives_all_it_has():
    labels = torch.tensor([0] * 40 + [1] * 3 + [2] * 7)
    found = ImageSplit(split().images, labels, split().preprocessing).stratified_subset(15).labels.bincount()
    assert found.tolist() == [6, 3, 6]


@pytest.mark.parametrize("fraction", [0.1, 0.2, 1.0])
def test_hiding_labels_leaves_a_fraction_of_every_class(fraction):
    hidden = split().mask_labels(fraction, seed=2)
    assert len(hidden) == 50
    shown = hidden.labels != UNLABELLED
    assert hidden.labels[shown].bincount(minlength=5).tolist() == [round(10 * fraction)] * 5
    assert torch.equal(hidden.labels[shown], split().labels[shown])
    assert hidden.images.data_ptr() != 0
    assert torch.equal(hidden.images, split().images)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, 0.001, float("nan")])
def test_a_label_fraction_out_of_range(fraction):
    with pytest.raises(UsageError, match=f"fraction is {fraction}; (expected a number in|of 50 images it leaves no label)"):
        split().mask_labels(fraction)


def test_seeds_depend_on_every_part_and_on_their_order():
    seeds = {derive_seed(a, b, c) for a in range(6) for b in range(6) for c in range(6)}
    assert len(seeds) == 216
    assert len({seed % 2**32 for seed in seeds}) == 216  # the CPU's generator looks at 32 bits
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_labels_that_are_shown_are_repeated_to_a_share_of_the_whole():
    labels = torch.arange(400) % 4
    whole = ImageSplit(torch.zeros(400, 1, 2, 2, dtype=torch.uint8), labels, Preprocessing((1, 2, 2), (0.5,), (0.5,)))
    hidden = whole.mask_labels(0.05, seed=1)
    more = hidden.oversample_labelled(0.25)
    shown = (more.labels >= 0).float().mean()
    assert float(shown) == pytest.approx(0.25, abs=0.02)
    assert (more.labels[:400] == hidden.labels).all()
    assert torch.bincount(more.labels[more.labels >= 0]).unique().numel() == 1
    assert whole.oversample_labelled(0.25) is whole
    with pytest.raises(UsageError, match=r"share is 1.0; expected a number in \[0, 1\)"):
        hidden.oversample_labelled(1.0)


def lazy_split(broken=()):
    images = torch.arange(40, dtype=torch.uint8).view(20, 1, 1, 2)
    tensors = ImageSplit(images, torch.arange(20), Preprocessing((1, 1, 2), (0.0,), (1.0,)))
    return tensors, replace(tensors, images=Lazy(images, broken))


def test_images_that_are_read_lazily_make_the_batches_of_a_tensor():
    tensors, lazy = lazy_split()
    for rank in range(2):
        options = {"seed": 4, "start": 1, "rank": rank, "world": 2}
        pairs = zip(tensors.batches(3, shuffle=True).epoch(2, **options), lazy.batches(3, shuffle=True).epoch(2, **options), strict=True)
        for one, other in pairs:
            assert torch.equal(one["images"], other["images"])
            assert torch.equal(one["labels"], other["labels"])


def test_lazy_images_that_cannot_be_read_are_left_out_with_their_labels():
    _, lazy = lazy_split(broken=[3, 17])
    batches = lazy.batches(6, shuffle=True, views=2)
    found = list(batches.epoch(0))
    assert sorted(torch.cat([batch["labels"] for batch in found]).tolist()) == [n for n in range(20) if n not in (3, 17)]
    assert all(batch["images"].shape == (len(batch["labels"]), 2, 1, 1, 2) for batch in found)
    assert sorted(batches.skipped) == ["row 17", "row 3"]
    loaded = lazy.in_memory()
    assert isinstance(loaded.images, torch.Tensor)
    assert loaded.labels.tolist() == [n for n in range(20) if n not in (3, 17)]
    assert torch.equal(loaded.images[:, 0, 0, 0].long(), 2 * loaded.labels)
    assert isinstance(lazy.stratified_subset(5).images, Lazy)
    assert lazy.subset(torch.tensor([3])).in_memory().images.shape == (0, 1, 1, 2)


def test_validation_images_are_drawn_in_proportion_and_no_class_gives_its_last_one():
    labels = torch.tensor([0] * 600 + [1] * 300 + [2] * 100 + [3] * 2 + [4])
    rows = proportional_indices(labels, 100, seed=0)
    assert labels[rows].bincount(minlength=5).tolist() == [60, 30, 10, 1, 0]
    assert torch.equal(rows, proportional_indices(labels, 100, seed=0))
    assert not torch.equal(rows, proportional_indices(labels, 100, seed=1))
    assert len(proportional_indices(labels, 0, seed=0)) == 0
    assert len(proportional_indices(labels[:0], 5, seed=0)) == 0


def test_a_large_subset_reads_its_rows_from_the_mapped_tensor(monkeypatch):
    monkeypatch.setattr("vitkit.data.split.COPIED_BYTES", 100)
    rows = torch.randperm(50, generator=torch.Generator().manual_seed(0))[:40]
    large = split().subset(rows)
    assert not isinstance(large.images, torch.Tensor)
    monkeypatch.setattr("vitkit.data.split.COPIED_BYTES", 1 << 30)
    small = split().subset(rows)
    for options in ({}, {"shuffle": True}):
        assert same(large.batches(7, **options).epoch(2), small.batches(7, **options).epoch(2))
    assert same(large.subset(torch.arange(9)).batches(4).epoch(0), small.subset(torch.arange(9)).batches(4).epoch(0))
    assert torch.equal(large.in_memory().images, small.images)
    assert large.images.shape == tuple(small.images.shape)


def test_views_of_several_sizes_and_transforms_come_from_the_stored_image():
    images = torch.randint(0, 256, (10, 3, 48, 48), dtype=torch.uint8)
    data = ImageSplit(images, torch.arange(10), Preprocessing((3, 32, 32), (0.5,) * 3, (0.25,) * 3))
    crop = RandomResizedCrop(scale=(0.1, 0.5))
    calls = []

    def look(images, generator):
        calls.append(tuple(images.shape))
        return images

    views = [View(count=2, transform=Compose([crop, HorizontalFlip(), look])), View(size=16, count=3, transform=crop), View(size=8)]
    batches = data.batches(4, shuffle=True, views=views)
    first = next(batches.epoch(0, seed=3))
    assert [tuple(view.shape) for view in first["views"]] == [(4, 2, 3, 32, 32), (4, 3, 3, 16, 16), (4, 1, 3, 8, 8)]
    assert first["images"] is first["views"][0]
    assert calls == [(8, 3, 32, 32)]
    again = next(batches.epoch(0, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(first["views"], again["views"], strict=True))
    assert not torch.equal(first["views"][0][:, 0], first["views"][0][:, 1])
    rows = first["labels"]
    expected = v2.functional.resize(images[rows] / 255, [8, 8], antialias=True)
    torch.testing.assert_close(first["views"][2][:, 0] * 0.25 + 0.5, expected)


def test_a_crop_is_sampled_from_the_stored_pixels_not_from_a_smaller_image():
    """A crop of a fine pattern keeps it; resized first, the pattern is grey."""
    pattern = (torch.arange(64) // 2 % 2 * 255).to(torch.uint8).expand(64, 64)[None, None]
    data = ImageSplit(pattern, torch.zeros(1, dtype=torch.int64), Preprocessing((1, 16, 16), (0.0,), (1.0,)))
    quarter = RandomResizedCrop(scale=(1 / 16, 1 / 16), ratio=(1.0, 1.0))
    image = next(data.batches(1, augment=quarter).epoch(0))["images"]
    assert image.shape == (1, 1, 16, 16)
    assert image.std() > 0.3
    assert next(data.batches(1).epoch(0))["images"].std() < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": []}, "views is empty; expected a number, or at least one View"),
        ({"views": [View()], "augment": HorizontalFlip()}, "augment is given with several Views; give each View its transform"),
        ({"views": [View()], "mix": MixUp()}, "mix is given with several Views"),
    ],
)
def test_views_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        split().batches(4, **options)
    with pytest.raises(UsageError, match="size is 0; expected at least 1"):
        View(size=0)
    with pytest.raises(UsageError, match="count is 0; expected at least 1"):
        View(count=0)
