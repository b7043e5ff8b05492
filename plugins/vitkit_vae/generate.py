"""Images from a decoder: samples, reconstructions and interpolations, as tensors and as figures of a report."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.contracts import UNLABELLED, Attention, Embeddings, ReportFigure, Sheet
from vitkit.data import ImageSplit
from vitkit.errors import UsageError
from vitkit.models import evaluating, extract_features

DECODED_AT_ONCE = 256
CLASS_IMAGES = 1_000
"""Most images of a class whose latents are averaged."""
FITTED_IMAGES = 2_000
"""Most images to whose latents a Gaussian is fitted."""
EMBEDDINGS_SHOWN = 2_000
"""Most embeddings in the report's map: more points do not make it clearer."""


def encoder_of(model: Any) -> Any:
    """A model's `backbone`; `UsageError` if it has no latents."""
    backbone = getattr(model, "backbone", None)
    if not hasattr(backbone, "encode_latent"):
        raise UsageError(
            f"this model's backbone ({type(backbone).__name__}) offers no encode_latent(images); "
            f"use 'vae_encoder', saved as backbone together with its decoder"
        )
    return backbone


def decoder_of(model: Any) -> Any:
    """A model's `decoder`; `UsageError` if it has none."""
    decoder = getattr(model, "decoder", None)
    if decoder is None:
        parts = ", ".join(name for name, _ in model.named_children()) if isinstance(model, nn.Module) else ""
        raise UsageError(
            f"this model has no decoder, which makes images (it has {parts or 'no modules'}); "
            f"use a run whose recipe saves a decoder, such as recipes/vae_mnist.py"
        )
    return decoder


def classes_of(decoder: Any) -> int | None:
    """The number of classes of a conditional decoder; None for one that takes no labels."""
    count: int | None = getattr(decoder, "num_classes", None)
    return count


