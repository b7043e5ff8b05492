"""Fine-tune a classifier: from any saved model, from timm/NAME, or from scratch, on any labelled dataset or imported folder.

The checkpoint is chosen on the validation images. The test images then say which accuracy to believe, and the report shows it for each
class, with the mistakes that the classifier is surest of. `vitkit predict`, `eval`, `export`, `attend` and `push` take the result.
"""

from typing import Annotated, Literal

from vitkit import Component, Run, evaluators
from vitkit.contracts import Dataset
from vitkit.training import adamw, muon_adamw, warmup_cosine
from vitkit.transforms import ColorJitter, Compose, CutMix, HorizontalFlip, Mix, MixUp, RandomAffine, RandomResizedCrop
from vitkit.validation import at_least
from vitkit_eval import believable
from vitkit_finetune import classifier_on, mistake_figures, start_from, training_images

DATASET = "cifar10"
AUGMENTS = {
    "none": None, "shift": RandomAffine(degrees=10, translate=0.1, scale=(0.9, 1.1)),
    "photo": Compose([RandomResizedCrop(scale=(0.4, 1.0)), HorizontalFlip(), ColorJitter(0.2, 0.2, 0.2)]),
}  # fmt: skip
MIXES = {"none": None, "mixup": MixUp(0.8), "cutmix": CutMix(1.0), "both": Mix()}


def main(
    run: Run,
    data: Dataset,
    *,
    model: Annotated[str, "a directory that a run saved into, a registered backbone such as timm/NAME, a Hub repository, or none"] = "none",
    weights: Annotated[str, "of a registered backbone: auto (the published ones), none, or a file"] = "auto",
    tune: Annotated[Literal["linear", "partial", "full"], "train the classifier, also the last blocks, or everything"] = "full",
    blocks: Annotated[int, "number of last blocks that --tune partial trains"] = 2,
    epochs: Annotated[int | None, "passes over the images  [default: 1,500 steps, 5 to 60 epochs]"] = None,
    batch_size: Annotated[int, "images per step"] = 32,
    optimizer: Annotated[Literal["muon", "adamw"], "Muon with AdamW, or AdamW alone"] = "muon",
    lr: Annotated[float | None, "peak learning rate  [default: 2e-3; AdamW or --tune linear 1e-3; from scratch 4e-3]"] = None,
    layer_decay: Annotated[float | None, "factor of the rate from a block to the one before it  [default: 0.75; from scratch 1]"] = None,
    weight_decay: Annotated[float, "weight decay of matrices (biases, norms, vectors: none)"] = 0.05,
    augment: Annotated[Literal["auto", "photo", "shift", "none"], "auto: photo for colour images, shift for grey ones"] = "auto",
    mix: Annotated[Literal["none", "mixup", "cutmix", "both"], "mixing of images and labels; for many epochs or images"] = "none",
    label_smoothing: Annotated[float, "share of the label's probability that all classes get"] = 0.1,
    label_fraction: Annotated[float, "share of the labelled training images that is used"] = 1.0,
    train_size: Annotated[int | None, "number of labelled training images that is used  [default: all]"] = None,
    img_size: Annotated[int | None, "side of an image; not for a saved model  [default: the backbone's, or the data's]"] = None,
    backbone: Annotated[Component, "the network that --model none trains"] = Component(
        "backbone", "vitkit:vit", embed_dim=192, depth=6, num_heads=3, dropout=0.0, drop_path=0.1, pool="mean"),
    patience: Annotated[int, "stop after this many evaluations without a better val_accuracy_top1"] = 10,
    eval_every: Annotated[int, "epochs between evaluations"] = 1,
) -> None:
    """Train, keep the checkpoint that is best on validation images, and say what its accuracy on test images is worth."""
    at_least(1, eval_every=eval_every)
    network, data, origin = start_from(model, data, weights=weights, img_size=img_size, scratch=backbone)
    train = training_images(data, label_fraction=label_fraction, train_size=train_size, seed=run.seed)
    run.say(f"start: {origin}; {len(train):,} labelled training images of {len(data.classes)} classes")
    augment = ("photo" if data.shape[0] == 3 else "shift") if augment == "auto" else augment
    batches = train.batches(batch_size, shuffle=True, augment=AUGMENTS[augment], mix=MIXES[mix])
    epochs = min(max(round(1500 / run.steps(batches)), 5), 60) if epochs is None else epochs
    classifier = classifier_on(network, data, tune=tune, blocks=blocks, smoothing=label_smoothing)
    decay = layer_decay if layer_decay is not None else None if model == "none" else 0.75
    rate = lr if lr is not None else 1e-3 if optimizer == "adamw" or tune == "linear" else 4e-3 if model == "none" else 2e-3
    stepped = (muon_adamw if optimizer == "muon" else adamw)(classifier, lr=rate, weight_decay=weight_decay, layer_decay=decay)
    steps = run.steps(batches, epochs)
    schedule = warmup_cosine(stepped, steps, warmup=steps // 10)
    accuracy, by_class = evaluators.build("vitkit:accuracy"), evaluators.build("vitkit:class_accuracy")
    accuracy.check(data, "val")
    for epoch in run.fit(classifier, batches, epochs=epochs, optimizer=stepped, schedule=schedule, clip=1.0,
                         monitor="val_accuracy_top1", patience=patience):  # fmt: skip
        if epoch.due(eval_every):
            epoch.evaluate(classifier, data, accuracy, split="val")
    best = run.load_best(classifier)
    scores = run.evaluate(classifier, data, accuracy, by_class, note=f"weights of epoch {best}, the best on validation images")
    run.save(classifier)
    for name, figure in mistake_figures(classifier, data).items():
        run.figure(name, figure)
    run.say(believable(scores.figures["class_accuracy"], chosen_on=len(data.val)))
