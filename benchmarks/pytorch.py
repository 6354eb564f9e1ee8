"""Training speed against PyTorch: the same GPT-2-shaped models, weights, batches and optimizer in
both, in one run.

    pip install torch                                   # 2.13.0 here
    python benchmarks/pytorch.py                        # CPU, f32 and bf16 compute, all threads
    python benchmarks/pytorch.py --device=gpu           # bf16: 125M, 350M and 1.3B at 2,048 tokens

Each contender is a process of its own, and they take turns. A ratio is the median over the turns of
the two speeds in a turn: lm's over the better of PyTorch eager and compiled. Parameters are f32 on
both sides (bf16 compute is autocast there, config.model.compute_dtype here), AdamW with clipping,
no dropout. The first losses must agree, or there is no result.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    num_layers: int
    width: int
    num_heads: int
    vocab_size: int
    length: int  # tokens a row
    rows: int


CASES = {
    "cpu": {
        "4x128": Case(4, 128, 4, 65, 64, 12),
        "6x384": Case(6, 384, 6, 65, 256, 12),
    },
    "gpu": {
        "125M": Case(12, 768, 12, 50304, 2048, 32),
        "350M": Case(24, 1024, 16, 50304, 2048, 16),
        "1.3B": Case(24, 2048, 16, 50304, 2048, 8),
    },
}
CONTENDERS = ("lm", "eager", "compiled")

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
B2 = 0.99
CHECKED_STEPS = 6  # whose losses must agree
LOSS_TOLERANCES = {"float32": 2e-3, "bfloat16": 2e-2}  # relative
MATMUL_SIZE = 8192  # of the matmul that measures what a card can do
MATMUL_REPEATS = 20


def make_batch(case: Case, step: int) -> np.ndarray:
    """[B, T + 1] ids that a model can learn something from: each row counts upwards from its
    start.
    """
    start = np.random.default_rng(step).integers(0, case.vocab_size, (case.rows, 1))
    return (start + np.arange(case.length + 1)) % min(case.vocab_size, 61)


# The contenders. Each imports its own framework only.


def lm_config(case: Case, device: str, dtype: str):
    """lm's configuration of a case."""
    from lm import config as config_lib
    from lm.models import presets

    c = config_lib.default()
    c.model.update(presets.get("gpt2"))
    c.model.num_layers = case.num_layers
    c.model.embed_dim = case.width
    c.model.mlp_dim = 4 * case.width
    c.model.num_heads = case.num_heads
    c.model.num_kv_heads = case.num_heads
    c.model.head_dim = case.width // case.num_heads
    c.model.vocab_size = case.vocab_size
    c.model.context_length = case.length
    c.model.param_dtype = "float32"
    c.model.compute_dtype = dtype
    if device == "gpu":
        c.model.attention = "cudnn"
        c.model.remat = "dots"
        c.objective.chunk = 512
    else:
        c.model.scan_unroll = case.num_layers  # as the configurations for CPU have it

    c.data.length = case.length
    c.data.batch_size = case.rows
    c.optimizer.learning_rate = LEARNING_RATE
    c.optimizer.schedule = "constant"
    c.optimizer.warmup_steps = 0
    c.optimizer.b2 = B2
    c.optimizer.weight_decay = WEIGHT_DECAY
    return c


class LmContender:
    """`lm.build.program`'s own train step. It writes the weights that PyTorch starts from."""

    def __init__(self, case: Case, device: str, dtype: str, weights_path: str):
        import jax

        from lm import build

        devices = jax.devices("cpu" if device == "cpu" else None)[:1]
        config = lm_config(case, device, dtype)
        program = build.program(config, devices, case.vocab_size, 10**6)

        params = program.make_params(jax.random.key(0))
        arrays = {}
        for path, param in jax.tree_util.tree_leaves_with_path(params):
            arrays[jax.tree_util.keystr(path)] = np.asarray(param)
        np.savez(weights_path, **arrays)

        self.jax = jax
        self.case = case
        self.state = program.init_state(params)
        self.train_step = program.train_step
        self.fixed = program.abstract_fixed  # empty
        # A row is one document without padding.
        shape = (case.rows, case.length)
        positions = np.arange(case.length, dtype=np.int32)
        self.constant_arrays = {
            "weights": np.ones(shape, np.float32),
            "positions": np.broadcast_to(positions, shape),
            "segments": np.ones(shape, np.int32),
        }
        self.layout = next(iter(program.abstract_batch(case.rows).values())).sharding
        self.flops_per_token = program.flops_per_token(case.length)

    def run(self, steps) -> list[float]:
        """Trains on the batches of these steps. Returns their losses."""
        losses = []
        for step in steps:
            ids = make_batch(self.case, step).astype(np.int32)
            arrays = dict(self.constant_arrays, tokens=ids[:, :-1], targets=ids[:, 1:])
            batch = self.jax.device_put(arrays, self.layout)
            self.state, metrics = self.train_step(self.state, batch, self.fixed)
            losses.append(metrics["loss"])

        # Fetched at the end, so that no step waits for the host.
        return [float(total / count) for total, count in self.jax.device_get(losses)]

    def matmul_flops(self) -> float:
        """FLOP/s of a large bf16 matmul: what this card can do."""
        jax, jnp = self.jax, self.jax.numpy
        a = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), jnp.bfloat16)

        @jax.jit
        def multiply(a):
            def body(_, x):
                return (x @ a) * jnp.bfloat16(1e-4)

            return jax.lax.fori_loop(0, MATMUL_REPEATS, body, a)

        # The first call compiles.
        multiply(a).block_until_ready()
        began = time.perf_counter()
        multiply(a).block_until_ready()
        return MATMUL_REPEATS * 2 * MATMUL_SIZE**3 / (time.perf_counter() - began)


