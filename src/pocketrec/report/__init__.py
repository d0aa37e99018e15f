"""What came of a study: tables, figures and one page, from the records of its folder alone; nothing is trained here.

Example:
    >>> from pocketrec import report
    >>> report.write("results/smoke").page  # doctest: +SKIP
    PosixPath('results/smoke/report/index.html')
"""

from pocketrec.report.writer import ReportFiles, write

__all__ = ["ReportFiles", "write"]
