"""Words that come in pieces, on lines of a width; and what is told of an answer."""

from __future__ import annotations

import random

import pytest
from rich.cells import cell_len

from service.cli.chat_answer import Answer
from service.cli.chat_display import WordWrap

TEXTS = {
    "prose": "The capital of France is Paris, which lies on the Seine.\n\nIt is large.",
    "code": "def capital(country):\n    return CAPITALS[country]\n\tif x:  # a\n",
    "url": "See https://example.com/" + "a" * 70 + " there.",
    "japanese": "日本語のテキストは空白がないので、どこでも改行できます。",
    "mixed": "ab日本cd " * 10,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("width", [20, 80])
def test_wrapped_text_keeps_every_word_within_the_width(text: str, width: int) -> None:
    """However it is cut into pieces; only blanks at a line's end go, and a tab becomes blanks."""
    dice = random.Random(width)  # noqa: S311 - a test's own
    for _ in range(20):
        wrap, shown, at = WordWrap(width), "", 0
        while at < len(text):
            step = dice.randint(1, 9)
            shown += wrap.add(text[at : at + step])
            at += step
        shown += wrap.rest()
        assert max(cell_len(line) for line in shown.split("\n")) <= width
        assert "".join(shown.split()) == "".join(text.split())


def test_words_are_shown_as_soon_as_they_are_whole() -> None:
    """A blank or a line's end shows that; where there are no blanks each letter is one."""
    wrap = WordWrap(20)
    assert [wrap.add(piece) for piece in ("Par", "is ", "is", "\n")] == ["", "Paris ", "", "is\n"]
    assert [wrap.add(piece) for piece in ("日", "本", "語")] == ["", "日", "本"]


def test_answer_that_came_at_once_has_no_speed() -> None:
    """A busy engine sends the few words of a short answer in one piece."""
    assert "tokens/s" not in Answer(tokens_out=10, first_s=35.15, seconds=35.1501).summary
    assert Answer(tokens_out=11, first_s=1.0, seconds=2.0).summary == "11 tokens, 10.0 tokens/s, first token 1.00 s"
    assert Answer(stopped=True).summary == "stopped"
