"""Text from a checkpoint: python -m lm.generate --workdir=RUN --prompt="Once upon a time".

Also from a Hugging Face checkpoint (--from=DIR), for a file of prompts (--prompts=FILE), and in
conversation (--interactive).
"""

import dataclasses
import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
from absl import app, flags
from etils import epath
from ml_collections import ConfigDict

from lm import build, checkpoint, command_line, escape, files, startup, weights
from lm import config as config_lib
from lm.data import chat, chat_ids
from lm.data import tokenizer as tokenizers
from lm.data.tokenizer import Tokenizer
from lm.decoding import stop_strings
from lm.decoding.beams import Beams, search
from lm.decoding.generator import Generator
from lm.decoding.sampling import Sampling
from lm.hf import directory as hf
from lm.nn.attention import KERNEL_PLATFORMS


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """How long the texts get, and what is drawn."""

    max_new_tokens: int
    seed: int = 0  # the same for every prompt, whose text is then the same in any batch
    stop: Sequence[str] = ()  # strings that a text ends before
    num_samples: int = 1  # of each prompt, with the seeds from `seed` on; or its best beams
    beams: Beams | None = None  # of a search, in the place of sampling


# --- loading ---


def load(
    source: epath.Path,
    devices,
    sampling: Sampling,
    mesh: Mapping[str, int] | None = None,
    model_type: str = "",
    ignored: Sequence[str] = (),
    base: str = "",
) -> tuple[Generator, Tokenizer]:
    """Loads a model that is ready to continue texts.

    Args:
      source: a run, whose newest checkpoint is taken (its moving average, where it has one), or the
        directory of a Hugging Face checkpoint.
      mesh: axis -> size; by default heads are split over as many devices as they can be, and the
        weights over the rest.
      model_type: of a run, see `lm.config.stored_model`.
      ignored: keys of a Hugging Face directory's config.json to read it without.
      base: of a run that trains a part of a model, or adapters: where the rest is.

    Raises:
      ValueError: no such checkpoint, devices that it can't be laid out on, or weights that are not
        finite.
    """
    if hf.is_checkpoint(source):
        model, params, tokenizer = load_hf_directory(source, devices, mesh, ignored)
    else:
        model, params, tokenizer = load_run(source, devices, mesh, model_type, base)
    _check_finite(params, source)
    return build.generator_of(model, params, sampling, tokenizer), tokenizer


@jax.jit
def _all_finite(params):
    return jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), params)


def _check_finite(params, source: epath.Path) -> None:
    """Raises ValueError for NaNs and infinities, of which any token could come."""
    finite = checkpoint.flatten(jax.device_get(_all_finite(params)))
    if broken := [path for path, is_finite in finite.items() if not is_finite]:
        raise ValueError(f"{source} has weights that are not finite numbers, in {broken[:5]}")


def load_run(
    workdir: epath.Path,
    devices,
    mesh: Mapping[str, int] | None,
    model_type: str = "",
    base: str = "",
) -> tuple[build.AbstractModel, Any, Tokenizer]:
    """(model, parameters, tokenizer) of a run's newest checkpoint; see `load`."""
    with checkpoint.open_run(workdir) as saved:
        checkpoint.check_meta(saved.meta, str(workdir))
        tokenizer = checkpoint.tokenizer_from_meta(saved.meta["tokenizer"])
        fields = config_lib.stored_model(saved.meta, str(workdir), model_type)
        config = _config_of(fields, devices, mesh)
        if "frozen" in saved.meta:
            model, params = weights.load_merged(
                saved, config, devices, tokenizer.vocab_size, base, workdir
            )
        else:
            model = build.abstract_model(config, devices, tokenizer.vocab_size)
            params = saved.restore_params(model.params, averaged=True)
    logging.info("step %d of %s", saved.step, workdir)
    return model, params, tokenizer


