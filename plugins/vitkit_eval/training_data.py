"""The dataset that a saved model was trained on."""

from collections.abc import Mapping
from typing import Any

from vitkit import data
from vitkit.errors import UsageError, printable, shell_command
from vitkit.training import parse_arguments


def training_data(model: Any, run: str) -> data.ImageDataset:
    """The dataset that the model saved in `run` was trained on, built again by its recorded name.

    A config is not trusted, so no path or address that it records is opened; a dataset with such arguments has to be named with
    --dataset. A name can stand for other data than in training (a folder called `digits`, renamed class folders):
    classes and labels are compared with the recorded digest, or with the model's classes where an earlier version recorded none.

    Raises `UsageError` if the model has no recorded dataset, a recorded argument is a text, or the dataset differs. Other
    errors are those of `vitkit.data.build`.
    """
    name, record = model.config.get("dataset"), model.config.get("data")
    if not isinstance(name, str):
        raise UsageError(f"{run} does not name the dataset that it was trained on; name one with --dataset")
    record = record if isinstance(record, Mapping) else _earlier_record(model.config.get("arguments"))
    asked, arguments = record.get("asked"), record.get("arguments")
    asked = name if asked in (None, "auto") else str(asked)
    arguments = dict(arguments) if isinstance(arguments, Mapping) else {}
    if not all(isinstance(value, int | float) for value in arguments.values()):
        words = [word for key, value in arguments.items() for word in ("--dataset-arg", f"{key}={value}")]
        raise UsageError(
            f"the model in {run} was trained on {printable(name)}, a dataset with arguments that a saved model does not choose; "
            f"name it: {shell_command('--dataset', asked, *words)}"
        )
    dataset = data.build(asked, **arguments)
    digest = record.get("digest")
    same = dataset.classes == model.classes if digest is None else dataset.digest == digest
    if not same:
        raise UsageError(
            f"the dataset {printable(asked)} is not the one that the model in {run} was trained on: classes or labels differ; "
            f"name a dataset with --dataset, and its arguments with --dataset-arg"
        )
    return dataset


def _earlier_record(arguments: Any) -> dict[str, Any]:
    """The name and arguments of the dataset among a recipe's flags, which is all that earlier versions recorded."""
    flags = arguments if isinstance(arguments, Mapping) else {}
    given = flags.get("dataset_arg")
    return {"asked": flags.get("dataset"), "arguments": parse_arguments(given) if isinstance(given, list) else {}}
