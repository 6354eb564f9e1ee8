"""Streams generated text, up to a stop string."""

from collections.abc import Iterator, Sequence

from lm.data.tokenizer import Tokenizer
from lm.decoding.generator import Generator
from lm.decoding.sampling import row_keys


class TextStream:
    """The text of a row's tokens, handed out as soon as later tokens can't change it. The beginning
    of a character, or of a stop string, waits for the tokens that complete it.

    Attributes:
      text: all that has been handed out.
      ended: True once a stop string came; the text ends before the first one.

    Raises:
      ValueError: a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()):
        if "" in stop:
            raise ValueError("a stop string is empty")

        self._tokenizer = tokenizer
        self._stop = tuple(stop)

        # Tokens are decoded behind their prompt: some tokenizers drop a text's first space.
        self._ids = list(prompt_ids)
        self._prompt_length = len(tokenizer.decode(prompt_ids))

        self.text = ""
        self.ended = False

    def push(self, token: int) -> str:
        """Adds a token; returns the text that it settles."""
        self._ids.append(token)
        return self._hand_out(final=False)

    def close(self) -> str:
        """Returns the rest of the text: no more tokens come."""
        return self._hand_out(final=True)

    def _hand_out(self, final: bool) -> str:
        if self.ended:
            return ""

        decoded = self._tokenizer.decode(self._ids)[self._prompt_length :]
        stop_position = self._first_stop(decoded)
        if stop_position >= 0:
            self.ended = True
            end = stop_position
        elif final:
            end = len(decoded)
        else:
            # Bytes of an unfinished character are decoded as U+FFFD.
            end = len(decoded.rstrip("\ufffd"))
            end -= self._length_of_partial_stop(decoded[:end])

        # What was handed out is not taken back: the text never gets shorter.
        new = decoded[len(self.text) : end]
        self.text = decoded[: max(end, len(self.text))]
        return new

    def _first_stop(self, text: str) -> int:
        """Where the first stop string begins in the text; -1 if there is none."""
        positions = [text.find(stop) for stop in self._stop]
        return min([position for position in positions if position >= 0], default=-1)

    def _length_of_partial_stop(self, text: str) -> int:
        """How many characters at the end of the text may be the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(1, len(stop)):
                if text.endswith(stop[:length]):
                    longest = max(longest, length)
        return longest


def stream_texts(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seeds: Sequence[int],
    stop: Sequence[str] = (),
) -> Iterator[list[str]]:
    """Continues prompts, text by text.

    Args:
      prompts: ids of each row.
      seeds: one for each row's draws.
      stop: strings that a text ends before.

    Yields:
      What is new of each row's text, once a token, until all rows have ended.
    """
    # A source is another text.
    texts = [TextStream(tokenizer, generator.before_text(ids), stop) for ids in prompts]

    for tokens in generator.stream(prompts, max_new_tokens, row_keys(seeds)):
        pieces = []
        all_ended = True
        for text, token in zip(texts, tokens.tolist()):
            # A row without a token has ended before, and a stop token has no text.
            stopped = token < 0 or token in tokenizer.stop_ids
            pieces.append("" if stopped else text.push(token))
            all_ended = all_ended and (stopped or text.ended)

        yield pieces
        if all_ended:
            break

    yield [text.close() for text in texts]
