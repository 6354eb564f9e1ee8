"""What the metrics of evals are: which way is better, which ones stand for an eval, what is a
metric's baseline.
"""

from collections.abc import Sequence

# Metrics that say how good a model is, by the way that is better.
HIGHER = frozenset(
    "accuracy macro_f1 micro_f1 weighted_f1 balanced_accuracy mcc kappa auroc auroc_ovo "
    "confidence_auroc selective_accuracy label_mass train_accuracy greedy_accuracy "
    "exact_match f1 rouge1 rouge2 rougeL rougeLsum bleu bleu_lc chrf chrf++ acc "
    "acc_norm reward".split()
)
LOWER = frozenset(
    "loss perplexity pseudo_perplexity word_perplexity byte_perplexity bits_per_byte nll brier ece "
    "ece_equal_mass classwise_ece ter".split()
)
# The same metric of other predictions: after a correction, by another norm, over variants.
OF_OTHER_PREDICTIONS = (
    "content_free domain pmi_dc batch temperature token char byte pmi mean min max".split()
)

# A metric by which a kind of eval is known -> the metrics that stand for it, the most important
# first. In order: label words, several choices, a single choice, perplexity.
HEADLINES = {
    "majority_accuracy": ("accuracy", "accuracy_mean", "nll"),
    "chance": ("accuracy", "accuracy_char"),
    "greedy_accuracy": ("accuracy", "perplexity"),
    "xz_bits_per_byte": ("bits_per_byte", "perplexity"),
}
# (metric, the metric that is its baseline, what that is)
BASELINES = (
    ("accuracy", "majority_accuracy", "majority label"),
    ("accuracy", "chance", "chance"),
    ("accuracy_char", "chance", "chance"),
    ("bits_per_byte", "xz_bits_per_byte", "xz -9e"),
)
# Metrics that say how much was evaluated and how that went, not how good the model is.
SIDE_METRICS = (
    "examples",
    "cut",
    "empty",
    "unmatched",
    "tokens",
    "bytes",
    "documents",
    "seconds",
)


def is_higher_better(metric: str) -> bool | None:
    """Whether more of a metric is better; None if it doesn't say how good a model is.

    Args:
      metric: its name in an eval; one of lm_eval has the task before it and the filter behind it,
        TASK/METRIC,FILTER.
    """
    name = metric.rpartition("/")[2].partition(",")[0]
    for suffix in OF_OTHER_PREDICTIONS:
        if name not in HIGHER | LOWER:
            name = name.removesuffix(f"_{suffix}")
    if name in HIGHER:
        return True
    return False if name in LOWER else None


def check_best(
    best: str,
    metrics_of_evals: dict[str, Sequence[str] | None],
    key: str = "config.checkpoint.best",
) -> bool:
    """Returns whether the highest value of a metric is the best one.

    Args:
      best: "eval/NAME/METRIC".
      metrics_of_evals: NAME -> the metrics that it yields; None: they are known when it has run.
      key: what names the metric, for messages.

    Raises:
      ValueError: no such eval, or none of its metrics by which models are compared.
    """
    prefix, _, path = best.partition("/")
    for name, metrics in metrics_of_evals.items():
        if prefix != "eval" or not path.startswith(f"{name}/"):
            continue
        metric = path.removeprefix(f"{name}/")
        is_higher = is_higher_better(metric)
        if is_higher is not None and (metrics is None or metric in metrics):
            return is_higher
        comparable = [m for m in metrics or () if is_higher_better(m) is not None]
        valid = f"valid: {comparable}" if metrics is not None else "wanted one such as acc,none"
        raise ValueError(
            f"{key} = {best!r}: {metric!r} is no metric of config.evals.{name} "
            f"by which models are compared; {valid}"
        )
    examples = [f"eval/{name}/{m[0]}" for name, m in metrics_of_evals.items() if m]
    raise ValueError(f"{key} = {best!r} is not a metric of config.evals; such as {examples}")