def load_hf_directory(
    directory: epath.Path,
    devices,
    mesh: Mapping[str, int] | None,
    ignored: Sequence[str] = (),
) -> tuple[build.AbstractModel, Any, Tokenizer]:
    """(model, parameters, tokenizer) of a Hugging Face checkpoint; see `load`."""
    hf_checkpoint = hf.Checkpoint(directory, ignored)
    tokenizer = tokenizers.load(directory)

    # How it is executed is config.model's default; what it computes is the checkpoint's.
    fields = hf_checkpoint.model(config_lib.default().model).to_dict()
    fields |= dict(param_dtype=hf_checkpoint.dtype())

    config = _config_of(fields, devices, mesh)
    model = build.abstract_model(config, devices, tokenizer.vocab_size)
    params = hf_checkpoint.load(model.params, hf.progress_line(str(directory)))
    return model, params, tokenizer


def _config_of(fields: Mapping[str, Any], devices, mesh: Mapping[str, int] | None) -> ConfigDict:
    """The configuration of a model with these config.model fields, on the devices."""
    config = config_lib.default()
    config.model = ConfigDict(fields)

    # A model trained on one platform can generate on another: only the kernel differs.
    platform = devices[0].platform
    attention = config.model.get("attention")
    if KERNEL_PLATFORMS.get(attention, platform) != platform:
        logging.info(
            "trained with %s attention, which isn't for %s: continuing with xla's",
            attention,
            platform,
        )
        config.model.attention = "xla"

    if mesh is None:
        num_heads = config.model.get("num_kv_heads", config.model.get("num_heads", 1))
        mesh = dict(tensor=math.gcd(len(devices), num_heads), fsdp=-1)
    config.mesh.update(mesh)
    return config


# What lm.generate draws from unless flags or the checkpoint say something else.
DEFAULT_SAMPLING = dict(repetition_penalty=1.0, temperature=0.8, top_k=0, top_p=1.0, min_p=0.0)
# What generation_config.json may ask for besides, and isn't done.
_NOT_FOLLOWED = (
    "no_repeat_ngram_size",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "penalty_alpha",
    "suppress_tokens",
)


def choose_sampling(source: epath.Path, given: Mapping[str, float | None]) -> Sampling:
    """What is given, else what the checkpoint's generation_config.json says, else the default.

    Args:
      source: see `load`.
      given: option -> value; None: not given.

    Raises:
      ValueError: a value that is none, or out of its range.
    """
    folder = source if hf.is_checkpoint(source) else source / "tokenizer"
    path = folder / "generation_config.json"
    config = files.read_json(path) if path.exists() else {}

    suggested = {}
    for name in DEFAULT_SAMPLING if config.get("do_sample") else ():
        value = config.get(name)
        if type(value) in (int, float):
            suggested[name] = value
        elif value is not None:
            raise ValueError(f"{path}: {name} = {value!r}; wanted a number")

    chosen = {name: value for name, value in given.items() if value is not None}
    if taken := {name: value for name, value in suggested.items() if name not in chosen}:
        logging.info("from generation_config.json: %s", taken)
    if ignored := [name for name in _NOT_FOLLOWED if config.get(name) not in (None, 0, 1, 1.0)]:
        logging.warning("generation_config.json asks for %s, which lm doesn't do", ignored)
    if config.get("num_beams") not in (None, 1):
        logging.info("generation_config.json asks for --num_beams=%s", config["num_beams"])
    return Sampling(**DEFAULT_SAMPLING | suggested | chosen)


