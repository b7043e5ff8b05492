"""A masked autoencoder on CIFAR-10: the encoder sees a quarter of the patches, and a small decoder predicts the others.

It learns without labels. kNN, linear probe, RankMe, α-ReQ and LiDAR watch its features on the validation split, beside those of the
untrained network. The features of masked autoencoders are made for fine-tuning: their kNN stays low. `ssl_cifar10.py` compares the
method with others.
"""

from typing import Annotated, Literal

from vitkit import Component, Run, backbones
from vitkit.contracts import Dataset
from vitkit.data import View
from vitkit.training import muon_adamw, warmup_cosine
from vitkit.validation import at_least
from vitkit_ssl import MAE, Monitors, augmentation, reconstructions

DATASET = "cifar10"
PRESETS = {
    "default": {},
    "digits": {"epochs": 40, "batch_size": 64, "img_size": 16, "patch_size": 2, "embed_dim": 96, "depth": 4, "num_heads": 3,
               "eval_every": 20},
}  # fmt: skip


def main(
    run: Run,
    data: Dataset,
    *,
    epochs: Annotated[int, "passes over the training images"] = 60,
    batch_size: Annotated[int, "images per step"] = 128,
    lr: Annotated[float, "peak learning rate of Muon and AdamW"] = 2e-3,
    weight_decay: Annotated[float, "weight decay of matrices (biases, norms, tokens: none)"] = 0.05,
    warmup: Annotated[float, "epochs in which the learning rate rises"] = 1.0,
    ema: Annotated[float, "decay of the averaged weights that are evaluated and saved"] = 0.998,
    img_size: Annotated[int, "side of an image in pixels"] = 32,
    patch_size: Annotated[int, "side of a patch in pixels"] = 4,
    embed_dim: Annotated[int, "width of the encoder"] = 192,
    depth: Annotated[int, "number of transformer blocks of the encoder"] = 6,
    num_heads: Annotated[int, "number of attention heads of the encoder"] = 3,
    stem: Annotated[Literal["patch", "conv"], "how the encoder maps pixels to tokens"] = "patch",
    mask: Annotated[float, "share of the patches that are masked"] = 0.75,
    decoder: Annotated[Component, "predicts masked patches"] = Component("head", "vitkit:mae_decoder", embed_dim=96, depth=2, num_heads=3),
    loss: Annotated[Component, "compares predicted and true pixels"] = Component("loss", "vitkit:masked_reconstruction", normalise=True),
    augment: Annotated[Literal["auto", "colour", "crop", "shape"], "augmentation; auto: crop, for grey images shape"] = "auto",
    train_size: Annotated[int | None, "number of training images, for a quick trial  [default: all]"] = None,
    eval_every: Annotated[int, "epochs between evaluations on the validation split"] = 10,
    eval_size: Annotated[int, "training and validation images of these evaluations"] = 5000,
    probe_dataset: Annotated[str | None, "another dataset on which kNN and linear probe measure the encoder"] = None,
) -> None:
    """Train, watch the features on the validation split, measure them on the test split at the end, and save encoder and decoder."""
    at_least(1, eval_every=eval_every)
    at_least(0, warmup=warmup)
    data = data.resized(img_size)
    channels = data.shape[0]
    train = data.train if train_size is None else data.train.stratified_subset(train_size, seed=run.seed)
    view = View(transform=augmentation("crop" if augment == "auto" and channels > 1 else augment, channels))
    batches = train.batches(batch_size, shuffle=True, drop_last=True, views=[view])
    backbone = backbones.build(
        "vitkit:vit", img_size=img_size, patch_size=patch_size, in_chans=channels, embed_dim=embed_dim, depth=depth, num_heads=num_heads,
        dropout=0.0, pool="mean", positions="sincos2d", stem=stem)  # fmt: skip
    pixels = decoder.build(in_dim=embed_dim, out_dim=channels * patch_size**2, grid_size=list(backbone.grid_size))
    model = MAE(backbone, pixels, loss.build(), mask=mask)
    optimizer = muon_adamw(model, lr=lr, weight_decay=weight_decay)
    schedule = warmup_cosine(optimizer, run.steps(batches, epochs), warmup=round(min(warmup, epochs) * run.steps(batches)))
    monitors = Monitors.of(run, data, size=eval_size, train_size=train_size, probe_dataset=probe_dataset)
    monitors.measure_untrained(model)
    for epoch in run.fit(model, batches, epochs=epochs, optimizer=optimizer, schedule=schedule, clip=1.0, ema=ema):
        monitors.after(epoch, model, eval_every)
    run.save(model)
    run.figure("reconstructions", reconstructions(model, data, seed=run.seed))
