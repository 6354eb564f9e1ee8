"""lm-evaluation-harness (EleutherAI's lm_eval, 0.4) on our models: its tasks, prompts and scores,
our forward pass.

    lm_eval.simple_evaluate(model=harness.HarnessModel(predict_fns, params, tokenizer), tasks=[...])

and, as an entry of config.evals, `Harness`. With several processes all of them make the same
calls.
"""

import collections
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lm.data import chat
from lm.data.pack import Encoder
from lm.data.tokenizer import Tokenizer, prefix_ids
from lm.decoding.sampling import Sampling
from lm.evals.generation import generate
from lm.evals.predict import Artifact, PredictFns
from lm.evals.tree import build_tree

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(f"{error}: lm_eval is in pip install 'lm[harness]'") from None


class HarnessModel(TemplateLM):
    """What lm_eval asks of a model. Texts become tokens as in its own `hf` backend, its boundary
    between context and continuation included: the scores are comparable with published ones, where
    `lm.evals.verbalizer.split` would have it right and different.

    Continuations of the same context are scored in one row. `max_length` is that of predict_fns:
    what is longer loses its beginning.
    """

    def __init__(self, predict_fns: PredictFns, params: Any, tokenizer: Tokenizer):
        super().__init__()
        self._predict_fns, self._params, self._tokenizer = predict_fns, params, tokenizer
        self.max_length, self.max_gen_toks = predict_fns.length, 256

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """BOS; EOS where the tokenizer's own files name none, whatever config.json does."""
        without = (
            "tokenizer_config.json" in self._tokenizer.files
            and "bos_token" not in chat.special_tokens(self._tokenizer)
        )
        return self._tokenizer.eos_id if without else self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        plain = self._tokenizer.encode(string)
        if add_special_tokens is False or plain[:1] == [self._tokenizer.bos_id]:  # BOS is spelt out
            return plain
        # prompt("") is never empty, hf's may be
        return self._tokenizer.prompt(string) if string else prefix_ids(self._tokenizer, [0])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if not (template := chat.template(self._tokenizer)):
            raise ValueError(
                "apply_chat_template: this checkpoint's tokenizer has no chat template"
            )
        return chat.render(
            template,
            chat_history,
            tokens=chat.special_tokens(self._tokenizer),
            add_generation_prompt=add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return chat.template(self._tokenizer) if chat_template else None

    def _loglikelihood_tokens(
        self, requests, disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether it is the greedy one) of each (texts, context ids, continuation
        ids).
        """
        groups: dict[tuple[tuple[int, ...], int], list[tuple[int, list[int]]]] = (
            collections.defaultdict(list)
        )
        lengths: collections.Counter[tuple[int, ...]] = collections.Counter()
        for number, (texts, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"the continuation of {texts} has {len(continuation)} tokens; wanted 1 to "
                    f"{self.max_length}, the longest text that the model is given (none at all: "
                    "the tokenizer merges it with the context, which lm_eval cuts off)"
                )
            kept = (list(context) + list(continuation))[-(self.max_length + 1) : -len(continuation)]
            if not kept:
                raise ValueError(
                    f"the context of {texts} has no tokens, and the tokenizer adds no BOS: there "
                    "is nothing to score the continuation after"
                )
            # thousands may follow the same context, such as none
            lengths[tuple(kept)] += len(continuation)
            groups[tuple(kept), lengths[tuple(kept)] // self.max_length].append(
                (number, list(continuation))
            )
        trees = [
            build_tree(context, [ids for _, ids in members])
            for (context, _), members in groups.items()
        ]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for members, tree, (logprobs, best) in zip(
            groups.values(), trees, self._predict_fns.tree_logprobs(self._params, trees)
        ):
            for (number, _), path in zip(members, tree.paths):
                answers[number] = (
                    float(np.sum(logprobs[path], dtype=np.float64)),
                    bool(best[path].all()),
                )
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text: windows without overlap, each given one token
        (BOS, the first).
        """
        windows, owner = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for context, continuation in map(
                make_disjoint_window,
                get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1),
            ):
                windows.append((None, context, continuation))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owner, self._loglikelihood_tokens(windows)):
            totals[number] += logprob
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string, EOS, or the number of tokens asked for."""
        groups = collections.defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append((number, request.args[0]))
        answers = [""] * len(requests)
        for options, members in groups.items():
            for number, text in self._generate(
                members, normalize_gen_kwargs(json.loads(options), self.max_gen_toks)
            ):
                answers[number] = text
        return answers

    def _generate(
        self, members: Sequence[tuple[int, str]], options: dict
    ) -> Iterator[tuple[int, str]]:
        stop, new = options.pop("until"), options.pop("max_gen_toks")
        sampled, temperature = options.pop("do_sample", False), options.pop("temperature", 1.0)
        known = ("top_k", "top_p", "min_p", "repetition_penalty")
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(
                f"generation options {unknown} of an lm_eval task are not known here; there are "
                f"until, max_gen_toks, do_sample, temperature, {', '.join(known)}"
            )
        if new >= self.max_length:
            raise ValueError(
                f"max_gen_toks = {new} must be below {self.max_length}, the longest text that the "
                "model is given (config.data.length)"
            )
        sampling = Sampling(temperature=temperature if sampled else 0.0, **options)
        prompts = [
            self.tok_encode(text)[-(self.max_length - new) :] or [self.prefix_token_id]
            for _, text in members
        ]
        numbers = [number for number, _ in members]
        texts = generate(
            self._predict_fns,
            self._params,
            self._tokenizer,
            prompts,
            max_new_tokens=new,
            stop=stop,
            sampling=sampling,
            seeds=numbers,
        )
        return zip(numbers, texts)


LOGLIKELIHOODS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")


class Harness:
    """Yields TASK/METRIC of lm_eval's tasks, with its standard errors, and its whole report as
    JSON; each task's scores of each document go to predictions/, where --compare_to finds them.

    Args:
      name: names the artifacts.
      tasks: names of tasks or groups, as lm_eval lists them, or in `include_path`.
      num_fewshot: examples before each question; -1: the task's own number.
      limit: the first so many documents of each task; 0: all.
      include_path: a folder with task files of your own; "": none. With one lm_eval's own tasks are
        left out.
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
    ):
        self._manager = TaskManager(
            include_path=include_path or None, include_defaults=not include_path
        )
        if unknown := [name for name in tasks if name not in self._manager.all_tasks]:
            raise ValueError(
                "lm_eval has no tasks "
                f"{unknown}{f' in {include_path}: there are {self._manager.all_tasks}' if include_path else ''}"  # noqa: E501
            )
        self._predict_fns, self._tokenizer, self._tasks, self._name = (
            predict_fns,
            encoder.tokenizer,
            list(tasks),
            name,
        )
        self._options = dict(
            num_fewshot=None if num_fewshot < 0 else num_fewshot, limit=limit or None
        )

    def run(self, params) -> Iterator[tuple[str, float | Artifact]]:
        report = lm_eval.simple_evaluate(
            HarnessModel(self._predict_fns, params, self._tokenizer),
            tasks=self._tasks,
            task_manager=self._manager,
            bootstrap_iters=1000,
            log_samples=True,
            **self._options,
        )
        for task, scores in report["results"].items():
            for name, value in scores.items():
                if isinstance(value, (int, float)) and "," in name:
                    yield f"{task}/{name.removesuffix(',none').replace(',', '_')}", float(value)
        for task, samples in report["samples"].items():
            # by document: there may be several filters of its answer
            scores: dict[int, dict[str, float]] = collections.defaultdict(dict)
            for s in samples:
                for metric in s["metrics"]:
                    value = s[metric][0] if isinstance(s[metric], tuple) else s[metric]
                    # what lm_eval calls a document's perplexity is its log-likelihood
                    if isinstance(value, (int, float, np.number)):
                        named = "loglikelihood" if metric in LOGLIKELIHOODS else metric
                        scores[s["doc_id"]][
                            named if s["filter"] == "none" else f"{named}_{s['filter']}"
                        ] = float(value)
            lines = [
                json.dumps({"name": f"{task}[{number}]", "scores": scores[number]})
                for number in sorted(scores)
            ]
            if lines:
                yield (
                    f"predictions of {task}",
                    Artifact(
                        f"predictions/{self._name}-{task}-{{step}}.jsonl", "\n".join(lines) + "\n"
                    ),
                )
        kept = {
            key: report[key]
            for key in ("results", "versions", "n-shot", "n-samples", "configs")
            if key in report
        }
        yield (
            "report",
            Artifact(f"{self._name}-{{step}}.json", json.dumps(kept, indent=1, default=str) + "\n"),
        )
