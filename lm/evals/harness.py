"""lm-evaluation-harness (EleutherAI's lm_eval, 0.4) on our models: its tasks, prompts and scores,
our forward pass.

    lm_eval.simple_evaluate(model=harness.HarnessModel(predict_fns, params, tokenizer), tasks=[...])

and, as an entry of config.evals, `Harness`. With several processes all of them make the same
calls.
"""

import collections
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lm import files
from lm.data import chat
from lm.data.pack import Encoder
from lm.data.tokenizer import Tokenizer, prefix_ids
from lm.decoding.sampling import Sampling
from lm.evals.generation import generate
from lm.evals.predict import (
    Artifact,
    PredictFns,
    Prompt,
    Question,
    ShownPrompt,
    predictions_artifact,
)
from lm.evals.prompts import check_least

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(f"{error}: lm_eval is in pip install -e '.[harness]'") from None

SAMPLING_OPTIONS = ("top_k", "top_p", "min_p", "repetition_penalty")


class HarnessModel(TemplateLM):
    """The interface that lm_eval asks of a model.

    Texts become tokens as in lm_eval's own `hf` backend, including its boundary between context and
    continuation, so that scores are comparable with published ones. (`lm.evals.verbalizer` handles
    that boundary correctly, so its scores would differ.)

    Continuations of the same context are asked about together. `max_length` is that of predict_fns:
    what is longer loses its beginning.

    Attributes:
      num_cut: context -> how many tokens it lost; only those that lost some.
    """

    def __init__(self, predict_fns: PredictFns, params: Any, tokenizer: Tokenizer):
        super().__init__()
        self._predict_fns = predict_fns
        self._params = params
        self._tokenizer = tokenizer
        self.max_length = predict_fns.prompt_length
        self._reads_sources = predict_fns.reads_sources
        # lm_eval then makes tokens of a continuation by itself: it is another text.
        self.backend = "seq2seq" if self._reads_sources else "causal"
        self.max_gen_toks = 256
        self.num_cut: dict[str, int] = {}

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """BOS; EOS where the tokenizer's own files name no BOS, whatever config.json does."""
        has_own_config = "tokenizer_config.json" in self._tokenizer.files
        if has_own_config and "bos_token" not in chat.special_tokens(self._tokenizer):
            return self._tokenizer.eos_id
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        plain = self._tokenizer.encode(string)
        if add_special_tokens is False:
            return plain
        # A text that spells BOS out gets no second one.
        if plain[:1] == [self._tokenizer.bos_id]:
            return plain
        # prompt("") is never empty, the `hf` backend's encoding of "" may be.
        return self._tokenizer.prompt(string) if string else prefix_ids(self._tokenizer, [0])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return chat.render(
            _template(self._tokenizer),
            chat_history,
            tokens=chat.special_tokens(self._tokenizer),
            add_generation_prompt=add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return chat.template(self._tokenizer) if chat_template else None

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        """Scores (texts, context ids, continuation ids).

        Returns:
          For each request the log-probability of the continuation, and whether greedy decoding
          would say it.
        """
        # (context, number of a question) -> [(number of the request, continuation)]
        groups: dict[tuple, list[tuple[int, list[int]]]] = collections.defaultdict(list)
        num_tokens: collections.Counter[tuple[int, ...]] = collections.Counter()
        for number, (texts, context, continuation) in enumerate(requests):
            context = self._truncate_context(texts, context, continuation)
            # Thousands may follow the same context, such as an empty one: they become several
            # questions, each of about as many tokens as a row.
            num_tokens[context] += len(continuation)
            part = num_tokens[context] // self.max_length
            groups[context, part].append((number, list(continuation)))

        questions = []
        for (context, _), members in groups.items():
            continuations = [continuation for _, continuation in members]
            questions.append(Question(Prompt(context), continuations))
        answers = self._predict_fns.logprobs(self._params, questions)

        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for members, group_answers in zip(groups.values(), answers):
            for (number, _), (logprobs, is_best) in zip(members, group_answers):
                logprob = float(np.sum(logprobs, dtype=np.float64))
                results[number] = logprob, bool(is_best.all())
        return results

    def _truncate_context(
        self, texts, context: Sequence[int], continuation: Sequence[int]
    ) -> tuple[int, ...]:
        """The end of a context that the model has room for, as lm_eval's `hf` cuts it.

        Raises:
          ValueError: no continuation, one that is too long, or no context.
        """
        if not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"the continuation of {texts} has {len(continuation)} tokens; wanted 1 to "
                f"{self.max_length}, the longest text that the model is given (none at all: "
                "the tokenizer merges it with the context, which lm_eval cuts off)"
            )
        if self._reads_sources:
            if texts:
                self._count_cut(texts[0], len(context) - self.max_length)
            return tuple(context[-self.max_length :])

        # One more than max_length: the last token is predicted, not read.
        whole = list(context) + list(continuation)
        if texts:
            self._count_cut(texts[0], len(whole) - (self.max_length + 1))
        truncated = whole[-(self.max_length + 1) : -len(continuation)]
        if not truncated:
            raise ValueError(
                f"the context of {texts} has no tokens, and the tokenizer adds no BOS: there "
                "is nothing to score the continuation after"
            )
        return tuple(truncated)

    def _count_cut(self, context: str, num_tokens: int) -> None:
        """Keeps how many tokens a context lost."""
        if num_tokens > self.num_cut.get(context, 0):
            self.num_cut[context] = num_tokens

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows without overlap. Each window is given
        one token: the one before it, BOS for the first.

        Raises:
          ValueError: a model that has no probability of a whole text.
        """
        self._predict_fns.require(["token_logprobs"], "lm_eval's loglikelihood_rolling")
        windows = []
        owners = []  # for each window, the number of its request
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                context, continuation = make_disjoint_window(window)
                windows.append((None, context, continuation))
                owners.append(number)

        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows)):
            totals[number] += logprob
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string, EOS, or the number of tokens asked for."""
        # Requests with the same options are generated together: options -> numbers of requests.
        groups: dict[str, list[int]] = collections.defaultdict(list)
        for number, request in enumerate(requests):
            options = json.dumps(request.args[1], sort_keys=True)
            groups[options].append(number)

        answers = [""] * len(requests)
        for options, numbers in groups.items():
            contexts = [requests[number].args[0] for number in numbers]
            normalized = normalize_gen_kwargs(json.loads(options), self.max_gen_toks)
            texts = self._generate(contexts, numbers, normalized)
            for number, text in zip(numbers, texts):
                answers[number] = text
        return answers

    def _generate(self, contexts: Sequence[str], seeds: Sequence[int], options: dict) -> list[str]:
        """Continuations of contexts.

        Args:
          options: lm_eval's generation options, normalised by it.

        Raises:
          ValueError: an unknown option, or more tokens than the model takes.
        """
        stop = options.pop("until")
        max_new_tokens = options.pop("max_gen_toks")
        is_sampled = options.pop("do_sample", False)
        temperature = options.pop("temperature", 1.0)
        unknown = sorted(set(options) - set(SAMPLING_OPTIONS))
        if unknown:
            raise ValueError(
                f"generation options {unknown} of an lm_eval task are not known here; there are "
                f"until, max_gen_toks, do_sample, temperature, {', '.join(SAMPLING_OPTIONS)}"
            )
        max_prompt = self._predict_fns.room_of_prompt(max_new_tokens)
        if max_prompt < 1:
            raise ValueError(
                f"max_gen_toks = {max_new_tokens} must be below {self.max_length}, the longest "
                "text that the model is given (config.data.length)"
            )

        prompts = []
        for context in contexts:
            ids = self.tok_encode(context)
            self._count_cut(context, len(ids) - max_prompt)
            prompts.append(ids[-max_prompt:] or [self.prefix_token_id])

        return generate(
            self._predict_fns,
            self._params,
            self._tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            stop=stop,
            sampling=Sampling(temperature=temperature if is_sampled else 0.0, **options),
            seeds=seeds,
        )


