"""Multimodal JEPA: image patches and a label token in one attention stack.

The LeJEPA loss trains it on views of an image alone, of the image with its label and of the label alone. It then retrieves labels
in two ways: M1, the label that changes an image's embedding least, and M2, the label whose own embedding is nearest.
"""

from typing import Annotated, Literal

from vitkit import Component, Run, backbones, evaluators, losses
from vitkit.contracts import Dataset
from vitkit.errors import UsageError
from vitkit.training import muon_adamw, warmup_cosine
from vitkit.transforms import RandomAffine
from vitkit.validation import at_least
from vitkit_jepa import JEPA

DATASET = "mnist"
PRESETS = {
    "quick": {}, "digits": {"epochs": 18, "batch_size": 64, "lr": 8e-3, "eval_every": 9, "img_size": 16, "patch_size": 4},
    "full": {"epochs": 50, "img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3},
}  # fmt: skip
ALIASES = {"emb_dim": "embed_dim", "objective": {"seed": "reference"}}


def main(
    run: Run,
    data: Dataset,
    *,
    epochs: Annotated[int, "passes over the training images"] = 3,
    batch_size: Annotated[int, "images per step"] = 128,
    lr: Annotated[float, "peak learning rate of Muon and AdamW"] = 4e-3,
    img_size: Annotated[int, "side of an image in pixels"] = 28,
    patch_size: Annotated[int, "side of a patch in pixels"] = 7,
    embed_dim: Annotated[int, "width of the encoder"] = 128,
    depth: Annotated[int, "number of transformer blocks"] = 4,
    num_heads: Annotated[int, "number of attention heads"] = 2,
    backbone: Annotated[Component, "around which the encoder is built; labels need vit or cct"] = Component("backbone", "vitkit:vit"),
    proj_dim: Annotated[int, "dimensions of the projection"] = 32,
    projector: Annotated[Component, "maps features to the space of the loss"] = Component("head", "vitkit:mlp", hidden=256, norm="batch"),
    lamda: Annotated[float, "weight λ of SIGReg; invariance has weight 1 − λ"] = 0.05,
    multimodal: Annotated[bool, "train with labels; no-multimodal: on images alone"] = True,
    objective: Annotated[Literal["joint", "reference"], "joint: views with and without label; reference: all with label"] = "joint",
    views: Annotated[int, "augmented views per image; the last one gets a label"] = 2,
    swap: Annotated[float | None, "share of the labels that wrong labels replace in training  [default: 0.5]"] = None,
    keep: Annotated[float, "share of the patches that each view uses in training"] = 1.0,
    label_fraction: Annotated[float, "share of the training labels that are used"] = 1.0,
    train_size: Annotated[int | None, "number of training images, for a quick trial  [default: all]"] = None,
    eval_every: Annotated[int, "epochs between evaluations"] = 5,
    eval_size: Annotated[int | None, "number of training images for kNN and linear probe  [default: all]"] = None,
    probe_dataset: Annotated[str | None, "another dataset on which kNN and linear probe measure the encoder"] = None,
) -> None:
    """Train, evaluate every few epochs, and save the encoder and its projector."""
    at_least(1, eval_every=eval_every)
    if not multimodal and (swap is not None or objective == "reference"):
        raise UsageError(f"--{f'swap {swap}' if swap is not None else 'objective reference'} needs labels; leave it or --no-multimodal out")
    if multimodal and not data.classes:
        raise UsageError(f"the images of {data.name} have no labels; give --no-multimodal to train on images alone")
    data = data.resized(img_size)
    train = data.train if train_size is None else data.train.stratified_subset(train_size, seed=run.seed)
    train = train if label_fraction == 1.0 else train.mask_labels(label_fraction, seed=run.seed).oversample_labelled(0.25)
    augment = RandomAffine(degrees=15, translate=0.1, scale=(0.85, 1.15), shear=10)
    batches = train.batches(batch_size, shuffle=True, drop_last=True, augment=augment, views=views)
    encoder = backbones.build(
        "vitkit:multimodal_vit", num_classes=max(len(data.classes), 1), img_size=img_size, patch_size=patch_size, in_chans=data.shape[0],
        embed_dim=embed_dim, depth=depth, num_heads=num_heads, positions="sincos2d", backbone=backbone.name, backbone_args=backbone.kwargs)
    head, loss = projector.build(in_dim=encoder.embed_dim, out_dim=proj_dim), losses.build("vitkit:lejepa", lamda=lamda)
    model = JEPA(encoder, head, loss, objective=objective if multimodal else "images", swap=0.5 if swap is None else swap, keep=keep)
    optimizer = muon_adamw(model, lr=lr)
    schedule = warmup_cosine(optimizer, run.steps(batches, epochs), warmup=min(100, run.steps(batches)))
    if data.name == "mnist":  # the document's best epochs, each metric at its own
        run.reference("reference document", linear_top1=0.95, m1_top1=0.79, m1_top3=0.96, m2_top1=0.64, m2_top3=0.88)
    run.reference("floor", sigreg=loss.sigreg.floor)  # of embeddings drawn from N(0, I)
    probes = [evaluators.build(f"vitkit:{name}", train_size=eval_size) for name in ("linear_probe", "knn")]
    transfer = [evaluators.build("vitkit:transfer", dataset=probe_dataset, train_size=eval_size)] if probe_dataset else []
    monitors = [evaluators.build(f"vitkit:{name}") for name in ("rankme", "alpha_req", "feature_std", "neighbours") if not data.classes]
    evaluate = run.check(data, *probes, *transfer, *[evaluators.build("vitkit:label_retrieval")] * encoder.takes_labels, *monitors)
    run.measure_untrained(model, data, *transfer, *monitors)
    for epoch in run.fit(model, batches, epochs=epochs, optimizer=optimizer, schedule=schedule, clip=1.0, ema=0.99):
        if epoch.due(eval_every):
            epoch.evaluate(model, data, *evaluate)
    run.save(model)
