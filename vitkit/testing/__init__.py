"""The conformance kit: checks of the contracts that registered components follow.

    from vitkit.testing import check_head
    check_head(MyHead, in_dim=8, out_dim=3)            # raises ConformanceError with every check that fails

`vitkit check NAME` runs the same checks on the command line. Under pytest each check is a test:

    @pytest.mark.vitkit("my-package")                  # a distribution, or a registered name
    def test_contract(vitkit_check):
        vitkit_check()

`vitkit.contracts` describes how a component declares the small example that is checked.
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
