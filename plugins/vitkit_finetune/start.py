"""A classifier to train: a backbone to start from, the data as it takes them, and a new classifier."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitkit import Component, heads, losses
from vitkit.contracts import UNLABELLED
from vitkit.data import ImageDataset, Preprocessing
from vitkit.errors import UsageError
from vitkit.hub import open_backbone
from vitkit.models import encode_image, evaluating
from vitkit_finetune.classifier import FineTuning, Tune

SCRATCH = "none"
"""The source that means: no model to start from."""
MULTIPLE = 16
"""A backbone from scratch takes images whose side is a multiple of this number of pixels."""


def start_from(
    source: str, data: ImageDataset, *, weights: str = "auto", img_size: int | None = None, scratch: Component | None = None
) -> tuple[nn.Module, ImageDataset, str]:
    """A backbone, the dataset as this backbone takes it, and a line about the source of the weights.

    `source` is that of `vitkit.hub.open_backbone`, or "none" for the backbone `scratch` with random weights (default: `vit`), which gets
    `in_chans`, `img_size` (default: that of the data, rounded up to a multiple of 16), and a patch of an eighth of the size, at least 4.
    Images are resized, converted between grey and RGB, and normalised as the backbone's weights expect.
    `img_size` builds a registered backbone for another size.

    Raises `UsageError` for a dataset without labels, for `img_size` with a saved model, and as `open_backbone` does.
    """
    if not data.classes or not bool((data.train.labels != UNLABELLED).any()):
        raise UsageError(
            f"the training images of {data.name} have no labels; fine-tuning needs a folder for each class. Train on images alone first, "
            f"for example with recipes/ssl_cifar10.py, then give --model RUN and a labelled dataset"
        )
    if source == SCRATCH:
        if weights != "auto":
            raise UsageError(f"--weights {weights} needs a network to load them into; give it as --model, for example timm/NAME")
        return _from_scratch(data, img_size, scratch or Component("backbone", "vitkit:vit"))
    arguments = {} if img_size is None else {"img_size": img_size}
    opened = open_backbone(source, weights=weights, **arguments)
    preprocessing = opened.preprocessing or _preprocessing_of(opened.backbone, data)
    return opened.backbone, data.with_preprocessing(preprocessing), opened.origin


def classifier_on(
    backbone: nn.Module, data: ImageDataset, *, tune: Tune = "full", blocks: int = 2, smoothing: float = 0.1
) -> FineTuning:
    """A `FineTuning` of the backbone with a new head `linear` for the classes of `data`.

    Parameters that the features do not depend on, such as the label tokens of `multimodal_vit`, are frozen: weight decay would still
    change them, and DDP would wait for their gradients.
    """
    with evaluating(backbone):
        width = encode_image(backbone, torch.zeros(2, *data.shape, device=_device(backbone))).shape[1]
    head = heads.build("vitkit:linear", in_dim=width, out_dim=len(data.classes))
    loss = losses.build("vitkit:cross_entropy", smoothing=smoothing)
    model = FineTuning(backbone, head, loss, classes=data.classes, tune=tune, blocks=blocks)
    if tune != "linear":
        _freeze_unused(model, torch.zeros(2, *data.shape, device=_device(backbone)))
    return model


def training_images(data: ImageDataset, *, label_fraction: float = 1.0, train_size: int | None = None, seed: int = 0) -> Any:
    """The labelled training images, or a share or number of them, the classes in equal shares as far as possible.

    Raises `UsageError` for a fraction outside (0, 1] or a size below 1, and if fewer than two classes are left.
    """
    labelled = data.train.labels != UNLABELLED
    train = data.train if bool(labelled.all()) else data.train.subset(labelled.nonzero().squeeze(1))
    if label_fraction != 1.0:
        masked = train.mask_labels(label_fraction, seed=seed)
        train = train.subset((masked.labels != UNLABELLED).nonzero().squeeze(1))
    if train_size is not None:
        train = train.stratified_subset(train_size, seed=seed)
    if len(train.labels.unique()) < 2:
        raise UsageError(f"the {len(train)} training images are of one class; a classifier needs images of two, give it more images")
    return train


def _from_scratch(data: ImageDataset, img_size: int | None, scratch: Component) -> tuple[nn.Module, ImageDataset, str]:
    size = -(-data.shape[1] // MULTIPLE) * MULTIPLE if img_size is None else img_size
    data = data.resized(size)
    patches = {"patch_size": max(size // 8, 4)} if scratch.name in ("vit", "vitkit:vit") else {}  # others know what suits them
    backbone = scratch.build(img_size=size, in_chans=data.shape[0], **patches)
    return backbone, data, f"random weights of {scratch.name}"


def _preprocessing_of(backbone: Any, data: ImageDataset) -> Preprocessing:
    """The data's own normalisation at the size and channels that the backbone names."""
    channels = int(getattr(backbone, "in_chans", data.shape[0]))
    size = getattr(backbone, "img_size", data.shape[1])
    height, width = (size, size) if isinstance(size, int) else size
    mean, std = (values if len(values) == channels else (sum(values) / len(values),) * channels for values in (data.mean, data.std))
    return replace(data.train.preprocessing, shape=(channels, height, width), mean=mean, std=std)


def _freeze_unused(model: FineTuning, images: Tensor) -> None:
    """Freeze the parameters that the logits do not depend on."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    training = model.training
    with torch.random.fork_rng([]), torch.enable_grad():
        logits = model.eval().classifier(model.encode_image(images))
        gradients = torch.autograd.grad(logits.sum(), [parameter for _, parameter in named], allow_unused=True)
    model.train(training)
    for (_, parameter), gradient in zip(named, gradients, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)


def _device(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


__all__ = ["SCRATCH", "classifier_on", "start_from", "training_images"]
