"""Training: the run that a recipe uses, its loop, optimisers, schedules and teachers."""

from vitkit.training.ema import ModelEma
from vitkit.training.epoch import Epoch
from vitkit.training.gradcache import Accumulated, GradCache, GradCacheable
from vitkit.training.optim import ChainedOptimizer, adamw, muon_adamw, warmup_cosine
from vitkit.training.recipe import Recipe, parse_arguments
from vitkit.training.run import Run
from vitkit.training.schedules import Schedule, constant, cosine, linear
from vitkit.training.session import Session
from vitkit.training.teacher import MomentumTeacher

__all__ = [
    "Accumulated",
    "ChainedOptimizer",
    "Epoch",
    "GradCache",
    "GradCacheable",
    "ModelEma",
    "MomentumTeacher",
    "Recipe",
    "Run",
    "Schedule",
    "Session",
    "adamw",
    "constant",
    "cosine",
    "linear",
    "muon_adamw",
    "parse_arguments",
    "warmup_cosine",
]
