"""Schedules, optimizers from optax, and the policy for bfloat16 parameters.

The transforms see f32 gradients and f32 parameters, so moments and updates are f32 whatever the
parameters' dtype. The learning rate is applied here, not inside optax, so that it follows the run's
step even where a step was skipped.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

# Schedules.


def make_schedule(
    name: str, *, peak: float, total_steps: int, warmup_steps: int, decay_steps: int, final: float
) -> Callable:
    """Makes step -> learning rate. All warm up linearly over `warmup_steps`, from peak /
    warmup_steps at the first update.

    cosine and linear fall from the peak to final * peak at `total_steps`; wsd (warm-up, stable,
    decay; Hu et al. 2024, arXiv 2404.06395) keeps the peak and falls linearly over the last
    `decay_steps`; constant stays at the peak.

    Raises:
      ValueError: phases longer than the run.
    """
    rest = total_steps - warmup_steps
    if rest < 1:
        raise ValueError(
            f"config.optimizer.warmup_steps = {warmup_steps} must be below the run's {total_steps} "
            "steps (config.train.length)"
        )
    if name == "wsd" and not 0 < decay_steps <= rest:
        raise ValueError(
            f"config.optimizer.decay_steps = {decay_steps}: wsd needs between 1 and {rest} (total "
            "- warm-up) steps"
        )

    if name == "constant":
        after_warmup = optax.constant_schedule(peak)
    elif name == "cosine":
        after_warmup = optax.cosine_decay_schedule(peak, rest, alpha=final)
    elif name == "linear":
        after_warmup = optax.linear_schedule(peak, final * peak, rest)
    else:
        assert name == "wsd", name
        stable = rest - decay_steps
        after_warmup = optax.linear_schedule(
            peak, final * peak, decay_steps, transition_begin=stable
        )

    def warmup(step):
        # The first update has step 0: (step + 1) / warmup_steps makes it count.
        return peak * jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))

    return optax.join_schedules([warmup, after_warmup], [warmup_steps])


# Optimizers, from the logical axes of the parameters.


def _is_axes(x) -> bool:
    """Whether a node of a tree is the logical axes of a parameter."""
    return isinstance(x, tuple) and all(isinstance(name, str) for name in x)


def decay_mask(axes) -> Any:
    """True for the parameters that weight decay applies to: matrices and tables, not norms and
    biases.
    """

    def has_two_dims(names):
        others = ("layers", "head_dim", "head_dim_bias", "gates")
        return len([n for n in names if n not in others]) > 1

    return jax.tree.map(has_two_dims, axes, is_leaf=_is_axes)


def _adamw(axes, c) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980); weight decay is added outside."""
    del axes
    return optax.scale_by_adam(c.b1, c.b2, c.eps)


