"""Evals that generate text."""

from collections.abc import Iterator, Sequence

from lm.data.pack import Encoder
from lm.evals.common import Artifact, PredictFns


class Samples:
    """Continuations of fixed prompts, added to samples.md at each evaluation. The seed is fixed: what changes is the model.

    Args:
      prompts: texts that a document may begin with.
      temperature: 0 takes the best token each time.
      top_k: draw from so many best tokens; 0: from all.
    """

    def __init__(self, predict_fns: PredictFns, *, encoder: Encoder, prompts: Sequence[str], max_new_tokens: int, temperature: float, top_k: int):
        self._predict_fns, self._tokenizer, self._prompts = predict_fns, encoder.tokenizer, prompts
        self._options = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=0)
        self._ids = [[self._tokenizer.bos_id] + self._tokenizer.encode(prompt) for prompt in prompts]
        predict_fns.check_prompts(self._ids, max_new_tokens)  # now, not after the first hour

    def run(self, params) -> Iterator[tuple[str, Artifact]]:
        continuations = self._predict_fns.generate(params, self._ids, **self._options)
        blocks = [f"```\n{prompt}⟫{self._tokenizer.decode(ids)}\n```\n" for prompt, ids in zip(self._prompts, continuations)]
        yield "samples", Artifact("samples.md", "\n".join(blocks) + "\n", append=True)
