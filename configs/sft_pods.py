"""Supervised tuning of Llama 3 on TPU pods. lm.plan says what it takes there:

    python -m lm.plan --config=configs/sft_pods.py:llama3_8b-v5e-2x4-lora --topology=v5e:2x4
    python -m lm.main --config=configs/sft_pods.py:llama3_8b-v5e-2x4-lora --workdir=gs://BUCKET/RUN --config.init_from=DIR --config.data.source_args.path=chats.jsonl

DIR is the directory of the Hugging Face checkpoint: Llama 3.2 1B, or Llama 3.1 8B. Conversations are
in any of the formats of lm/data/conversations.py, and go by the checkpoint's own chat template; base
models have none, and take `--config.chat.template=llama3`.
"""  # noqa: E501

import math
from typing import NamedTuple

from ml_collections import ConfigDict

from lm import config as config_lib
from lm.evals import entries
from lm.models import presets

# Llama 3.1's and 3.2's (name of a scaling in lm.nn.positions.SCALINGS, and its numbers).
ROPE_SCALING = {"llama3_1b": (32.0, 1.0, 4.0, 8192), "llama3_8b": (8.0, 1.0, 4.0, 8192)}


class Size(NamedTuple):
    mesh: dict[str, int]  # axis -> devices, where it isn't 1
    rows_per_chip: int
    remat: str
    gather: str  # config.train.fsdp_gather


_KEPT = "query,key,value,attention,out"
SIZES = {
    "llama3_1b-v5e-2x4": Size(dict(fsdp=8), 2, f"{_KEPT},gate,up", "joint"),
    "llama3_8b-v5e-2x4-lora": Size(dict(fsdp=8), 1, f"{_KEPT},up", "joint"),
    "llama3_8b-v5p-2x2x4": Size(dict(fsdp=4, fsdp2=4), 2, f"{_KEPT},gate,up", "staged"),
}


def set_llama3(c: ConfigDict, preset: str, remat: str, mesh: dict[str, int]) -> None:
    """Sets a model of Llama 3 and its mesh."""
    c.model.update(presets.get(preset))
    c.model.compute_dtype = "bfloat16"
    c.model.attention = "splash"
    c.model.remat = remat
    c.model.context_length = 131072
    c.model.rope_scaling = ROPE_SCALING[preset]
    c.mesh.update({"fsdp": 1, **mesh})


def get_config(size: str = "llama3_1b-v5e-2x4") -> ConfigDict:
    c = config_lib.default()
    setting = config_lib.sized(SIZES, size)
    preset, _, topology, *_ = size.split("-")
    is_lora = size.endswith("-lora")

    set_llama3(c, preset, setting.remat, setting.mesh)
    c.init_from = f"checkpoints/{preset}"
    if is_lora:
        c.model.lora_rank = 16
        c.model.lora_alpha = 32.0

    c.data.source = "lm.data.conversations.conversations"
    c.data.source_args = dict(path="", held_out=0.01)
    c.data.length = 4096
    chips = math.prod(int(side) for side in topology.split("x"))
    c.data.batch_size = setting.rows_per_chip * chips
    c.data.streams = c.data.batch_size
    c.objective.chunk = 512

    c.optimizer.learning_rate = 2e-4 if is_lora else 1e-5
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 50
    c.optimizer.weight_decay = 0.0
    c.train.length = "2 epochs"
    c.train.fsdp = "by_hand"
    c.train.fsdp_gather = setting.gather
    c.checkpoint.every = 200

    c.evals.held_out = entries.held_out("AnswerLoss", every=200, batch_size=c.data.batch_size)
    return c
