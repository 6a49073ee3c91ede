"""The fields of requests: a table for each object of their JSON, and one rule for all tables.

Each field of a table has a check, which gives the value that is used, None for none, or raises BadRecord:
- what decides the answer has a check of its own;
- what cannot change the answer has `unused`: any value is accepted;
- what would change the answer, and is not there, has `off`: only a value that asks for nothing is accepted.
A field that is `null` counts as left out. A field of no table belongs to some other server: its name is returned.
Source: OpenAI's API reference, "Create chat completion" and "Create completion"; vLLM entrypoints/openai/*/protocol.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeGuard

from llava_fn.errors import BadRecord
from llava_fn.serve.refused import Refused

Check = Callable[[object], Any]
Table = Mapping[str, Check]
MOST_UNKNOWN = 2000  # bytes of the names of unknown fields; they go into a header


@dataclass(frozen=True)
class Fields:
    """The fields of a request that decide its answer, and what one that is left out means."""

    model: str
    messages: Sequence[object] = ()
    prompt: Sequence[str | tuple[int, ...]] = ()
    stream: bool = False
    stream_options: Mapping[str, bool] | None = None
    n: int = 1
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = -1  # a random one
    logprobs: bool | int | None = None  # chat: whether; text: how many alternatives each token brings
    top_logprobs: int = 0
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None


def short(value: object) -> str:
    """A value for an error message."""
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "what is nested so deeply"
    return text if len(text) <= 60 else text[:57] + "..."


def read(values: Mapping[str, object], table: Table, where: str = "") -> tuple[dict[str, Any], list[str]]:
    """The values that are used, each checked by itself, and the names of fields that are in no table.

    where: the object in the request, as messages[0], for errors. Raises Refused.
    """
    used, unknown = {}, []
    for name, value in values.items():
        if value is None:
            continue
        if name not in table:
            unknown.append(name)
            continue
        try:
            checked = table[name](value)
        except BadRecord as error:
            message = f"{where}: {name} {error}" if where else f"{name} {error}"
            raise Refused(400, message, (where or name).partition("[")[0]) from error
        if checked is not None:
            used[name] = checked
    return used, unknown


def unused(value: object) -> None:
    """The check of a field that cannot change the answer."""


def as_is(value: object) -> object:
    """The check of a field whose reader checks it."""
    return value


def off(*nothing: object) -> Check:
    """The check of a field that would change the answer and is not there. nothing: the values that ask for nothing."""

    def check(value: object) -> None:
        if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in nothing):
            advice = f", or give {' or '.join(map(json.dumps, nothing))}" if nothing else ""
            raise BadRecord(f"is not supported; leave it out{advice}")

    return check


def a(kind: type, what: str) -> Check:
    """The check of a value of one type."""

    def check(value: object) -> object:
        if not isinstance(value, kind):
            raise BadRecord(f"must be {what}, not {short(value)}")
        return value

    return check


def number(low: float, high: float, what: str) -> Check:
    """The check of a number from low to high."""

    def check(value: object) -> int | float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise BadRecord(f"must be {what}, not {short(value)}")
        return value

    return check


def whole(low: int, high: int, what: str) -> Check:
    """The check of a whole number from low to high, which JSON may write as 5.0."""

    def check(value: object) -> int:
        value = int(value) if isinstance(value, float) and value.is_integer() else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise BadRecord(f"must be {what}, not {short(value)}")
        return value

    return check


def _stop(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > 4 or not all(isinstance(s, str) and s for s in texts):
        raise BadRecord(f"must be a text or up to 4 of them, none empty, not {short(value)}")
    if any("\ud800" <= c <= "\udfff" for s in texts for c in s):
        raise BadRecord(f"must be in Unicode, not {short(value)}")
    return tuple(texts)


def _temperature(value: object) -> float:
    number(0, 2, "from 0 to 2")(value)
    return 0.0 if value == 0 else number(0.01, 2, "0, or at least 0.01")(value)


def _prompts(value: object) -> Sequence[str | tuple[int, ...]]:
    """A text, tokens, or a list of them."""
    many = [value] if isinstance(value, str) or _are_tokens(value) else value
    if isinstance(many, list) and many:
        texts, tokens = [p for p in many if isinstance(p, str)], [tuple(p) for p in many if _are_tokens(p)]
        if len(many) in (len(texts), len(tokens)):
            return texts or tokens
    raise BadRecord(f"must be a text, a list of tokens, or a list of these, and none empty, not {short(value)}")


def _are_tokens(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and value != []
        and all(isinstance(token, int) and not isinstance(token, bool) for token in value)
    )


FLAG, TEXT, OBJECT = a(bool, "true or false"), a(str, "a text"), a(dict, "an object")
_COUNT = whole(1, 2**62, "a whole number of at least 1")

STREAM_OPTIONS: Table = MappingProxyType(
    {"include_usage": FLAG, "include_obfuscation": unused, "continuous_usage_stats": off(False)}
)
_BOTH: Table = MappingProxyType({
    "model": TEXT,
    "stream": FLAG,
    "stream_options": OBJECT,
    "n": _COUNT,
    "max_tokens": _COUNT,
    "temperature": _temperature,
    "top_p": number(1e-6, 1, "above 0 and at most 1"),
    "top_k": whole(-1, 2**62, "a whole number; 0 and -1 are off"),
    "min_p": number(0, 1, "from 0 to 1"),
    "repetition_penalty": number(0.01, 100, "from 0.01 to 100; 1 is off"),
    "stop": _stop,
    "seed": whole(-(2**63), 2**64 - 1, "a whole number of 64 bits"),
    # who asks, where the answer is kept, and when it is computed
    **dict.fromkeys(("user", "metadata", "store", "service_tier", "safety_identifier", "priority", "request_id",
                     "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "stream_interval"), unused),
    # parts of features that are off: of beams, of truncation, of reasoning, of control tokens in an answer
    **dict.fromkeys(("length_penalty", "truncation_side", "include_reasoning", "spaces_between_special_tokens",
                     "return_mm_kwargs", "return_token_offsets"), unused),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_tokens", "routed_experts_prompt_start"), off(0)),
    **dict.fromkeys(("logit_bias", "vllm_xargs"), off({})),
    **dict.fromkeys(("stop_token_ids", "bad_words", "allowed_token_ids"), off([])),
    **dict.fromkeys(("use_beam_search", "watermarking", "include_stop_str_in_output", "ignore_eos", "echo",
                     "return_tokens_as_token_ids", "return_token_ids"), off(False)),
    "skip_special_tokens": off(True),
    "thinking_token_budget": off(-1),
    "response_format": off({"type": "text"}),
    # grammars of the answer, in vLLM's and other servers' words
    **dict.fromkeys(("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
                     "guided_decoding_backend", "guided_whitespace_pattern", "json_schema", "grammar", "regex",
                     "ebnf"), off()),
    **dict.fromkeys(("truncate_prompt_tokens", "prompt_logprobs", "logprob_token_ids", "repetition_detection",
                     "cache_salt", "kv_transfer_params", "ec_transfer_params"), off()),
})  # fmt: skip
CHAT: Table = MappingProxyType({
    **_BOTH,
    "messages": a(list, "a list"),
    "max_completion_tokens": _COUNT,
    "logprobs": FLAG,
    "top_logprobs": whole(0, 20, "a whole number from 0 to 20"),
    "continue_final_message": FLAG,
    "add_generation_prompt": FLAG,
    "parallel_tool_calls": unused,
    **dict.fromkeys(("tool_choice", "function_call"), off("none", "auto")),  # "auto" picks among no tools
    **dict.fromkeys(("tools", "functions", "documents"), off([])),
    "modalities": off(["text"]),
    "reasoning_effort": off("none"),
    "verbosity": off("medium"),
    **dict.fromkeys(("add_special_tokens", "return_prompt_text"), off(False)),
    **dict.fromkeys(("chat_template_kwargs", "media_io_kwargs", "mm_processor_kwargs"), off({})),
    **dict.fromkeys(("audio", "prediction", "moderation", "web_search_options", "chat_template", "prompt"), off()),
})  # fmt: skip
COMPLETION: Table = MappingProxyType({
    **_BOTH,
    "prompt": _prompts,
    "logprobs": whole(0, 20, "a whole number from 0 to 20"),
    "best_of": off(1),
    "suffix": off(""),
    "add_special_tokens": off(True),
    **dict.fromkeys(("prompt_embeds", "messages"), off()),
})  # fmt: skip
MESSAGE: Table = MappingProxyType({
    "role": TEXT,
    "content": as_is,
    # notes on an answer, and the reasoning behind it, which no template shows to a model again
    **dict.fromkeys(("annotations", "cache_control", "reasoning", "reasoning_content"), unused),
    **dict.fromkeys(("name", "refusal"), off("")),
    "tool_calls": off([]),
    **dict.fromkeys(("function_call", "tool_call_id", "audio"), off()),
})  # fmt: skip
_PART: Table = MappingProxyType({"type": TEXT, **dict.fromkeys(("cache_control", "prompt_cache_breakpoint"), unused)})
TEXT_PART: Table = MappingProxyType({**_PART, "text": TEXT})
IMAGE_URL: Table = MappingProxyType({"url": as_is, "detail": unused})  # there is one size
IMAGE_PART: Table = MappingProxyType({**_PART, "image_url": as_is, "detail": unused, "file_id": off()})
PARTS: Mapping[str, Table] = MappingProxyType({
    **dict.fromkeys(("text", "input_text", "output_text"), TEXT_PART),
    **dict.fromkeys(("image_url", "input_image"), IMAGE_PART),
})  # fmt: skip


def request(body: bytes, table: Table) -> tuple[Fields, list[str]]:
    """The fields of a request's JSON that are used, and the names of those that are in no table. Raises Refused."""
    try:
        values = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON ({error})") from error
    asked = "messages" if table is CHAT else "prompt"
    if not isinstance(values, dict):
        raise Refused(400, f"the body is an object with 'model' and {asked!r}, not {short(values)}")
    used, unknown = read(values, table)
    for name in ("model", asked):
        if name not in used:
            raise Refused(400, f"{name} is missing", name)
    if "stream_options" in used:
        used["stream_options"], more = read(used["stream_options"], STREAM_OPTIONS, "stream_options")
        unknown += [f"stream_options.{name}" for name in more]
    return Fields(**used), unknown


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{short(name)} stands there twice")
        values[name] = value
    return values
