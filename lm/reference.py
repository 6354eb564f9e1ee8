"""Log-probabilities of answers under a reference, computed beforehand: --mode=reference.

Preference training compares with a model that stays as it is. Its log-probabilities of all answers
can be computed once, so that it needn't be in memory: they are kept by what each example's tokens
are, so that neither the order of the data nor other examples matter.
"""

import logging

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lm import build, files, trained, weights
from lm.data import units
from lm.data.pack import numbered_rows
from lm.data.units import Unit
from lm.evals.predict import PredictFns

FILE = "reference.npz"


def write(config: ConfigDict, workdir: epath.Path, devices) -> str:
    """Writes WORKDIR/reference.npz, by the model of config.init_from (or of the run in WORKDIR): of
    all examples of the training split, and of the splits that config.evals asks for.

    Returns:
      What is to be printed.

    Raises:
      ValueError: what a run couldn't start from; examples that aren't pairs or judged answers.
    """
    config = build.apply_hf_config(config, training=False)
    config = config.copy_and_resolve_references().unlock()
    config.chat.reference_logprobs = ""  # it isn't there yet
    if config.objective.get("reference") == "stored":
        config.objective.reference = "model"

    source = weights.source_of(config, workdir)
    experiment = build.build(config, devices)
    splits = {config.data.split}
    splits |= {entry.split for entry in config.evals.values() if entry.get("split")}

    with jax.set_mesh(experiment.program.mesh):
        params, step = weights.load_weights(experiment, source, averaged=True)
        fingerprint = trained.fingerprint(params)

        by_key = {}
        for split in sorted(splits):
            documents = experiment.train_documents
            if split != config.data.split:
                read = build.documents(config, split)
                documents = build.encoded(config, read, experiment.tokenizer)
            if documents.kind not in ("pair", "judged"):
                raise ValueError(
                    f"split {split!r} has examples of the kind {documents.kind!r}; a reference is "
                    "compared with on pairs and judged answers"
                )
            logging.info("split %r: %d examples", split, len(documents))
            by_key |= logprobs_of(experiment, params, list(documents))

    if jax.process_index() == 0:
        content = units.pack_stored(by_key, fingerprint)
        files.write_whole(workdir / FILE, content)
    return (
        f"{workdir / FILE}: {len(by_key)} examples by step {step} of {source} ({fingerprint}); "
        f"--config.objective.reference=stored --config.chat.reference_logprobs={workdir / FILE}"
    )


def logprobs_of(
    experiment: build.Experiment, params, all_units: list[Unit]
) -> dict[str, np.ndarray]:
    """Returns {key of a unit: the log-probability of the target at each of its places, f32}."""
    c = experiment.config
    fns = PredictFns(experiment.eval_fns(), batch_size=c.data.batch_size, length=c.data.length)

    rows = numbered_rows(all_units, c.data.length)
    logprobs = fns.token_logprobs(params, rows)

    by_key = {}
    for row, of_row in zip(rows, logprobs):
        for number in set(row["number"][row["segments"] > 0].tolist()):
            places = (row["segments"] > 0) & (row["number"] == number)
            by_key[units.key_of(all_units[number])] = of_row[places]
    return by_key
