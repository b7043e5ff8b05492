import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkit.errors import UsageError
from vitkit_vae import (
    ConvDecoder,
    KLLoss,
    MultiTaskLoss,
    MultiTaskVAE,
    ReconstructionLoss,
    TripletLoss,
    VAEEncoder,
    sample_latent,
)

PARTS = {"classification": 1.0, "triplet": 1.0, "reconstruction": 1.0, "kl": 1.0}


def vae(
    *, decoder: bool = True, classifier: bool = True, classes: int | None = None, weights: Any = None, **kwargs: Any
) -> MultiTaskVAE:
    torch.manual_seed(0)
    backbone = VAEEncoder(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, latent_dim=6, embedding_dim=5
    )
    return MultiTaskVAE(
        backbone,
        nn.Linear(5, 4) if classifier else None,
        ConvDecoder(in_dim=6, out_dim=1, img_size=8, num_classes=classes, kernel_size=2) if decoder else None,
        loss=MultiTaskLoss(weights or PARTS),
        **{"mean": [0.4], "std": [0.3], **kwargs},
    )


def batch(count: int = 6, *views: int, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = (torch.rand(count, *views, 1, 8, 8, generator=generator) - 0.4) / 0.3
    return {"images": images, "labels": torch.arange(count) % 3}


def run(model: MultiTaskVAE, data: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return model(data)


def seen_by(model: MultiTaskVAE, data: dict[str, Tensor]) -> list[Tensor]:
    """The latents that the decoder was given."""
    latents: list[Tensor] = []
    logits = model.decoder.logits
    model.decoder.logits = lambda z, labels=None: latents.append(z) or logits(z, labels)
    run(model, data)
    return latents


def test_each_part_is_its_loss_of_one_pass() -> None:
    model, data = vae(), batch()
    found = run(model, data)
    mu, log_var = model.backbone.encode_latent(data["images"])
    torch.manual_seed(2)
    z = sample_latent(mu, log_var)
    embeddings = model.backbone.embed(z)
    expected = {
        "classification": F.cross_entropy(model.classifier(embeddings), data["labels"]),
        "triplet": TripletLoss()(embeddings, data["labels"])["loss"],
        "reconstruction": F.mse_loss(model.decoder(z), data["images"] * 0.3 + 0.4),
        "kl": KLLoss("dimension")(mu, log_var)["loss"],
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    torch.testing.assert_close(found["loss"], torch.stack(list(expected.values())).sum())


def test_the_decoder_sees_anchors_alone_and_all_three_carry_gradient() -> None:
    model, data = vae(), batch()
    images = {name: batch(seed=seed)["images"].requires_grad_() for name, seed in (("images", 1), ("positives", 3), ("negatives", 4))}
    (latents,) = seen_by(model, {**data, **images})
    mu, log_var = model.backbone.encode_latent(images["images"])
    torch.manual_seed(2)
    torch.testing.assert_close(latents, sample_latent(mu, log_var))

    parts = run(model, {**data, **images})
    others = [images["positives"], images["negatives"]]
    for name in ("classification", "reconstruction", "kl"):
        assert torch.autograd.grad(parts[name], others, retain_graph=True, allow_unused=True) == (None, None)
    for name, gradient in zip(images, torch.autograd.grad(parts["triplet"], list(images.values())), strict=True):
        assert gradient.abs().sum() > 0, name


def test_three_passes_give_the_loss_of_given_triplets() -> None:
    model, data = vae(), batch()
    rows = [data["images"], batch(seed=3)["images"], batch(seed=4)["images"]]
    found = run(model, {**data, "positives": rows[1], "negatives": rows[2]})
    torch.manual_seed(2)
    a, p, n = (model.backbone.embed(sample_latent(*model.backbone.encode_latent(one))) for one in rows)
    torch.testing.assert_close(found["triplet"], TripletLoss()(a, positives=p, negatives=n)["loss"])


def test_views_are_all_embedded_and_the_first_is_reconstructed() -> None:
    model, data = vae(), batch(4, 3)
    (latents,) = seen_by(model, data)
    assert latents.shape == (4, 6)
    first = run(model, data)
    changed = {**data, "images": torch.cat([data["images"][:, :1], torch.zeros(4, 2, 1, 8, 8)], dim=1)}
    second = run(model, changed)
    for name in ("reconstruction", "kl"):
        torch.testing.assert_close(first[name], second[name])
    for name in ("classification", "triplet"):
        assert not torch.allclose(first[name], second[name])


def test_without_labels_the_views_of_an_image_are_one_class() -> None:
    model, data = vae(classifier=False, supervised=False), batch(4, 2)
    hidden = {**data, "labels": torch.full((4,), -1)}
    found = run(model, hidden)
    torch.testing.assert_close(run(model, data), found)  # labels are not looked at
    rows = data["images"].transpose(0, 1).flatten(0, 1)
    mu, log_var = model.backbone.encode_latent(rows)
    torch.manual_seed(2)
    embeddings = model.backbone.embed(sample_latent(mu, log_var, views=2))
    torch.testing.assert_close(found["triplet"], TripletLoss()(embeddings, torch.arange(4).repeat(2))["loss"])


def test_hidden_labels_do_not_count() -> None:
    model, data = vae(weights={"classification": 1.0}), batch()
    model.backbone.to_latent.bias.data[6:] = -1e3  # hardly any noise
    some = data["labels"].clone()
    some[::2] = -1
    shown = {name: values[1::2] for name, values in data.items()}
    torch.testing.assert_close(run(model, {**data, "labels": some})["loss"], run(model, shown)["loss"], atol=0.02, rtol=0)
    assert run(model, {**data, "labels": torch.full((6,), -1)})["loss"] == 0


def test_mixed_images_count_both_their_labels() -> None:
    model, data = vae(label_smoothing=0.1), batch()
    partners, weights = data["labels"].flip(0), torch.tensor([1.0, 0.7, 0.5, 0.4, 0.2, 0.0])
    found = run(model, {**data, "partners": partners, "weights": weights})
    alone = {name: run(model, {**data, "labels": labels}) for name, labels in (("own", data["labels"]), ("partner", partners))}
    assert found["reconstruction"] == alone["own"]["reconstruction"]

    torch.manual_seed(2)
    logits = model.classifier(model.backbone.embed(sample_latent(*model.backbone.encode_latent(data["images"]))))
    shares = weights[:, None] * F.one_hot(data["labels"], 4) + (1 - weights)[:, None] * F.one_hot(partners, 4)
    expected = F.cross_entropy(logits, shares, label_smoothing=0.1)  # torch's own with probabilities of classes
    torch.testing.assert_close(found["classification"], expected)

    heavier = torch.where(weights >= 0.5, data["labels"], partners)
    torch.testing.assert_close(found["triplet"], run(model, {**data, "labels": heavier})["triplet"])
    ones = run(model, {**data, "partners": partners, "weights": torch.ones(6)})
    torch.testing.assert_close(ones, alone["own"])


def test_a_conditional_decoder_is_told_labels_but_not_of_mixtures() -> None:
    model, told = vae(classes=4), []
    logits = model.decoder.logits
    model.decoder.logits = lambda z, labels: told.append(labels) or logits(z, labels)
    data = batch(3)
    run(model, data)
    run(model, {**data, "partners": data["labels"].flip(0), "weights": torch.tensor([1.0, 0.9, 0.1])})
    assert [labels.tolist() for labels in told] == [[0, 1, 2], [0, -1, -1]]
    model.supervised = False
    model.decoder.logits = lambda z, labels: told.append(labels) or logits(z, labels)
    model.parts.discard("triplet")
    run(model, data)
    assert told[-1] is None


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"decoder": False}, {"classification", "triplet", "kl"}),
        ({"classifier": False}, {"triplet", "reconstruction", "kl"}),
        ({"weights": {**PARTS, "triplet": 0.0}}, {"classification", "reconstruction", "kl"}),
        ({"weights": {**PARTS, "kl": 0.0}}, {"classification", "triplet", "reconstruction"}),
        ({"weights": {"reconstruction": 1.0, "kl": 0.01}, "classifier": False}, {"reconstruction", "kl"}),
    ],
)
def test_what_is_left_out_is_not_computed_and_the_rest_learns(kwargs: dict[str, Any], expected: set[str]) -> None:
    model = vae(**kwargs)
    found = run(model, batch())
    assert set(found) - {"loss", "active"} == expected
    found["loss"].backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert [name for name in unused if not name.startswith(("decoder", "classifier"))] == []


