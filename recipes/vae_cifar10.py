"""The multi-task variational autoencoder on CIFAR-10: a vision transformer with a convolutional stem and 64 tokens.

It differs from `vae_mnist.py` in its images: they have colours, and they are mirrored and moved. RandAugment and mixing of images
in pairs are optional.
"""

from typing import Annotated, Any, Literal

from vitkit import Component, Run
from vitkit.contracts import Dataset
from vitkit.transforms import Compose, HorizontalFlip, Mix, RandAugment, RandomCrop
from vitkit.validation import at_least
from vitkit_vae import VAE_ALIASES, MultiTaskVAE, TripletBatches, figures, scheduled, vae_evaluators

DATASET = "cifar10"
ALIASES = VAE_ALIASES
PRESETS = {"default": {}, "long": {"epochs": 100, "embed_dim": 192, "depth": 9, "num_heads": 3}, "digits": {"epochs": 60, "img_size": 16}}


def main(
    run: Run,
    data: Dataset,
    *,
    epochs: Annotated[int, "passes over the training images"] = 12,
    batch_size: Annotated[int, "images per step"] = 128,
    lr: Annotated[float, "peak learning rate"] = 4e-3,
    optimizer: Annotated[Literal["muon", "adamw"], "Muon with AdamW, or AdamW alone"] = "muon",
    schedule: Annotated[Literal["cosine", "step"], "learning rate: cosine falls to 0; step: × 0.3 after each third"] = "cosine",
    img_size: Annotated[int, "side of an image in pixels"] = 32,
    patch_size: Annotated[int, "side of a patch in pixels"] = 4,
    embed_dim: Annotated[int, "width of the encoder"] = 128,
    depth: Annotated[int, "number of transformer blocks"] = 4,
    num_heads: Annotated[int, "number of attention heads"] = 2,
    encoder: Annotated[Component, "encoder, or its --backbone"] = Component("backbone", "vitkit:vae_encoder", stem="conv", latent_dim=64),
    triplet: Annotated[float, "weight of the triplet loss"] = 1.0,
    classification: Annotated[float, "weight of the cross-entropy; 0: no classifier"] = 0.5,
    reconstruction: Annotated[float, "weight of the reconstruction; 0: no decoder"] = 1.0,
    kl: Annotated[float, "weight of the KL divergence"] = 0.01,
    kl_warmup: Annotated[float, "share of the training in which the KL weight grows from 0"] = 0.2,
    loss: Annotated[Component, "sums the weighted losses"] = Component("loss", "vitkit:multitask", mode="fixed"),
    triplet_loss: Annotated[Component, "mines and compares triplets"] = Component("loss", "vitkit:triplet", margin=0.2, mining="semi_hard"),
    reconstruction_loss: Annotated[Component, "pixel loss"] = Component("loss", "vitkit:reconstruction", kind="mse", reduction="pixel"),
    kl_loss: Annotated[Component, "regularises latents"] = Component("loss", "vitkit:kl", reduction="dimension"),
    views: Annotated[int, "augmented views per image; all but the first are only positives"] = 1,
    supervised: Annotated[bool, "use labels; no-supervised needs --views 2 or more and has no classifier"] = True,
    randaugment: Annotated[int, "magnitude of RandAugment, 0 (none) to 30"] = 0,
    mix: Annotated[float, "share of the images that MixUp or CutMix mixes in pairs"] = 0.0,
    label_smoothing: Annotated[float, "label smoothing of the cross-entropy"] = 0.1,
    conditional: Annotated[bool, "give the class to the decoder"] = False,
    train_size: Annotated[int | None, "number of training images, for a quick trial  [default: all]"] = None,
    transfer: Annotated[Component, "measures the encoder on another dataset"] = Component("evaluator", "vitkit:patch_transfer", dataset=""),
    eval_every: Annotated[int, "epochs between evaluations"] = 5,
    eval_size: Annotated[int | None, "number of training images that evaluators use  [default: all]"] = None,
) -> None:
    """Train, evaluate every few epochs, and save the encoder with its classifier and decoder."""
    at_least(1, eval_every=eval_every)
    data = data.resized(img_size)
    train = data.train if train_size is None else data.train.stratified_subset(train_size, seed=run.seed)
    moves = [RandomCrop(4)] if data.name == "digits" else [HorizontalFlip(), RandomCrop(4)]
    augment = Compose([*moves, RandAugment(magnitude=randaugment)] if randaugment else moves)
    batches: Any = train.batches(batch_size, shuffle=True, drop_last=True, augment=augment, views=views, mix=Mix(p=mix) if mix else None)
    if triplet_loss.kwargs.get("mining") == "given":
        batches = TripletBatches(train, batch_size, augment=augment)
    steps, epoch_steps = run.steps(batches, epochs), run.steps(batches)
    model = MultiTaskVAE.build(
        data, encoder=encoder, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads, loss=loss,
        triplet=triplet_loss, reconstruction=reconstruction_loss, kl=kl_loss, steps=steps, kl_warmup=kl_warmup, supervised=supervised,
        weights={"classification": classification, "triplet": triplet, "reconstruction": reconstruction, "kl": kl},
        conditional=conditional, label_smoothing=label_smoothing,
    )  # fmt: skip
    stepped, rates = scheduled(model, lr=lr, optimizer=optimizer, schedule=schedule, steps=steps, epoch_steps=epoch_steps)
    every, at_last = (run.check(data, *group) for group in vae_evaluators(model, train_size=eval_size, transfer=transfer))
    for epoch in run.fit(model, batches, epochs=epochs, optimizer=stepped, schedule=rates, clip=1.0, ema=0.99):
        if epoch.due(eval_every):
            epoch.evaluate(model, data, *every, *(at_last if epoch.number == epochs else []))
    run.save(model)
    for name, figure in figures(model, data, seed=run.seed).items():
        run.figure(name, figure)
