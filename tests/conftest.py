"""What every test run ends with: how many tests were left out, and how to get them."""

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The last lines: a count and the reasons, which say what to install."""
    skipped = terminalreporter.stats.get("skipped", [])
    if not skipped:
        return
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    terminalreporter.write_line(f"{len(skipped)} tests were skipped on this machine:")
    for reason, n in reasons.most_common():
        terminalreporter.write_line(f"  {n} × {reason}")
