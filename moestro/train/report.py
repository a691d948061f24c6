"""placeholder, replaced below"""

from pathlib import Path

from moestro.train.run_folder import RunFolder


def write_report(folder: RunFolder) -> Path:
    """Write report.html."""
    return folder.report
