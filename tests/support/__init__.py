"""What tests share: places, families of tiny models, a local Hub."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "spaces_demo"
