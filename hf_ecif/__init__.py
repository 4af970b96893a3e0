"""Which image-text pairs help a CLIP-like model, which hurt it, and which are wrong.

    import hf_ecif

    audit = hf_ecif.audit("openai/clip-vit-base-patch32", pairs, query=clean_pairs)
    audit.dataset                # all pairs, with their influence and a probability of being wrong
    audit.report()               # figures and galleries, in a notebook
    cleaned = audit.clean()      # .kept and .removed
    cleaned.push_to_hub("me/pairs-clean")

`audit` starts here; `InfluenceModel` is the way to single steps. The packages go one way: utils,
data, reports, hub, engine, influence, detection, applications, app, cli.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_ecif.version import __version__

if TYPE_CHECKING:  # torch and transformers take seconds, which ``--help`` does not need
    from hf_ecif.applications.audit import audit as audit
    from hf_ecif.applications.result import Audit as Audit
    from hf_ecif.applications.result import Cleaned as Cleaned
    from hf_ecif.applications.result import load_audit as load_audit
    from hf_ecif.applications.trace import trace as trace
    from hf_ecif.applications.tracing import find_errors as find_errors
    from hf_ecif.applications.validation import validate as validate
    from hf_ecif.applications.value import value as value
    from hf_ecif.config import DetectionConfig as DetectionConfig
    from hf_ecif.config import InfluenceConfig as InfluenceConfig
    from hf_ecif.data.cleaning import clean as clean
    from hf_ecif.data.demo import Demo as Demo
    from hf_ecif.data.demo import load_demo as load_demo
    from hf_ecif.data.loading import load_rows as load_rows
    from hf_ecif.data.summary import Summary as Summary
    from hf_ecif.detection.auditor import Auditor as Auditor
    from hf_ecif.errors import UserError as UserError
    from hf_ecif.hub.push import push as push
    from hf_ecif.influence.callback import InfluenceCallback as InfluenceCallback
    from hf_ecif.influence.influence import Influence as Influence
    from hf_ecif.influence.model import InfluenceModel as InfluenceModel
    from hf_ecif.influence.queries import Query as Query
    from hf_ecif.influence.queries import retrieval_margin as retrieval_margin
    from hf_ecif.influence.queries import zero_shot as zero_shot
    from hf_ecif.influence.scorer import Scorer as Scorer

_PUBLIC = {
    "Audit": "applications.result",
    "Auditor": "detection.auditor",
    "Cleaned": "applications.result",
    "Demo": "data.demo",
    "DetectionConfig": "config",
    "Influence": "influence.influence",
    "InfluenceCallback": "influence.callback",
    "InfluenceConfig": "config",
    "InfluenceModel": "influence.model",
    "Query": "influence.queries",
    "Scorer": "influence.scorer",
    "Summary": "data.summary",
    "UserError": "errors",
    "audit": "applications.audit",
    "clean": "data.cleaning",
    "find_errors": "applications.tracing",
    "load_audit": "applications.result",
    "load_demo": "data.demo",
    "load_rows": "data.loading",
    "push": "hub.push",
    "retrieval_margin": "influence.queries",
    "trace": "applications.trace",
    "validate": "applications.validation",
    "value": "applications.value",
    "zero_shot": "influence.queries",
}
_MOVED = {  # public in 0.1, and to be imported from their modules since
    "AuditRequest": "applications.requests",
    "CleanRequest": "applications.requests",
    "CleanResult": "data.cleaning",
    "Detection": "detection.detect",
    "FitRequest": "applications.requests",
    "RemoveRequest": "applications.requests",
    "ScoreRequest": "applications.requests",
    "ValidateRequest": "applications.requests",
    "ValueRequest": "applications.requests",
    "add_columns": "detection.annotate",
    "detect": "detection.detect",
    "find_evidence": "detection.suggestions",
    "push_model": "hub.push",
    "removal_curves": "applications.valuation",
    "removal_orders": "applications.valuation",
    "run_audit": "applications.audit",
    "run_clean": "applications.clean",
    "run_fit": "applications.fit",
    "run_remove": "applications.remove",
    "run_score": "applications.score",
    "run_validate": "applications.validate",
    "run_value": "applications.value",
    "value_additions": "applications.valuation",
    "value_by_slice": "applications.valuation",
    "witness_errors": "detection.signals",
    "write_report": "reports.audit",
    "write_shards": "data.parquet",
}

_RENAMED = {"witness_errors": "signal_errors"}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Import on first use."""
    if name in _MOVED:
        module = f"hf_ecif.{_MOVED[name]}"
        now = _RENAMED.get(name, name)
        warnings.warn(
            f"hf_ecif.{name} is removed in the next version: import {now} from {module}",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(import_module(module), now)
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_ecif' has no attribute {name!r}")
    return getattr(import_module(f"hf_ecif.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
