"""Batches of texts that the policy writes, with what they earn: config.data.loader =
"lm.rl.rollouts.RolloutLoader", the objective lm.objectives.policy.

A rollout is the texts of some prompts, and serves config.rollout.steps * config.rollout.epochs
steps. It is a function of the parameters, of the number of prompts taken before, and of the seed.
Checkpoints fall between rollouts, so that a run that is resumed writes the same texts.

Letters: P prompts of a rollout, G texts of each, N = P * G texts, T places of a row.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from lm import build, sharding, step, stopping
from lm.data import batch as batch_contract
from lm.data import loader as loaders
from lm.data.prompts import EncodedPrompt
from lm.decoding import batched
from lm.decoding.sampling import Sampling
from lm.evals.predict import compiled
from lm.objectives import policy
from lm.rl import advantages, rewards

ROLLOUT, ORDER = 3, 4  # purposes of random numbers, beside those of lm.step
OBJECTIVE = "lm.objectives.policy"


class NoSignal(stopping.RunFailed):
    """No text has earned more than another one for so long that nothing is to be expected."""


class Rollout(NamedTuple):
    """Texts of a rollout, prompt by prompt, and what was found of them.

    Attributes:
      prompts: P of them.
      texts: N.
      scores: reward -> f64 [N], NaN where the reward says nothing of a text.
      rows: N, as in a batch.
      spans: of each row, the places whose targets are the text's tokens.
      is_learnt: bool [N].
      has_signal: whether some prompt's texts, of those, earned more or less than each other.
    """

    prompts: Sequence[EncodedPrompt]
    texts: Sequence[rewards.Text]
    draws: Sequence[batched.Draw]
    scores: Mapping[str, np.ndarray]
    rows: Sequence[dict[str, np.ndarray]]
    spans: Sequence[slice]
    is_learnt: np.ndarray
    has_signal: bool


class RolloutLoader:
    """See `lm.data.loader.Loader`, whose methods it has.

    Raises:
      ValueError: another objective, no rewards, numbers that don't go together.
    """

    def __init__(self, experiment: build.Experiment):
        c = experiment.config
        self._experiment, self._config = experiment, c
        self._options = _options(c)
        per_rollout = c.data.batch_size * c.rollout.steps
        _check_numbers(c, self._options, per_rollout)
        self._num_prompts = per_rollout // c.rollout.samples
        self._steps = c.rollout.steps * c.rollout.epochs

        self._rewards = rewards.make(experiment)
        self._weights = {name: entry.weight for name, entry in c.rewards.items()}
        self._make_generator = experiment.eval_fns().make_generator
        self._shardings = experiment.program.batch_shardings()
        self._arrays = experiment.program.objective.arrays
        self._score = _compiled_scores(experiment)
        self._reshard = make_reshard(experiment.program) or _as_they_are

        self._batches, self._prompts_taken, self._without_signal = 0, 0, 0
        self._rollout: Rollout | None = None
        self._report: tuple[dict, dict] = ({}, {})

    def next(self, params) -> tuple[dict[str, jax.Array], str]:
        """The next batch, and its hash. Where a rollout has been used up, the next one is written
        by the model of these parameters.

        Raises:
          NoSignal: see config.rollout.patience.
          ValueError: a reward that gives other than a number for each text.
        """
        number = self._batches % self._steps
        self._report = ({}, {})
        if number == 0:
            self._rollout = self._roll_out(params)
            self._report = (_terms(self._rollout, self._weights), self._files(self._rollout))
            self._check_signal(self._rollout)
        self._batches += 1

        epoch, part = divmod(number, self._config.rollout.steps)
        rows = self._in_order(self._rollout.rows, self._batches - 1 - number, epoch)
        size = self._config.data.batch_size
        rows = rows[part * size : (part + 1) * size]

        local = {}
        for name in self._arrays:
            local[name] = np.stack([row[name] for row in rows])
        batch_contract.check(local, self._arrays)
        batch = loaders.to_global(dict(enumerate(rows)), size, self._shardings)
        return batch, batch_contract.digest(local)

    def report(self) -> tuple[dict[str, tuple[float, float]], dict[str, str]]:
        """({metric: (sum, count)}, {file in the run directory: text}) of the last batch; of one
        that isn't a rollout's first there are none.
        """
        return self._report

    def _in_order(self, rows: Sequence, start: int, epoch: int) -> list:
        """The rows as they are learnt from, in each epoch in another order."""
        if self._steps == 1:
            return list(rows)
        rng = np.random.default_rng((self._config.seed, ORDER, start, epoch))
        return [rows[i] for i in rng.permutation(len(rows))]

    def _take_prompts(self) -> list[EncodedPrompt]:
        """The next prompts: each epoch has all of them, in an order of its own."""
        documents = self._experiment.train_documents
        taken = []
        while len(taken) < self._num_prompts:
            epoch, place = divmod(self._prompts_taken, len(documents))
            rng = np.random.default_rng((self._config.seed, ROLLOUT, epoch))
            order = rng.permutation(len(documents))
            chosen = order[place : place + self._num_prompts - len(taken)]
            taken += [documents[i] for i in chosen]
            self._prompts_taken += len(chosen)
        return taken

    def _roll_out(self, params) -> Rollout:
        c, o = self._config.rollout, self._options
        prompts = self._take_prompts()
        key = step.step_key(jax.random.key(self._config.seed), ROLLOUT, self._batches)

        drawn = batched.draw(
            self._make_generator(self._reshard(params), Sampling(temperature=o.temperature)),
            [prompt.ids for prompt in prompts],
            samples=c.samples,
            max_new_tokens=c.max_new_tokens,
            temperature=o.temperature,
            key=key,
            slots=c.slots,
        )
        of_texts = [prompt for prompt in prompts for _ in range(c.samples)]
        draws = [draw for group in drawn for draw in group]

        texts = []
        for prompt, draw in zip(of_texts, draws):
            ids = draw.ids[:-1] if draw.has_ended else draw.ids
            text = self._experiment.tokenizer.decode(ids)
            texts.append(rewards.Text(text, prompt.ids, tuple(draw.ids), draw.has_ended))
        records = [prompt.record for prompt in of_texts]
        scores = rewards.score(self._rewards, records, texts, params)
        rewards_N = _weighted(scores, self._weights)

        rows, spans = [], []
        for prompt, draw in zip(of_texts, draws):
            first = self._first_place(len(prompt.ids))
            start = first + len(prompt.ids) - 1
            spans.append(slice(start, start + len(draw.ids)))
            rows.append(self._row(prompt.ids, draw, first, spans[-1]))
        self._add_scores(params, rows)

        is_learnt = np.isfinite(rewards_N) & self._not_overlong(draws)
        is_learnt &= self._add_advantages(rows, spans, rewards_N, is_learnt)
        for row, learnt in zip(rows, is_learnt):
            row["weights"] *= learnt
        has_signal = self._has_signal(rewards_N, is_learnt)
        return Rollout(prompts, texts, draws, scores, rows, spans, is_learnt, has_signal)

    def _has_signal(self, rewards_N: np.ndarray, is_learnt: np.ndarray) -> bool:
        """Whether texts that are learnt from differ in what they earn, by prompt or at all."""
        of_prompts = [np.arange(len(rewards_N))]
        if self._config.rollout.advantage != "gae":
            of_prompts = of_prompts[0].reshape(-1, self._config.rollout.samples)
        for numbers in of_prompts:
            earned = rewards_N[numbers[is_learnt[numbers]]]
            if len(earned) and np.ptp(earned):
                return True
        return False

    def _first_place(self, num_prompt: int) -> int:
        """Where a prompt of so many tokens begins in its row: its last one stands where the
        objective looks for the text's first target.
        """
        places = self._options.places
        return self._config.data.length - places - num_prompt + 1 if places else 0

    def _row(
        self, prompt: Sequence[int], draw: batched.Draw, first: int, written: slice
    ) -> dict[str, np.ndarray]:
        """The row of a text, whose tokens have weight."""
        row = batch_contract.empty_row(self._config.data.length, self._arrays)
        ids = np.array([*prompt, *draw.ids], np.int32)
        places = slice(first, first + len(ids) - 1)
        row["tokens"][places], row["targets"][places] = ids[:-1], ids[1:]
        row["positions"][places] = np.arange(len(ids) - 1)
        row["segments"][places] = 1
        row["weights"][written] = 1
        row["sampled_logprobs"][written] = draw.logprobs
        return row

    def _add_scores(self, params, rows: Sequence[dict[str, np.ndarray]]) -> None:
        """Adds what the objective asks of rows before anything is learnt from them."""
        if self._score is None:
            return
        size = self._config.data.batch_size
        padding = batch_contract.empty_row(self._config.data.length, self._arrays)
        found = []
        for batch in loaders.evaluation_batches(rows, size, self._shardings, padding):
            found.append(self._score(params, batch, self._experiment.others))

        arrays = jax.tree.map(lambda *parts: np.concatenate(parts)[: len(rows)], *found)
        for name, values_NT in arrays.items():
            for row, values_T in zip(rows, values_NT):
                row[name] = np.where(row["weights"] > 0, values_T, 0).astype(np.float32)

    def _add_advantages(
        self,
        rows: Sequence[dict[str, np.ndarray]],
        spans: Sequence[slice],
        rewards_N: np.ndarray,
        is_learnt: np.ndarray,
    ) -> np.ndarray:
        """Adds advantages. Returns which texts say anything, bool [N]: those of a prompt that all
        have the same say nothing, and neither do those of one with a text that has none.

        Args:
          is_learnt: whether a text is to be learnt from as far as is known.
        """
        c = self._config.rollout
        is_scored = np.isfinite(rewards_N)

        kl_NT = np.zeros((len(rows), self._config.data.length))
        if c.kl:
            for kl_T, row, span in zip(kl_NT, rows, spans):
                kl_T[span] = _log_ratios(row, span)
        rewards_N = np.where(is_scored, rewards_N, 0.0)

        if c.advantage == "gae":
            self._add_generalized(rows, spans, rewards_N, c.kl * kl_NT, is_learnt)
            return is_scored

        rewards_PG = (rewards_N - c.kl * kl_NT.sum(axis=1)).reshape(-1, c.samples)
        says_something = ~advantages.is_dead(rewards_PG)
        says_something &= is_scored.reshape(-1, c.samples).all(axis=1)
        advantages_N = advantages.of_groups(rewards_PG, c.advantage).reshape(-1)
        for row, advantage in zip(rows, advantages_N):
            row["advantages"] = (row["weights"] * advantage).astype(np.float32)
        return np.repeat(says_something, c.samples)

    def _add_generalized(self, rows, spans, rewards_N, penalties_NT, is_learnt) -> None:
        """Adds GAE's advantages, whitened over what is learnt from, and returns. The reward comes
        with a text's last token.
        """
        c = self._config.rollout
        lengths_N = np.array([span.stop - span.start for span in spans])

        rewards_NT = np.zeros((len(rows), c.max_new_tokens))
        values_NT = np.zeros_like(rewards_NT)
        for number, (row, span) in enumerate(zip(rows, spans)):
            length = lengths_N[number]
            rewards_NT[number, :length] = -penalties_NT[number, span]
            rewards_NT[number, length - 1] += rewards_N[number]
            values_NT[number, :length] = row["old_values"][span]

        advantages_NT, returns_NT = advantages.generalized(
            rewards_NT, values_NT, lengths_N, gamma=c.gamma, lam=c.gae_lambda
        )

        is_real_NT = np.arange(c.max_new_tokens)[None] < lengths_N[:, None]
        advantages_NT = advantages.whitened(advantages_NT, is_real_NT & is_learnt[:, None])
        for row, span, length, advantages_T, returns_T in zip(
            rows, spans, lengths_N, advantages_NT, returns_NT
        ):
            row["advantages"][span] = advantages_T[:length]
            row["returns"][span] = returns_T[:length]

    def _not_overlong(self, draws: Sequence[batched.Draw]) -> np.ndarray:
        """Which texts are learnt from as far as their length says, bool [N]."""
        if self._config.rollout.overlong == "learn":
            return np.ones(len(draws), bool)
        return np.array([draw.has_ended for draw in draws])

    def _check_signal(self, rollout: Rollout) -> None:
        """Raises NoSignal, after so many rollouts without any."""
        self._without_signal = 0 if rollout.has_signal else self._without_signal + 1
        patience = self._config.rollout.patience
        if self._without_signal >= patience:
            mean = {name: round(float(np.nanmean(x)), 4) for name, x in rollout.scores.items()}
            raise NoSignal(
                f"step {self._batches}: in {patience} rollouts in a row no prompt had texts of "
                "different reward that could be learnt from (config.rollout.patience); the means "
                f"are {mean}, and {np.mean([d.has_ended for d in rollout.draws]):.0%} of the last "
                "texts have ended. Easier or harder prompts, more texts of each "
                "(config.rollout.samples), longer ones, or a reward that tells degrees apart would "
                "give something to learn"
            )

    def _files(self, rollout: Rollout) -> dict[str, str]:
        """rollouts/STEP.jsonl, a text a line, in the order of the prompts."""
        samples = self._config.rollout.samples
        lines = []
        for number, (text, draw) in enumerate(zip(rollout.texts, rollout.draws)):
            advantages_T = rollout.rows[number]["advantages"][rollout.spans[number]]
            scores = {}
            for name, values in rollout.scores.items():
                scores[name] = None if np.isnan(values[number]) else float(values[number])

            line = dict(
                prompt=rollout.prompts[number // samples].name,
                text=text.text,
                rewards=scores,
                advantage=float(advantages_T.mean()),
                is_learnt=bool(rollout.is_learnt[number]),
                has_ended=draw.has_ended,
                ids=draw.ids,
                logprobs=draw.logprobs,
            )
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        return {f"rollouts/{self._batches}.jsonl": "".join(lines)}

    def boundary(self, step: int) -> bool:
        """See `lm.data.loader.Loader`."""
        return step % self._steps == 0

    def state(self) -> dict[str, dict]:
        """See `lm.data.loader.Loader`."""
        return {
            "0": {
                "batches": self._batches,
                "prompts": self._prompts_taken,
                "without_signal": self._without_signal,
            }
        }

    def restore(self, states: dict[str, dict]) -> None:
        """See `lm.data.loader.Loader`."""
        names = ("batches", "prompts", "without_signal")
        try:
            counts = [states["0"][name] for name in names]
        except (KeyError, TypeError) as error:
            raise ValueError(f"the state of rollouts can't be restored ({error!r})") from None
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError(f"the state of rollouts can't be restored ({states['0']})")
        self._batches, self._prompts_taken, self._without_signal = counts

    def epochs_begun(self) -> float:
        """How often the prompts have been gone through."""
        return self._prompts_taken / len(self._experiment.train_documents)

    def close(self) -> None:
        """Ends what rewards have opened."""
        for reward in self._rewards.values():
            getattr(reward, "close", _do_nothing)()


def _do_nothing() -> None:
    pass


def _options(config) -> policy.Options:
    """The objective's options.

    Raises:
      ValueError: another objective.
    """
    arguments = config.objective.to_dict()
    if arguments.pop("type") != OBJECTIVE:
        raise ValueError(
            f"config.objective.type = {config.objective.type!r}: rollouts are for {OBJECTIVE}"
        )
    return policy.Options(**arguments)


def _check_numbers(config, options: policy.Options, per_rollout: int) -> None:
    """Raises ValueError for settings that don't go together."""
    c = config.rollout
    if per_rollout % c.samples:
        raise ValueError(
            f"config.rollout.samples = {c.samples} must divide config.data.batch_size * "
            f"config.rollout.steps = {per_rollout}"
        )
    if c.steps * c.epochs > 1 and options.old == "present":
        raise ValueError(
            f"config.rollout.steps = {c.steps}, epochs = {c.epochs}: behind the first step the "
            "policy isn't the one that wrote the texts; wanted config.objective.old = 'stored'"
        )
    is_critic = bool(options.value_weight)
    if (c.advantage == "gae") != is_critic:
        raise ValueError(
            f"config.rollout.advantage = {c.advantage!r} and config.objective.value_weight = "
            f"{options.value_weight}: 'gae' needs a critic, and the others have no use for one"
        )
    if c.samples < 2 and c.advantage != "gae":
        raise ValueError(
            f"config.rollout.samples = {c.samples}: {c.advantage!r} compares a prompt's texts with "
            "each other; wanted 2 or more"
        )
    if c.samples > c.slots:
        raise ValueError(
            f"config.rollout.slots = {c.slots}: a prompt's {c.samples} texts are decoded together"
        )
    if c.advantage == "dr_grpo" and options.divisor not in (1, c.max_new_tokens):
        raise ValueError(
            f"config.objective.divisor = {options.divisor}: a text has up to "
            f"config.rollout.max_new_tokens = {c.max_new_tokens}; wanted that, or 1"
        )
    if options.places not in (0, c.max_new_tokens):
        raise ValueError(
            f"config.objective.places = {options.places}: a text has up to "
            f"config.rollout.max_new_tokens = {c.max_new_tokens}; wanted that, or 0"
        )
    if options.reference == "model" and "reference" not in config.models:
        raise ValueError(
            "config.objective.reference = 'model' needs config.models.reference, with the "
            "init_from that it is to be"
        )
    if c.kl and options.reference == "none":
        raise ValueError(f"config.rollout.kl = {c.kl} needs config.objective.reference")
    if not any(entry.weight for entry in config.rewards.values()):
        raise ValueError(
            f"config.rewards has no entry with a weight, of {list(config.rewards)}: a policy needs "
            "something to be rewarded for"
        )


