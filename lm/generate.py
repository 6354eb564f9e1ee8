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

from absl import app, flags
from etils import epath
from ml_collections import ConfigDict

from lm import build, checkpoint, command_line, escape, files, startup
from lm import config as config_lib
from lm.data import chat
from lm.data import tokenizer as tokenizers
from lm.data.tokenizer import Tokenizer
from lm.decoding import stop_strings
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


# --- loading ---


def load(
    source: epath.Path,
    devices,
    sampling: Sampling,
    mesh: Mapping[str, int] | None = None,
    model_type: str = "",
    ignored: Sequence[str] = (),
) -> tuple[Generator, Tokenizer]:
    """Loads a model that is ready to continue texts.

    Args:
      source: a run, whose newest checkpoint is taken (its moving average, where it has one), or the
        directory of a Hugging Face checkpoint.
      mesh: axis -> size; by default heads are split over as many devices as they can be, and the
        weights over the rest.
      model_type: of a run, see `lm.config.stored_model`.
      ignored: keys of a Hugging Face directory's config.json to read it without.

    Raises:
      ValueError: no such checkpoint, or devices that it can't be laid out on.
    """
    if hf.is_checkpoint(source):
        model, params, tokenizer = load_hf_directory(source, devices, mesh, ignored)
    else:
        model, params, tokenizer = load_run(source, devices, mesh, model_type)
    generator = Generator(
        model.model_config,
        model.graphdef,
        params,
        model.mesh,
        sampling,
        stop_ids=tokenizer.stop_ids,
        vocab_size=tokenizer.vocab_size,
    )
    return generator, tokenizer


def load_run(
    workdir: epath.Path, devices, mesh: Mapping[str, int] | None, model_type: str = ""
) -> tuple[build.AbstractModel, Any, Tokenizer]:
    """(model, parameters, tokenizer) of a run's newest checkpoint; see `load`."""
    with checkpoint.open_run(workdir) as saved:
        checkpoint.check_meta(saved.meta, str(workdir))
        tokenizer = checkpoint.tokenizer_from_meta(saved.meta["tokenizer"])
        fields = config_lib.stored_model(saved.meta, str(workdir), model_type)
        model = _abstract_model(fields, tokenizer, devices, mesh)
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
    fields = config_lib.default().model.to_dict()
    fields |= hf_checkpoint.fields
    fields |= dict(param_dtype=hf_checkpoint.dtype())

    model = _abstract_model(fields, tokenizer, devices, mesh)
    params = hf_checkpoint.load(model.params, hf.progress_line(str(directory)))
    return model, params, tokenizer


def _abstract_model(
    fields: Mapping[str, Any], tokenizer: Tokenizer, devices, mesh: Mapping[str, int] | None
) -> build.AbstractModel:
    """The model of these config.model fields on the devices, without its parameters' values."""
    config = config_lib.default()
    config.model = ConfigDict(fields)

    # A model trained on one platform can generate on another: only the kernel differs.
    platform = devices[0].platform
    if KERNEL_PLATFORMS.get(config.model.attention, platform) != platform:
        logging.info(
            "trained with %s attention, which isn't for %s: continuing with xla's",
            config.model.attention,
            platform,
        )
        config.model.attention = "xla"

    if mesh is None:
        mesh = dict(tensor=math.gcd(len(devices), config.model.num_kv_heads), fsdp=-1)
    config.mesh.update(mesh)
    return build.abstract_model(config, devices, tokenizer.vocab_size)


