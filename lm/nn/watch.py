"""What a model says of its activations, to those who look inside (lm.looking).

It says it while it is traced, and only where somebody watches: otherwise nothing here computes
anything.

Letters: B batch, T length, D embed.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

# The model that is watched, and what it has said.
_WATCHED: contextvars.ContextVar[tuple | None] = contextvars.ContextVar("watched", default=None)

Sums = dict[str, tuple[jax.Array, jax.Array]]


@contextlib.contextmanager
def watch(model) -> Iterator[Sums]:
    """Collects what `model` says in `report`, and no other model: {name: (sum of squares, count)},
    summed over its calls.
    """
    said: Sums = {}
    token = _WATCHED.set((model, said))
    try:
        yield said
    finally:
        _WATCHED.reset(token)


def squares(valid_BT: jax.Array, activations: Mapping[str, jax.Array]) -> Sums:
    """(sum of squares, number of values) of each activation [B, T, D], padding left out, in f32;
    {} where nobody watches.

    Args:
      valid_BT: bool, False for padding.
    """
    if _WATCHED.get() is None:
        return {}
    sums = {}
    for name, x_BTD in activations.items():
        square_BTD = jnp.square(x_BTD.astype(jnp.float32))
        total = jnp.sum(jnp.where(valid_BT[:, :, None], square_BTD, 0.0))
        sums[name] = (total, jnp.sum(valid_BT, dtype=jnp.float32) * x_BTD.shape[-1])
    return sums


def report(model, sums: Sums) -> None:
    """Hands `squares` to the watcher of `model`, if it has one.

    Call it where the model's result is traced, outside of loops. A name with `*` in it stands for a
    stack of layers: its arrays are [L].
    """
    watched = _WATCHED.get()
    if watched is None or watched[0] is not model:
        return
    said = watched[1]
    for name, (total, count) in sums.items():
        old_total, old_count = said.get(name, (0.0, 0.0))
        said[name] = (old_total + total, old_count + count)
