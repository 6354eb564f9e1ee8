"""Verbalizer classification: the model's probabilities of label words after a prompt.

`DocumentClassification` asks about the documents of a run, as in training. `PromptClassification`
asks by templates about the records of a data set. What they yield is in label_results.py.
"""

import itertools
import logging
import random
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lm.data import records as records_lib
from lm.data.pack import Encoder
from lm.data.sources import Document, Documents
from lm.data.tokenizer import Tokenizer
from lm.evals import prompt_format, prompts
from lm.evals.answer_column import AnswerColumn
from lm.evals.label_results import (
    ENSEMBLES,
    PromptSet,
    Variant,
    ensemble_mean,
    mean_priors,
    metric_names,
    results,
    score_prompts,
)
from lm.evals.masked_answers import AFTER
from lm.evals.predict import Artifact, PredictFns, Prompt, Question, ShownPrompt
from lm.evals.prompt_format import ChatFormat, TextFormat
from lm.evals.scores.calibration import divide_by_prior
from lm.evals.scores.label_scores import (
    AGGREGATES,
    NORMS,
    LabelScorer,
    LabelWord,
    check_word_weights,
)
from lm.evals.verbalizer import (
    BOUNDARIES,
    check_round_trip,
    check_spaces,
    check_words,
    tokenize_words_after,
)

# Texts without content (Zhao et al. 2021, arXiv 2102.09690, section 5).
CONTENT_FREE = ("", "N/A", "[MASK]")
# Prompts with random words, as many as Fei et al. 2023, arXiv 2305.19148, take.
NUM_DOMAIN_PROMPTS = 20
PRIORS = ("content_free", "domain", "pmi_dc", "batch")

# Pairs of a label and its words. Not a dict: a label may have a dot in its name, a key of a
# configuration may not.
Verbalizer = Sequence[tuple[str, Sequence[str]]]


class DocumentClassification:
    """Asks about the documents of a run by config.data.label_prompt, tokenized as in training.

    Yields what `PromptClassification` does. Documents that are too long lose their beginning, BOS
    too, as the later windows of a training document do; the question stays whole. `cut` counts
    these documents.

    Args:
      name: names the artifacts.
      verbalizer: (label, words) pairs; a word includes the space before it.
      max_documents: how many documents, evenly out of the split; 0: all.
      aggregate, length_norm: see lm/evals/scores/label_scores.py.
      fill: see `lm.evals.predict.FILLS`.

    Raises:
      ValueError: documents without labels, an unknown choice, max_documents below 0, no room for
        the question; see `tokenize_verbalizer`.
    """

    asks = ("logprobs",)

    def __init__(
        self,
        predict_fns: PredictFns,
        *,
        name: str,
        documents: Documents,
        encoder: Encoder,
        verbalizer: Verbalizer,
        max_documents: int,
        aggregate: str = "sum",
        length_norm: str = "none",
        fill: str = "ltr",
    ):
        prompts.check_least(f"config.evals.{name}.max_documents", max_documents, 0)
        chosen = list(records_lib.take(documents, max_documents))
        _check_labelled(name, chosen, encoder.label_prompt)
        prompts.check_choice(name, "aggregate", aggregate, AGGREGATES)
        prompts.check_choice(name, "length_norm", length_norm, NORMS)
        prompts.check_choice(name, "fill", fill, predict_fns.fills)

        data_labels = {document.label for document in chosen}
        words, word_ids = tokenize_verbalizer(verbalizer, encoder.tokenizer, data_labels)
        check_word_lengths(name, length_norm, words)

        question = encoder.tokenizer.encode(encoder.label_prompt)
        room = prompt_room(name, predict_fns.prompt_length, question, word_ids)

        # A prompt ends with the question: what is cut off is the beginning of the document.
        labels = label_names(verbalizer)
        names = []
        texts = []
        gold = []
        questions = []
        num_cut = []
        for document in chosen:
            names.append(document.name)
            texts.append(document.text + encoder.label_prompt)
            gold.append(labels.index(document.label))
            ids = encoder.prompt(document)
            questions.append(_question(ids[-room:], word_ids, fill))
            num_cut.append(max(len(ids) - room, 0))

        variant = Variant(
            name="",
            words=words,
            questions=questions,
            prior_questions={"content_free": _content_free(encoder, room, word_ids, fill)},
            calibration_questions=[],
            num_cut=num_cut,
            asked=dict(template="{text}" + encoder.label_prompt, shots=[], before="", variant=""),
        )
        self.prompt_set = PromptSet(
            name=name,
            labels=labels,
            example_names=names,
            texts=[texts],
            gold=np.array(gold),
            variants=[variant],
            calibration_gold=np.zeros(0, int),
        )
        self.predict_fns = predict_fns
        self._scorer = LabelScorer(length_norm, aggregate)
        self._tokenizer = encoder.tokenizer
        self.about = {
            "fingerprint": documents.fingerprint,
            "examples": len(chosen),
            "prompts": [variant.asked],
            "corrections": ["content_free", "batch"],
        }
        self.metrics = metric_names(self.prompt_set)

    def run(self, params) -> Iterator[tuple[str, float | Artifact]]:
        logprobs = score_prompts(self.predict_fns, params, self.prompt_set)
        yield from results(self.prompt_set, logprobs, self._scorer)

    def shown_prompts(self, count: int) -> Iterator[ShownPrompt]:
        return self.prompt_set.shown_prompts(count, self._tokenizer.spell)


