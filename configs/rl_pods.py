"""GRPO of Llama 3 on TPU pods, on questions with answers, such as those of mathematics. lm.plan says
what it takes there, for texts too:

    python -m lm.plan --config=configs/rl_pods.py:llama3_1b-v5e-2x4-grpo --topology=v5e:2x4 --programs=train,scores,reshard,prefill,decode
    python -m lm.main --config=configs/rl_pods.py:llama3_1b-v5e-2x4-grpo --workdir=gs://BUCKET/RUN --config.init_from=DIR --config.models.reference.init_from=DIR --config.data.source_args.path=questions.jsonl

DIR is the directory of the Hugging Face checkpoint: Llama 3.2 1B, or Llama 3.1 8B, whose adapters
are trained and whose reference is the model without them. Prompts are messages and go by the
checkpoint's own chat template.
"""  # noqa: E501

from typing import NamedTuple

from ml_collections import ConfigDict

from configs import rl
from configs.sft_pods import set_llama3
from lm import config as config_lib

PROMPT_TOKENS = 512


class Size(NamedTuple):
    mesh: dict[str, int]  # axis -> devices, where it isn't 1
    texts: int  # of a rollout, which is one step
    microbatches: int
    slots: int
    remat: str
    gather: str  # config.train.fsdp_gather


_KEPT = "query,key,value,attention,out"
SIZES = {
    "llama3_1b-v5e-2x4-grpo": Size(dict(fsdp=8), 256, 8, 256, f"{_KEPT},gate,up", "joint"),
    "llama3_8b-v5p-2x2x4-grpo": Size(
        dict(fsdp=4, fsdp2=4), 512, 4, 512, f"{_KEPT},gate,up", "staged"
    ),
}


def get_config(size: str = "llama3_1b-v5e-2x4-grpo") -> ConfigDict:
    setting = config_lib.sized(SIZES, size)
    preset = size.split("-")[0]
    c = rl.get_config(f"grpo,checkpoints/{preset},questions.jsonl")

    set_llama3(c, preset, setting.remat, setting.mesh)
    if preset == "llama3_8b":
        c.model.lora_rank = 16
        c.model.lora_alpha = 32.0
        c.objective.reference = "base"
        c.models = ConfigDict()

    c.data.batch_size = setting.texts
    c.data.length = 2048
    c.rollout.max_new_tokens = c.data.length - PROMPT_TOKENS
    c.rollout.slots = setting.slots
    c.rewards.right = ConfigDict(dict(type="lm.rl.maths.right", weight=1.0, key="answer"))
    c.objective.chunk = 256

    c.optimizer.learning_rate = 2e-5 if preset == "llama3_8b" else 1e-6
    c.train.length = "500 steps"
    c.train.accumulation = setting.microbatches
    c.train.fsdp = "by_hand"
    c.train.fsdp_gather = setting.gather
    c.checkpoint.every = 20
    return c
