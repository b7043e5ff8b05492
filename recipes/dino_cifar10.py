"""DINO on CIFAR-10: a student predicts, from crops of an image, what its momentum teacher makes of other crops of it.

It learns without labels. Two global crops and several small ones make the views. The defaults are for batches of 64 to 256 images: 1,024
prototypes, and Sinkhorn–Knopp in place of a moving centre. The report shows the entropy of the teacher: a collapse would make it 0 or ln K.
"""

from typing import Annotated, Literal

from vitkit import Component, Run, backbones
from vitkit.contracts import Dataset
from vitkit.training import cosine, muon_adamw, warmup_cosine
from vitkit.validation import at_least, in_range
from vitkit_ssl import DINO, Monitors, multi_crop

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
    epochs: Annotated[int, "passes over the training images"] = 20,
    batch_size: Annotated[int, "images per step"] = 128,
    lr: Annotated[float, "peak learning rate of Muon and AdamW"] = 2e-3,
    weight_decay: Annotated[float, "weight decay of matrices (biases, norms, tokens: none)"] = 0.05,
    warmup: Annotated[float, "epochs in which the learning rate rises"] = 1.0,
    ema: Annotated[float, "decay of the averaged weights that are evaluated and saved"] = 0.998,
    img_size: Annotated[int, "side of a global crop in pixels"] = 32,
    patch_size: Annotated[int, "side of a patch in pixels"] = 4,
    embed_dim: Annotated[int, "width of the encoder"] = 192,
    depth: Annotated[int, "number of transformer blocks"] = 6,
    num_heads: Annotated[int, "number of attention heads"] = 3,
    pool: Annotated[Literal["cls", "mean"], "features: the CLS token, or the mean over patches"] = "mean",
    local: Annotated[int, "small crops per image, half as large"] = 4,
    keep: Annotated[float, "share of the patches that the student sees of a global crop"] = 1.0,
    prototypes: Annotated[int, "number K of prototypes"] = 1024,
    momentum: Annotated[float, "momentum of the teacher at the first step; 1 at the last"] = 0.99,
    koleo: Annotated[float, "weight of the KoLeo loss, which spreads features"] = 0.0,
    head: Annotated[Component, "compares features with prototypes"] = Component("head", "vitkit:dino", bottleneck=64),
    loss: Annotated[Component, "compares student and teacher"] = Component("loss", "vitkit:dino", centring="sinkhorn"),
    augment: Annotated[Literal["auto", "colour", "crop", "shape"], "augmentation; auto: colour, for grey images shape"] = "auto",
    train_size: Annotated[int | None, "number of training images, for a quick trial  [default: all]"] = None,
    eval_every: Annotated[int, "epochs between evaluations on the validation split"] = 5,
    eval_size: Annotated[int, "training and validation images of these evaluations"] = 5000,
    probe_dataset: Annotated[str | None, "another dataset on which kNN and linear probe measure the encoder"] = None,
) -> None:
    """Train, watch the features on the validation split, measure them on the test split at the end, and save encoder and head."""
    at_least(1, eval_every=eval_every)
    at_least(0, warmup=warmup)
    in_range(0, 1, momentum=momentum)
    data = data.resized(img_size)
    train = data.train if train_size is None else data.train.stratified_subset(train_size, seed=run.seed)
    batches = train.batches(batch_size, shuffle=True, drop_last=True, views=multi_crop(augment, data.shape[0], img_size, local=local))
    backbone = backbones.build(
        "vitkit:vit", img_size=img_size, patch_size=patch_size, in_chans=data.shape[0], embed_dim=embed_dim, depth=depth,
        num_heads=num_heads, dropout=0.0, pool=pool, positions="sincos2d", stem="conv", dynamic_img_size=True)  # fmt: skip
    dino_head = head.build(in_dim=embed_dim, out_dim=prototypes)
    model = DINO(backbone, dino_head, loss.build(out_dim=prototypes), momentum=cosine(momentum, 1.0), koleo=koleo, keep=keep)
    optimizer = muon_adamw(model, lr=lr, weight_decay=weight_decay)
    schedule = warmup_cosine(optimizer, run.steps(batches, epochs), warmup=round(min(warmup, epochs) * run.steps(batches)))
    monitors = Monitors.of(run, data, size=eval_size, train_size=train_size, probe_dataset=probe_dataset)
    monitors.measure_untrained(model)
    for epoch in run.fit(model, batches, epochs=epochs, optimizer=optimizer, schedule=schedule, clip=1.0, ema=ema):
        monitors.after(epoch, model, eval_every)
    run.save(model)
