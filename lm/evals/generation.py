"""Evals that generate text."""

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np

from lm import escape
from lm.data import records as records_lib
from lm.data import seq2seq
from lm.data.pack import Encoder
from lm.data.tokenizer import Tokenizer
from lm.decoding.beams import Beams, search
from lm.decoding.sampling import Sampling, row_keys
from lm.evals import prompt_format
from lm.evals import prompts as prompts_lib
from lm.evals.predict import (
    Artifact,
    PredictFns,
    ShownPrompt,
    predictions_artifact,
)
from lm.evals.scores.text_metrics import (
    NORMALIZE,
    SCORES,
    TOKENIZERS,
    Score,
    check_tokenizer,
    require_package,
    too_few_tokens,
)


def generate(
    predict_fns: PredictFns,
    params,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    sampling: Sampling,
    seeds: Sequence[int],
    beams: Beams | None = None,
) -> list[str]:
    """Returns the text that continues each prompt, up to the first stop string, a stop token or
    `max_new_tokens`.

    Continuations are decoded without their prompts, as in lm_eval's `hf` backend (lm.generate
    decodes with them).

    Args:
      prompts: token ids.
      stop: strings; empty ones are ignored.
      seeds: one for each prompt.
      beams: of a search, in the place of sampling.
    """
    texts = [""] * len(prompts)
    # The longest first: prompts of a batch are padded to the same length.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    generator = predict_fns.make_generator(params, sampling)
    batch_size = predict_fns.batch_size

    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        # The last batch is filled up, so that one program is compiled for all.
        rows = numbers + [numbers[-1]] * (batch_size - len(numbers))
        if beams is not None:
            predict_fns.check_stop()
            found = search(generator, [prompts[i] for i in rows], max_new_tokens, beams)
            for number, (best, *_) in zip(numbers, found):
                texts[number] = _text_before(stop, tokenizer.decode(best.ids))
            continue
        keys_B = row_keys([seeds[i] for i in rows])
        stream = generator.stream([prompts[i] for i in rows], max_new_tokens, keys_B)
        row_texts = _read_stream(stream, len(numbers), tokenizer, stop, predict_fns.check_stop)
        for number, text in zip(numbers, row_texts):
            texts[number] = text
    return texts


def _read_stream(
    stream: Iterable[np.ndarray],
    num_rows: int,
    tokenizer: Tokenizer,
    stop: Sequence[str],
    check_stop: Callable[[], None],
) -> list[str]:
    """The texts of the first rows of a stream of tokens [B], read until all of them have ended."""
    ids: list[list[int]] = [[] for _ in range(num_rows)]
    texts = [""] * num_rows
    unfinished = set(range(num_rows))

    for tokens_B in stream:
        check_stop()
        for row in sorted(unfinished):
            token = int(tokens_B[row])
            if token < 0 or token in tokenizer.stop_ids:
                unfinished.discard(row)
                continue

            ids[row].append(token)
            # All of it again: a character may be made of several tokens.
            texts[row] = tokenizer.decode(ids[row])
            if any(string and string in texts[row] for string in stop):
                unfinished.discard(row)
        if not unfinished:
            break

    return [_text_before(stop, text) for text in texts]


def _text_before(stop: Sequence[str], text: str) -> str:
    """The part of a text before any stop string."""
    for string in stop:
        if string:
            text = text.split(string)[0]
    return text


