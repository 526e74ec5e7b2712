"""Parsers that follow from a model's family and chat template: the right one, or none."""

from __future__ import annotations

import pytest

from service.engine.model_files import ModelFiles
from service.engine.parsers import lacks_tool_parser, with_parsers
from service.registry.models import ModelSpec, Registry

SPECS = Registry.load().specs
MINE = ModelSpec(key="mine", path="mine")
TOOLS = "{%- for tool in tools -%}{{ tool | tojson }}{%- endfor -%}"
JSON_CALL = TOOLS + r"{{- '<tool_call>\n{\"name\": <function-name>, \"arguments\": <arguments>}\n</tool_call>' }}"
XML_CALL = TOOLS + "<tool_call>\n<function=example>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"
LLAMA_CALL = (
    TOOLS + """{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name ...}.' }}"""
)
DEEPSEEK_CALL = TOOLS + "{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + name }}"  # noqa: RUF001 - its bars are wide
GEMMA4_CALL = TOOLS + "{{- '<|tool_call>call:' + name }}"
SWITCHED_OFF = (
    r"{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and "
    r"enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
SWITCHED_ON = (
    r"{%- if add_generation_prompt %}{%- if enable_thinking is defined and enable_thinking is true %}{{- '<think>\n' }}"
    r"{%- else %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
ALWAYS = r"{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
NEVER = r"{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"

# What the models of the registry have: family, and how their templates write calls and begin answers.
REGISTRY = {
    "qwen3-8b": ("qwen3", JSON_CALL + SWITCHED_OFF),
    "qwen3-0.6b": ("qwen3", JSON_CALL + SWITCHED_OFF),
    "qwen3-4b": ("qwen3", JSON_CALL + NEVER),
    "qwen3-30b-a3b": ("qwen3_moe", JSON_CALL + NEVER),
    "qwen3-235b": ("qwen3_moe", JSON_CALL + NEVER),
    "qwen3-vl-30b": ("qwen3_vl_moe", JSON_CALL + NEVER),
    "llama-3.1-8b": ("llama", LLAMA_CALL + NEVER),
    "llama-3.1-8b-fp8": ("llama", LLAMA_CALL + NEVER),
    "gemma-3-12b": ("gemma3", ""),
    "gemma-3-27b": ("gemma3", ""),
    "gpt-oss-20b": ("gpt_oss", TOOLS + "<|channel|>"),
    "gpt-oss-120b": ("gpt_oss", TOOLS + "<|channel|>"),
    "qwen3.8-27b": ("qwen3_5", XML_CALL + ALWAYS),
    "qwen3.6-35b-a3b": ("qwen3_5_moe", XML_CALL + SWITCHED_OFF),
    "gemma-4-26b-a4b": ("gemma4", GEMMA4_CALL + "<|channel>thought\n<channel|>"),
}


def parsers(family: str, template: str, spec: ModelSpec = MINE) -> tuple[str | None, str | None]:
    """Return the tool parser and the reasoning parser of a model."""
    found = with_parsers(spec, ModelFiles({"model_type": family}, template))
    return found.tool_call_parser, found.reasoning_parser


@pytest.mark.parametrize("key", [key for key, spec in SPECS.items() if spec.task == "generate"])
def test_parsers_of_a_registry_entry_follow_from_its_model(key: str) -> None:
    """Without its own words the entry gets the same parsers; `tiny` and Gemma 3's template are the real files."""
    spec = SPECS[key]
    bare = spec.model_copy(update={"tool_call_parser": None, "reasoning_parser": None})
    if spec.directory:
        files = ModelFiles.read(spec.directory)
    else:
        family, template = REGISTRY[key]
        own = spec.chat_template_file
        files = ModelFiles({"model_type": family}, own.read_text() if own else template)
    assert with_parsers(bare, files) == spec


@pytest.mark.parametrize(
    ("family", "template", "expected"),
    [
        ("llama", JSON_CALL + NEVER, ("hermes", None)),  # Hermes 3: the template decides, not the family
        ("qwen2", JSON_CALL + ALWAYS, ("hermes", "deepseek_r1")),  # QwQ
        ("qwen3_moe", XML_CALL + NEVER, ("qwen3_coder", None)),  # Qwen3-Coder
        ("qwen3_moe", JSON_CALL + ALWAYS, ("hermes", "qwen3")),  # Qwen3-Thinking-2507
        ("qwen3_5", XML_CALL + SWITCHED_ON, ("qwen3_coder", None)),  # Qwen3.5-0.8B thinks only when told to
        ("nemotron_h", XML_CALL + SWITCHED_OFF, ("qwen3_coder", "nemotron_v3")),
        ("step3p5", XML_CALL + ALWAYS, ("step3p5", "step3p5")),
        ("deepseek_v3", DEEPSEEK_CALL + "```json" + ALWAYS, ("deepseek_v3", "deepseek_r1")),
        ("deepseek_v3", DEEPSEEK_CALL + NEVER, ("deepseek_v31", None)),
        ("glm4_moe", TOOLS + "<tool_call>name<arg_key>k</arg_key><think></think>", ("glm45", "glm45")),
        ("granite", TOOLS + "respond only with <|tool_call|>", ("granite", None)),
        ("granitemoehybrid", JSON_CALL, ("granite4", None)),
        ("mistral", "[AVAILABLE_TOOLS]" + TOOLS + "[TOOL_CALLS][THINK]", ("mistral", "mistral")),
        ("llama4", TOOLS + "Use exact format: [func_name1(name1=value1)]", ("llama4_pythonic", None)),
        ("llama", TOOLS + "Respond in the format [func_name1(name1=value1)]", ("pythonic", None)),
        ("seed_oss", TOOLS + "<seed:tool_call><seed:think>", ("seed_oss", "seed_oss")),
        ("kimi_k2", TOOLS + "<|tool_calls_section_begin|><think></think>", ("kimi_k2", "kimi_k2")),
    ],
)
def test_parsers_of_other_families_follow_from_the_template(
    family: str, template: str, expected: tuple[str | None, str | None]
) -> None:
    """As vLLM's documentation names them for these models."""
    assert parsers(family, template) == expected


@pytest.mark.parametrize(
    ("family", "template"),
    [
        ("llama", "{% for message in messages %}<|im_start|>{{ message.content }}{% endfor %}" + NEVER),  # SmolLM2
        ("llama", ""),
        ("", JSON_CALL.replace("tools", "documents")),
        ("phi3", TOOLS + "<tool_call>[{...}]</tool_call>"),
        ("llama", XML_CALL),  # a format of Qwen's in a family whose parser for it is not known
        ("ernie4_5_x", TOOLS),
        ("cohere2", TOOLS + "<|START_ACTION|>"),
    ],
)
def test_parsers_that_are_not_certain_are_left_out(family: str, template: str) -> None:
    """A template without tools, an unknown format, none at all: a wrong parser would hide answers."""
    assert parsers(family, template) == (None, None)


def test_parsers_that_an_entry_names_win() -> None:
    """`none` is a name too: then there is no parser."""
    spec = MINE.model_copy(update={"tool_call_parser": "mine", "reasoning_parser": "none"})
    assert parsers("qwen3", JSON_CALL + SWITCHED_OFF, spec) == ("mine", None)


def test_parsers_are_found_where_a_template_writes_a_call_in_pieces() -> None:
    """Hermes's template ends its text after each line."""
    pieces = TOOLS + """{{- "<tool_call>\n" }}\n{{- '{"name": <function-name>}\n' }}\n{{- '</tool_call>' }}"""
    assert parsers("llama", pieces) == ("hermes", None)


@pytest.mark.parametrize(
    ("entry", "template", "lacks"),
    [
        ({}, NEVER, True),
        ({}, JSON_CALL, False),
        ({}, "", False),  # such as one of mistral-common's, which needs no template
        ({}, None, False),
        ({"tool_call_parser": "hermes"}, NEVER, False),
        ({"tool_call_parser": "none"}, None, True),
        ({"extra_args": ("--tool-call-parser=hermes",)}, NEVER, False),
    ],
)
def test_lack_of_a_tool_parser_is_told_only_where_it_is_certain(
    entry: dict[str, object], template: str | None, lacks: bool
) -> None:
    """A request with tools is then refused before a wake."""
    files = None if template is None else ModelFiles({"model_type": "llama"}, template)
    assert lacks_tool_parser(MINE.model_copy(update=entry), files) is lacks
