"""Stage quality: a small model of this project says how good each text is. A verbalizer asks it for
a word, and a linear classifier reads its states.

    python -m lm.prepare.quality --model=RUN --good=good.jsonl --bad=bad.jsonl --out=quality.json

fits the classifier on two JSONL files, {"text": ...} a line: what is wanted, and what is not.
"""

import functools
import json
from collections.abc import Sequence

import numpy as np
from absl import app, flags
from etils import epath
from ml_collections import ConfigDict

from lm import command_line, files
from lm.prepare.engine import Stage, each_shard
from lm.prepare.shards import Document, Work, read

BATCH = 64


def stages(config: ConfigDict) -> list[Stage]:
    """The stage.

    Raises:
      ValueError: no model, or a classifier of another one.
    """
    c = config.quality
    if not c.model:
        raise ValueError("stage quality needs config.quality.model, a run or a checkpoint")
    settings = c.to_dict() | {"bad_input": config.bad_input}
    reads = [_identity(c.model)]
    if c.classifier:
        fitted = files.read_json(epath.Path(files.expand(c.classifier)))
        if fitted.get("model") != reads[0]:
            raise ValueError(
                f"config.quality.classifier = {c.classifier!r} was fitted on the states of another "
                f"model, {fitted.get('model')}; config.quality.model is {reads[0]}"
            )
        reads.append(fitted)

    return [Stage("quality", judge, each_shard, settings, ("jax",), reads=reads)]


def _identity(model: str) -> str:
    """What names the weights of a run's newest checkpoint, or of a Hugging Face directory."""
    folder = epath.Path(files.expand(model))
    manifests = sorted((folder / "checkpoints").glob("*/MANIFEST.json"), key=_step)
    weights = manifests[-1:] or sorted(folder.glob("*.safetensors*"))
    if not weights:
        raise ValueError(f"config.quality.model = {model!r} has no checkpoint")
    if manifests:
        return files.short_hash(weights[0].read_bytes())
    return files.short_hash(json.dumps([[f.name, f.stat().length] for f in weights]).encode())


def _step(manifest: epath.Path) -> int:
    name = manifest.parent.name
    return int(name) if name.isdigit() else -1


