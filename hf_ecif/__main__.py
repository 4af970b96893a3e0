"""``python -m hf_ecif``: the command ``hf-ecif``."""

from hf_ecif.cli.main import main

main()
