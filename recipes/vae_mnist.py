"""The multi-task variational autoencoder on MNIST: one latent that is embedded, classified and decoded.

A vision transformer with a convolutional stem maps an image to μ and σ², and a sample of that latent to an embedding. Triplets and
a classifier train the embedding; the reconstruction of the image and the KL divergence from N(0, I) train the latent.
"""

from typing import Annotated, Any, Literal

from vitkit import Component, Run
from vitkit.contracts import Dataset
from vitkit.transforms import Compose, HorizontalFlip, RandomAffine, RandomCrop
from vitkit.validation import at_least
from vitkit_vae import VAE_ALIASES, MultiTaskVAE, TripletBatches, figures, scheduled, vae_evaluators

DATASET = "mnist"
ALIASES = VAE_ALIASES
PRESETS = {"default": {}, "long": {"epochs": 14}, "digits": {"epochs": 60, "img_size": 16, "patch_size": 4}}


def main(
    run: Run,
    data: Dataset,
    *,
    epochs: Annotated[int, "passes over the training images"] = 4,
    batch_size: Annotated[int, "images per step"] = 128,
    lr: Annotated[float, "peak learning rate"] = 4e-3,
    optimizer: Annotated[Literal["muon", "adamw"], "Muon with AdamW, or AdamW alone"] = "muon",
    schedule: Annotated[Literal["cosine", "step"], "learning rate: cosine falls to 0; step: × 0.3 after each third"] = "cosine",
    img_size: Annotated[int, "side of an image in pixels; MNIST is padded to it"] = 32,
    patch_size: Annotated[int, "side of a patch in pixels"] = 8,
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
    moves = [RandomAffine(degrees=12, translate=0.08, scale=(0.88, 1.12), shear=8)]
    augment = Compose([HorizontalFlip(), RandomCrop(2)] if data.name == "fashion_mnist" else moves)
    batches: Any = train.batches(batch_size, shuffle=True, drop_last=True, augment=augment, views=views)
    if triplet_loss.kwargs.get("mining") == "given":
        batches = TripletBatches(train, batch_size, augment=augment)
    steps, epoch_steps = run.steps(batches, epochs), run.steps(batches)
    model = MultiTaskVAE.build(
        data, encoder=encoder, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads, kernel_size=2, loss=loss,
        triplet=triplet_loss, reconstruction=reconstruction_loss, kl=kl_loss, steps=steps, kl_warmup=kl_warmup, supervised=supervised,
        weights={"classification": classification, "triplet": triplet, "reconstruction": reconstruction, "kl": kl},
        conditional=conditional,
    )  # fmt: skip
    stepped, rates = scheduled(model, lr=lr, optimizer=optimizer, schedule=schedule, steps=steps, epoch_steps=epoch_steps)
    every, at_last = (run.check(data, *group) for group in vae_evaluators(model, train_size=eval_size, transfer=transfer))
    for epoch in run.fit(model, batches, epochs=epochs, optimizer=stepped, schedule=rates, clip=1.0, ema=0.99):
        if epoch.due(eval_every):
            epoch.evaluate(model, data, *every, *(at_last if epoch.number == epochs else []))
    run.save(model)
    for name, figure in figures(model, data, seed=run.seed).items():
        run.figure(name, figure)