class Samples:
    """Continues fixed prompts, and adds the texts to samples.md at each evaluation. The random seed
    is fixed too: only the model changes.

    A text ends with any of the tokenizer's `stop_ids`, which it is written without, or after
    `max_new_tokens`.

    Args:
      name: for messages.
      prompts: texts that a document may begin with.
      temperature: 0 takes the best token each time.
      top_k: draw from so many best tokens; 0: from all.
      beside: a name in config.models, whose texts of the same random numbers stand before the
        model's; "": none.

    Raises:
      ValueError: no prompts, or one that is too long; a number that is too small; no such model.
    """

    def __init__(
        self,
        predict_fns: PredictFns,
        *,
        name: str,
        encoder: Encoder,
        prompts: Sequence[str],
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        beside: str = "",
    ):
        # Checked here: the first evaluation may come after hours.
        key = f"config.evals.{name}"
        prompts_lib.check_least(f"{key}.max_new_tokens", max_new_tokens, 1)
        prompts_lib.check_least(f"{key}.temperature", temperature, 0)
        prompts_lib.check_least(f"{key}.top_k", top_k, 0)
        if not prompts:
            raise ValueError(f"{key}.prompts is empty; wanted one text or more")
        if beside and beside not in predict_fns.other_models:
            raise ValueError(
                f"{key}.beside = {beside!r}; config.models has {list(predict_fns.other_models)}"
            )

        self._predict_fns = predict_fns
        self._tokenizer = encoder.tokenizer
        self._prompts = prompts
        self._max_new_tokens = max_new_tokens
        self._sampling = Sampling(temperature=temperature, top_k=top_k)
        self._beside = beside
        self._texts_beside: list[str] | None = None  # that model doesn't change

        self._prompt_ids: list[list[int]] = []
        max_prompt = predict_fns.room_of_prompt(max_new_tokens)
        for prompt in prompts:
            before, _ = self._tokenizer.around
            if predict_fns.reads_sources:
                before, _ = seq2seq.ends(self._tokenizer)
            ids = [*before, *self._tokenizer.encode(prompt)]
            if len(ids) > max_prompt:
                raise ValueError(
                    f"{key}.prompts: {prompt!r:.40} has {len(ids)} tokens; wanted 1 to "
                    f"{max_prompt}: config.data.length = {predict_fns.length} less "
                    f"{key}.max_new_tokens = {max_new_tokens}"
                )
            self._prompt_ids.append(ids)

    asks = ("make_generator",)
    metrics = ()

    def run(self, params) -> Iterator[tuple[str, Artifact]]:
        self._predict_fns.check_stop()
        blocks = self._texts(self._predict_fns.make_generator(params, self._sampling))
        if self._beside:
            if self._texts_beside is None:
                other = self._predict_fns.make_other_generator(self._beside, self._sampling)
                self._texts_beside = self._texts(other)
            pairs = zip(self._texts_beside, blocks)
            blocks = [f"by {self._beside}:\n{x}\nby the model:\n{y}" for x, y in pairs]

        yield "samples", Artifact("samples.md", "\n".join(blocks) + "\n", append=True)

    def _texts(self, generator) -> list[str]:
        """Each prompt with what a model makes of it, as Markdown."""
        # The same keys at each evaluation, one a prompt.
        keys_B = jax.random.split(jax.random.key(0), len(self._prompt_ids))
        continuations = generator.generate(self._prompt_ids, self._max_new_tokens, keys_B)

        blocks = []
        for prompt, ids in zip(self._prompts, continuations):
            blocks.append(escape.fenced(f"{prompt}⟫{self._tokenizer.decode(ids)}"))
        return blocks


@dataclasses.dataclass(frozen=True)
class OutputFormat:
    """How answers end and how they are read: the key `output` of `TextGeneration`."""

    max_new_tokens: int
    stop: tuple[str, ...]
    extract: re.Pattern
    normalize: Callable[[str], str]
    tokenize: str
    no_answer: str
    beams: Beams | None  # None: the likeliest token each time

    def extract_answer(self, text: str) -> str | None:
        """The answer in a text; None where the regular expression doesn't match."""
        if not self.extract.pattern:
            return text
        match = self.extract.search(text)
        if match is None:
            return None
        return match.group(1 if self.extract.groups else 0)

    def normalized(self, answer: str) -> str:
        """An answer as exact_match and f1 compare it: "" if it says that there is none."""
        text = self.normalize(answer)
        is_none = self.no_answer and text == self.normalize(self.no_answer)
        return "" if is_none else text


