"""From OpenAI's sampling fields to SamplingParams, with every bound checked and the field at fault named."""

from __future__ import annotations

import msgspec

from motet.config import ServerConfig
from motet.errors import InvalidRequest
from motet.server.openai import ChatRequest, CompletionRequest, Sampling, refuse_unsupported
from motet.types import ModelSpec, SamplingParams

_MAX_STOP_STRINGS = 16
_MAX_STOP_CHARS = 1000
_MAX_STOP_TOKENS = 64
_MAX_LOGIT_BIAS = 300
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0, 100),
    "seed": (-(2**63), 2**63 - 1),
    "top_k": (-1, 2**31 - 1),
    "max_tokens": (1, 2**31 - 1),
    "max_completion_tokens": (1, 2**31 - 1),
    "min_tokens": (0, 2**31 - 1),
}
ABOVE_ZERO = ("top_p", "repetition_penalty")


class ContextExceeded(InvalidRequest):
    """Prompt and answer together do not fit in the model's context."""

    code = "context_length_exceeded"


def sampling_params(
    asked: ChatRequest | CompletionRequest, config: ServerConfig, spec: ModelSpec
) -> SamplingParams:
    """The sampling that was asked for, but for `max_tokens`, which `fit` sets. Raises InvalidRequest."""
    _check_ranges(asked)
    n = 1 if asked.n is None else asked.n
    _within("n", n, 1, config.max_n)
    if asked.stream_options is not None:
        if not asked.stream:
            raise InvalidRequest("stream_options is only allowed with stream=true", "stream_options")
        refuse_unsupported(asked.stream_options, "stream_options.")
    return SamplingParams(
        min_tokens=asked.min_tokens or 0,
        temperature=_or(asked.temperature, 1.0),
        top_p=_or(asked.top_p, 1.0),
        top_k=max(asked.top_k or 0, 0),
        min_p=_or(asked.min_p, 0.0),
        seed=asked.seed,
        presence_penalty=_or(asked.presence_penalty, 0.0),
        frequency_penalty=_or(asked.frequency_penalty, 0.0),
        repetition_penalty=_or(asked.repetition_penalty, 1.0),
        logit_bias=_logit_bias(asked.logit_bias or {}, spec.vocab_size),
        logprobs=_logprobs(asked, config.max_logprobs),
        stop=_stop(asked.stop),
        stop_token_ids=_stop_token_ids(asked.stop_token_ids or [], spec.vocab_size),
        ignore_eos=bool(asked.ignore_eos),
        n=n,
    )


def max_tokens_of(asked: ChatRequest | CompletionRequest) -> int | None:
    """How long the answer may be, as the client asked for it; None is the default. Raises InvalidRequest."""
    newer = asked.max_completion_tokens if isinstance(asked, ChatRequest) else None
    if newer is not None and asked.max_tokens not in (None, newer):
        raise InvalidRequest("max_tokens and max_completion_tokens differ; give one", "max_completion_tokens")
    return asked.max_tokens if newer is None else newer


def fit(
    params: SamplingParams, prompt_tokens: int, asked: int | None, default: int | None, context: int
) -> SamplingParams:
    """`params` with `max_tokens` for one prompt: what was asked for, else the default, else all that is left.

    Raises ContextExceeded when the prompt leaves no room for one token, or less than was asked for.
    """
    room = context - prompt_tokens
    if room < 1 or (asked is not None and asked > room):
        answer = f" and asks for {asked} tokens of answer" if asked is not None else ""
        raise ContextExceeded(
            f"the context holds {context} tokens; the request has {prompt_tokens} tokens of prompt{answer}",
            "max_tokens" if room >= 1 else None,
        )
    max_tokens = asked if asked is not None else min(room if default is None else default, room)
    if params.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {params.min_tokens}, more than max_tokens {max_tokens}", "min_tokens"
        )
    return msgspec.structs.replace(params, max_tokens=max_tokens)


def _check_ranges(asked: Sampling) -> None:
    for name, (low, high) in RANGES.items():
        value = getattr(asked, name, None)
        if value is not None:
            _within(name, value, low, high)
    for name in ABOVE_ZERO:
        if getattr(asked, name) == 0:
            raise InvalidRequest(f"{name} must be greater than 0", name)


def _logprobs(asked: ChatRequest | CompletionRequest, limit: int) -> int | None:
    """How many alternatives to report per token, None for no log-probabilities at all."""
    if isinstance(asked, CompletionRequest):
        if asked.logprobs is not None:
            _within("logprobs", asked.logprobs, 0, limit)
        return asked.logprobs
    if asked.top_logprobs is not None:
        _within("top_logprobs", asked.top_logprobs, 0, limit)
        if asked.top_logprobs and not asked.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs=true", "top_logprobs")
    return asked.top_logprobs or 0 if asked.logprobs else None


def _stop(asked: str | list[str] | None) -> tuple[str, ...]:
    stop = (asked,) if isinstance(asked, str) else tuple(asked or ())
    if len(stop) > _MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop may hold at most {_MAX_STOP_STRINGS} strings, got {len(stop)}", "stop")
    if any(not 1 <= len(s) <= _MAX_STOP_CHARS for s in stop):
        raise InvalidRequest(f"each stop string must have 1-{_MAX_STOP_CHARS} characters", "stop")
    return stop


def _stop_token_ids(asked: list[int], vocab_size: int) -> tuple[int, ...]:
    if len(asked) > _MAX_STOP_TOKENS:
        raise InvalidRequest(f"stop_token_ids may hold at most {_MAX_STOP_TOKENS} ids", "stop_token_ids")
    for token in asked:
        _within("stop_token_ids", token, 0, vocab_size - 1)
    return tuple(asked)


def _logit_bias(asked: dict[int, float], vocab_size: int) -> dict[int, float]:
    if len(asked) > _MAX_LOGIT_BIAS:
        raise InvalidRequest(
            f"logit_bias may hold at most {_MAX_LOGIT_BIAS} entries, got {len(asked)}", "logit_bias"
        )
    for token, bias in asked.items():
        _within("logit_bias token id", token, 0, vocab_size - 1, "logit_bias")
        _within("logit_bias value", bias, -100, 100, "logit_bias")
    return asked


def _within(name: str, value: float, low: float, high: float, param: str | None = None) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be between {low} and {high}, got {str(value)[:40]}", param or name)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
