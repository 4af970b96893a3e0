"""Which image-text pairs help a CLIP-like model, and which hurt it.

    from hf_ecif import InfluenceConfig, InfluenceModel, add_columns, clean, detect

See `hf_ecif.influence.model.InfluenceModel` for the way through the library, and
`hf_ecif.applications.audit` for the whole of it in one call.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hf_ecif.version import __version__

_PUBLIC = {
    "AuditRequest": "applications.audit",
    "CleanRequest": "applications.clean",
    "CleanResult": "data.cleaning",
    "Detection": "detection.detect",
    "FitRequest": "applications.fit",
    "InfluenceCallback": "influence.callback",
    "Influence": "influence.influence",
    "InfluenceConfig": "config",
    "InfluenceModel": "influence.model",
    "Query": "influence.queries",
    "RemoveRequest": "applications.remove",
    "ScoreRequest": "applications.score",
    "Scorer": "influence.scorer",
    "UserError": "errors",
    "ValidateRequest": "applications.validate",
    "ValueRequest": "applications.value",
    "add_columns": "detection.annotate",
    "clean": "data.cleaning",
    "detect": "detection.detect",
    "find_errors": "applications.tracing",
    "find_evidence": "detection.suggestions",
    "load_rows": "data.loading",
    "plant_pairs": "detection.injection",
    "push": "hub.push",
    "push_model": "hub.push",
    "removal_curves": "applications.valuation",
    "removal_orders": "applications.valuation",
    "retrieval_margin": "influence.queries",
    "run_audit": "applications.audit",
    "run_clean": "applications.clean",
    "run_fit": "applications.fit",
    "run_remove": "applications.remove",
    "run_score": "applications.score",
    "run_validate": "applications.validate",
    "run_value": "applications.value",
    "trace": "applications.tracing",
    "validate": "applications.validation",
    "value_additions": "applications.valuation",
    "value_by_slice": "applications.valuation",
    "witness_errors": "detection.signals",
    "witnesses_of": "detection.signals",
    "write_report": "reports.audit",
    "write_shards": "data.parquet",
    "zero_shot": "influence.queries",
}

__all__ = [*sorted(_PUBLIC), "__version__"]


def __getattr__(name: str) -> Any:
    """Import on first use: torch and transformers take seconds that ``--help`` does not need."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_ecif' has no attribute {name!r}")
    return getattr(import_module(f"hf_ecif.{_PUBLIC[name]}"), name)
