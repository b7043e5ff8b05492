"""The report of a run: figures, and one self-contained page; runs compared on one page."""

import os

# The environment of another program, such as a notebook, may name a backend that is not installed here, and then matplotlib
# cannot be imported. Nothing here depends on a backend: every figure is drawn by Agg.
_backend = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib  # noqa: F401
finally:
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend

from vitkit.report.attention_sheet import AttendedPicture, attention_sheet  # noqa: E402
from vitkit.report.report import write_report  # noqa: E402
from vitkit.report.sheet import is_sheet, write_sheet  # noqa: E402

__all__ = ["AttendedPicture", "attention_sheet", "is_sheet", "write_report", "write_sheet"]
