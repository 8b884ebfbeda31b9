"""QK-clip (MuonClip; Kimi K2, 2025): a head whose largest attention logit S in a step was above a
threshold t has its queries scaled by (t/S)^α and its keys by (t/S)^(1-α), behind the optimizer's
update.

Heads that share their keys are scaled alike, by the largest S among them, as in Megatron-LM. S is
over all of the global batch: over the micro-batches, and over the ranks that have other sequences
or other parts of one. Tensor ranks have heads of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from megalite.comm.collectives import all_reduce
from megalite.comm.mesh import Mesh
from megalite.config import QKClipConfig
from megalite.engine.buckets import BucketState
from megalite.errors import ConfigError
from megalite.models.core_attention import CoreAttention


@dataclass
class _Attention:
    """The attention of one layer on this rank."""

    core: CoreAttention
    projections: tuple[str, ...]
    """Names of the fused weight, and bias, of queries, keys and values."""
    unit: int
    """Rows of a head."""
    num_heads: int
    num_kv_heads: int

    @property
    def largest(self) -> Tensor:
        assert self.core.largest_logits is not None
        return self.core.largest_logits


class QKClip:
    """Note the attention logits of the models' layers, and scale their projections of queries and
    keys."""

    def __init__(
        self,
        config: QKClipConfig,
        models: Sequence[nn.Module],
        buckets: Sequence[BucketState],
        mesh: Mesh,
    ):
        """Take the `buckets` that hold the models' weights. Raises ConfigError where attention has
        no fused projection of queries, keys and values, called `qkv` beside its `core`."""
        self._config, self._mesh = config, mesh
        rows = {slot.weight.name: slot.weight for bucket in buckets for slot in bucket.layout.slots}
        self._attentions = []
        for model in models:
            for name, core in model.named_modules():
                if not isinstance(core, CoreAttention):
                    continue
                qkv = name.rpartition(".")[0] + ".qkv"
                weight = rows.get(f"{qkv}.weight")
                if weight is None or weight.shard != "column" or len(weight.parts) != 3:
                    raise ConfigError(
                        f"optimizer.qk_clip: {name} has no {qkv}.weight of queries, keys and values"
                    )
                heads, groups = (
                    part // weight.unit // mesh.tensor.size for part in weight.parts[:2]
                )
                core.largest_logits = torch.full((heads,), -torch.inf, device=mesh.device)
                projections = tuple(
                    each for each in (f"{qkv}.weight", f"{qkv}.bias") if each in rows
                )
                self._attentions.append(_Attention(core, projections, weight.unit, heads, groups))
        self._scales: dict[str, Tensor] = {}  # of each local row of queries and keys

    def begin(self) -> None:
        """Begin a step: forget the logits of the one before."""
        for attention in self._attentions:
            attention.largest.fill_(-torch.inf)

    def find_scales(self, permitted: Tensor) -> None:
        """Find how the step's logits ask to scale; by 1 where it is not `permitted`, bool []. All
        ranks call it."""
        if not self._attentions:
            return
        whole = torch.cat([attention.largest for attention in self._attentions])
        all_reduce(whole, self._mesh.replicas, dist.ReduceOp.MAX)
        alpha = self._config.alpha
        sizes = [attention.num_heads for attention in self._attentions]
        for attention, largest in zip(self._attentions, whole.split(sizes), strict=True):
            attention.largest.copy_(largest)
            # [G]: heads of a group lie side by side, H = G · (H/G), as grouped-query attention
            # shares keys.
            of_group = largest.view(attention.num_kv_heads, -1).amax(1)
            # -inf: a layer that saw no token. inf or NaN: a step that the guard refuses anyhow.
            is_above = permitted & (of_group > self._config.threshold) & of_group.isfinite()
            ratio = torch.where(is_above, self._config.threshold / of_group, 1.0)
            per_group = attention.num_heads // attention.num_kv_heads
            # [H + G]: first the queries' heads, then the keys'. Values come behind these in the
            # fused weight and are not scaled, which is why `scale_` stops after len(scales) rows.
            of_heads = torch.cat(
                ((ratio**alpha).repeat_interleave(per_group), ratio ** (1 - alpha))
            )
            scales = of_heads.repeat_interleave(attention.unit)
            self._scales |= dict.fromkeys(attention.projections, scales)

    def scale_(self, bucket: BucketState) -> None:
        """Scale what this rank has updated of the queries and keys in a bucket."""
        first = bucket.stepped.start
        for slot in bucket.layout.slots:
            scales = self._scales.get(slot.weight.name)
            if scales is None:
                continue
            width = slot.weight.row_shape[0] if slot.weight.row_shape else 1
            # Rows of queries and keys only, and of these what this rank's optimizer has updated: a
            # shard may begin and end anywhere, also within a row.
            start, stop = (
                max(slot.start, first),
                min(slot.start + len(scales) * width, bucket.stepped.stop),
            )
            if start < stop:
                part = bucket.master[start - first : stop - first]
                scale_rows_(part, scales, width, start - slot.start)
                bucket.held(start, stop).copy_(part)


def scale_rows_(flat: Tensor, scales: Tensor, width: int, offset: int) -> None:
    """Multiply rows of `width` elements by their `scales`, in place. `flat` holds the elements from
    `offset` on, and may begin and end within a row."""
    while len(flat):
        # Up to three pieces: the rest of a row that is begun, whole rows at once, the begin of the
        # last.
        row, inside = divmod(offset, width)
        count = len(flat) // width if inside == 0 else 0
        if count:
            length = count * width
            flat[:length].view(count, width).mul_(scales[row : row + count, None])
        else:
            length = min(width - inside, len(flat))
            flat[:length].mul_(scales[row])
        flat, offset = flat[length:], offset + length
