"""Configurations for TPU pods, each compiled for its pod: the cards in configs/cards/ hold memory,
FLOPs, collectives and modelled time.

    python -m lm.plan --config=configs/pods.py:llama2_7b-v5p-4x4x4 --topology=v5p:4x4x4
    python -m lm.main --config=configs/pods.py:llama2_7b-v5p-4x4x4 --workdir=gs://BUCKET/RUN --config.data.source_args.data_dir=gs://BUCKET/tfds

A size is PRESET-CHIP-TOPOLOGY, with "-lean" where there is a second setting that takes less memory,
and "-128k" for rows of 131,072 tokens, each over the eight chips of the sequence axis. The data is
C4 as in configs/c4.py; a batch is as many rows a chip as the setting was chosen for. Times on the
cards are modelled, none was measured on a TPU.
"""  # noqa: E501

import math
from typing import NamedTuple

from ml_collections import ConfigDict

from lm import config as config_lib
from lm.evals import entries
from lm.models import presets

# What is saved for the backward pass (config.model.remat), and behind it what is computed again.
ALL = "query,key,value,attention,out,up,gate"  # the norms and the activation
NO_GATE = "query,key,value,attention,out,up"  # as ALL, for an MLP without a gate
NO_UP = "query,key,attention,out,gate"  # the value and up projections too
ATTENTION = "query,key,value,attention,out"  # the first half of the MLP too
NO_SPLASH = "query,key,value,out,up"  # as NO_GATE, where attention is no kernel


class Size(NamedTuple):
    mesh: dict[str, int]  # axis -> devices, where it isn't 1
    rows_per_chip: float
    length: int  # tokens a row; of an encoder-decoder the target's, and the source has four times
    remat: str
    chunk: int  # positions of a chunk of the loss
    gather: str  # config.train.fsdp_gather


# fmt: off
SIZES = {
    "gpt3_small-v5e-1x1": Size(dict(), 16, 2048, NO_GATE, 256, "joint"),
    "gpt3_small-v6e-2x4": Size(dict(fsdp=8), 16, 2048, NO_GATE, 256, "joint"),
    "gpt3_medium-v5e-1x1": Size(dict(), 8, 2048, ATTENTION, 256, "joint"),
    "gpt3_medium-v6e-2x4": Size(dict(fsdp=8), 16, 2048, NO_GATE, 256, "joint"),
    "bert_large-v5e-2x4": Size(dict(fsdp=8), 32, 512, NO_GATE, 128, "joint"),
    "llama3_1b-v5e-4x4": Size(dict(fsdp=4, fsdp2=4), 4, 2048, ALL, 512, "joint"),
    "llama3_1b-v5e-4x4-lean": Size(dict(fsdp=4, fsdp2=4), 4, 2048, ATTENTION, 512, "joint"),
    "llama3_1b-v6e-4x4": Size(dict(fsdp=4, fsdp2=4), 8, 2048, ALL, 256, "staged"),
    "llama3_1b-v4-2x2x4": Size(dict(fsdp=4, fsdp2=4), 8, 2048, ALL, 256, "staged"),
    "llama2_7b-v5p-4x4x4": Size(dict(fsdp=4, fsdp2=16), 4, 4096, ALL, 1024, "staged"),
    "llama2_7b-v5p-4x4x4-lean": Size(dict(fsdp=4, fsdp2=16), 4, 4096, NO_UP, 1024, "staged"),
    "llama2_7b-v5e-16x16": Size(dict(fsdp=16, fsdp2=16), 4, 2048, "query,attention,out", 256, "joint"),  # noqa: E501
    "llama2_7b-v5e-16x16-lean": Size(dict(fsdp=16, fsdp2=16), 4, 2048, "query,attention", 256, "joint"),  # noqa: E501
    "llama2_7b-v6e-16x16": Size(dict(fsdp=16, fsdp2=16), 4, 4096, ATTENTION, 512, "staged"),
    "llama2_7b-v5e-16x16-2slices": Size(dict(slice=2, fsdp=16, fsdp2=16), 4, 2048, "query,attention", 512, "joint"),  # noqa: E501
    "llama2_7b-v5p-4x4x8-128k": Size(dict(fsdp=16, sequence=8), 1 / 8, 131072, "query,attention,out", 2048, "staged"),  # noqa: E501
    "llama2_70b-v5p-4x4x8": Size(dict(fsdp=8, fsdp2=16), 2, 4096, "attention,out,query", 1024, "staged"),  # noqa: E501
    "llama2_70b-v5p-8x8x4": Size(dict(fsdp=8, fsdp2=32), 4, 4096, "attention,out", 1024, "staged"),
    "llama2_70b-v5p-8x8x4-lean": Size(dict(fsdp=8, fsdp2=32), 4, 4096, "attention", 1024, "staged"),
    "llama2_70b-v5p-8x8x8": Size(dict(fsdp=8, fsdp2=64), 4, 4096, "attention,out", 1024, "staged"),
    "llama2_70b-v6e-16x16": Size(dict(fsdp=16, fsdp2=16), 1, 4096, "attention,out", 512, "staged"),
    "t5_11b-v5p-2x2x4": Size(dict(fsdp=4, fsdp2=4), 8, 128, NO_SPLASH, 128, "staged"),
    "mixtral_8x7b-v5p-4x4x8": Size(dict(fsdp=8, fsdp2=16), 4, 4096, ALL, 1024, "staged"),
    "gpt3_175b-v5p-8x8x16": Size(dict(data=8, fsdp=8, fsdp2=16), 4, 2048, "attention,out", 512, "staged"),  # noqa: E501
}
# fmt: on