# --- prompts ---


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: one a line, or the "prompt" of each object of a .jsonl file. Empty
    lines are left out.

    Raises:
      ValueError: the file is not UTF-8, or a line of a .jsonl file is anything else.
    """
    if path.suffix != ".jsonl":
        # Not splitlines: a prompt may have U+2028 or a form feed in it.
        lines = files.read_text(str(path)).split("\n")
        return [line.removesuffix("\r") for line in lines if line.strip()]

    prompts = []
    for number, values in files.read_jsonl(str(path)):
        prompt = values.get("prompt")
        if not isinstance(prompt, str):
            raise ValueError(
                f'{path}:{number}: wanted a JSON object with "prompt", a string; got {prompt!r}'
            )
        prompts.append(prompt)
    return prompts


# --- generating ---


def continue_prompts(
    prompts: Sequence[str],
    generator: Generator,
    tokenizer: Tokenizer,
    batch_size: int,
    options: GenerationOptions,
    out: TextIO,
) -> None:
    """Continues prompts. A single text is written as it comes; several as a JSON object a line.

    Each object has `prompt` and `text`, and where there are several samples of a prompt also
    `sample`, their number from 0.
    """
    prompt_ids = [tokenizer.prompt(prompt) for prompt in prompts]

    # A prompt that is too long is an error now, not after the batches before it.
    generator.check(prompt_ids, options.max_new_tokens)

    samples = []  # (number of its prompt, its number)
    for number in range(len(prompts)):
        for sample in range(options.num_samples):
            samples.append((number, sample))
    if len(samples) == 1:
        _write_continuation(prompt_ids[0], generator, tokenizer, options, out)
        return

    def write(number: int, sample: int, text: str) -> None:
        record = {"prompt": prompts[number]}
        if options.num_samples > 1:
            record["sample"] = sample
        record["text"] = text
        print(_shown(json.dumps(record, ensure_ascii=False), out), file=out, flush=True)

    if options.beams is not None:
        for start in range(0, len(prompts), batch_size):
            batch_ids = prompt_ids[start : start + batch_size]
            found = _search(batch_ids, generator, tokenizer, options)
            for number, texts in enumerate(found, start):
                for sample, text in enumerate(texts):
                    write(number, sample, text)

        return

    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        batch_ids = [prompt_ids[number] for number, _ in batch]
        seeds = [options.seed + sample for _, sample in batch]
        texts = [""] * len(batch)
        for pieces in _stream(batch_ids, seeds, generator, tokenizer, options):
            texts = [text + piece for text, piece in zip(texts, pieces)]
        for (number, sample), text in zip(batch, texts):
            write(number, sample, text)


def _search(
    prompt_ids: Sequence[Sequence[int]],
    generator: Generator,
    tokenizer: Tokenizer,
    options: GenerationOptions,
) -> list[list[str]]:
    """The texts of each prompt's best beams, before any stop string."""
    found = search(generator, prompt_ids, options.max_new_tokens, options.beams)
    texts = []
    for prompt, continuations in zip(prompt_ids, found):
        texts.append([])
        for continuation in continuations[: options.num_samples]:
            before = generator.before_text(prompt)
            stream = stop_strings.TextStream(tokenizer, before, options.stop)
            for token in continuation.ids:
                stream.push(token)
            stream.close()
            texts[-1].append(stream.text)
    return texts


def converse(
    generator: Generator,
    tokenizer: Tokenizer,
    options: GenerationOptions,
    lines: Iterable[str],
    out: TextIO,
    system: str = "",
) -> None:
    """Answers each line, in the checkpoint's chat template. Without a template the text so far is
    continued.

    What no longer fits into the model's context is forgotten, the oldest turns first.

    Args:
      system: a message that comes before all others and is kept; "": none.

    Raises:
      ValueError: a system message without a template.
    """
    template = chat.template(tokenizer)
    if system and not template:
        raise ValueError("--system needs a chat template, which this checkpoint has none of")
    # What people type is text, even where it spells out a special token.
    encoder = chat_ids.ChatEncoder(tokenizer, "answers") if template else None
    longest = generator.longest_prompt(options.max_new_tokens)

    first = [dict(role="system", content=system)] if system else []
    messages: list[dict[str, str]] = []
    text = ""

    def prompt(turns: Sequence[dict[str, str]]) -> list[int]:
        if not encoder:
            return tokenizer.prompt(text)
        # The template writes BOS itself, where the model wants one.
        return encoder.prompt([*first, *turns]) or [tokenizer.bos_id]

    for line in lines:
        messages.append(dict(role="user", content=line))
        text += line
        ids = prompt(messages)

        if template and len(ids) > longest:
            # What doesn't fit alone is refused, and nothing is forgotten for it.
            alone = prompt(messages[-1:])
            while len(alone) <= longest < len(ids):
                del messages[:2]  # a question, and its answer
                ids = prompt(messages)
                logging.warning("the conversation is too long; its oldest turn is forgotten")
        elif not template and len(ids) > longest > 1:
            ids = [ids[0], *ids[-(longest - 1) :]]  # BOS, and the end

        if len(ids) > longest:
            logging.warning("that is %d tokens; at most %d fit", len(ids), longest)
            messages.pop()
            continue
        answer = _write_continuation(ids, generator, tokenizer, options, out)
        messages.append(dict(role="assistant", content=answer))
        text += answer


