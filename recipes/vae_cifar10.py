"""The multi-task variational autoencoder on CIFAR-10: a vision transformer with a convolutional stem and 64 tokens.

As `vae_mnist.py`, with colour, mirrored and moved images, and, in the long setting, RandAugment and images mixed in pairs.
"""

from typing import Annotated, Any, Literal

from torch.optim.lr_scheduler import StepLR

from vitkit import Run, backbones, heads, losses, parse_arguments
from vitkit.training import muon_adamw, warmup_cosine
from vitkit.transforms import Compose, HorizontalFlip, Mix, RandAugment, RandomCrop
from vitkit.validation import at_least
from vitkit_vae import Evaluation, MultiTaskVAE, TripletBatches, figures

PRESETS: dict[str, dict[str, int]] = {
    "default": {"epochs": 12, "img_size": 32, "patch_size": 4, "emb_dim": 128, "depth": 4, "num_heads": 2},
    "long": {"epochs": 100, "img_size": 32, "patch_size": 4, "emb_dim": 192, "depth": 9, "num_heads": 3},
    "digits": {"epochs": 60, "img_size": 16, "patch_size": 4, "emb_dim": 128, "depth": 4, "num_heads": 2},
}


def main(
    run: Run,
    dataset: Annotated[str, "cifar10, cifar100, digits, ...; auto: cifar10, or digits where it cannot be had"] = "auto",
    dataset_arg: Annotated[list[str], "an argument of that dataset as NAME=VALUE, e.g. urls=...; may be repeated"] = [],
    preset: Annotated[Literal["auto", "default", "long", "digits"], "the flags not given; auto: default, digits for digits"] = "auto",
    epochs: Annotated[int | None, "passes over the training images (default 12, long 100)"] = None,
    batch_size: Annotated[int, "images a step"] = 128,
    lr: Annotated[float, "peak learning rate"] = 4e-3,
    optimizer: Annotated[Literal["muon", "adamw"], "Muon beside AdamW, or AdamW alone"] = "muon",
    schedule: Annotated[Literal["cosine", "step"], "down to zero, or times 0.3 after each third"] = "cosine",
    img_size: Annotated[int | None, "pixels (32, digits 16)"] = None,
    patch_size: Annotated[int | None, "pixels a patch (4)"] = None,
    emb_dim: Annotated[int | None, "width of the encoder (128, long 192)"] = None,
    depth: Annotated[int | None, "transformer blocks (4, long 9)"] = None,
    num_heads: Annotated[int | None, "attention heads (2, long 3)"] = None,
    stem: Annotated[Literal["conv", "patch"], "how patches are embedded"] = "conv",
    latent_dim: Annotated[int, "dimensions of the latent"] = 64,
    hierarchical: Annotated[bool, "pool the tokens behind every block, not the last alone"] = False,
    checkpoint: Annotated[bool, "compute activations again in the backward pass, to save memory"] = False,
    triplet: Annotated[float, "weight of the triplet loss"] = 1.0,
    classification: Annotated[float, "weight of the cross-entropy; 0: no classifier"] = 0.5,
    reconstruction: Annotated[float, "weight of the reconstruction; 0: no decoder"] = 1.0,
    kl: Annotated[float, "weight of the KL divergence"] = 0.01,
    weighting: Annotated[Literal["fixed", "uncertainty", "progressive"], "of the losses"] = "fixed",
    kl_warmup: Annotated[float, "share of the training in which the weight of the KL divergence grows"] = 0.2,
    kl_reduction: Annotated[Literal["dimension", "image"], "mean or sum over the latent"] = "dimension",
    reconstruction_kind: Annotated[Literal["mse", "bce", "l1"], "of the reconstruction"] = "mse",
    reconstruction_reduction: Annotated[Literal["pixel", "image"], "mean or sum over pixels"] = "pixel",
    mining: Annotated[
        Literal["semi_hard", "batch_hard", "random", "given"], "of triplets; given: drawn, in three passes a step"
    ] = "semi_hard",
    margin: Annotated[float, "of the triplet loss"] = 0.2,
    views: Annotated[int, "augmented views of an image; all but the first are only positives"] = 1,
    supervised: Annotated[bool, "use labels; without them, two views at least and no classifier"] = True,
    randaugment: Annotated[int, "magnitude of RandAugment, up to 30; 0: none"] = 0,
    mix: Annotated[float, "share of the images that are mixed in pairs, by MixUp or CutMix"] = 0.0,
    label_smoothing: Annotated[float, "of the cross-entropy"] = 0.1,
    conditional: Annotated[bool, "tell the decoder the class"] = False,
    train_size: Annotated[int | None, "train on so many images only, for a quick trial"] = None,
    transfer_to: Annotated[str | None, "another dataset to try the frozen encoder on"] = None,
    transfer_features: Annotated[Literal["patches", "embedding"], "whitened tokens of the first block, or embeddings"] = "patches",
    eval_every: Annotated[int, "epochs between evaluations"] = 5,
    eval_size: Annotated[int | None, "training images that evaluators look at (all)"] = None,
) -> None:
    """Train, evaluate every few epochs, save the encoder with its classifier and decoder."""
    at_least(1, eval_every=eval_every)
    data = run.dataset(dataset, default="cifar10", **parse_arguments(dataset_arg))
    base = PRESETS[("digits" if data.name == "digits" else "default") if preset == "auto" else preset]
    given = {
        "epochs": epochs, "img_size": img_size, "patch_size": patch_size, "emb_dim": emb_dim, "depth": depth,
        "num_heads": num_heads,
    }  # fmt: skip
    chosen = {name: base[name] if value is None else value for name, value in given.items()}
    run.resolved(**chosen)
    epochs, size, blocks = chosen["epochs"], chosen["img_size"], chosen["depth"]
    data = data.resized(size)
    channels, classes = data.shape[0], len(data.classes)
    train = data.train if train_size is None else data.train.stratified_subset(train_size, seed=run.seed)
    moves = [RandomCrop(4)] if data.name == "digits" else [HorizontalFlip(), RandomCrop(4)]
    augment = Compose([*moves, RandAugment(magnitude=randaugment)] if randaugment else moves)
    batches: Any = train.batches(
        batch_size, shuffle=True, drop_last=True, augment=augment, views=views,
        mix=Mix(p=mix) if mix else None,
    )  # fmt: skip
    if mining == "given":
        batches = TripletBatches(train, batch_size, augment=augment)

    backbone = backbones.build(
        "vae_encoder", img_size=size, in_chans=channels, patch_size=chosen["patch_size"], stem=stem,
        embed_dim=chosen["emb_dim"], depth=blocks, num_heads=chosen["num_heads"], latent_dim=latent_dim, checkpoint=checkpoint,
        depths=list(range(1, blocks + 1)) if hierarchical else None,
    )  # fmt: skip
    classifier = decoder = None
    if classification and supervised:
        classifier = heads.build("mlp", in_dim=backbone.embedding_dim, out_dim=classes, hidden=128)
    if reconstruction:
        decoder = heads.build(
            "conv_decoder", in_dim=latent_dim, out_dim=channels, img_size=size,
            num_classes=classes if conditional else None,
        )  # fmt: skip
    steps = run.steps(batches, epochs)
    weights = {"classification": classification, "triplet": triplet, "reconstruction": reconstruction, "kl": kl}
    model = MultiTaskVAE(
        backbone, classifier, decoder,
        loss=losses.build("multitask", weights=weights, mode=weighting, warmup=round(kl_warmup * steps), stage=max(1, steps // 6)),
        triplet=losses.build("triplet", margin=margin, mining="random" if mining == "given" else mining),
        reconstruction=losses.build("reconstruction", kind=reconstruction_kind, reduction=reconstruction_reduction),
        kl=losses.build("kl", reduction=kl_reduction),
        mean=data.mean, std=data.std, supervised=supervised, label_smoothing=label_smoothing,
    )  # fmt: skip
    chosen_optimizer = muon_adamw(model, lr=lr, only_adamw=model.parameters() if optimizer == "adamw" else ())
    if schedule == "cosine":
        scheduler: Any = warmup_cosine(chosen_optimizer, steps, warmup=min(100, run.steps(batches)))
    else:
        scheduler = StepLR(chosen_optimizer, step_size=max(1, steps // 3), gamma=0.3)
    evaluate = Evaluation(train_size=eval_size, transfer_to=transfer_to, transfer_features=transfer_features)
    for epoch in run.fit(model, batches, epochs=epochs, optimizer=chosen_optimizer, schedule=scheduler, clip=1.0, ema=0.99):
        if epoch.due(eval_every):
            with run.autocast():
                epoch.log(*evaluate(model, data, last=epoch.number == epochs))
    for name, figure in figures(model, data, seed=run.seed).items():
        run.figure(name, figure)
    modules = {"backbone": backbone, "classifier": classifier, "decoder": decoder}
    run.save(**{name: module for name, module in modules.items() if module is not None})
