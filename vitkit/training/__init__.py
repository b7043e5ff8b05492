"""Training: the run that a recipe talks to, its loop, optimisers and schedules."""

from vitkit.training.ema import ModelEma
from vitkit.training.gradcache import Accumulated, GradCache, GradCacheable
from vitkit.training.loop import Epoch
from vitkit.training.optim import ChainedOptimizer, adamw, muon_adamw, warmup_cosine
from vitkit.training.recipe import Recipe, parse_arguments
from vitkit.training.run import Run

__all__ = [
    "Accumulated",
    "ChainedOptimizer",
    "Epoch",
    "GradCache",
    "GradCacheable",
    "ModelEma",
    "Recipe",
    "Run",
    "adamw",
    "muon_adamw",
    "parse_arguments",
    "warmup_cosine",
]
