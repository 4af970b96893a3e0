"""The Gradio app: overview, review, trace, what if, run and publish, one module per tab."""
