"""Likelihood evals: which of several continuations the model holds likeliest (multiple choice,
minimal pairs), and whether it says a given one (last words).
"""

import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lm.data import records as records_lib
from lm.data.pack import Encoder
from lm.data.tokenizer import prefix_ids
from lm.evals import prompts
from lm.evals.predict import Artifact, PredictFns
from lm.evals.scores import calibration, statistics
from lm.evals.tree import build_tree
from lm.evals.verbalizer import BOUNDARIES, NORMS, split


class MultipleChoice:
    """Yields, where records have several choices: accuracy of the likeliest with its Wilson 95%
    interval; accuracy_token, _char and _byte, by log-probability a token, character or byte of the
    choice; with a premise accuracy_pmi, by how much likelier a choice is after the prompt than
    after the premise (Holtzman et al. 2021, arXiv 2104.08315); chance. Of choices that tie, each is
    right by its share. Where records have one choice: accuracy, the share that greedy decoding
    would say. Of the right continuations: nll, perplexity (of a continuation, not of a token),
    bits_per_byte, greedy_accuracy. examples; cut, prompts that lost their beginning, but for BOS.
    As a file, predictions/: each example's choices with their log-probabilities.

    Args:
      name: names the artifacts.
      source, max_documents: see `lm.evals.classification.PromptClassification`.
      prompt: template, shots, sampler ("balanced": of the answers' numbers), seed, separator.
      choices: templates of the continuations, with the space before them; one whose column is a
        list gives one for each element.
      answer: the column of the right choice, or its number ("0") where it is always the same.
      answers: a template that gives the names of the choices, of which the column holds one
        ("{choices[label]}"); "": it holds its number, from 0.
      premise: text that the choices are also scored after; "": none.
      boundary: see `verbalizer.split`.

    Raises:
      ValueError: no such data, column or choice; see `verbalizer.split`.
    """

    def __init__(
        self,
        predict_fns: PredictFns,
        *,
        name: str,
        encoder: Encoder,
        source: Mapping,
        prompt: Mapping,
        choices: Sequence[str],
        answer: str,
        answers: str,
        premise: str,
        boundary: str,
        max_documents: int,
    ):
        if boundary not in BOUNDARIES:
            raise ValueError(
                f"config.evals.{name}.boundary = {boundary!r}; valid: {list(BOUNDARIES)}"
            )
        what = f"config.evals.{name}"
        template = prompts.Template(prompt["template"], f"{what}.prompt.template")
        parts = [prompts.Template(text, f"{what}.choices") for text in choices]
        if not parts:
            raise ValueError(f"{what}.choices is empty; wanted the templates of the continuations")
        named = prompts.Template(answers, f"{what}.answers") if answers else None
        self._name, self._predict_fns, self._tokenizer, self._boundary = (
            name,
            predict_fns,
            encoder.tokenizer,
            boundary,
        )
        self._length = predict_fns.length
        prompts.check_counts(name, shots=prompt["shots"], max_documents=max_documents)
        self._names, records = prompts.evaluated(source, name, max_documents)

        def options(record: Mapping) -> list[str]:
            return [text for part in parts for text in part.each(record)]

        def right(record: Mapping) -> int:
            if not answer.isdecimal() and answer not in record:
                raise ValueError(
                    f"the eval {name!r}: records have no column {answer!r} ({what}.answer); they "
                    f"have {sorted(record)}"
                )
            value, count = answer if answer.isdecimal() else record[answer], len(options(record))
            if named and str(value) in (names := named.each(record)):
                value = names.index(str(value))
            if not str(value).isdecimal() or int(value) >= count:
                raise ValueError(
                    f"the eval {name!r}: a record's answer is {value!r}; wanted one of "
                    f"{named.each(record) if named else list(range(count))}"
                )
            return int(value)

        shots = []
        if prompt["shots"]:
            asked = {(template(record), *options(record)) for record in records}
            shots = prompts.select_shots(
                prompts.load_shots(source, name),
                prompt["shots"],
                sampler=prompt["sampler"],
                seed=prompt["seed"],
                label=right,
                name=name,
                num_labels=len(options(records[0])),
                avoid=lambda record: (template(record), *options(record)) in asked,
            )
        first = prompts.shots_text(
            shots, template, lambda record: options(record)[right(record)], prompt["separator"]
        )
        self._options, self._gold = (
            [options(record) for record in records],
            np.array([right(record) for record in records]),
        )
        if len({len(found) > 1 for found in self._options}) > 1:
            raise ValueError(f"the eval {name!r}: some records have one choice, others several")
        self._cut = 0
        self._trees = [
            self._build_tree(first + template(record), found)
            for record, found in zip(records, self._options)
        ]
        cut = self._cut  # of the questions, not of the premise
        self._premise = (
            [self._build_tree(premise, found) for found in self._options] if premise else []
        )
        self._cut = cut
        self.about = {
            "fingerprint": records_lib.fingerprint(records),
            "examples": len(records),
            "citation": source["citation"],
        }

    def _build_tree(self, text: str, options: Sequence[str]):
        ids, after = split(self._tokenizer.encode_batch, text, options, self._boundary)
        ids, cut = prompts.truncate_prompt(
            prefix_ids(self._tokenizer, ids), ids, max(map(len, after)), self._length, self._name
        )
        self._cut += cut
        return build_tree(ids, after)

    def run(self, params) -> Iterator[tuple[str, float | Artifact]]:
        found = self._predict_fns.tree_logprobs(params, self._trees + self._premise)
        sums = [
            np.array([np.sum(logprobs[path], dtype=np.float64) for path in tree.paths])
            for tree, (logprobs, _) in zip(self._trees + self._premise, found)
        ]
        if not all(np.isfinite(one).all() for one in sums):
            raise ValueError(
                f"the eval {self._name!r}: the model's log-probabilities are not finite; its "
                "weights or activations are broken"
            )
        n, gold = len(self._trees), self._gold
        logprobs, after_premise = sums[:n], sums[n:]
        greedy = np.array(
            [
                bool(best[tree.paths[y]].all())
                for tree, (_, best), y in zip(self._trees, found, gold)
            ]
        )
        texts = [[option.lstrip() or option for option in options] for options in self._options]
        per = {
            "none": lambda i, j: 1,
            "token": lambda i, j: len(self._trees[i].paths[j]),
            "char": lambda i, j: len(texts[i][j]),
            "byte": lambda i, j: len(texts[i][j].encode()),
        }
        scores = {
            norm: [
                one / [per[norm](i, j) for j in range(len(one))] for i, one in enumerate(logprobs)
            ]
            for norm in NORMS
        }
        if after_premise:
            scores["pmi"] = [one - other for one, other in zip(logprobs, after_premise)]
        several = len(logprobs[0]) > 1
        right = {
            norm: np.array(
                [(one[y] == one.max()) / np.sum(one == one.max()) for one, y in zip(ones, gold)]
            )
            for norm, ones in scores.items()
        }
        right["none"] = right["none"] if several else greedy
        yield "accuracy", float(right["none"].mean())
        yield from zip(
            ("accuracy_low", "accuracy_high"),
            statistics.proportion_interval(round(right["none"].sum()), n),
        )
        if several:
            yield from (
                (f"accuracy_{norm}", float(share.mean()))
                for norm, share in right.items()
                if norm != "none"
            )
            yield "chance", float(np.mean([1 / len(one) for one in logprobs]))
        nll = np.array([-one[y] for one, y in zip(logprobs, gold)])
        yield "nll", float(nll.mean())
        yield "perplexity", float(np.exp(min(nll.mean(), 700.0)))
        yield (
            "bits_per_byte",
            float(
                nll.sum()
                / np.log(2)
                / sum(len(options[y].encode()) for options, y in zip(self._options, gold))
            ),
        )
        yield "greedy_accuracy", float(greedy.mean())
        yield "examples", n
        yield "cut", self._cut
        lines = []
        for i, one in enumerate(logprobs):
            said = one.argmax() if several else gold[i] if greedy[i] else ""
            line = {"name": self._names[i], "label": str(gold[i]), "prediction": str(said)}
            if several:
                line["distribution"] = {
                    str(k): float(p) for k, p in enumerate(calibration.softmax(one[None])[0])
                }
            line["scores"] = {
                f"accuracy_{norm}": float(share[i])
                for norm, share in right.items()
                if several and norm != "none"
            }
            line["scores"]["nll_of_right"] = float(nll[i])
            lines.append(
                json.dumps(
                    line
                    | {
                        "choices": self._options[i],
                        "logprobs": one.tolist(),
                        "greedy": bool(greedy[i]),
                    }
                )
            )
        yield (
            "predictions",
            Artifact(f"predictions/{self._name}-{{step}}.jsonl", "\n".join(lines) + "\n"),
        )