# --- prompts ---


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: one a line, or the "prompt" of each object of a .jsonl file.

    Raises:
      ValueError: the file is not UTF-8, or a line of a .jsonl file is anything else.
    """
    if path.suffix != ".jsonl":
        return [line for line in files.read_text(str(path)).splitlines() if line.strip()]

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
    """Continues prompts. The text of a single one is written as it comes; those of several as a
    JSON object a line.
    """
    prompt_ids = [tokenizer.prompt(prompt) for prompt in prompts]

    # A prompt that is too long is an error now, not after the batches before it.
    generator.check(prompt_ids, options.max_new_tokens)

    if len(prompts) == 1:
        _write_continuation(prompt_ids[0], generator, tokenizer, options, out)
        return

    for start in range(0, len(prompts), batch_size):
        batch_ids = prompt_ids[start : start + batch_size]
        texts = [""] * len(batch_ids)
        for pieces in _stream(batch_ids, generator, tokenizer, options):
            texts = [text + piece for text, piece in zip(texts, pieces)]

        for prompt, text in zip(prompts[start:], texts):
            record = json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False)
            print(_shown(record, out), file=out, flush=True)


def converse(
    generator: Generator,
    tokenizer: Tokenizer,
    options: GenerationOptions,
    lines: Iterable[str],
    out: TextIO,
) -> None:
    """Answers each line, in the checkpoint's chat template. Without a template the text so far is
    continued.
    """
    template = chat.template(tokenizer)
    special_tokens = chat.special_tokens(tokenizer)

    messages: list[dict[str, str]] = []
    text = ""
    for line in lines:
        if template:
            messages.append(dict(role="user", content=line))
            # The template writes BOS itself, where the model wants one.
            rendered = chat.render(template, messages, tokens=special_tokens)
            ids = tokenizer.encode(rendered) or [tokenizer.bos_id]
        else:
            text += line
            ids = tokenizer.prompt(text)

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
    """Writes the continuation of one prompt as it comes, and returns it."""
    text = ""
    for (piece,) in _stream([ids], generator, tokenizer, options):
        text += piece
        print(_shown(piece, out), end="", file=out, flush=True)
    print(file=out, flush=True)
    return text


def _shown(text: str, out: TextIO) -> str:
    """A model's text as it is, but for what a terminal would obey."""
    return escape.printable(text) if out.isatty() else text


def _stream(
    prompt_ids: Sequence[Sequence[int]],
    generator: Generator,
    tokenizer: Tokenizer,
    options: GenerationOptions,
) -> Iterator[list[str]]:
    return stop_strings.stream_texts(
        generator,
        tokenizer,
        prompt_ids,
        max_new_tokens=options.max_new_tokens,
        seeds=[options.seed] * len(prompt_ids),
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
    source = epath.Path(_WORKDIR.value or _FROM.value).expanduser()
    if _FROM.value and not hf.is_checkpoint(source):
        raise ValueError(
            f"--from={_FROM.value} is not the directory of a Hugging Face checkpoint: no "
            "config.json with a model_type in it"
        )

    sampling = Sampling(
        repetition_penalty=_PENALTY.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        min_p=_MIN_P.value,
    )
    options = GenerationOptions(_NEW.value, seed=_SEED.value, stop=_STOP.value)
    prompts = _PROMPT.value
    if _PROMPTS.value:
        prompts = read_prompts(Path(_PROMPTS.value).expanduser())

    devices = startup.start(_PLATFORM.value)
    mesh = parse_mesh(_MESH.value)
    generator, tokenizer = load(source, devices, sampling, mesh, _MODEL_TYPE.value, _IGNORE.value)
    if _INTERACTIVE.value:
        lines = (line.rstrip("\n") for line in sys.stdin)
        converse(generator, tokenizer, options, lines, sys.stdout)
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
    for flag, least in ((_SEED, 0), (_BATCH, 1), (_NEW, 1)):
        if not least <= flag.value < 2**32:
            raise ValueError(f"--{flag.name}={flag.value}; wanted {least} or above, below 2**32")


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
    _NEW = flags.DEFINE_integer("max_new_tokens", 128, "Tokens of a continuation, at most.")
    _TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the best token each time.")
    _TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from so many best tokens; 0: from all.")
    _TOP_P = flags.DEFINE_float(
        "top_p", 1.0, "Draw from the fewest best tokens that together have this share."
    )
    _MIN_P = flags.DEFINE_float(
        "min_p", 0.0, "Draw from the tokens with this share of the best one's probability."
    )
    _PENALTY = flags.DEFINE_float(
        "repetition_penalty", 1.0, "Above 1: tokens seen become less likely."
    )
    _STOP = flags.DEFINE_multi_string(
        "stop", [], "End before this string; may be given several times."
    )
    _SEED = flags.DEFINE_integer(
        "seed", 0, "Of what is drawn; each prompt's text is the same in any batch."
    )
    _BATCH = flags.DEFINE_integer("batch_size", 8, "Prompts continued together.")
    _MESH = flags.DEFINE_string("mesh", "", "Sizes of the mesh's axes, such as tensor=4,data=2.")
    _MODEL_TYPE = command_line.model_type_flag()
    _IGNORE = command_line.ignore_flag()
    _PLATFORM = flags.DEFINE_string(
        "platform", "", "tpu | gpu | cpu; by default the first that is there."
    )
    app.run(main)