def _write_continuation(
    ids: Sequence[int],
    generator: Generator,
    tokenizer: Tokenizer,
    options: GenerationOptions,
    out: TextIO,
) -> str:
    """Writes the continuation of one prompt, as it comes where it is sampled, and returns it."""
    if options.beams is not None:
        ((text,),) = _search([ids], generator, tokenizer, options)
        print(_shown(text, out), file=out, flush=True)
        return text

    text = ""
    for (piece,) in _stream([ids], [options.seed], generator, tokenizer, options):
        text += piece
        print(_shown(piece, out), end="", file=out, flush=True)
    print(file=out, flush=True)
    return text


def _shown(text: str, out: TextIO) -> str:
    """A model's text as it is, but for what a terminal would obey."""
    return escape.printable(text) if out.isatty() else text


def _stream(
    prompt_ids: Sequence[Sequence[int]],
    seeds: Sequence[int],
    generator: Generator,
    tokenizer: Tokenizer,
    options: GenerationOptions,
) -> Iterator[list[str]]:
    return stop_strings.stream_texts(
        generator,
        tokenizer,
        prompt_ids,
        max_new_tokens=options.max_new_tokens,
        seeds=seeds,
        stop=options.stop,
    )


# --- the command ---


def parse_mesh(text: str) -> dict[str, int] | None:
    """{axis: size} of "AXIS=SIZE,AXIS=SIZE"; None for an empty text.

    Raises:
      ValueError: anything else.
    """
    if not text:
        return None

    sizes = {}
    try:
        for part in text.split(","):
            axis, size = part.split("=")
            sizes[axis] = int(size)
    except ValueError:
        raise ValueError(
            f"--mesh={text}; wanted AXIS=SIZE with commas between them, such as tensor=4,data=2"
        ) from None
    return sizes


@command_line.command
def main(argv: list[str]) -> None:
    # Flags that make no sense end it before anything is loaded.
    _check_flags(argv)
    source = epath.Path(files.expand(_WORKDIR.value or _FROM.value))
    if _FROM.value and not hf.is_checkpoint(source):
        raise ValueError(
            f"--from={_FROM.value} is not the directory of a Hugging Face checkpoint: no "
            "config.json with a model_type in it"
        )

    given = dict(
        repetition_penalty=_PENALTY.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        min_p=_MIN_P.value,
    )
    sampling = choose_sampling(source, given)
    stop = [files.unescape(text) for text in _STOP.value]
    if stop != _STOP.value:
        logging.info("--stop: %r is taken for %r", _STOP.value, stop)
    beams = Beams(_BEAMS.value, _LENGTH_PENALTY.value) if _BEAMS.value > 1 else None
    options = GenerationOptions(
        _NEW.value, seed=_SEED.value, stop=stop, num_samples=_SAMPLES.value, beams=beams
    )
    prompts = _PROMPT.value
    if _PROMPTS.value:
        prompts = read_prompts(Path(files.expand(_PROMPTS.value)))

    devices = startup.start(_PLATFORM.value)
    mesh = parse_mesh(_MESH.value)
    options_of_source = (_MODEL_TYPE.value, _IGNORE.value, _BASE.value)
    generator, tokenizer = load(source, devices, sampling, mesh, *options_of_source)
    if _INTERACTIVE.value:
        lines = (line.rstrip("\n") for line in sys.stdin)
        converse(generator, tokenizer, options, lines, sys.stdout, _SYSTEM.value)
    else:
        continue_prompts(prompts, generator, tokenizer, _BATCH.value, options, sys.stdout)


def _check_flags(argv: list[str]) -> None:
    """Raises ValueError unless there is one source and one kind of prompts, or for bad numbers."""
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}")

    num_sources = bool(_WORKDIR.value) + bool(_FROM.value)
    num_inputs = bool(_PROMPT.value) + bool(_PROMPTS.value) + _INTERACTIVE.value
    if num_sources != 1 or num_inputs != 1:
        raise ValueError(
            "wanted --workdir=RUN or --from=DIR, and one of --prompt=TEXT, --prompts=FILE, "
            "--interactive"
        )
    for flag, least in ((_SEED, 0), (_BATCH, 1), (_NEW, 1), (_SAMPLES, 1)):
        if not least <= flag.value < 2**32:
            raise ValueError(f"--{flag.name}={flag.value}; wanted {least} or above, below 2**32")
    _check_beams()
    for flag in (_SYSTEM, _SAMPLES):
        if flag.value != flag.default and _INTERACTIVE.value != (flag is _SYSTEM):
            with_it = "with" if flag is _SYSTEM else "without"
            raise ValueError(f"--{flag.name} goes {with_it} --interactive")


