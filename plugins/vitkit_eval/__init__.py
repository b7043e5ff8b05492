"""Evaluators of frozen features: a linear probe and nearest neighbours."""

from vitkit_eval.features import (
    Features,
    confusion_matrix,
    evaluating,
    extract_features,
    frozen_features,
    topk_accuracy,
)
from vitkit_eval.knn import KNN
from vitkit_eval.linear import LinearProbe, fit_logistic

__all__ = [
    "KNN",
    "Features",
    "LinearProbe",
    "confusion_matrix",
    "evaluating",
    "extract_features",
    "fit_logistic",
    "frozen_features",
    "topk_accuracy",
]
