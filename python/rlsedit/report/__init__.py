"""What the commands show: tables, progress bars and plots."""

from rlsedit.report.console import Console, ProgressBar
from rlsedit.report.tables import estimate, markdown_table, seconds, table

__all__ = ["Console", "ProgressBar", "estimate", "markdown_table", "seconds", "table"]
