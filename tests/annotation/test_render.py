"""Other people's text is shown, never run."""

import pytest

from annotation.render import LONGEST_MARKDOWN_CHARACTERS, TAGS, render_messages, render_text
from tests.annotation.hostile import HOSTILE, Reader


def test_the_corpus_has_at_least_36_kinds():
    assert len(set(HOSTILE)) >= 36


@pytest.mark.parametrize(
    "text", [*HOSTILE, "\n".join(HOSTILE), "> " + "\n> ".join(HOSTILE), "| a |\n|---|\n| " + HOSTILE[3] + " |"], ids=lambda text: text[:40]
)
def test_hostile_markup_is_harmless(text):
    read = Reader(render_text(text))
    assert set(read.tags) <= TAGS
    for tag, name, value in read.attributes:
        assert (tag, name) in {("a", "href"), ("a", "rel"), ("a", "target"), ("ol", "start"), ("span", "class")}
        if name == "href":
            assert value.startswith(("https://", "http://", "mailto:"))
        if name == "class":
            assert value == "picture"


def test_raw_html_is_shown_as_it_was_typed():
    assert Reader(render_text("<script>alert(1)</script>")).text.strip() == "<script>alert(1)</script>"


def test_pictures_are_named_and_never_loaded():
    html = render_text("![a cat](https://evil.example/cat.png)")
    assert "a cat" in html and "evil.example" not in html


def test_links_leave_safely():
    html = render_text("[text](https://example.org/a?b=c&d=e)")
    assert 'rel="noopener noreferrer nofollow ugc"' in html and 'target="_blank"' in html and "https://example.org/a?b=c&amp;d=e" in html


def test_markdown_and_line_breaks_are_kept():
    html = render_text(
        "# Title\n\none\ntwo **bold** `x < y`\n\n1. first\n2. second\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```py\nif x:\n    y()\n```"
    )
    for part in ("<h1>Title</h1>", "one<br>", "<strong>bold</strong>", "<code>x &lt; y</code>", "<ol>", "<td>1</td>", "if x:\n    y()"):
        assert part in html


def test_a_long_text_is_readable_to_its_end():
    text = "word " * LONGEST_MARKDOWN_CHARACTERS + "<b>the end"
    assert render_text(text).endswith("&lt;b&gt;the end</pre>")
    assert "the end" in render_text("word " * 20_000 + "the end")


@pytest.mark.parametrize("text", ["[" * 20_000, ">" * 20_000, "*a_" * 10_000, "`" * 20_001, "|" * 20_000, "- " * 5_000, "![" * 10_000])
def test_nesting_does_not_stop_the_page(text):
    render_text(text)


def test_an_empty_text_says_so():
    assert "empty" in render_text(" \n ")


def test_messages_keep_their_roles():
    assert render_messages([{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}])[0] == {
        "role": "user",
        "html": "<p>hi</p>\n",
    }
