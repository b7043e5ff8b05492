"""The Hugging Face Hub: push, pull and load. Nothing that comes from it is executed."""

from vitkit.hub.client import Plan, Pushed, is_repo, load, plan, pull, push, resolve

__all__ = ["Plan", "Pushed", "is_repo", "load", "plan", "pull", "push", "resolve"]
