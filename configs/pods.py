"""Configurations for TPU pods, each compiled for its pod: the cards in configs/cards/ hold memory,
FLOPs, collectives and modelled time.

    python -m lm.plan --config=configs/pods.py:llama2_7b-v5p-4x4x4 --topology=v5p:4x4x4
    python -m lm.main --config=configs/pods.py:llama2_7b-v5p-4x4x4 --workdir=gs://BUCKET/RUN --config.data.source_args.data_dir=gs://BUCKET/tfds

A size is PRESET-CHIP-TOPOLOGY, with "-lean" where there is a second setting that takes less memory,
and "-128k" for rows of 131,072 tokens, each over the eight chips of the sequence axis. The data is
C4 as in configs/c4.py; a batch is as many rows a chip as the setting was chosen for. Times on the
cards are modelled, none was measured on a TPU.
"""

from ml_collections import ConfigDict

from lm import config as config_lib
from lm.evals import entries
from lm.models import presets

# nothing but the norms and the activation is computed twice
ALL = "query,key,value,attention,out,up,gate"
NO_UP = "query,key,attention,out,gate"  # and the value and up projections
ATTENTION = "query,key,value,attention,out"  # and the MLP's first half

# size -> (mesh, rows a chip, tokens a row, results kept for the backward pass, positions of a chunk
# of the loss, gathers)
# fmt: off
SIZES = {
    "gpt3_small-v5e-1x1": (dict(), 16, 2048, ALL.replace(",gate", ""), 256, "joint"),
    "gpt3_small-v6e-2x4": (dict(fsdp=8), 16, 2048, ALL.replace(",gate", ""), 256, "joint"),
    "gpt3_medium-v5e-1x1": (dict(), 8, 2048, "query,key,value,attention,out", 256, "joint"),
    "gpt3_medium-v6e-2x4": (dict(fsdp=8), 16, 2048, ALL.replace(",gate", ""), 256, "joint"),
    "llama3_1b-v5e-4x4": (dict(fsdp=4, fsdp2=4), 4, 2048, ALL, 512, "joint"),
    "llama3_1b-v5e-4x4-lean": (dict(fsdp=4, fsdp2=4), 4, 2048, ATTENTION, 512, "joint"),
    "llama3_1b-v6e-4x4": (dict(fsdp=4, fsdp2=4), 8, 2048, ALL, 256, "staged"),
    "llama3_1b-v4-2x2x4": (dict(fsdp=4, fsdp2=4), 8, 2048, ALL, 256, "staged"),
    "llama2_7b-v5p-4x4x4": (dict(fsdp=4, fsdp2=16), 4, 4096, ALL, 1024, "staged"),
    "llama2_7b-v5p-4x4x4-lean": (dict(fsdp=4, fsdp2=16), 4, 4096, NO_UP, 1024, "staged"),
    "llama2_7b-v5e-16x16": (dict(fsdp=16, fsdp2=16), 4, 2048, "query,attention,out", 256, "joint"),
    "llama2_7b-v5e-16x16-lean": (dict(fsdp=16, fsdp2=16), 4, 2048, "query,attention", 256, "joint"),
    "llama2_7b-v6e-16x16": (dict(fsdp=16, fsdp2=16), 4, 4096, ATTENTION, 512, "staged"),
    "llama2_7b-v5e-16x16-2slices": (dict(slice=2, fsdp=16, fsdp2=16), 4, 2048, "query,attention", 512, "joint"),  # noqa: E501
    "llama2_7b-v5p-4x4x8-128k": (dict(fsdp=16, sequence=8), 1 / 8, 131072, "query,attention,out", 2048, "staged"),  # noqa: E501
    "llama2_70b-v5p-4x4x8": (dict(fsdp=8, fsdp2=16), 2, 4096, "attention,out,query", 1024, "staged"),  # noqa: E501
    "llama2_70b-v5p-8x8x4": (dict(fsdp=8, fsdp2=32), 4, 4096, "attention,out", 1024, "staged"),
    "llama2_70b-v5p-8x8x4-lean": (dict(fsdp=8, fsdp2=32), 4, 4096, "attention", 1024, "staged"),
    "llama2_70b-v5p-8x8x8": (dict(fsdp=8, fsdp2=64), 4, 4096, "attention,out", 1024, "staged"),
    "llama2_70b-v6e-16x16": (dict(fsdp=16, fsdp2=16), 1, 4096, "attention,out", 512, "staged"),
    "mixtral_8x7b-v5p-4x4x8": (dict(fsdp=8, fsdp2=16), 4, 4096, ALL, 1024, "staged"),
    "gpt3_175b-v5p-8x8x16": (dict(data=8, fsdp=8, fsdp2=16), 4, 2048, "attention,out", 512, "staged"),  # noqa: E501
}
# fmt: on


def get_config(size: str = "llama2_7b-v5p-4x4x4") -> ConfigDict:
    c = config_lib.default()
    mesh, rows, length, remat, chunk, gather = config_lib.sized(SIZES, size)
    preset, _, topology, *_ = size.split("-")
    chips = 1
    for side in topology.split("x"):
        chips *= int(side)
    c.model.update(presets.get(preset))
    c.model.update(
        dict(
            compute_dtype="bfloat16",
            attention="splash",
            remat=remat,
            context_length=max(length, c.model.context_length),
        )
    )
    if length > 8192:
        c.model.rope_theta = 500000.0  # Llama 3's, for rows this long
    c.model.vocab_size = -(-c.model.vocab_size // 128) * 128  # whole tiles
    c.mesh.update({"fsdp": 1, **mesh})
    c.data.source = "lm.data.sources.tfds"
    c.data.source_args = dict(name="c4/en", data_dir="", text_key="text", label_key="")
    c.data.length = length
    c.data.batch_size = int(rows * chips * mesh.get("slice", 1))
    c.data.streams = min(c.data.batch_size, 64)
    c.tokenizer.vocab_size = min(c.model.vocab_size, 32000)
    c.tokenizer.max_documents = 200_000
    c.objective.chunk = chunk
    c.objective.balance_loss = 0.02 if c.model.num_experts else 0.0  # Mixtral's
    c.optimizer.update(
        dict(
            name="adamw",
            learning_rate=3e-4,
            schedule="cosine",
            warmup_steps=2000,
            b2=0.95,
            weight_decay=0.1,
        )
    )
    c.train.update(
        dict(
            fsdp="by_hand",
            fsdp_gather=gather,
            grad_reduce_dtype="bfloat16",
            length="100e9 tokens",
            log_every=20,
        )
    )
    c.checkpoint.every = 1000
    c.checkpoint.best = "eval/validation/loss"
    c.evals.validation = entries.perplexity(
        every=1000, batch_size=c.data.batch_size, max_documents=5000
    )
    return c
