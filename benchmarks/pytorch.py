"""Training speed against PyTorch: the same GPT-2-shaped models, weights, batches and optimizer in
both, in one run.

    pip install torch                                   # 2.13.0 here
    python benchmarks/pytorch.py                        # CPU, f32 and bf16 compute, all threads
    python benchmarks/pytorch.py --device=gpu           # bf16: 125M, 350M and 1.3B at 2,048 tokens

Each contender is a process of its own; they take turns, and a ratio is the median over the turns of
the two speeds in a turn, ours over the better of PyTorch eager and compiled. Parameters are f32 on
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

import numpy as np

from lm import flops

# name -> (layers, width, heads, vocabulary, tokens a row, rows)
CASES = {
    "cpu": {"4x128": (4, 128, 4, 65, 64, 12), "6x384": (6, 384, 6, 65, 256, 12)},
    "gpu": {
        "125M": (12, 768, 12, 50304, 2048, 32),
        "350M": (24, 1024, 16, 50304, 2048, 16),
        "1.3B": (24, 2048, 16, 50304, 2048, 8),
    },
}
LEARNING_RATE, WEIGHT_DECAY, B2 = 1e-3, 0.1, 0.99
CHECKED_STEPS = 6


def batch_of(case, step):
    """[B, T + 1] ids that a model can learn something from: each row counts upwards from its
    start.
    """
    _, _, _, vocab, length, rows = case
    start = np.random.default_rng(step).integers(0, vocab, (rows, 1))
    return (start + np.arange(length + 1)) % min(vocab, 61)


class Ours:
    """`lm.build.program`'s own train step."""

    def __init__(self, case, device, dtype, weights):
        import jax

        from lm import build
        from lm import config as config_lib
        from lm.models import presets

        layers, width, heads, vocab, length, rows = case
        c = config_lib.default()
        c.model.update(
            presets.get("gpt2")
            | dict(
                num_layers=layers,
                embed_dim=width,
                mlp_dim=4 * width,
                num_heads=heads,
                num_kv_heads=heads,
                head_dim=width // heads,
                vocab_size=vocab,
                context_length=length,
            )
        )
        c.model.update(dict(param_dtype="float32", compute_dtype=dtype))
        if device == "gpu":
            c.model.update(dict(attention="cudnn", remat="dots"))
            c.objective.chunk = 512
        else:
            c.model.scan_unroll = layers  # as the configurations for CPU have it
        c.data.update(dict(length=length, batch_size=rows))
        c.optimizer.update(
            dict(
                learning_rate=LEARNING_RATE,
                schedule="constant",
                warmup_steps=0,
                b2=B2,
                weight_decay=WEIGHT_DECAY,
            )
        )
        self.jax, devices = jax, jax.devices("cpu" if device == "cpu" else None)[:1]
        program = build.program(c, devices, vocab, 10**6)
        params = program.make_params(jax.random.key(0))
        paths = {
            jax.tree_util.keystr(path): np.asarray(p)
            for path, p in jax.tree_util.tree_leaves_with_path(params)
        }
        np.savez(weights, **paths)
        self.state, self.step, self.case = program.init_state(params), program.train_step, case
        ones = np.ones((rows, length), np.int32)
        self.rest = dict(
            weights=ones.astype(np.float32),
            positions=np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
            segments=ones,
        )
        self.layout = next(iter(program.abstract_batch(rows).values())).sharding
        self.flops = flops.model_flops_per_token(program.model_config, length, causal=True)

    def run(self, numbers):
        """Steps on the batches of these numbers; their losses."""
        losses = []
        for number in numbers:
            ids = batch_of(self.case, number).astype(np.int32)
            batch = self.jax.device_put(
                dict(self.rest, tokens=ids[:, :-1], targets=ids[:, 1:]), self.layout
            )
            self.state, metrics = self.step(self.state, batch)
            losses.append(metrics["loss"])
        return [float(total / count) for total, count in self.jax.device_get(losses)]

    def matmul(self):
        """FLOP/s of a large bf16 matmul: what this card can do."""
        jnp = self.jax.numpy
        a = jnp.ones((8192, 8192), jnp.bfloat16)
        f = self.jax.jit(
            lambda a: self.jax.lax.fori_loop(0, 20, lambda _, x: (x @ a) * jnp.bfloat16(1e-4), a)
        )
        f(a).block_until_ready()
        began = time.perf_counter()
        f(a).block_until_ready()
        return 20 * 2 * 8192**3 / (time.perf_counter() - began)


