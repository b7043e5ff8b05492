"""The Hugging Face Hub: push, pull and load. Nothing that comes from it is executed."""

from vitkit.hub.backbone import OpenedBackbone, open_backbone
from vitkit.hub.client import Plan, Pushed, is_repo, load, plan, pull, push, resolve

__all__ = ["OpenedBackbone", "Plan", "Pushed", "is_repo", "load", "open_backbone", "plan", "pull", "push", "resolve"]
