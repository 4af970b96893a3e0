"""How the app looks: paper and ink, one blue and one orange, system fonts, light and dark."""

from __future__ import annotations

import gradio as gr
from gradio.themes.utils import sizes

_BLUE = gr.themes.Color(
    c50="#eef4f7",
    c100="#d8e6ed",
    c200="#b5cfdc",
    c300="#8fb6c9",
    c400="#6fa3c0",
    c500="#4a7a96",
    c600="#3f6a83",
    c700="#345870",
    c800="#2a475b",
    c900="#203747",
    c950="#16262f",
)
_SANS = ("system-ui", "-apple-system", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif")
_MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")


def make_theme() -> gr.themes.Base:
    """The theme; it loads no font from elsewhere."""
    return gr.themes.Base(
        primary_hue=_BLUE,
        secondary_hue=_BLUE,
        neutral_hue=gr.themes.colors.stone,
        radius_size=sizes.radius_md,
        font=_SANS,
        font_mono=_MONO,
    ).set(
        body_background_fill="#faf8f3",
        body_background_fill_dark="#14171a",
        body_text_color="#1d2329",
        body_text_color_dark="#e9e6e0",
        body_text_color_subdued="#5c6671",
        body_text_color_subdued_dark="#a2abb4",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1c2024",
        block_border_color="#e1ddd3",
        block_border_color_dark="#343b42",
        block_label_text_color="#5c6671",
        block_label_text_color_dark="#a2abb4",
        button_primary_background_fill="#3f6a83",
        button_primary_background_fill_hover="#345870",
        button_primary_background_fill_dark="#3f6a83",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
    )