@pytest.mark.parametrize("labels", [[0] * 6, [0, 1, 2, 3, -1, -1], [-1] * 6])
def test_degenerate_batches_stay_finite(labels: list[int]) -> None:
    model = vae()
    found = run(model, {**batch(), "labels": torch.tensor(labels)})
    found["loss"].backward()
    assert all(value.isfinite() for value in found.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_it_learns_what_it_is_asked() -> None:
    model = vae(weights={"classification": 0.5, "triplet": 1.0, "reconstruction": 1.0, "kl": 0.001})
    data, optimizer = batch(12), torch.optim.Adam(model.parameters(), lr=3e-3)
    first = run(model, data)
    for _ in range(150):
        optimizer.zero_grad()
        model(data)["loss"].backward()
        optimizer.step()
    last = run(model, data)
    for name in ("classification", "triplet", "reconstruction"):
        assert last[name] < 0.7 * first[name], name
    with torch.no_grad():
        assert torch.equal(model.classifier(model.encode_image(data["images"])).argmax(1), data["labels"])


@pytest.mark.parametrize("reduction", ["pixel", "image"])
@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_the_uninformed_values_are_those_of_a_model_that_ignores_the_image(kind: Any, reduction: Any) -> None:
    pixels = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = float(pixels.mean()), float(pixels.std(correction=0))
    loss = ReconstructionLoss(kind, reduction)
    model = vae(mean=[mean], std=[std], num_classes=4, reconstruction=loss, triplet=TripletLoss(0.3, "batch_hard"))
    with torch.no_grad():
        for parameter in (*model.classifier.parameters(), *model.decoder.parameters(), *model.backbone.to_latent.parameters()):
            parameter.zero_()  # μ = 0 and σ = 1
        model.decoder.convs[-1].bias.fill_(torch.logit(torch.tensor(mean)))
        model.backbone.to_embedding[2].weight.mul_(1e-4)
        model.backbone.to_embedding[2].bias.fill_(1.0)
        found = run(model, {"images": (pixels - mean) / std, "labels": torch.arange(8) % 4})
    stated = model.uninformed(8)
    assert set(stated) == {"classification", "triplet", "reconstruction", "kl", "loss"}
    assert stated["classification"] == pytest.approx(math.log(4))
    assert stated == pytest.approx({name: float(found[name]) for name in stated}, rel=2e-2)


def test_uninformed_values_that_are_not_known_are_left_out() -> None:
    assert set(vae().uninformed(8)) == {"triplet", "reconstruction", "kl"}  # the number of classes was not given
    assert set(vae(mean=(0.0,), std=(1.0,), num_classes=4).uninformed(8)) == {"triplet", "classification", "kl"}
    assert "reconstruction" not in vae(reconstruction=ReconstructionLoss("l1")).uninformed(8)
    assert set(vae(decoder=False, weights={"triplet": 1.0}).uninformed(8)) == {"triplet", "loss"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vae(supervised=False), "a classifier needs labels: leave it out, or give supervised=True"),
        (
            lambda: vae(classifier=False, weights={"classification": 1.0}),
            r"no part of the loss can be computed: it weighs \['classification'\]; give the classifier or decoder",
        ),
        (
            lambda: run(vae(classifier=False, supervised=False), batch()),
            "without labels the positives of an image are its other views: make batches with views=2",
        ),
        (
            lambda: run(vae(), {"images": torch.zeros(2, 8, 8), "labels": torch.zeros(2)}),
            r"images are \(2, 8, 8\) and labels \(2,\); expected \(batch, channels, height, width\)",
        ),
        (lambda: run(vae(), {**batch(), "labels": torch.zeros(5)}), r"labels \(5,\); expected"),
    ],
)
def test_wrong_arguments_say_what_was_expected(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
