"""`moestro export RUN OUT`: one of our models becomes a Hugging Face folder."""

from pathlib import Path

import typer


def export_model(
    run: Path = typer.Argument(help="A run folder, a checkpoint or an imported model."),
    out: Path = typer.Argument(help="The Hugging Face folder to make; an existing one is never overwritten."),
    family: str = typer.Option(
        None, help="mixtral, olmoe, qwen3_moe, deepseek_v3, llama or qwen3; else the one the model's shape belongs to."
    ),
    dtype: str = typer.Option(None, help="fp32, bf16 or fp16; else as it was imported, or fp32."),
    context: int = typer.Option(
        None, min=1, help="max_position_embeddings; else the original's, the run's train.length, or 4096."
    ),
    shard_gb: float = typer.Option(5.0, min=1e-6, help="Largest weight file in GB."),
) -> None:
    """Write a folder that transformers loads to the same logits, whole or not at all."""
    from moestro.train.export_folder import export_folder

    report = export_folder(run, out, family=family, dtype=dtype, context=context, shard_bytes=int(shard_gb * 1e9))
    for line in report.lines():
        print(line)
    print(f"model: {out}")