def make_torch_model(case: Case):
    """GPT-2 in plain PyTorch, with its own fused attention. It returns the loss."""
    from torch import nn
    from torch.nn import functional as F

    width = case.width

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
            self.qkv = nn.Linear(width, 3 * width)
            self.out = nn.Linear(width, width)
            self.up = nn.Linear(width, 4 * width)
            self.down = nn.Linear(4 * width, width)

        def forward(self, x):
            rows, length, _ = x.shape

            def split_heads(y):
                return y.view(rows, length, case.num_heads, -1).transpose(1, 2)

            q, k, v = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
            attended = F.scaled_dot_product_attention(
                split_heads(q), split_heads(k), split_heads(v), is_causal=True
            )
            x = x + self.out(attended.transpose(1, 2).reshape(rows, length, -1))
            return x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(case.vocab_size, width)
            self.position = nn.Embedding(case.length, width)
            self.blocks = nn.ModuleList([Block() for _ in range(case.num_layers)])
            self.norm = nn.LayerNorm(width)

        def forward(self, ids, targets):
            x = self.embed(ids) + self.position.weight[None]
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.norm(x), self.embed.weight).float()
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return Model()


def copy_weights(model, case: Case, weights_path: str) -> None:
    """Copies lm's weights into a PyTorch model."""
    import torch

    params = {name: torch.from_numpy(array) for name, array in np.load(weights_path).items()}

    def linear_weight(layer: int, part: str, name: str):
        # lm stacks the layers, keeps heads as a dim, and multiplies with the weight, not with its
        # transpose.
        weight = params[f"['layers']['{part}']['{name}']"][layer]
        if part == "attention":
            weight = weight.reshape(case.width, case.width)
        return weight.T

    with torch.no_grad():
        model.embed.weight.copy_(params["['embed']['table']"])
        model.position.weight.copy_(params["['position_embed']['table']"])
        model.norm.weight.copy_(params["['norm']['scale']"])
        for layer, block in enumerate(model.blocks):
            qkv = [linear_weight(layer, "attention", name) for name in ("query", "key", "value")]
            block.qkv.weight.copy_(torch.cat(qkv))
            block.out.weight.copy_(linear_weight(layer, "attention", "out"))
            block.up.weight.copy_(linear_weight(layer, "mlp", "up"))
            block.down.weight.copy_(linear_weight(layer, "mlp", "down"))
            # lm's biases start from zero too, and norms' scales from one.
            for linear in (block.qkv, block.out, block.up, block.down):
                linear.bias.zero_()


