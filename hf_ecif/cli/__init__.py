"""The commands of ``hf-ecif``, one module each, without logic: each is a call of the library."""
