"""A loader whose batches are texts of the present model: two steps from each draw."""

import numpy as np

from lm.data import batch as batch_contract
from lm.data import loader as loaders
from lm.decoding.sampling import Sampling, row_keys

STEPS_PER_DRAW = 2


class SamplingLoader:
    def __init__(self, experiment):
        self._data = experiment.config.data
        self._bos_id = experiment.tokenizer.bos_id
        self._make_generator = experiment.eval_fns().make_generator
        self._shardings = experiment.program.batch_shardings()
        self._num_batches, self._rows = 0, []

    def next(self, params):
        if self._num_batches % STEPS_PER_DRAW == 0:
            self._rows = self._draw(params)
        self._num_batches += 1
        local = {name: np.stack([row[name] for row in self._rows]) for name in self._rows[0]}
        batch = loaders.to_global(dict(enumerate(self._rows)), len(self._rows), self._shardings)
        return batch, batch_contract.digest(local)

    def _draw(self, params):
        size, length = self._data.batch_size, self._data.length
        keys_B = row_keys(range(self._num_batches * size, (self._num_batches + 1) * size))
        generator = self._make_generator(params, Sampling(temperature=1.0))
        rows = []
        for ids in generator.generate([[self._bos_id]] * size, length - 1, keys_B):
            row = batch_contract.empty_row(length)
            places = slice(0, len(ids))
            row["tokens"][places], row["targets"][places] = [self._bos_id, *ids[:-1]], ids
            row["weights"][places] = row["segments"][places] = 1
            row["positions"][places] = np.arange(len(ids))
            rows.append(row)
        return rows

    def boundary(self, step):
        return step % STEPS_PER_DRAW == 0

    def state(self):
        return {"0": {"batches": self._num_batches}}

    def restore(self, states):
        self._num_batches = states["0"]["batches"]

    def epochs_begun(self):
        return 0.0

    def close(self):
        pass
