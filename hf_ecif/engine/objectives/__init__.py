"""Contrastive losses of a batch of embeddings: values, derivatives, and both roles of a pair.

Pure functions of normalised embeddings; nothing here knows models or data. Two modules,
`infonce` (CLIP) and `sigmoid` (SigLIP), offer the same functions; `Contrastive` lists them.
"""

from hf_ecif.engine.objectives import infonce, sigmoid
from hf_ecif.engine.objectives.contrastive import Contrastive
from hf_ecif.engine.objectives.linearised import LinearisedLoss
from hf_ecif.engine.objectives.similarity import Embeddings, RoleForm, Roles

__all__ = ["Contrastive", "Embeddings", "LinearisedLoss", "RoleForm", "Roles", "infonce", "sigmoid"]
