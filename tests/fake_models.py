"""A language model given as a function, so that its answers are known; and functions that read
predictions/.
"""

import math

import numpy as np

from tests.helpers import LABELS

BOS = 256  # of ByteTokenizer
VOCAB_SIZE = 512


class Model:
    """The PredictFns of a language model that is given as a function: from the ids that a token
    sees, a tuple, to the log-probabilities of what follows.
    """

    def __init__(self, distribution, length=64):
        self.length = length
        self.trees = []  # all that were asked about
        self._distribution = distribution

    def tree_logprobs(self, params, trees):
        self.trees += trees
        return [self._answer(tree) for tree in trees]

    def _answer(self, tree):
        # What a token sees follows from `until` alone, as in the model's mask.
        prefixes = []
        for t in range(len(tree.tokens)):
            seen = [k for k in range(t + 1) if tree.until[k] > t]
            prefix = tuple(tree.tokens[seen].tolist())
            assert tree.positions[t] == len(prefix) - 1 < self.length
            prefixes.append(prefix)

        logprobs = []
        for parent, target in zip(tree.query_parents, tree.query_targets):
            logprobs.append(self._distribution(prefixes[parent])[target])
        logprobs = np.array(logprobs, np.float32)
        return logprobs, logprobs > -1


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
