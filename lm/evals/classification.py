"""Verbalizer classification: the model's probabilities of label words after a prompt. `DocumentClassification`
asks about the documents of a run, as in training; `PromptClassification` asks by templates about the records of a
data set.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lm.data import records as records_lib
from lm.data.pack import Encoder
from lm.data.sources import Document, Documents, take
from lm.data.tokenizer import prefix_ids
from lm.evals import prompts
from lm.evals.predict import Artifact, PredictFns
from lm.evals.scores import calibration, statistics
from lm.evals.tree import Tree, build_tree
from lm.evals.verbalizer import (
    AGGREGATES,
    BOUNDARIES,
    NORMS,
    WordLogprobs,
    audit,
    audit_round_trip,
    audit_spaces,
    label_mass,
    label_scores,
    split,
    word_logprobs,
    word_scores,
)
from lm.reports import pictures


def compile_verbalizer(
    verbalizer: Sequence[tuple[str, Sequence[str]]], tokenizer, labels: set[str]
) -> list[tuple[int, str, list[int]]]:
    """(label's index, word, token ids) of every label word.

    A word is tokenized apart from the text before it, as in training (lm.data.pack), and its ids
    are put after that text's, so that a word is the same tokens after any text (joined strings, cut
    again, are not).

    Raises:
      ValueError: a label of the data without words, or see `lm.evals.verbalizer.audit`.
    """
    names = [label for label, _ in verbalizer]
    if labels - set(names):
        raise ValueError(
            f"the verbalizer has words for the labels {names}; the data's labels are "
            f"{sorted(labels)}"
        )
    words = [
        (i, word, tokenizer.encode(word))
        for i, (_, words) in enumerate(verbalizer)
        for word in words
    ]
    audit(names, words)
    return words


# What a document may be to say nothing (Zhao et al. 2021, arXiv 2102.09690, section 5).
CONTENT_FREE = ("", "N/A", "[MASK]")
PRIORS = ("content_free", "domain", "pmi_dc", "batch")
ENSEMBLES = ("mean_prob", "mean_logprob")


class Variant(NamedTuple):
    """One way to ask: a template, a verbalizer, examples in an order."""

    name: str
    words: list[tuple[int, str]]  # (its label's index, the word)
    trees: list[Tree]  # of the prompts, in the examples' order
    free: dict[str, list[Tree]]  # prior -> prompts whose mean distribution it is
    held: list[Tree]  # prompts that the temperature is fitted on

    def split_words(
        self, labels: Sequence[str], decode: Callable[[list[int]], str]
    ) -> dict[str, dict[str, list[str]]]:
        """Label -> word -> its tokens after the first prompt, as texts."""
        found: dict[str, dict[str, list[str]]] = {label: {} for label in labels}
        for (k, word), path in zip(self.words, self.trees[0].paths):
            found[labels[k]][word] = [decode([int(self.trees[0].target[query])]) for query in path]
        return found

    def first_tokens(self) -> list[int]:
        """Of each word, after the first prompt."""
        return [int(self.trees[0].target[path[0]]) for path in self.trees[0].paths]


class PromptSet(NamedTuple):
    """What is asked."""

    name: str  # the eval's, for files and messages
    labels: list[str]
    names: list[str]  # of the examples
    gold: np.ndarray  # [n], the right label's index
    ways: list[Variant]
    cut: int  # examples that lost their beginning
    held_gold: np.ndarray


class VariantScores(NamedTuple):
    """The log-probabilities that a way's prompts gave."""

    examples: WordLogprobs
    free: dict[str, WordLogprobs]
    held: WordLogprobs | None


def score_prompts(predict_fns: PredictFns, params, questions: PromptSet) -> list[VariantScores]:
    """Of each way. All go through the model together, so that what prompts share is computed
    once.
    """
    trees = [
        tree
        for way in questions.ways
        for tree in itertools.chain(way.trees, *way.free.values(), way.held)
    ]
    answers = iter(
        [
            [logprobs[path] for path in tree.paths]
            for tree, (logprobs, _) in zip(trees, predict_fns.tree_logprobs(params, trees))
        ]
    )

    def collect(way: Variant, part: Sequence[Tree]) -> WordLogprobs:
        return word_logprobs(
            list(itertools.islice(answers, len(part))),
            [i for i, _ in way.words],
            [word for _, word in way.words],
        )

    return [
        VariantScores(
            collect(way, way.trees),
            {prior: collect(way, part) for prior, part in way.free.items()},
            collect(way, way.held) if way.held else None,
        )
        for way in questions.ways
    ]