def get_config(size: str = "llama2_7b-v5p-4x4x4") -> ConfigDict:
    c = config_lib.default()
    setting = config_lib.sized(SIZES, size)
    preset, _, topology, *_ = size.split("-")
    chips = math.prod(int(side) for side in topology.split("x"))

    fields = presets.get(preset)
    reads_sources = "source_length" in fields
    if reads_sources:
        c.model = config_lib.model(**fields)
    else:
        c.model.update(fields, attention="splash")
    c.model.compute_dtype = "bfloat16"
    c.model.remat = setting.remat
    c.model.context_length = max(setting.length, c.model.context_length)
    if setting.length > 8192:
        c.model.rope_theta = 500000.0  # Llama 3's, for rows this long
    c.model.vocab_size = -(-c.model.vocab_size // 128) * 128  # whole tiles
    c.mesh.update({"fsdp": 1, **setting.mesh})

    c.data.source = "lm.data.sources.tfds"
    c.data.source_args = dict(name="c4/en", data_dir="", text_key="text", label_key="")
    c.data.length = setting.length
    c.data.batch_size = int(setting.rows_per_chip * chips * setting.mesh.get("slice", 1))
    c.data.streams = min(c.data.batch_size, 64)
    c.tokenizer.vocab_size = min(c.model.vocab_size, 32000)
    c.tokenizer.max_documents = 200_000

    is_encoder = c.model.get("visible") == "full"
    if reads_sources:
        c.tokenizer.reserve = "sentinels:100"
        # Its random numbers, one for each pair of tokens and head, would be most of what is drawn.
        c.model.attention_dropout = 0.0
        c.objective = ConfigDict(
            dict(type="lm.objectives.span_corruption", source_length=4 * setting.length)
        )
        c.objective.update(rate=0.15, mean_span=3.0, chunk=setting.chunk)
    elif is_encoder:
        c.tokenizer.reserve = "mask"
        # Splash attention has no probabilities that could be dropped.
        c.model.attention_dropout = 0.0
        c.objective = ConfigDict(dict(type="lm.objectives.masked", rate=0.15, chunk=setting.chunk))
    else:
        c.objective.chunk = setting.chunk
        c.objective.balance_loss = 0.02 if c.model.num_experts else 0.0  # Mixtral's

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 3e-4
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 2000
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.1

    # docs/pods.md has the reasons.
    c.train.fsdp = "by_hand"
    c.train.fsdp_gather = setting.gather
    c.train.grad_reduce_dtype = "bfloat16"

    c.train.length = "100e9 tokens"
    c.train.log_every = 20
    c.checkpoint.every = 1000
    c.checkpoint.best = "eval/validation/loss"

    about = dict(every=1000, batch_size=c.data.batch_size, max_documents=5000)
    if is_encoder or reads_sources:
        c.evals.validation = entries.held_out("TextLoss", **about)
    else:
        c.evals.validation = entries.perplexity(**about)
    return c
