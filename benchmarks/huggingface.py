"""Decoding and import against transformers: the same Llama of 107M parameters, drawn at random, on
the same CPU in one run.

    pip install -c constraints.txt -e '.[parity]'
    python benchmarks/huggingface.py                  # prefill and decode tokens/s, batches of 1 and 8, f32 and bf16
    python benchmarks/huggingface.py --import_gb=1    # time and peak memory of lm.convert import, beside copying the files

Each side is a process of its own; they take turns, and a ratio (ours over theirs, tokens/s) is the
median over the turns. Greedy texts must begin alike, or there is no result.
"""  # noqa: E501

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from lm.decoding.generator import Generator
from lm.decoding.sampling import Sampling, row_keys

SIZES = dict(
    num_hidden_layers=12,
    hidden_size=768,
    num_attention_heads=12,
    num_key_value_heads=4,
    intermediate_size=2048,
    vocab_size=32000,
    max_position_embeddings=2048,
)
DECODE = (64, 64)  # tokens of a prompt, and new ones
PREFILL = 512


def make(directory, dtype, **sizes):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES | sizes, initializer_range=0.05, bos_token_id=1, eos_token_id=2
    )
    transformers.AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype)
    ).save_pretrained(directory, max_shard_size="500MB")


def prompts(rows, length):
    return np.random.default_rng(0).integers(3, 32000, (rows, length))


class Ours:
    def __init__(self, directory, dtype):
        import jax

        from lm import build
        from lm import config as config_lib
        from lm.hf import directory as hf

        source = hf.Source(directory)
        config = config_lib.default()
        config.model.update(
            source.fields
            | dict(param_dtype=dtype, compute_dtype=dtype, scan_unroll=source.fields["num_layers"])
        )
        made = build.weights(config, jax.devices()[:1], SIZES["vocab_size"])
        self.generator = Generator(
            made.model_config,
            made.graphdef,
            source.load(made.params),
            made.mesh,
            Sampling(temperature=0.0),
            stop_ids=(-1,),
            vocab_size=SIZES["vocab_size"],
        )

    def run(self, rows, length, new):
        """(ids of the first row, seconds to the first token, seconds after it)."""
        began, first, ids = time.perf_counter(), 0.0, []
        for tokens in self.generator.stream(
            prompts(rows, length).tolist(), new, row_keys([0] * rows)
        ):
            first = first or time.perf_counter() - began
            ids.append(int(tokens[0]))
        return ids, first, time.perf_counter() - began - first


class Theirs:
    def __init__(self, directory, dtype):
        import torch
        import transformers

        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype)
        ).eval()

    def run(self, rows, length, new):
        """Its own forward pass and cache, without generate()'s overhead: the best it can do
        uncompiled.
        """
        torch = self.torch
        ids, out = torch.tensor(prompts(rows, length)), []
        with torch.inference_mode():
            began = time.perf_counter()
            answer = self.model(ids, use_cache=True, logits_to_keep=1)
            token = answer.logits[:, -1].argmax(-1)
            out.append(int(token[0]))
            first = time.perf_counter() - began
            for _ in range(new - 1):
                answer = self.model(
                    token[:, None], past_key_values=answer.past_key_values, use_cache=True
                )
                token = answer.logits[:, -1].argmax(-1)
                out.append(int(token[0]))
        return out, first, time.perf_counter() - began - first


def worker(side, directory, dtype):
    """Answers each line, [rows, length, new], with the ids and seconds."""
    contender = {"ours": Ours, "theirs": Theirs}[side](directory, dtype)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        time.sleep(0.5)  # until the threads of who was before have stopped spinning
        print(json.dumps(contender.run(*json.loads(line))), file=answers, flush=True)