class _NoModel(HarnessModel):
    """Answers nothing: what it is asked is all that it is for."""

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        return [(0.0, False)] * len(requests)

    def generate_until(self, requests, disable_tqdm=False):
        return [""] * len(requests)


def _template(tokenizer: Tokenizer) -> str:
    """The chat template of a checkpoint. Raises ValueError if it has none."""
    template = chat.template(tokenizer)
    if not template:
        raise ValueError("apply_chat_template: this checkpoint's tokenizer has no chat template")
    return template


# lm_eval names a corpus metric for these; the value it keeps for a document is a log-likelihood.
LOGLIKELIHOODS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
REPORT_KEYS = ("results", "versions", "n-shot", "n-samples", "configs")


class Harness:
    """Runs tasks of lm_eval.

    Yields TASK/METRIC with standard errors; TASK/cut, the number of documents that lost the
    beginning of a prompt; and lm_eval's whole report as JSON. Each task's scores of each document
    go to predictions/, where --compare_to finds them, with the prompts.

    Args:
      name: names the artifacts.
      tasks: names of tasks or groups, as lm_eval lists them, or in `include_path`.
      num_fewshot: examples before each question; -1: the task's own number.
      limit: the first so many documents of each task; 0: all.
      include_path: a folder with task files of your own, without lm_eval's own tasks; "": none.
      apply_chat_template, system_instruction, fewshot_as_multiturn: lm_eval's; the template is the
        tokenizer's.

    Raises:
      ValueError: no chat template to apply; no tasks, or one that lm_eval doesn't know; a number
        that is too small.
    """

    def __init__(
        self,
        predict_fns: PredictFns,
        *,
        name: str,
        encoder: Encoder,
        tasks: Sequence[str],
        num_fewshot: int = -1,
        limit: int = 0,
        include_path: str = "",
        apply_chat_template: bool = False,
        system_instruction: str = "",
        fewshot_as_multiturn: bool = True,
    ):
        check_least(f"config.evals.{name}.num_fewshot", num_fewshot, -1)
        check_least(f"config.evals.{name}.limit", limit, 0)
        if not tasks:
            raise ValueError(f"config.evals.{name}.tasks is empty; wanted one task or more")

        self._name = name
        self._predict_fns = predict_fns
        self._tokenizer = encoder.tokenizer
        self._tasks = list(tasks)
        self._num_fewshot = None if num_fewshot < 0 else num_fewshot
        self._limit = limit or None
        self._chat = dict(
            apply_chat_template=apply_chat_template,
            system_instruction=system_instruction or None,
            fewshot_as_multiturn=fewshot_as_multiturn,
        )
        if apply_chat_template:
            _template(self._tokenizer)

        self._manager = TaskManager(
            include_path=files.expand(include_path) or None, include_defaults=not include_path
        )
        known = self._manager.all_tasks
        unknown = [task for task in tasks if task not in known]
        if unknown:
            # lm_eval's own tasks are thousands: only those of a folder are listed.
            where = f" in {include_path}: there are {known}" if include_path else ""
            raise ValueError(f"lm_eval has no tasks {unknown}{where}")

    asks = ("logprobs",)  # and make_generator, where a task wants texts
    metrics = None  # the tasks', TASK/METRIC,FILTER

    def run(self, params) -> Iterator[tuple[str, float | Artifact]]:
        model = HarnessModel(self._predict_fns, params, self._tokenizer)
        report = self._ask(model, self._limit)

        for task, scores in report["results"].items():
            for name, value in scores.items():
                # A metric is called METRIC,FILTER; there are other entries, such as the alias.
                if isinstance(value, (int, float)) and "," in name:
                    metric = name.removesuffix(",none").replace(",", "_")
                    yield f"{task}/{metric}", float(value)

        for task, samples in report["samples"].items():
            lines = _prediction_lines(task, samples, model.num_cut)
            if lines:
                yield f"{task}/cut", sum(line["cut"] > 0 for line in lines)
                artifact = predictions_artifact(f"{self._name}-{task}", lines)
                yield f"predictions of {task}", artifact

        shortened = {key: report[key] for key in REPORT_KEYS if key in report}
        content = json.dumps(shortened, indent=1, default=str) + "\n"
        yield "report", Artifact(f"{self._name}-{{step}}.json", content)

    def _ask(self, model: HarnessModel, limit: int | None) -> dict:
        """lm_eval's report of the first `limit` documents of each task; None: all."""
        return lm_eval.simple_evaluate(
            model,
            tasks=self._tasks,
            task_manager=self._manager,
            bootstrap_iters=1000,
            log_samples=True,
            num_fewshot=self._num_fewshot,
            limit=limit,
            **self._chat,
        )

    def shown_prompts(self, count: int) -> Iterator[ShownPrompt]:
        model = _NoModel(self._predict_fns, None, self._tokenizer)
        report = self._ask(model, min(count, self._limit or count))
        for task, samples in report["samples"].items():
            # One sample a document: another filter of its answer asks nothing new.
            for number, sample in {sample["doc_id"]: sample for sample in samples}.items():
                contexts, continuations = _asked(sample)
                ids = model.tok_encode(contexts[0])
                title = f"{task}[{number}], {len(ids)} tokens"
                right = " | ".join(continuations) or str(sample["target"])
                yield ShownPrompt(title, self._tokenizer.spell(ids), right)


