"""Fine-tuning trains the part that it says, from the weights that it was given, on images as they expect them."""

import pytest
import torch

from vitkit import Component, backbones, datasets, heads
from vitkit.contracts import UNLABELLED
from vitkit.data import ImageDataset, Stored, from_store
from vitkit.errors import UsageError
from vitkit.models.saving import save
from vitkit.training import adamw
from vitkit_finetune import classifier_on, mistake_figures, start_from, training_images

SMALL = {"embed_dim": 16, "depth": 3, "num_heads": 2, "dropout": 0.1}
TINY = Component("backbone", "vitkit:vit", **SMALL)


def colours(labelled: int = 90, classes: int = 3) -> ImageDataset:
    """RGB images whose channels say the class; only the first `labelled` have a label."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for split in ("train", "val", "test"):
        labels = torch.arange(90) % classes
        images = torch.randint(0, 80, (90, 3, 12, 12), generator=generator)
        images[torch.arange(90), labels] += 120
        if split == "train":
            labels[labelled:] = UNLABELLED
        tensors |= {f"{split}.images": images.to(torch.uint8), f"{split}.labels": labels}
    return from_store(Stored("colours", ["red", "green", "blue"][:classes], tensors))


def tuned(**arguments):
    torch.manual_seed(0)
    backbone, data, _ = start_from("none", colours(), scratch=TINY)
    return classifier_on(backbone, data, **arguments), data


@pytest.mark.parametrize(
    ("arguments", "frozen", "trained"),
    [
        ({"tune": "linear"}, ("cls_token", "blocks.2.", "norm."), ()),
        ({"tune": "partial", "blocks": 1}, ("cls_token", "patch_embed.", "blocks.0.", "blocks.1."), ("blocks.2.", "norm.")),
        ({"tune": "partial", "blocks": 2}, ("pos_embed", "blocks.0."), ("blocks.1.", "blocks.2.", "norm.")),
        ({"tune": "full"}, (), ("cls_token", "blocks.0.", "norm.")),
    ],
)
def test_a_step_changes_exactly_the_part_that_is_trained(arguments, frozen, trained):
    model, data = tuned(**arguments)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = adamw(model, lr=0.1, weight_decay=0.1)
    batch = next(data.train.batches(30).epoch(0))
    model.train()(batch)["loss"].backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in changed if name.startswith("classifier")} == {name for name in before if name.startswith("classifier")}
    for part in trained:
        assert any(name.startswith(f"backbone.{part}") for name in changed), part
    for part in frozen:
        assert not any(name.startswith(f"backbone.{part}") for name in changed), part


def test_frozen_parts_stay_in_evaluation_mode():
    for tune, training in (("linear", [False, False]), ("partial", [False, True]), ("full", [True, True])):
        model, _ = tuned(tune=tune, blocks=1)
        model.train()
        assert [model.backbone.blocks[0].mlp.training, model.backbone.blocks[2].mlp.training] == training
        assert model.classifier.training
        assert not any(module.training for module in model.eval().modules())


def test_layers_near_the_input_learn_more_slowly():
    model, _ = tuned()
    rates = {id(p): group["lr"] for group in adamw(model, lr=1.0, layer_decay=0.5).param_groups for p in group["params"]}
    assert rates[id(model.classifier.linear.weight)] == rates[id(model.backbone.norm.weight)] == 1.0
    assert rates[id(model.backbone.blocks[2].mlp.fc1.weight)] == 0.5
    assert rates[id(model.backbone.patch_embed.proj.weight)] == 0.5**4


def test_parameters_that_features_do_not_depend_on_are_frozen():
    backbone = backbones.build("multimodal_vit", num_classes=4, img_size=16, in_chans=3, embed_dim=16, depth=1, num_heads=2)
    model = classifier_on(backbone, colours().resized(16))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"backbone.label_embed.weight", "backbone.label_type"}


def test_it_learns_and_a_loss_of_chance_is_the_logarithm_of_the_classes():
    model, data = tuned(smoothing=0.0)
    assert model.uninformed(8) == {"loss": pytest.approx(1.0986, abs=1e-4)}
    optimizer = adamw(model, lr=3e-3)
    for number in range(6):
        for batch in data.train.batches(30, shuffle=True).epoch(number):
            loss = model.train()(batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert float(loss.detach()) < 0.5


def test_images_are_brought_to_the_size_channels_and_normalisation_of_the_weights(tmp_path):
    torch.manual_seed(0)
    backbone = backbones.build("vit", img_size=16, in_chans=1, **SMALL)
    prepare = {"shape": [1, 16, 16], "mean": [0.3], "std": [0.2], "fit": "resize"}
    save(tmp_path / "run", {"backbone": backbone}, preprocessing=prepare, classes=[], arguments={})
    start, data, origin = start_from(str(tmp_path / "run"), colours())
    assert (data.shape, data.mean, data.std) == ((1, 16, 16), (0.3,), (0.2,))
    assert origin == f"the saved model {tmp_path / 'run'}"
    assert classifier_on(start, data).classifier.linear.out_features == 3
    _, grey, _ = start_from("timm/test_vit", datasets.build("digits"), weights="none", img_size=32)
    assert grey.shape == (3, 32, 32)


@pytest.mark.parametrize(("side", "size", "patch"), [(8, 16, 4), (28, 32, 4), (64, 64, 8), (96, 96, 12)])
def test_from_scratch_the_size_is_a_multiple_of_16_and_the_patch_an_eighth(side, size, patch):
    backbone, data, _ = start_from("none", colours().resized(side), scratch=TINY)
    assert (data.shape[1:], backbone.img_size, backbone.patch_size) == ((size, size), (size, size), patch)


def test_only_labelled_images_are_trained_on_and_as_many_as_asked():
    data = colours(labelled=60)
    assert len(training_images(data)) == 60
    assert training_images(data, label_fraction=0.2).labels.bincount().tolist() == [4, 4, 4]
    assert training_images(data, train_size=9).labels.bincount().tolist() == [3, 3, 3]
    with pytest.raises(UsageError, match="the 1 training images are of one class; a classifier needs images of two"):
        training_images(data, train_size=1)
    with pytest.raises(UsageError, match=r"fraction is 0.0; expected a number in \(0, 1\]"):
        training_images(data, label_fraction=0.0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: start_from("none", colours(labelled=0)), "the training images of colours have no labels; fine-tuning needs a folder"),
        (lambda: start_from("none", colours(), weights="w.pth"), "--weights w.pth needs a network to load them into; give it as --model"),
        (lambda: tuned(tune="some"), "tune is 'some'.*expected 'linear', 'partial', 'full'"),
        (lambda: tuned(tune="partial", blocks=4), "blocks is 4, but ViT has 3; give at most 3, or --tune full"),
        (lambda: tuned(tune="partial", blocks=0), "blocks is 0; expected at least 1"),
        (
            lambda: classifier_on(backbones.build("timm/test_resnet"), colours(), tune="partial"),
            "TimmBackbone has no list of blocks, so no part of it can be chosen; give --tune linear or --tune full",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, text):
    with pytest.raises(UsageError, match=text):
        call()


def test_the_surest_mistakes_come_first_with_the_attention_over_them():
    model, data = tuned()
    figures = mistake_figures(model, data, count=5)
    sheet, maps = figures["surest_mistakes"], figures["attention_over_mistakes"]
    assert sheet.images.shape == (5, 3, 16, 16)
    sure = [float(caption.splitlines()[2].split("%")[0]) for caption in sheet.captions]
    assert sure == sorted(sure, reverse=True)
    for caption, short in zip(sheet.captions, maps.captions, strict=True):
        truth, taken, _ = caption.splitlines()
        assert short == f"{truth} → {taken.removeprefix('taken for ')}"
        assert truth != taken.removeprefix("taken for ")
    assert maps.maps.shape == (5, 4, 4)
    assert (maps.maps.max(axis=(1, 2)) <= 1).all()
    assert (maps.maps.mean(axis=(1, 2)) <= 1 / 3 + 1e-6).all()  # even attention is a third
    torch.nn.init.zeros_(model.classifier.linear.weight)
    right = data.test.subset((data.test.labels == 0).nonzero().squeeze(1))
    assert mistake_figures(model, type("Data", (), {"test": right, "classes": data.classes})()) == {}


def test_a_network_without_attention_has_mistakes_without_maps():
    torch.manual_seed(0)
    backbone = backbones.build("timm/test_resnet")
    model = classifier_on(backbone, colours().resized(32))
    assert set(mistake_figures(model, colours().resized(32), count=3)) == {"surest_mistakes"}
    assert isinstance(model.classifier, type(heads.build("linear", in_dim=2, out_dim=2)))
