"""CLIP on pairs of CIFAR-100 images: two images side by side, and the caption that names the classes left and right.

The contrastive loss treats pairs with equal captions as positives. The model then retrieves the caption of a pair among all 10,000,
and the pairs of a caption. The best checkpoint and the end of the training are chosen on validation pairs.
"""

from typing import Annotated, Literal

from vitkit import Component, Run, evaluators
from vitkit.contracts import Dataset
from vitkit.training import adamw, muon_adamw, warmup_cosine
from vitkit.validation import at_least
from vitkit_clip import AUGMENTS, MIXES, GradCache, Pairs, build_clip

DATASET = "cifar100"
PRESETS = {
    "best": {},
    "enhanced": {"tower": "enhanced", "epochs": 5, "eval_every": 1, "ema": 0.99, "warmup": 0.5},
    "baseline": {"tower": "baseline", "epochs": 4, "eval_every": 1, "batch_size": 32, "augment": "none", "classify": 0.0,
                 "optimizer": "adamw"},
    "digits": {"tower": "small", "epochs": 20, "eval_every": 5, "batch_size": 64, "augment": "shift", "ema": 0.98},
}  # fmt: skip
ALIASES = {"augment": {"seed": "reference"}, "temperature": {"fixed": "", "learned": "loss.learned=true"}}
REFERENCE = {"reference document: baseline": {"i2t_top1": 0.0024, "i2t_top10": 0.0169, "i2t_top100": 0.1097},
             "reference document: goal": {"i2t_top1": 0.05, "i2t_top10": 0.25, "i2t_top100": 0.60}}  # fmt: skip


def main(
    run: Run,
    data: Dataset,
    *,
    epochs: Annotated[int, "passes over the training images"] = 10,
    batch_size: Annotated[int, "pairs per step"] = 128,
    optimizer: Annotated[Literal["muon", "adamw"], "Muon with AdamW, or AdamW alone"] = "muon",
    lr: Annotated[float | None, "peak learning rate; it falls to 1 % of the peak  [default: Muon 4e-3, AdamW 1e-3]"] = None,
    weight_decay: Annotated[float, "weight decay of matrices (biases, norms, vectors: none)"] = 0.01,
    warmup: Annotated[float, "epochs in which the learning rate rises, e.g. 0.5"] = 2.0,
    patience: Annotated[int, "stop after this many evaluations without a better val_i2t_top1"] = 5,
    ema: Annotated[float, "decay of the averaged weights that are evaluated and saved"] = 0.998,
    tower: Annotated[Literal["baseline", "enhanced", "best", "small"], "image tower: a preset of the backbone pair_vit"] = "best",
    backbone: Annotated[Component, "image tower; any but pair_vit encodes each half by itself"] = Component("backbone", "vitkit:pair_vit"),
    text: Annotated[Component, "text tower; auto: openclip_text if available"] = Component("backbone", "vitkit:text_transformer"),
    freeze_text: Annotated[bool, "do not train the text tower"] = False,
    loss: Annotated[Component, "compares pairs with captions"] = Component("loss", "vitkit:info_nce", temperature=0.07),
    caption_positives: Annotated[bool, "treat pairs with equal captions as positives"] = True,
    classify: Annotated[float, "weight of the loss that classifies each half"] = 1.0,
    label_smoothing: Annotated[float, "label smoothing of this classification loss"] = 0.1,
    different: Annotated[float, "probability that both images differ in class"] = 0.5,
    augment: Annotated[Literal["none", "reference", "crop", "shift", "rand"], "augmentation of training images"] = "crop",
    augment_pair: Annotated[
        Literal["half", "stacked"], "augment each half, or the pair as one image (its flip exchanges left and right)"
    ] = "half",
    mix: Annotated[Literal["none", "mixup", "cutmix"], "mixing of halves of the same class (captions stay true)"] = "none",
    chunk: Annotated[int | None, "pairs in memory at a time (gradient cache)  [default: all]"] = None,
    proj_dim: Annotated[int, "dimensions of the space shared by pairs and captions"] = 256,
    train_size: Annotated[int | None, "number of training images, for a quick trial  [default: all]"] = None,
    eval_every: Annotated[int, "epochs between evaluations"] = 2,
) -> None:
    """Train both towers, evaluate retrieval over all captions, and save them with their projectors."""
    at_least(1, eval_every=eval_every)
    at_least(0, warmup=warmup)
    data = data.resized(16 if data.name == "digits" else 32)
    train = data.train if train_size is None else data.train.stratified_subset(train_size, seed=run.seed)
    pairs = Pairs(train, data.classes, batch_size, different=different, augment=AUGMENTS[augment], augment_pair=augment_pair,
                  mixing=MIXES[mix], drop_last=True)  # fmt: skip
    model = build_clip(data, tower=tower, backbone=backbone, text=text, loss=loss, proj_dim=proj_dim, classify=classify,
                       label_smoothing=label_smoothing, freeze_text=freeze_text, caption_positives=caption_positives, say=run.say)
    trained = model if chunk is None else GradCache(model, chunk)
    lr = {"muon": 4e-3, "adamw": 1e-3}[optimizer] if lr is None else lr
    stepped = (muon_adamw if optimizer == "muon" else adamw)(trained, lr=lr, weight_decay=weight_decay)
    schedule = warmup_cosine(stepped, run.steps(pairs, epochs), warmup=round(min(warmup, epochs) * run.steps(pairs)), floor=0.01)
    for label, lines in REFERENCE.items() if data.name == "cifar100" else ():
        run.reference(label, **lines)
    evaluate = evaluators.build("vitkit:pair_retrieval")
    evaluate.check(data, "val")  # before the training, whose end depends on it
    for epoch in run.fit(trained, pairs, epochs=epochs, optimizer=stepped, schedule=schedule, clip=1.0, ema=ema,
                         monitor="val_i2t_top1", patience=patience):  # fmt: skip
        if epoch.due(eval_every):
            epoch.evaluate(model, data, evaluate, split="val")
            epoch.evaluate(model, data, evaluate)
    run.save(model)
