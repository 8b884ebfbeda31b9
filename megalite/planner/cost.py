"""Predicts the time of one layer, of the embedding and of the head on one rank, for one
micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, comb

from megalite.parallel.expert import goes_to_all
from megalite.parallel.stage import TILE
from megalite.planner.kernels import Kernels
from megalite.planner.network import Group, Network
from megalite.planner.shapes import LayerShapes, Matrix, Shapes

ACCUMULATE_BYTES, FUSED_ACCUMULATE_BYTES = 10, 8
"""Bytes per element to add a weight's bf16 gradient to its fp32 sum: read 2 + 4, write 4. In the
weight-gradient GEMM's own epilogue: read 4, write 4."""

DEQUANTISE_BYTES = 26
"""Bytes per element to dequantise a matrix in torch: of NF4 the codes, int64 for two of them, written
and read; their fp32 numbers, written, scaled, read and rounded."""


UNEVEN = 1.15
"""Attention of the busiest context rank over the mean, where packed rows are cut and not their
documents: of 4 and 8 ranks over rows of 8,192 tokens of source files, by
tools/bench/context_balance.py."""


def optimizer_bytes(params: float, states: float) -> float:
    """Return the bytes that an optimizer moves to update `params` elements with `states` elements
    of fp32 states.

    The norm reads the gradient. The update, in one pass, reads gradient, master and states, and
    writes master, states and the bf16 weight."""
    norm, read, written = 4 * params, 4 * (2 * params + states), 4 * (params + states) + 2 * params
    return norm + read + written


@dataclass(frozen=True)
class PassTimes:
    """Holds the seconds of the passes of a part of the model, exposed communication included."""

    forward: float
    backward: float
    backward_input: float
    """The half of a zero-bubble schedule's backward pass that the pipeline waits for."""
    backward_weight: float
    """The other half: weight gradients."""
    tensor_bytes: float
    """Bytes sent by this rank within its tensor group, in a forward and a backward pass."""
    context_bytes: float = 0.0
    """The same within its context group."""
    expert_bytes: float = 0.0
    """The same to experts of other ranks, and between the ranks that share an expert."""

    def __add__(self, other: PassTimes) -> PassTimes:
        names = self.__dataclass_fields__
        return PassTimes(*(getattr(self, name) + getattr(other, name) for name in names))

    def __mul__(self, count: int) -> PassTimes:
        names = self.__dataclass_fields__
        return PassTimes(*(getattr(self, name) * count for name in names))

    def beyond(self, work: PassTimes) -> PassTimes:
        """Return these times of messages as far as they are longer than those of the work beside
        them."""
        return replace(
            self,
            forward=max(0.0, self.forward - work.forward),
            backward=max(0.0, self.backward - work.backward),
            backward_input=max(0.0, self.backward_input - work.backward_input),
        )


NOTHING = PassTimes(0.0, 0.0, 0.0, 0.0, 0.0)


