"""Decoding and import against transformers: the same Llama of 107M parameters, drawn at random, on
the same CPU in one run.

    pip install -c constraints.txt -e '.[parity]'

Prefill and decode tokens/s, for batches of 1 and 8, in f32 and bf16:

    python benchmarks/huggingface.py

Time and peak memory of lm.convert import, beside copying the files:

    python benchmarks/huggingface.py --import_gb=1

Each side is a process of its own, and they take turns. A ratio (ours over theirs, of tokens/s) is
the median over the turns. In f32 the greedy texts must begin alike, or there is no result.
"""

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
from typing import NamedTuple

import numpy as np

SIZES = dict(
    num_hidden_layers=12,
    hidden_size=768,
    num_attention_heads=12,
    num_key_value_heads=4,
    intermediate_size=2048,
    vocab_size=32000,
    max_position_embeddings=2048,
)
# A model whose layers are wider, for the import: its number of layers follows from --import_gb.
IMPORT_SIZES = dict(hidden_size=2048, num_attention_heads=16, intermediate_size=5632)
SIDES = ("ours", "theirs")


class Workload(NamedTuple):
    name: str
    prompt_length: int
    new_tokens: int

    def speed(self, rows: int, prefill_seconds: float, decode_seconds: float) -> float:
        """Tokens/s. The first new token comes with the prefill, and doesn't count as decoded."""
        if self.name == "prefill":
            return rows * self.prompt_length / prefill_seconds
        return rows * (self.new_tokens - 1) / decode_seconds


WORKLOADS = (Workload("decode", 64, 64), Workload("prefill", 512, 1))


def make_checkpoint(directory, dtype, **sizes):
    """Writes a Llama drawn at random."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES | sizes, initializer_range=0.05, bos_token_id=1, eos_token_id=2
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size="500MB")


def random_prompts(rows, length):
    return np.random.default_rng(0).integers(3, SIZES["vocab_size"], (rows, length))


# --- the two sides, each in a process of its own that imports only its own libraries ---


class OurModel:
    def __init__(self, directory, dtype):
        import jax

        from lm import build
        from lm import config as config_lib
        from lm.decoding.generator import Generator
        from lm.decoding.sampling import Sampling
        from lm.hf import directory as hf

        source = hf.Checkpoint(directory)
        config = config_lib.default()
        config.model.update(source.fields)
        config.model.param_dtype = config.model.compute_dtype = dtype
        config.model.scan_unroll = source.fields["num_layers"]
        model = build.abstract_model(config, jax.devices()[:1], SIZES["vocab_size"])
        self.generator = Generator(
            model.model_config,
            model.graphdef,
            source.load(model.params),
            model.mesh,
            Sampling(temperature=0.0),
            stop_ids=(-1,),
            vocab_size=SIZES["vocab_size"],
        )

    def run(self, rows, prompt_length, new_tokens):
        """Returns (ids of the first row, seconds to the first token, seconds after it)."""
        from lm.decoding.sampling import row_keys

        ids = []
        prefill_seconds = 0.0
        began = time.perf_counter()
        prompts = random_prompts(rows, prompt_length).tolist()
        for tokens in self.generator.stream(prompts, new_tokens, row_keys([0] * rows)):
            prefill_seconds = prefill_seconds or time.perf_counter() - began
            ids.append(int(tokens[0]))
        return ids, prefill_seconds, time.perf_counter() - began - prefill_seconds


class TheirModel:
    def __init__(self, directory, dtype):
        import torch
        import transformers

        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype)
        ).eval()

    def run(self, rows, prompt_length, new_tokens):
        """As OurModel.run. The model's own forward pass and cache, without generate()'s overhead,
        are the best that it can do uncompiled.
        """
        prompts = self.torch.tensor(random_prompts(rows, prompt_length))
        with self.torch.inference_mode():
            began = time.perf_counter()
            output = self.model(prompts, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1].argmax(-1)
            ids = [int(token[0])]
            prefill_seconds = time.perf_counter() - began

            for _ in range(new_tokens - 1):
                output = self.model(
                    token[:, None], past_key_values=output.past_key_values, use_cache=True
                )
                token = output.logits[:, -1].argmax(-1)
                ids.append(int(token[0]))
        return ids, prefill_seconds, time.perf_counter() - began - prefill_seconds


def serve(side, directory, dtype):
    """Answers each line of stdin, [rows, prompt_length, new_tokens], with what `run` returns."""
    model = OurModel(directory, dtype) if side == "ours" else TheirModel(directory, dtype)

    # Answers have stdout for themselves: what libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        # The other side's threads spin for a while after its turn.
        time.sleep(0.5)
        print(json.dumps(model.run(*json.loads(line))), file=answers, flush=True)


class Server:
    """The process of one side."""

    def __init__(self, side, directory, dtype):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps([side, directory, dtype])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ, JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1"),
        )

    def run(self, rows, workload):
        job = [rows, workload.prompt_length, workload.new_tokens]
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

        answer = self.process.stdout.readline()
        if not answer:
            code = self.process.wait()
            raise SystemExit(f"a contender ended with {code}; its message stands above")
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# --- decoding ---


def measure_decoding(args):
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoint(folder, dtype)
            servers = {side: Server(side, folder, dtype) for side in SIDES}
            for rows in (1, 8):
                for workload in WORKLOADS:
                    warm_up(servers, dtype, rows, workload)
                    speeds = take_turns(servers, rows, workload, args.turns)
                    print_ratio(dtype, rows, workload, speeds)
            for server in servers.values():
                server.close()


def warm_up(servers, dtype, rows, workload):
    """Lets both sides compile. Ends the benchmark if in f32 their texts don't begin alike."""
    first_ids = {}
    for side, server in servers.items():
        ids, _, _ = server.run(rows, workload)
        first_ids[side] = ids[:4]
    if dtype == "float32" and first_ids["ours"] != first_ids["theirs"]:
        raise SystemExit(
            f"{dtype} {workload.name}: the texts begin {first_ids}: not the same model"
        )


