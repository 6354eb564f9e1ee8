"""A loader whose batches are drawn from the present model, two steps from one draw."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lm.data import batch as batch_contract
from lm.data import loader as loaders

STEPS_PER_DRAW = 2


class SamplingLoader:
    def __init__(self, experiment):
        program, self._data = experiment.program, experiment.config.data
        self._shardings = program.batch_shardings()
        self._num_batches, self._rows = 0, None
        shape = (self._data.batch_size, self._data.length)

        # Each next token from the logits after the token before it alone: a text of bigrams.
        def draw(params, key):
            model = nnx.merge(program.graphdef, params)

            def step(token_B, key):
                ids_B1, zeros = token_B[:, None], jnp.zeros((shape[0], 1), jnp.int32)
                logits_BV = model.logits(model(ids_B1, zeros, zeros + 1).hidden[:, 0])
                drawn_B = jax.random.categorical(key, logits_BV).astype(jnp.int32)
                return drawn_B, drawn_B

            first_B = jnp.full(shape[0], experiment.tokenizer.bos_id, jnp.int32)
            _, drawn_TB = jax.lax.scan(step, first_B, jax.random.split(key, shape[1]))
            return jnp.concatenate([first_B[:, None], drawn_TB.T], axis=1)

        self._draw = jax.jit(draw)

    def next(self, params):
        if self._num_batches % STEPS_PER_DRAW == 0:
            key = jax.random.fold_in(jax.random.key(7), self._num_batches)
            self._rows = np.asarray(self._draw(params, key))
        self._num_batches += 1

        rows = {}
        for i, ids in enumerate(self._rows):
            whole = batch_contract.empty_row(self._data.length)
            whole |= dict(tokens=ids[:-1], targets=ids[1:], segments=whole["segments"] + 1)
            whole["positions"] = np.arange(self._data.length, dtype=np.int32)
            rows[i] = whole | dict(weights=whole["weights"] + 1)
        local = {name: np.stack([row[name] for row in rows.values()]) for name in rows[0]}
        return loaders.to_global(rows, len(rows), self._shardings), batch_contract.digest(local)

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
