"""Multimodal JEPA: image patches and a label token in one attention stack.

Trained with the LeJEPA loss on views of an image alone, of the image with its label and of the label alone, then asked
for labels: by M1, the label that moves an image's embedding least, and by M2, the label whose own embedding is nearest.
"""

from typing import Annotated, Literal

from vitkit import Run, backbones, evaluators, heads, losses, parse_arguments
from vitkit.errors import UsageError
from vitkit.models import feature_cache
from vitkit.training import muon_adamw, warmup_cosine
from vitkit.transforms import Compose, RandomAffine
from vitkit.validation import at_least
from vitkit_jepa import JEPA

PRESETS = {
    "quick": {"epochs": 5, "img_size": 28, "patch_size": 7, "emb_dim": 128, "depth": 4, "num_heads": 2},
    "full": {"epochs": 50, "img_size": 32, "patch_size": 4, "emb_dim": 192, "depth": 6, "num_heads": 3},
    "digits": {"epochs": 60, "img_size": 16, "patch_size": 4, "emb_dim": 128, "depth": 4, "num_heads": 2},
}
# Its best epochs on MNIST, each metric at its own.
SEED_DOCUMENT = {"linear_top1": 0.95, "m1_top1": 0.79, "m1_top3": 0.96, "m2_top1": 0.64, "m2_top3": 0.88}


def main(
    run: Run,
    dataset: Annotated[str, "mnist, fashion_mnist, digits, ...; auto: mnist, or digits where it cannot be had"] = "auto",
    dataset_arg: Annotated[list[str], "an argument of that dataset as NAME=VALUE, e.g. urls=...; may be repeated"] = [],
    preset: Annotated[Literal["auto", "quick", "full", "digits"], "the flags not given; auto: quick, digits for digits"] = "auto",
    epochs: Annotated[int | None, "passes over the training images (quick 5, full 50)"] = None,
    batch_size: Annotated[int, "images a step"] = 128,
    lr: Annotated[float, "peak learning rate of Muon and AdamW"] = 4e-3,
    img_size: Annotated[int | None, "pixels (quick 28, full 32)"] = None,
    patch_size: Annotated[int | None, "pixels a patch (quick 7, full 4)"] = None,
    emb_dim: Annotated[int | None, "width of the encoder (quick 128, full 192)"] = None,
    depth: Annotated[int | None, "transformer blocks (quick 4, full 6)"] = None,
    num_heads: Annotated[int | None, "attention heads (quick 2, full 3)"] = None,
    proj_dim: Annotated[int, "dimensions of the projection"] = 32,
    projector: Annotated[str, "a registered head: mlp, or a plugin's"] = "mlp",
    projector_arg: Annotated[list[str], "an argument of that head as NAME=VALUE; may be repeated"] = [],
    lamda: Annotated[float, "weight of SIGReg against invariance"] = 0.05,
    multimodal: Annotated[bool, "show labels; without, the baseline"] = True,
    objective: Annotated[Literal["joint", "seed"], "views with and without label, or all with (the seed's)"] = "joint",
    views: Annotated[int, "augmented views of an image, the last one beside a label"] = 2,
    swap: Annotated[float | None, "share of labels shown that are wrong ones (0.5)"] = None,
    keep: Annotated[float, "share of the patches that each view shows in training"] = 1.0,
    label_fraction: Annotated[float, "share of the training labels that is ever shown"] = 1.0,
    train_size: Annotated[int | None, "train on so many images only, for a quick trial"] = None,
    eval_every: Annotated[int, "epochs between evaluations"] = 5,
    eval_size: Annotated[int | None, "training images that evaluators look at (all)"] = None,
) -> None:
    """Train, evaluate every few epochs, save the encoder and its projector."""
    at_least(1, eval_every=eval_every)
    if not multimodal and (swap is not None or objective == "seed"):
        flag = "--objective seed" if objective == "seed" else f"--swap {swap}"
        raise UsageError(f"{flag} is about the labels that --no-multimodal leaves out; give one of the two")
    data = run.dataset(dataset, default="mnist", **parse_arguments(dataset_arg))
    if swap is None:
        swap = 0.5
    given = {
        "epochs": epochs, "img_size": img_size, "patch_size": patch_size, "emb_dim": emb_dim, "depth": depth,
        "num_heads": num_heads,
    }  # fmt: skip
    base = PRESETS[("digits" if data.name == "digits" else "quick") if preset == "auto" else preset]
    chosen = {name: base[name] if value is None else value for name, value in given.items()}
    run.resolved(**chosen, **({"swap": swap} if multimodal else {}))
    size, epochs, width = int(chosen["img_size"]), int(chosen["epochs"]), int(chosen["emb_dim"])
    data = data.resized(size)
    train = data.train if train_size is None else data.train.stratified_subset(train_size, seed=run.seed)
    if label_fraction != 1.0:
        train = train.mask_labels(label_fraction, seed=run.seed).oversample_labelled(0.25)
    augment = Compose([RandomAffine(degrees=15, translate=0.1, scale=(0.85, 1.15), shear=10)])
    batches = train.batches(batch_size, shuffle=True, drop_last=True, augment=augment, views=views)

    backbone = backbones.build(
        "multimodal_vit", num_classes=len(data.classes), img_size=size, patch_size=chosen["patch_size"],
        in_chans=data.shape[0], embed_dim=width, depth=chosen["depth"], num_heads=chosen["num_heads"],
        positions="sincos2d",
    )  # fmt: skip
    own = {"hidden": 256, "norm": "batch"} if projector == "mlp" else {}
    head = heads.build(projector, in_dim=width, out_dim=proj_dim, **{**own, **parse_arguments(projector_arg)})
    loss = losses.build("lejepa", lamda=lamda)
    model = JEPA(backbone, head, loss, objective=objective if multimodal else "images", swap=swap, keep=keep)
    optimizer = muon_adamw(model, lr=lr)
    schedule = warmup_cosine(optimizer, run.steps(batches, epochs), warmup=min(100, run.steps(batches)))

    if data.name == "mnist":
        run.reference("seed document", **SEED_DOCUMENT)
    run.reference("floor", sigreg=1.0525)  # of true N(0, I)
    run.reference("collapse", sigreg=0.4020 * batch_size)  # of all embeddings at one point
    evaluate = [evaluators.build(name, train_size=eval_size) for name in ("linear_probe", "knn")]
    evaluate.append(evaluators.build("label_retrieval"))
    for epoch in run.fit(model, batches, epochs=epochs, optimizer=optimizer, schedule=schedule, clip=1.0, ema=0.99):
        if epoch.due(eval_every):
            with run.autocast(), feature_cache():
                epoch.log(*(evaluator(model, data) for evaluator in evaluate))
    run.save(backbone=backbone, projector=head)