def _check_labelled(name: str, documents: Sequence[Document], label_prompt: str) -> None:
    """Raises ValueError unless there are documents, all with labels, and a question."""
    is_labelled = documents and all(document.label for document in documents)
    if not label_prompt or not is_labelled:
        raise ValueError(
            f"the eval {name!r} needs labelled documents (config.data.source_args says where "
            f"labels are) and config.data.label_prompt (now {label_prompt!r})"
        )


def _question(prompt_ids: Sequence[int], word_ids: Sequence[Sequence[int]], fill: str) -> Question:
    # An array holds thousands of prompts in a tenth of a list's memory.
    return Question(Prompt(np.asarray(prompt_ids, np.int32)), word_ids, fill)


def _content_free(
    encoder: Encoder, room: int, word_ids: Sequence[list[int]], fill: str
) -> list[Question]:
    """What is asked without a document: the answers are the prior that others are corrected by."""
    questions = []
    for text in CONTENT_FREE:
        ids = encoder.prompt(Document(text, "", ""))
        questions.append(_question(ids[-room:], word_ids, fill))
    return questions


def label_names(verbalizer: Verbalizer) -> list[str]:
    """The labels of a verbalizer, in their order."""
    return [label for label, _ in verbalizer]


def tokenize_verbalizer(
    verbalizer: Verbalizer, tokenizer: Tokenizer, data_labels: set[str]
) -> tuple[list[LabelWord], list[list[int]]]:
    """Tokenizes the words of a verbalizer apart from the text before them.

    Training does the same (lm/data/pack.py): a word is the same tokens after any text, which it
    isn't where prompt and word are tokenized together.

    Args:
      verbalizer: (label, words) pairs.
      data_labels: the labels that occur in the data.

    Returns:
      (words, the token ids of each word)

    Raises:
      ValueError: a label of the data without words, or see `lm.evals.verbalizer.check_words`.
    """
    labels = label_names(verbalizer)
    if data_labels - set(labels):
        raise ValueError(
            f"the verbalizer has words for the labels {labels}; the data's labels are "
            f"{sorted(data_labels)}"
        )

    words = []
    for k, (_, texts) in enumerate(verbalizer):
        for text in texts:
            words.append(LabelWord(k, text))
    word_ids = [tokenizer.encode(word.text) for word in words]
    check_words(labels, words, word_ids)
    return words, word_ids


def prompt_room(
    name: str, length: int, question: Sequence[int], word_ids: Sequence[Sequence[int]]
) -> int:
    """Returns how many tokens the prompts of config.evals.NAME may have.

    Args:
      length: the tokens that a row holds.
      question: ids with which every prompt ends.
      word_ids: ids of each word.

    Raises:
      ValueError: no room for the question and a token of the document.
    """
    # All words follow the same prompt, so that the longest one decides. Its last token is only
    # predicted, never read.
    longest_word = max(map(len, word_ids))
    room = length - longest_word + 1
    if room <= len(question):
        raise ValueError(
            f"config.data.length = {length} is too short for the eval {name!r}: the question has "
            f"{len(question)} tokens, the longest word {longest_word}, and of the document one at "
            "least should be left"
        )
    return room


