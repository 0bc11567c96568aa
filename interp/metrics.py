"""Metrics of patched runs: one number from the logits after the last move, of one run or of many at once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Metric = Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, ""] | float]


@dataclass(frozen=True)
class LastMetric:
    """A metric that looks at the last position only, so that a sweep scores all its rows at once.

    `score(logits [*run d_vocab], *values)` gives [*run]. Each of `values` has one entry a pair along its
    first axis, or one entry for all pairs. Called with the logits of one run, [1 pos d_vocab], it is a metric
    like any other.

    Example:
        >>> import torch
        >>> top = LastMetric(lambda logits: logits.max(-1).values)
        >>> top(torch.eye(3)[None])
        tensor(1.)
    """

    score: Callable[..., Tensor]
    values: tuple[Tensor, ...] = ()

    def __call__(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, ""]:
        if len(logits) != 1 or any(len(value) > 1 for value in self.values):
            raise ValueError(
                f"a metric of {max(map(len, self.values), default=1)} pairs was called with the logits of "
                f"{len(logits)} runs, but a call scores one run of one pair: use `rows` for many, and "
                "`of_pairs` to choose a pair."
            )
        return self.score(logits[0, -1], *(value[0].to(logits.device) for value in self.values))

    def rows(self, logits: Float[Tensor, "pair row d_vocab"]) -> Float[Tensor, "pair row"]:
        """The metric of many runs of each pair, from their logits after the last move."""
        return self.score(logits, *(value[:, None].to(logits.device) for value in self.values))

    def check(self, n_pairs: int) -> None:
        """Raises ValueError unless each of the values has one entry, or one a pair."""
        for value in self.values:
            if len(value) not in (1, n_pairs):
                raise ValueError(
                    f"the metric was made for {len(value)} pairs, but {n_pairs} are swept: each pair would be "
                    "scored by the values of another. Make it from the same pairs, in the same order."
                )

    def of_pairs(self, pairs: Int[Tensor, " pair"]) -> "LastMetric":
        """The metric of some of the pairs."""
        values = (
            value if len(value) == 1 else value[pairs.to(value.device)] for value in self.values
        )
        return LastMetric(self.score, tuple(values))


def patching_metric(
    clean_logits: Float[Tensor, "pair pos d_vocab"],
    corrupted_logits: Float[Tensor, "pair pos d_vocab"],
    token: int | Int[Tensor, " pair"],
) -> LastMetric:
    """A metric that is 1 at the clean log-probability of `token` and 0 at the corrupted one.

    It is linear in the log-probability of the token after the last move, so it may leave [0, 1]. It takes
    logits; log-probabilities give the same.

    Args:
        clean_logits: of one pair or of many; only the last position counts, so it may come alone.
        token: one for all pairs, or one a pair.

    Raises:
        ValueError: both runs give the token the same log-probability, but for rounding, so there is nothing
            to recover.

    Source: ARENA 1.5.3, section 2, whose `patching_metric` closes over global variables.
    """
    tokens = _one_each(token, clean_logits)
    clean, corrupted = (
        _log_prob(logits[:, -1], tokens) for logits in (clean_logits, corrupted_logits)
    )
    # Rounding differs between a run alone and in a batch; in float32 this is 3e-4 nats.
    rounding = torch.finfo(clean.dtype).eps ** 0.5
    same = torch.isclose(clean, corrupted, rtol=0, atol=rounding).nonzero()
    if len(same):
        pair = int(same[0])
        raise ValueError(
            f"pair {pair}: token {int(tokens[pair])} has log-probability {clean[pair].item():.4f} in both "
            "runs. Choose a token that the last move makes more or less likely."
        )

    def restored(logits: Tensor, tokens: Tensor, clean: Tensor, corrupted: Tensor) -> Tensor:
        return (_log_prob(logits, tokens) - corrupted) / (clean - corrupted)

    return LastMetric(restored, (tokens, clean, corrupted))


def log_probability(token: int | Int[Tensor, " pair"]) -> LastMetric:
    """The log-probability of `token`, in nats."""
    return LastMetric(_log_prob, (torch.as_tensor(token).reshape(-1),))


def logit_difference(
    token: int | Int[Tensor, " pair"], other: int | Int[Tensor, " pair"]
) -> LastMetric:
    """By how much the logit of `token` exceeds that of `other`."""
    tokens = (torch.as_tensor(t).reshape(-1) for t in (token, other))
    return LastMetric(lambda logits, a, b: _at(logits, a) - _at(logits, b), tuple(tokens))


def kl_divergence(reference_logits: Float[Tensor, "pair pos d_vocab"]) -> LastMetric:
    """KL(reference || run) of the move's distribution, in nats; 0 where the run agrees with the reference."""

    def divergence(logits: Tensor, reference: Tensor) -> Tensor:
        return (reference.exp() * (reference - logits.log_softmax(-1))).sum(-1)

    return LastMetric(divergence, (reference_logits[:, -1].log_softmax(-1),))


def probability_mass(tokens: Bool[Tensor, "pair d_vocab"] | Bool[Tensor, " d_vocab"]) -> LastMetric:
    """The probability that the run gives to a set of tokens, for instance to all legal replies."""

    def mass(logits: Tensor, chosen: Tensor) -> Tensor:
        return (logits.softmax(-1) * chosen).sum(-1)

    return LastMetric(mass, (torch.atleast_2d(tokens),))


def _one_each(token: int | Tensor, logits: Float[Tensor, "pair pos d_vocab"]) -> Tensor:
    return torch.as_tensor(token, device=logits.device).reshape(-1).expand(len(logits))


def _log_prob(logits: Float[Tensor, "*run d_vocab"], token: Tensor) -> Float[Tensor, "*run"]:
    return _at(logits.log_softmax(-1), token)


def _at(values: Float[Tensor, "*run d_vocab"], token: Tensor) -> Float[Tensor, "*run"]:
    return values.gather(-1, token.expand(values.shape[:-1])[..., None])[..., 0]