def _asked(sample: Mapping) -> tuple[list[str], list[str]]:
    """(contexts, continuations) of what a document asks, each text once. Texts to generate have no
    continuation.
    """
    contexts: dict[str, None] = {}
    continuations: dict[str, None] = {}
    for first, *rest in sample["arguments"]:
        if not rest:  # a text that is scored whole
            contexts[""] = continuations[first] = None
        elif isinstance(rest[0], str):
            contexts[first] = continuations[rest[0]] = None
        else:  # options of generation
            contexts[first] = None
    # Choices after nothing are lm_eval's way to ask how likely they are anyway.
    if len(contexts) > 1:
        contexts.pop("", None)
    return list(contexts), list(continuations)


def _prediction_lines(
    task: str, samples: Sequence[Mapping], num_cut: Mapping[str, int]
) -> list[dict]:
    """The scores and prompts of each document that has scores.

    Args:
      samples: lm_eval's; a document has several where its answer goes through several filters.
      num_cut: see `HarnessModel`.
    """
    scores: dict[int, dict[str, float]] = collections.defaultdict(dict)
    documents = {}
    for sample in samples:
        documents[sample["doc_id"]] = sample
        for metric in sample["metrics"]:
            value = sample[metric]
            if isinstance(value, tuple):
                value = value[0]
            if not isinstance(value, (int, float, np.number)):
                continue

            name = "loglikelihood" if metric in LOGLIKELIHOODS else metric
            if sample["filter"] != "none":
                name = f"{name}_{sample['filter']}"
            scores[sample["doc_id"]][name] = float(value)

    lines = []
    for number in sorted(scores):
        contexts, continuations = _asked(documents[number])
        line = {
            "name": f"{task}[{number}]",
            "record": documents[number]["doc_hash"][:16],
            "scores": scores[number],
            "prompts": contexts,
            "continuations": continuations,
            "cut": max(num_cut.get(context, 0) for context in contexts),
        }
        lines.append(line)
    return lines