def label_metrics(P: np.ndarray, gold: np.ndarray) -> Iterator[tuple[str, float]]:
    """What is to be said of label distributions [n, K], given the right labels [n]."""
    predicted, n, K = P.argmax(axis=1), *P.shape
    right = int((predicted == gold).sum())
    yield "accuracy", right / n
    yield from zip(("accuracy_low", "accuracy_high"), statistics.proportion_interval(right, n))
    yield "majority_accuracy", int(np.bincount(gold).max()) / n
    matrix = statistics.confusion(predicted, gold, K)
    of_sample = lambda index: statistics.prediction_scores(
        statistics.confusion(predicted[index], gold[index], K)
    )
    yield from statistics.prediction_scores(matrix).items()
    low, high = statistics.bootstrap_interval(lambda index: of_sample(index)["macro_f1"], n)
    yield from (("macro_f1_low", low), ("macro_f1_high", high))
    yield "nll", calibration.nll(P, gold)
    yield "brier", calibration.brier(P, gold)
    yield "ece", calibration.ece(P, gold)
    yield "ece_equal_mass", calibration.ece(P, gold, equal="mass")
    yield "classwise_ece", calibration.classwise_ece(P, gold)
    for name, value in (
        ("auroc", calibration.auroc(P, gold)),
        ("auroc_ovo", calibration.auroc_ovo(P, gold)),
        ("confidence_auroc", calibration.confidence_auroc(P, gold)),
    ):
        if value is not None:  # some need two labels, or right and wrong predictions
            yield name, value
    yield "selective_accuracy", float(np.mean(calibration.selective_accuracy(P, gold)[1]))


def results(
    questions: PromptSet,
    found: Sequence[VariantScores],
    scores: Callable[[WordLogprobs], np.ndarray],
    *,
    ensemble: str = "mean_prob",
    batch: bool = True,
) -> Iterator[tuple[str, float | Artifact]]:
    """All figures and files of `PromptClassification`, as its docstring has them.

    Args:
      scores: [n, K] of the labels.
      batch: also correct by the mean distribution.

    Raises:
      ValueError: log-probabilities that aren't finite.
    """
    q, gold, n = questions, questions.gold, len(questions.gold)
    for x in found:
        if not (finite := np.isfinite(word_scores(x.examples)).all(axis=1)).all():
            raise ValueError(
                f"the eval {q.name!r}: the model's log-probabilities of label words are not "
                f"finite for {int((~finite).sum())} of {n} examples; its weights or activations "
                "are broken"
            )
    together = lambda Ps: (
        np.mean(Ps, axis=0)
        if ensemble == "mean_prob"
        else calibration.softmax(np.mean(np.log(np.maximum(Ps, calibration.TINY)), axis=0))
    )
    each = [calibration.softmax(scores(x.examples)) for x in found]
    P, mass = together(each), np.mean([label_mass(x.examples) for x in found], axis=0)
    yield from label_metrics(P, gold)
    yield "label_mass", float(np.mean(mass))
    priors = {
        prior: [calibration.softmax(scores(x.free[prior])).mean(axis=0) for x in found]
        for prior in found[0].free
    }
    if "content_free" in priors:
        yield (
            "content_free_accuracy",
            float(np.mean(gold == np.mean(priors["content_free"], axis=0).argmax())),
        )
    if batch:
        priors["batch"] = [calibration.batch_prior(one) for one in each]
    for prior, means in priors.items():
        Q = together([calibration.divided(one, mean) for one, mean in zip(each, means)])
        yield f"accuracy_{prior}", float(np.mean(Q.argmax(axis=1) == gold))
        yield f"nll_{prior}", calibration.nll(Q, gold)
        yield f"ece_{prior}", calibration.ece(Q, gold)
    if len(q.held_gold):
        held = together([calibration.softmax(scores(x.held)) for x in found])
        T = calibration.best_temperature(np.log(np.maximum(held, calibration.TINY)), q.held_gold)
        Q = calibration.softmax(np.log(np.maximum(P, calibration.TINY)) / T)
        yield from (
            ("temperature", T),
            ("nll_temperature", calibration.nll(Q, gold)),
            ("ece_temperature", calibration.ece(Q, gold)),
        )
    if len(each) > 1:
        accuracies = [float(np.mean(one.argmax(axis=1) == gold)) for one in each]
        yield "ways", len(each)
        yield from (
            ("accuracy_mean", float(np.mean(accuracies))),
            ("accuracy_min", min(accuracies)),
            ("accuracy_max", max(accuracies)),
            ("accuracy_spread", float(np.std(accuracies, ddof=1))),
        )
        table = [
            {
                "way": way.name,
                "accuracy": a,
                "nll": calibration.nll(one, gold),
                "label_mass": float(np.mean(label_mass(x.examples))),
            }
            for way, a, one, x in zip(q.ways, accuracies, each, found)
        ]
        yield (
            "ways_table",
            Artifact(
                f"predictions/{q.name}-ways-{{step}}.json", json.dumps(table, indent=1) + "\n"
            ),
        )
    yield "examples", n
    yield "cut", q.cut
    said = lambda x, way, i: _by_label(q.labels, way.words, x, i)
    more = [
        {
            "label_mass": float(m),
            "word_logprobs": [said(x.examples, way, i) for x, way in zip(found, q.ways)],
        }
        for i, m in enumerate(mass)
    ]
    free = [
        {
            prior: [said(part, way, i) for i in range(len(part.tokens))]
            for prior, part in x.free.items()
        }
        for x, way in zip(found, q.ways)
    ]
    yield "priors", Artifact(f"predictions/{q.name}-priors-{{step}}.json", json.dumps(free) + "\n")
    yield from files(q, P, more)


