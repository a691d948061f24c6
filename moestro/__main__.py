"""`python -m moestro` is the same as `moestro`; torchrun starts it so."""

from moestro.cli.main import main

main()
