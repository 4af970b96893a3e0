"""What state an audit's folder is in, and what of it may be believed."""

import shutil
from pathlib import Path

import pytest

from hf_ecif.data.audit_folder import RESULTS, AuditFolder
from hf_ecif.data.loading import load_scored
from hf_ecif.errors import UserError
from hf_ecif.utils.files import CHECKPOINTS
from tests.support.hub.audits import write_audit


@pytest.fixture
def audit(tmp_path: Path) -> AuditFolder:
    """Twelve rows, of which two are flagged and one cannot be read."""
    return AuditFolder(write_audit(tmp_path / "audit", "birds"))


def test_finished(audit: AuditFolder) -> None:
    assert (audit.has_summary, audit.has_rows) == (True, True)
    assert (audit.is_interrupted, audit.is_cleaning) == (False, False)
    summary = audit.read_summary()
    assert (summary.rows, summary.kept, summary.removed) == (12, 9, 3)
    audit.check_counts(summary)
    assert (audit.count("scored"), audit.count("kept"), audit.count("removed")) == (12, 9, 3)
    rows = load_scored(audit, summary.columns)
    assert (len(rows), rows.features["image"].decode) == (12, False)
    assert audit.features("kept").keys() == rows.features.keys()


def test_by_its_rows(audit: AuditFolder) -> None:
    assert AuditFolder.around(audit.scored) == AuditFolder.around(audit.path) == audit


def test_interrupted(tmp_path: Path) -> None:
    (tmp_path / CHECKPOINTS).mkdir()
    audit = AuditFolder(tmp_path)
    assert audit.is_interrupted
    with pytest.raises(UserError, match=r"was interrupted. Finish it first"):
        audit.read_summary()


def test_old_results_count_until_they_are_replaced(audit: AuditFolder) -> None:
    (audit.path / CHECKPOINTS).mkdir()
    assert not audit.is_interrupted
    assert audit.read_summary().rows == 12


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished audit"):
        AuditFolder(tmp_path).read_summary()


def test_rows_that_changed_since(audit: AuditFolder) -> None:
    summary = audit.read_summary()
    with pytest.raises(UserError, match=r"has 12 rows kept and removed, but 13 were audited"):
        audit.check_counts(summary.replace(rows=13))
    shutil.rmtree(audit.path / "removed")
    with pytest.raises(UserError, match=r"removed has 0 rows, but the audit wrote 3"):
        audit.check_counts(summary)


def test_clearing_leaves_what_is_not_ours(audit: AuditFolder) -> None:
    (audit.path / "mine.txt").touch()
    (audit.path / ".kept.123.partial").mkdir()
    audit.clear()
    assert [path.name for path in audit.path.iterdir()] == ["mine.txt"]
    assert {path.name for path in (audit.summary, audit.report, audit.traces)} < {*RESULTS}
