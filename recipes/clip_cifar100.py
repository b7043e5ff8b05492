"""CLIP on pairs of CIFAR-100 images: two images side by side, and the caption that says what stands left and right.

Trained with a contrastive loss in which equal captions are each other's positives, then asked for the caption of a test
pair among all 10,000, and for the pair of a caption.
"""

from typing import Annotated, Literal

from vitkit import Run, backbones, evaluators, heads, losses, parse_arguments
from vitkit.errors import UsageError, VitkitError
from vitkit.training import adamw, muon_adamw, warmup_cosine
from vitkit.transforms import ColorJitter, Compose, CutMix, HorizontalFlip, MixUp, RandAugment, RandomAffine, RandomCrop
from vitkit.validation import at_least
from vitkit_clip import CLIP, GradCache, Pairs, captions, vocabulary_of

PRESETS = {
    "baseline": {
        "epochs": 4, "eval_every": 1, "batch_size": 32, "augment": "none", "classify": 0.0, "ema": 0.998, "optimizer": "adamw",
        "warmup": 2.0,
    },
    "enhanced": {
        "epochs": 5, "eval_every": 1, "batch_size": 128, "augment": "crop", "classify": 1.0, "ema": 0.99, "optimizer": "muon",
        "warmup": 0.5,
    },
    "best": {
        "epochs": 10, "eval_every": 2, "batch_size": 128, "augment": "crop", "classify": 1.0, "ema": 0.998, "optimizer": "muon",
        "warmup": 2.0,
    },
    "digits": {
        "epochs": 20, "eval_every": 5, "batch_size": 64, "augment": "shift", "classify": 1.0, "ema": 0.98, "optimizer": "muon",
        "warmup": 2.0,
    },
}  # fmt: skip
LEARNING_RATES = {"muon": 4e-3, "adamw": 1e-3}
UNTEMPERED = ("siglip", "margin_triplet")  # SigLIP always learns its temperature, a margin has none
SMALL = {"stem": [32, 64], "depth": 2, "num_heads": 2, "mlp_dim": 128}
AUGMENTS = {
    "none": None,
    "seed": Compose([HorizontalFlip(), RandomAffine(degrees=10), ColorJitter(0.2, 0.2, 0.2)]),
    "crop": Compose([RandomCrop(4), HorizontalFlip()]),
    "shift": RandomAffine(degrees=10, translate=0.1, scale=(0.9, 1.1)),
    "rand": Compose([RandomCrop(4), HorizontalFlip(), RandAugment()]),
}
MIXES = {"none": None, "mixup": MixUp(0.8, same_class=True), "cutmix": CutMix(1.0, same_class=True)}
SEED_DOCUMENT = {
    "seed document: baseline": {"i2t_top1": 0.0024, "i2t_top10": 0.0169, "i2t_top100": 0.1097},
    "seed document: hoped for": {"i2t_top1": 0.05, "i2t_top10": 0.25, "i2t_top100": 0.60},
}


