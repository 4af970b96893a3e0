"""Publication of results on the Hub: a cleaned data set, or a model, with a card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from rich import filesize

from hf_ecif.data.audit_folder import AuditFolder
from hf_ecif.errors import UserError
from hf_ecif.hub.commits import MakeCard, Publication, Target, publish, retried
from hf_ecif.hub.dataset_repo import DatasetRepo
from hf_ecif.hub.markdown import hub_card, local_card
from hf_ecif.hub.model_card import (
    ModelKind,
    base_model,
    find_kind,
    model_files,
    read_facts,
    write_model_card,
)
from hf_ecif.utils.progress import ProgressFactory, silent
from hf_ecif.version import __version__


@dataclass(frozen=True)
class PushReport:
    """Result of a push, or of a dry run.

    Attributes:
        repo_id: repository.
        url: address of the pull request, if there is one, else of the repository.
        rows: number of rows by ``configuration/split``; empty for a model.
        publication: what changed, or would change.
        dry_run: whether nothing was changed.
    """

    repo_id: str
    url: str
    rows: dict[str, int]
    publication: Publication
    dry_run: bool

    def __str__(self) -> str:
        done = self.publication
        parts = [f"{name}: {count:,} rows" for name, count in self.rows.items()]
        changes = (
            f"{len(done.added)} files new or changed ({filesize.decimal(done.size)}), "
            f"{len(done.deleted)} deleted, {done.unchanged} unchanged"
        )
        if not done.added and not done.deleted:
            end = f"Nothing has changed: {self.url}"
        elif self.dry_run:
            end = f"Dry run: nothing was changed. It would be pushed to {self.url}"
        elif done.pull_request:
            end = f"Pull request: {self.url}"
        else:
            end = f"Pushed: {self.url}"
        return "\n".join([*parts, f"{changes}.", end])


def push(
    output: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    removed: bool = True,
    other_splits: bool = True,
    token: str | None = None,
    dry_run: bool = False,
    progress: ProgressFactory = silent,
) -> PushReport:
    """Publish what a command wrote: an audit as a cleaned data set, or a model folder.

    The kept rows of an audit become the default configuration, under the name of the audited split,
    and the removed rows the configuration `removed`, with their reasons and scores. The other
    splits of the source are published unchanged, and the card is merged into the source's. Pushing
    again replaces the earlier push; unchanged results make no commit. A folder from `clean` or from
    a review is published in the same way.

    Args:
        output: folder of an audit, or of its cleaning; any other folder goes to `push_model`.
        repo_id: ``owner/name``. The repository is made if it is missing.
        private: make it private; an existing repository must be private already.
        create_pr: open a pull request instead of changing the repository.
        revision: a branch, made if it is missing.
        removed: publish the removed rows, too.
        other_splits: publish the other splits of the source, too.
        token: token with write access; the user's login if absent. Neither shown nor stored.
        dry_run: report what would change, and change nothing.
        progress: makes progress bars.

    Returns:
        What changed, and where.

    Raises:
        UserError: the folder or the repository cannot be used, or the Hub keeps failing; the
            repository is unchanged then.
    """
    folder = Path(output).expanduser()
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Name the `output` of an earlier command.")
    audit = AuditFolder(folder)
    if audit.is_cleaning and not audit.has_summary:
        raise UserError(
            f"{folder} does not say how its rows were audited. Clean the folder of the audit, "
            "with its summary.json, and push the result."
        )
    if not audit.has_summary:
        if not (removed and other_splits):
            raise UserError(f"{folder} is no audit, so there are no rows to leave out.")
        return push_model(
            folder,
            repo_id,
            private=private,
            create_pr=create_pr,
            revision=revision,
            token=token,
            dry_run=dry_run,
            progress=progress,
        )
    target = _target(repo_id, "dataset", revision, create_pr, private)
    repo = DatasetRepo(folder)
    api = _log_in(target, token)
    with repo.publish_as(
        repo_id, removed=removed, other_splits=other_splits, token=token, progress=progress
    ) as (files, card):
        publication = publish(
            api,
            target,
            files,
            card,
            message=f"Clean {repo.split} with hf-ecif",
            dry_run=dry_run,
            progress=progress,
        )
    layout = card.layout
    rows = {f"default/{split}": count for split, count in layout.splits.items()}
    if layout.removed:
        rows[f"removed/{repo.split}"] = layout.removed
    return PushReport(repo_id, _url(api, target, publication), rows, publication, dry_run)


def push_model(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    progress: ProgressFactory = silent,
) -> PushReport:
    """Publish the folder of an edited model or of a fitted influence, with a card.

    Args:
        folder: folder of a model with `removal.json` or `influence_config.json`.
        repo_id: see `push`.
        private: see `push`.
        create_pr: see `push`.
        revision: see `push`.
        token: see `push`.
        dry_run: see `push`.
        progress: makes progress bars.

    Returns:
        What changed, and where.

    Raises:
        UserError: as for `push`, or some weights are not safetensors.
    """
    folder = Path(folder).expanduser()
    kind = find_kind(folder)
    if kind is None:
        raise UserError(
            f"{folder} holds nothing to push: neither a finished audit (summary.json), nor an "
            "edited model (removal.json), nor a fitted influence (influence_config.json). Run the "
            "command again that was to write it."
        )
    target = _target(repo_id, "model", revision, create_pr, private)
    files = model_files(folder)
    make_card = _model_card_maker(folder, repo_id, kind, token)
    api = _log_in(target, token)
    publication = publish(
        api,
        target,
        files,
        make_card,
        message=f"{kind.title} with hf-ecif",
        dry_run=dry_run,
        progress=progress,
    )
    return PushReport(repo_id, _url(api, target, publication), {}, publication, dry_run)


def _model_card_maker(folder: Path, repo_id: str, kind: ModelKind, token: str | None) -> MakeCard:
    """Function that makes the card from the one in the repository or the folder, or anew."""
    facts = read_facts(folder, kind)
    base = base_model(facts)

    def make_card(card: str | None) -> str:
        given = card if card is not None else local_card(str(folder))
        if base is None or given is not None:
            return write_model_card(given, repo_id, kind, facts)
        try:
            theirs = hub_card(base, "model", token)
        except UserError as error:
            raise UserError(
                f"README.md of {base.repo_id}, for its licence: {error} Or put a README.md of your "
                f"own into {folder} first."
            ) from error
        return write_model_card(None, repo_id, kind, facts, base_card=theirs)

    return make_card


def _target(
    repo_id: str,
    repo_type: Literal["dataset", "model"],
    revision: str | None,
    create_pr: bool,
    private: bool,
) -> Target:
    if create_pr and revision is not None:
        raise UserError(
            "A pull request is opened against the main branch: give either `create_pr` or "
            "`revision`."
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is not the name of a repository: {error}") from error
    if repo_id.count("/") != 1:
        raise UserError(
            f"{repo_id!r} is not the name of a repository: it must look like owner/name."
        )
    return Target(repo_id, repo_type, revision, create_pr, private)


def _log_in(target: Target, token: str | None) -> HfApi:
    """Client of the Hub with a token that can write.

    Raises:
        UserError: there is no token, the Hub does not know it, or it can only read.
    """
    api = HfApi(token=token, library_name="hf_ecif", library_version=__version__)
    user = retried(api.whoami, f"{target.repo_id} was not changed")
    access = user.get("auth", {}).get("accessToken", {})
    if access.get("role") == "read":
        raise UserError(
            f"Your token on the Hub (of {user['name']}) can only read. Make one that can write in "
            "the settings of your account, and log in with it: hf auth login."
        )
    return api


def _url(api: HfApi, target: Target, publication: Publication) -> str:
    if publication.pull_request:
        return publication.pull_request
    kind = "datasets/" if target.repo_type == "dataset" else ""
    branch = f"/tree/{target.revision}" if target.revision else ""
    return f"{api.endpoint}/{kind}{target.repo_id}{branch}"
