"""Turns text that a model or a stranger wrote into HTML that only shows it.

Markdown is parsed with raw HTML switched off (it is shown as typed), and the result goes through an allow-list once more, so that a fault
in the parser alone cannot let anything through. Pictures are named, never loaded: a request to another host would tell it who reads what.
"""

from collections.abc import Sequence
from typing import Any

import nh3
from django.utils.html import escape
from django.utils.safestring import SafeString, mark_safe
from markdown_it import MarkdownIt
from markdown_it.token import Token

# Longer texts are shown as typed: parsing time may grow faster than the text.
LONGEST_MARKDOWN_CHARACTERS = 200_000
TAGS = {
    *("p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre", "code", "em", "strong", "s", "a", "span"),
    *("ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td"),
}


def _picture(tokens: Sequence[Token], index: int, _: Any, __: Any) -> str:
    return f'<span class="picture">picture: {escape(tokens[index].content or "without a name")}</span>'


_markdown = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
_markdown.renderer.rules["image"] = _picture  # type: ignore[attr-defined]


def render_text(text: str) -> SafeString:
    """Markdown as harmless HTML: no scripts, styles, pictures, forms, ids, and links only to http, https and mailto."""
    if not text.strip():
        return mark_safe('<p class="quiet">(empty text)</p>')
    if len(text) > LONGEST_MARKDOWN_CHARACTERS:
        return mark_safe(f"<pre>{escape(text)}</pre>")  # noqa: S308 - escaped
    clean = nh3.clean(
        _markdown.render(text),
        tags=TAGS,
        attributes={"*": set(), "a": {"href"}, "ol": {"start"}},
        allowed_classes={"span": {"picture"}},
        url_schemes={"http", "https", "mailto"},
        # A path or a host without a scheme would point into this site, where the reader is signed in.
        url_relative="deny",
        link_rel="noopener noreferrer nofollow ugc",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )
    return mark_safe(clean)  # noqa: S308 - cleaned by nh3


def render_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """[{"role", "html"}, ...] of chat messages."""
    return [{"role": str(message.get("role", "user")), "html": render_text(str(message.get("content", "")))} for message in messages]
