# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_ecif>=0.2"]
# ///
"""Audit a data set of the Hub and publish what is left of it, with the evidence beside it.

On a machine of yours, or as a job on the Hub:

    uv run audit.py me/pairs me/pairs-clean --model openai/clip-vit-base-patch32
    hf jobs uv run --flavor a10g-small --secrets HF_TOKEN audit.py me/pairs me/pairs-clean
"""

from __future__ import annotations

import argparse

import hf_ecif


def main() -> None:
    """Read the arguments, audit, publish, and print what was done."""
    parser = argparse.ArgumentParser(description="Audit a data set and publish what is left of it.")
    parser.add_argument("dataset", help="image-text pairs: owner/name")
    parser.add_argument("target", help="where to publish them: owner/name")
    parser.add_argument("--model", default="openai/clip-vit-base-patch32")
    parser.add_argument("--query", help="clean pairs like those that the model is for")
    parser.add_argument("--split", help="split of the data")
    parser.add_argument("--public", action="store_true", help="publish for everyone")
    asked = parser.parse_args()

    audit = hf_ecif.audit(asked.model, asked.dataset, asked.query, split=asked.split)
    print(audit)
    print(audit.push_to_hub(asked.target, private=not asked.public))


if __name__ == "__main__":
    main()
