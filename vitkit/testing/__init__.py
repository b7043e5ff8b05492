"""The conformance kit: what every registered component must do, as checks with readable messages.

    from vitkit.testing import check_head
    check_head(MyHead, in_dim=8, out_dim=3)            # raises ConformanceError with every check that fails

From the shell the same is `vitkit check NAME`, and under pytest, one test a check:

    @pytest.mark.vitkit("my-package")                  # a distribution, or a registered name
    def test_contract(vitkit_check):
        vitkit_check()

How a component says which small example of itself is to be checked: `vitkit.contracts`.
"""

from vitkit.errors import ConformanceError
from vitkit.testing.cases import Case, find
from vitkit.testing.suite import (
    CHECKS,
    Result,
    check_backbone,
    check_dataset,
    check_evaluator,
    check_head,
    check_loss,
    examine,
)

__all__ = [
    "CHECKS",
    "Case",
    "ConformanceError",
    "Result",
    "check_backbone",
    "check_dataset",
    "check_evaluator",
    "check_head",
    "check_loss",
    "examine",
    "find",
]
