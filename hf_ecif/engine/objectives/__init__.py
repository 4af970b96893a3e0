"""Contrastive losses of a batch of embeddings: values, derivatives, and both roles of a pair.

Pure tensor functions of normalised embeddings; nothing here knows of data. Two modules, `infonce`
(CLIP) and `sigmoid` (SigLIP), have the functions that `Contrastive` lists, and `register` adds
another loss: nothing outside this package asks which loss it is.
"""

from hf_ecif.engine.objectives import infonce, sigmoid
from hf_ecif.engine.objectives.contrastive import Contrastive, loss_of, register
from hf_ecif.engine.objectives.linearised import LinearisedLoss
from hf_ecif.engine.objectives.similarity import Embeddings, RoleForm, Roles

__all__ = [
    "Contrastive",
    "Embeddings",
    "LinearisedLoss",
    "RoleForm",
    "Roles",
    "infonce",
    "loss_of",
    "register",
    "sigmoid",
]
