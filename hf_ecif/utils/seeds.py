"""Named random streams: every use of chance has its own, so that no other one changes it.

A seed and a name give a stream. Streams of different names, numbers or seeds are independent, also
where seeds are neighbours; nothing has to know how many numbers another has drawn.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

Stream = Literal[
    "adapters",  # of the random factor of new LoRA adapters
    "checkpoints",  # of the partitions at each checkpoint of a response
    "chunks",  # of rows that are pushed together
    "clusters",  # of images
    "contexts",  # of batches that a candidate joins, or that candidates are mixed with
    "fit",  # of the batches of every step
    "index",  # of the queries that are mixed for a basis
    "injection",  # of captions that are exchanged
    "leverage",  # of rows whose leverage is measured
    "noisy products",  # of the batches of LiSSA
    "partitions",  # of rows into batches to be scored in
    "preconditioner",  # of its test vectors
    "probes",  # of norms and of the self-influence
    "query",  # of the batches of a query
    "retraining",  # of the seeds of repeated retrainings
    "sample",  # of rows, where a run reads or learns from some of them alone
    "scoring",  # of the chunks and partitions of a scoring pass
    "spectrum",  # of the probes of the trace
    "subsets",  # of rows, drawn at random
    "training batches",  # of the batches that the training objective is measured in
    "verified",  # of the half of a query that the detector learns right rows from
]


def derive(seed: int, name: Stream, number: int = 0) -> int:
    """The seed of a stream, in [0, 2^63).

    Args:
        seed: of the run.
        name: of the stream.
        number: of one of several alike.

    >>> derive(0, "fit") == derive(0, "fit"), derive(0, "fit") == derive(0, "query")
    (True, False)
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(*name.encode(), number))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def stream(seed: int, name: Stream, number: int = 0) -> torch.Generator:
    """A generator at the beginning of a stream, on the CPU; arguments are those of `derive`."""
    return torch.Generator().manual_seed(derive(seed, name, number))
