"""How much better a text is than what was to be expected, on numpy arrays.

Letters: P prompts, G texts of each; N texts, T tokens.
"""

import numpy as np

# Of whole texts; "gae" is of tokens, with a critic.
OF_GROUPS = ("grpo", "dr_grpo", "rloo")
EPSILON = 1e-4


def of_groups(rewards_PG: np.ndarray, name: str) -> np.ndarray:
    """The advantage of each text over the others of its prompt, [P, G] f64.

    grpo: (R - mean) / (standard deviation + 1e-4), with G - 1 degrees of freedom (Shao et al. 2024,
      arXiv 2402.03300, section 4.1.2; the number is that of trl).
    dr_grpo: R - mean (Liu et al. 2025, arXiv 2503.20783, section 3.2).
    rloo: R - mean of the others (Ahmadian et al. 2024, arXiv 2402.14740, equation 8).
    """
    rewards_PG = np.asarray(rewards_PG, np.float64)
    count = rewards_PG.shape[1]
    differences_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    if name == "dr_grpo":
        return differences_PG
    if name == "rloo":
        return differences_PG * count / (count - 1)
    assert name == "grpo", name
    return differences_PG / (rewards_PG.std(axis=1, ddof=1, keepdims=True) + EPSILON)


def is_dead(rewards_PG: np.ndarray) -> np.ndarray:
    """Whether all texts of a prompt have the same reward, bool [P]: they say nothing."""
    return np.ptp(rewards_PG, axis=1) == 0


def generalized(
    rewards_NT: np.ndarray,
    values_NT: np.ndarray,
    lengths_N: np.ndarray,
    *,
    gamma: float,
    lam: float,
) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, returns) of tokens, [N, T] f64 each (GAE, Schulman et al. 2016, arXiv
    1506.02438, equation 16).

    With V = 0 behind a text's end, delta_t = r_t + gamma V_t+1 - V_t, and A_t = delta_t + gamma
    lam A_t+1. Returns are A + V. Both are 0 behind a text's end.

    Args:
      rewards_NT, values_NT: of each token; what stands behind a text's end isn't read.
      lengths_N: tokens of each text.
    """
    is_inside_NT = np.arange(rewards_NT.shape[1])[None] < np.asarray(lengths_N)[:, None]
    rewards_NT = np.where(is_inside_NT, rewards_NT, 0.0).astype(np.float64)
    values_NT = np.where(is_inside_NT, values_NT, 0.0).astype(np.float64)

    advantages_NT = np.zeros_like(values_NT)
    next_value_N, next_advantage_N = np.zeros(len(values_NT)), np.zeros(len(values_NT))
    for t in reversed(range(values_NT.shape[1])):
        delta_N = rewards_NT[:, t] + gamma * next_value_N - values_NT[:, t]
        advantage_N = delta_N + gamma * lam * next_advantage_N
        advantages_NT[:, t] = np.where(is_inside_NT[:, t], advantage_N, 0.0)
        next_value_N, next_advantage_N = values_NT[:, t], advantages_NT[:, t]
    return advantages_NT, np.where(is_inside_NT, advantages_NT + values_NT, 0.0)


def whitened(advantages_NT: np.ndarray, weights_NT: np.ndarray) -> np.ndarray:
    """Advantages of mean 0 and variance 1 over the tokens with weight, and 0 elsewhere; the
    variance has one degree of freedom less, and 1e-8 added.
    """
    is_real_NT = np.asarray(weights_NT) > 0
    real = np.asarray(advantages_NT, np.float64)[is_real_NT]
    if len(real) < 2:
        return np.zeros(np.shape(advantages_NT))
    scaled_NT = (advantages_NT - real.mean()) / np.sqrt(real.var(ddof=1) + 1e-8)
    return np.where(is_real_NT, scaled_NT, 0.0)
