"""A reporter for tests: keeps what it is given, and shows no progress."""

from typing import Any

from tood_deploy.reporter import Reporter


class RecordingReporter(Reporter):
    """Keeps lines and tables in lists.

    Attributes:
        lines: of stderr, warnings with their "warning: ".
        results: lines of stdout.
        tables: what `table` was given.
    """

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(
            quiet, clock=lambda: 0.0
        )  # so that no time passes, and no line of progress comes
        self.lines: list[str] = []
        self.results: list[str] = []
        self.tables: list[Any] = []

    def _print(self, line: str) -> None:
        self.lines.append(line)

    def result(self, line: str) -> None:
        if not self.quiet:
            self.results.append(line)

    def table(self, table: Any) -> None:
        if not self.quiet:
            self.tables.append(table)
