"""A chat on the terminal: questions, commands, Ctrl-C; and one question from a pipe."""

from __future__ import annotations

import base64
import contextlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service import interrupts
from service.cli.chat_answer import Answer, ask
from service.cli.chat_display import PlainDisplay, TerminalDisplay
from service.cli.gateways import Gateway
from service.cli.terminal import print_json, print_table, progress_console, results_console
from service.errors import ServiceError, UsageError
from service.files import expand_user
from service.modal_app import gateway_check

_IMAGES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
_MOST_IMAGE = 20 * 1024 * 1024  # bytes; in base64 it still fits into the limit of a body
_HELP = """\
/model [M]     ask another model; without M, list them
/system [TEXT] set the system prompt; without TEXT, show it
/image FILE    send a picture with the next question
/save FILE     write the conversation: as JSON to .json, else as Markdown
/clear         begin a new conversation
/quit          end; so does Ctrl-D
Ctrl-C stops an answer, and a second one ends. A \\ at its end continues a line."""


@dataclass
class Conversation:
    """What was said, as the API has it; thoughts are no part of it.

    Attributes:
        images: Sent with the next question: name and data URL.
    """

    model: str
    system: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[tuple[str, str]] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """Return the request."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {"model": self.model, "messages": [*system, *self.messages]}

    def add_question(self, text: str) -> None:
        """Add a question, with the pictures that were chosen for it.

        Raises:
            UsageError: It is no text.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            hint = "Write it in UTF-8: iconv converts other encodings."
            raise UsageError("The question is not UTF-8.", hint=hint) from None
        content: Any = text
        if self.images:
            pictures = [{"type": "image_url", "image_url": {"url": url}} for _, url in self.images]
            content = [{"type": "text", "text": text}, *pictures]
        self.messages.append({"role": "user", "content": content})

    def add_answer(self, answer: Answer) -> None:
        """Add an answer; a question that got none is taken back."""
        if answer.content:
            self.messages.append({"role": "assistant", "content": answer.content})
            self.images.clear()
        else:
            self.messages.pop()

    def add_image(self, file: Path) -> None:
        """Choose a picture for the next question.

        Raises:
            ServiceError: It is none, or cannot be read.
        """
        try:
            data = file.read_bytes()
        except OSError as error:
            raise ServiceError(f"'{file}' cannot be read: {error.strerror}.") from error
        kind = next((name for head, name in _IMAGES.items() if data.startswith(head)), None)
        if kind is None or len(data) > _MOST_IMAGE:
            size = f"{len(data) / 1e6:.1f} MB"
            raise ServiceError(
                f"'{file}' ({size}) is no picture that can be sent.", hint="Name a PNG, JPEG, GIF or WebP below 20 MB."
            )
        self.images.append((file.name, f"data:image/{kind};base64,{base64.b64encode(data).decode()}"))

    def save(self, file: Path) -> None:
        """Write it to a new file.

        Raises:
            ServiceError: The file is there already, or cannot be written.
        """
        body = self.body()
        text = json.dumps(body, indent=2, ensure_ascii=False) + "\n" if file.suffix == ".json" else _markdown(body)
        try:
            with file.open("x", encoding="utf-8") as out:
                out.write(text)
        except OSError as error:
            raise ServiceError(f"'{file}' cannot be written: {error.strerror}.", hint="Name another file.") from error


def once(gateway: Gateway, conversation: Conversation, as_json: bool) -> None:
    """Answer the question on standard input.

    Raises:
        UsageError: There is none.
        ServiceError: There is no answer.
    """
    question = sys.stdin.read().strip()
    if not question:
        raise UsageError(
            "Standard input is empty, so there is no question.", hint="For example: echo Hello | vllm-service chat"
        )
    conversation.add_question(question)
    answer = ask(gateway, conversation.body(), PlainDisplay(results_console(), progress_console(), shows=not as_json))
    if answer.stopped:
        raise KeyboardInterrupt
    if as_json:
        print_json({"model": conversation.model, **answer.as_object()})