def check_word_lengths(name: str, length_norm: str, words: Sequence[LabelWord]) -> None:
    """Raises ValueError for a word of length 0, which a score can't be divided by."""
    blank = [word.text for word in words if not word.text.strip()]
    if blank and length_norm in ("char", "byte"):
        raise ValueError(
            f"config.evals.{name}: length_norm = {length_norm!r}: the words {blank} have no "
            "characters but white space"
        )


class PromptClassification:
    """Asks about records by templates, and scores label words after the prompts.

    A *variant* is a template, a verbalizer and a seed for the draw of examples. All combinations of
    the given ones are asked. The label distribution is the softmax of the label scores, averaged
    over the variants (`ensemble`).

    Yields the metrics of these distributions:
      accuracy with its Wilson 95% interval, the scores of `statistics.prediction_scores` (macro-F1
        with its bootstrap interval), and to compare with them majority_accuracy.
      nll, brier, ece (also with bins of equal mass, and classwise), auroc, auroc_ovo,
        confidence_auroc, selective_accuracy (the mean over all coverages).
      label_mass: the mean probability of all label words together; of a masked model, whose
        probabilities are conditional on the number of tokens, also label_mass_N of words of N.
      accuracy_PRIOR, nll_PRIOR, ece_PRIOR after a prior correction: the distributions are divided
        by the mean distribution after prompts without content (content_free), with random words of
        the data in their columns (domain), after the end of the template alone (pmi_dc), or over
        all test inputs (batch).
      content_free_accuracy: of always giving the label that is likeliest without content.
      nll_temperature, ece_temperature after temperature scaling, and the temperature.
      accuracy_mean, _min, _max and _spread (standard deviation) over several variants, and ways,
        the number of variants.
      examples: how many records were evaluated.

    Yields as artifacts each example's distribution and the log-probabilities of the words' tokens
    (predictions/NAME-STEP.jsonl); those after the prompts of the priors
    (predictions/NAME-priors-STEP.json); with several variants a table of them
    (predictions/NAME-ways-STEP.json); the confusion matrix, and the reliability diagram.

    Prompts that are too long lose their beginning (the first examples), but for BOS; `cut` counts
    them. An empty column is asked about like any other.

    Args:
      name: names the artifacts.
      source: where the records are, see `lm.data.records.load`; `split` is evaluated, examples come
        from `shots_split`.
      prompt: templates (see `prompts.Template`); shots, the number of examples before the question;
        sampler (see `prompts.draw_records`); seeds, one for each draw of examples; separator, the
        text after each example; format, system: see `lm.evals.prompt_format`.
      verbalizer: words, one or several tuples of (label, words) pairs, a word with the space before
        it (examples are answered with the first word of their label); terminator, text after each
        word that is scored with it, so that a word that begins another one can be told from it;
        boundary, see `verbalizer.tokenize_words_after`; aggregate, length_norm and weights, see
        lm/evals/scores/label_scores.py; of models that fill blanks after, text behind the word that
        is given, and fill, see `lm.evals.predict.FILLS`.
      label: the column of the right label, which holds its name, or its number in the order of the
        verbalizer.
      priors: which corrections to make, of PRIORS.
      ensemble: the mean of distributions (mean_prob), or of their logarithms (mean_logprob).
      temperature_examples: how many records of shots_split fit the temperature, as many of each
        label; 0: no temperature scaling.
      max_documents: how many records are evaluated, evenly out of the split; 0: all.
      examples_key: what messages call `temperature_examples`, where the number comes from
        elsewhere; "": its key in the configuration.

    Raises:
      ValueError: no such data, column, label or choice; a number below 0; words that can't be told
        apart; see `verbalizer.tokenize_words_after`.
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
        examples_key: str = "",
    ):
        # All that needs no data is checked before the data is read.
        examples_key = examples_key or f"config.evals.{name}.temperature_examples"
        prompts.check_least(examples_key, temperature_examples, 0)
        prompts.check_least(f"config.evals.{name}.max_documents", max_documents, 0)
        _check_choices(name, prompt, verbalizer, priors, ensemble)
        prompts.check_choice(name, "verbalizer.fill", verbalizer["fill"], predict_fns.fills)
        templates = _parse_templates(name, prompt["templates"])

        self.predict_fns = predict_fns
        self._name = name
        self._labels = _shared_labels(name, verbalizer["words"])
        self._prompt = prompt
        self._priors = priors
        self._ensemble = ensemble
        self._ways: list[tuple] = []  # (template, words, examples) of each variant
        self._scorer = LabelScorer(
            verbalizer["length_norm"],
            verbalizer["aggregate"],
            np.asarray(verbalizer["weights"]) if verbalizer["weights"] else None,
        )
        self._format = prompt_format.make(encoder.tokenizer, prompt, name, is_scored=True)
        length = predict_fns.prompt_length
        self._question_tokenizer = QuestionTokenizer(
            encoder.tokenizer, self._labels, verbalizer, self._format, length, name
        )

        split = source["split"]
        available = prompts.load(source, split, name)
        example_names, self._records = prompts.evaluated(available, split, max_documents)
        needs_pool = prompt["shots"] or temperature_examples
        pool = prompts.load_shots(source, name) if needs_pool else []

        self._answers = AnswerColumn(name, "label", label, self._label_names, self._num_labels)
        self._answers.settle(self._records, available, pool)
        gold = np.array([self.gold(record) for record in self._records])

        # Drawn before the examples of the variants, none of which may be among them.
        self._calibration_records = self._draw_calibration_records(
            pool, templates[0], temperature_examples, examples_key
        )
        calibration_gold = [self.gold(record) for record in self._calibration_records]
        variants = self._build_variants(pool, templates, verbalizer["words"], source["shots_split"])

        self.prompt_set = PromptSet(
            name=name,
            labels=self._labels,
            example_names=example_names,
            texts=[list(map(template, self._records)) for template in templates],
            gold=gold,
            variants=variants,
            calibration_gold=np.array(calibration_gold, int),
        )
        self._tokenizer = encoder.tokenizer
        self.about = self._describe(source["citation"], temperature_examples)

    def _describe(self, citation: str, temperature_examples: int) -> dict:
        """The attribute `about`, see `lm.evals.predict.Evaluator`."""
        variants = self.prompt_set.variants
        decode = self._tokenizer.decode
        corrections = list(self._priors)
        if temperature_examples:
            corrections.append(f"temperature of {temperature_examples} examples")
        return {
            "fingerprint": records_lib.fingerprint(self._records),
            "examples": len(self._records),
            "citation": citation,
            "format": self._prompt["format"],
            "words": [variant.word_tokens(self._labels, decode) for variant in variants],
            "prompts": [variant.asked for variant in variants],
            "corrections": corrections,
        }

    def _label_names(self, record: Mapping) -> list[str]:
        return self._labels

    def _num_labels(self, record: Mapping) -> int:
        return len(self._labels)

    def gold(self, record: Mapping) -> int:
        """The index of a record's right label."""
        return self._answers.index(record)

    def _draw_calibration_records(
        self, pool: Sequence[dict], template: prompts.Template, count: int, key: str
    ) -> list[dict]:
        """The records of `Variant.calibration_questions`. Messages call their number `key`."""
        if not count:
            return []
        shots = prompts.draw_records(
            pool,
            count,
            sampler="balanced",
            seed=0,
            identity=template.identity,
            avoid=set(map(template.identity, self._records)),
            label=self.gold,
            num_labels=len(self._labels),
        )
        prompts.check_enough(shots, count, key)
        records = [shot.record for shot in shots]
        prompts.check_labels(list(map(self.gold, records)), len(self._labels), key, False)
        return records

    def _build_variants(
        self,
        pool: Sequence[dict],
        templates: Sequence[prompts.Template],
        verbalizers: Sequence[Verbalizer],
        shots_split: str,
    ) -> list[Variant]:
        """All combinations of a template, a verbalizer and a seed."""
        # Without examples there is nothing to draw: all seeds would ask the same.
        seeds = self._prompt["seeds"] if self._prompt["shots"] else [0]
        # Records may be in both splits, and differ in a column that the template doesn't show.
        taken = [*self._records, *self._calibration_records]
        identities = [set(map(template.identity, taken)) for template in templates]

        variants = []
        for (t, template), (w, pairs), seed in itertools.product(
            enumerate(templates), enumerate(verbalizers), seeds
        ):
            words = self._label_words(dict(pairs), template.tail)
            shots = prompts.draw_shots(
                pool,
                self._prompt,
                seed,
                identity=template.identity,
                avoid=identities[t],
                name=self._name,
                label=self.gold,
                num_labels=len(self._labels),
            )
            examples = self._examples(shots, template, words)
            name = f"template {t}, words {w}, seed {seed}"
            around = self._format.around(examples)
            asked = prompts.describe(template, shots, shots_split, around, name)
            variants.append(self._build_variant(asked, examples, template, words))
            self._ways.append((template, words, examples))
        if self.predict_fns.fills_blanks:
            _warn_of_lengths(self._name, variants)
        return variants

    def _label_words(
        self, words_by_label: Mapping[str, Sequence[str]], prompt_end: str
    ) -> list[LabelWord]:
        """The words of a verbalizer, in the order of the labels, checked as texts."""
        words = []
        for k, label in enumerate(self._labels):
            for text in words_by_label[label]:
                words.append(LabelWord(k, self._format.answer(text)))

        check_word_lengths(self._name, self._scorer.length_norm, words)
        for label, texts in words_by_label.items():
            if not texts or "" in texts:
                raise ValueError(
                    f"config.evals.{self._name}.verbalizer.words: the label {label!r} has no word, "
                    "or an empty one"
                )
        check_word_weights(
            self._scorer.word_weights,
            self._scorer.aggregate,
            len(words),
            f"config.evals.{self._name}.verbalizer.weights",
        )

        # The boundary "lm_eval" is there to score what lm-evaluation-harness would score, whether
        # that makes sense or not.
        boundary = self._question_tokenizer.boundary
        if boundary != "lm_eval" and self._format.space_is_text:
            check_spaces(prompt_end, [word.text for word in words], boundary)
        return words

    def _examples(
        self, shots: Sequence[prompts.Shot], template: prompts.Template, words: Sequence[LabelWord]
    ) -> list[tuple[str, str]]:
        """The examples before the question, each answered with the first word of its label."""
        first_words: dict[int, str] = {}
        for word in words:
            first_words.setdefault(word.label, word.text)

        examples = []
        for shot in shots:
            examples.append((template(shot.record), first_words[self.gold(shot.record)]))
        return examples

    def _build_variant(
        self,
        asked: dict,
        examples: Sequence[tuple[str, str]],
        template: prompts.Template,
        words: list[LabelWord],
    ) -> Variant:
        """All that a variant asks.

        Args:
          asked: see `lm.evals.prompts.describe`.
          examples: what stands before the question.
        """
        texts = self._format.wrap(examples, list(map(template, self._records)))
        questions, num_cut = self._tokenize(texts, words)

        prior_questions: dict[str, list[Question]] = {}
        for prior in self._priors:
            # The batch prior is a mean over the examples themselves.
            if prior != "batch":
                texts = self._prior_prompts(prior, template, examples)
                prior_questions[prior], _ = self._tokenize(texts, words)

        texts = self._format.wrap(examples, list(map(template, self._calibration_records)))
        calibration_questions, _ = self._tokenize(texts, words)

        return Variant(
            asked["variant"],
            words,
            questions,
            prior_questions,
            calibration_questions,
            num_cut,
            asked,
        )

    def _tokenize(
        self, texts: Sequence[str], words: Sequence[LabelWord]
    ) -> tuple[list[Question], list[int]]:
        """(prompts with the words as ids, how many tokens each prompt lost)."""
        questions = []
        num_cut = []
        for text in texts:
            question, cut = self._question_tokenizer.tokenize(text, words)
            questions.append(question)
            num_cut.append(cut)
        return questions, num_cut

    def _prior_prompts(
        self, prior: str, template: prompts.Template, examples: Sequence[tuple[str, str]]
    ) -> list[str]:
        """The prompts whose mean distribution is the prior."""
        # PMI_DC asks what follows the end of the question, without anything before it.
        if prior == "pmi_dc":
            return self._format.wrap([], [template.tail])

        if prior == "domain":
            columns = random_columns(template, self._records, NUM_DOMAIN_PROMPTS)
        else:
            columns = [[text] * len(template.fields) for text in CONTENT_FREE]
        return self._format.wrap(examples, list(map(template.fill, columns)))

    @property
    def asks(self) -> tuple[str, ...]:
        return ("infill",) if self._question_tokenizer.is_blank else ("logprobs",)

    @property
    def metrics(self) -> list[str]:
        return metric_names(self.prompt_set, batch_prior="batch" in self._priors)

    def run(self, params) -> Iterator[tuple[str, float | Artifact]]:
        yield from results(
            self.prompt_set,
            score_prompts(self.predict_fns, params, self.prompt_set),
            self._scorer,
            ensemble=self._ensemble,
            batch_prior="batch" in self._priors,
            by_length=self.predict_fns.fills_blanks,
        )

    def distributions(self, params, records: Sequence[Mapping], prior: str = "") -> np.ndarray:
        """The label distributions of other records, [n, K], asked as those of the eval.

        Args:
          records: with the columns of the templates.
          prior: of `priors`, but for batch: what the distributions are divided by; "": nothing.
        """
        variants = []
        for (template, words, examples), variant in zip(self._ways, self.prompt_set.variants):
            texts = self._format.wrap(examples, list(map(template, records)))
            questions, num_cut = self._tokenize(texts, words)
            kept = {prior: variant.prior_questions[prior]} if prior else {}
            variants.append(
                variant._replace(
                    questions=questions,
                    num_cut=num_cut,
                    prior_questions=kept,
                    calibration_questions=[],
                )
            )

        asked_set = self.prompt_set._replace(variants=variants)
        if asked_set.num_truncated:
            num_cut = asked_set.num_truncated
            logging.warning("%s: %d of %d prompts are cut", self._name, num_cut, len(records))
        asked = score_prompts(self.predict_fns, params, asked_set)

        distributions = [self._scorer.distributions(logprobs.examples) for logprobs in asked]
        if prior:
            priors = mean_priors(asked, self._scorer)[prior]
            distributions = list(map(divide_by_prior, distributions, priors))
        return ensemble_mean(distributions, self._ensemble)

    def shown_prompts(self, count: int) -> Iterator[ShownPrompt]:
        return self.prompt_set.shown_prompts(count, self._tokenizer.spell)


