"""A pytest plugin: a fixture of several tests that fails is reported once; the others are skipped.

Without it a failing session fixture fails hundreds of tests with the same text. The run fails all
the same, by the first of them.
"""

from collections.abc import Generator
from pathlib import Path

import pytest

# The test whose set-up raised an error first. pytest keeps the error of a fixture that several
# tests
# share, and raises that very object again for each of them.
_first_tests: dict[BaseException, str] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Report a test as skipped if the error of its set-up was reported before."""
    report = yield
    if call.when == "setup" and report.outcome == "failed" and call.excinfo is not None:
        first = _first_tests.setdefault(call.excinfo.value, item.nodeid)
        if first != item.nodeid:
            report.outcome = "skipped"
            # Of one place, so that the summary counts them in one line.
            report.longrepr = (
                str(Path(__file__)),
                1,
                f"a fixture failed, see the error of {first}",
            )
    return report
