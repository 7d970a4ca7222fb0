"""What every call to the Hub needs: ids checked before it, patience, errors without tokens.

Flow: a call of the client → tried again where that may help, until its time is up → its result, or
one ``HubError``.
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    HfApi,
    close_session,
    constants,
    get_session,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

MAIN = "main"

# Of one read or write without an answer, in seconds; the client itself may wait for ever. Uploads
# by hf_xet, where it is installed, keep time themselves.
TIMEOUT = 60.0

# Of a call and its repetitions together, in seconds, and what every byte to send or fetch adds: a
# server that drips a byte a second must not hold a training for hours.
DEADLINE, SLOWEST = 600.0, 100_000.0

ATTEMPTS = 3

# The server's trouble, or a branch that moved meanwhile: the next attempt may succeed.
PASSING = {408, 412, 429, 500, 502, 503, 504}

REASONS = {
    401: "the token was not accepted: log in by `hf auth login`, or set another HF_TOKEN",
    403: "the token does not allow this: it needs write access to the repository",
    404: "there is no such repository or revision, or the token may not see it",
    409: "it conflicts with what is there",
    412: "the branch moved at the same time",
}

Result = TypeVar("Result")


class HubError(RuntimeError):
    """The Hub was not reached, or refused; the message says why and holds no token.

    Example:
        >>> import hf_dash
        >>> issubclass(hf_dash.hub.HubError, RuntimeError)
        True
    """


def check_repo_id(name: str, repo_id: str) -> None:
    """Check the id of a repository, without asking the Hub.

    Args:
        name: of the argument, for the message.
        repo_id: ``user/name``, or ``name`` below the token's user.

    Raises:
        ValueError: it can be none.
    """
    try:
        if not isinstance(repo_id, str):
            raise HFValidationError("it is not text")
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{name} must be 'user/name' or 'name' of letters, digits, '-', '_' and '.', got"
            f" {repo_id!r}"
        ) from error


def check_branch(name: str, branch: str | None) -> None:
    """Check a branch to push to, without asking the Hub.

    Args:
        name: of the argument, for the message.
        branch: or pull request (``refs/pr/1``); None for ``main``.

    Raises:
        ValueError: it cannot be the name of a branch, or looks like a commit or a round's tag.
    """
    if branch is None:
        return
    plain = re.fullmatch(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*", branch)
    taken = re.fullmatch(r"[0-9a-f]{40}|round-\d+|refs/(?!pr/\d+$).*", branch)
    if not plain or taken or ".." in branch or branch.endswith((".", ".lock")):
        raise ValueError(
            f"{name} must be the name of a branch or of a pull request (refs/pr/1), and neither a"
            f" commit nor a round's tag, got {branch!r}"
        )


def clean_token(token: str | None) -> str | None:
    """Return a token without the blanks around it, which a header cannot hold.

    Raises:
        ValueError: it can be none; the message does not quote it.
    """
    if token is None:
        return None
    if not re.fullmatch(r"[!-~]+", token.strip()):
        raise ValueError("token must be one word of plain characters; what was given is not shown")
    return token.strip()


def client(token: str | None) -> HfApi:
    """Return the Hub's client; the stored token by default.

    Raises:
        ValueError: the token can be none.
    """
    return HfApi(token=clean_token(token))


def files_at(api: HfApi, repo_id: str, revision: str | None) -> tuple[str, dict[str, RepoFile]]:
    """Return the exact commit of a revision, and its files by path."""
    commit = api.model_info(repo_id, revision=revision, timeout=TIMEOUT).sha
    files = api.list_repo_tree(repo_id, revision=commit, recursive=True)
    return str(commit), {file.path: file for file in files if isinstance(file, RepoFile)}


def reach(action: Callable[[], Result], token: str | None = None, *, size: int = 0) -> Result:
    """Call the client, and again where the trouble may pass, until its time is up.

    Args:
        action: that can be done twice without harm.
        token: given by the user, to keep out of messages; the stored one is kept out anyway.
        size: number of bytes to send or fetch; each 100,000 add a second to the ten minutes.

    Raises:
        HubError: it failed for good.
    """
    limit = DEADLINE + size / SLOWEST
    end = time.monotonic() + limit
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _in_time(action, end)
        except HubError:
            raise
        except _TimeIsUpError:
            raise HubError(f"the Hub did not finish within {limit:,.0f} seconds") from None
        # Whatever the client raises, training is worth more; its own text may quote headers.
        except Exception as error:
            status = _status(error)
            passing = status in PASSING or (status is None and _is_lost_connection(error))
            if not passing or attempt == ATTEMPTS:
                raise HubError(_explain(error, status, token)) from None
        time.sleep(2.0 ** (attempt - 1))
    raise AssertionError("unreachable")


class _TimeIsUpError(Exception):
    """A call was given up."""


def _in_time(action: Callable[[], Result], end: float) -> Result:
    """Call the client; give it up at ``end``, of the monotonic clock."""
    done: list[Result] = []
    failed: list[BaseException] = []

    def call() -> None:
        try:
            with _patience():
                done.append(action())
        except BaseException as error:  # raised below, by the thread that waits
            failed.append(error)

    # A thread of its own, because no timeout of the client's bounds the whole of a call. Given up,
    # it ends with the connection or the process.
    thread = threading.Thread(target=call, daemon=True, name="hf_dash, a call to the Hub")
    thread.start()
    thread.join(max(0.0, end - time.monotonic()))
    if failed:
        raise failed[0]
    if not done:
        close_session()
        raise _TimeIsUpError
    return done[0]


@contextmanager
def _patience() -> Iterator[None]:
    """Bound every wait of the client's session for an answer."""
    session: Any = get_session()
    before, session.timeout = session.timeout, TIMEOUT
    try:
        yield
    finally:
        session.timeout = before


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those behind it: the client wraps what its threads ran into."""
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error."""
    for one in _causes(error):
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def _is_lost_connection(error: BaseException) -> bool:
    # Of httpx, httpx2 or their transports, whichever the client is built on.
    return any(type(one).__module__.startswith("http") for one in _causes(error))


