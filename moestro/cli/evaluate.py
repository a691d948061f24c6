"""`moestro evaluate RUN`: bits per byte on held-out text."""

import json
from pathlib import Path

import typer


def evaluate(
    run: Path = typer.Argument(help="A run folder, a checkpoint or an imported model."),
    data: list[str] = typer.Option(
        None, "--data", help="Files or folders to evaluate on instead of the run's held-out text."
    ),
    length: int = typer.Option(0, help="Tokens per window; 0 takes the run's train.length, or 512."),
    precision: str = typer.Option("fp32", help="fp32, bf16 or auto."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Measure a model on held-out text: bits per byte, and experts per token by kind of token."""
    from moestro.train.evaluate_run import evaluate_run

    found = evaluate_run(run, list(data or []), length, precision)
    if as_json:
        print(json.dumps(found.as_dict()))
        return
    print(f"bits per byte        {found.bits_per_byte:.4f}")
    print(f"loss per token       {found.loss:.4f} nats over {found.tokens} tokens, {found.text_bytes:.0f} bytes")
    if found.mean_experts:
        print(f"experts per token    {found.mean_experts:.3f}, busiest {found.busiest_over_mean:.2f} times the mean")
        for name, mean in found.mean_experts_per_class.items():
            print(f"  {name:18s} {mean:.3f}   ({found.share_per_class[name]:.1%} of tokens)")
