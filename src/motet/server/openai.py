"""OpenAI's wire format: what a request may say, and what an answer looks like.

Requests are strict. A field is either used, or accepted because it cannot change the answer (`user`,
`metadata`…), or documented by OpenAI but not supported here — those are `Unsupported`, and any value but a neutral
one is refused by name — or unknown, and refused by name as well. Nothing that could change an answer is
dropped silently.
"""

from __future__ import annotations

import re
from typing import Generic, Literal, TypeVar

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType, field

from motet.errors import InvalidRequest

Unsupported = Raw | UnsetType
_NEUTRAL_BYTES = 64  # a longer value than this is not a neutral one
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none",),
    "tool_calls": ([],),
    "annotations": ([],),
    "functions": ([],),
    "function_call": ("none",),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "include_obfuscation": (False,),
}


class Strict(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a request; unknown fields are errors that name the field."""


class StreamOptions(Strict, frozen=True):
    include_usage: bool | None = None
    include_obfuscation: Unsupported = UNSET


class ContentPart(Strict, frozen=True):
    """One part of a message; only text parts are served."""

    type: str
    text: str | None = None
    image_url: Unsupported = UNSET
    input_audio: Unsupported = UNSET
    file: Unsupported = UNSET
    refusal: Unsupported = UNSET


class Message(Strict, frozen=True):
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Unsupported = UNSET
    tool_call_id: Unsupported = UNSET
    function_call: Unsupported = UNSET
    audio: Unsupported = UNSET
    refusal: Unsupported = UNSET
    annotations: Unsupported = UNSET


class Sampling(Strict, frozen=True):
    """What chat and text completions have in common. The last block is ours and vLLM's, not OpenAI's."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None


class ChatRequest(Sampling, frozen=True, kw_only=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    audio: Unsupported = UNSET
    chat_template: Unsupported = UNSET
    chat_template_kwargs: Unsupported = UNSET
    function_call: Unsupported = UNSET
    functions: Unsupported = UNSET
    modalities: Unsupported = UNSET
    moderation: Unsupported = UNSET
    parallel_tool_calls: Unsupported = UNSET
    prediction: Unsupported = UNSET
    prompt_cache_options: Unsupported = UNSET
    prompt_cache_retention: Unsupported = UNSET
    reasoning_effort: Unsupported = UNSET
    response_format: Unsupported = UNSET
    service_tier: Unsupported = UNSET
    store: Unsupported = UNSET
    tool_choice: Unsupported = UNSET
    tools: Unsupported = UNSET
    verbosity: Unsupported = UNSET
    web_search_options: Unsupported = UNSET


class CompletionRequest(Sampling, frozen=True, kw_only=True):
    prompt: str | list[int | str | list[int]]
    logprobs: int | None = None

    best_of: Unsupported = UNSET
    echo: Unsupported = UNSET
    suffix: Unsupported = UNSET


R = TypeVar("R", bound=Strict)
_PATH = re.compile(r" - at `(?:key` in `)?\$\.?(.*?)`$")
_FIELD = re.compile(r"(?:unknown|required) field `(.*?)`", re.DOTALL)


def parse(body: bytes, shape: type[R], max_commas: int) -> R:
    """Read `body` as a `shape`. Raises InvalidRequest that names the field at fault.

    `max_commas` bounds the elements of all lists and objects together before any of them is built: building
    is what costs memory and time, about 0.1 µs an element. Depth is bounded by msgspec (RecursionError in 0.1
    ms).
    """
    if body.count(b",") > max_commas:
        raise InvalidRequest(f"the request body has more than {max_commas} elements")
    try:
        request = msgspec.json.decode(body, type=shape)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)[:500], _param_of(str(error))) from None
    except RecursionError:
        raise InvalidRequest("the request body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the request body is not valid JSON: {error}"[:500]) from None
    refuse_unsupported(request)
    return request


def refuse_unsupported(part: Strict, where: str = "") -> None:
    """Raise InvalidRequest for a documented field that is not supported, unless its value changes nothing."""
    for name in part.__struct_fields__:
        value = getattr(part, name)
        if isinstance(value, Raw) and not _is_neutral(name, bytes(value)):
            raise InvalidRequest(f"{where}{name} is not supported{_why(name)}", f"{where}{name}")


def _is_neutral(name: str, value: bytes) -> bool:
    if value == b"null":
        return True
    return len(value) <= _NEUTRAL_BYTES and msgspec.json.decode(value) in _NEUTRAL.get(name, ())


def _why(name: str) -> str:
    if name in ("chat_template", "chat_template_kwargs"):
        return ": the server applies the model's own chat template"
    if name in _NEUTRAL:
        return " other than " + " or ".join(msgspec.json.encode(value).decode() for value in _NEUTRAL[name])
    return ""


def _param_of(message: str) -> str | None:
    """`$.messages[0].role` and an unknown or missing field of it, as OpenAI's `param`."""
    path = match.group(1) if (match := _PATH.search(message)) else ""
    name = match.group(1) if (match := _FIELD.search(message)) else ""
    return ".".join(part for part in (path, name[:200]) if part) or None


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Struct, frozen=True):
    """A token, its natural log-probability, and its UTF-8 bytes (null if it is only part of a character)."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionLogprobs(Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class ChatMessage(Struct, frozen=True):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(Struct, frozen=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatDelta(Struct, frozen=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(Struct, frozen=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class CompletionChoice(Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


C = TypeVar("C")


class Answer(Struct, Generic[C], frozen=True):
    """The envelope of answers and chunks. A stream's usage, if asked for, is null until the last chunk."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[C] = field(default_factory=list)
    usage: Usage | UnsetType | None = UNSET


class ModelCard(Struct, frozen=True, kw_only=True):
    """A served model: the base, or an adapter with `parent` (the base), its digest and its size."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "motet"
    root: str
    parent: str | None
    digest: str
    max_model_len: int
    rank: int | UnsetType = UNSET
    size_bytes: int | UnsetType = UNSET


class ModelList(Struct, frozen=True):
    data: list[ModelCard]
    object: str = "list"