class Costs:
    """Computes pass times of one rank's shapes on given hardware."""

    def __init__(self, shapes: Shapes, kernels: Kernels, network: Network, products_add: bool):
        """Take the rank's `shapes`, the chip's `kernels` and the `network` between ranks.

        `products_add`: weight-gradient GEMMs accumulate into the fp32 gradient themselves."""
        self.shapes = shapes
        self.kernels = kernels
        self.network = network
        self._products_add = products_add
        self._product_add_bytes = FUSED_ACCUMULATE_BYTES if products_add else ACCUMULATE_BYTES
        self._whole = shapes.tokens * shapes.hidden * shapes.element
        """Bytes of the hidden states of all of this rank's tokens, not split by sequence
        parallelism."""

    def layer(self, layer: LayerShapes, recompute: str) -> PassTimes:
        """Return the times of one layer. `recompute` is the setting train.recompute."""
        if layer.is_source and self.shapes.tokens != layer.tokens:
            # Of another sequence than the decoder's, as its tokens are all that is else.
            return Costs(layer, self.kernels, self.network, self._products_add).layer(
                layer, recompute
            )
        total = NOTHING
        for matrix in layer.matrices:
            total += self._product(matrix)
        size = sum(matrix.elements for matrix in layer.matrices)
        accumulation = self._accumulation(size, self._product_add_bytes)
        total += self._attention(layer) + self._elementwise(layer) + accumulation
        total += self._entering_keys(layer)
        dispatch = self._dispatch(layer)
        total += dispatch.beyond(total) if self.kernels.software.hides_experts else dispatch
        if layer.quantised:
            # For the product of each pass.
            held = [matrix for matrix in layer.matrices if matrix.is_linear]
            elements = sum(matrix.elements for matrix in held)
            dense = self.kernels.memory(float(elements * DEQUANTISE_BYTES), len(held))
            total += PassTimes(dense, dense, dense, 0.0, 0.0)
        activation, _ = self._activation(layer)
        # Recomputation happens within the backward pass, and delays the input's gradient as well.
        software = self.kernels.software
        last_product = self._product(layer.matrices[-1]).forward if software.stops_early else 0.0
        some = software.selective_products * sum(
            self._product(matrix).forward for matrix in layer.matrices
        )
        if layer.writes_scores:
            some += self._attention(layer).forward
        again = {"none": 0.0, "selective": activation + some, "full": total.forward - last_product}[
            recompute
        ]
        # What is computed again ends with what the last product is computed from, where no rows of
        # other ranks' experts are added behind it.
        is_last = layer.matrices[-1].reduces and not dispatch.expert_bytes
        last = self._leave_bytes(self._whole) if is_last else 0.0
        sent_again = self._forward_tensor_bytes(layer) - last if recompute == "full" else 0.0
        to_experts = total.expert_bytes / 2 if recompute == "full" else 0.0
        return total + PassTimes(0.0, again, again, 0.0, sent_again, expert_bytes=to_experts)

    def embedding(self) -> PassTimes:
        """Return the times of the embedding, its reduction over the tensor ranks included."""
        shapes = self.shapes
        table = shapes.vocab * shapes.hidden
        # Vocabulary parallelism also zeroes the rows of tokens that other ranks look up.
        passes = 2 + (4 if shapes.tensor > 1 else 0)
        both = self._whole * (shapes.tokens + shapes.source_tokens) / shapes.tokens
        looked_up = passes * both
        forward = self.kernels.memory(looked_up, 4) + self._leave(both)
        if shapes.frozen:
            return PassTimes(forward, 0.0, 0.0, 0.0, self._leave_bytes(both))
        # The gradient is a zeroed table that rows are added to.
        zeroed = table * shapes.element
        backward = self.kernels.memory(looked_up + zeroed, 4) + self._gather_back(both)
        times = PassTimes(forward, backward, 0.0, backward, 2 * self._sent(both))
        return times + self._accumulation(table, ACCUMULATE_BYTES)

    def end(self) -> PassTimes:
        """Return the times of what is behind the layers: the head, and the look-ups of tokens for
        predictors."""
        return self.head() + self.embedding() * self.shapes.predictors

    def head(self) -> PassTimes:
        """Return the times of the last norm, the head and the loss."""
        shapes = self.shapes
        memory = self.kernels.memory
        tokens = shapes.mean_head_tokens
        if tokens < shapes.tokens:
            # Of each slice of the sequence they are filled up to whole tiles.
            slices = shapes.tensor if shapes.sequence else 1
            tokens = min(slices * TILE * ceil(tokens / (slices * TILE)), shapes.tokens)
        logit_bytes = tokens * shapes.vocab * shapes.element / 2
        chunks = -(-tokens // (shapes.loss_chunk or tokens))
        loss_forward, loss_backward = (
            count * logit_bytes for count in self.kernels.software.loss_bytes
        )
        # The loss all-reduces each rank's log-sum-exp for the maximum, then its share of the sum
        # and the label's logit.
        agree = 0.0
        for bytes_a_token in (4.0, 8.0):
            agree += self.network.all_reduce(bytes_a_token * tokens, self.network.tensor)
        # The norm reads and writes hidden states. Its backward pass reads the gradient and its
        # input, and writes.
        norm_forward = memory(2 * shapes.hidden_bytes, 1)
        norm_backward = memory(3 * shapes.hidden_bytes, 2)
        forward = memory(loss_forward, 7 + chunks) + norm_forward + agree
        backward = memory(loss_backward, 2 + chunks) + norm_backward
        # 12 bytes a token: the 4 and the 8 above; an all-reduce sends them twice.
        around = PassTimes(forward, backward, backward, 0.0, 2 * self._sent(12.0 * tokens))
        elements = shapes.vocab * shapes.hidden
        if shapes.loss_chunk is not None:
            return around + self._chunked_product(shapes.loss_chunk, chunks)
        share = tokens / shapes.tokens
        # Only what is to be predicted goes into the head.
        size = shapes.vocab, shapes.hidden
        matrix = Matrix(*size, gathers=True, reduces=False, used=share, sent=share)
        return (
            around + self._product(matrix) + self._accumulation(elements, self._product_add_bytes)
        )

    def _chunked_product(self, chunk: int, chunks: int) -> PassTimes:
        """Return the times of a head that computes `chunks` chunks of `chunk` tokens.

        The backward pass computes the logits again and defers no weight gradient. Nothing runs
        beside the messages."""
        shapes = self.shapes
        product = self.kernels.product
        forward = chunks * product(chunk, shapes.vocab, shapes.hidden)
        gradients = product(chunk, shapes.hidden, shapes.vocab)
        added = 0.0
        if not shapes.frozen:
            gradients += product(shapes.vocab, shapes.hidden, chunk)
            accumulated = shapes.vocab * shapes.hidden * self._product_add_bytes
            added = self.kernels.memory(float(accumulated), 1)
        backward = forward + chunks * (gradients + added)
        forward += self._gather_back(self._whole)
        backward += self._leave(self._whole)  # the reduction of the input's gradient
        return PassTimes(forward, backward, backward, 0.0, 2 * self._sent(self._whole))

    # --- parts of a layer -------------------------------------------------------------------------

    def _product(self, matrix: Matrix) -> PassTimes:
        """Return the times of a matrix product in all passes, with the collectives around it."""
        shapes = self.shapes
        product, count = self.kernels.product, matrix.count
        # A replicated matrix takes the tokens of the residual stream, which sequence parallelism
        # cuts.
        here = (
            shapes.tokens // shapes.tensor
            if matrix.replicated and shapes.sequence
            else shapes.tokens
        )
        tokens, rows, columns = matrix.tokens_of_each(here), matrix.rows, matrix.columns
        # Ours rounds the operands of experts, but multiplies them as they were.
        fp8 = matrix.fp8 and (count == 1 or self.kernels.software.fp8_experts)
        forward = count * product(tokens, rows, columns, fp8)
        # The three products of a linear layer have equal FLOPs but different shapes, hence other
        # tiles.
        for_input = count * product(tokens, columns, rows, fp8)
        for_weight = 0.0 if shapes.frozen else count * product(rows, columns, tokens, fp8)
        if matrix.fp8:
            x, grad = count * tokens * columns, count * tokens * rows
            forward += self._rounding(matrix, x)
            for_input += self._rounding(matrix, grad)
            # The operands of the weight's gradient once more, along tokens; of experts not at all.
            for_weight += (self._rounding(None, x) + self._rounding(None, grad)) * fp8
        if shapes.tensor == 1 or not (matrix.gathers or matrix.reduces):
            return PassTimes(forward, for_input + for_weight, for_input, for_weight, 0.0)
        return self._with_collectives(matrix, forward, for_input, for_weight)

    def _with_collectives(
        self, matrix: Matrix, forward: float, for_input: float, for_weight: float
    ) -> PassTimes:
        """Return the times of a matrix at a way into a tensor-parallel region or out of it, from
        those of its three products."""
        shapes = self.shapes
        whole = self._around(matrix)
        if not shapes.sequence:
            message = self.network.all_reduce(whole, self.network.tensor)
            bytes_sent = 2 * self._sent(whole)
            if matrix.gathers:
                # The input's gradient is reduced beside the weight-gradient GEMM.
                backward = for_input + max(message, for_weight)
                return PassTimes(forward, backward, for_input + message, for_weight, bytes_sent)
            return PassTimes(
                forward + message, for_input + for_weight, for_input, for_weight, bytes_sent
            )
        # The input of a column-parallel product is gathered again for its weight gradient; experts
        # keep theirs.
        times = 3 if matrix.gathers and not shapes.frozen and matrix.count == 1 else 2
        bytes_sent = times * self._sent(whole)
        message = self.network.gather(whole, self.network.tensor)

        def beside(work: float) -> float:
            is_hidden = self.kernels.software.hides_tensor
            return self._beside(work, message) if is_hidden else work + message

        copies = self._cut_copies(matrix.gathers, whole)
        if matrix.gathers:
            backward = max(message, for_input) + max(message, for_weight)
            apart = PassTimes(
                beside(forward), backward, for_input + message, for_weight + message, bytes_sent
            )
            if shapes.frozen:
                apart = PassTimes(
                    beside(forward), for_input + message, for_input + message, 0.0, bytes_sent
                )
        else:
            backward = beside(for_input) + for_weight
            apart = PassTimes(beside(forward), backward, beside(for_input), for_weight, bytes_sent)
        return apart + PassTimes(copies, copies, copies, 0.0, 0.0)

    def _rounding(self, matrix: Matrix | None, elements: int) -> float:
        """Return the time to round an operand to fp8, and the weight of `matrix` beside it."""
        codes = matrix is None or matrix.count == 1
        of_weight = self.kernels.rounding(matrix.elements, codes) if matrix else 0.0
        return self.kernels.rounding(elements, codes) + of_weight

    def _dispatch(self, layer: LayerShapes) -> PassTimes:
        """Return the times of bringing tokens to experts on other ranks and back, which nothing
        runs beside."""
        if not layer.visited or (layer.expert == 1 and layer.expert_tensor == 1):
            return NOTHING
        network = self.network
        tokens = float(layer.routed_tokens * layer.hidden * layer.element)
        rows = tokens * layer.visited
        shared = network.gather(tokens, network.expert_tensor) if layer.expert_tensor > 1 else 0.0
        of_tensor = tokens * (layer.expert_tensor - 1) / layer.expert_tensor
        num_rows, ranks = layer.routed_tokens * layer.visited, layer.expert
        if ranks > 1 and goes_to_all(num_rows, layer.hidden * layer.element, ranks):
            # All tokens there; their results, and both gradients, by a place for each row.
            there, back = (network.gather(ranks * x, network.expert) for x in (tokens, rows))
            copies = 2 * self.kernels.memory(4 * rows, 2)
            forward, backward = (
                2 * shared + messages + copies for messages in (there + back, 2 * back)
            )
            sent = (ranks - 1) * (tokens + 3 * rows) + 4 * of_tensor
            return PassTimes(forward, backward, backward, 0.0, 0.0, expert_bytes=sent)
        # Rows are copied together for their way, and sorted by expert behind it.
        far = rows
        if self.kernels.software.once_a_node:
            far *= _sent_once(layer, network.expert)
        messages = network.all_to_all(rows, network.expert, far)
        time = shared + messages + self.kernels.memory(4 * rows, 2)
        sent = rows * (layer.expert - 1) / layer.expert + of_tensor
        # There and back, in the forward pass and in the backward pass.
        return PassTimes(2 * time, 2 * time, 2 * time, 0.0, 0.0, expert_bytes=4 * sent)

    def _beside(self, work: float, message: float) -> float:
        """Return the time of a product that is overlapped with its collective, from those of both.

        Both run in as many pieces as there are tensor ranks; all but one piece of the shorter of
        the two is hidden."""
        pieces = self.shapes.tensor
        return max(work, message) + min(work, message) / pieces

    def _cut_copies(self, gathers: bool, whole: float) -> float:
        """Return the time of the copies that put slices of a sequence together, or take them
        apart; `whole` are the bytes of all of it."""
        if self.kernels.software.sequence_first:
            return 0.0
        # The slices of one sequence arrive in order.
        if gathers and self.shapes.micro_batch_size == 1:
            return 0.0
        return self.kernels.memory(2.0 * whole, 1)

    def _attention(self, layer: LayerShapes) -> PassTimes:
        """Return the times of attention.

        Two products forward, five backward (the scores are computed again). In the context ring,
        keys and values travel beside the work on the block before."""
        shapes = self.shapes
        # 2 operations for a feature of the queries and of the output, over half of the sequence on
        # average if causal.
        seen = shapes.seq_length / 2 if layer.causal else shapes.seq_length
        # q · kᵀ and probabilities · v, each a multiplication and an addition.
        operations = 2.0 * shapes.tokens * seen * (layer.q + layer.attended)
        # Five products for the forward pass's two (flash attention recomputes the scores).
        if layer.crosses:  # to all of an encoder's states
            operations += 2.0 * shapes.tokens * layer.source_length * (layer.q + layer.attended)
        forward = self.kernels.attention(operations, shapes.seq_length, layer.head_size)
        backward = self.kernels.attention(2.5 * operations, shapes.seq_length, layer.head_size)
        if shapes.logits_every:
            # One of the two products again, whose result is written, masked and read.
            logits = 2.0 * shapes.tokens * seen * layer.heads * shapes.element
            product = self.kernels.attention(operations / 2, shapes.seq_length, layer.head_size)
            found = product + self.kernels.memory(2 * logits, 3)
            forward += found / shapes.logits_every
        if layer.writes_scores:
            scores = shapes.tokens * shapes.seq_length * layer.heads
            there, back = self.kernels.software.score_bytes
            forward += self.kernels.memory(float(scores * there), 8)
            backward += self.kernels.memory(float(scores * back), 8)
        if shapes.context == 1:
            return PassTimes(forward, backward, backward, 0.0, 0.0)
        if layer.gathers:
            return self._attention_to_gathered(layer, forward, backward)
        if shapes.by_heads:
            return self._attention_by_heads(layer, forward, backward)
        kv = float(shapes.tokens * layer.kv)
        steps = shapes.context - 1

        def around(work: float, num_bytes: float) -> float:
            """Return the time of a ring in which each block's work overlaps the next block's
            message."""
            step = self.network.ring_step(num_bytes)
            # The busiest rank's work, which the others wait for.
            block = work * (UNEVEN if shapes.uneven else 1.0) / shapes.context
            # The first block has no message to wait for; each later one waits for the longer of the
            # two.
            return block + steps * max(step, block)

        forward = around(forward, kv * shapes.element)
        # Gradients travel with their keys and values, in fp32, and one step further: home.
        home = self.network.ring_step(kv * 4)
        backward = around(backward, kv * (shapes.element + 4)) + home
        sent = steps * kv * shapes.element * 2 + (steps + 1) * kv * 4
        return PassTimes(forward, backward, backward, 0.0, 0.0, sent)

    def _attention_to_gathered(
        self, layer: LayerShapes, forward: float, backward: float
    ) -> PassTimes:
        """Return the times of attention to keys and values that each context rank gathers, from
        those of its products.

        An all-gather in the forward pass, and a reduce-scatter of fp32 gradients in the backward
        pass, with nothing beside them; each number is then put in its place."""
        tokens = layer.tokens + (layer.source_tokens if layer.crosses else 0)
        own, ranks = float(tokens * layer.kv), self.shapes.context
        there, back = own * self.shapes.element, own * 4
        forward += self.network.gather(there * ranks, self.network.context)
        backward += self.network.gather(back * ranks, self.network.context)
        forward += self.kernels.memory(2 * there * ranks, 4)
        backward += self.kernels.memory(2 * back * ranks, 4)
        sent = (there + back) * (ranks - 1)
        return PassTimes(forward, backward, backward, 0.0, 0.0, sent)

    def _attention_by_heads(self, layer: LayerShapes, forward: float, backward: float) -> PassTimes:
        """Return the times of attention by heads over context ranks, from those of its products on
        one of them.

        An all-to-all of queries, keys and values and one of the output; the same of gradients.
        Nothing is beside them. Each is written into messages, and from them, which reads and writes
        it twice."""
        shapes = self.shapes
        there = float(shapes.tokens * (layer.q + layer.kv) * shapes.element)
        back = float(shapes.tokens * layer.attended * shapes.element)
        messages = self.network.gather(there, self.network.context) + self.network.gather(
            back, self.network.context
        )
        messages += self.kernels.memory(4 * (there + back), 8)
        forward, backward = forward + messages, backward + messages
        sent = 2 * (there + back) * (shapes.context - 1) / shapes.context
        return PassTimes(forward, backward, backward, 0.0, 0.0, sent)

    def _elementwise(self, layer: LayerShapes) -> PassTimes:
        """Return the times of norms, RoPE, activation, dropout and residual sums, from the bytes
        they move."""
        shapes = self.shapes
        hidden = shapes.tokens * shapes.norm_hidden * shapes.element
        heads = shapes.tokens * (layer.heads + layer.kv_heads) * layer.head_size * shapes.element
        # A norm moves 2 hidden states forward; backward it reads the gradient and its input and
        # writes: 3. Where the residual stream forks, two gradients are added.
        if self.kernels.software.norm_adds:
            # One norm alone (2 forward, 3 backward), one fused with the addition before it (4, 4),
            # one addition (3, 0) and one sum of gradients (0, 3).
            forward, backward = 9 * hidden, 10 * hidden
        else:
            # Two norms, two additions, and two sums of gradients.
            forward = 2 * (2 + 3) * hidden
            backward = 2 * (3 + 3) * hidden
        kernels = 4
        if layer.norms > 2:  # after attention and MLP
            more = layer.norms - 2
            forward += 2 * more * hidden
            backward += 3 * more * hidden
            kernels += more
        if layer.rope:  # in place: read and written
            forward += 2 * heads
            backward += 2 * heads
            kernels += 1
        if layer.head_norms:
            forward += 2 * heads
            backward += 3 * heads
            kernels += 2
        # Forward: random keys, comparison, scaling, product; backward: a product.
        if shapes.hidden_dropout:
            forward += 2 * 12 * hidden
            backward += 2 * 3 * hidden
            kernels += 16
        activation, activation_back = self._activation(layer)
        times = self.kernels.software.elementwise
        ahead = self.kernels.memory(times * forward, kernels) + activation
        back = self.kernels.memory(times * backward, kernels) + activation_back
        return PassTimes(ahead, back, back, 0.0, 0.0)

    def _activation(self, layer: LayerShapes) -> tuple[float, float]:
        """Return (forward, backward) seconds of the MLP's activation."""
        one = layer.tokens * layer.inner * layer.element
        # Passes over I features: silu(gate) · up, or gelu.
        forward, backward = (3, 5) if layer.gated else (2, 3)
        if layer.gelu_gate:  # gelu(gate) and · up are two kernels
            forward += 2
            backward += 3
        memory, times = self.kernels.memory, self.kernels.software.elementwise
        return memory(times * forward * one, 1), memory(times * backward * one, 1)

    def _accumulation(self, elements: int, bytes_each: int) -> PassTimes:
        """Return the time to add a micro-batch's weight gradients to their sum."""
        time = 0.0
        if not self.shapes.frozen:
            time = self.kernels.memory(float(elements * bytes_each), 1)
        return PassTimes(0.0, time, 0.0, time, 0.0)

    # --- messages ---------------------------------------------------------------------------------

    def _leave(self, whole: float) -> float:
        """Return the time to leave a tensor-parallel region (reduce-from-region) with nothing to
        overlap; `whole` are the bytes of the hidden states of the whole sequence."""
        if self.shapes.sequence:
            return self.network.gather(whole, self.network.tensor)
        return self.network.all_reduce(whole, self.network.tensor)

    def _gather_back(self, whole: float) -> float:
        """Return the time to gather the slices of sequence parallelism, `whole` bytes together."""
        if not self.shapes.sequence:
            return 0.0
        return self.network.gather(whole, self.network.tensor)

    def _sent(self, num_bytes: float) -> float:
        """Return the bytes that each rank of a ring sends for a collective over `num_bytes`."""
        return num_bytes * (self.shapes.tensor - 1) / self.shapes.tensor

    def _forward_tensor_bytes(self, layer: LayerShapes) -> float:
        """Return the bytes a layer sends within the tensor group in its forward pass."""
        reduced = sum(self._around(matrix) for matrix in layer.matrices if matrix.reduces)
        found = self._leave_bytes(reduced)
        if self.shapes.sequence:
            gathered = sum(self._around(matrix) for matrix in layer.matrices if matrix.gathers)
            found += self._sent(gathered + self._shared_keys(layer))
        return found

    def _entering_keys(self, layer: LayerShapes) -> PassTimes:
        """Return the times of the keys that all heads share on their way into the tensor-parallel
        region, which they enter by themselves."""
        whole = self._shared_keys(layer)
        if not whole or self.shapes.tensor == 1:
            return NOTHING
        forward, backward = self._gather_back(whole), self._leave(whole)
        return PassTimes(forward, backward, backward, 0.0, 2 * self._sent(whole))

    def _shared_keys(self, layer: LayerShapes) -> float:
        """Return the bytes, over the whole sequence, of the keys that all heads share."""
        return float(self.shapes.tokens * layer.shared_keys * self.shapes.element)

    def _around(self, matrix: Matrix) -> float:
        """Return the bytes, over the whole sequence, that a collective at a matrix carries: its
        input on the way in, which may be latents, its output on the way out."""
        width = matrix.columns if matrix.gathers else matrix.rows
        return self.shapes.tokens * width * self.shapes.element * matrix.sent

    def _leave_bytes(self, whole: float) -> float:
        """Return the bytes that a rank sends to leave a tensor-parallel region: an all-reduce sends
        twice what a reduce-scatter does."""
        return (1 if self.shapes.sequence else 2) * self._sent(whole)


def _sent_once(layer: LayerShapes, group: Group) -> float:
    """Return how many copies of a token leave for each other node, as a share of its rows that do,
    where it travels there once at most. Its experts are any, as often each."""
    here = layer.num_experts * group.per_node // group.ranks
    none_there = comb(layer.num_experts - here, layer.visited) / comb(
        layer.num_experts, layer.visited
    )
    return (1 - none_there) / (layer.visited * here / layer.num_experts)
