"""Reinforcement learning: a model learns from texts of its own, by what they earn.

    python -m lm.main --config=configs/rl.py:grpo,BASE,prompts.jsonl --workdir=runs/grpo
    python -m lm.main --config=configs/rl.py:ppo,BASE,,REWARD --workdir=runs/ppo
    python -m lm.main --config=configs/rl.py:verbalizer,BASE --workdir=runs/numpy

BASE is a run's directory or that of a Hugging Face checkpoint. The prompts are JSONL,
{"prompt": ..., "answer": ...}, texts or messages (lm/data/prompts.py), or the questions of a task
of lm/evals/tasks/, those about docstrings if none is named. What a text earns is config.rewards:
whether it is the record's answer, or with REWARD, where a reward model is, its score. lm/rl/ has
others.

A size is grpo (Shao et al. 2024), dr_grpo (Liu et al. 2025), dapo (Yu et al. 2025), gspo (Zheng et
al. 2025), rloo (Ahmadian et al. 2024) or ppo (Schulman et al. 2017), which trains a critic.

verbalizer is grpo for what a frozen model, REWARD or BASE itself, says of a text when it is asked a
classification task: the probability of one label. Without a file the model goes on from the first
words of docstrings, and is rewarded where they could be numpy's.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from lm import config as config_lib
from lm.data.pydocs_tasks import VERBS
from lm.evals import entries

LENGTH = 512
COMMAND = rf"^\s*({'|'.join(VERBS)})\b"  # how a command begins
STARTS = ("Return the ", "Compute the eigenvalues of ", "Raise an exception if ")


def get_config(argument: str = "grpo") -> ConfigDict:
    size, *given = argument.split(",")
    change: Callable = config_lib.sized(SIZES, size)
    if len(given) > 3:
        raise ValueError(f"{argument!r}: wanted SIZE,BASE,PROMPTS,REWARD, the last ones optional")
    base, path, reward = (*given, "", "", "")[:3]

    c = config_lib.default()
    c.model.context_length = LENGTH  # most checkpoints have longer ones
    config_lib.start_from(c, base)
    c.data.loader = "lm.rl.rollouts.RolloutLoader"
    c.data.streams = 1
    c.data.batch_size = 64
    c.data.length = min(LENGTH, c.model.context_length)
    c.rollout.max_new_tokens = c.data.length // 4

    is_file = bool(path) and path not in entries.shipped_tasks()
    if is_file:
        c.data.source = "lm.data.prompts.jsonl"
        c.data.source_args = ConfigDict(dict(path=path, held_out=0.0))
    elif size == "verbalizer" and not path:
        c.rollout.prompt_tokens = 8
    else:
        task = path or "pydocs_questions"
        c.data.source = "lm.instructions.questions"
        about = dict(tasks={task: entries.instructed(task)}, wording=dict(space=True))
        c.data.source_args = ConfigDict(about)
        c.evals[task] = entries.task(task, every=48, max_documents=200)

    _rewards(c, size, path, reward or base)
    if reward and size != "verbalizer":
        # What it stands for is watched.
        c.rewards.right.weight = 0.0
        c.models.reward = ConfigDict(dict(init_from=reward, model={}))
        c.rewards.score = ConfigDict(dict(type="lm.rl.judges.RewardModel", weight=1.0))

    c.objective = ConfigDict(dict(type="lm.objectives.policy", ratio="token"))
    c.objective.update(aggregate="token_mean", divisor=1.0, clip_low=0.2, clip_high=0.2)
    c.objective.update(old="present", importance_cap=2.0, kl=0.0, kl_estimator="k3")
    c.objective.update(reference="none", value_weight=0.0, value_clip=0.2, temperature=1.0, chunk=0)
    # Whatever a flag makes of it.
    c.objective.places = c.rollout.get_oneway_ref("max_new_tokens")
    c.optimizer.learning_rate = 1e-5
    c.optimizer.schedule = "constant"
    c.optimizer.warmup_steps = 0
    c.optimizer.weight_decay = 0.0
    c.train.length = "200 steps"
    c.train.log_every = 1

    change(c)
    has_reference = bool(base) and c.objective.reference == "model"
    if has_reference:
        c.models.reference = ConfigDict(dict(init_from=base, model={}))
    if not is_file:
        # What learning costs: texts as the base was trained on, which earn nothing.
        about = dict(source="lm.data.pydocs.pydocs", source_args=dict(data_dir="~/.cache/lm"))
        c.evals.text = entries.perplexity(every=48, max_documents=120, **about)
        beside = "reference" if has_reference else ""
        c.evals.samples = entries.samples(STARTS, every=48, beside=beside)
    return c


def _rewards(c: ConfigDict, size: str, path: str, judge: str) -> None:
    """Sets what a text earns by itself."""
    if size == "verbalizer":
        c.models.judge = ConfigDict(dict(init_from=judge, model={}))
        about = dict(model="judge", task="pydocs_library", label="numpy", prior="")
        about |= dict(type="lm.rl.judges.Verbalizer", column="excerpt", with_prompt=True)
    elif path == "docstring_commands":
        about = dict(type="lm.rl.rewards.pattern", pattern=COMMAND, key="")
    else:
        about = dict(type="lm.rl.rewards.exact", key="answer")
    c.rewards.right = ConfigDict(about | dict(weight=1.0))


def _grpo(c: ConfigDict) -> None:
    c.rollout.advantage = "grpo"
    c.objective.update(aggregate="sequence_means", kl=0.04, reference="model")


def _dr_grpo(c: ConfigDict) -> None:
    c.rollout.advantage = "dr_grpo"
    c.objective.update(aggregate="sums", divisor=float(c.rollout.max_new_tokens))


def _dapo(c: ConfigDict) -> None:
    c.rollout.advantage = "grpo"
    c.rollout.overlong = "leave_out"
    c.objective.update(aggregate="token_mean", clip_high=0.28)


def _gspo(c: ConfigDict) -> None:
    c.rollout.update(advantage="grpo", steps=4)
    # Ratios of whole texts are near 1 (section 5.1).
    c.objective.update(ratio="sequence", aggregate="sequence_means", old="stored")
    c.objective.update(clip_low=3e-4, clip_high=4e-4)


def _rloo(c: ConfigDict) -> None:
    c.rollout.update(advantage="rloo", kl=0.05)
    c.objective.update(aggregate="sums", reference="model")


def _ppo(c: ConfigDict) -> None:
    c.model.heads = "scalar"
    c.init_new = "heads/*"
    c.rollout.update(advantage="gae", samples=1, steps=2, epochs=4, kl=0.05)
    c.objective.update(old="stored", value_weight=0.1, reference="model")


# What follows the colon -> the function that changes the configuration.
SIZES = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "dapo": _dapo,
    "gspo": _gspo,
    "rloo": _rloo,
    "ppo": _ppo,
    "verbalizer": _grpo,
}
