"""The reconstruction error of a variational autoencoder, and the number of latent dimensions that it uses."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitkit import backbones, heads
from vitkit.contracts import Measurement, Scores, SplitName
from vitkit.distributed import all_gather, all_reduce_sum, rank, world_size
from vitkit.errors import VitkitError
from vitkit.models import evaluating
from vitkit.validation import at_least, positive
from vitkit_eval import check_labels, named, split_of
from vitkit_vae.generate import classes_of, decoder_of, encode, reconstruct, reconstruction_figure

BATCH_SIZE = 500
LEAST_MSE = 1e-10
"""A perfect reconstruction counts as 100 dB, so that the mean over images stays finite."""


class Reconstruction:
    """The distance of D(μ(x)) from images x in [0, 1]: `reconstruction_mse` and `reconstruction_psnr`.

    MSE is the mean of squared differences over images, channels and pixels; PSNR, in dB, the mean over images of
    10·log₁₀(1/MSE) of each, at most 100. The MSE's chance level is that of the split's mean image, the best that a decoder
    without information about the image reaches. The latent is the mean μ; nothing is random. A conditional decoder gets the
    true class.

    `test_size` limits the number of images (chosen by `seed`, in equal shares per class as far as possible); the figure has
    `shown` of them, originals above reconstructions. Only a conditional decoder needs labels. Under autocast the model
    computes in the precision of autocast; errors are fp32.

    Ranks: each reconstructs its share of the images, and every rank returns the same scores.

    Raises `UsageError` for a model without a decoder, for reconstructions of another shape than the images, and for images
    without a label if the decoder is conditional; `VitkitError` for reconstructions that are not finite.
    """

    name = "reconstruction"

    def __init__(self, *, test_size: int | None = None, shown: int = 16, seed: int = 0) -> None:
        at_least(1, test_size=test_size, shown=shown)
        self.test_size, self.shown, self.seed = test_size, shown, seed

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {"model": _small_model()}

    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        conditional = classes_of(decoder_of(model)) is not None
        if conditional:
            check_labels(f"{self.name} with a conditional decoder", dataset, split)
        images = capped(split_of(dataset, split), self.test_size, self.seed)
        errors, sums = [], torch.zeros(2, *dataset.shape)
        with evaluating(model) as device:
            for pixels, labels in _batches(images, device):
                sums = sums.to(device) + torch.stack([pixels.sum(dim=0), pixels.square().sum(dim=0)])
                squares = torch.zeros(0, device=device)
                if len(pixels):  # this rank's share of the last batch may be empty, which a model need not accept
                    reconstructions = reconstruct(model, images.preprocessing.normalise(pixels), labels)
                    squares = (reconstructions - pixels).square().flatten(1).mean(dim=1)
                errors.append(all_gather(squares))
            mse = torch.cat(errors)
            mean, square = all_reduce_sum(sums) / len(mse)
        if not bool(mse.isfinite().all()):
            raise VitkitError("the reconstructions are not finite: the model has diverged, or its weights are damaged")
        sheet, _ = reconstruction_figure(model, images, dataset.classes, count=self.shown, seed=self.seed)
        note = f"from the latent's mean, pixels in [0, 1]{', the decoder gets the true class' if conditional else ''}"
        chance = float((square - mean.square()).mean())
        psnr = -10 * mse.clamp(min=LEAST_MSE).log10()
        protocols = {
            "reconstruction_mse": Measurement(
                split, len(mse), chance=chance, note=f"{note}; chance: the mean image", kind="error"
            ),
            "reconstruction_psnr": Measurement(split, len(mse), note=f"mean over images, {note}", unit="dB"),
        }
        values = {"reconstruction_mse": float(mse.mean()), "reconstruction_psnr": float(psnr.mean())}
        return named(Scores(values, protocols=protocols, figures={"reconstructions": sheet}), split)


class ActiveUnits:
    """The number of dimensions of the latent that carry information about the image: `active_units`.

    Unit u is active if Var_x(μ_u(x)) > `threshold` over the images (Burda et al., arXiv 1509.00519, whose threshold is
    0.01): a unit that the KL divergence has switched off has the same mean for every image.

    `test_size` limits the number of images (chosen by `seed`, in equal shares per class as far as possible). Labels are not
    used. Under autocast the encoder computes in the precision of autocast; the variance is fp64.

    Ranks: each rank encodes its share of the images, and all ranks return the same score.

    Raises `UsageError` if the backbone of the model has no latent, and `VitkitError` if latents are not finite.
    """

    name = "active_units"

    def __init__(self, *, threshold: float = 0.01, test_size: int | None = None, seed: int = 0) -> None:
        positive(threshold=threshold)
        at_least(1, test_size=test_size)
        self.threshold, self.test_size, self.seed = threshold, test_size, seed

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {"model": _small_model()}

    def __call__(self, model: Any, dataset: Any, split: SplitName = "test") -> Scores:
        images = capped(split_of(dataset, split), self.test_size, self.seed)
        means = []
        with evaluating(model) as device:
            for pixels, _ in _batches(images, device):
                rows = images.preprocessing.normalise(pixels if len(pixels) else pixels.new_zeros(1, *pixels.shape[1:]))
                means.append(all_gather(encode(model, rows)[: len(pixels)]))
            mu = torch.cat(means).cpu().double()
        if not bool(mu.isfinite().all()):
            raise VitkitError("the latents are not finite: the model has diverged, or its weights are damaged")
        active = int((mu.var(dim=0, correction=0) > self.threshold).sum())
        note = f"of {mu.shape[1]} latent dimensions, those whose mean varies by more than {self.threshold:g} over the images"
        protocol = Measurement(split, len(mu), frozen="encoder", note=note, unit="dimensions")
        return named(Scores({self.name: active}, protocols={self.name: protocol}), split)


def _small_model() -> nn.Module:
    model = nn.Module()
    model.backbone = backbones.build(
        "vitkit:vae_encoder", img_size=8, in_chans=1, embed_dim=16, depth=1, num_heads=1, latent_dim=4, dropout=0.1
    )
    model.decoder = heads.build("vitkit:conv_decoder", in_dim=4, out_dim=1, img_size=8)
    return model


def capped(images: Any, size: int | None, seed: int) -> Any:
    """A split, or `size` images of it, the classes in equal shares as far as possible, chosen by `seed`."""
    return images if size is None else images.stratified_subset(size, seed=seed)


def _batches(split: Any, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of a split in pixels `(b c h w)` in [0, 1], and labels."""
    c = split.preprocessing.shape[0]
    plain = replace(split, preprocessing=replace(split.preprocessing, mean=(0.0,) * c, std=(1.0,) * c))
    for batch in plain.batches(BATCH_SIZE).epoch(0, device=device, rank=rank(), world=world_size()):
        yield batch["images"], batch["labels"]