def _warn_of_lengths(name: str, variants: Sequence[Variant]) -> None:
    """Warns where a masked model is to compare words of different numbers of tokens."""
    for variant in variants:
        lengths = {}
        for word, ids in zip(variant.words, variant.questions[0].continuations):
            lengths[word.text] = len(ids)
        if len(set(lengths.values())) > 1:
            logging.warning(
                "config.evals.%s: the label words have different numbers of tokens (%s), and a "
                "masked model's probabilities are conditional on them: the longer ones may be "
                "overrated",
                name,
                lengths,
            )


def _parse_templates(name: str, texts: Sequence[str]) -> list[prompts.Template]:
    """The templates of config.evals.NAME. Raises ValueError for a text that is none, or that has no
    column.
    """
    templates = []
    for text in texts:
        template = prompts.Template(text, f"config.evals.{name}.prompt.templates")
        template.check_has_column()
        templates.append(template)
    return templates


def _check_choices(
    name: str, prompt: Mapping, verbalizer: Mapping, priors: Sequence[str], ensemble: str
) -> None:
    """Raises ValueError for an unknown choice in config.evals.NAME, nothing to choose from, or
    shots below 0.
    """
    prompts.check_least(f"config.evals.{name}.prompt.shots", prompt["shots"], 0)
    for prior in priors:
        prompts.check_choice(name, "priors", prior, PRIORS)
    prompts.check_choice(name, "ensemble", ensemble, ENSEMBLES)
    prompts.check_choice(name, "verbalizer.boundary", verbalizer["boundary"], BOUNDARIES)
    prompts.check_choice(name, "verbalizer.aggregate", verbalizer["aggregate"], AGGREGATES)
    prompts.check_choice(name, "verbalizer.length_norm", verbalizer["length_norm"], NORMS)

    if not verbalizer["words"] or not prompt["templates"] or not prompt["seeds"]:
        raise ValueError(
            f"config.evals.{name} needs verbalizer.words, prompt.templates and prompt.seeds, "
            "one or more of each"
        )


