"""`openai/summarize_from_feedback`: TL;DR posts and news articles with judged summaries
(Stiennon et al. 2020, arXiv 2009.01325)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from marlhf.data.files import Files, Row
from marlhf.data.presets.base import Example, RowError, Source, value


@dataclass(frozen=True)
class SummarizeFromFeedback:
    """Posts and news articles with human judgements of their summaries.

    config: `comparisons` (two summaries and a choice) or `axis` (one summary and its marks; on the
        hub it has `validation` and `test`, and no `train`)
    demonstrations: target of sft: the preferred summary (as in the paper's released code) or
        `human`, the post's own summary by its author, in rows that have it

    Prompts have the columns `reference` (the human summary, or null), `subreddit` and `id`.
    """

    config: Literal["comparisons", "axis"] = "comparisons"
    demonstrations: Literal["chosen", "human"] = "chosen"

    @property
    def source(self) -> Source:
        axis = self.config == "axis"
        columns = ("info", "summary") if axis else ("info", "summaries", "choice")
        return Source(
            "openai/summarize_from_feedback",
            Files(self.config, "refs/convert/parquet", columns),
            eval_split="test" if axis else "validation",
        )

    def __call__(self, row: Row) -> Example:
        document, prompt = _prompt(row)
        if self.config == "axis":
            summaries, choice = [_summary(row.get("summary"), "summary")], None
        else:
            summaries, choice = _compared(row)
        human = next((text for text, policy in summaries if policy == "ref"), None)
        chosen = None if choice is None else summaries[choice][0]
        pair = None if choice is None else (summaries[choice][0], summaries[1 - choice][0])
        by_choice = self.demonstrations == "chosen" and choice is not None
        demonstration = chosen if by_choice else human
        columns = {
            "reference": human,
            "subreddit": value(row, "info.subreddit", str, optional=True),
            "id": value(row, "info.id", str, optional=True),
        }
        demonstrations = () if demonstration is None else (demonstration,)
        return Example(prompt, demonstrations, pair, columns, document)


def _prompt(row: Row) -> tuple[str, str]:
    """`(post or article, prompt as in the released code)`. Raises RowError."""
    post = value(row, "info.post", str, optional=True)
    article = value(row, "info.article", str, optional=True)
    kind, text = ("POST", post) if (post or "").strip() else ("ARTICLE", article)
    if text is None or not text.strip():
        raise RowError("info.post and info.article are both null or empty")
    subreddit = value(row, "info.subreddit", str, optional=True)
    where = "" if subreddit is None else f"Subreddit: r/{subreddit}\n"
    return text, f"{kind}\n{where}{text}\nTL;DR: "


def _compared(row: Row) -> tuple[list[tuple[str, str | None]], int]:
    summaries = value(row, "summaries", list)
    if len(summaries) != 2:
        raise RowError(f"summaries has {len(summaries)} entries, must have 2")
    choice = value(row, "choice", int)
    if choice not in (0, 1):
        raise RowError(f"choice is {choice}, must be 0 or 1")
    return [_summary(s, f"summaries.{i}") for i, s in enumerate(summaries)], choice


def _summary(summary: object, where: str) -> tuple[str, str | None]:
    """`(text, policy)` of a summary; the policy `ref` is the human author of the post."""
    try:
        return value(summary, "text", str), value(summary, "policy", str, optional=True)
    except RowError as error:
        raise RowError(f"{where}: {error}") from None