def files(
    questions: PromptSet, P: np.ndarray, more: Sequence[dict]
) -> Iterator[tuple[str, Artifact]]:
    """Each example's label distribution, with `more` about it, and the pictures."""
    q, predicted = questions, P.argmax(axis=1)
    lines = [
        json.dumps(
            {
                "name": name,
                "label": q.labels[y],
                "prediction": q.labels[p],
                "distribution": dict(zip(q.labels, map(float, probabilities))),
            }
            | about
        )
        for name, y, p, probabilities, about in zip(q.names, q.gold, predicted, P, more)
    ]
    yield "predictions", Artifact(f"predictions/{q.name}-{{step}}.jsonl", "\n".join(lines) + "\n")
    matrix, accuracy = (
        statistics.confusion(predicted, q.gold, len(q.labels)),
        np.mean(predicted == q.gold),
    )
    yield (
        "confusion",
        Artifact(
            f"confusion-{q.name}.png",
            pictures.plot_confusion(matrix, q.labels, f"{q.name}: accuracy {accuracy:.1%}"),
        ),
    )
    yield (
        "reliability",
        Artifact(
            f"reliability-{q.name}.png", pictures.plot_reliability(P, q.gold, q.labels, q.name)
        ),
    )


def _by_label(
    labels: Sequence[str], words: Sequence[tuple[int, str]], x: WordLogprobs, i: int
) -> dict[str, dict[str, list[float]]]:
    """Label -> word -> the log-probability of each of its tokens, after prompt i."""
    found: dict[str, dict[str, list[float]]] = {label: {} for label in labels}
    for j, (k, word) in enumerate(words):
        found[labels[k]][word] = np.round(x.tokens[i, j, : x.num_tokens[i, j]], 6).tolist()
    return found


def read_word_logprobs(lines: Sequence[dict], way: int = 0) -> tuple[list[str], WordLogprobs]:
    """(labels, the array that all scores are functions of) from the lines of predictions/: no other
    aggregate, norm or correction needs the model.
    """
    first = lines[0]["word_logprobs"][way]
    words = [(k, label, word) for k, (label, words) in enumerate(first.items()) for word in words]
    paths = [
        [np.asarray(line["word_logprobs"][way][label][word]) for _, label, word in words]
        for line in lines
    ]
    return list(first), word_logprobs(
        paths, [k for k, _, _ in words], [word for _, _, word in words]
    )


def _check(name: str, **choices: tuple[str, Sequence[str]]) -> None:
    for what, (value, valid) in choices.items():
        if value not in valid:
            raise ValueError(f"config.evals.{name}.{what} = {value!r}; valid: {list(valid)}")


def _check_norm(name: str, norm: str, words: Sequence[str]) -> None:
    if norm in ("char", "byte") and (blank := [word for word in words if not word.strip()]):
        raise ValueError(
            f"config.evals.{name}: length_norm = {norm!r}: the words {blank} have no characters "
            "but white space"
        )


