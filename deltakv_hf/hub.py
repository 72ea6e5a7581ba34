"""Compressors by name: folders, those that come with the package, and those on the Hugging Face Hub."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, scan_cache_dir
from huggingface_hub.errors import (
    CacheNotFound,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .compressor.folder import CONFIG, TENSORS, is_compressor, read_config, read_folder
from .compressor.published import is_published, weight_files
from .errors import CompressorError

BUNDLED = Path(__file__).parent / "checkpoints"
# seconds to wait for the first answer
PATIENCE = 10.0
LOG_IN = "run `hf auth login` or pass `token`"


@dataclass(frozen=True)
class CachedCompressor:
    """A compressor that was downloaded.

    Attributes:
        repo_id: its id on the Hub.
        revision: the commit, 40 hex digits.
        path: its folder in the local cache of the Hub.
    """

    repo_id: str
    revision: str
    path: Path


def resolve_folder(
    id_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The folder of a compressor: an existing folder, one that comes with the package, or one from the Hub.

    Args:
        id_or_path: path of a folder; else a name without "/", of one in `bundled()`; else an id on the Hub.
        revision: branch, tag or commit on the Hub (None: main).
        token: for the Hub (None: the one that was logged in with).
        cache_dir: where downloads are kept (None: the cache that all of `huggingface_hub` uses).
        local_files_only: take what was downloaded before and ask nobody, as `HF_HUB_OFFLINE=1` does.
        force_download: download again what is there already.

    The copy in the cache is also taken if the Hub does not answer.

    Raises:
        CompressorError: there is none, or it cannot be downloaded; the message says what to do.
    """
    if not isinstance(id_or_path, (str, os.PathLike)):
        raise CompressorError(
            "`id_or_path` must be a folder, an id on the Hub (owner/name) or the name of a compressor that comes with "
            f"the package, got {id_or_path!r}."
        )
    # of a name that is too long for a file, `Path` raises
    exists = os.path.exists(id_or_path)
    if os.path.isdir(id_or_path):
        return Path(id_or_path)
    if not isinstance(id_or_path, str) or exists or id_or_path.startswith(("/", ".", "~")):
        found = "which is a file" if exists else "and there is no such folder"
        raise CompressorError(f"`id_or_path` must be a compressor folder, got {str(id_or_path)!r}, {found}.")
    if "/" not in id_or_path:
        return _bundled_folder(id_or_path)
    place = {"repo_id": id_or_path, "token": token, "cache_dir": cache_dir, "force_download": force_download}
    unreachable = None if local_files_only else _probe(id_or_path, revision, token)
    place["local_files_only"] = local_files_only or unreachable is not None
    try:
        config = Path(hf_hub_download(filename=CONFIG, revision=revision, **place))
        # of the same commit, whatever was pushed meanwhile
        fetch = partial(hf_hub_download, revision=config.parent.name, **place)
        if is_published(config.parent):
            weight_files(lambda name: fetch(filename=name), config.parent)
        else:
            # refuses another kind of repository before more of it is downloaded
            read_config(config.parent)
            fetch(filename=TENSORS)
    except CompressorError:
        raise
    except Exception as error:
        error = unreachable or error
        raise _refused("id_or_path", "a compressor that can be read", id_or_path, revision, error) from error
    return config.parent


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads a compressor folder to the Hub in one commit and returns the URL of that commit or pull request.

    Args:
        folder: a whole compressor folder; all its files are uploaded, hidden ones left out.
        repo_id: "owner/name"; the repository is made if there is none.
        private: whether a new repository is private (None: what the owner's settings say).
        token: for the Hub (None: the one that was logged in with).
        revision: an existing branch to commit to (None: main).
        commit_message: its first line (None: "Upload the compressor").
        create_pr: open a pull request instead of committing.

    Raises:
        CompressorError: `folder` is no whole compressor, or the Hub refuses; the message says what to do.
    """
    read_folder(folder)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload the compressor",
            create_pr=create_pr,
            ignore_patterns=[".*", "*/*"],
        )
    except Exception as error:
        raise _refused("repo_id", "a repository that you may write to", repo_id, revision, error) from error
    return str(done.pr_url or done.commit_url)


def bundled() -> list[Path]:
    """The folders of the compressors that come with the package, by name."""
    return sorted(path for path in BUNDLED.iterdir() if is_compressor(path)) if BUNDLED.is_dir() else []


def cached(cache_dir: str | os.PathLike | None = None) -> list[CachedCompressor]:
    """The compressors that are in the local cache of the Hub whole, by id and revision.

    Args:
        cache_dir: another cache than the one that all of `huggingface_hub` uses.
    """
    try:
        repositories = scan_cache_dir(cache_dir).repos
    except (CacheNotFound, ValueError):
        # there is nothing, or a file
        return []
    found = [
        CachedCompressor(repository.repo_id, revision.commit_hash, revision.snapshot_path)
        for repository in repositories
        for revision in repository.revisions
        if repository.repo_type == "model" and _is_whole(revision.snapshot_path)
    ]
    return sorted(found, key=lambda one: (one.repo_id, one.revision))


def _is_whole(path: Path) -> bool:
    if is_published(path):
        return any(path.glob("*.safetensors"))
    return (path / TENSORS).is_file() and is_compressor(path)


def _bundled_folder(name: str) -> Path:
    names = [path.name for path in bundled()]
    if name in names:
        return BUNDLED / name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise CompressorError(
        f"`id_or_path` must be a folder, an id on the Hub (owner/name) or a compressor that comes with the package "
        f"({', '.join(names) or 'there is none'}), got {name!r}.{hint}"
    )


def _probe(repo_id: str, revision: str | None, token: str | bool | None) -> Exception | None:
    """Why the Hub does not give this repository. Left to itself, a download waits minutes for a Hub that hangs."""
    try:
        HfApi(token=token).model_info(repo_id, revision=revision, timeout=PATIENCE)
    except (RevisionNotFoundError, HFValidationError) as error:
        rule = "a compressor that can be read"
        raise _refused("id_or_path", rule, repo_id, revision, error) from error
    except Exception as error:
        return error
    return None


def _refused(argument: str, rule: str, repo_id: str, revision: str | None, error: Exception) -> CompressorError:
    at = f" at revision {revision!r}" if revision else ""
    return CompressorError(f"`{argument}` must be {rule}, got {repo_id!r}{at}: {_reason(error)}")


def _reason(error: Exception) -> str:
    """What is wrong and what to do."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, HFValidationError):
        return f"this is no id on the Hub (owner/name) and no folder ({_first_line(error)})."
    if isinstance(error, LocalTokenNotFoundError):
        return f"`token=True` needs a token, and there is none: {LOG_IN}."
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return (
            "it is not in the local cache, and the Hub may not be asked. Download it once without HF_HUB_OFFLINE=1 and "
            "without `local_files_only`."
        )
    if isinstance(error, GatedRepoError):
        return f"it is gated. Ask for access on its page, then {LOG_IN}."
    if isinstance(error, RevisionNotFoundError):
        return "there is no such branch, tag or commit. Look at its history on the Hub, or leave `revision` out."
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repository, or it is private. Check the id; to see a private one {LOG_IN}."
    if isinstance(error, EntryNotFoundError):
        return f"a file is missing there ({CONFIG} and {TENSORS} make a compressor). Check the id and the revision."
    if status in (401, 403):
        return f"the Hub denies access (HTTP {status}). To show who you are {LOG_IN}, with the right to do this."
    if status is not None:
        return f"the Hub fails (HTTP {status}, {_first_line(error)}). Try again later."
    return (
        f"the transfer failed ({type(error).__name__}: {_first_line(error)}). Check the connection, HF_ENDPOINT and "
        "the space in the cache folder, and try again; HF_HUB_OFFLINE=1 takes what was downloaded before."
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
