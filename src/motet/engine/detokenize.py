"""Tokens → text, a piece at a time: whole characters only, and nothing that may still become a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """The text of one growing answer.

    `push` returns text that is final. Text is held back while it could be the beginning of a stop string, or bytes of
    an unfinished character; `flush` returns what is left at the end.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._decode = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._hold = max((len(s) for s in stop), default=0) - 1
        self._held = ""
        self._undecoded: list[int] = []
        self.stopped = False

    def push(self, token_ids: Sequence[int]) -> str:
        """Text that the new tokens make final. After a stop string was met, `stopped` is true and nothing follows."""
        for token in token_ids:
            if self.stopped:
                break
            piece = self._decode.step(self._tokenizer, token)
            self._undecoded.append(token)
            if piece is not None:
                self._undecoded.clear()
                self._held += piece
                self._cut()
        return self._release()

    def flush(self) -> str:
        """The rest of the text; an unfinished character becomes U+FFFD."""
        if self.stopped:
            return ""
        rest = self._held + self._tokenizer.decode(self._undecoded, skip_special_tokens=True)
        self._held = ""
        self._undecoded.clear()
        return rest

    def _cut(self) -> None:
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self._held = self._held[: min(found)]
            self.stopped = True

    def _release(self) -> str:
        keep = 0 if self.stopped else self._overlap()
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def _overlap(self) -> int:
        """How many characters at the end may begin a stop string."""
        for length in range(min(self._hold, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(s.startswith(tail) for s in self._stop):
                return length
        return 0