def posterior(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """μ and log σ², each float32 `(n z)`, of normalised images `(n c h w)`."""
    backbone = encoder_of(model)
    with evaluating(model):
        mu, log_var = backbone.encode_latent(images)
    return mu.float().clone(), log_var.float().clone()  # clones are no inference tensors


def encode(model: Any, images: Tensor) -> Tensor:
    """The latent means μ float32 `(n z)` of normalised images `(n c h w)`."""
    return posterior(model, images)[0]


@dataclass(frozen=True)
class Gaussian:
    """N(m, L·Lᵀ) over latents: `mean` m `(z,)` and `factor` L `(z z)`."""

    mean: Tensor
    factor: Tensor


def fit_gaussian(model: Any, split: ImageSplit, *, seed: int = 0) -> Gaussian:
    """The Gaussian that fits the latents of a split's images: their mean, and Cov(μ) + diag(mean σ²).

    If the KL divergence has a small weight, latents are far from N(0, I), and samples from N(0, I) do not look like images
    (ex-post density estimation of Ghosh et al., arXiv 1903.12436, with one Gaussian). The fit uses up to 2,000 images,
    chosen by `seed` in equal shares per class as far as possible.
    """
    chosen = split.stratified_subset(FITTED_IMAGES, seed=seed)
    parts = [posterior(model, _prepared(model, chosen, some)[1]) for some in torch.arange(len(chosen)).split(DECODED_AT_ONCE)]
    mu, log_var = (torch.cat(part).cpu().double() for part in zip(*parts, strict=True))
    centred = mu - mu.mean(dim=0)
    covariance = centred.T @ centred / len(mu) + log_var.exp().mean(dim=0).diag()
    return Gaussian(mu.mean(dim=0).float(), torch.linalg.cholesky(covariance).float())


def decode(model: Any, latents: Tensor, labels: Tensor | None = None) -> Tensor:
    """Latents `(n z)` → images float32 `(n c h w)` in [0, 1]; a conditional decoder takes labels int64 `(n,)`.

    Raises `UsageError` if a decoder without classes gets labels, or latents have another width.
    """
    decoder, backbone = decoder_of(model), encoder_of(model)
    if labels is not None and classes_of(decoder) is None:
        raise UsageError("this decoder was trained without classes and takes no labels; leave the class out")
    if latents.ndim != 2 or latents.shape[1] != backbone.latent_dim:
        raise UsageError(f"latents are {tuple(latents.shape)}; this model takes (n, {backbone.latent_dim})")
    chunks = latents.split(DECODED_AT_ONCE)
    chunk_labels: Sequence[Tensor | None] = [None] * len(chunks) if labels is None else labels.split(DECODED_AT_ONCE)
    with evaluating(model):
        decoded = [decoder(z) if label is None else decoder(z, label) for z, label in zip(chunks, chunk_labels, strict=True)]
    return torch.cat([images.float() for images in decoded]).clone()


def reconstruct(model: Any, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Normalised images `(n c h w)` → their reconstructions D(μ(x)) in [0, 1], of the same shape.

    Labels int64 `(n,)` go to a conditional decoder; another decoder gets none. Raises `UsageError` for images of another
    size or number of channels than the model's.
    """
    conditional = classes_of(decoder_of(model)) is not None
    decoded = decode(model, encode(model, images), labels if conditional else None)
    if decoded.shape != images.shape:
        shape = ", ".join(map(str, decoded.shape[1:]))
        raise UsageError(f"images are {tuple(images.shape)}; this model takes and makes (n, {shape})")
    return decoded


def sample(
    model: Any, count: int, *, seed: int = 0, labels: Tensor | None = None, prior: Gaussian | None = None
) -> Tensor:
    """Images `(count c h w)` in [0, 1] decoded from z ~ N(0, I), or from another `prior`; the same for the same seed."""
    if count < 1:
        raise UsageError(f"count is {count}; expected at least 1 image")
    decoder_of(model)
    backbone = encoder_of(model)
    z = torch.randn(count, backbone.latent_dim, generator=torch.Generator().manual_seed(seed))
    if prior is not None:
        z = prior.mean + z @ prior.factor.T
    device = next(model.parameters()).device
    return decode(model, z.to(device), None if labels is None else labels.to(device))


def path(first: Tensor, second: Tensor, steps: int) -> Tensor:
    """Latents `(steps z)` on the straight line from `first` to `second` `(z,)`, both included."""
    if steps < 2:
        raise UsageError(f"steps is {steps}; expected at least 2, the two ends")
    return torch.lerp(first, second, torch.linspace(0, 1, steps, device=first.device)[:, None])


@dataclass(frozen=True)
class End:
    """One end of an interpolation: a latent `(z,)`, and for an image its pixels `(c h w)` in [0, 1]."""

    latent: Tensor
    caption: str
    label: int | None = None
    pixels: Tensor | None = None


def image_end(model: Any, split: ImageSplit, index: int, classes: Sequence[str]) -> End:
    """The latent mean of one image; `UsageError` for an index without an image."""
    if not 0 <= index < len(split):
        raise UsageError(f"there is no test image {index}; they count from 0 to {len(split) - 1}")
    pixels, images, labels = _prepared(model, split, torch.tensor([index]))
    label = int(labels[0])
    return End(encode(model, images)[0], f"{class_name(classes, label)} (#{index})", label, pixels[0])


def class_end(model: Any, split: ImageSplit, name: str, classes: Sequence[str]) -> End:
    """The mean over the latent means of a class's images; `UsageError` for a class that has none."""
    label = list(classes).index(name)
    members = (split.labels == label).nonzero()[:CLASS_IMAGES, 0]
    if not len(members):
        raise UsageError(f"the split has no image of {name!r}; choose another class")
    latents = [encode(model, _prepared(model, split, some)[1]) for some in members.split(DECODED_AT_ONCE)]
    return End(torch.cat(latents).mean(dim=0), name, label)


def interpolation_sheet(
    model: Any, ends: Sequence[tuple[End, End]], *, steps: int = 8, classes: Sequence[str] = ()
) -> Sheet:
    """One row per pair of ends: the decoded latents between them, and the images of the ends at both sides.

    A conditional decoder decodes each row twice if the ends differ in class: with the class of the first end, and with the
    class of the second. Ends without a label are decoded without a class.
    """
    conditional = classes_of(decoder_of(model)) is not None
    images, captions, columns = [], [], 0
    for first, second in ends:
        latents = path(first.latent, second.latent, steps)
        rows = list(dict.fromkeys((first.label, second.label))) if conditional else [None]
        for label in rows:
            labels = None if label is None else torch.full((steps,), label, device=latents.device)
            decoded = decode(model, latents, labels)
            suffix = "" if label is None else f"\nas {classes[label]}"
            row = [(decoded[step], f"{step / (steps - 1):.2f}{suffix}") for step in range(steps)]
            if first.pixels is not None:
                row.insert(0, (first.pixels, first.caption))
            else:
                row[0] = (row[0][0], f"{first.caption}{suffix}")
            if second.pixels is not None:
                row.append((second.pixels, second.caption))
            else:
                row[-1] = (row[-1][0], f"{second.caption}{suffix}")
            columns = len(row)
            images += [one for one, _ in row]
            captions += [text for _, text in row]
    return Sheet(torch.stack(images).cpu().numpy(), captions, columns)


def sample_sheet(
    model: Any,
    count: int = 64,
    *,
    seed: int = 0,
    label: int | None = None,
    classes: Sequence[str] = (),
    prior: Gaussian | None = None,
) -> Sheet:
    """Samples in rows; with a conditional decoder all of one class, or a column for each class."""
    class_count = classes_of(decoder_of(model))
    labels, captions, columns = None, [], max(8, round(count**0.5))
    if label is not None:
        labels = torch.full((count,), label)
    elif class_count is not None:
        labels = torch.arange(count) % class_count
        named = len(classes) == class_count
        captions = [str(classes[int(one)]) if named else f"class {int(one)}" for one in labels]
        columns = class_count if class_count <= 16 else columns
    return Sheet(sample(model, count, seed=seed, labels=labels, prior=prior).cpu().numpy(), captions, columns)


def reconstruction_sheet(pixels: Tensor, decoded: Tensor, captions: Sequence[str], *, columns: int = 8) -> Sheet:
    """Originals above reconstructions, both `(n c h w)` in [0, 1], each reconstruction with its mean squared error."""
    errors = (pixels - decoded).square().flatten(1).mean(dim=1)
    blank = torch.ones_like(pixels[0])
    images, texts = [], []
    columns = min(columns, len(pixels))
    for start in range(0, len(pixels), columns):
        rows = slice(start, start + columns)
        empty = columns - len(pixels[rows])
        for part, lines in (
            (pixels[rows], list(captions[rows])),
            (decoded[rows], [f"MSE {float(error):.4f}" for error in errors[rows]]),
        ):
            images += [*part, *[blank] * empty]
            texts += [*lines, *[""] * empty]
    return Sheet(torch.stack(images).cpu().numpy(), texts, columns)


def reconstruction_figure(
    model: Any, split: ImageSplit, classes: Sequence[str], *, count: int = 16, seed: int = 0, labelled: bool = True
) -> tuple[Sheet, float]:
    """A sheet of `count` images, the classes in equal shares as far as possible, chosen by `seed`, and their mean squared error.

    `labelled` is True if the split's labels are the model's classes; a conditional decoder then gets them.
    """
    chosen = split.stratified_subset(count, seed=seed)
    pixels, images, labels = _prepared(model, chosen, torch.arange(len(chosen)))
    decoded = reconstruct(model, images, labels if labelled else None)
    sheet = reconstruction_sheet(pixels, decoded, [class_name(classes, label) for label in labels.tolist()])
    return sheet, float((pixels - decoded).square().mean())


def attention_figure(model: Any, split: ImageSplit, classes: Sequence[str], *, count: int = 16, seed: int = 0) -> Attention:
    """The attention of the last block of the backbone's `vit`, the mean over its heads.

    With a CLS token, it is the attention of the CLS token to each patch. Without one, it is the mean attention of all
    patches to each patch. Each map is scaled so that its highest value is 1.
    """
    vit = model.backbone.vit
    chosen = split.stratified_subset(count, seed=seed)
    pixels, images, labels = _prepared(model, chosen, torch.arange(len(chosen)))
    with evaluating(model):
        weights = vit.attention_maps(images)[:, -1].float().mean(dim=1)  # (b n n)
        patches = slice(vit.num_prefix_tokens, vit.num_prefix_tokens + vit.num_patches)
        queries = slice(0, 1) if getattr(vit, "cls_token", None) is not None else patches
        maps = weights[:, queries, patches].mean(dim=1).unflatten(1, vit.grid_size)  # (b h w)
        maps = maps / maps.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    return Attention(pixels.cpu().numpy(), maps.cpu().numpy(), [class_name(classes, label) for label in labels.tolist()])


def figures(model: Any, dataset: Any, *, seed: int = 0) -> dict[str, ReportFigure]:
    """Figures for a report, of test images chosen by `seed`, by their names in the report.

        for name, figure in figures(model, data, seed=run.seed).items():
            run.figure(name, figure)

    A map of the embeddings; with a `vit` in the backbone its attention; with a decoder samples from N(0, I) and from the
    Gaussian that fits the latents of training images, reconstructions, and interpolations between images of different
    classes. Ranks: all of them have to call it.
    """
    classes, test = dataset.classes, dataset.test
    features = extract_features(model, test, size=EMBEDDINGS_SHOWN, seed=seed)
    by_name: dict[str, ReportFigure] = {
        "embeddings": Embeddings(features.features.cpu().numpy(), features.labels.cpu().numpy(), classes)
    }
    if hasattr(getattr(getattr(model, "backbone", None), "vit", None), "attention_maps"):
        by_name["attention"] = attention_figure(model, test, classes, seed=seed)
    if getattr(model, "decoder", None) is not None:
        by_name["samples"] = sample_sheet(model, seed=seed, classes=classes)
        prior = fit_gaussian(model, dataset.train, seed=seed)
        by_name["samples_fitted"] = sample_sheet(model, seed=seed, classes=classes, prior=prior)
        by_name["reconstructions"], _ = reconstruction_figure(model, test, classes, seed=seed)
        by_name["interpolations"] = interpolation_sheet(model, _pairs(model, test, classes, seed), classes=classes)
    return by_name


def _pairs(model: Any, split: ImageSplit, classes: Sequence[str], seed: int, most: int = 4) -> list[tuple[End, End]]:
    """Up to `most` pairs of images, of two classes each if there are two classes."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:200]
    by_class: dict[int, list[int]] = {}
    for index in order.tolist():
        by_class.setdefault(int(split.labels[index]), []).append(index)
    turns = zip_longest(*by_class.values())
    picked = [index for turn in turns for index in turn if index is not None][: 2 * most]
    ends = [image_end(model, split, index, classes) for index in picked]
    return list(zip(ends[0::2], ends[1::2], strict=False))  # of an odd number the last image is not used


def class_name(classes: Sequence[str], label: int) -> str:
    """The name of a label's class; a dash for an image without a label."""
    return "–" if label == UNLABELLED else str(classes[label])


def _prepared(model: Any, split: ImageSplit, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels `(n c h w)` in [0, 1] on the model's device, the same normalised, and labels `(n,)`."""
    device = next(model.parameters()).device
    chosen = split.subset(indices).in_memory()
    pixels = split.preprocessing.pixels(chosen.images.to(device))
    return pixels, split.preprocessing.normalise(pixels), chosen.labels.to(device)
