"""The format of a run directory: its files, its history, its summary and its settings. Nothing trains here.

Importing it imports no torch, so that the command line and readers of runs start quickly.
"""

from vitkit.runs.directory import BEST, LAST, Claim, claim, fresh, newest_unfinished, read_summary, status_of
from vitkit.runs.history import History
from vitkit.runs.settings import FREE, ONE_WAY, SETTINGS, Setting, requested
from vitkit.runs.summary import RunSummary, processor, validate_summary, versions

__all__ = [
    "BEST",
    "FREE",
    "LAST",
    "ONE_WAY",
    "SETTINGS",
    "Claim",
    "History",
    "RunSummary",
    "Setting",
    "claim",
    "fresh",
    "newest_unfinished",
    "processor",
    "read_summary",
    "requested",
    "status_of",
    "validate_summary",
    "versions",
]
