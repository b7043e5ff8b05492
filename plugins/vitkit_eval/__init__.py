"""Evaluators of frozen features, and of a model's own classifier."""

from vitkit_eval.accuracy import Accuracy, own_logits
from vitkit_eval.class_accuracy import ClassAccuracy, believable
from vitkit_eval.collapse import AlphaReQ, FeatureStd, LiDAR, RankMe
from vitkit_eval.features import (
    FeatureEvaluator,
    FrozenProbe,
    check_labels,
    classification,
    confusion_matrix,
    frozen_features,
    model_classes,
    named,
    split_of,
)
from vitkit_eval.few_shot import FewShot
from vitkit_eval.knn import KNN
from vitkit_eval.linear import LinearProbe, fit_logistic
from vitkit_eval.neighbours import Neighbours
from vitkit_eval.object_attention import ObjectAttention
from vitkit_eval.ranking import Ranking, nearest_items, rank_relevant
from vitkit_eval.retrieval import retrieval_scores
from vitkit_eval.silhouette import Silhouette
from vitkit_eval.ties import places, share_in_top, topk_accuracy
from vitkit_eval.training_data import training_data
from vitkit_eval.transfer import Transfer, adapted

__all__ = [
    "KNN",
    "Accuracy",
    "AlphaReQ",
    "ClassAccuracy",
    "FeatureEvaluator",
    "FeatureStd",
    "FewShot",
    "FrozenProbe",
    "LiDAR",
    "LinearProbe",
    "Neighbours",
    "ObjectAttention",
    "RankMe",
    "Ranking",
    "Silhouette",
    "Transfer",
    "adapted",
    "believable",
    "check_labels",
    "classification",
    "confusion_matrix",
    "fit_logistic",
    "frozen_features",
    "model_classes",
    "named",
    "nearest_items",
    "own_logits",
    "places",
    "rank_relevant",
    "retrieval_scores",
    "share_in_top",
    "split_of",
    "topk_accuracy",
    "training_data",
]
