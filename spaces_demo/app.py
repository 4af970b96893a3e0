"""The demo as a Gradio Space: the app of hf_ecif on the audit that lies beside this file.

python spaces_demo/app.py     # or: hf-ecif demo
"""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp

from hf_ecif.app.app import launch, make_app
from hf_ecif.app.desk import state_folder
from hf_ecif.app.embedded import open_embedded

if __name__ == "__main__":  # an audit's own process reads this file, too
    folder = Path(mkdtemp(prefix="hf-ecif-demo-"))
    open_embedded(folder, Path(__file__).parent)
    demo = make_app(str(folder), keep=state_folder() / "reviews")
    launch(demo)
