"""`moestro generate RUN`: continue a text."""

import sys
from pathlib import Path

import typer


def generate(
    run: Path = typer.Argument(help="A run folder, a checkpoint or an imported model."),
    prompt: str = typer.Option("def ", help="The text to continue; - reads it from standard input."),
    tokens: int = typer.Option(200, min=1, help="Most tokens to add."),
    temperature: float = typer.Option(0.8, min=0.0, help="0 always takes the likeliest token."),
    top_k: int = typer.Option(50, min=0, help="Draw from this many best tokens; 0 from all."),
    seed: int = typer.Option(0, min=0, help="The same seed gives the same text."),
) -> None:
    """Continue a text with a trained model, printed as it comes."""
    from moestro.train.device import one_thread
    from moestro.train.samples import open_sampler

    sampler, text = open_sampler(run), sys.stdin.read() if prompt == "-" else prompt
    sys.stdout.write(text)
    with one_thread():
        for piece in sampler.stream(text, tokens, temperature=temperature, top_k=top_k, seed=seed):
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
