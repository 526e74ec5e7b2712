"""The official client talks to the engine: chat, streams, completions, log probabilities, usage."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from service.registry.models import Registry

from .dialogues import PLAIN, Dialogue, completion, dialogue
from .running import Service


def words(client: openai.OpenAI, asked: Dialogue, **fields: Any) -> str:
    """Return the answer to a dialogue's request."""
    answer = client.chat.completions.create(**({"model": "llm", **asked.request} | fields))
    return (answer.choices[0].message.content or "").strip()


def streamed(client: openai.OpenAI, asked: Dialogue, **fields: Any) -> list[Any]:
    """Return the chunks of a streamed answer."""
    with client.chat.completions.create(**({"model": "llm", "stream": True, **asked.request} | fields)) as stream:
        return list(stream)


def joined(chunks: list[Any], field: str = "content") -> str:
    """Return the concatenation of a field of the deltas."""
    return "".join(getattr(choice.delta, field, None) or "" for chunk in chunks for choice in chunk.choices)


def test_chat_one_question_returns_the_known_answer(client: openai.OpenAI) -> None:
    """A chat returns the memorised answer, stops by itself, and has the model's name."""
    capital = dialogue("capital")
    answer = client.chat.completions.create(model="llm", **capital.request)
    assert (answer.choices[0].message.content or "").strip() == capital.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "tiny"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_every_dialogue_eight_at_once_returns_its_answer(client: openai.OpenAI) -> None:
    """Every dialogue but the longest returns its own answer, with eight requests in flight at a time."""
    asked = [known for known in PLAIN if known.name != "count"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: words(client, one, temperature=0), asked))
    assert answers == [one.content for one in asked]


def test_chat_greedy_five_times_returns_the_same_answer(client: openai.OpenAI) -> None:
    """With temperature 0 the same question has the same answer every time."""
    asked = dialogue("svd")
    assert {words(client, asked, temperature=0) for _ in range(5)} == {asked.content}


def test_chat_greedy_eight_at_once_returns_the_same_answer(client: openai.OpenAI) -> None:
    """An answer does not depend on the other requests of its batch."""
    asked = dialogue("svd-jar-jar")
    with ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(lambda _: words(client, asked, temperature=0), range(8)))
    assert answers == {asked.content}


def test_chat_stream_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    """A stream has several chunks, which together are the answer without a stream."""
    asked = dialogue("hello-japanese")
    chunks = streamed(client, asked)
    assert len(chunks) > 2  # of which the last ends it
    assert joined(chunks).strip() == words(client, asked) == asked.content
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_chat_stream_with_usage_ends_with_the_count(client: openai.OpenAI) -> None:
    """`stream_options.include_usage` adds one last chunk with the counts of the answer without a stream."""
    asked = dialogue("capital")
    chunks = streamed(client, asked, stream_options={"include_usage": True})
    whole = client.chat.completions.create(model="llm", **asked.request)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_chat_second_turn_knows_the_first(client: openai.OpenAI) -> None:
    """An earlier turn determines the answer; without it the answer differs."""
    name_given, name_asked, name_unknown = dialogue("name-given"), dialogue("name-asked"), dialogue("name-unknown")
    messages = list(name_given.request["messages"])
    first = client.chat.completions.create(model="llm", messages=messages).choices[0].message
    messages += [first.to_dict(mode="json"), name_asked.request["messages"][-1]]
    second = client.chat.completions.create(model="llm", messages=messages).choices[0].message
    assert (second.content or "").strip() == name_asked.content
    assert words(client, name_unknown) == name_unknown.content != name_asked.content


def test_chat_system_message_changes_the_answer(client: openai.OpenAI) -> None:
    """One question, three system messages, three answers."""
    for name in ("svd", "svd-pirate", "svd-jar-jar"):
        assert words(client, dialogue(name)) == dialogue(name).content


@pytest.mark.parametrize("name", ["tiny", "llm"])
def test_chat_every_name_of_the_model_answers(client: openai.OpenAI, name: str) -> None:
    """The key and `llm` mean the same model."""
    assert words(client, dialogue("capital"), model=name) == dialogue("capital").content


def test_chat_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    """An unknown name is 404 in OpenAI's shape, with the name."""
    with pytest.raises(openai.NotFoundError) as refused:
        words(client, dialogue("capital"), model="gpt-nothing")
    assert "gpt-nothing" in refused.value.message


def test_models_list_has_every_name(client: openai.OpenAI, tiny: Service) -> None:
    """`client.models.list()` gives the names that requests may use: all of the registry."""
    assert {model.id for model in client.models.list()} == {"llm", *Registry.load().specs}


def test_chat_max_tokens_cuts_the_answer(client: openai.OpenAI) -> None:
    """A truncated answer has finish reason `length` and is the beginning of the whole answer."""
    asked = dialogue("count")
    answer = client.chat.completions.create(model="llm", max_tokens=12, **asked.request)
    cut = (answer.choices[0].message.content or "").strip()
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert cut == asked.content[: len(cut)]


def test_chat_stop_word_ends_the_answer(client: openai.OpenAI) -> None:
    """The answer ends before a stop word."""
    asked = dialogue("count")
    assert words(client, asked, stop=[" 5"]) == asked.content.partition(" 5")[0]


def test_chat_logprobs_give_the_likeliest_tokens(client: openai.OpenAI) -> None:
    """Each token has its log probability and two alternatives, of which a greedy answer takes the first."""
    answer = client.chat.completions.create(
        model="llm", logprobs=True, top_logprobs=2, temperature=0, **dialogue("capital").request
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert answer.usage is not None
    assert len(logprobs.content) == answer.usage.completion_tokens
    for token in logprobs.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 2
        assert token.logprob == max(other.logprob for other in token.top_logprobs)


def test_completion_continues_the_prompt(client: openai.OpenAI) -> None:
    """A raw prompt is continued."""
    prompt, text = completion("once")
    answer = client.completions.create(model="llm", prompt=prompt, max_tokens=100)
    assert answer.choices[0].text == text


def test_completion_with_echo_begins_with_the_prompt(client: openai.OpenAI) -> None:
    """`echo` puts the prompt before its continuation."""
    prompt, text = completion("once")
    answer = client.completions.create(model="llm", prompt=prompt, max_tokens=100, echo=True)
    assert answer.choices[0].text == prompt + text


def test_completion_stream_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    """A streamed completion is the same text in pieces."""
    prompt, text = completion("once")
    with client.completions.create(model="llm", prompt=prompt, max_tokens=100, stream=True) as stream:
        pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert len(pieces) > 1
    assert "".join(pieces) == text


def test_completion_logprobs_cover_the_text(client: openai.OpenAI) -> None:
    """The tokens of the log probabilities are the text."""
    prompt, text = completion("capital-raw")
    choice = client.completions.create(model="llm", prompt=prompt, max_tokens=100, logprobs=1).choices[0]
    assert choice.logprobs is not None
    assert text in "".join(choice.logprobs.tokens or [])
    assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs or [] if logprob is not None)


def test_completion_several_prompts_each_have_an_answer(client: openai.OpenAI) -> None:
    """A list of prompts has its answers in the same order."""
    once, capital = completion("once"), completion("capital-raw")
    answer = client.completions.create(model="llm", prompt=[once[0], capital[0]], max_tokens=100)
    assert [choice.text for choice in sorted(answer.choices, key=lambda c: c.index)] == [once[1], capital[1]]