def _shared_labels(name: str, verbalizers: Sequence[Verbalizer]) -> list[str]:
    """The labels of all verbalizers of config.evals.NAME, in the order of the first one.

    Raises:
      ValueError: fewer than two labels, or verbalizers for different labels.
    """
    labels = label_names(verbalizers[0])
    if len(labels) < 2:
        raise ValueError(
            f"config.evals.{name}.verbalizer.words has the labels {labels}; wanted two or more"
        )
    for pairs in verbalizers[1:]:
        if sorted(label_names(pairs)) != sorted(labels):
            raise ValueError(
                f"config.evals.{name}.verbalizer.words: the first has the labels {labels}, "
                f"another {label_names(pairs)}"
            )
    return labels


def random_columns(
    template: prompts.Template, records: Sequence[Mapping], count: int
) -> list[list[str]]:
    """Draws `count` times a text for each column of a template: random words of all records'
    texts in that column, as many as they have on average (Fei et al. 2023, arXiv 2305.19148).
    """
    words: dict[str, list[str]] = {}
    mean_length: dict[str, int] = {}
    for field in template.fields:
        texts = [str(template.value(field, record)).split() for record in records]
        # A column that is empty in all records stays empty.
        words[field] = list(itertools.chain.from_iterable(texts)) or [""]
        mean_length[field] = round(sum(map(len, texts)) / len(texts))

    # Always the same words, so that results can be compared.
    rng = random.Random(0)
    draws = []
    for _ in range(count):
        columns = []
        for field in template.fields:
            drawn = [rng.choice(words[field]) for _ in range(mean_length[field])]
            columns.append(" ".join(drawn))
        draws.append(columns)
    return draws