class TorchContender:
    """PyTorch with its own fused attention and optimizer."""

    def __init__(self, case: Case, device: str, dtype: str, weights_path: str, compiled: bool):
        import torch

        torch.set_float32_matmul_precision("high" if device == "gpu" else "highest")
        self.torch = torch
        self.case = case
        self.autocast = dtype == "bfloat16"
        self.device = "cuda" if device == "gpu" else "cpu"

        model = make_torch_model(case)
        copy_weights(model, case, weights_path)
        model.to(self.device)
        self.params = list(model.parameters())
        self.forward = torch.compile(model) if compiled else model

        # As in lm, weight decay applies to matrices and tables, not to norms and biases.
        matrices = [param for param in self.params if param.ndim > 1]
        vectors = [param for param in self.params if param.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [
                dict(params=matrices, weight_decay=WEIGHT_DECAY),
                dict(params=vectors, weight_decay=0.0),
            ],
            lr=LEARNING_RATE,
            betas=(0.9, B2),
            eps=1e-8,
            fused=True,
        )

    def train_step(self, ids):
        """One step on ids [B, T + 1]. Returns the loss, not yet fetched."""
        torch = self.torch
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            loss = self.forward(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def run(self, steps) -> list[float]:
        """Trains on the batches of these steps. Returns their losses."""
        losses = []
        for step in steps:
            ids = self.torch.from_numpy(make_batch(self.case, step)).to(self.device)
            losses.append(self.train_step(ids))
        return [float(loss) for loss in losses]


# A contender's process


def work(name: str, case: list[int], device: str, dtype: str, weights_path: str) -> None:
    """Answers requests on stdin, one a line, with JSON on stdout.

    "FIRST COUNT" trains COUNT steps from FIRST on; the answer has their seconds and losses, but for
    the first one's. "facts" asks for the model's FLOPs and the card's.
    """
    case = Case(*case)
    if name == "lm":
        contender = LmContender(case, device, dtype, weights_path)
    else:
        contender = TorchContender(case, device, dtype, weights_path, name == "compiled")

    # Whatever libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    for line in sys.stdin:
        request = line.strip()
        if request == "facts":
            matmul_flops = contender.matmul_flops() if device == "gpu" else 0.0
            answer = dict(flops=contender.flops_per_token, matmul=matmul_flops)
        else:
            first, count = map(int, request.split())
            time.sleep(0.5)  # until the threads of who was before have stopped spinning
            contender.run([first])
            began = time.perf_counter()
            losses = contender.run(range(first + 1, first + count))
            answer = dict(seconds=time.perf_counter() - began, losses=losses)
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A contender in a process of its own."""

    def __init__(self, name: str, case: Case, device: str, dtype: str, weights_path: str):
        env = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")
        if device == "cpu":
            env |= dict(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
        self.name = name
        self.process = subprocess.Popen(
            [
                sys.executable,
                __file__,
                "--worker",
                json.dumps([name, case, device, dtype, weights_path]),
            ],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: str) -> dict:
        self.process.stdin.write(f"{request}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(
                f"a contender ended with {self.process.wait()}; its message stands above"
            )
        return json.loads(answer)

    def train(self, first: int, count: int) -> dict:
        return self.ask(f"{first} {count}")

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# The comparison


def log(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def start_workers(
    case: Case, title: str, device: str, dtype: str, weights_path: str
) -> dict[str, Worker]:
    """Starts the contenders, lm first, since it writes the weights that the others read.

    Raises:
      SystemExit: their first losses don't agree.
    """
    workers = {}
    expected = None
    for name in CONTENDERS:
        workers[name] = Worker(name, case, device, dtype, weights_path)
        losses = workers[name].train(0, CHECKED_STEPS)["losses"]
        expected = losses if name == "lm" else expected
        if not np.allclose(losses, expected, rtol=LOSS_TOLERANCES[dtype]):
            raise SystemExit(
                f"{title}: the losses of {name} are {losses}, lm's {expected}: not the same "
                "training"
            )
        log(f"{title} {name}: losses {', '.join(f'{loss:.4f}' for loss in losses)}")
    return workers


def take_turns(
    workers: dict[str, Worker], case: Case, num_turns: int, seconds: float
) -> dict[str, list[float]]:
    """Tokens/s of each contender in each turn, which lasts some `seconds` for the fastest."""
    # Two of three steps are timed.
    fastest = min(worker.train(CHECKED_STEPS, 3)["seconds"] / 2 for worker in workers.values())
    count = max(int(seconds / fastest), 3)
    next_step = CHECKED_STEPS + 3

    speeds = {name: [] for name in workers}
    for turn in range(num_turns):
        for name, worker in workers.items():
            # All take the same steps; the first of them isn't timed.
            timed = worker.train(next_step, count)["seconds"]
            speeds[name].append((count - 1) * case.rows * case.length / timed)
        next_step += count
        last = ", ".join(f"{name} {speed[-1]:,.0f} tokens/s" for name, speed in speeds.items())
        log(f"turn {turn + 1}/{num_turns}: {last}")
    return speeds


def compare(case_name: str, device: str, dtype: str, num_turns: int, seconds: float) -> dict:
    """Tokens/s of each contender and their ratio: the medians over the turns."""
    case = CASES[device][case_name]
    with tempfile.TemporaryDirectory() as folder:
        workers = start_workers(
            case, f"{case_name} {dtype}", device, dtype, f"{folder}/weights.npz"
        )
        speeds = take_turns(workers, case, num_turns, seconds)
        facts = workers["lm"].ask("facts")
        for worker in workers.values():
            worker.end()

    ratios = []
    for lm, eager, compiled in zip(*speeds.values()):
        ratios.append(lm / max(eager, compiled))
    medians = {name: statistics.median(speed) for name, speed in speeds.items()}
    result = dict(
        case=case_name,
        compute=dtype,
        **medians,
        ratio=statistics.median(ratios),
        ratios=[min(ratios), max(ratios)],
    )

    # Only a GPU's ceiling is measured.
    if facts["matmul"]:
        result["of_matmul_ceiling"] = medians["lm"] * facts["flops"] / facts["matmul"]
        result["matmul_tflops"] = facts["matmul"] / 1e12
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=CASES, default="cpu")
    parser.add_argument("--cases", nargs="*", help="of those of the device; all by default")
    parser.add_argument("--dtypes", nargs="*", default=None)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn, about")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*json.loads(args.worker))
        return

    cases = CASES[args.device]
    if unknown := set(args.cases or ()) - set(cases):
        parser.error(f"no cases {sorted(unknown)} for {args.device}; valid: {sorted(cases)}")
    dtypes = ("float32", "bfloat16") if args.device == "cpu" else ("bfloat16",)
    for case_name in args.cases or cases:
        for dtype in args.dtypes or dtypes:
            result = compare(case_name, args.device, dtype, args.turns, args.seconds)
            for key, value in result.items():
                result[key] = round(value, 3) if isinstance(value, float) else value
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
