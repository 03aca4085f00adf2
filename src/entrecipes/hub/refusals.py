"""Why something could not be written to the Hub, in one sentence, and what to do about it."""

from __future__ import annotations

from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from entrecipes.errors import UserError
from entrecipes.reference import causes_of
from entrecipes.tokens import without_tokens

SETTINGS = "https://huggingface.co/settings/tokens"


class Refused(UserError):
    """The Hub did not take what was to be pushed.

    Args:
        problem: What happened, with its place.
        advice: What comes before the same command again, such as `unset HF_HUB_OFFLINE, then`.
    """

    def __init__(self, problem: str, advice: str) -> None:
        self.problem, self.advice = problem, advice
        super().__init__(f"{problem}; {advice} push again")

    def naming(self, command: str) -> UserError:
        """The same with the command to type."""
        advice = self.advice[:1].upper() + self.advice[1:]
        return UserError(f"{self.problem}; nothing on this disk has changed. {advice} `{command}`")


def why_refused(error: BaseException, repo_id: str) -> Refused | None:
    """What an error of the client means for its user; None when it is none of the Hub's."""
    for cause in causes_of(error):
        if isinstance(cause, HfHubHTTPError):
            problem, advice = _answer(cause)
        elif isinstance(cause, OfflineModeIsEnabled):
            problem, advice = "HF_HUB_OFFLINE is set, so that nothing was sent", "unset it, then"
        elif isinstance(cause, LocalTokenNotFoundError):
            problem, advice = "there is no access token", "`hf auth login` (or set HF_TOKEN), then"
        elif isinstance(cause, HTTPError):
            problem = f"the connection to the Hub failed ({_words(cause)}); what was uploaded is kept"
            advice = "when it is back, go on with"
        else:
            continue
        return Refused(f"{repo_id}: {problem}", advice)
    if isinstance(error, (RuntimeError, ValueError)) and not isinstance(error, UnicodeError):
        return Refused(f"{repo_id}: the Hub did not take it ({_words(error)})", "mend that, then")
    return None


def _answer(error: HfHubHTTPError) -> tuple[str, str]:
    """What a status means where something is written."""
    status = error.response.status_code
    if isinstance(error, RevisionNotFoundError):
        return "there is no such branch any more (404)", "if it was not removed on purpose,"
    known = {
        401: (
            "the Hub does not know your access token (401)",
            "`hf auth login` again, or set HF_TOKEN to one that is valid; then",
        ),
        403: (
            "your access token may not write there (403)",
            f"take one with write access ({SETTINGS}) or a --repo-id of your own; then",
        ),
        404: ("there is no such repository, or you may not see it (404)", "check the id, then"),
        409: ("another change is under way there (409)", "in a minute, try again with"),
        412: ("others keep changing it at the same time (412)", "in a minute, try again with"),
        429: ("the Hub asks you to wait (429); what was uploaded is kept", "in some minutes, go on with"),
    }
    if status >= 500:
        return f"the Hub has trouble of its own ({status}); what was uploaded is kept", "later, go on with"
    return known.get(status, (f"the Hub did not take it ({status}: {_words(error)})", "mend that, then"))


def _words(error: BaseException) -> str:
    """The last line of a message, which says what was wrong; without what must not be repeated."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return without_tokens(lines[-1] if lines else type(error).__name__)[:200].rstrip(".")
