"""Five ways to learn from images without labels, in one recipe: MAE, DINO, SimCLR, BYOL and LeJEPA on CIFAR-10.

All methods train the same encoder with the same optimiser and schedule, and the same evaluators measure it: `--method` changes the
views, the heads and the loss. `--method supervised` trains the same encoder with labels, for comparison. An epoch of MAE costs a fraction
of an epoch of the others: compare methods after the same time. `mae_cifar10.py` and `dino_cifar10.py` show one method each with all
its flags.
"""

from typing import Annotated, Literal

from vitkit import Run, backbones
from vitkit.contracts import Dataset
from vitkit.training import muon_adamw, warmup_cosine
from vitkit.validation import at_least, in_range
from vitkit_ssl import Monitors, build_method, views_of

DATASET = "cifar10"
PRESETS = {
    "default": {},
    "digits": {"epochs": 20, "batch_size": 64, "img_size": 16, "patch_size": 2, "embed_dim": 96, "depth": 4, "num_heads": 3,
               "eval_every": 10, "momentum": 0.95},
}  # fmt: skip


def main(
    run: Run,
    data: Dataset,
    *,
    method: Annotated[Literal["mae", "dino", "simclr", "byol", "lejepa", "supervised"], "how it learns"] = "simclr",
    epochs: Annotated[int, "passes over the training images"] = 20,
    batch_size: Annotated[int, "images per step"] = 128,
    lr: Annotated[float, "peak learning rate of Muon and AdamW"] = 2e-3,
    weight_decay: Annotated[float, "weight decay of matrices (biases, norms, tokens: none)"] = 0.05,
    warmup: Annotated[float, "epochs in which the learning rate rises"] = 1.0,
    ema: Annotated[float, "decay of the averaged weights that are evaluated and saved"] = 0.998,
    img_size: Annotated[int, "side of an image in pixels"] = 32,
    patch_size: Annotated[int, "side of a patch in pixels"] = 4,
    embed_dim: Annotated[int, "width of the encoder"] = 192,
    depth: Annotated[int, "number of transformer blocks"] = 6,
    num_heads: Annotated[int, "number of attention heads"] = 3,
    stem: Annotated[Literal["patch", "conv"], "how the encoder maps pixels to tokens"] = "conv",
    keep: Annotated[float, "share of the patches that a view uses in training; MAE masks by itself"] = 1.0,
    momentum: Annotated[float, "momentum of the teacher of DINO and BYOL at the first step; 1 at the last"] = 0.99,
    augment: Annotated[Literal["auto", "colour", "crop", "shape"], "augmentation; auto: by method and channels"] = "auto",
    train_size: Annotated[int | None, "number of training images, for a quick trial  [default: all]"] = None,
    eval_every: Annotated[int, "epochs between evaluations on the validation split"] = 5,
    eval_size: Annotated[int, "training and validation images of these evaluations"] = 5000,
    probe_dataset: Annotated[str | None, "another dataset on which kNN and linear probe measure the encoder"] = None,
) -> None:
    """Train, watch the features on the validation split, measure them on the test split at the end, and save the encoder."""
    at_least(1, eval_every=eval_every)
    at_least(0, warmup=warmup)
    in_range(0, 1, momentum=momentum)
    data = data.resized(img_size)
    train = data.train if train_size is None else data.train.stratified_subset(train_size, seed=run.seed)
    batches = train.batches(batch_size, shuffle=True, drop_last=True, views=views_of(method, augment, data.shape[0], img_size))
    backbone = backbones.build(
        "vitkit:vit", img_size=img_size, patch_size=patch_size, in_chans=data.shape[0], embed_dim=embed_dim, depth=depth,
        num_heads=num_heads, dropout=0.0, pool="mean", positions="sincos2d", stem=stem, dynamic_img_size=True)  # fmt: skip
    model = build_method(method, backbone, classes=len(data.classes), keep=keep, momentum=momentum)
    optimizer = muon_adamw(model, lr=lr, weight_decay=weight_decay)
    schedule = warmup_cosine(optimizer, run.steps(batches, epochs), warmup=round(min(warmup, epochs) * run.steps(batches)))
    monitors = Monitors.of(run, data, size=eval_size, train_size=train_size, probe_dataset=probe_dataset)
    monitors.measure_untrained(model)
    for epoch in run.fit(model, batches, epochs=epochs, optimizer=optimizer, schedule=schedule, clip=1.0, ema=ema):
        monitors.after(epoch, model, eval_every)
    run.save(model)
