"""Models in: from any checkpoint that people have to a checked dual encoder and its processor.

`load_model` looks at the files of a folder or of a repository, says what they are, and either loads
them or says in one sentence what would work instead. Nothing that comes with a model is executed:
weights are read from safetensors or by torch's ``weights_only``, and code of its own is refused.
"""