def main(
    run: Run,
    dataset: Annotated[str, "cifar100, digits, ...; auto: cifar100, or digits where it cannot be had"] = "auto",
    dataset_arg: Annotated[list[str], "an argument of that dataset as NAME=VALUE, e.g. urls=...; may be repeated"] = [],
    preset: Annotated[
        Literal["auto", "baseline", "enhanced", "best"],
        "the image tower and the flags not given; auto: best, small for digits",
    ] = "auto",
    epochs: Annotated[int | None, "passes over the training images (baseline 4, enhanced 5, best 10, digits 20)"] = None,
    batch_size: Annotated[int | None, "pairs a step (128, baseline 32, digits 64)"] = None,
    optimizer: Annotated[Literal["muon", "adamw"] | None, "Muon beside AdamW, or AdamW alone (baseline)"] = None,
    lr: Annotated[float | None, "peak learning rate, falling to a hundredth (Muon 4e-3, AdamW 1e-3)"] = None,
    weight_decay: Annotated[float, "of matrices; biases, norms and single vectors are spared"] = 0.01,
    warmup: Annotated[float | None, "epochs of warm-up, or parts of one (2, enhanced 0.5)"] = None,
    patience: Annotated[int, "evaluations without a better i2t_top1 that end training"] = 5,
    ema: Annotated[
        float | None, "decay of the averaged weights that are evaluated and saved (0.998, enhanced 0.99, digits 0.98)"
    ] = None,
    text: Annotated[
        str,
        "the text tower: text_transformer, any registered backbone with encode_text, or auto: openclip_text where it can be had",
    ] = "text_transformer",
    freeze_text: Annotated[bool, "leave the text tower as it was built"] = False,
    loss: Annotated[str, "info_nce, siglip, hard_negative_nce, focal_nce or margin_triplet"] = "info_nce",
    temperature: Annotated[Literal["fixed", "learned"], "0.07, or learned from there on"] = "fixed",
    caption_positives: Annotated[bool, "pairs with the same caption are each other's positives"] = True,
    classify: Annotated[float | None, "weight of classifying each half beside the contrastive loss (best 1)"] = None,
    label_smoothing: Annotated[float, "of that classification"] = 0.1,
    different: Annotated[float, "probability that the second image is of another class"] = 0.5,
    augment: Annotated[Literal["none", "seed", "crop", "shift", "rand"] | None, "of training images"] = None,
    augment_pair: Annotated[
        Literal["half", "stacked"], "each half on its own, or the pair as one image (its flip misleads)"
    ] = "half",
    mix: Annotated[
        Literal["none", "mixup", "cutmix"], "of halves of the same class, so that captions stay true"
    ] = "none",
    chunk: Annotated[int | None, "pairs in memory at a time: a gradient cache, for large batches"] = None,
    proj_dim: Annotated[int, "dimensions of the space in which pairs and captions meet"] = 256,
    train_size: Annotated[int | None, "train on so many images only, for a quick trial"] = None,
    eval_every: Annotated[int | None, "epochs between evaluations (best 2, baseline and enhanced 1, digits 5)"] = None,
) -> None:
    """Train both towers, evaluate retrieval over all captions, save them with their projectors."""
    data = run.dataset(dataset, default="cifar100", **parse_arguments(dataset_arg))
    small = data.name == "digits"
    name = "best" if preset == "auto" else preset
    base = PRESETS["digits" if small and preset == "auto" else name]
    given = {
        "epochs": epochs, "batch_size": batch_size, "augment": augment, "classify": classify, "eval_every": eval_every,
        "ema": ema, "optimizer": optimizer, "warmup": warmup,
    }  # fmt: skip
    chosen = base | {key: value for key, value in given.items() if value is not None}
    lr = LEARNING_RATES[chosen["optimizer"]] if lr is None else lr
    at_least(1, eval_every=chosen["eval_every"])
    if not chosen["warmup"] >= 0:
        raise UsageError(f"--warmup {chosen['warmup']}: expected epochs, 0 or more")
    if temperature == "learned" and loss in UNTEMPERED:
        raise UsageError(f"--temperature learned: the loss {loss} has none to learn as a flag; leave it out, or take info_nce")
    run.resolved(preset=name, **chosen, lr=lr)
    epochs, batch_size, classify, warmup = (chosen[key] for key in ("epochs", "batch_size", "classify", "warmup"))
    size = 16 if small else 32
    data = data.resized(size)
    train = data.train if train_size is None else data.train.stratified_subset(train_size, seed=run.seed)
    pairs = Pairs(
        train, data.classes, batch_size, different=different, augment=AUGMENTS[chosen["augment"]],
        augment_pair=augment_pair, mixing=MIXES[mix], drop_last=True,
    )  # fmt: skip

    said = captions(data.classes)
    small_tower = SMALL if small and preset == "auto" else {}
    backbone = backbones.build("pair_vit", img_size=size, in_chans=data.shape[0], preset=name, **small_tower)
    arguments = {"vocabulary": vocabulary_of(said), "embed_dim": 128, "depth": 1, "num_heads": 2}
    words = None
    if text == "auto":
        text = "text_transformer"
        try:
            words, text = backbones.build("openclip_text"), "openclip_text"
        except VitkitError as error:
            run.say(f"{error}; text_transformer, trained from scratch, runs instead")
    if words is None:
        words = backbones.build(text, **(arguments if text == "text_transformer" else {}))
    if not hasattr(words, "encode_text"):
        raise UsageError(
            f"--text {text}: that backbone has no encode_text; take text_transformer or another text tower"
        )
    if freeze_text:
        words.requires_grad_(False)
    frozen = not any(parameter.requires_grad for parameter in words.parameters())
    run.resolved(text_encoder=f"{text}, {'frozen' if frozen else 'trained'}")
    run.say(f"text encoder: {text}, {'frozen' if frozen else 'trained'}")
    projector = heads.build("linear", in_dim=backbone.embed_dim, out_dim=proj_dim)
    text_projector = heads.build("linear", in_dim=words.embed_dim, out_dim=proj_dim)
    tempered = {} if loss in UNTEMPERED else {"temperature": 0.07, "learned": temperature == "learned"}
    classifier = None
    if classify:
        classifier = heads.build("linear", in_dim=backbone.embed_dim, out_dim=len(data.classes))
        objective = losses.build(
            "pair_multi_task", contrastive=loss, weight=classify, label_smoothing=label_smoothing, arguments=tempered
        )
    else:
        objective = losses.build(loss, **tempered)
    model = CLIP(
        backbone, words, projector, text_projector, objective, said, classifier, caption_positives=caption_positives
    )
    trained = model if chunk is None else GradCache(model, chunk)
    matrices = muon_adamw if chosen["optimizer"] == "muon" else adamw
    stepped = matrices(trained, lr=lr, weight_decay=weight_decay)
    warm = round(min(warmup, epochs) * run.steps(pairs))
    schedule = warmup_cosine(stepped, run.steps(pairs, epochs), warmup=warm, floor=0.01)

    if data.name == "cifar100":
        for label, lines in SEED_DOCUMENT.items():
            run.reference(label, **lines)
    evaluate = evaluators.build("pair_retrieval")
    fit = run.fit(
        trained, pairs, epochs=epochs, optimizer=stepped, schedule=schedule, clip=1.0, ema=chosen["ema"], monitor="i2t_top1",
        patience=patience,
    )  # fmt: skip
    for epoch in fit:
        if epoch.due(chosen["eval_every"]):
            with run.autocast():
                epoch.log(evaluate(model, data))
    run.save(
        backbone=backbone, text=words, projector=projector, text_projector=text_projector, loss=objective,
        **({"half_classifier": classifier} if classifier is not None else {}),
    )  # fmt: skip
