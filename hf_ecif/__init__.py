"""Which image-text pairs help a CLIP-like model, and which hurt it.

    from hf_ecif import InfluenceConfig, InfluenceModel, add_columns, clean, detect

See `hf_ecif.influence.InfluenceModel` for the way through the library, and `hf_ecif.audit` for the
whole of it in one call.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hf_ecif.version import __version__

_PUBLIC = {
    "AuditRequest": "audit",
    "CleanRequest": "cleaning",
    "CleanResult": "cleaning",
    "Detection": "detection",
    "FitRequest": "endless",
    "InfluenceCallback": "callback",
    "InfluenceConfig": "config",
    "InfluenceModel": "influence",
    "Query": "queries",
    "RemoveRequest": "applications.remove",
    "ScoreRequest": "endless",
    "Scorer": "scorer",
    "UserError": "errors",
    "ValidateRequest": "applications.validate",
    "ValueRequest": "applications.value",
    "add_columns": "columns",
    "clean": "cleaning",
    "detect": "detection",
    "find_errors": "tracing",
    "find_evidence": "evidence",
    "load_rows": "data",
    "push": "hub",
    "push_model": "hub",
    "removal_curves": "valuation",
    "removal_orders": "valuation",
    "retrieval_margin": "queries",
    "run_audit": "audit",
    "run_clean": "cleaning",
    "run_fit": "endless",
    "run_remove": "applications.remove",
    "run_score": "endless",
    "run_validate": "applications.validate",
    "run_value": "applications.value",
    "trace": "tracing",
    "validate": "validation",
    "value_additions": "valuation",
    "value_by_slice": "valuation",
    "witness_errors": "witnesses",
    "write_report": "report",
    "write_shards": "cleaning",
    "zero_shot": "queries",
}

__all__ = [*sorted(_PUBLIC), "__version__"]


def __getattr__(name: str) -> Any:
    """Import on first use: torch and transformers take seconds that ``--help`` does not need."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_ecif' has no attribute {name!r}")
    return getattr(import_module(f"hf_ecif.{_PUBLIC[name]}"), name)
