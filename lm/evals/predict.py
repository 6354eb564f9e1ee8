"""The contract of evaluators, and the functions of the model that they are given.

`Evaluator(predict_fns, name=NAME, encoder=ENCODER, **config).run(params)` yields (name, value); an
entry with a `split` gets `documents` too. A float is a metric, an `Artifact` is a file of the run
directory. An evaluator sees neither the model nor the trainer, only `PredictFns`:

  logprobs(params, questions)       for each `Question`, for each of its continuations an `Answer`
  infill(params, questions)         the same, with text behind what is asked for
  token_logprobs(params, rows)      f32 [rows, T]: the log-probability of each next token
  target_logprobs(params, rows)     the same of the objective's own targets, wherever they stand
  head_outputs(params, rows)        f32 [rows, T, K]: what the objective's head says at each place
  states(params, prompts)           f32 [prompts, D]: the state that the head sees after each prompt
  head_rows(params, ids)            f32 [ids, D]: what the head multiplies a state with for each id
  make_generator(params, sampling)  a Generator (lm/decoding/generator.py), which continues prompts

A model may lack some of them. How it answers is its own matter: see lm/evals/causal_answers.py,
lm/evals/masked_answers.py and lm/evals/source_answers.py.

Rows are numpy rows of the Batch contract (lm/data/batch.py). Each goes through the model exactly
once, whatever the batch size, the mesh and the number of hosts. Batches are filled up with padding,
whose results are dropped. All hosts get all results.
"""

import dataclasses
import json
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from lm import sharding
from lm.data import batch as batch_contract
from lm.data.loader import evaluation_batches


class Artifact(NamedTuple):
    """A file for the run directory."""

    path: str  # "{step}" in it is replaced
    content: bytes | str
    append: bool = False  # to what earlier steps wrote, under a heading of its own


def predictions_artifact(
    name: str, lines: Iterable[Mapping], *, ensure_ascii: bool = True
) -> Artifact:
    """The file of an eval's predictions, a JSON object a line. `lm.reports.comparison` finds it by
    its name, and pairs its lines.

    Args:
      name: the eval's.
      lines: for each example its `name`, and what `lm.reports.comparison.compare` reads.
      ensure_ascii: whether other characters are written as escapes.
    """
    content = "".join(json.dumps(line, ensure_ascii=ensure_ascii) + "\n" for line in lines)
    return Artifact(f"predictions/{name}-{{step}}.jsonl", content)


class ShownPrompt(NamedTuple):
    """A prompt for people to read."""

    title: str
    text: str  # as the model sees it
    right: str  # what should follow


class Evaluator(Protocol):
    """What runs an entry of config.evals.

    It may have an attribute `about`: a dict that describes its data beside the results
    (fingerprint, examples, citation; `words`, see `Variant.word_tokens`; `prompts`, see
    `lm.evals.prompts.describe`; `corrections`, names). A method `shown_prompts(count)`, which
    yields the first prompts as `ShownPrompt`s. An attribute `metrics`: the names of what it yields
    by which models are compared (`lm.reports.metrics`); of one without, no metric can be
    config.checkpoint.best. And an attribute `asks`: the names of the `PredictFns` that it calls. A
    model that lacks one is refused as soon as the evaluator is built; without the attribute, when
    it is called.
    """

    def run(self, params: Any) -> Iterator[tuple[str, float | Artifact]]: ...


class Prompt(NamedTuple):
    """What a model reads before it is asked."""

    ids: Sequence[int] | np.ndarray  # [T]
    # for models that read more than tokens, by name; a model refuses those that it doesn't know
    arrays: Mapping[str, np.ndarray] = types.MappingProxyType({})


class Question(NamedTuple):
    """How likely is each of these continuations of a prompt?"""

    prompt: Prompt
    continuations: Sequence[Sequence[int]]  # ids, none empty
    fill: str = "ltr"  # of `FILLS`


# How what is asked for is filled in. A masked model does it by the first three ways
# (lm/evals/masked_answers.py), an encoder-decoder by the first and the last
# (lm/evals/source_answers.py), a causal model by the first.
FILLS = ("ltr", "parallel", "max_first", "infill")


class Answer(NamedTuple):
    """What a model says of a continuation, given the prompt, token by token."""

    logprobs: np.ndarray  # [tokens] f32, of each token after those before it
    is_best: np.ndarray  # [tokens] bool: no other id is likelier there


