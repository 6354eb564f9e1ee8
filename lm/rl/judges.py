"""Rewards that ask a model: the score of a reward model, and the probability of a label under a
verbalizer. The model is one of config.models, and is not trained.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from lm import build, files, step
from lm.data import batch as batch_contract
from lm.data import loader as loaders
from lm.data import tokenizer as tokenizers
from lm.evals import entries
from lm.evals.classification import PromptClassification
from lm.evals.predict import PredictFns, compiled
from lm.hf import directory as hf
from lm.objectives import causal
from lm.rl.rewards import Scores, Text


class _Judge:
    """A model of config.models, asked about texts."""

    def __init__(self, experiment: build.Experiment, model: str, where: str):
        if model not in experiment.program.others:
            raise ValueError(
                f"{where} asks config.models.{model}, which isn't there; there are "
                f"{list(experiment.program.others)}"
            )
        _check_tokenizer(experiment, model, where)
        self._experiment, self._name = experiment, model
        self._model = experiment.program.others[model]

        config, length = self._model.model_config, experiment.config.data.length
        if build.sees_all(config) or build.reads_sources(config):
            raise ValueError(
                f"{where}: config.models.{model} is no causal model, which is asked here"
            )
        if config.context_length < length:
            raise ValueError(
                f"{where}: config.models.{model} has a context of {config.context_length}, and "
                f"rows have config.data.length = {length}"
            )

    @property
    def _params(self):
        # Loaded after the rewards are made.
        return self._experiment.others[self._name]


def _check_tokenizer(experiment: build.Experiment, model: str, where: str) -> None:
    """Raises ValueError for a model of other words than the policy's. Runs are checked when their
    weights are loaded.
    """
    path = experiment.config.models[model].init_from
    directory = epath.Path(files.expand(path))
    if not hf.is_checkpoint(directory):
        return
    own, others = experiment.tokenizer, tokenizers.load(directory)
    if own.fingerprint != others.fingerprint:
        raise ValueError(
            f"{where}: config.models.{model} = {path!r} has the tokenizer {others.fingerprint} "
            f"({others.vocab_size} ids), and the policy {own.fingerprint} ({own.vocab_size} ids): "
            "a text has other tokens there; wanted a judge with the policy's tokenizer"
        )


class RewardModel(_Judge):
    """The score of a prompt with its text by a reward model (lm.objectives.reward), at the text's
    last token.
    """

    def __init__(self, experiment: build.Experiment, *, model: str = "reward"):
        super().__init__(experiment, model, "lm.rl.judges.RewardModel")
        heads = getattr(self._model.model_config, "heads", "")
        if "scalar" not in heads:
            raise ValueError(
                f"config.models.{model} has the heads {heads!r}; a reward model has 'scalar'"
            )
        score = functools.partial(_last_scores, self._model.graphdef)
        self._score = compiled(score, self._model.mesh)

    def __call__(
        self, records: Sequence[Mapping[str, Any]], texts: Sequence[Text], params
    ) -> Scores:
        del records, params
        data = self._experiment.config.data
        rows = []
        for text in texts:
            row = batch_contract.empty_row(data.length)
            ids = [*text.prompt_ids, *text.ids]
            row["tokens"][: len(ids)] = ids
            row["positions"][: len(ids)] = np.arange(len(ids))
            row["segments"][: len(ids)] = 1
            rows.append(row)

        shardings = self._experiment.program.batch_shardings()
        shardings = {name: shardings[name] for name in batch_contract.ARRAYS}
        padding = batch_contract.empty_row(data.length)

        found = []
        for batch in loaders.evaluation_batches(rows, data.batch_size, shardings, padding):
            found.append(self._score(self._params, batch))
        return np.concatenate(found)[: len(texts)].tolist()


def _last_scores(graphdef, params, batch):
    """The scalar head's output at each row's last token, f32 [B]."""
    model = nnx.merge(graphdef, params)
    hidden_BTD = model(batch["tokens"], batch["positions"], batch["segments"]).hidden
    last_B = jnp.maximum(jnp.sum(batch["segments"], axis=1) - 1, 0)
    last_B1D = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)
    return model.head_outputs("scalar", last_B1D)[:, 0, 0]


class Verbalizer(_Judge):
    """The probability that a model's label distribution gives to the wanted label of a text, as a
    classification task asks for it.

    Args:
      model: of config.models.
      task: a name of lm/evals/tasks/, or a .toml file, of lm.evals.classification.
      label: the wanted one; "": that in the record's `key`, by its name or number.
      column: of the task's templates, that the text fills.
      with_prompt: whether the prompt, as text, stands before it.
      prior: what the distribution is divided by, of the task's `priors`; "": nothing.
    """

    def __init__(
        self,
        experiment: build.Experiment,
        *,
        model: str,
        task: str,
        label: str = "",
        key: str = "label",
        column: str = "text",
        with_prompt: bool = False,
        prior: str = "",
    ):
        where = f"lm.rl.judges.Verbalizer of the task {task!r}"
        super().__init__(experiment, model, where)
        self._label, self._key, self._column = label, key, column
        self._with_prompt, self._prior = with_prompt, prior

        # One of the task's own records is enough.
        arguments = entries.task(task, max_documents=1).to_dict()
        if arguments.pop("type") != "lm.evals.classification.PromptClassification":
            raise ValueError(f"{where}: wanted a task of labels, lm.evals.classification")
        del arguments["every"]
        batch_size = arguments.pop("batch_size")
        if prior and (prior == "batch" or prior not in arguments["priors"]):
            raise ValueError(
                f"{where}: prior = {prior!r}; wanted one of {arguments['priors']}, but for batch"
            )

        self._evaluator = PromptClassification(
            PredictFns(
                self._fns(),
                batch_size=batch_size,
                length=self._model.model_config.context_length,
                asked_by=where,
            ),
            name=f"judge_{model}",
            encoder=experiment.encoder,
            **arguments,
        )
        self._labels = self._evaluator.prompt_set.labels
        if label and label not in self._labels:
            raise ValueError(f"{where}: label = {label!r}; it has {self._labels}")

    def _fns(self):
        """What may be asked of the model."""
        config = self._experiment.config.copy_and_resolve_references().unlock()
        config.objective = dict(type=causal.__name__, z_loss=0.0, chunk=0)
        objective = build.make_objective(config)
        branches = step.branches(self._model.model_config)
        return build.make_eval_fns(
            self._model.graphdef, objective, self._model.mesh, branches=branches
        )

    def __call__(
        self, records: Sequence[Mapping[str, Any]], texts: Sequence[Text], params
    ) -> Scores:
        del params
        asked = []
        for record, text in zip(records, texts):
            shown = text.text
            if self._with_prompt:
                # At once: a decoder may leave out a space at the beginning.
                ids = text.ids[:-1] if text.has_ended else text.ids
                shown = self._experiment.tokenizer.decode([*text.prompt_ids, *ids])
            asked.append(dict(record) | {self._column: shown})

        P = self._evaluator.distributions(self._params, asked, self._prior)

        scores: list[float | None] = []
        for record, distribution in zip(records, P):
            number = self._number(self._label or record.get(self._key))
            scores.append(None if number is None else float(distribution[number]))
        return scores

    def _number(self, label) -> int | None:
        """The number of a label, which is its name or its number; None: it is neither."""
        if label in self._labels:
            return self._labels.index(label)
        is_number = isinstance(label, int) and not isinstance(label, bool)
        return label if is_number and 0 <= label < len(self._labels) else None