class Chat:
    """A chat with a person.

    Args:
        gateway: Who answers.
        conversation: Empty, or with a system prompt and pictures.
    """

    def __init__(self, gateway: Gateway, conversation: Conversation) -> None:
        self._gateway, self._conversation = gateway, conversation
        self._out, self._err = results_console(), progress_console()
        self._waits_for = ""
        self._interrupted = False

    def run(self) -> None:
        """Go on until Ctrl-D, /quit, or a second Ctrl-C.

        Raises:
            KeyboardInterrupt: A second one.
            ServiceError: The gateway does not answer.
        """
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, PLC0415 - gives `input` its keys and history; not every Python has it
        self._choose(self._conversation.model)
        self._say("/help lists the commands, Ctrl-D ends.")
        with contextlib.suppress(EOFError):
            while True:
                if line := self._read():
                    self._interrupted = False
                    self._answer(line)

    def _read(self) -> str:
        """Return what is entered; empty after a Ctrl-C."""
        lines, prompt = [], "> "
        try:
            while True:
                line = input(prompt)
                lines.append(line.removesuffix("\\"))
                if not line.endswith("\\"):
                    return "\n".join(lines).strip()
                prompt = "… "
        except EOFError:
            self._say("")
            raise
        except KeyboardInterrupt:
            self._say("")
            if self._interrupted:
                raise
            interrupts.handled()
            self._interrupted = True
            self._say("Ctrl-C again ends, and so does Ctrl-D.")
            return ""

    def _answer(self, line: str) -> None:
        """Do a command, or ask a question; neither an error nor Ctrl-C ends the chat."""
        try:
            if line.startswith("/"):
                self._command(line)
            else:
                self._ask(line)
        except ServiceError as error:
            self._say(error.to_terminal())
        except KeyboardInterrupt:
            interrupts.handled()
            self._interrupted = True
            self._say("")

    def _ask(self, question: str) -> None:
        self._conversation.add_question(question)
        display = TerminalDisplay(self._out, self._err, self._waits_for)
        answer = Answer()
        try:
            display.begin()
            answer = ask(self._gateway, self._conversation.body(), display)
        finally:
            self._conversation.add_answer(answer)
        self._interrupted = answer.stopped
        if answer.first_s is not None:
            self._waits_for = f"Waiting for {self._conversation.model}"
        self._out.print(answer.summary, style="dim", markup=False)

    def _command(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        rest, talk = rest.strip(), self._conversation
        match word:
            case "/help":
                self._say(_HELP)
            case "/quit":
                raise EOFError
            case "/clear":
                talk.messages.clear()
                talk.images.clear()
                self._say("A new conversation.")
            case "/model" if rest:
                self._choose(rest)
            case "/model":
                self._list()
            case "/system":
                talk.system = rest or talk.system
                self._say(f"The system prompt: {talk.system}" if talk.system else "There is no system prompt.")
            case "/image":
                talk.add_image(expand_user(_named(word, rest)))
                self._say(f"With the next question: {', '.join(name for name, _ in talk.images)}")
            case "/save":
                talk.save(expand_user(_named(word, rest)))
                self._say(f"Wrote {rest}")
            case _:
                raise UsageError(f"'{word}' is no command.", hint="/help lists them.")

    def _choose(self, model: str) -> None:
        """Ask this model from now on, and say what it is."""
        found = gateway_check.model(self._gateway.url, self._gateway.key, model)
        self._conversation.model, name, place = model, found["display_name"], found["gpu"]
        called = name if name == model else f"{model} is {name}"
        price = f", ${found['dollars_per_hour']:.2f}/h while it is up" if found.get("dollars_per_hour") else ""
        state = found["reason"] or f"{found['state']}{price}"
        self._say(f"{called} on {place}: {state}")
        waking = f"Waking {name} on {place}{price}"
        self._waits_for = f"Waiting for {model}" if found["state"] == "ready" else waking

    def _list(self) -> None:
        models = gateway_check.models(self._gateway.url, self._gateway.key)
        print_table(("model", "GPU", "state"), [(one["id"], str(one["gpu"]), str(one["state"])) for one in models])

    def _say(self, text: str) -> None:
        self._err.print(text, markup=False, style="dim")


def _named(word: str, rest: str) -> str:
    if not rest:
        raise UsageError(f"{word} needs the name of a file.", hint=f"For example: {word} FILE")
    return rest


def _markdown(body: dict[str, Any]) -> str:
    """Return a conversation for people; pictures are only mentioned."""
    parts = [f"# {body['model']}"]
    for message in body["messages"]:
        content = message["content"]
        pictures = 0
        if not isinstance(content, str):
            pictures, content = len(content) - 1, content[0]["text"]
        parts += [f"## {message['role']}", content, *["(a picture)"] * pictures]
    return "\n\n".join(parts) + "\n"