class Limits(NamedTuple):
    """What goes through the model at once."""

    batch_size: int  # rows of a batch; where rows are shorter, about as many tokens
    length: int  # tokens of a row
    check_stop: Callable[[], None]  # called before each batch; may raise


@dataclasses.dataclass(frozen=True)
class CompiledFns:
    """The functions of a model on a mesh, compiled. `lm.build` makes them once for all evaluators.
    None: the model can't do that.

    The functions of questions and prompts are how this kind of model answers; a causal model's are
    those of `lm.evals.causal_answers.CausalAnswers`, a masked one's those of
    `lm.evals.masked_answers.MaskedAnswers`, an encoder-decoder's those of
    `lm.evals.source_answers.SourceAnswers`.
    """

    mesh: Mesh
    # of a batch
    arrays: Mapping[str, batch_contract.Array] = dataclasses.field(
        default_factory=lambda: batch_contract.ARRAYS
    )
    reserved: int = 0  # tokens of a row that a question takes beside its own
    source_length: int = 0  # tokens of a source, which prompts are; 0: there are none
    context_length: int = 0  # tokens of a text that is generated of a source
    target_logprobs: Callable | None = None  # see lm.step.make_token_logprobs
    token_logprobs: Callable | None = None  # the same where targets are next tokens
    logprobs: Callable | None = None  # (params, questions, limits) -> [[Answer]]
    infill: Callable | None = None  # the same, of prompts with an array "after"
    states: Callable | None = None  # (params, prompts, limits) -> [prompts, D]
    head_rows: Callable | None = None  # see lm.step.make_head_rows
    head_outputs: Callable | None = None  # (params, batch) -> see lm.step.make_head_outputs
    unit_terms: Callable | None = None  # (params, batch) -> see lm.step.make_unit_terms
    make_generator: Callable | None = None  # (params, Sampling) -> Generator
    # name in config.models -> the same without params, of that model
    make_other_generators: Mapping[str, Callable] = dataclasses.field(default_factory=dict)


# XLA may leave out roundings to bf16 between operations that it fuses, and what it fuses depends on
# the mesh: log-probabilities differed by up to 0.05 between one device and four that have a row
# each.
COMPILER_OPTIONS = {"xla_allow_excess_precision": False}


def compiled(function: Callable, mesh: Mesh) -> Callable:
    """A pure function of a model under jit, as evaluators need it."""
    # Results are replicated: every host gets all of them.
    replicated = sharding.replicated(mesh)
    return jax.jit(function, out_shardings=replicated, compiler_options=COMPILER_OPTIONS)


def never_stop() -> None:
    """A `check_stop` for evaluations that run to their end."""


