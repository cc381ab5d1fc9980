"""A browser for those who need one; slow files first; and, at the end, how many tests were left out, and why."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser for the tests of one file."""
    from browser import opened

    with opened(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The last lines: a count and the reasons, which say what to install."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    terminalreporter.write_line(f"{len(skipped)} tests were skipped on this machine:")
    for reason, n in reasons.most_common():
        terminalreporter.write_line(f"  {n} × {reason}")