def _lion(axes, c) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, arXiv 2302.06675)."""
    del axes
    return optax.scale_by_lion(c.b1, c.b2)


def _adafactor(axes, c) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235): relative step sizes, factored second
    moment, update clipping; each layer by itself.
    """
    transform = optax.chain(
        optax.scale_by_factored_rms(decay_rate=c.adafactor_decay),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    return _per_layer(transform, axes)


def _per_layer(tx: optax.GradientTransformation, axes) -> optax.GradientTransformation:
    """`tx` on every layer of a stack by itself, so that a block of it (Adafactor's factors and
    clipping) never spans layers.

    Stacks and other parameters get a state each, of their own trees; the stacks' has a leading
    layers dim.
    """
    stacked = set()
    for name, tree in axes.items():
        if all(names[0] == "layers" for names in jax.tree.leaves(tree, is_leaf=_is_axes)):
            stacked.add(name)

    def split(tree):
        layers = {name: value for name, value in tree.items() if name in stacked}
        return layers, {name: value for name, value in tree.items() if name not in stacked}

    def init(params):
        layers, rest = split(params)
        return {"stacks": jax.vmap(tx.init)(layers) if layers else (), "rest": tx.init(rest)}

    def update(updates, state, params=None):
        layers, rest = split(updates)
        layer_params, rest_params = split(params)
        stacks = ()
        if layers:
            layers, stacks = jax.vmap(tx.update)(layers, state["stacks"], layer_params)
        rest, rest_state = tx.update(rest, state["rest"], rest_params)
        return layers | rest, {"stacks": stacks, "rest": rest_state}

    return optax.GradientTransformation(init, update)


def _matrix_dims(axes: tuple[str, ...]) -> MuonDimensionNumbers | None:
    """How a weight multiplies: (input dims, output dims) by its logical axes, heads merged.

    None if it isn't a hidden matrix. Layers and experts are each a matrix of their own. A router's
    outputs are choices, and Adam's, as a head's are.
    """
    dims = [i for i, name in enumerate(axes) if name not in ("layers", "expert")]
    names = [axes[i] for i in dims]
    choices = {"vocab", "position", "router", "outputs"}
    if len(names) < 2 or "embed" not in names or choices & set(names):
        return None

    embed = tuple(i for i in dims if axes[i] == "embed")
    others = tuple(i for i in dims if axes[i] != "embed")
    if names[0] == "embed":
        return MuonDimensionNumbers(embed, others)
    return MuonDimensionNumbers(others, embed)


def _is_masked(x) -> bool:
    """Whether `optax.partition` left a parameter to another transform."""
    return isinstance(x, optax.MaskedNode)


def _muon(axes, c) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the hidden matrices, Adam for the rest, whose updates are
    scaled by `muon_adam_ratio`.
    """
    dims = jax.tree.map(_matrix_dims, axes, is_leaf=_is_axes)

    def label(names):
        return "adam" if _matrix_dims(names) is None else "muon"

    labels = jax.tree.map(label, axes, is_leaf=_is_axes)

    def is_dims(x):
        return x is None or isinstance(x, MuonDimensionNumbers) or _is_masked(x)

    def muon_dims(updates):
        # What `partition` masks is masked here too.
        def mask(dims, update):
            return optax.MaskedNode() if _is_masked(update) else dims

        return jax.tree.map(mask, dims, updates, is_leaf=is_dims)

    def match_adam_rms(updates, state, params=None):
        # Scales the orthogonal update to Adam's usual RMS, 0.2 (Liu et al. 2025, arXiv 2502.16982,
        # eq. 4).
        del params

        def scale(update, dims):
            if _is_masked(update):
                return update
            rows = math.prod(update.shape[i] for i in dims.reduction_axis)
            columns = math.prod(update.shape[i] for i in dims.output_axis)
            return update * (0.2 * max(rows, columns) ** 0.5)

        return jax.tree.map(scale, updates, muon_dims(updates), is_leaf=_is_masked), state

    def no_state(params):
        del params
        return optax.EmptyState()

    muon = optax.chain(
        scale_by_muon(beta=c.momentum, weight_dimension_numbers=muon_dims),
        optax.GradientTransformation(no_state, match_adam_rms),
    )
    adam = optax.chain(optax.scale_by_adam(c.b1, c.b2, c.eps), optax.scale(c.muon_adam_ratio))
    return optax.partition({"muon": muon, "adam": adam}, labels)


OPTIMIZERS = {"adamw": _adamw, "lion": _lion, "adafactor": _adafactor, "muon": _muon}


# How an update reaches bfloat16 parameters.


def stochastic_round(key: jax.Array, x: jax.Array) -> jax.Array:
    """Rounds f32 to bf16, up or down with the probability that makes the expectation x.

    Values must be finite. bf16 is the upper half of an f32: adding 16 random bits to the lower half
    carries into the upper half that often.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + (jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32))
    upper = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), upper, x.astype(jnp.bfloat16))


def path_key(key: jax.Array, path) -> jax.Array:
    """A key of its own for the parameter at `path`, the same on every mesh and whatever other
    parameters there are.
    """
    return jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))


def _f32(tree):
    return jax.tree.map(lambda p: p.astype(jnp.float32), tree)


def _copy(tree):
    """A tree in buffers of its own."""
    return jax.tree.map(lambda p: p + 0.0, tree)


