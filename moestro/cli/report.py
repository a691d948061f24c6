"""`moestro report RUN`: make the run's report again."""

from pathlib import Path

import typer


def report(run: Path = typer.Argument(help="The out folder of moestro train.")) -> None:
    """Write RUN/report.html from the run's logs; works while it trains, too."""
    from moestro.train.report import write_report
    from moestro.train.run_folder import RunFolder

    folder = RunFolder(run)
    folder.load_recipe()  # a clear error where there is no run
    print(write_report(folder))