class TextGeneration:
    """Greedy answers to prompts, or those of a beam search, scored against references.

    Yields each score, the best over an example's references, with its 95% bootstrap interval (_low,
    _high; sacreBLEU's own for bleu, chrf, chrf++ and ter); empty, the share of answers without
    text; with `extract` unmatched, the share without a match; examples; and cut, the number of
    prompts that lost their beginning, but for BOS. As a file, predictions/: each answer with its
    scores.

    With `no_answer` records may have no reference: there is no right answer but this text, or none
    at all (SQuAD 2.0, Rajpurkar et al. 2018, arXiv 1806.03822). Scores of examples are given for
    both sorts of records too, as SCORE_answerable and SCORE_unanswerable.

    Args:
      name: names the artifacts.
      source, max_documents: see `lm.evals.classification.PromptClassification`.
      prompt: template, shots, sampler (first_n | random), seed, separator; format, system: see
        `lm.evals.prompt_format`.
      target: template of the answer in examples, with the space before it; "": the references'.
      references: template of the right answers; one whose column is a list gives several.
      output: max_new_tokens; stop: texts that an answer ends before; extract: a regular expression
        whose first match is the answer (its first group, where it has one), of references too ("":
        all of the text is); normalize: see `text_metrics.NORMALIZE`, before exact_match and f1;
        tokenize: see `text_metrics.TOKENIZERS`; num_beams, length_penalty: see
        `lm.decoding.beams.Beams`; no_answer: text of the answer that there is none.
      scores: names of `text_metrics.SCORES`.

    Raises:
      ValueError: no such data, column, score or expression; a reference without a match; no room
        for an answer.
    """

    asks = ("make_generator",)

    def __init__(
        self,
        predict_fns: PredictFns,
        *,
        name: str,
        encoder: Encoder,
        source: Mapping,
        prompt: Mapping,
        target: str,
        references: str,
        output: Mapping,
        scores: Sequence[str],
        max_documents: int,
    ):
        # What can be wrong with the configuration alone is found before the data is read.
        key = f"config.evals.{name}"
        _check_scores(name, scores)
        prompts_lib.check_least(f"{key}.prompt.shots", prompt["shots"], 0)
        prompts_lib.check_least(f"{key}.max_documents", max_documents, 0)
        self._name = name
        self._predict_fns = predict_fns
        self._tokenizer = encoder.tokenizer
        self._scores = self.metrics = tuple(scores)
        self._output = _parse_output(name, output)

        template = prompts_lib.Template(prompt["template"], f"{key}.prompt.template")
        right_answers = prompts_lib.Template(references, f"{key}.references")
        template.check_has_column()
        right_answers.check_has_column()
        shot_answer = prompts_lib.Template(target or references, f"{key}.target")
        self._format = prompt_format.make(self._tokenizer, prompt, name, is_scored=False)

        split = source["split"]
        available = prompts_lib.load(source, split, name)
        self._example_names, records = prompts_lib.evaluated(available, split, max_documents)
        self._references = list(map(right_answers.each, records))
        # What `extract` leaves of them.
        self._reference_answers = [self._read_references(t, references) for t in self._references]
        self._warn_of_references()

        # The examples before the question are the same for all records.
        shots = prompts_lib.draw_shots(
            prompts_lib.load_shots(source, name) if prompt["shots"] else [],
            prompt,
            prompt["seed"],
            identity=template.identity,
            avoid=set(map(template.identity, records)),
            name=name,
        )
        examples = []
        for _, record in shots:
            has_answer = bool(right_answers.each(record))
            answer = shot_answer(record) if has_answer else self._no_answer_in(shot_answer)
            examples.append((template(record), answer))

        self._questions = list(map(template, records))
        prompts = list(map(self._encode_prompt, self._format.wrap(examples, self._questions)))
        self._prompt_ids = [ids for ids, _ in prompts]
        self._num_cut = [num_cut for _, num_cut in prompts]  # tokens that each prompt lost

        around = self._format.around(examples)
        asked = prompts_lib.describe(template, shots, source["shots_split"], around)
        self.about = {
            "fingerprint": records_lib.fingerprint(records),
            "examples": len(records),
            "citation": source["citation"],
            "format": prompt["format"],
            "prompts": [asked],
        }

    def _encode_prompt(self, text: str) -> tuple[list[int], int]:
        """(the ids of a prompt, how many were cut off its beginning)."""
        (ids,) = self._format.encode_batch([text])
        start, ids = self._format.split(ids)
        # + 1: a Generator wants room for the last token too, which a scored continuation doesn't
        # need.
        longest, length = self._output.max_new_tokens + 1, self._predict_fns.length
        if self._predict_fns.reads_sources:
            longest, length = 1, self._predict_fns.room_of_prompt(self._output.max_new_tokens)
        return prompts_lib.truncate_prompt(start, ids, longest, length, self._name)

    def _no_answer_in(self, template: prompts_lib.Template) -> str:
        """The template of an example's answer with the text that there is none in all columns."""
        return template.fill([self._output.no_answer] * len(template.fields))

    def _read_references(self, texts: Sequence[str], template: str) -> list[str]:
        """The answers in an example's references.

        Raises:
          ValueError: no reference, or one in which the regular expression finds nothing.
        """
        key = f"config.evals.{self._name}"
        if not texts:
            if self._output.no_answer:
                return [self._output.no_answer]
            raise ValueError(
                f"the eval {self._name!r}: {key}.references = {template!r} gives no text for a "
                f"record; leave such records out, or set {key}.output.no_answer"
            )
        answers = []
        for text in texts:
            answer = self._output.extract_answer(text)
            if answer is None:
                raise ValueError(
                    f"the eval {self._name!r}: {key}.output.extract = "
                    f"{self._output.extract.pattern!r} finds nothing in the reference {text!r:.80}"
                )
            answers.append(answer)
        return answers

    def run(self, params) -> Iterator[tuple[str, float | Artifact]]:
        texts = generate(
            self._predict_fns,
            params,
            self._tokenizer,
            self._prompt_ids,
            max_new_tokens=self._output.max_new_tokens,
            stop=self._output.stop,
            sampling=Sampling(temperature=0.0),
            seeds=range(len(self._prompt_ids)),
            beams=self._output.beams,
        )
        answers = [self._output.extract_answer(text) for text in texts]

        example_scores: list[dict[str, float]] = [{} for _ in texts]
        for name in self._scores:
            score = self._score(name, answers)
            yield name, score.value
            yield f"{name}_low", score.low
            yield f"{name}_high", score.high
            if score.signature:
                self.about[f"{name}_signature"] = score.signature
            # BLEU and the like are of a corpus, not of examples.
            if score.each is not None:
                yield from self._by_answerability(name, score.each)
                for scores, value in zip(example_scores, score.each):
                    scores[name] = value

        num_empty = sum(not text.strip() for text in texts)
        yield "empty", num_empty / len(texts)
        if self._output.extract.pattern:
            yield "unmatched", answers.count(None) / len(texts)
        yield "examples", len(texts)
        yield "cut", int(np.count_nonzero(self._num_cut))

        lines = []
        for i, text in enumerate(texts):
            line = {
                "name": self._example_names[i],
                "text": text,
                "answer": answers[i],
                "references": self._references[i],
                "scores": example_scores[i],
                "prompt": self._questions[i],
                "cut": self._num_cut[i],
            }
            lines.append(line)
        # The file is there to be read: no \u escapes.
        yield "predictions", predictions_artifact(self._name, lines, ensure_ascii=False)

    def shown_prompts(self, count: int) -> Iterator[ShownPrompt]:
        for i, ids in enumerate(self._prompt_ids[:count]):
            title = f"{self._example_names[i]}, {len(ids)} tokens, {self._num_cut[i]} cut off"
            right = " | ".join(self._references[i] or [self._output.no_answer])
            yield ShownPrompt(title, self._tokenizer.spell(ids), right)

    def _score(self, name: str, answers: Sequence[str | None]) -> Score:
        """One of `text_metrics.SCORES`; an answer that `extract` didn't find (None) counts as an
        empty one.
        """
        # The other scores have normalisations of their own.
        normalize = self._output.normalized if name in ("exact_match", "f1") else str.strip
        predictions = [normalize(answer or "") for answer in answers]
        references = [list(map(normalize, texts)) for texts in self._reference_answers]
        return SCORES[name](predictions, references, self._output.tokenize)

    def _by_answerability(self, name: str, each: Sequence[float]) -> Iterator[tuple[str, float]]:
        """The means of an example's score over the questions with an answer, and without one."""
        if not self._output.no_answer:
            return
        is_answerable = np.array(list(map(bool, self._references)))
        for group, members in (("answerable", is_answerable), ("unanswerable", ~is_answerable)):
            if members.any():
                yield f"{name}_{group}", float(np.mean(np.array(each)[members]))

    def _warn_of_references(self) -> None:
        """Warns where a score can't tell answers apart by their words."""
        for name in self._scores:
            reason = too_few_tokens(name, self._reference_answers, self._output.tokenize)
            if reason:
                logging.warning(
                    "config.evals.%s.scores: %s with output.tokenize = %r: %s. Texts of other "
                    "scripts want another one of %s",
                    self._name,
                    name,
                    self._output.tokenize,
                    reason,
                    list(TOKENIZERS),
                )