class DocumentClassification:
    """The documents of a run: the question after each is config.data.label_prompt, tokenized as in
    training. Yields what `PromptClassification` does.

    Documents that are too long lose their beginning, BOS too, as the later windows of a training
    document do; never the question. `cut` counts them.

    Args:
      name: names the artifacts.
      verbalizer: (label, words) pairs; a word includes the space before it.
      max_documents: how many of the split, evenly out of it; 0: all.
      aggregate, length_norm: see lm.evals.verbalizer.label_scores and word_scores.
    """

    def __init__(
        self,
        predict_fns: PredictFns,
        *,
        name: str,
        documents: Documents,
        encoder: Encoder,
        verbalizer,
        max_documents: int,
        aggregate: str = "sum",
        length_norm: str = "none",
    ):
        chosen = list(take(documents, max_documents))
        if not encoder.label_prompt or not chosen or not all(d.label for d in chosen):
            raise ValueError(
                f"the eval {name!r} needs labelled documents and config.data.label_prompt (now "
                f"{encoder.label_prompt!r})"
            )
        _check(name, aggregate=(aggregate, AGGREGATES), length_norm=(length_norm, NORMS))
        labels = [label for label, _ in verbalizer]
        words = compile_verbalizer(verbalizer, encoder.tokenizer, {d.label for d in chosen})
        _check_norm(name, length_norm, [word for _, word, _ in words])
        room = predict_fns.length - max(len(ids) for _, _, ids in words) + 1
        if room <= (question := len(encoder.tokenizer.encode(encoder.label_prompt))):
            raise ValueError(
                f"config.data.length = {predict_fns.length} is too short for the eval {name!r}: "
                f"the question has {question} tokens, the longest word "
                f"{predict_fns.length - room + 1}, and of the document one at least should be left"
            )
        asked = [encoder.prompt(d) for d in chosen]
        build = lambda prompt: build_tree(prompt[-room:], [ids for _, _, ids in words])
        free = {
            "content_free": [build(encoder.prompt(Document(text, "", ""))) for text in CONTENT_FREE]
        }
        way = Variant(
            "", [(k, word) for k, word, _ in words], [build(prompt) for prompt in asked], free, []
        )
        self.questions = PromptSet(
            name,
            labels,
            [d.name for d in chosen],
            np.array([labels.index(d.label) for d in chosen]),
            [way],
            sum(len(prompt) > room for prompt in asked),
            np.zeros(0, int),
        )
        self._predict_fns, self._aggregate, self._length_norm = predict_fns, aggregate, length_norm
        self.about = {"fingerprint": documents.fingerprint, "examples": len(chosen)}

    def run(self, params) -> Iterator[tuple[str, float | Artifact]]:
        found = score_prompts(self._predict_fns, params, self.questions)
        yield from results(
            self.questions,
            found,
            lambda x: label_scores(word_scores(x, self._length_norm), x.label, self._aggregate),
        )