def _compiled_scores(experiment: build.Experiment) -> Callable | None:
    """(params, batch, parameters of other models) -> see `lm.objectives.policy.make_scores`."""
    scores = make_scores(experiment.program)
    return compiled(scores, experiment.program.mesh) if scores else None


def make_scores(program: build.Program) -> Callable | None:
    """The same, pure; None: nothing is asked of rows."""
    arguments = program.config.objective.to_dict()
    del arguments["type"]
    scores = policy.make_scores(**arguments)
    if scores is None:
        return None
    graphdefs = {name: other.graphdef for name, other in program.others.items()}
    return functools.partial(_scores_of, program.graphdef, graphdefs, scores)


def _scores_of(graphdef, graphdefs: Mapping[str, Any], scores: Callable, params, batch, others):
    models = step.merge_each(graphdefs, others)
    return scores(nnx.merge(graphdef, params), batch, **models)


def make_reshard(program: build.Program) -> Callable | None:
    """Parameters -> the same ones, as a rollout has them on the mesh; None: they are so already."""
    layout = layout_of(program)
    return jax.jit(_as_they_are, out_shardings=layout) if layout else None


def layout_of(program: build.Program):
    """The parameters' shardings in a rollout; None: they are those of training."""
    split = [axis for axis in sharding.FSDP_AXES if program.mesh.shape[axis] > 1]
    if not program.config.rollout.reshard or not split:
        return None
    return jax.tree.map(_gathered, program.abstract_params)


