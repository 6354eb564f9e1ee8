"""A language model given as a function, so that its answers are known; and functions that read
predictions/.
"""

import functools
import math

import numpy as np

from lm.evals.predict import Answer
from tests.helpers import LABELS

BOS = 256  # of ByteTokenizer
VOCAB_SIZE = 512


class Model:
    """The PredictFns of a language model that is given as a function: from the ids that a token
    sees, a tuple, to the log-probabilities of what follows.
    """

    def __init__(self, distribution, length=64):
        self.length = self.prompt_length = length
        self.fills_blanks = self.reads_sources = False
        self.fills = ("ltr",)
        self.questions = []  # all that were asked
        self._distribution = distribution

    def room_of_prompt(self, max_new_tokens):
        return self.length - max_new_tokens

    def logprobs(self, params, questions):
        self.questions += questions
        return [self._answers(question) for question in questions]

    def _answers(self, question):
        # Words begin alike: each beginning is looked up once.
        distribution = functools.cache(self._distribution)
        prompt = prompt_ids(question)
        answers = []
        for ids in question.continuations:
            logprobs = []
            for depth, token in enumerate(ids):
                prefix = (*prompt, *ids[:depth])
                assert len(prefix) <= self.length
                logprobs.append(distribution(prefix)[token])
            logprobs = np.array(logprobs, np.float32)
            answers.append(Answer(logprobs, logprobs > -1))
        return answers


def prompt_ids(question):
    return np.asarray(question.prompt.ids).tolist()


def prompt_text(question):
    """The text that is asked about, after BOS."""
    bos, *ids = prompt_ids(question)
    assert bos == BOS
    return bytes(ids).decode()


def random_distribution(prefix):
    # The hash of integers is the same in each process.
    rng = np.random.default_rng(abs(hash(prefix)) % 2**32)
    logits = rng.normal(0, 2, VOCAB_SIZE)
    return logits - np.log(np.exp(logits).sum())


def uniform_distribution(prefix):
    return np.full(VOCAB_SIZE, -math.log(VOCAB_SIZE))


def chain_rule(ids, continuation):
    """The log-probability of a continuation's ids under `random_distribution`."""
    ids = list(ids)
    total = 0.0
    for token in continuation:
        total += random_distribution(tuple(ids))[token]
        ids.append(token)
    return total


def distributions(predictions, labels=LABELS):
    """[n, K], the label distributions of the lines of predictions/."""
    rows = []
    for line in predictions:
        rows.append([line["distribution"][label] for label in labels])
    return np.array(rows)


def gold_labels(predictions, labels=LABELS):
    """[n], the index of the right label in the lines of predictions/."""
    return np.array([labels.index(line["label"]) for line in predictions])
