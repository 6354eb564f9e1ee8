"""Evals that generate text."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence

import jax

from lm.data import records as records_lib
from lm.data.pack import Encoder
from lm.data.tokenizer import Tokenizer, prefix_ids
from lm.decoding.sampling import Sampling, row_keys
from lm.evals import prompts as prompts_lib
from lm.evals.predict import Artifact, PredictFns
from lm.evals.scores.text_metrics import NORMALIZE, SCORES, require


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
) -> list[str]:
    """The texts that continue prompts, up to the first stop string, a stop token or
    `max_new_tokens`. They are decoded without their prompts, as lm_eval's `hf` does (lm.generate
    decodes with them).
    """
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    generator, size = predict_fns.make_generator(params, sampling), predict_fns.batch_size
    for start in range(0, len(order), size):
        part = order[start : start + size]
        rows = part + [part[-1]] * (size - len(part))  # one size, one program
        ids: dict[int, list[int]] = {number: [] for number in part}
        going = set(range(len(part)))
        for tokens in generator.stream(
            [prompts[i] for i in rows], max_new_tokens, row_keys([seeds[i] for i in rows])
        ):
            predict_fns.check_stop()
            for row in sorted(going):
                number = part[row]
                if tokens[row] >= 0 and tokens[row] not in tokenizer.stop_ids:
                    ids[number].append(int(tokens[row]))
                    answers[number] = tokenizer.decode(ids[number])
                if (
                    tokens[row] < 0
                    or tokens[row] in tokenizer.stop_ids
                    or any(s and s in answers[number] for s in stop)
                ):
                    going.discard(row)
            if not going:
                break
    for one in filter(None, stop):
        answers = [text.split(one)[0] for text in answers]
    return answers


class Samples:
    """Continuations of fixed prompts, added to samples.md at each evaluation. The seed is fixed:
    what changes is the model.

    Args:
      prompts: texts that a document may begin with.
      temperature: 0 takes the best token each time.
      top_k: draw from so many best tokens; 0: from all.
    """

    def __init__(
        self,
        predict_fns: PredictFns,
        *,
        encoder: Encoder,
        prompts: Sequence[str],
        max_new_tokens: int,
        temperature: float,
        top_k: int,
    ):
        self._predict_fns, self._tokenizer, self._prompts = predict_fns, encoder.tokenizer, prompts
        self._sampling = Sampling(temperature=temperature, top_k=top_k)
        self._max_new_tokens = max_new_tokens
        self._ids = [
            [self._tokenizer.bos_id] + self._tokenizer.encode(prompt) for prompt in prompts
        ]
        predict_fns.check_prompts(self._ids, max_new_tokens)  # now, not after the first hour

    def run(self, params) -> Iterator[tuple[str, Artifact]]:
        self._predict_fns.check_stop()
        generator = self._predict_fns.make_generator(params, self._sampling)
        keys = jax.random.split(jax.random.key(0), len(self._ids))
        continuations = generator.generate(self._ids, self._max_new_tokens, keys)
        blocks = [
            f"```\n{prompt}⟫{self._tokenizer.decode(ids)}\n```\n"
            for prompt, ids in zip(self._prompts, continuations)
        ]
        yield "samples", Artifact("samples.md", "\n".join(blocks) + "\n", append=True)


class TextGeneration:
    """Greedy answers to prompts, scored against references. Yields each score, the best over an
    example's references, with its 95% bootstrap interval (_low, _high; sacreBLEU's own for bleu,
    chrf, chrf++ and ter); empty, the share of answers without text; with `extract` unmatched, the
    share without a match; examples; cut, prompts that lost their beginning, but for BOS. As a file,
    predictions/: each answer with its scores.

    Args:
      name: names the artifacts.
      source, max_documents: see `lm.evals.classification.PromptClassification`.
      prompt: template, shots, sampler (first_n | random), seed, separator.
      target: template of the answer in examples, with the space before it.
      references: template of the right answers; one whose column is a list gives several.
      output: max_new_tokens; stop: texts that an answer ends before; extract: a regular expression,
        of which what its first group (or it) matches first is the answer, of references too ("":
        all of the text); normalize: see `text_metrics.NORMALIZE`, before exact_match and f1.
      scores: of `text_metrics.SCORES`.

    Raises:
      ValueError: no such data, column, score or expression; a reference without a match; no room
        for an answer.
    """

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
        what = f"config.evals.{name}"
        if unknown := [score for score in scores if score not in SCORES] or (
            () if scores else ["none"]
        ):
            raise ValueError(f"{what}.scores has {unknown}; valid: {list(SCORES)}")
        for score in scores:
            require(score)
        if output["normalize"] not in NORMALIZE:
            raise ValueError(
                f"{what}.output.normalize = {output['normalize']!r}; valid: {list(NORMALIZE)}"
            )
        try:
            self._extract = re.compile(output["extract"])
        except re.error as error:
            raise ValueError(
                f"{what}.output.extract = {output['extract']!r} is no regular expression: {error}"
            ) from None
        self._name, self._predict_fns, self._tokenizer = name, predict_fns, encoder.tokenizer
        self._scores, self._normalize = tuple(scores), NORMALIZE[output["normalize"]]
        self._new, self._stop = output["max_new_tokens"], tuple(output["stop"])
        template, right, example = (
            prompts_lib.Template(text, f"{what}.{key}")
            for text, key in (
                (prompt["template"], "prompt.template"),
                (references, "references"),
                (target or references, "target"),
            )
        )
        prompts_lib.check_counts(name, shots=prompt["shots"], max_documents=max_documents)
        if self._new < 1:
            raise ValueError(f"{what}.output.max_new_tokens = {self._new}; wanted 1 or above")
        self._names, records = prompts_lib.evaluated(source, name, max_documents)
        self._references = [right.each(record) for record in records]
        if [] in self._references:
            raise ValueError(
                f"the eval {name!r}: {what}.references = {references!r} gives no text for a "
                "record; leave such records out"
            )
        if bad := [
            one for several in self._references for one in several if self._answer(one) is None
        ]:
            raise ValueError(
                f"the eval {name!r}: {what}.output.extract = {output['extract']!r} finds nothing "
                f"in the reference {bad[0]!r:.80}"
            )
        shots = []
        if prompt["shots"]:
            asked = {template(record) for record in records}
            shots = prompts_lib.select_shots(
                prompts_lib.load_shots(source, name),
                prompt["shots"],
                sampler=prompt["sampler"],
                seed=prompt["seed"],
                name=name,
                avoid=lambda record: template(record) in asked,
            )
        first = prompts_lib.shots_text(shots, template, example, prompt["separator"])
        texts = [self._tokenizer.encode(first + template(record)) for record in records]
        found = [
            prompts_lib.truncate_prompt(
                prefix_ids(self._tokenizer, ids), ids, self._new + 1, predict_fns.length, name
            )
            for ids in texts
        ]
        self._prompts, self._cut = [ids for ids, _ in found], sum(cut for _, cut in found)
        self.about = {
            "fingerprint": records_lib.fingerprint(records),
            "examples": len(records),
            "citation": source["citation"],
        }

    def _answer(self, text: str) -> str | None:
        if not self._extract.pattern:
            return text
        match = self._extract.search(text)
        return None if match is None else match.group(1 if self._extract.groups else 0)

    def run(self, params) -> Iterator[tuple[str, float | Artifact]]:
        texts = generate(
            self._predict_fns,
            params,
            self._tokenizer,
            self._prompts,
            max_new_tokens=self._new,
            stop=self._stop,
            sampling=Sampling(temperature=0.0),
            seeds=range(len(self._prompts)),
        )
        extracted = [self._answer(text) for text in texts]
        answers, references = (
            [text or "" for text in extracted],
            [[self._answer(one) for one in several] for several in self._references],
        )
        n, each = len(texts), {}
        for name in self._scores:
            change = self._normalize if name in ("exact_match", "f1") else str.strip
            score = SCORES[name](
                [change(text) for text in answers],
                [[change(one) for one in several] for several in references],
            )
            yield from (
                (name, score.value),
                (f"{name}_low", score.low),
                (f"{name}_high", score.high),
            )
            if score.each is not None:
                each[name] = score.each
        yield "empty", sum(not text.strip() for text in texts) / n
        if self._extract.pattern:
            yield "unmatched", sum(text is None for text in extracted) / n
        yield "examples", n
        yield "cut", self._cut
        lines = [
            json.dumps(
                {
                    "name": self._names[i],
                    "text": texts[i],
                    "answer": extracted[i],
                    "references": self._references[i],
                    "scores": {name: values[i] for name, values in each.items()},
                },
                ensure_ascii=False,
            )
            for i in range(n)
        ]
        yield (
            "predictions",
            Artifact(f"predictions/{self._name}-{{step}}.jsonl", "\n".join(lines) + "\n"),
        )