class QuestionTokenizer:
    """Makes token ids of prompts and label words.

    Args:
      labels: the labels that `LabelWord.label` indexes.
      verbalizer: boundary, see `verbalizer.tokenize_words_after`; terminator, text after each word,
        scored with it; after, text behind that, which is given; fill, see `Question`.
      format: that of the prompts.
      length: the tokens that a row holds.
      name: the eval's, for messages.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        verbalizer: Mapping,
        format: TextFormat | ChatFormat,
        length: int,
        name: str,
    ):
        self.boundary = verbalizer["boundary"]
        self._tokenizer = tokenizer
        self._labels = labels
        self._terminator = verbalizer["terminator"]
        self._format = format
        self._after = tokenizer.encode(verbalizer["after"])
        self._fill = verbalizer["fill"]
        # What a causal model can't answer.
        self.is_blank = bool(self._after) or self._fill != "ltr"
        self._length = length - len(self._after)
        self._name = name
        # Token ids of words that have passed the checks.
        self._checked: set[tuple[tuple[int, ...], ...]] = set()

    def tokenize(self, prompt: str, words: Sequence[LabelWord]) -> tuple[Question, int]:
        """Returns (a prompt and the words as ids, how many tokens the prompt lost)."""
        texts = [word.text + self._terminator for word in words]
        prompt_ids, word_ids = tokenize_words_after(
            self._format.encode_batch, prompt, texts, self.boundary
        )

        # After most prompts the words are the same tokens: the checks need not be repeated.
        key = tuple(map(tuple, word_ids))
        if key not in self._checked:
            check_words(self._labels, words, word_ids)
            if self.boundary != "lm_eval":
                check_round_trip(self._tokenizer.decode, prompt_ids, texts, word_ids)
            self._checked.add(key)

        start, prompt_ids = self._format.split(prompt_ids)
        longest = max(map(len, word_ids))
        prompt_ids, num_cut = prompts.truncate_prompt(
            start, prompt_ids, longest, self._length, self._name
        )
        arrays = {AFTER: np.asarray(self._after, np.int32)} if self._after else {}
        prompt = Prompt(np.asarray(prompt_ids, np.int32), arrays)
        return Question(prompt, word_ids, self._fill), num_cut
