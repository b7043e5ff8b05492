"""The format of a run directory: its files, its history and its summary. Nothing trains here."""

from vitkit.runs.directory import BEST, LAST, Claim, claim, fresh, newest_unfinished, read_summary
from vitkit.runs.history import History
from vitkit.runs.settings import FREE, ONE_WAY, SETTINGS, Setting, requested
from vitkit.runs.summary import processor, versions

__all__ = [
    "BEST",
    "FREE",
    "LAST",
    "ONE_WAY",
    "SETTINGS",
    "Claim",
    "History",
    "Setting",
    "claim",
    "fresh",
    "newest_unfinished",
    "processor",
    "read_summary",
    "requested",
    "versions",
]
