"""Divergence from a teacher of whose distributions only the likeliest tokens are known, and what all
others have together (`divergence.py` has the rest).

Distributions are compared as those of K + 1 events: each of the K tokens, and "any other token".
That is never more than the divergence of the whole distributions, and equal to it where K is the
whole vocabulary. (Taking the K tokens alone for the whole distribution would be biased: the student
would learn that nothing else can be said.)

Letters in shapes: N tokens, V vocabulary columns of this rank, K likeliest tokens of the teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.comm.collectives import all_gather
from megalite.comm.mesh import Axis
from megalite.kernels.divergence import Columns, Divergence, Found, score
from megalite.kernels.loss import cross_entropy_backward_, cross_entropy_forward

NOTHING = -1e30
"""Log-probability of what cannot be. Finite: differences of two of them are no NaN."""


class TopTokens(NamedTuple):
    """The teacher's likeliest tokens at the temperature: K of them at each place [...]."""

    ids: Tensor
    """[...,K] integers, numbers in the vocabulary."""
    log_p: Tensor
    """[...,K], log-probability of each."""
    rest: Tensor
    """[...], log-probability of all other tokens together."""

    def normalised(self) -> TopTokens:
        """Return the same in fp32, as a distribution: rounded to few bits, it does not add up to
        1."""
        log_p, rest = self.log_p.float(), self.rest.float()
        total = torch.cat((log_p, rest[..., None]), -1).logsumexp(-1)
        log_p, rest = log_p - total[..., None], rest - total
        return TopTokens(self.ids, log_p.clamp(min=NOTHING), rest.clamp(min=NOTHING))


class TopComparison(NamedTuple):
    """Compares with the teacher's likeliest tokens, a `divergence.Comparison`. Tensor ranks send a
    few numbers a token, not K."""

    top: TopTokens
    """Of all rows: [N,K]; normalised."""
    columns: Columns
    wanted: Divergence

    def compare(self, student_NV: Tensor, labels_N: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """Return what is found of some rows; see `Comparison`."""
        columns, wanted = self.columns, self.wanted
        lse_N, target_N = cross_entropy_forward(
            student_NV, labels_N, columns.first, columns.num_valid
        )
        scaled, place, is_here = self._scaled(student_NV, rows)
        others = scaled.scatter(1, place, -torch.inf).logsumexp(1).clamp(min=NOTHING)
        lse = torch.cat((lse_N, scaled.logsumexp(1), others))
        if columns.combine:
            padded = F.pad(target_N, (0, 2 * len(target_N)))
            lse, target = columns.combine(lse, padded)
            target_N = target[: len(target_N)]
        lse_N, of_student, of_others = lse.view(3, -1)
        log_q, log_p = scaled.gather(1, place) - of_student[:, None], self.top.log_p[rows]
        of_tokens = _means(log_p, log_q.masked_fill(~is_here, 0.0), wanted).masked_fill(~is_here, 0)
        own, other = columns.sum(of_tokens.sum(2)).unbind()
        # All ranks know of the other tokens: they are counted once, behind the sum over the ranks.
        of_rest = _means(self.top.rest[rows], of_others - of_student, wanted)
        return Found(lse_N, target_N, own + of_rest[0], other + of_rest[1], of_student, of_others)

    def gradient_(
        self, student_NV: Tensor, labels_N: Tensor, rows: slice, found: tuple[Tensor, ...]
    ) -> None:
        """Overwrite logits with their gradient; see `Comparison`."""
        columns, wanted, of_rows = self.columns, self.wanted, Found(*found)
        scaled, place, _ = self._scaled(student_NV, rows)
        log_p, rest = self.top.log_p[rows], self.top.rest[rows]
        log_q = scaled - of_rows.student[:, None]
        log_q_top = log_q.gather(1, place)
        if wanted.kind == "forward_kl":
            # What the teacher gives to all others, it gives to each as the student does.
            grad = log_q.exp() - (scaled - of_rows.teacher[:, None] + rest[:, None]).exp()
            grad.scatter_(1, place, log_q_top.exp() - log_p.exp())
        else:
            of_rest = score(of_rows.teacher - of_rows.student, rest, wanted) - of_rows.own
            of_top = score(log_q_top.clamp(min=NOTHING), log_p, wanted) - of_rows.own[:, None]
            grad = log_q.exp() * of_rest[:, None]
            grad.scatter_(1, place, log_q_top.exp() * of_top)
        grad *= wanted.weight * wanted.temperature  # T² of the loss, 1/T of the logits
        plain = torch.full_like(of_rows.lse, 1 - wanted.weight)
        cross_entropy_backward_(
            student_NV, labels_N, of_rows.lse, plain, columns.first, columns.num_valid
        )
        student_NV[:, : columns.num_common] += grad[:, :-1]

    def _scaled(self, student_NV: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return the common columns at the temperature with one more, -inf, fp32; for each of the
        teacher's tokens its column, which is that last one where another rank has the token; and
        whether it is here, both [N,K]."""
        first, count = self.columns.first, self.columns.num_common
        scaled = F.pad(
            student_NV[:, :count].float() / self.wanted.temperature, (0, 1), value=-torch.inf
        )
        place = self.top.ids[rows].long() - first
        is_here = (place >= 0) & (place < count)
        return scaled, place.masked_fill(~is_here, count), is_here


def _means(log_p: Tensor, log_q: Tensor, wanted: Divergence) -> Tensor:
    """Return what events of the teacher's log-probability p and the student's q add to `own` and
    `other` of `Found`: [2,…]."""
    nothing = torch.zeros_like(log_p)
    if wanted.kind == "forward_kl":
        return torch.stack((nothing, log_p.exp() * (log_p - log_q)))
    own = log_q.exp() * score(log_q, log_p, wanted)
    if wanted.kind == "reverse_kl":
        return torch.stack((own, nothing))
    return torch.stack((own, log_p.exp() * score(log_p, log_q, wanted)))


@torch.no_grad()
def top_tokens(
    logits_NV: Tensor, count: int, temperature: float, first: int, num_valid: int, axis: Axis
) -> TopTokens:
    """Return the `count` likeliest tokens of each row, the likeliest first, of logits in vocabulary
    shards: the same on every tensor rank. The columns from `first` are this rank's, `num_valid` of
    them are real."""
    scaled = F.pad(
        logits_NV[:, :num_valid].float() / temperature,
        (0, logits_NV.shape[1] - num_valid),
        value=-torch.inf,
    )
    found, place = scaled.topk(min(count, scaled.shape[1]))
    candidates = all_gather(found.contiguous(), axis, 1)
    ids = all_gather((place + first).contiguous(), axis, 1)
    logits, chosen = candidates.topk(count)
    ids = ids.gather(1, chosen)
    own = ids - first
    is_here = (own >= 0) & (own < num_valid)
    padded = F.pad(scaled, (0, 1), value=-torch.inf)
    outside = padded.scatter(1, own.masked_fill(~is_here, scaled.shape[1]), -torch.inf)
    both = torch.stack((padded.logsumexp(1), outside.logsumexp(1)), 1)  # of this rank's columns
    # [ranks, N, 2]: log-sum-exps of parts add up by another one.
    lse, rest = all_gather(both[None].contiguous(), axis, 0).logsumexp(0).unbind(1)
    return TopTokens(ids, logits - lse[:, None], rest - lse)
