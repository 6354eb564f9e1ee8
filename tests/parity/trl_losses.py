"""Losses of preference and policy training as trl computes them: the methods of its trainers,
called on a trainer that was never set up, with a stand-in for the model which gives completions
prescribed log-probabilities; those of preferences for one example at a time. All is f64, where trl
does not cast.
"""

import collections
import types

import numpy as np
import torch
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer


def values(loss, *scores):
    """(losses, a gradient for each of the scores), by loss(i, the f64 scores of example i)."""
    rows = []
    for i, row in enumerate(zip(*scores)):
        row_scores = torch.tensor(row, dtype=torch.float64, requires_grad=True)
        value = loss(i, row_scores)
        value.backward()
        rows.append([value.item(), *row_scores.grad.tolist()])
    return tuple(np.array(rows).T)


def uninitialized(trainer_class, **attributes):
    """A trainer with the attributes that its loss reads, and no more."""
    trainer = object.__new__(trainer_class)
    trainer.accelerator = types.SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    trainer.model = types.SimpleNamespace(training=False)
    trainer.aux_loss_enabled = False
    trainer._metrics = dict(eval=collections.defaultdict(list))
    trainer._total_train_tokens = 0
    vars(trainer).update(attributes)
    return trainer


# --- texts and models ---


def texts(lengths, prefix=""):
    """A prompt of one token, 0, and completions of so many 1s. The tokens are their own mask."""
    steps = torch.arange(max(lengths) + 1)
    is_inside = steps <= torch.tensor(lengths)[:, None]
    tokens = ((steps > 0) & is_inside).long()
    return {
        f"{prefix}input_ids": tokens,
        f"{prefix}attention_mask": is_inside.long(),
        f"{prefix}completion_mask": tokens,
    }


def fused_output(scores, labels):
    """What trl's head returns of a model that gives completions these summed log-probabilities."""
    is_scored = labels[:, 1:] != -100
    log_probs = (scores / is_scored.sum(1))[:, None] * is_scored
    zeros = torch.zeros_like(log_probs)
    return types.SimpleNamespace(
        log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
    )


def logits_output(scores, lengths, num_steps):
    """The same as logits of the two tokens."""
    log_p = scores / torch.tensor(lengths)
    logits = torch.stack([torch.log(-torch.expm1(log_p)), log_p], dim=-1)
    return types.SimpleNamespace(logits=logits[:, None].expand(-1, num_steps, -1))


# --- losses ---


def dpo(pairs, i, scores, **attributes):
    """DPOTrainer's of pair i, whose (chosen, rejected) have the scores."""
    inputs = texts([int(pairs.chosen_tokens[i]), int(pairs.rejected_tokens[i])])
    inputs["ref_chosen_logps"] = torch.tensor(pairs.chosen_reference[i : i + 1]).double()
    inputs["ref_rejected_logps"] = torch.tensor(pairs.rejected_reference[i : i + 1]).double()
    trainer = uninitialized(
        DPOTrainer,
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        use_weighting=False,
        **attributes,
    )
    model = lambda labels, **batch: fused_output(scores, labels)
    return trainer._compute_loss(model, inputs, return_outputs=False)


def reference_free(trainer_class, pairs, i, scores, **attributes):
    """CPOTrainer's or ORPOTrainer's of pair i."""
    lengths = [int(pairs.chosen_tokens[i]), int(pairs.rejected_tokens[i])]
    batch = texts(lengths[:1], "chosen_") | texts(lengths[1:], "rejected_")
    for side in ("chosen", "rejected"):
        mask = batch.pop(f"{side}_completion_mask")
        batch[f"{side}_labels"] = batch[f"{side}_input_ids"].masked_fill(mask == 0, -100)
    trainer = uninitialized(
        trainer_class, is_encoder_decoder=False, padding_value=0, pad_token_id=0, **attributes
    )
    model = lambda input_ids, **unused: logits_output(scores, lengths, input_ids.shape[1])
    loss, metrics = trainer.get_batch_loss_metrics(model, batch, "eval")
    return loss


