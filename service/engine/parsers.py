"""The tool and reasoning parsers that fit a model, where its family and its chat template leave no doubt.

A parser reads the text that a model was trained to write, and the chat template shows that text: it repeats earlier
calls and thoughts in it. So the template decides, and the family where several parsers read the same text or the
template does not show it. Where neither is certain there is no parser: a wrong one would hide answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from service.engine.model_files import ModelFiles
from service.registry.models import ModelSpec

NONE = "none"  # in an entry: no parser, whatever the template shows


@dataclass(frozen=True)
class Rule:
    """A parser, and when it fits.

    Attributes:
        texts: Regular expressions that the template has, all of them.
        families: Beginnings of the families that it is for; none: any family.
        thinks: How an answer begins in the template: `by default` with a thought that a request can switch off, or
            `always` with one.
    """

    parser: str
    texts: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    thinks: Literal["", "by default", "always"] = ""

    def fits(self, family: str, template: str) -> bool:
        """Tell whether it fits a model."""
        if self.families and not family.startswith(self.families):
            return False
        opening = template[max(0, template.rfind("add_generation_prompt")) :]
        if self.thinks and ("<think>" not in opening or _SWITCHED_OFF[self.thinks] in opening):
            return False
        return all(re.search(text, template) for text in self.texts)


# What the beginning of an answer has where a request decides: Qwen3.5's smallest models think only when they are told
# to, and vLLM's parsers then take the whole answer for a thought.
_SWITCHED_OFF = {"by default": "enable_thinking is true", "always": "thinking"}
_JOINT = re.compile(
    r"""['"]\s*-?\}\}\s*\{\{-?\s*['"]"""
)  # between two texts that a template writes one after the other
_PYTHONIC = r"\[\w+\(\w+="
_XML_CALL = (r"<tool_call>", r"<function=", r"<parameter=")
_JSON_CALL = r"<tool_call>(?:\s|\\n)*\{\\?\"name\\?\""
_DEEPSEEK_CALL = r"<.tool▁calls▁begin.>"  # whose bars are wide ones
_LLAMA_CALL = r"Respond in the format \{\"name\": function name, \"parameters\": dictionary"

# The first that fits counts. The texts are those that vLLM 0.32.0's parsers look for, in vllm/tool_parsers and
# vllm/parser, as the templates of the models write them.
TOOL_RULES = (
    Rule("openai", families=("gpt_oss",)),
    Rule("gemma4", (r"<\|tool_call>call:",), ("gemma4",)),
    Rule("functiongemma", (r"<start_function_call>",)),
    Rule("llama4_pythonic", (_PYTHONIC,), ("llama4",)),
    Rule("pythonic", (_PYTHONIC,), ("gemma3", "llama", "mllama")),
    Rule("llama3_json", (_LLAMA_CALL,), ("llama", "mllama")),
    Rule("mistral", (r"\[TOOL_CALLS\]", r"\[AVAILABLE_TOOLS\]")),
    Rule("deepseek_v3", (_DEEPSEEK_CALL, r"```json")),
    Rule("deepseek_v31", (_DEEPSEEK_CALL,)),
    Rule("kimi_k2", (r"<\|tool_calls_section_begin\|>",)),
    Rule("seed_oss", (r"<seed:tool_call>",)),
    Rule("minimax_m2", (r"<minimax:tool_call>",), ("minimax_m2",)),
    Rule("longcat", (r"<longcat_tool_call>",)),
    Rule("internlm", (r"<\|action_start\|>", r"<\|plugin\|>"), ("internlm2",)),
    Rule("olmo3", (r"<function_calls>",), ("olmo3",)),
    Rule("apertus", (r"<\|tools_prefix\|>",), ("apertus",)),
    Rule("hunyuan_a13b", (r"<tool_calls>",), ("hunyuan_v1_moe",)),
    Rule("jamba", (r"<tool_calls>",), ("jamba",)),
    Rule("phi4_mini_json", (r"functools",), ("phi3", "phi4")),
    Rule("lfm2", families=("lfm2",)),
    Rule("granite-20b-fc", (r"<function_call>",), ("gpt_bigcode",)),
    Rule("granite", (r"<\|tool_call\|>",), ("granite",)),
    Rule("granite4", (_JSON_CALL,), ("granite",)),
    Rule("ernie45", (r"<tool_call>",), ("ernie4_5",)),
    Rule("glm45", (r"<tool_call>", r"<arg_key>"), ("glm4", "glm_moe")),
    Rule("step3p5", _XML_CALL, ("step3p5",)),
    Rule("mimo", _XML_CALL, ("mimo",)),
    Rule("qwen3_coder", _XML_CALL, ("qwen", "nemotron_h")),
    Rule("hermes", (_JSON_CALL,)),
)
REASONING_RULES = (
    Rule("openai_gptoss", families=("gpt_oss",)),
    Rule("gemma4", (r"<\|channel>", r"<channel\|>"), ("gemma4",)),
    Rule("seed_oss", (r"<seed:think>",)),
    Rule("mistral", (r"\[THINK\]",)),
    Rule("granite", (r"Here is my thought process:",), ("granite",)),
    Rule("hunyuan_a13b", (r"<think>", r"<answer>"), ("hunyuan_v1_moe",)),
    Rule("kimi_k2", (r"<think>",), ("kimi_k2",)),
    Rule("glm45", (r"<think>", r"<arg_key>"), ("glm4", "glm_moe")),
    Rule("deepseek_v3", (r"if not thinking", r"<.Assistant.>"), ("deepseek_v3",)),
    Rule("olmo3", families=("olmo3",), thinks="always"),
    Rule("step3p5", families=("step3p5",), thinks="always"),
    Rule("nemotron_v3", _XML_CALL, ("nemotron_h",), thinks="by default"),
    Rule("qwen3", families=("qwen3",), thinks="by default"),
    Rule("deepseek_r1", families=("deepseek_v3", "qwen2", "llama"), thinks="always"),
)


def with_parsers(spec: ModelSpec, files: ModelFiles) -> ModelSpec:
    """Return the entry with the parsers that its model's files show, where it names none and generates text."""
    if spec.task not in {None, "generate"}:
        return spec
    family, template = files.family, _JOINT.sub("", files.chat_template)
    found: dict[str, str | None] = {
        "tool_call_parser": _first(TOOL_RULES, family, template) if _takes_tools(template) else None,
        "reasoning_parser": _first(REASONING_RULES, family, template),
    }
    named = spec.model_dump(include=set(found))
    decided = {name: named[name] or found[name] for name in found}
    return spec.model_copy(update={name: None if value == NONE else value for name, value in decided.items()})


def lacks_tool_parser(spec: ModelSpec, files: ModelFiles | None) -> bool:
    """Tell whether an engine of the entry is certain to have no tool parser; `files` None: they are not here yet."""
    if any(argument.startswith("--tool-call-parser") for argument in spec.extra_args):
        return False
    if spec.tool_call_parser or not (files and files.chat_template):
        return spec.tool_call_parser == NONE
    return with_parsers(spec, files).tool_call_parser is None


def _takes_tools(template: str) -> bool:
    """Tell whether the template puts the tools of a request into the prompt."""
    return any(re.search(r"\btools\b", code) for code in re.findall(r"\{[{%].*?[}%]\}", template, re.S))


def _first(rules: Sequence[Rule], family: str, template: str) -> str | None:
    return next((rule.parser for rule in rules if rule.fits(family, template)), None)
