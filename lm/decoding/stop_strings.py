"""Text as its tokens come, up to a stop string."""

from collections.abc import Iterator, Sequence

from lm.data.tokenizer import Tokenizer
from lm.decoding.generator import Generator
from lm.decoding.sampling import row_keys


class TextStream:
    """The text of tokens as they come. What may still change is held back: the beginning of a
    character, or of a stop string.

    Attributes:
      text: all that is settled.
      ended: a stop string was found; the text ends before the first one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()):
        if "" in stop:
            raise ValueError("a stop string is empty")
        self._tokenizer, self._ids, self._stop = tokenizer, list(prompt_ids), tuple(stop)
        # decoded with the prompt: some tokenizers drop a text's first space
        self._start = len(tokenizer.decode(prompt_ids))
        self.text, self.ended = "", False

    def push(self, token: int) -> str:
        """Adds a token; returns what is settled by it."""
        self._ids.append(token)
        return self._settle(final=False)

    def close(self) -> str:
        """No more tokens come; returns the rest."""
        return self._settle(final=True)

    def _settle(self, final: bool) -> str:
        if self.ended:
            return ""
        whole = self._tokenizer.decode(self._ids)[self._start :]
        found = [at for at in (whole.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.ended, end = True, min(found)
        elif final:
            end = len(whole)
        else:
            end = len(whole.rstrip("\ufffd"))
            held = [
                n
                for stop in self._stop
                for n in range(1, len(stop))
                if whole[:end].endswith(stop[:n])
            ]
            end -= max(held, default=0)
        new, self.text = whole[len(self.text) : end], whole[: max(end, len(self.text))]
        return new


def stream(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seeds: Sequence[int],
    stop: Sequence[str] = (),
) -> Iterator[list[str]]:
    """Yields what is new of each row's text, token by token, and ends with all rows."""
    texts = [TextStream(tokenizer, ids, stop) for ids in prompts]
    for tokens in generator.stream(prompts, max_new_tokens, row_keys(seeds)):
        yield [
            text.push(token) if token >= 0 and token not in tokenizer.stop_ids else ""
            for text, token in zip(texts, tokens.tolist())
        ]
        if all(
            text.ended or token < 0 or token in tokenizer.stop_ids
            for text, token in zip(texts, tokens.tolist())
        ):
            break
    yield [text.close() for text in texts]