def pair_values(pairs, *, name, beta, label_smoothing=0.0, margin=0.0):
    """(losses, gradients of chosen, gradients of rejected).

    trl's "sigmoid" knows no label smoothing, but its "aot" of a batch of one pair, where there is
    nothing to sort, is cDPO. Its NLL of ORPO is a mean over the prompt too, without the first
    token: of prompts of one token it is that of the completion.
    """
    if name == "orpo":
        loss = lambda i, scores: reference_free(ORPOTrainer, pairs, i, scores, beta=beta)
    elif name == "simpo":
        options = dict(loss_type="simpo", beta=beta, simpo_gamma=margin, label_smoothing=0.0)
        options |= dict(cpo_alpha=0.0, alpha=0.0)
        loss = lambda i, scores: reference_free(CPOTrainer, pairs, i, scores, **options)
    else:
        loss_type = dict(dpo="aot" if label_smoothing else "sigmoid").get(name, name)
        options = dict(loss_types=[loss_type], beta=beta, label_smoothing=label_smoothing)
        loss = lambda i, scores: dpo(pairs, i, scores, **options)
    return values(loss, pairs.chosen, pairs.rejected)


def odds_ratio_values(chosen, rejected):
    """[loss, gradient of chosen, gradient of rejected] of the part of ORPO beside the NLL, by
    average log-probabilities in f32.
    """
    scores = torch.tensor([chosen, rejected], requires_grad=True)
    trainer = uninitialized(ORPOTrainer, beta=1.0)
    value = -trainer.odds_ratio_loss(scores[:1], scores[1:])[0].sum()
    value.backward()
    return [value.item(), *scores.grad.tolist()]


def kto(length, score, reference, is_desirable, kl_scores, **attributes):
    """(KTOTrainer's of one completion, the z0 it takes). kl_scores: those of three mismatched
    completions under the policy; the reference gives them 0.
    """
    inputs = texts([length]) | texts([4, 1, 2], "KL_")
    inputs |= dict(
        label=torch.tensor([bool(is_desirable)]),
        ref_logps=torch.tensor([reference]).double(),
        ref_KL_logps=torch.zeros(3),
    )
    scores_of = {1: score, 3: torch.tensor(kl_scores)}
    model = lambda labels, **batch: fused_output(scores_of[len(labels)], labels)
    trainer = uninitialized(
        KTOTrainer, loss_type="kto", calculate_KL=True, precompute_ref_logps=True, **attributes
    )
    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    return loss, trainer._metrics["eval"]["kl"][0]


def reward(scores, margin, centring):
    """RewardTrainer's of one pair; None for no margin, or no centring."""
    args = types.SimpleNamespace(center_rewards_coefficient=centring)
    output = types.SimpleNamespace(logits=scores[:, None])
    inputs = {} if margin is None else dict(margin=torch.tensor([margin]))
    return uninitialized(RewardTrainer, args=args).compute_loss(lambda **batch: output, inputs)


def policy(texts, *, importance_cap, **attributes):
    """(GRPOTrainer's loss of texts, its gradient for their log-probabilities [B, T], metrics).

    Args:
      texts: logprobs, old, sampled, reference, weights [B, T]; advantages [B].
    """
    arrays = {name: torch.tensor(np.asarray(array)).double() for name, array in texts.items()}
    logprobs = arrays["logprobs"].requires_grad_()
    mask = arrays["weights"]
    tokens = mask.long()
    inputs = dict(
        prompt_ids=tokens[:, :0],
        prompt_mask=tokens[:, :0],
        completion_ids=tokens,
        completion_mask=tokens,
        advantages=arrays["advantages"],
        old_per_token_logps=arrays["old"],
        ref_per_token_logps=arrays["reference"],
        importance_sampling_ratio=torch.exp(arrays["old"] - arrays["sampled"]).clamp(
            max=importance_cap or 1.0
        ),
        num_items_in_batch=mask.sum(),
    )
    trainer = uninitialized(
        GRPOTrainer,
        args=types.SimpleNamespace(delta=None, use_bias_correction_kl=False),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=bool(importance_cap),
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        **attributes,
    )
    trainer.accelerator.num_processes = 1
    trainer.accelerator.reduce = lambda x, reduction: x
    found = lambda *args, **options: (logprobs, torch.zeros_like(logprobs), None)
    trainer._get_per_token_logps_and_entropies = found
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), logprobs.grad.numpy(), trainer._metrics["eval"]
