"""Incremental detokenising: text from a growing sequence of token ids, and stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from treeflash.errors import ConfigError
from treeflash.text.tokenizer import REPLACEMENT, Tokenizer

WINDOW_TOKENS = 8


class TextStream:
    """Text of a growing sequence of ids, piece by piece.

    The pieces joined are exactly the text of all ids or, if a stop string occurs, the text before
    it. A piece never ends in part of a character, nor in what may turn out to be the beginning of
    a stop string. Only a short window of ids is decoded at a time.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        """Start an empty text.

        Args:
            tokenizer: Decodes the ids.
            stop: Strings to stop at; the earliest in the text counts.

        Raises:
            ConfigError: A stop string is empty.
        """
        if "" in stop:
            raise ConfigError("a stop string is empty; leave it out")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._window: list[int] = []
        self._consumed = 0  # characters of the window's text that moved to _held or were returned
        self._held = ""  # settled characters that may begin a stop string
        self._pieces: list[str] = []
        self.stopped = False
        """Whether a stop string occurred; further ids are ignored."""
        self.tokens_used = 0
        """Ids pushed so far, up to and including the one that completed a stop string."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Append ids and return the text that is now final."""
        first_new = len(self._pieces)
        for token_id in token_ids:
            if self.stopped:
                break
            self.tokens_used += 1
            if token_id not in self._tokenizer.special_token_ids:
                self._push_one(token_id)
        return "".join(self._pieces[first_new:])

    def finish(self) -> str:
        """Return the text that was held back; no more ids follow."""
        if self.stopped:
            return ""
        rest = self._held + self._tokenizer.decode(self._window)[self._consumed :]
        self._window, self._consumed, self._held = [], 0, ""
        self._pieces.append(rest)
        return rest

    def _push_one(self, token_id: int) -> None:
        self._window.append(token_id)
        window_text = self._tokenizer.decode(self._window)
        settled = self._settled_length(window_text)
        candidate = self._held + window_text[self._consumed :]
        certain = self._held + window_text[self._consumed : settled]
        # A replacement character that is not certain may be part of a character still to come.
        texts = {stop: certain if REPLACEMENT in stop else candidate for stop in self._stop}
        cuts = [text.find(stop) for stop, text in texts.items() if stop in text]
        if cuts:
            self._pieces.append(candidate[: min(cuts)])
            self.stopped = True
            return
        self._held += window_text[self._consumed : settled]
        self._consumed = settled
        sure = self._held[: len(self._held) - self._stop_overlap()].rstrip(REPLACEMENT)
        if sure:
            self._pieces.append(sure)
            self._held = self._held[len(sure) :]
        if len(self._window) > 2 * WINDOW_TOKENS:
            self._shrink_window(window_text)

    def _settled_length(self, window_text: str) -> int:
        """Return how many characters of the window's text no further id can change."""
        end = len(self._window)
        while end and self._window[end - 1] in self._tokenizer.byte_token_ids:
            end -= 1  # byte-fallback decoders read a whole run of bytes as valid or as broken
        text = window_text
        if end < len(self._window):
            text = self._tokenizer.decode(self._window[:end])
        return len(text) - text.endswith(REPLACEMENT)

    def _stop_overlap(self) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, len(stop))
                if self._held.endswith(stop[:length])
            ),
            default=0,
        )

    def _shrink_window(self, window_text: str) -> None:
        """Forget the window's older ids if the newer ones alone decode to the same end.

        A cut inside a character garbles at most three bytes, and a cut before a token that
        decoders strip a space from garbles its first character: four equal characters prove
        that both decodes are in step from there on.
        """
        start = len(self._window) - WINDOW_TOKENS
        while start and self._window[start] in self._tokenizer.byte_token_ids:
            start -= 1
        tail = self._tokenizer.decode(self._window[start:])
        dropped = len(window_text) - len(tail)
        if len(tail) >= 4 and window_text.endswith(tail) and dropped <= self._consumed:
            self._window = self._window[start:]
            self._consumed -= dropped
