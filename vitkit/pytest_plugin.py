"""The conformance kit under pytest: one test for each check of a component.

    @pytest.mark.vitkit("my-package")
    def test_contract(vitkit_check):
        vitkit_check()

The mark takes what `vitkit check` takes: a distribution, a registered name or DISTRIBUTION:NAME, with `kind` and the
component's own arguments by keyword. pytest loads this file in every session, so it imports vitkit only for tests that use it.
"""

from collections.abc import Callable

import pytest

MARK = "vitkit(name, kind=None, **arguments): the components that the fixture vitkit_check checks, by distribution or by name"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARK)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "vitkit_check" not in metafunc.fixturenames:
        return
    from vitkit.testing import CHECKS, find

    marks = list(metafunc.definition.iter_markers("vitkit"))
    if not marks:
        raise pytest.UsageError(f"{metafunc.definition.name} uses vitkit_check for no component; add @pytest.mark.vitkit('my-package')")
    cases = [case for mark in marks for case in find(*mark.args, **mark.kwargs)]
    pairs = [(case, check) for case in cases for check in CHECKS[case.kind]]
    names = [f"{case.kind}-{case.name}-{check}" for case, check in pairs]
    metafunc.parametrize("vitkit_check", pairs, indirect=True, ids=names)


@pytest.fixture
def vitkit_check(request: pytest.FixtureRequest) -> Callable[[], None]:
    """A function that runs one check of one component, and fails with the check's message."""
    from vitkit.testing import ConformanceError, examine

    case, check = request.param

    def run() -> None:
        (result,) = examine(case, [check])
        if result.problem:
            raise ConformanceError(result.problem)

    return run
