"""`moestro import HF_FOLDER OUT`: a Hugging Face model becomes one of ours."""

from pathlib import Path

import typer


def import_model(
    folder: Path = typer.Argument(
        help="A Hugging Face folder: Mixtral, OLMoE, Qwen3-MoE, DeepSeek-V3, Llama or Qwen3 in safetensors."
    ),
    out: Path = typer.Argument(help="The model folder to make; an existing one is never overwritten."),
    tokenizer: Path = typer.Option(None, help="A tokenizer.json to take instead of the folder's."),
    leave_out: list[str] = typer.Option(
        None, help="Name or pattern of a tensor or setting that may stay behind; may be given often, and is reported."
    ),
    experts: int = typer.Option(0, min=0, help="Upcycle a dense model: copy every feed-forward to this many experts."),
    k: int = typer.Option(2, help="Upcycling: experts per token."),
    rule: str = typer.Option(
        "topk",
        help="Upcycling: topk, or gap, which has the dense model's output until its budget falls below two experts.",
    ),
    recipe: Path = typer.Option(None, help="Also write a recipe that goes on training this model."),
) -> None:
    """Read another project's model; every tensor is used and every parameter filled, or nothing is made."""
    from moestro.nn.families.upcycle import Upcycle
    from moestro.train.import_folder import import_folder

    upcycle = Upcycle(num_experts=experts, k=k, rule=rule) if experts else None
    report = import_folder(folder, out, leave_out=leave_out or (), tokenizer=tokenizer, upcycle=upcycle, recipe=recipe)
    for line in report.lines():
        print(line)
    if recipe:
        print(f"recipe: {recipe}; train on with: moestro train {recipe}")
    print(f"model: {out}; try it with: moestro generate {out}")