def _as_they_are(params):
    return params


def _gathered(leaf) -> NamedSharding:
    """A parameter's layout without FSDP's axes."""
    kept = []
    for axes in leaf.sharding.spec:
        axes = (axes,) if isinstance(axes, str) else axes or ()
        kept.append(tuple(axis for axis in axes if axis not in sharding.FSDP_AXES) or None)
    return NamedSharding(leaf.sharding.mesh, PartitionSpec(*kept))


def _weighted(scores: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """What each text earns together, [N]; NaN where a reward can't tell. What weighs nothing is
    only watched.
    """
    return sum(weight * scores[name] for name, weight in weights.items() if weight)


def _log_ratios(row: Mapping[str, np.ndarray], span: slice) -> np.ndarray:
    """Of a text's tokens, to the reference: by the trainer's log-probabilities where it has them,
    else by the sampler's.
    """
    logprobs_T = row.get("old_logprobs", row["sampled_logprobs"])
    return (logprobs_T - row["reference_logprobs"])[span]


def _terms(rollout: Rollout, weights: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """What is logged of a rollout."""
    terms, num_texts = {}, len(rollout.texts)
    for name, scores in rollout.scores.items():
        is_scored = np.isfinite(scores)
        terms[f"reward/{name}"] = (float(scores[is_scored].sum()), float(is_scored.sum()))

    total = _weighted(rollout.scores, weights)
    is_scored = np.isfinite(total)
    terms["reward"] = (float(total[is_scored].sum()), float(is_scored.sum()))

    lengths = [len(draw.ids) for draw in rollout.draws]
    num_tokens = float(sum(lengths))
    terms["text_tokens"] = (num_tokens, float(num_texts))
    terms["texts_ended"] = (float(sum(d.has_ended for d in rollout.draws)), float(num_texts))
    terms["texts_learnt"] = (float(rollout.is_learnt.sum()), float(num_texts))
    terms["texts_unscored"] = (float((~is_scored).sum()), float(num_texts))
    # By the texts that were drawn: unbiased at the temperature of the draw.
    surprise = -sum(sum(draw.logprobs) for draw in rollout.draws)
    terms["entropy"] = (surprise, num_tokens)

    if "returns" in rollout.rows[0] and np.isfinite(explained := _value_explained(rollout)):
        terms["value_explained"] = (explained, 1.0)
    if "reference_logprobs" in rollout.rows[0]:
        nats = 0.0
        for row, span in zip(rollout.rows, rollout.spans):
            nats += float(_log_ratios(row, span).sum())
        terms["kl_of_text"] = (nats, float(num_texts))
    return terms


def _value_explained(rollout: Rollout) -> float:
    """R^2 of the critic: 1 less its mean squared error over the variance of tokens' returns; NaN
    where they are all the same.
    """
    values, returns = [], []

    for row, span, learnt in zip(rollout.rows, rollout.spans, rollout.is_learnt):
        if learnt:
            values.append(row["old_values"][span])
            returns.append(row["returns"][span])
    if not returns:
        return float("nan")

    of_tokens = np.concatenate(returns)
    variance = float(of_tokens.var())
    error = float(np.square(of_tokens - np.concatenate(values)).mean())
    return 1 - error / variance if variance else float("nan")
