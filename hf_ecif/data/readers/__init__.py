"""Readers: one small module for each form in which people keep image-text pairs.

`find.open_source` looks at what a name stands for and opens it. What `datasets` can read, it reads;
what is here joins files to data sets: shards by a pattern, captions beside their pictures, paths
that are relative to the table that holds them.
"""