class PredictFns:
    """What one evaluator asks of a model. It compiles nothing itself.

    Args:
      batch_size, length, check_stop: see `Limits`. `prompt_length` is what there is for a prompt
        with its continuation. An evaluation ends early where `check_stop`
        raises.
      asked_by: the evaluator, for messages.
    """

    def __init__(
        self,
        compiled_fns: CompiledFns,
        *,
        batch_size: int,
        length: int,
        check_stop: Callable[[], None] = never_stop,
        asked_by: str = "an evaluator",
    ):
        self.batch_size = batch_size
        self.length = length
        self.prompt_length = (compiled_fns.source_length or length) - compiled_fns.reserved
        self.check_stop = check_stop
        self._compiled_fns = compiled_fns
        self._limits = Limits(batch_size, length, check_stop)
        self._asked_by = asked_by

    @property
    def fills_blanks(self) -> bool:
        """Whether the model is a masked one, whose answers are conditional on their length."""
        return self._compiled_fns.infill is not None and not self.reads_sources

    @property
    def reads_sources(self) -> bool:
        """Whether prompts are an encoder's, and what is asked for the decoder's."""
        return bool(self._compiled_fns.source_length)

    def room_of_prompt(self, max_new_tokens: int) -> int:
        """Tokens of a prompt that leaves room for a continuation of so many.

        Raises:
          ValueError: an encoder-decoder makes no texts of so many tokens.
        """
        if not self.reads_sources:
            return self.length - max_new_tokens
        most = self._compiled_fns.context_length
        if max_new_tokens > most:
            raise ValueError(
                f"{self._asked_by} wants texts of {max_new_tokens} tokens (max_new_tokens); wanted "
                f"at most config.model.context_length = {most}"
            )
        return self.prompt_length

    @property
    def fills(self) -> tuple[str, ...]:
        """Those of `FILLS` that the model answers by."""
        if self.reads_sources:
            return "ltr", "infill"
        return FILLS[:-1] if self.fills_blanks else ("ltr",)

    def require(self, names: Iterable[str], asked_by: str = "") -> None:
        """Raises ValueError where the model lacks one of these functions, by their names here.

        Args:
          asked_by: who asks for them, if not the evaluator.
        """
        functions = vars(self._compiled_fns).items()

        others = ("mesh", "arrays", "reserved", "source_length", "context_length")
        others += ("make_other_generators",)
        available = [n for n, value in functions if n not in others and value is not None]
        missing = [name for name in names if name not in available]
        if missing:
            raise ValueError(
                f"this model has no {', '.join(missing)}, which {asked_by or self._asked_by} asks "
                f"for; it has {available}"
            )

    def _function(self, name: str) -> Callable:
        self.require([name])
        return getattr(self._compiled_fns, name)

    def logprobs(self, params, questions: Sequence[Question]) -> list[list[Answer]]:
        """For each question, in order, the answer to each of its continuations."""
        return self._function("logprobs")(params, questions, self._limits)

    def infill(self, params, questions: Sequence[Question]) -> list[list[Answer]]:
        """What `logprobs` gives, of prompts with the array "after": ids behind the continuation."""
        return self._function("infill")(params, questions, self._limits)

    def token_logprobs(self, params, rows: Sequence[dict]) -> np.ndarray:
        """[rows, T] f32, the log-probability of each target, which is the token after. What the
        objective declares beside the five arrays of a row has its padding value where a row lacks
        it.
        """
        return self._logprobs_of_rows("token_logprobs", params, rows)

    def target_logprobs(self, params, rows: Sequence[dict]) -> np.ndarray:
        """[rows, T] f32, the log-probability of each of the objective's targets."""
        return self._logprobs_of_rows("target_logprobs", params, rows)

    def _logprobs_of_rows(self, name: str, params, rows: Sequence[dict]) -> np.ndarray:
        self.require([name])
        if not rows:
            return np.zeros((0, self.length), np.float32)
        return self._of_rows(name, params, rows)

    def head_outputs(self, params, rows: Sequence[dict]) -> np.ndarray:
        """[rows, T, K] f32, what the objective's head says at each place."""
        return self._of_rows("head_outputs", params, rows)

    def unit_terms(self, params, rows: Sequence[dict]) -> dict[str, np.ndarray]:
        """{name: [rows, units of a row] f32}, what the objective says of each unit; `weight` is 0
        where there is none.
        """
        return self._of_rows("unit_terms", params, rows)

    def _of_rows(self, name: str, params, rows: Sequence[dict]):
        """What a function gives for each of some rows, at least one, as arrays [rows, ...]."""
        function = self._function(name)
        arrays = self._compiled_fns.arrays
        shardings = {}
        for name, array in arrays.items():
            shardings[name] = sharding.batch_sharding(self._compiled_fns.mesh, array.dims)
        padding = batch_contract.empty_row(self.length, arrays)
        rows = [padding | row for row in rows]
        outputs = []
        for batch in evaluation_batches(rows, self.batch_size, shardings, padding):
            self.check_stop()
            outputs.append(function(params, batch))

        # Fetched only now: the devices don't wait for the host between batches.
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(rows)], *outputs)

    def states(self, params, prompts: Sequence[Prompt], fill: str = "ltr") -> np.ndarray:
        """[prompts, D] f32, the state that the head sees after each prompt; `fill` as in a
        `Question` about it.
        """
        form = {"fill": fill} if self.reads_sources else {}
        return self._function("states")(params, prompts, self._limits, **form)

    def head_rows(self, params, ids: Sequence[int]) -> np.ndarray:
        """[ids, D] f32, what the head multiplies a state with for each id."""
        return np.asarray(self._function("head_rows")(params, np.asarray(ids, np.int32)))

    def make_generator(self, params, sampling) -> Any:
        """A `lm.decoding.generator.Generator`, which continues prompts."""
        return self._function("make_generator")(params, sampling)

    @property
    def other_models(self) -> tuple[str, ...]:
        """Names of config.models."""
        return tuple(self._compiled_fns.make_other_generators)

    def make_other_generator(self, name: str, sampling) -> Any:
        """The same of one of `other_models`, as it was loaded."""
        return self._compiled_fns.make_other_generators[name](sampling)