def take_turns(servers, rows, workload, turns):
    """Returns {side: [tokens/s of each turn]}."""
    speeds = {side: [] for side in servers}
    for turn in range(turns):
        for side, server in servers.items():
            _, prefill_seconds, decode_seconds = server.run(rows, workload)
            speeds[side].append(workload.speed(rows, prefill_seconds, decode_seconds))

        latest = ", ".join(f"{side} {values[-1]:,.1f} tokens/s" for side, values in speeds.items())
        print(f"  turn {turn + 1}/{turns}: {latest}", file=sys.stderr, flush=True)
    return speeds


def print_ratio(dtype, rows, workload, speeds):
    ratios = [ours / theirs for ours, theirs in zip(speeds["ours"], speeds["theirs"])]
    result = dict(
        what=workload.name,
        dtype=dtype,
        rows=rows,
        ours=round(statistics.median(speeds["ours"]), 1),
        theirs=round(statistics.median(speeds["theirs"]), 1),
        ratio=round(statistics.median(ratios), 2),
        ratios=[round(min(ratios), 2), round(max(ratios), 2)],
    )
    print(json.dumps(result), flush=True)


# --- import ---


def run_and_watch(command) -> tuple[float, float]:
    """Runs a command.

    Returns:
      (seconds, peak of the process's own memory in GiB). Pages of files that are mapped are not its
      own.
    """
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
    )
    samples = [0]
    thread = threading.Thread(target=sample_memory, args=(process, samples))
    thread.start()

    errors = process.communicate()[1]
    thread.join()
    if process.returncode:
        raise SystemExit(errors)
    return time.perf_counter() - began, max(samples) / 2**20


def sample_memory(process, samples):
    """Appends a process's own memory in KiB to `samples`, every 10 ms until the process ends."""
    while process.poll() is None:
        try:
            samples.append(own_memory(process.pid))
        except (OSError, KeyError, ValueError):
            pass  # it is ending
        time.sleep(0.01)


def own_memory(pid) -> int:
    """A process's anonymous memory in KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":") for line in lines)
    return int(fields["RssAnon"].split()[0])


def make_import_source(directory, gigabytes):
    """Writes a checkpoint of about that size in bf16, with a tokenizer of three ids."""
    import tokenizers

    # Two bytes a parameter: embedding and head, and in each layer attention (query and out, key and
    # value at a quarter of that) and the three matrices of the MLP.
    layer_params = 2048 * 2048 * 2.5 + 3 * 2048 * 5632
    layers = round((gigabytes * 1e9 / 2 - 2 * 32000 * 2048) / layer_params)
    make_checkpoint(directory, "bfloat16", num_hidden_layers=layers, **IMPORT_SIZES)

    vocab = {"<s>": 1, "</s>": 2, "a": 0}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.save(str(directory / "tokenizer.json"))


def copy_and_import(source, folder):
    """Copies a checkpoint, then imports it. Returns (seconds of the import, its peak memory in GiB,
    seconds of the copy).
    """
    copy, run = Path(folder, "copy"), Path(folder, "run")

    began = time.perf_counter()
    shutil.copytree(source, copy)
    os.sync()
    copy_seconds = time.perf_counter() - began

    import_command = [sys.executable, "-m", "lm.convert", "import"]
    seconds, peak = run_and_watch([*import_command, f"--from={source}", f"--workdir={run}"])
    os.sync()

    shutil.rmtree(copy)
    shutil.rmtree(run)
    return seconds, peak, copy_seconds


def measure_import(args):
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source = Path(folder, "source")
        make_import_source(source, args.import_gb)
        size_gib = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 2**30

        # What every command costs: Python, JAX and lm.
        start_seconds, start_gib = run_and_watch(
            [sys.executable, "-c", "import jax, lm.convert; jax.devices()"]
        )
        turns = [copy_and_import(source, folder) for _ in range(args.turns)]
        import_seconds, peak_gib, copy_seconds = np.median(turns, axis=0).tolist()

    result = dict(
        checkpoint_gib=round(size_gib, 3),
        largest_tensor_gib=round(2 * 32000 * 2048 / 2**30, 3),
        import_seconds=round(import_seconds, 2),
        without_start_seconds=round(import_seconds - start_seconds, 2),
        copy_seconds=round(copy_seconds, 2),
        peak_gib=round(peak_gib, 3),
        empty_process_gib=round(start_gib, 3),
        beside_the_model_gib=round(peak_gib - start_gib - size_gib, 3),
    )
    print(json.dumps(result))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtypes", nargs="*", default=dtypes, choices=dtypes)
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
        serve(*json.loads(args.worker))
    elif args.import_gb:
        measure_import(args)
    else:
        measure_decoding(args)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
