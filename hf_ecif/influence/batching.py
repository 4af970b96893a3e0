"""Rows into contrastive batches, as a config asks: for training, for a query, and for scoring."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_ecif.config import InfluenceConfig
from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.objective import Objective, random_batches
from hf_ecif.influence.queries import ContrastiveLoss, Query, Several, Target
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import Pass
from hf_ecif.utils.seeds import derive, stream

AnyQuery = Rows | Query


def training_objective(
    encoder: DualEncoder, rows: Rows, config: InfluenceConfig, seed: int
) -> Objective:
    """Contrastive loss of training rows, held near the model as given by the config's ``l2``."""
    return Objective(
        encoder,
        rows.features,
        random_batches(len(rows), config.batch_size, stream(seed, "training batches")),
        false_negatives(rows, config),
        config.l2,
        encoder.theta,
    )


def query_target(
    encoder: DualEncoder,
    query: AnyQuery | Sequence[AnyQuery],
    config: InfluenceConfig,
) -> Target:
    """Target of the scores: the quantity whose change they predict; of rows, their loss.

    Its batches do not depend on what else is asked.
    """
    if isinstance(query, Query):
        return query
    if isinstance(query, Rows):
        batches = random_batches(len(query), config.batch_size, stream(config.seed, "query"))
        same = false_negatives(query, config)
        return ContrastiveLoss(Objective(encoder, query.features, batches, same))
    return Several([query_target(encoder, one, config) for one in query])


def scoring_pass(rows: Rows, config: InfluenceConfig) -> Pass:
    """How rows meet in the batches that they are scored in."""
    return Pass(
        config.batch_size,
        config.partitions,
        derive(config.seed, "scoring"),
        false_negatives(rows, config),
        config.role,
        config.tangents,
    )


def false_negatives(rows: Rows, config: InfluenceConfig) -> Tensor | None:
    """``(n, 2)``; rows that agree in a column are no negatives of each other. None if all are."""
    return rows.siblings if config.mask_repeated else None