def _check_scores(name: str, scores: Sequence[str]) -> None:
    """Raises ValueError for no scores, an unknown one, or one whose package is missing."""
    unknown = [score for score in scores if score not in SCORES]
    if unknown or not scores:
        raise ValueError(
            f"config.evals.{name}.scores has {unknown or ['none']}; valid: {list(SCORES)}"
        )
    for score in scores:
        require_package(score)


def _parse_output(name: str, output: Mapping) -> OutputFormat:
    """The key config.evals.NAME.output.

    Raises:
      ValueError: no tokens, an unknown normalisation, or no regular expression.
    """
    key = f"config.evals.{name}.output"
    prompts_lib.check_least(f"{key}.max_new_tokens", output["max_new_tokens"], 1)
    check_tokenizer(output["tokenize"], f"{key}.tokenize")
    prompts_lib.check_least(f"{key}.num_beams", output["num_beams"], 1)
    beams = Beams(output["num_beams"], output["length_penalty"])
    if output["normalize"] not in NORMALIZE:
        raise ValueError(f"{key}.normalize = {output['normalize']!r}; valid: {list(NORMALIZE)}")
    try:
        extract = re.compile(output["extract"])
    except re.error as error:
        raise ValueError(
            f"{key}.extract = {output['extract']!r} is no regular expression: {error}"
        ) from None
    return OutputFormat(
        max_new_tokens=output["max_new_tokens"],
        stop=tuple(output["stop"]),
        extract=extract,
        normalize=NORMALIZE[output["normalize"]],
        tokenize=output["tokenize"],
        no_answer=output["no_answer"],
        beams=beams if beams.number > 1 else None,
    )