class Contender:
    def __init__(self, *job):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ, JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1"),
        )

    def ask(self, *job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(
                f"a contender ended with {self.process.wait()}; its message stands above"
            )
        return json.loads(answer)


def decoding(args):
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            make(folder, dtype)
            sides = {name: Contender(name, folder, dtype) for name in ("ours", "theirs")}
            for rows in (1, 8):
                for what, (length, new) in (("decode", DECODE), ("prefill", (PREFILL, 1))):
                    # compiles
                    first = {
                        name: side.ask(rows, length, new)[0][:4] for name, side in sides.items()
                    }
                    if dtype == "float32" and first["ours"] != first["theirs"]:
                        raise SystemExit(
                            f"{dtype} {what}: the texts begin {first}: not the same model"
                        )
                    speeds = {name: [] for name in sides}
                    for turn in range(args.turns):
                        for name, side in sides.items():
                            _, before, after = side.ask(rows, length, new)
                            speeds[name].append(
                                rows * (new - 1) / after
                                if what == "decode"
                                else rows * length / before
                            )
                        said = ", ".join(f"{n} {s[-1]:,.1f} tokens/s" for n, s in speeds.items())
                        print(
                            f"  turn {turn + 1}/{args.turns}: {said}", file=sys.stderr, flush=True
                        )
                    ratios = [a / b for a, b in zip(speeds["ours"], speeds["theirs"])]
                    print(
                        json.dumps(
                            dict(
                                what=what,
                                dtype=dtype,
                                rows=rows,
                                ours=round(statistics.median(speeds["ours"]), 1),
                                theirs=round(statistics.median(speeds["theirs"]), 1),
                                ratio=round(statistics.median(ratios), 2),
                                ratios=[round(min(ratios), 2), round(max(ratios), 2)],
                            )
                        ),
                        flush=True,
                    )
            for side in sides.values():
                side.process.stdin.close()
                side.process.wait()


def peak_of(command) -> tuple[float, float]:
    """(seconds, peak of the process's own memory in GiB: file pages that are mapped but not its own
    left out).
    """
    began, peak = time.perf_counter(), [0]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
    )

    def watch():
        while process.poll() is None:
            try:
                fields = dict(
                    line.split(":")
                    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
                )
                peak[0] = max(peak[0], int(fields["RssAnon"].split()[0]))
            except (OSError, KeyError, ValueError):
                pass
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    errors = process.communicate()[1]
    thread.join()
    if process.returncode:
        raise SystemExit(errors)
    return time.perf_counter() - began, peak[0] / 2**20


def importing(args):
    import tokenizers

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder, "source")
        layers = round(
            (args.import_gb * 1e9 / 2 - 2 * 32000 * 2048) / (2048 * 2048 * 2.5 + 3 * 2048 * 5632)
        )
        make(
            source,
            "bfloat16",
            num_hidden_layers=layers,
            hidden_size=2048,
            num_attention_heads=16,
            intermediate_size=5632,
        )
        tokenizer = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocab={"<s>": 1, "</s>": 2, "a": 0}, merges=[])
        )
        tokenizer.save(str(source / "tokenizer.json"))
        files = list(source.glob("*.safetensors"))
        size = sum(path.stat().st_size for path in files)
        empty = peak_of([sys.executable, "-c", "import jax, lm.convert; jax.devices()"])
        rows = []
        for turn in range(args.turns):
            began = time.perf_counter()
            shutil.copytree(source, Path(folder, f"copy{turn}"))
            os.sync()
            copied = time.perf_counter() - began
            seconds, peak = peak_of(
                [
                    sys.executable,
                    "-m",
                    "lm.convert",
                    "import",
                    f"--from={source}",
                    f"--workdir={folder}/run{turn}",
                ]
            )
            os.sync()
            rows.append((seconds, peak, copied))
            shutil.rmtree(Path(folder, f"copy{turn}"))
            shutil.rmtree(Path(folder, f"run{turn}"))
        seconds, peak, copied = (statistics.median(column) for column in zip(*rows))
        print(
            json.dumps(
                dict(
                    checkpoint_gib=round(size / 2**30, 3),
                    largest_tensor_gib=round(2 * 32000 * 2048 / 2**30, 3),
                    import_seconds=round(seconds, 2),
                    without_start_seconds=round(seconds - empty[0], 2),
                    copy_seconds=round(copied, 2),
                    peak_gib=round(peak, 3),
                    empty_process_gib=round(empty[1], 3),
                    beside_the_model_gib=round(peak - empty[1] - size / 2**30, 3),
                )
            )
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dtypes", nargs="*", default=["float32", "bfloat16"], choices=["float32", "bfloat16"]
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--import_gb",
        type=float,
        default=0.0,
        help="of the checkpoint to import; 0: measure decoding",
    )
    parser.add_argument("--folder", default=None, help="where the checkpoint is made")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*json.loads(args.worker))
    importing(args) if args.import_gb else decoding(args)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
