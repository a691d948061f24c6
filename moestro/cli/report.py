"""`moestro report RUN`: make the run's report again."""

from pathlib import Path

import typer


def report(run: Path = typer.Argument(help="The out folder of moestro train.")) -> None:
    """Write RUN/report.html from the run's logs, also while it trains; print where the time of several ranks went."""
    from moestro.train.rank_charts import balance_text, table
    from moestro.train.report import open_run, write_report
    from moestro.train.run_folder import RunFolder

    folder = RunFolder(run)
    folder.load_recipe()  # a clear error where there is no run
    print(write_report(folder))
    ranks = open_run(folder)
    for line in [*table(ranks), balance_text(ranks)]:
        if line:
            print(line)