def _count(tree) -> jax.Array:
    """How many elements of boolean arrays are True."""
    return sum(jnp.sum(x, dtype=jnp.float32) for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """optax's transform, the schedule, and how an f32 update reaches the stored parameters.

    Attributes:
      rounding: for bf16 parameters, "stochastic" rounding of the f32 sum, an f32 "master" copy in
        the optimizer state (the parameters are its rounding), or "nearest": plain rounding, which
        loses most small updates. f32 parameters ignore it.
      ema_decay: 0, or the decay of an f32 moving average of the weights, which evaluation then
        uses. At step n it is (1 + n) / (10 + n), where that is less.
    """

    transform: optax.GradientTransformation
    schedule: Callable
    rounding: str
    ema_decay: float

    def init(self, params) -> dict:
        """The state before the first update."""
        # The state must not share buffers with the parameters: both are donated.
        f32 = _f32(params)
        state = {"transform": self.transform.init(f32)}
        if self.rounding == "master":
            state["master"] = _copy(f32)
        if self.ema_decay:
            state["ema"] = _copy(f32)
        return state

    def update(self, grads, state: dict, params, step: jax.Array, key: jax.Array):
        """Makes one update.

        Args:
          grads: f32, the mean gradient.
          step: int32 scalar, the number of steps before this one, skipped ones included; the
            schedule's argument.
          key: for stochastic rounding.

        Returns:
          The new parameters, the new state, and {name: scalar}. `updates_lost` is the share of
          nonzero f32 updates that leave no trace: the stored weight is unchanged and, where more
          than bf16 is kept (master) or reached in expectation (stochastic), the f32 sum is
          unchanged too.
        """
        old = self.f32_weights(params, state)
        updates, transform, learning_rate = self.updates(grads, state["transform"], old, step)
        new = jax.tree.map(jnp.add, old, updates)
        new_state = {"transform": transform}

        def store(path, value, param):
            if param.dtype == jnp.bfloat16 and self.rounding == "stochastic":
                return stochastic_round(path_key(key, path), value)
            return value.astype(param.dtype)

        new_params = jax.tree_util.tree_map_with_path(store, new, params)
        if "master" in state:
            new_state["master"] = new
        if "ema" in state:
            # The start is no weight to remember: at 0.999 it would be 82% of the average of 200
            # steps. So the decay begins low (Adam's correction of the bias would do the same, but
            # then the stored average couldn't be used as it is).
            count = step.astype(jnp.float32)
            decay = jnp.minimum(self.ema_decay, (1 + count) / (10 + count))
            new_state["ema"] = jax.tree.map(
                lambda average, value: decay * average + (1 - decay) * value, state["ema"], new
            )

        # What is left of the f32 sum after the step.
        remembered = _f32(new_params) if self.rounding == "nearest" else new
        nonzero = jax.tree.map(lambda u: u != 0, updates)
        lost = _count(jax.tree.map(lambda n, r, o: n & (r == o), nonzero, remembered, old))
        metrics = {
            "learning_rate": learning_rate,
            "update_norm": optax.global_norm(updates),
            "updates_lost": lost / jnp.maximum(_count(nonzero), 1.0),
        }
        return new_params, new_state, metrics

    def updates(self, grads, transform_state, weights, step: jax.Array):
        """What a step adds to f32 `weights`: (updates, the transform's new state, the learning
        rate). The other arguments are those of `update`.
        """
        with jax.numpy_dtype_promotion("standard"):  # optax adds its integer counters to floats
            learning_rate = self.schedule(step)
            updates, transform_state = self.transform.update(grads, transform_state, weights)
        updates = jax.tree.map(lambda u: -learning_rate * u, updates)
        return updates, transform_state, learning_rate

    def f32_weights(self, params, state: dict):
        """The f32 weights that an update is added to."""
        return state["master"] if "master" in state else _f32(params)

    def eval_params(self, params, state: dict):
        """The parameters to evaluate: the moving average where there is one, in the parameters'
        dtypes.
        """
        if "ema" not in state:
            return params
        return jax.tree.map(lambda average, p: average.astype(p.dtype), state["ema"], params)


def make_optimizer(config, axes, total_steps: int) -> Optimizer:
    """The optimizer of `config` (the run's config.optimizer) for parameters with these logical
    axes.

    Raises:
      ValueError: see `make_schedule`.
    """
    c = config
    transforms = []
    if c.clip_norm:
        transforms.append(optax.clip_by_global_norm(c.clip_norm))
    transforms.append(OPTIMIZERS[c.name](axes, c))
    if c.weight_decay:
        transforms.append(optax.add_decayed_weights(c.weight_decay, decay_mask(axes)))

    schedule = make_schedule(
        c.schedule,
        peak=c.learning_rate,
        total_steps=total_steps,
        warmup_steps=c.warmup_steps,
        decay_steps=c.decay_steps,
        final=c.final_learning_rate,
    )
    return Optimizer(optax.chain(*transforms), schedule, c.rounding, c.ema_decay)
