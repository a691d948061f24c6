"""`moestro doctor`: what this machine offers and which fast paths are active."""

import json

import typer


def doctor(as_json: bool = typer.Option(False, "--json", help="Print one JSON object.")) -> None:
    """Show devices, precisions, torch operations and which fast path is active, and why."""
    from moestro.train.doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps({finding.name: {"state": finding.state, "why": finding.why} for finding in findings}))
        return
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.name:{width}s}  {finding.state}" + (f"  ({finding.why})" if finding.why else ""))
