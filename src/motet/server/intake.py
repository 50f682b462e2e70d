"""From a parsed request to a Job: what to generate, for which adapter, how.

Text is tokenised in one thread of its own: tokenising a long prompt takes from tens of milliseconds to seconds that
other clients' streams must not notice, and tokenizers must not be entered from several threads at once. Tenants take
turns for it. Text that cannot fit in the context whatever its tokens are is refused before that, and what is long is
judged by the tokens of its beginning: 8 MiB take 12 s, what fills a context of 131,072 tokens with English 0.6 s.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from motet.config import ServerConfig
from motet.engine.protocol import AdapterHost, Generator
from motet.errors import InvalidRequest
from motet.server.openai import ChatRequest, CompletionRequest, Message, refuse_unsupported
from motet.server.sampling import ContextExceeded, fit, max_tokens_of, sampling_params
from motet.server.turns import Turns
from motet.server.workers import Workers
from motet.types import BASE, Account, AdapterRecord, SamplingParams

_MAX_PROMPTS = 256  # of one text completion
_MAX_CHARS_PER_TOKEN = 64  # English has 4-5, indented code up to 20; no whole context of text has more
_BEGINNING_CHARS = 8  # for each token of the context: longer than most texts that fit in it
_SEAM_TOKENS = 64  # by which the tokens of a beginning may differ from the beginning of the tokens
_COMPLETION_TOKENS = 16  # OpenAI's default length of a text completion


@dataclass(frozen=True)
class Prompt:
    """The tokens of one prompt and how to go on from them."""

    tokens: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True)
class Job:
    """One HTTP request, understood. `digest` is the adapter's or BASE; `fingerprint` names the weights.

    `model` is what answers: the version, if what the request `asked` for is an alias.
    """

    id: str
    asked: str
    model: str
    digest: str
    fingerprint: str
    account: Account
    prompts: tuple[Prompt, ...]
    stream: bool
    include_usage: bool

    @property
    def n(self) -> int:
        """Choices per prompt."""
        return self.prompts[0].params.n

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt.tokens) for prompt in self.prompts)

    @property
    def most_tokens(self) -> int:
        """Prompt and answer together, if every choice is as long as it may be."""
        return self.prompt_tokens + sum(p.params.n * p.params.max_tokens for p in self.prompts)


class Intake:
    """Checks requests against the served models and turns them into jobs."""

    def __init__(self, generator: Generator, host: AdapterHost, config: ServerConfig) -> None:
        self._generator = generator
        self._host = host
        self._config = config
        self._turns = Turns(Workers(1))

    @property
    def max_commas(self) -> int:
        """The most list elements that a request may have: 20 ms of parsing, or the context twice over."""
        return max(1 << 17, 2 * self._host.spec.max_model_len)

    async def chat(self, asked: ChatRequest, adapter: AdapterRecord | None, account: Account) -> Job:
        """Raises InvalidRequest for a message, a bound or a length."""
        params = sampling_params(asked, self._config, self._host.spec)
        tokens = await self._turns.run(account.tenant, self._encode_chat, asked.messages)
        return self._job("chatcmpl", asked, adapter, account, [tokens], params, None)

    async def completion(
        self, asked: CompletionRequest, adapter: AdapterRecord | None, account: Account
    ) -> Job:
        """Raises InvalidRequest for a prompt, a bound or a length."""
        prompts = _split(asked.prompt)
        params = sampling_params(asked, self._config, self._host.spec)
        encoded = [await self._encode(prompt, account.tenant) for prompt in prompts]
        return self._job("cmpl", asked, adapter, account, encoded, params, _COMPLETION_TOKENS)

    def _job(
        self,
        kind: str,
        asked: ChatRequest | CompletionRequest,
        adapter: AdapterRecord | None,
        account: Account,
        prompts: list[list[int]],
        params: SamplingParams,
        default_tokens: int | None,
    ) -> Job:
        digest = adapter.digest if adapter else BASE
        context, wanted = self._host.spec.max_model_len, max_tokens_of(asked)
        return Job(
            id=f"{kind}-{uuid.uuid4().hex}",
            asked=asked.model,
            model=adapter.name if adapter else asked.model,
            digest=digest,
            fingerprint="fp_" + (digest or self._host.spec.digest).rpartition(":")[2][:12],
            account=account,
            prompts=tuple(
                Prompt(tuple(tokens), fit(params, len(tokens), wanted, default_tokens, context))
                for tokens in prompts
            ),
            stream=bool(asked.stream),
            include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        )

    def _encode_chat(self, messages: list[Message]) -> list[int]:
        if not messages:
            raise InvalidRequest("messages must hold at least one message", "messages")
        self._check_chars(len(messages) * _MAX_CHARS_PER_TOKEN)  # a message is at least one token
        plain = [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]
        contents = [str(message["content"]) for message in plain]
        self._check_chars(sum(map(len, contents)))
        self._check_beginning("\n".join(contents))
        return self._generator.encode_chat(plain)

    def _encode_text(self, text: str) -> list[int]:
        self._check_beginning(text)
        return self._generator.encode(text)

    async def _encode(self, prompt: str | list[int], tenant: str) -> list[int]:
        if isinstance(prompt, str):
            self._check_chars(len(prompt))
            tokens = await self._turns.run(tenant, self._encode_text, prompt)
        else:
            tokens = prompt
            vocab_size = self._host.spec.vocab_size
            if not all(0 <= token < vocab_size for token in tokens):
                raise InvalidRequest(f"prompt token ids must be between 0 and {vocab_size - 1}", "prompt")
        if not tokens:
            raise InvalidRequest("prompt must hold at least one token", "prompt")
        return tokens

    def _check_chars(self, count: int) -> None:
        if count > self._host.spec.max_model_len * _MAX_CHARS_PER_TOKEN:
            raise self._too_long()

    def _check_beginning(self, text: str) -> None:
        """Refuse long text without making tokens of more than its beginning, where that is too long already."""
        context = self._host.spec.max_model_len
        chars = context * _BEGINNING_CHARS
        if len(text) > chars and len(self._generator.encode(text[:chars])) > context + _SEAM_TOKENS:
            raise self._too_long()

    def _too_long(self) -> ContextExceeded:
        context = self._host.spec.max_model_len
        return ContextExceeded(f"the prompt's text cannot fit in the model's context of {context} tokens")


def _split(prompt: str | list[int | str | list[int]]) -> list[str | list[int]]:
    """The prompts of a request: a text, token ids, a list of texts or a list of lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if all(isinstance(part, int) for part in prompt):
        return [[part for part in prompt if isinstance(part, int)]]
    prompts = [part for part in prompt if not isinstance(part, int)]
    if len({type(part) for part in prompt}) != 1:
        raise InvalidRequest("prompt must be one text, token ids, or a list of either, unmixed", "prompt")
    if len(prompts) > _MAX_PROMPTS:
        raise InvalidRequest(f"prompt may hold at most {_MAX_PROMPTS} prompts, got {len(prompts)}", "prompt")
    return prompts


def _plain(message: Message, where: str) -> dict[str, object]:
    """The message as chat templates read it; they know `developer` by its older name, `system`."""
    refuse_unsupported(message, f"{where}.")
    if message.role in ("tool", "function"):
        raise InvalidRequest(f"{where}.role {message.role!r} is not supported", f"{where}.role")
    if message.content is None:
        raise InvalidRequest(f"{where}.content is missing", f"{where}.content")
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, object] = {"role": role, "content": _text(message, where)}
    return plain if message.name is None else {**plain, "name": message.name}


def _text(message: Message, where: str) -> str:
    """The text of a message; several text parts are its lines."""
    if isinstance(message.content, str):
        return message.content
    lines = []
    for i, part in enumerate(message.content or ()):
        if part.type != "text" or part.text is None:
            raise InvalidRequest(
                f"{where}.content[{i}]: only text parts are supported, got {part.type[:40]!r}",
                f"{where}.content",
            )
        refuse_unsupported(part, f"{where}.content[{i}].")
        lines.append(part.text)
    return "\n".join(lines)
