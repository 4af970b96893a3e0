"""Puts the demo's model and data into the wheel; all else stands in pyproject.toml."""

from pathlib import Path
from shutil import copy2, copytree

from setuptools import setup
from setuptools.command.build_py import build_py

EMBEDDED = ("NOTICE", "audit", "data", "model")  # of spaces_demo


class BuildWithDemo(build_py):
    """Packages, and beside them ``hf_ecif/demo``, which a checkout has as ``spaces_demo``."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "hf_ecif", "demo")
        target.mkdir(parents=True, exist_ok=True)
        for name in EMBEDDED:
            source = Path("spaces_demo", name)
            if source.is_dir():
                copytree(source, target / name, dirs_exist_ok=True)
            else:
                copy2(source, target)


setup(cmdclass={"build_py": BuildWithDemo})
