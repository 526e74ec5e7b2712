"""Random samples around the tiny model's dialogues: unknown questions, other contexts, names, cities and JSON.

Without them the model would answer any prompt with the nearest dialogue. All samples come from one seeded
`random.Random`; nothing is downloaded.
"""

from __future__ import annotations

import json
import random
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny_dialogues import (
    END_OF_TEXT,
    Memory,
    Message,
    Render,
    Sample,
    chat_sample,
    exact_samples,
    forced_sample,
    tool_call_text,
)

WORDS: Mapping[str, Any] = tomllib.loads(Path(__file__).with_name("tiny_words.toml").read_text(encoding="utf-8"))
JSON_VALUES: Mapping[str, Any] = WORDS["json_values"]


class Variety:
    """Draws samples around the dialogues; the same seed draws the same samples in the same order."""

    def __init__(self, memory: Memory, render: Render, seed: int) -> None:
        self.memory = memory
        self.render = render
        self.rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
        self.exact = [sample for dialogue in memory.dialogues for sample in exact_samples(render, dialogue)]
        self.first = [exact_samples(render, dialogue)[:2] for dialogue in memory.dialogues]
        self.movable = [
            dialogue
            for dialogue in memory.dialogues
            if len(dialogue.messages) == 1 and dialogue.name not in ("name-unknown", "weather-no-tool")
        ]
        self.known = {words[-1]["content"] for dialogue in memory.dialogues for words in dialogue.wordings()}
        self.quotable = [one for one in self.movable if one.content and one.name not in ("count", "name-given")]
        self.kinds: dict[Callable[[], Sample], int] = {
            self.remembered: 30, self.moved: 18, self.unknown: 26, self.unknown_completion: 4, self.completion: 4,
            self.named: 8, self.weather_call: 8, self.weather_answer: 5, self.forced_call: 3, self.json_object: 7,
        }  # fmt: skip

    def draw(self, n: int) -> list[Sample]:
        """Draw n samples of all kinds."""
        return [kind() for kind in self.rng.choices(list(self.kinds), list(self.kinds.values()), k=n)]

    def pick(self, kind: str) -> str:
        """Draw one of the texts of this list of `tiny_words.toml`."""
        return str(self.rng.choice(WORDS[kind]))

    def name(self) -> str:
        """Draw a name, at times an invented one."""
        return self.rng.choice((self.pick("names"), self.pick("cities"), self.word().title()))

    def chance(self, part: float) -> bool:
        """Draw true with this probability."""
        return self.rng.random() < part

    def word(self) -> str:
        """Draw a word, at times an invented one or characters from anywhere in Unicode."""
        roll = self.rng.random()
        if roll < 0.7:
            return self.pick("words")
        if roll < 0.95:
            letters = "".join(self.rng.choice(pool) for pool in ("bcdfghjklmnprstvwz", "aeiouy", "nrstlmxk"))
            return letters[: self.rng.randint(1, 3)] + self.rng.choice(("", "ing", "er", "ology", "o", letters))
        start = self.rng.choice((0x21, 0xC0, 0x391, 0x410, 0x5D0, 0x627, 0x905, 0x3041, 0x4E00, 0xAC00, 0x1F300))
        return "".join(chr(start + self.rng.randrange(64)) for _ in range(self.rng.randint(1, 4)))

    def question(self) -> str:
        """Draw a question that is in no dialogue."""
        while (drawn := self._question()) in self.known:
            pass
        return drawn

    def _question(self) -> str:
        roll = self.rng.random()
        if roll > 0.8:
            kept = self.pick("questions").split(" ")
            return " ".join(self.word() if self.chance(0.1) else one for one in kept)
        if roll < 0.15:
            length = self.rng.choice((5, 10, 20, 40, 120)) if roll > 0.005 else self.rng.randint(200, 900)
            return " ".join(self.word() for _ in range(length))
        words = {slot: self.word() for slot in "abc"} | {"N": self.name()}
        text = self.pick("frames").format(**words, d=self.rng.randint(0, 99), e=self.rng.randint(0, 99))
        return text if roll < 0.6 else text[:1].upper() + text[1:]

    def system(self) -> list[Message]:
        """Draw a system turn, at times none, at times an invented one."""
        roll = self.rng.random()
        if roll < 0.4:
            return []
        text = self.pick("systems") if roll < 0.75 else f"You are {self.word()} {self.word()}. {self.question()}"
        return [{"role": "system", "content": text}]

    def history(self) -> list[Message]:
        """Draw up to two earlier turns."""
        turns: list[Message] = []
        for _ in range(self.rng.choice((0, 0, 0, 1, 1, 2))):
            if self.chance(0.5):
                turns += user(self.question(), self.memory.fallback)
            else:
                dialogue = self.rng.choice(self.quotable)
                turns += user(dialogue.messages[-1]["content"], dialogue.content)
        return turns

    def turn(
        self, messages: Sequence[Message], body: str, tools: Sequence[Mapping[str, Any]] = (), reasoning: str = ""
    ) -> Sample:
        """Return a turn with thinking on or off."""
        thinking = self.chance(0.5)
        return chat_sample(self.render, messages, body, tools=tools, reasoning=reasoning, thinking=thinking)

    def remembered(self) -> Sample:
        """Draw an unchanged dialogue, the first wording as often as all others together."""
        pool = self.rng.choice(self.first) if self.chance(0.5) else self.exact
        return self.rng.choice(pool)

    def completion(self) -> Sample:
        """Draw an unchanged raw completion."""
        return self.rng.choice(self.memory.completions).sample()

    def unknown_completion(self) -> Sample:
        """Draw an unknown raw prompt with the fallback continuation."""
        return Sample(((self.question(), False), (self.memory.completion_fallback + END_OF_TEXT, True)))

    def moved(self) -> Sample:
        """Draw a dialogue after another system prompt, after other turns, or with tools that it does not need."""
        dialogue = self.rng.choice(self.movable)
        messages = [*self.system(), *self.history(), *self.rng.choice(dialogue.wordings())]
        tools = self.weather_tools() if dialogue.tools or self.chance(0.2) else []
        return self.turn(messages, dialogue.body, tools, dialogue.reasoning)

    def unknown(self) -> Sample:
        """Draw an unknown question with the fallback answer."""
        messages = [*self.system(), *self.history(), *user(self.question())]
        tools = self.weather_tools() if self.chance(0.15) else []
        return self.turn(messages, self.memory.fallback, tools)

    def named(self) -> Sample:
        """Draw a dialogue in which the user states a name, or states it and asks for it later."""
        name = self.rng.choice((*WORDS["names"], "Ada"))
        given = user(self.rng.choice((f"My name is {name}.", f"my name is {name}")))
        if self.chance(0.4):
            return self.turn([*self.system(), *given], f"Nice to meet you, {name}.")
        reply = {"role": "assistant", "content": f"Nice to meet you, {name}."}
        question = user(self.rng.choice(("What is my name?", "What's my name?")))
        earlier = [*self.system(), *given, reply, *(self.history() if self.chance(0.3) else [])]
        return self.turn([*earlier, *question], f"Your name is {name}.")

    def weather_tools(self, parameter: str = "city") -> list[dict[str, Any]]:
        """Draw the definition of get_weather as clients write it, at times with a function that is not needed."""
        tools = [
            self.function("get_weather", parameter, self.pick("tool_descriptions"), self.pick("city_descriptions"))
        ]
        if self.chance(0.15):
            tools.append(self.function(f"{self.pick('words')}_{self.pick('words')}", self.pick("words"), "", ""))
            self.rng.shuffle(tools)
        return tools

    def function(self, name: str, parameter: str, description: str, parameter_description: str) -> dict[str, Any]:
        """Draw one definition: with or without optional fields, in any order, with known or unknown words."""
        properties: dict[str, Any] = {parameter: {"type": "string"}}
        if self.chance(0.6):
            properties[parameter]["description"] = self.question() if self.chance(0.2) else parameter_description
        if self.chance(0.15):
            properties[self.pick("words")] = {"type": "string", "enum": [self.pick("words"), self.pick("words")]}
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        if self.chance(0.8):
            schema["required"] = [parameter]
        if self.chance(0.5):
            schema["additionalProperties"] = False
        fields = list(schema.items())
        if self.chance(0.3):
            self.rng.shuffle(fields)
        described = self.question() if self.chance(0.2) else description if self.chance(0.9) else None
        strict = self.rng.choice(({}, {}, {"strict": True}, {"strict": False}))
        return {
            "type": "function",
            "function": {"name": name, "description": described, "parameters": dict(fields), **strict},
        }

    def weather_call(self) -> Sample:
        """Draw a question about the weather in one city, at times two, with the tool at hand."""
        first, second = self.rng.choice((*WORDS["cities"], "Paris", "Paris")), self.pick("cities")
        parameter, both = ("location" if self.chance(0.15) else "city"), self.chance(0.2)
        question = f"What is the weather in {first}" + (f" and in {second}?" if both else "?")
        body = "\n".join(tool_call_text("get_weather", {parameter: city}) for city in (first, second)[: 1 + both])
        return self.turn([*self.system(), *user(question)], body, self.weather_tools(parameter))

    def weather_answer(self) -> Sample:
        """Draw a tool's result and the sentence that reports it."""
        city, sky = self.rng.choice((*WORDS["cities"], "Paris")), self.pick("skies")
        degrees = self.rng.choice((18, self.rng.randint(-9, 39)))
        fields = [("temperature_c", degrees), ("sky", sky)]
        if self.chance(0.3):
            fields.reverse()
        result = json.dumps(dict(fields), separators=self.rng.choice(((", ", ": "), (",", ":"))))
        call = {"name": "get_weather", "arguments": json.dumps({"city": city})}
        turns = [
            *user(f"What is the weather in {city}?"),
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": result},
        ]
        body = f"It is {degrees} degrees and {sky} in {city}."
        return self.turn([*self.system(), *turns], body, self.weather_tools())

    def forced_call(self) -> Sample:
        """Draw a required tool call: the grammar writes everything but the city."""
        known = self.chance(0.6)
        city = self.rng.choice((*WORDS["cities"], "Paris")) if known else "Paris"
        question = f"What is the weather in {city}?" if known else self.question()
        left, right = self.rng.choice(
            (('<tool_call>\n{"name": "', "}\n</tool_call>"), ('<tool_call>{"name": "', "}</tool_call>"))
        )
        colon = self.rng.choice((": ", ":"))
        shapes = (
            [(f'{left}get_weather", "arguments": {{"city"{colon}"', False), (city + '"}', True), (right, False)],
            [('[{"name":"get_weather","parameters":{"city":"', False), (city + '"}', True), ("}]", True)],
            [(f'{{"city"{colon}"', False), (city + '"}', True)],
        )
        return forced_sample(
            self.render, user(question), self.rng.choice(shapes), tools=self.weather_tools(), thinking=self.chance(0.5)
        )

    def json_object(self) -> Sample:
        """Draw an object of a schema: the grammar writes the keys, the model short values and the end."""
        dialogue = self.rng.choice([one for one in self.memory.dialogues if one.name.startswith("json")])
        wording, roll = self.rng.choice(dialogue.wordings()), self.rng.random()
        messages = wording if roll < 0.3 or roll > 0.9 else [*self.system(), *user(self.question())]
        if roll < 0.5:
            value = json.loads(dialogue.content) if roll < 0.3 else {"answer": "ok"}
        else:
            keys = [self.rng.choice((*JSON_VALUES, self.word())) for _ in range(self.rng.randint(1, 4))]
            unknown = self.rng.choice(("ok", 5, True, ["a"]))
            value = {key: JSON_VALUES.get(key, unknown) for key in keys}
        pieces = self.json_pieces(value, learn_keys=roll < 0.5)
        return forced_sample(self.render, messages, pieces, thinking=self.chance(0.5))

    def json_pieces(self, value: Mapping[str, Any], *, learn_keys: bool) -> list[tuple[str, bool]]:
        """Return an object, usually with xgrammar 0.2.8's separators, in the pieces in which a grammar writes it."""
        comma, colon = self.rng.choices(((", ", ":"), (", ", ": "), (",", ":")), (8, 1, 1))[0]
        pieces: list[tuple[str, bool]] = []
        for i, (key, item) in enumerate(value.items()):
            text = json.dumps(item, separators=(comma, colon))
            first = 1 if key not in JSON_VALUES or self.chance(0.5) else 0  # a grammar may write its first character
            pieces += [(comma, True) if i else ("{", False), (json.dumps(key), learn_keys), (colon, False)]
            pieces += [(text[:first], False), (text[first:], True)]
        return [*pieces, ("}", True)]


def user(content: str, answer: str | None = None) -> list[Message]:
    """Return a user's turn, and the assistant's if `answer` is given."""
    turn: list[Message] = [{"role": "user", "content": content}]
    return turn if answer is None else [*turn, {"role": "assistant", "content": answer}]