def _check_beams() -> None:
    """Raises ValueError for flags of a search without one, or of sampling with one."""
    beams = Beams(_BEAMS.value, _LENGTH_PENALTY.value)
    if beams.number == 1 and _LENGTH_PENALTY.value != _LENGTH_PENALTY.default:
        raise ValueError("--length_penalty goes with --num_beams above 1")
    if beams.number == 1:
        return

    drawing = (_TEMPERATURE, _TOP_K, _TOP_P, _MIN_P, _PENALTY)

    if given := [f"--{flag.name}" for flag in drawing if flag.value is not None]:
        raise ValueError(f"{', '.join(given)}: with --num_beams nothing is drawn")
    if _SAMPLES.value > beams.number:
        raise ValueError(
            f"--num_samples={_SAMPLES.value} is above --num_beams={beams.number}, of which the "
            "best are written"
        )


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", "", "A run directory.")
    _FROM = flags.DEFINE_string("from", "", "The directory of a Hugging Face checkpoint.")
    _PROMPT = flags.DEFINE_multi_string(
        "prompt", [], "A text to continue; may be given several times."
    )
    _PROMPTS = flags.DEFINE_string(
        "prompts", "", 'A file with a prompt a line, or .jsonl with objects that have "prompt".'
    )
    _INTERACTIVE = flags.DEFINE_boolean(
        "interactive",
        False,
        "Answer what is typed, in the checkpoint's chat template if it has one.",
    )
    _SYSTEM = flags.DEFINE_string("system", "", "With --interactive: the system message.")
    _NEW = flags.DEFINE_integer("max_new_tokens", 128, "Tokens of a continuation, at most.")
    # Without a value: the checkpoint's generation_config.json, or DEFAULT_SAMPLING.
    _TEMPERATURE = flags.DEFINE_float(
        "temperature",
        None,
        "0 takes the best token each time; by default the checkpoint's, or 0.8.",
    )
    _TOP_K = flags.DEFINE_integer("top_k", None, "Draw from so many best tokens; 0: from all.")
    _TOP_P = flags.DEFINE_float(
        "top_p", None, "Draw from the fewest best tokens that together have this share."
    )
    _MIN_P = flags.DEFINE_float(
        "min_p", None, "Draw from the tokens with this share of the best one's probability."
    )
    _PENALTY = flags.DEFINE_float(
        "repetition_penalty", None, "Above 1: tokens seen become less likely."
    )
    _STOP = flags.DEFINE_multi_string(
        "stop", [], "End before this string; may be given several times."
    )
    _SEED = flags.DEFINE_integer(
        "seed", 0, "Of what is drawn; each prompt's text is the same in any batch."
    )
    _SAMPLES = flags.DEFINE_integer(
        "num_samples", 1, "Texts for each prompt, with the seeds from --seed on."
    )
    _BEAMS = flags.DEFINE_integer(
        "num_beams", 1, "Above 1: the best text of a beam search, with --num_samples the best ones."
    )
    _LENGTH_PENALTY = flags.DEFINE_float(
        "length_penalty",
        1.0,
        "With --num_beams: a text's log-probability is divided by its length to this power.",
    )
    _BATCH = flags.DEFINE_integer("batch_size", 8, "Texts made together.")
    _MESH = flags.DEFINE_string("mesh", "", "Sizes of the mesh's axes, such as tensor=4,data=2.")
    _MODEL_TYPE = command_line.model_type_flag()
    _IGNORE = command_line.ignore_flag()
    _BASE = command_line.base_flag()
    _PLATFORM = flags.DEFINE_string(
        "platform", "", "tpu | gpu | cpu; by default the first that is there."
    )
    app.run(main)