class PromptClassification:
    """Yields of the label distributions, the softmax of the label scores: accuracy with its Wilson
    95% interval; the scores of `statistics.prediction_scores` (macro-F1 with its bootstrap
    interval); nll, brier, ece (and with bins of equal mass, and classwise), auroc, auroc_ovo,
    confidence_auroc, selective_accuracy (its mean over all coverages); label_mass (see
    `verbalizer.label_mass`, the mean). Accuracy, nll and ece again, corrected by what the model
    says anyway (`priors`): after prompts that say nothing (_content_free), with random words of the
    data in their place (_domain), after the end of the template alone (_pmi_dc), or in the mean
    (_batch: it looks at all test inputs). To compare with: majority_accuracy, and
    content_free_accuracy, that of the label that is likeliest after nothing. As files: each
    example's label distribution and log-probabilities of the words' tokens (predictions/), the
    confusion matrix, the reliability diagram with the distribution of labels.

    Several templates, verbalizers or seeds are asked in all combinations. Their distributions are
    averaged (`ensemble`), and accuracy_mean, _min, _max and _spread (standard deviation) say how
    much the way of asking matters. Prompts that are too long lose their beginning (the first
    examples), but for BOS; `cut` counts them. An empty column is asked about like any other.

    Args:
      name: names the artifacts.
      source: where the records are, see `lm.data.records.load`; its split, and shots_split, where
        examples come from.
      prompt: templates (see `prompts.Template`), shots: examples before the question, sampler (see
        `prompts.select_shots`), seeds: of several draws, separator: after each example.
      verbalizer: words: one or several tuples of (label, words) pairs, a word with the space before
        it; the first word of a label is what examples say. terminator: text after each word that is
        scored with it, so that a word that begins another one can be told from it. boundary,
        aggregate, length_norm, weights: see lm.evals.verbalizer.
      label: the column of the right label: its name, or its number in the verbalizer's order.
      priors: which corrections.
      ensemble: the mean of distributions (mean_prob), or of their logs.
      temperature_examples: so many records of shots_split, balanced, fit a temperature
        (nll_temperature, ece_temperature); 0: none.
      max_documents: how many records, evenly out of the split; 0: all.

    Raises:
      ValueError: no such data, column, label or choice; a verbalizer that can't be told apart; see
        `verbalizer.split`.
    """

    def __init__(
        self,
        predict_fns: PredictFns,
        *,
        name: str,
        encoder: Encoder,
        source: Mapping,
        prompt: Mapping,
        verbalizer: Mapping,
        label: str,
        priors: Sequence[str],
        ensemble: str,
        temperature_examples: int,
        max_documents: int,
    ):
        v = verbalizer
        for prior in priors:
            _check(name, priors=(prior, PRIORS))
        _check(
            name,
            ensemble=(ensemble, ENSEMBLES),
            **{
                f"verbalizer.{key}": (v[key], valid)
                for key, valid in (
                    ("boundary", BOUNDARIES),
                    ("aggregate", AGGREGATES),
                    ("length_norm", NORMS),
                )
            },
        )
        prompts.check_counts(
            name,
            shots=prompt["shots"],
            temperature_examples=temperature_examples,
            max_documents=max_documents,
        )
        names, self._records = prompts.evaluated(source, name, max_documents)
        self._name, self._label, self._boundary, self._terminator, self._tokenizer = (
            name,
            label,
            v["boundary"],
            v["terminator"],
            encoder.tokenizer,
        )
        self._length, self._cut, self._audited, self._reduce = predict_fns.length, set(), set(), v
        if not v["words"] or not prompt["templates"] or not prompt["seeds"]:
            raise ValueError(
                f"config.evals.{name} needs verbalizer.words, prompt.templates and prompt.seeds, "
                "one or more of each"
            )
        self._labels = [label for label, _ in v["words"][0]]
        if len(self._labels) < 2:
            raise ValueError(
                f"config.evals.{name}.verbalizer.words has the labels {self._labels}; wanted two "
                "or more"
            )
        if wrong := [
            other
            for words in v["words"]
            if sorted(other := [label for label, _ in words]) != sorted(self._labels)
        ]:
            raise ValueError(
                f"config.evals.{name}.verbalizer.words: the first has the labels {self._labels}, "
                f"another {wrong[0]}"
            )
        gold = np.array([self.gold(record) for record in self._records])
        pool = prompts.load_shots(source, name) if prompt["shots"] or temperature_examples else []
        templates = [
            prompts.Template(text, f"config.evals.{name}.prompt.templates")
            for text in prompt["templates"]
        ]
        asked = [{template(record) for record in self._records} for template in templates]
        held = self._choose(
            pool,
            temperature_examples,
            "temperature_examples",
            "balanced",
            0,
            lambda record: templates[0](record) in asked[0],
        )
        ways = []
        for (t, template), (w, pairs), seed in itertools.product(
            enumerate(templates), enumerate(v["words"]), prompt["seeds"] if prompt["shots"] else [0]
        ):
            by_label = dict(pairs)
            words = [(k, word) for k, label in enumerate(self._labels) for word in by_label[label]]
            _check_norm(name, v["length_norm"], [word for _, word in words])
            if empty := [label for label, listed in pairs if not listed or "" in listed]:
                raise ValueError(
                    f"config.evals.{name}.verbalizer.words: the label {empty[0]!r} has no word, "
                    "or an empty one"
                )
            # weights that don't fit
            self._scores(np.zeros((1, len(words))), np.array([k for k, _ in words]))
            if v["boundary"] != "lm_eval":
                audit_spaces(template.tail, [word for _, word in words])
            avoid = lambda record: template(record) in asked[t] or record in held  # noqa: B023
            shots = self._choose(
                pool, prompt["shots"], "prompt.shots", prompt["sampler"], seed, avoid
            )
            first = prompts.shots_text(
                shots,
                template,
                lambda record: by_label[self._labels[self.gold(record)]][0],  # noqa: B023
                prompt["separator"],
            )
            build = lambda text: self._build_tree(text, words)[0]  # noqa: B023
            trees = []
            for number, record in enumerate(self._records):
                tree, cut = self._build_tree(first + template(record), words)
                trees.append(tree)
                self._cut |= {number} if cut else set()
            free = {
                prior: [build(text) for text in self._free(prior, template, first)]
                for prior in priors
                if prior != "batch"
            }
            ways.append(
                Variant(
                    f"template {t}, words {w}, seed {seed}",
                    words,
                    trees,
                    free,
                    [build(first + template(record)) for record in held],
                )
            )
        self.questions = PromptSet(
            name,
            self._labels,
            names,
            gold,
            ways,
            len(self._cut),
            np.array([self.gold(record) for record in held], int),
        )
        self.predict_fns, self._options = (
            predict_fns,
            dict(ensemble=ensemble, batch="batch" in priors),
        )
        self.about = {
            "fingerprint": records_lib.fingerprint(self._records),
            "examples": len(gold),
            "citation": source["citation"],
            "words": [way.split_words(self._labels, self._tokenizer.decode) for way in ways],
        }

    def gold(self, record: Mapping) -> int:
        """The index of a record's label."""
        if self._label not in record:
            raise ValueError(
                f"the eval {self._name!r}: records have no column {self._label!r} "
                f"(config.evals.{self._name}.label); they have {sorted(record)}"
            )
        value = record[self._label]
        if str(value) in self._labels:
            return self._labels.index(str(value))
        number = int(value) if str(value).isdecimal() else -1  # not True, nor -1
        if not 0 <= number < len(self._labels):
            raise ValueError(
                f"the eval {self._name!r}: a record has the label {value!r}; the verbalizer has "
                f"words for {self._labels}"
            )
        return number

    def _choose(self, pool, count, key, sampler, seed, avoid) -> list[dict]:
        if not count:
            return []
        return prompts.select_shots(
            pool,
            count,
            sampler=sampler,
            seed=seed,
            label=self.gold,
            num_labels=len(self._labels),
            avoid=avoid,
            name=self._name,
            key=key,
        )

    def _build_tree(self, text: str, words: Sequence[tuple[int, str]]) -> tuple[Tree, bool]:
        """(the tree of a prompt and the words, whether the prompt was cut)."""
        ids, after = split(
            self._tokenizer.encode_batch,
            text,
            [word + self._terminator for _, word in words],
            self._boundary,
        )
        if (key := tuple(map(tuple, after))) not in self._audited:
            audit(self._labels, [(k, word, ids) for (k, word), ids in zip(words, after)])
            if self._boundary != "lm_eval":
                audit_round_trip(
                    self._tokenizer.decode,
                    ids,
                    [(word + self._terminator, more) for (_, word), more in zip(words, after)],
                )
            self._audited.add(key)
        ids, cut = prompts.truncate_prompt(
            prefix_ids(self._tokenizer, ids), ids, max(map(len, after)), self._length, self._name
        )
        return build_tree(ids, after), cut

    def _free(self, prior: str, template: prompts.Template, first: str) -> list[str]:
        """The prompts whose mean distribution is the prior."""
        if prior == "content_free":
            return [first + template.filled(text) for text in CONTENT_FREE]
        if prior == "pmi_dc":
            return [template.tail]
        rng, columns = random.Random(0), {}
        for field in template.fields:
            texts = [str(template.value(field, record)).split() for record in self._records]
            columns[field] = (
                [word for text in texts for word in text] or [""],
                round(sum(map(len, texts)) / len(texts)),
            )
        drawn = lambda field: " ".join(
            rng.choice(columns[field][0]) for _ in range(columns[field][1])
        )
        # as many as Fei et al. 2023, arXiv 2305.19148, take
        return [first + template.filled(drawn) for _ in range(20)]

    def _scores(self, words: np.ndarray, label: np.ndarray) -> np.ndarray:
        return label_scores(
            words,
            label,
            self._reduce["aggregate"],
            np.asarray(self._reduce["weights"]) if self._reduce["weights"] else None,
        )

    def run(self, params) -> Iterator[tuple[str, float | Artifact]]:
        scores = lambda x: self._scores(word_scores(x, self._reduce["length_norm"]), x.label)
        yield from results(
            self.questions,
            score_prompts(self.predict_fns, params, self.questions),
            scores,
            **self._options,
        )
