"""Images made from latents: exactly what was asked for, the same each time, and models left as they were."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.contracts import Attention, Embeddings, Sheet
from vitkit.data import ImageDataset, Stored, from_store
from vitkit.errors import UsageError
from vitkit_vae import generate

CLASSES = ["ant", "bee", "cow"]


class Pixels(nn.Module):
    """An encoder whose latent is the pixels, whatever they were normalised by."""

    latent_dim = 16

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([mean, std]))
        self.dropout = nn.Dropout(0.5)

    def encode_latent(self, images: Tensor) -> tuple[Tensor, Tensor]:
        torch.rand(1)
        mu = self.dropout((images * self.scale[1] + self.scale[0]).flatten(1))
        return mu, torch.zeros_like(mu)

    def embed(self, z: Tensor) -> Tensor:
        return 2 * z

    def encode_image(self, images: Tensor) -> Tensor:
        return self.embed(self.encode_latent(images)[0])


class Inverse(nn.Module):
    """Latents back to pixels; a conditional one dims them by the class, as none would."""

    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.told: list[Tensor | None] = []

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        self.told.append(labels)
        images = z.unflatten(1, (1, 4, 4))
        return images if labels is None else images / (1 + labels.view(-1, 1, 1, 1))


class Model(nn.Module):
    def __init__(self, dataset: ImageDataset, num_classes: int | None = None) -> None:
        super().__init__()
        self.backbone = Pixels(dataset.mean[0], dataset.std[0])
        self.decoder = Inverse(num_classes)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.backbone.encode_image(images)


@pytest.fixture
def dataset() -> ImageDataset:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for split, n in (("train", 30), ("test", 21)):
        tensors[f"{split}.images"] = torch.randint(0, 256, (n, 1, 4, 4), generator=generator, dtype=torch.uint8)
        tensors[f"{split}.labels"] = torch.arange(n) % 3
    return from_store(Stored("noise", CLASSES, tensors))


@pytest.fixture
def model(dataset) -> Model:
    return Model(dataset)


def cells(sheet: Sheet) -> Tensor:
    return torch.as_tensor(sheet.images)


def test_samples_are_decoded_standard_normal_latents_that_the_seed_fixes(model, monkeypatch):
    monkeypatch.setattr(generate, "DECODED_AT_ONCE", 7)
    z = torch.randn(20, 16, generator=torch.Generator().manual_seed(5))
    state = torch.get_rng_state()
    found = generate.sample(model, 20, seed=5)
    assert torch.equal(found, z.view(20, 1, 4, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(generate.sample(model, 20, seed=6), found)
    assert torch.equal(generate.sample(model, 3, seed=5), found[:3])
    assert model.training
    assert model.backbone.dropout.training
    assert not found.is_inference()


def test_a_fitted_gaussian_has_the_moments_of_the_latents(model, dataset, monkeypatch):
    monkeypatch.setattr(generate, "DECODED_AT_ONCE", 7)
    prior = generate.fit_gaussian(model, dataset.train)
    pixels = (dataset.train.images / 255).flatten(1)
    torch.testing.assert_close(prior.mean, pixels.mean(dim=0))
    expected = torch.cov(pixels.T, correction=0) + torch.eye(16)  # of μ, and σ² = 1
    torch.testing.assert_close(prior.factor @ prior.factor.T, expected)
    z = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    found = generate.sample(model, 5, seed=3, prior=prior)
    torch.testing.assert_close(found.flatten(1), prior.mean + z @ prior.factor.T)
    standard = generate.Gaussian(torch.zeros(16), torch.eye(16))
    assert torch.equal(generate.sample(model, 5, seed=3, prior=standard), generate.sample(model, 5, seed=3))


def test_a_conditional_decoder_is_told_the_classes(dataset):
    model = Model(dataset, num_classes=3)
    plain = torch.randn(7, 16, generator=torch.Generator().manual_seed(0)).view(7, 1, 4, 4)
    of_each = generate.sample_sheet(model, 7, classes=CLASSES)
    assert torch.equal(model.decoder.told[-1], torch.arange(7) % 3)
    assert of_each.captions == ["ant", "bee", "cow", "ant", "bee", "cow", "ant"]
    assert of_each.columns == 3
    torch.testing.assert_close(cells(of_each)[1], plain[1] / 2)
    of_one = generate.sample_sheet(model, 7, label=2, classes=CLASSES)
    torch.testing.assert_close(cells(of_one), plain / 3)
    assert of_one.captions == []
    assert generate.sample_sheet(model, 4).captions == ["class 0", "class 1", "class 2", "class 0"]


def test_reconstructions_come_from_the_mean_latent_and_stand_below_their_originals(model, dataset):
    sheet, error = generate.reconstruction_figure(model, dataset.test, CLASSES, count=11)
    assert error == pytest.approx(0, abs=1e-12)
    assert sheet.columns == 8
    images = cells(sheet)
    torch.testing.assert_close(images[0:8], images[8:16])
    torch.testing.assert_close(images[16:19], images[24:27])
    assert bool((images[19:24] == 1).all())
    chosen = dataset.test.stratified_subset(11)
    torch.testing.assert_close(images[[*range(8), 16, 17, 18]], chosen.images / 255)
    assert sheet.captions[:8] == [CLASSES[label] for label in chosen.labels[:8]]
    assert sheet.captions[8:16] == ["MSE 0.0000"] * 8
    assert sheet.captions[19:24] == [""] * 5
    half, found = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5)
    assert generate.reconstruction_sheet(half, found, ["x"]).captions == ["x", "MSE 0.2500"]


def test_labels_that_are_not_the_models_classes_are_kept_from_its_decoder(dataset):
    model = Model(dataset, num_classes=3)
    generate.reconstruction_figure(model, dataset.test, CLASSES, labelled=False)
    assert model.decoder.told == [None]
    generate.reconstruction_figure(model, dataset.test, CLASSES)
    assert model.decoder.told[-1] is not None


def test_an_interpolation_is_a_straight_line_between_its_ends(model, dataset):
    ends = generate.image_end(model, dataset.test, 4, CLASSES), generate.image_end(model, dataset.test, 6, CLASSES)
    sheet = generate.interpolation_sheet(model, [ends], steps=5)
    images, (first, last) = cells(sheet), dataset.test.images[[4, 6]] / 255
    assert sheet.columns == len(images) == 7
    for place, share in zip(range(1, 6), (0, 0.25, 0.5, 0.75, 1), strict=True):
        torch.testing.assert_close(images[place], (1 - share) * first + share * last)
    torch.testing.assert_close(images[0], first)
    torch.testing.assert_close(images[6], last)
    assert sheet.captions == ["bee (#4)", "0.00", "0.25", "0.50", "0.75", "1.00", "ant (#6)"]


def test_a_class_stands_at_the_mean_of_its_latents(model, dataset, monkeypatch):
    monkeypatch.setattr(generate, "DECODED_AT_ONCE", 4)
    end = generate.class_end(model, dataset.test, "cow", CLASSES)
    expected = (dataset.test.images[dataset.test.labels == 2] / 255).mean(dim=0)
    torch.testing.assert_close(end.latent.view(1, 4, 4), expected)
    assert (end.label, end.pixels) == (2, None)
    sheet = generate.interpolation_sheet(model, [(end, generate.image_end(model, dataset.test, 0, CLASSES))], steps=2)
    assert sheet.captions == ["cow", "1.00", "ant (#0)"]
    torch.testing.assert_close(cells(sheet)[0], expected)


def test_a_conditional_decoder_shows_the_way_as_either_class(dataset):
    model = Model(dataset, num_classes=3)
    ends = [generate.image_end(model, dataset.test, index, CLASSES) for index in (0, 1, 3)]
    sheet = generate.interpolation_sheet(model, [(ends[0], ends[1])], steps=3, classes=CLASSES)
    assert (len(sheet.images), sheet.columns) == (10, 5)
    assert sheet.captions[1:4] == ["0.00\nas ant", "0.50\nas ant", "1.00\nas ant"]
    assert sheet.captions[6:9] == ["0.00\nas bee", "0.50\nas bee", "1.00\nas bee"]
    torch.testing.assert_close(cells(sheet)[6:9], cells(sheet)[1:4] / 2)
    same = generate.interpolation_sheet(model, [(ends[0], ends[2])], steps=3, classes=CLASSES)
    assert len(same.images) == 5


def test_the_pictures_of_a_report(model, dataset):
    found = generate.figures(model, dataset, seed=1)
    assert list(found) == ["embeddings", "samples", "samples_fitted", "reconstructions", "interpolations"]
    assert isinstance(found["embeddings"], Embeddings)
    assert found["embeddings"].features.shape == (21, 16)
    rows = found["interpolations"].captions
    assert len(rows) == 4 * 10
    for row in range(4):
        first, last = rows[10 * row], rows[10 * row + 9]
        assert first.split()[0] != last.split()[0]
        assert first.split()[0] in CLASSES
    assert len(found["samples"].images) == 64
    again = generate.figures(model, dataset, seed=1)
    assert torch.equal(cells(again["interpolations"]), cells(found["interpolations"]))
    del model.decoder
    assert list(generate.figures(model, dataset)) == ["embeddings"]


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_attention_is_that_of_the_last_block(dataset, pool):
    from vitkit import backbones

    model = nn.Module()
    model.backbone = nn.Module()
    vit = model.backbone.vit = backbones.build(
        "vit", img_size=4, patch_size=2, in_chans=1, embed_dim=8, depth=2, num_heads=2, registers=1, pool=pool
    )
    picture = generate.attention_figure(model, dataset.test, CLASSES, count=6)
    assert isinstance(picture, Attention)
    assert picture.maps.shape == (6, 2, 2)
    assert picture.maps.max(axis=(1, 2)).tolist() == [1.0] * 6
    chosen = dataset.test.stratified_subset(6)
    with torch.no_grad():
        weights = vit.eval().attention_maps(chosen.preprocessing.normalise(chosen.images / 255))[:, -1].mean(1)
    expected = weights[:, 0, 2:] if pool == "cls" else weights[:, 1:, 1:].mean(1)
    torch.testing.assert_close(torch.as_tensor(picture.maps).flatten(1), F.normalize(expected, p=torch.inf, dim=1))
    assert picture.captions == [CLASSES[label] for label in chosen.labels]


def test_what_cannot_be_made_says_so(model, dataset):
    bare = nn.Module()
    bare.backbone, bare.projector = nn.Linear(2, 2), nn.Identity()
    with pytest.raises(UsageError, match=r"no decoder, which makes images \(it has backbone, projector\); use a run"):
        generate.sample(bare, 4)
    bare.decoder = Inverse()
    with pytest.raises(UsageError, match=r"backbone \(Linear\) offers no encode_latent\(images\); use 'vae_encoder'"):
        generate.sample(bare, 4)
    with pytest.raises(UsageError, match="count is 0; expected at least 1 image"):
        generate.sample(model, 0)
    with pytest.raises(UsageError, match="trained without classes and takes no labels; leave the class out"):
        generate.sample(model, 4, labels=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"latents are \(2, 9\); this model takes \(n, 16\)"):
        generate.decode(model, torch.zeros(2, 9))
    with pytest.raises(UsageError, match="steps is 1; expected at least 2, the two ends"):
        generate.path(torch.zeros(3), torch.ones(3), 1)
    with pytest.raises(UsageError, match="there is no test image 21; they count from 0 to 20"):
        generate.image_end(model, dataset.test, 21, CLASSES)
    with pytest.raises(UsageError, match="there is no test image -1; they count from 0 to 20"):
        generate.image_end(model, dataset.test, -1, CLASSES)
    without = dataset.test.subset((dataset.test.labels < 2).nonzero()[:, 0])
    with pytest.raises(UsageError, match="the split has no image of 'cow'; choose another class"):
        generate.class_end(model, without, "cow", CLASSES)
