"""Text from a checkpoint: python -m lm.generate --workdir=RUN --prompt="Once upon a time". Also
from a Hugging Face checkpoint (--from=DIR), for a file of prompts (--prompts=FILE), and in
conversation (--interactive).
"""

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import app, flags
from etils import epath
from ml_collections import ConfigDict

from lm import build, checkpoint, startup
from lm import config as config_lib
from lm.data import chat
from lm.data import tokenizer as tokenizers
from lm.decoding.generator import Generator
from lm.decoding.sampling import Sampling
from lm.decoding.stop_strings import stream
from lm.hf import directory as hf


def load(
    source: epath.Path, devices, sampling: Sampling, mesh: dict[str, int] | None = None
) -> tuple[Generator, tokenizers.Tokenizer]:
    """A run's newest checkpoint (its moving average, where it has one), or a Hugging Face
    checkpoint, ready to continue texts.

    Args:
      mesh: axis -> size; by default heads are split over as many devices as they can be, and the
        weights over the rest.

    Raises:
      ValueError: no such checkpoint, or devices that it can't be laid out on.
    """

    def weights(model: dict, tokenizer: tokenizers.Tokenizer) -> build.Weights:
        config = config_lib.default()
        config.model = ConfigDict(model)
        if devices[0].platform != {"splash": "tpu", "cudnn": "gpu"}.get(
            config.model.attention, devices[0].platform
        ):
            logging.info(
                "trained with %s attention, which isn't for %s: continuing with xla's",
                config.model.attention,
                devices[0].platform,
            )
            config.model.attention = "xla"
        config.mesh.update(
            mesh or dict(tensor=math.gcd(len(devices), config.model.num_kv_heads), fsdp=-1)
        )
        return build.weights(config, devices, tokenizer.vocab_size)

    if hf.is_checkpoint(source):
        found = hf.Source(source)
        tokenizer = tokenizers.load(source)
        made = weights(
            config_lib.default().model.to_dict() | found.fields | dict(param_dtype=found.dtype()),
            tokenizer,
        )
        params = found.load(made.params, hf.progress_line(str(source)))
    else:
        kept: dict = {}

        def wanted(meta):
            kept["tokenizer"] = checkpoint.unpack_tokenizer(meta["tokenizer"]["files"])
            kept["made"] = weights(meta["config"]["model"], kept["tokenizer"])
            return kept["made"].params

        params, step = checkpoint.restore_weights(source, wanted, averaged=True)
        logging.info("step %d of %s", step, source)
        tokenizer, made = kept["tokenizer"], kept["made"]
    return Generator(
        made.model_config,
        made.graphdef,
        params,
        made.mesh,
        sampling,
        stop_ids=tokenizer.stop_ids,
        vocab_size=tokenizer.vocab_size,
    ), tokenizer


def read_prompts(path: Path) -> list[str]:
    """A prompt a line; of a .jsonl file, each object's "prompt". Raises ValueError for anything
    else.
    """
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return lines
    try:
        prompts = [json.loads(line)["prompt"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path}: {type(error).__name__}: {error}; wanted a JSON object with "prompt" a line'
        ) from None
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{path}: a prompt is not a string")
    return prompts


def converse(generator, tokenizer, options, lines: Iterator[str], out) -> None:
    """Answers each line until there are no more, in the checkpoint's chat template; without one,
    the text so far is continued.
    """
    template, tokens = chat.template(tokenizer), chat.special_tokens(tokenizer)
    messages: list[dict[str, str]] = []
    plain = ""
    for line in lines:
        if template:
            messages.append(dict(role="user", content=line))
            # the template has its own BOS
            ids = tokenizer.encode(chat.render(template, messages, tokens=tokens)) or [
                tokenizer.bos_id
            ]
        else:
            plain += line
            ids = tokenizer.prompt(plain)
        answer = ""
        for (new,) in stream(generator, tokenizer, [ids], **options):
            answer += new
            print(new, end="", file=out, flush=True)
        print(file=out, flush=True)
        messages.append(dict(role="assistant", content=answer))
        plain += answer


def run(prompts: Sequence[str], generator, tokenizer, batch_size: int, options: dict, out) -> None:
    """Continues all prompts: a single one is streamed, several are a JSON object a line."""
    ids = [tokenizer.prompt(prompt) for prompt in prompts]
    generator.check(ids, options["max_new_tokens"])  # all, before the first is continued
    for start in range(0, len(ids), batch_size):
        rows = ids[start : start + batch_size]
        texts = [""] * len(rows)
        for new in stream(
            generator, tokenizer, rows, **options | dict(seeds=[options["seeds"][0]] * len(rows))
        ):
            texts = [text + more for text, more in zip(texts, new)]
            if len(prompts) == 1:
                print(new[0], end="", file=out, flush=True)
        if len(prompts) > 1:
            for prompt, text in zip(prompts[start:], texts):
                print(
                    json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False),
                    file=out,
                    flush=True,
                )
    if len(prompts) == 1:
        print(file=out)


def parse_mesh(text: str) -> dict[str, int] | None:
    try:
        return (
            {axis: int(size) for axis, size in (part.split("=") for part in text.split(","))}
            if text
            else None
        )
    except ValueError:
        raise ValueError(
            f"--mesh={text}; wanted AXIS=SIZE with commas between them, such as tensor=4,data=2"
        ) from None


def main(argv: list[str]) -> int:
    logging.basicConfig(
        level=logging.INFO, format="%(levelname).1s %(message)s", stream=sys.stderr, force=True
    )
    logging.getLogger("absl").setLevel(logging.WARNING)
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments {argv[1:]}")
        if (
            bool(_WORKDIR.value) == bool(_FROM.value)
            or bool(_PROMPT.value) + bool(_PROMPTS.value) + _INTERACTIVE.value != 1
        ):
            raise ValueError(
                "wanted --workdir=RUN or --from=DIR, and one of --prompt=TEXT, --prompts=FILE, "
                "--interactive"
            )
        source = epath.Path(os.path.expanduser(_WORKDIR.value or _FROM.value))
        if _FROM.value and not hf.is_checkpoint(source):
            raise ValueError(
                f"--from={_FROM.value} is not the directory of a Hugging Face checkpoint: no "
                "config.json with a model_type in it"
            )
        sampling = Sampling(
            _PENALTY.value, _TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _MIN_P.value
        )
        prompts = _PROMPT.value or (
            read_prompts(Path(os.path.expanduser(_PROMPTS.value))) if _PROMPTS.value else []
        )
        generator, tokenizer = load(
            source, startup.start(_PLATFORM.value), sampling, parse_mesh(_MESH.value)
        )
        options = dict(max_new_tokens=_NEW.value, seeds=[_SEED.value], stop=_STOP.value)
        if _INTERACTIVE.value:
            converse(
                generator, tokenizer, options, (line.rstrip("\n") for line in sys.stdin), sys.stdout
            )
        else:
            run(prompts, generator, tokenizer, _BATCH.value, options, sys.stdout)
    except (ValueError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    return 0


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
    _PLATFORM = flags.DEFINE_string(
        "platform", "", "tpu | gpu | cpu; by default the first that is there."
    )
    app.run(main)
