"""Pieces of pages."""

from hf_ecif.reports.html import code


def test_names_of_arguments_are_code_and_nothing_is_markup() -> None:
    text = "`batch_size=1` of <b>pairs</b> & `<i>`, and a ` alone"
    assert code(text) == (
        "<code>batch_size=1</code> of &lt;b&gt;pairs&lt;/b&gt; &amp; <code>&lt;i&gt;</code>, "
        "and a ` alone"
    )
