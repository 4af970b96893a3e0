"""Theme of the app: paper and ink, one blue and one orange, system fonts, light and dark."""

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
    """Theme of the app, which loads no font from the network."""
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
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_dark="#1c2024",
        button_secondary_background_fill_hover="#eef4f7",
        button_secondary_background_fill_hover_dark="#203747",
        button_secondary_border_color="#cfcabd",
        button_secondary_border_color_dark="#48515a",
        button_secondary_border_color_hover="#4a7a96",
        button_secondary_border_color_hover_dark="#6fa3c0",
        button_secondary_text_color="#1d2329",
        button_secondary_text_color_dark="#e9e6e0",
        button_border_width="1px",
        button_large_padding="8px 16px",
        button_large_text_size="0.95rem",
        button_large_text_weight="500",
        button_small_text_size="0.9rem",
        button_small_text_weight="500",
        button_small_padding="6px 12px",
        checkbox_label_background_fill="#ffffff",
        checkbox_label_background_fill_dark="#1c2024",
        checkbox_label_background_fill_selected="#eef4f7",
        checkbox_label_background_fill_selected_dark="#203747",
        checkbox_label_border_width="1px",
        checkbox_label_padding="5px 10px",
        input_background_fill="#faf8f3",
        input_background_fill_dark="#14171a",
        button_primary_background_fill="#3f6a83",
        button_primary_background_fill_hover="#345870",
        button_primary_background_fill_dark="#3f6a83",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
    )
