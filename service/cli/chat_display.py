"""How answers look: on a terminal whole words, thoughts dimmed, and what is waited for; elsewhere plain text."""

from __future__ import annotations

import re
import unicodedata

from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

_WIDE = "\u2e80-\u9fff\uac00-\ud7af\uff00-\uffef"  # of languages without blanks, which break anywhere
_PIECES = re.compile(rf"\n|[^\S\n]+|[{_WIDE}]|[^\s{_WIDE}]+")


class PlainDisplay:
    """For a pipe or a file: the answer alone on standard output, and on standard error what is waited for.

    Args:
        out: Standard output.
        err: Standard error.
        shows: Whether the answer is shown as it comes.
    """

    def __init__(self, out: Console, err: Console, *, shows: bool = True) -> None:
        self._out, self._err, self._shows = out, err, shows
        self._begun = False

    def waiting(self, text: str) -> None:
        """Show it on a line of its own."""
        self._err.print(_sentence(text), markup=False)

    def reasoning(self, text: str) -> None:
        """Leave it out."""

    def content(self, text: str) -> None:
        """Show it as it is."""
        if self._shows:
            self._begun = True
            self._out.file.write(text)
            self._out.file.flush()

    def finish(self) -> None:
        """End the last line."""
        if self._begun:
            self._out.file.write("\n")


class TerminalDisplay:
    """For a terminal.

    Args:
        out: Standard output.
        err: Standard error.
        waits_for: What the first answer waits for, until the gateway says more.
    """

    def __init__(self, out: Console, err: Console, waits_for: str) -> None:
        self._out, self._err, self._waits_for = out, err, waits_for
        self._words: WordWrap | None = None
        self._dim = False
        self._progress: Progress | None = None

    def begin(self) -> None:
        """Show that an answer is waited for."""
        description = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1))
        columns = (SpinnerColumn(), TimeElapsedColumn(), description)
        self._progress = Progress(*columns, console=self._err, transient=True)
        self._progress.add_task(self._waits_for)
        self._progress.start()

    def waiting(self, text: str) -> None:
        """Show what the gateway says in the place of what was shown before."""
        if self._progress:
            self._progress.update(self._progress.task_ids[0], description=_sentence(text))

    def reasoning(self, text: str) -> None:
        """Show it dimmed."""
        self._show(text, dim=True)

    def content(self, text: str) -> None:
        """Show it; a blank line is between it and the thoughts."""
        self._show(text, dim=False)

    def finish(self) -> None:
        """End the last line, whatever was shown."""
        self._stop_waiting()
        if self._words:
            self._write(self._words.rest())
            self._out.out("")
        self._words, self._dim = None, False

    def _show(self, text: str, *, dim: bool) -> None:
        self._stop_waiting()
        if self._words is None:
            self._words, self._dim = WordWrap(self._out.width), dim
            text = text.lstrip("\n")
        elif self._dim != dim:
            self._write(self._words.rest().rstrip() + "\n\n")
            self._words, self._dim = WordWrap(self._out.width), dim
            text = text.lstrip("\n")
        self._write(self._words.add(_harmless(text)))

    def _write(self, text: str) -> None:
        self._out.out(text, style="dim" if self._dim else None, end="", highlight=False)
        self._out.file.flush()

    def _stop_waiting(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None


class WordWrap:
    """Text that comes in pieces, broken between words; a word is shown when it is whole.

    Args:
        width: Of a line, in cells.
    """

    def __init__(self, width: int) -> None:
        self._width, self._column = width, 0
        self._word = ""

    def add(self, text: str) -> str:
        """Return what can be shown with this piece."""
        shown = []
        for piece in _PIECES.findall(text):
            if not piece.isspace():
                if cell_len(piece[0]) > 1:
                    shown.append(self.rest())
                self._word += piece
                while cell_len(self._word) > self._width:  # no blank to break at: Chinese, or a long URL
                    shown.append(self._place(self._cut()))
                continue
            shown.append(self.rest())
            if piece == "\n":
                self._column = 0
                shown.append("\n")
            elif self._column < self._width:
                blanks = piece.replace("\t", "    ")[: self._width - self._column]
                self._column += len(blanks)
                shown.append(blanks)
        return "".join(shown)

    def rest(self) -> str:
        """Return the word that was not whole."""
        word, self._word = self._word, ""
        return self._place(word)

    def _cut(self) -> str:
        """Take as much of the word as the line has room for."""
        room, taken = self._width - self._column, 0
        while taken < len(self._word) and cell_len(self._word[: taken + 1]) <= room:
            taken += 1
        head, self._word = self._word[:taken], self._word[taken:]
        return head or "\n"

    def _place(self, word: str) -> str:
        if word == "\n":
            self._column = 0
            return word
        cells = cell_len(word)
        if self._column and cells and self._column + cells > self._width:
            self._column = cells
            return f"\n{word}"
        self._column += cells
        return word


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _harmless(text: str) -> str:
    """Return the text without characters that command a terminal."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")
