"""The Gradio app: see the flags, decide, trace, try, run, publish. One module a tab."""
