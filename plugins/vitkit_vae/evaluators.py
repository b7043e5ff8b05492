"""How well a variational autoencoder gives images back, and how much of its latent it uses."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vitkit import backbones, heads
from vitkit.contracts import Measurement, Scores
from vitkit.distributed import all_gather, all_reduce_sum, rank, world_size
from vitkit.errors import UsageError, VitkitError
from vitkit.models import evaluating
from vitkit_vae.generate import classes_of, decoder_of, encode, reconstruct, reconstructions

BATCH = 500
LEAST_MSE = 1e-10
"""A perfect reconstruction counts as 100 dB, for the mean over images stays finite."""


class Reconstruction:
    """How near D(μ(x)) comes to test images x in [0, 1]: `reconstruction_mse` and `reconstruction_psnr`.

    MSE is the mean of squared differences over images, channels and pixels; PSNR, in dB, the mean over images of
    10·log₁₀(1/MSE) of each, at most 100. The MSE's chance level is what the test set's mean image would score: a decoder
    that knows nothing of its latent can do no better. The latent is the mean μ, nothing is drawn; a conditional decoder
    is told the true class.

    `test_size` caps the images, the classes as evenly as they can be had, chosen by `seed`; `shown` of them stand in the
    picture, originals above reconstructions. Called under autocast the model computes in its precision, errors are fp32.

    Ranks: each reconstructs its share of the images, and every rank returns the same scores.

    Raises `UsageError` for a model without a decoder and where what it makes has another shape than the images, and
    `VitkitError` for reconstructions that are not finite.
    """

    def __init__(self, *, test_size: int | None = None, shown: int = 16, seed: int = 0) -> None:
        if shown < 1:
            raise UsageError(f"shown is {shown}; expected at least 1 image")
        self.test_size, self.shown, self.seed = test_size, shown, seed

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {"model": _small_model()}

    def __call__(self, model: Any, dataset: Any) -> Scores:
        decoder = decoder_of(model)
        split = dataset.test if self.test_size is None else dataset.test.stratified_subset(self.test_size, seed=self.seed)
        errors, sums = [], torch.zeros(2, *dataset.shape)
        with evaluating(model) as device:
            for pixels, labels in _batches(split, device):
                sums = sums.to(device) + torch.stack([pixels.sum(dim=0), pixels.square().sum(dim=0)])
                own = torch.zeros(0, device=device)
                if len(pixels):  # one rank's share of the last batch may be empty, and the model need not take that
                    found = reconstruct(model, split.preprocessing.normalise(pixels), labels)
                    own = (found - pixels).square().flatten(1).mean(dim=1)
                errors.append(all_gather(own))
            mse = torch.cat(errors)
            mean, square = all_reduce_sum(sums) / len(mse)
        if not bool(mse.isfinite().all()):
            raise VitkitError("the reconstructions are not finite: the model has diverged, or its weights are damaged")
        sheet, _ = reconstructions(model, split, dataset.classes, count=self.shown, seed=self.seed)
        given = "" if classes_of(decoder) is None else ", the decoder told the true class"
        note = f"from the latent's mean, pixels in [0, 1]{given}"
        chance = float((square - mean.square()).mean())
        psnr = -10 * mse.clamp(min=LEAST_MSE).log10()
        return Scores(
            {"reconstruction_mse": float(mse.mean()), "reconstruction_psnr": float(psnr.mean())},
            protocols={
                "reconstruction_mse": Measurement("test", len(mse), chance=chance, note=f"{note}; chance: the mean image"),
                "reconstruction_psnr": Measurement("test", len(mse), note=f"dB, mean over images, {note}"),
            },
            figures={"reconstructions": sheet},
        )


class ActiveUnits:
    """How many dimensions of the latent say anything of the image: `active_units`.

    Unit u is active where Var_x(μ_u(x)) > `threshold` over the test images (Burda et al., arXiv 1509.00519, whose
    threshold is 0.01): one that the KL divergence has switched off has the same mean for every image.

    `test_size` caps the images, the classes as evenly as they can be had, chosen by `seed`. Called under autocast the
    encoder computes in its precision, the variance is fp64.

    Ranks: each encodes its share of the images, and every rank returns the same score.

    Raises `UsageError` for a model whose backbone has no latent, and `VitkitError` for latents that are not finite.
    """

    def __init__(self, *, threshold: float = 0.01, test_size: int | None = None, seed: int = 0) -> None:
        if not threshold > 0:
            raise UsageError(f"threshold is {threshold}; expected a positive variance")
        self.threshold, self.test_size, self.seed = threshold, test_size, seed

    @staticmethod
    def vitkit_example(samples: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {}, {"model": _small_model()}

    def __call__(self, model: Any, dataset: Any) -> Scores:
        split = dataset.test if self.test_size is None else dataset.test.stratified_subset(self.test_size, seed=self.seed)
        found = []
        with evaluating(model) as device:
            for pixels, _ in _batches(split, device):
                images = split.preprocessing.normalise(pixels if len(pixels) else pixels.new_zeros(1, *pixels.shape[1:]))
                found.append(all_gather(encode(model, images)[: len(pixels)]))
            mu = torch.cat(found).cpu().double()
        if not bool(mu.isfinite().all()):
            raise VitkitError("the latents are not finite: the model has diverged, or its weights are damaged")
        active = int((mu.var(dim=0, correction=0) > self.threshold).sum())
        note = f"of {mu.shape[1]} latent dimensions, those whose mean varies by more than {self.threshold:g} over the images"
        return Scores(
            {"active_units": active},
            protocols={"active_units": Measurement("test", len(mu), frozen="encoder", note=note)},
        )


def _small_model() -> nn.Module:
    model = nn.Module()
    model.backbone = backbones.build(
        "vae_encoder", img_size=8, in_chans=1, embed_dim=16, depth=1, num_heads=1, latent_dim=4, dropout=0.1
    )
    model.decoder = heads.build("conv_decoder", in_dim=4, out_dim=1, img_size=8)
    return model


def _batches(split: Any, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of a split in pixels `(b c h w)` in [0, 1], and labels."""
    if len(split) == 0:
        raise UsageError("the split to evaluate on holds no images")
    c = split.preprocessing.shape[0]
    plain = replace(split, preprocessing=replace(split.preprocessing, mean=(0.0,) * c, std=(1.0,) * c))
    for batch in plain.batches(BATCH).epoch(0, device=device, rank=rank(), world=world_size()):
        yield batch["images"], batch["labels"]
