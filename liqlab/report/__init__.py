"""The report: a notebook of the workbench, run on a feed, as one HTML page that needs nothing else."""

from liqlab.report.cells import (
    ReportError,
    Summary,
    account_table,
    changes,
    check,
    configuration,
    family_table,
    headline,
    notebook,
    sample_feed,
    share_table,
    since,
    summary,
    versions,
    with_parameters,
)
from liqlab.report.dated import Kept, keep
from liqlab.report.execute import Report, check_parameters, run
from liqlab.report.page import to_html

__all__ = [
    "Kept",
    "Report",
    "ReportError",
    "Summary",
    "account_table",
    "changes",
    "check",
    "check_parameters",
    "configuration",
    "family_table",
    "headline",
    "keep",
    "notebook",
    "run",
    "sample_feed",
    "share_table",
    "since",
    "summary",
    "to_html",
    "versions",
    "with_parameters",
]