class Scorer:
    """Says how good texts are, from 0 to 1.

    Args:
      settings: those of `lm.prepare.config.Quality`.
    """

    def __init__(self, settings):
        # jax, for the processes that need it.
        import jax

        from lm import build, generate, step
        from lm import config as config_lib
        from lm.evals.predict import PredictFns
        from lm.hf import directory as hf

        self._settings = settings
        source = epath.Path(files.expand(settings["model"]))
        is_foreign = hf.is_checkpoint(source)
        load = generate.load_hf_directory if is_foreign else generate.load_run
        model, self._params, self._tokenizer = load(source, jax.devices()[:1], None)
        objective = build.make_objective(config_lib.default())
        branches = step.branches(model.model_config)
        fns = build.make_eval_fns(model.graphdef, objective, model.mesh, branches=branches)
        length = model.model_config.context_length
        self._fns = PredictFns(fns, batch_size=16, length=length, asked_by="stage quality")

        encode = self._tokenizer.encode
        self._prompt = encode(settings["prompt"])
        self._words = [encode(word) for word in (*settings["good"], *settings["bad"])]
        self._classifier = None
        if settings["classifier"]:
            self._classifier = files.read_json(epath.Path(files.expand(settings["classifier"])))
        longest = max(map(len, self._words))
        self._room = min(settings["max_tokens"], length - len(self._prompt) - longest - 1)

    def _beginning(self, text: str) -> list[int]:
        """BOS and the first tokens of a text."""
        before, _ = self._tokenizer.around
        # A token has a character at least, but for bytes.
        ids = self._tokenizer.encode(text[: 16 * self._room])
        return [*before, *ids[: self._room]]

    def states(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the state after each text's beginning, f32 [texts, D]."""
        from lm.evals.predict import Prompt

        prompts = [Prompt(self._beginning(text)) for text in texts]
        return self._fns.states(self._params, prompts)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Returns how good each text is, f64 [texts]."""
        if self._classifier:
            from lm.evals import linear

            states = self.states(texts) / self._classifier["scale"]
            vectors = np.asarray(self._classifier["vectors"])
            return linear.distributions(vectors, states)[:, 1]

        from lm.evals.predict import Prompt, Question

        questions = []
        for text in texts:
            prompt = Prompt([*self._beginning(text), *self._prompt])
            questions.append(Question(prompt, self._words))

        num_good = len(self._settings["good"])
        scores = []
        for answers in self._fns.logprobs(self._params, questions):
            logprobs = np.array([answer.logprobs.sum(dtype=np.float64) for answer in answers])
            odds = np.exp(logprobs - logprobs.max())
            scores.append(odds[:num_good].sum() / odds.sum())

        return np.asarray(scores)


@functools.lru_cache(maxsize=1)
def _scorer(settings: str) -> Scorer:
    return Scorer(json.loads(settings))


def judge(work: Work) -> None:
    """Drops the documents of a shard that aren't good enough."""
    scorer = _scorer(json.dumps(work.settings))
    batch: list[Document] = []
    with work.documents() as writer:
        for document in read(work.inputs["shard"]):
            batch.append(document)
            if len(batch) == BATCH:
                _write_good(work, writer, batch, scorer)
                batch = []
        if batch:
            _write_good(work, writer, batch, scorer)


def _write_good(work: Work, writer, batch: Sequence[Document], scorer: Scorer) -> None:
    scores = scorer([document.text for document in batch])
    for document, score in zip(batch, scores.tolist()):
        work.measure("quality_percent", round(100 * score))
        if score >= work.settings["threshold"]:
            writer.write(document)
        else:
            work.drop("quality", document, f"{score:.3f}: {document.text}")


# --- the classifier ---


def fit(model: str, good: Sequence[str], bad: Sequence[str], max_tokens: int) -> dict:
    """Returns a classifier of a model's states, JSON-able: logistic regression whose penalty is
    chosen by cross-validation, with its accuracy on a fifth of the texts that another fit of it
    didn't see.
    """
    from lm.evals import linear
    from lm.prepare import config as prepare_config

    settings = prepare_config.default().quality.to_dict()
    scorer = Scorer(settings | dict(model=model, max_tokens=max_tokens))
    states = scorer.states([*bad, *good]).astype(np.float64)
    gold = np.repeat([0, 1], [len(bad), len(good)])
    scale = float(np.sqrt(np.mean(states**2)))
    states /= scale

    start = np.zeros((2, states.shape[1] + 1))
    l2 = linear.choose_penalty(states, gold, start)
    held_out = np.random.default_rng(0).permutation(len(gold)) % linear.FOLDS == 0
    vectors = linear.fit(states[~held_out], gold[~held_out], start, l2)
    is_right = linear.distributions(vectors, states[held_out]).argmax(axis=1) == gold[held_out]
    vectors = linear.fit(states, gold, start, l2)
    return dict(
        model=_identity(model),
        scale=scale,
        vectors=vectors.tolist(),
        l2=l2,
        held_out_accuracy=float(is_right.mean()),
        examples=len(gold),
    )


def _texts(path: str) -> list[str]:
    """The texts of a JSONL file. Raises ValueError for a line without one."""
    texts = []
    for number, record in files.read_jsonl(files.expand(path)):
        if not isinstance(record.get("text"), str):
            raise ValueError(f"{path}:{number} has no key 'text' with a text")
        texts.append(record["text"])

    return texts


@command_line.command
def main(argv: list[str]) -> None:
    command_line.no_arguments(argv)
    good, bad = _texts(_GOOD.value), _texts(_BAD.value)
    fitted = fit(_MODEL.value, good, bad, _MAX_TOKENS.value)
    files.write_whole(epath.Path(files.expand(_OUT.value)), json.dumps(fitted))
    accuracy = fitted["held_out_accuracy"]
    print(f"{accuracy:.1%} right on a fifth that was held out; written to {_OUT.value}")


if __name__ == "__main__":
    _MODEL = flags.DEFINE_string("model", None, "A run, or a Hugging Face checkpoint.")
    _GOOD = flags.DEFINE_string("good", None, "JSONL with texts that are wanted.")
    _BAD = flags.DEFINE_string("bad", None, "JSONL with texts that are not.")
    _OUT = flags.DEFINE_string("out", None, "Where the classifier is written.")
    _MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Of a text's beginning.")
    flags.mark_flags_as_required(["model", "good", "bad", "out"])
    app.run(main)