def _explain(error: BaseException, status: int | None, token: str | None) -> str:
    *_, first = _causes(error)
    shown = first if status is None else error
    detail = " ".join(f"{type(shown).__name__}: {shown}".split())
    for secret in (token, get_token()):
        if secret:
            detail = detail.replace(secret, "<token>")
    if status is not None:
        reason = REASONS.get(status, "the Hub failed" if status in PASSING else "it was refused")
    else:
        reason = "no connection" if _is_lost_connection(error) else "it could not be done"
    return f"{reason} ({detail})"


# What is read of a model; nothing else of its repository is fetched.
MODEL_FILES = ("model*.safetensors", "model.safetensors.index.json", "preprocessor_config.json")

SMALL_FILES = ("config.json", "history.json")

# Of a file that is read before anything else of a model is fetched, in bytes.
LARGEST = 64 * 2**20


def fetch_model(
    repo_id: str,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
    only_small: bool = False,
) -> Path:
    """Fetch a model from the Hub: the exact commit of a revision, and its files.

    Args:
        repo_id: ``user/name``.
        revision: branch, tag or commit.
        cache_dir: where files of the Hub are kept.
        token: for private repositories.
        only_small: fetch its config and history alone.

    Returns:
        The folder with the files, named by the commit.

    Raises:
        HubError: the Hub was not reached, has no such revision, or a small file is not small.
    """
    check_repo_id("name_or_path", repo_id)
    secret = token if isinstance(token, str) else None
    where: dict[str, Any] = {"cache_dir": cache_dir, "token": clean_token(secret) or token}
    patterns = SMALL_FILES if only_small else (*SMALL_FILES, *MODEL_FILES)
    if constants.HF_HUB_OFFLINE:  # what an earlier call has fetched
        return Path(
            reach(
                lambda: snapshot_download(
                    repo_id, revision=revision, allow_patterns=list(patterns), **where
                ),
                secret,
            )
        )
    commit, files = reach(lambda: files_at(HfApi(token=where["token"]), repo_id, revision), secret)
    large = [n for n in SMALL_FILES if n in files and files[n].size > LARGEST]
    if large:
        raise HubError(f"{repo_id} has a {large[0]} of {files[large[0]].size:,} bytes at {commit}")
    size = sum(file.size for file in files.values())
    return Path(
        reach(
            lambda: snapshot_download(
                repo_id, revision=commit, allow_patterns=list(patterns), **where
            ),
            secret,
            size=size,
        )
    )


def model_folder(
    name_or_path: str,
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Return the folder of a model, fetched if it is on the Hub; see :func:`fetch_model`."""
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    return fetch_model(name_or_path, revision=revision, cache_dir=cache_dir, token=token)
