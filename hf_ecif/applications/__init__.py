"""Tasks on top of the engine, one module each: from sources to files."""