class Torch:
    """GPT-2 in plain PyTorch, with its own fused attention and optimizer."""

    def __init__(self, case, device, dtype, weights, compiled):
        import torch

        F, nn = torch.nn.functional, torch.nn
        layers, width, heads, vocab, length, _ = case
        torch.set_float32_matmul_precision("high" if device == "gpu" else "highest")

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
                self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
                self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

            def forward(self, x):
                rows, length, _ = x.shape
                q, k, v = (
                    y.view(rows, length, heads, -1).transpose(1, 2)
                    for y in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
                )
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                x = x + self.out(y.transpose(1, 2).reshape(rows, length, -1))
                return x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.position = nn.Embedding(vocab, width), nn.Embedding(length, width)
                self.blocks, self.norm = (
                    nn.ModuleList(Block() for _ in range(layers)),
                    nn.LayerNorm(width),
                )

            def forward(self, ids, targets):
                x = self.embed(ids) + self.position.weight[None]
                for block in self.blocks:
                    x = block(x)
                return F.cross_entropy(
                    F.linear(self.norm(x), self.embed.weight).float().flatten(0, 1),
                    targets.flatten(),
                )

        model = Model()
        w = {k: torch.from_numpy(v) for k, v in np.load(weights).items()}
        with torch.no_grad():
            model.embed.weight.copy_(w["['embed']['table']"])
            model.position.weight.copy_(w["['position_embed']['table']"])
            model.norm.weight.copy_(w["['norm']['scale']"])
            for i, block in enumerate(model.blocks):
                of = lambda *path: w["['layers']" + "".join(f"['{p}']" for p in path)][i]  # noqa: B023
                block.qkv.weight.copy_(
                    torch.cat(
                        [
                            of("attention", name).reshape(width, width).T
                            for name in ("query", "key", "value")
                        ]
                    )
                )
                block.out.weight.copy_(of("attention", "out").reshape(width, width).T)
                block.up.weight.copy_(of("mlp", "up").T)
                block.down.weight.copy_(of("mlp", "down").T)
                for linear in (block.qkv, block.out, block.up, block.down):
                    linear.bias.zero_()
        self.device = "cuda" if device == "gpu" else "cpu"
        model.to(self.device)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        groups = [
            dict(params=matrices, weight_decay=WEIGHT_DECAY),
            dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0),
        ]
        optimizer = torch.optim.AdamW(
            groups, lr=LEARNING_RATE, betas=(0.9, B2), eps=1e-8, fused=True
        )
        forward = torch.compile(model) if compiled else model

        def step(ids):
            with torch.autocast(self.device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = forward(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        self.torch, self.step, self.case = torch, step, case

    def run(self, numbers):
        losses = [
            self.step(self.torch.from_numpy(batch_of(self.case, n)).to(self.device))
            for n in numbers
        ]
        return [float(x) for x in losses]


def worker(name, case, device, dtype, weights):
    """Answers each line "FIRST COUNT" with the seconds and losses of those steps, the first
    apart.
    """
    contender = (
        Ours(case, device, dtype, weights)
        if name == "lm"
        else Torch(case, device, dtype, weights, name == "compiled")
    )
    answers = os.fdopen(os.dup(1), "w")  # whatever libraries print goes to stderr
    os.dup2(2, 1)
    for line in sys.stdin:
        if line.strip() == "facts":
            answer = dict(
                flops=contender.flops, matmul=contender.matmul() if device == "gpu" else 0.0
            )
        else:
            first, count = map(int, line.split())
            time.sleep(0.5)  # until the threads of who was before have stopped spinning
            contender.run([first])
            began = time.perf_counter()
            losses = contender.run(range(first + 1, first + count))
            answer = dict(seconds=time.perf_counter() - began, losses=losses)
        print(json.dumps(answer), file=answers, flush=True)


class Contender:
    def __init__(self, name, args, *job):
        env = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")
        if args.device == "cpu":
            env |= dict(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps([name, *job])],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, line):
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(
                f"a contender ended with {self.process.wait()}; its message stands above"
            )
        return json.loads(answer)


def compare(case_name, dtype, args):
    """Tokens/s of each contender, and the ratio, over `args.turns` turns."""
    case = CASES[args.device][case_name]
    with tempfile.TemporaryDirectory() as folder:
        job = (case, args.device, dtype, f"{folder}/weights.npz")
        contenders, reference = {}, None
        for name in ("lm", "eager", "compiled"):  # ours writes the weights that the others read
            contenders[name] = Contender(name, args, *job)
            first = contenders[name].ask(f"0 {CHECKED_STEPS}")["losses"]
            reference = first if name == "lm" else reference
            if not np.allclose(first, reference, rtol=2e-3 if dtype == "float32" else 2e-2):
                raise SystemExit(
                    f"{case_name} {dtype}: the losses of {name} are {first}, ours {reference}: "
                    "not the same training"
                )
            print(
                f"  {case_name} {dtype} {name}: losses {', '.join(f'{x:.4f}' for x in first)}",
                file=sys.stderr,
                flush=True,
            )
        done, speeds = CHECKED_STEPS, {name: [] for name in contenders}
        count = max(
            int(args.seconds / min(c.ask(f"{done} 3")["seconds"] / 2 for c in contenders.values())),
            3,
        )
        done += 3
        tokens = case[4] * case[5]
        for turn in range(args.turns):
            for name, contender in contenders.items():
                speeds[name].append(
                    (count - 1) * tokens / contender.ask(f"{done} {count}")["seconds"]
                )
            done += count
            print(
                f"  turn {turn + 1}/{args.turns}: "
                + ", ".join(f"{n} {s[-1]:,.0f} tokens/s" for n, s in speeds.items()),
                file=sys.stderr,
                flush=True,
            )
        facts = contenders["lm"].ask("facts")
        for contender in contenders.values():
            contender.process.stdin.close()
            contender.process.wait()
    ratios = [ours / max(theirs) for ours, *theirs in zip(*speeds.values())]
    middle = {name: statistics.median(s) for name, s in speeds.items()}
    return dict(
        case=case_name,
        compute=dtype,
        **middle,
        ratio=statistics.median(ratios),
        ratios=[min(ratios), max(ratios)],
        **(
            dict(
                of_matmul_ceiling=middle["lm"] * facts["flops"] / facts["matmul"],
                matmul_tflops=facts["matmul"] / 1e12,
            )
            if facts["matmul"]
            else {}
        ),
    )


def main():
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
        return worker(*json.loads(args.worker))
    if unknown := set(args.cases or ()) - set(CASES[args.device]):
        parser.error(
            f"no cases {sorted(unknown)} for {args.device}; valid: {sorted(CASES[args.device])}"
        )
    for name in args.cases or CASES[args.device]:
        for dtype in args.dtypes or (
            ("float32", "bfloat16") if args.device == "cpu" else ("bfloat16",)
        ):
            print(
                json.dumps(
                    {
                        k: round(v, 3) if isinstance(v, float) else v
                        for k, v in compare(name, dtype, args).items()
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
