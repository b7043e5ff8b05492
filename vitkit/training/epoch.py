"""One epoch that has been trained, as `run.fit` yields it."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from vitkit.contracts import Evaluator, Scores, SplitName
from vitkit.errors import UsageError
from vitkit.models.features import feature_cache
from vitkit.runs.history import check_metric_names
from vitkit.training.session import Session
from vitkit.validation import at_least


class Epoch:
    """One trained epoch.

    `number` counts from 1, `step` is the number of optimiser steps so far, and `losses` holds the epoch's mean loss and its parts.
    """

    def __init__(self, session: Session, number: int, epochs: int, step: int, losses: dict[str, float]) -> None:
        self._session = session
        self.number, self.epochs, self.step, self.losses = number, epochs, step, losses
        self.logged: dict[str, float] = {}

    def due(self, every: int) -> bool:
        """True every `every` epochs and after the last one. Raises `UsageError` for `every` below 1."""
        at_least(1, eval_every=every)
        return self.number % every == 0 or self.number == self.epochs

    def log(self, *scores: Mapping[str, float], **values: float) -> None:
        """Write metrics into this epoch's row of `metrics.csv`; `Scores` also bring protocols and figures.

        Raises `UsageError` for the name of a column that the runner writes.
        """
        check_metric_names(name for score in (*scores, values) for name in score)
        for score in scores:
            self.logged |= {name: float(value) for name, value in score.items()}
            if isinstance(score, Scores):
                self._session.history.add_scores(score)
        self.logged |= {name: float(value) for name, value in values.items()}
        self._session.log_metrics({"epoch": self.number, "step": self.step, "loss": self.losses.get("loss")}, self.logged)

    def evaluate(self, model: nn.Module, data: Any, *evaluators: Evaluator, split: SplitName = "test") -> Scores:
        """Call evaluators on a split of `data`, log their scores and return them joined.

        They compute in the run's precision, and features of the same images are computed once for all of them. If an evaluator
        raises `UsageError`, because the data does not suit it, a line reports that and the training continues without its scores.
        """
        scores = measure(self._session, model, data, evaluators, split)
        if scores:
            self.log(scores)
        return scores


def measure(session: Session, model: nn.Module, data: Any, evaluators: Iterable[Evaluator], split: SplitName) -> Scores:
    """The joined scores of evaluators, see `Epoch.evaluate`; nothing is logged."""
    scores = Scores()
    with session.autocast(), feature_cache():
        for evaluator in evaluators:
            try:
                scores |= evaluator(model, data) if split == "test" else evaluator(model, data, split=split)
            except UsageError as error:
                session.say_left_out(evaluator, error)
    return scores


__all__ = ["Epoch", "measure"]
