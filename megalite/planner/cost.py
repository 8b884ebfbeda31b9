"""Time of one layer, of the embedding and of the head on one rank, for one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from megalite.planner.kernels import Kernels
from megalite.planner.network import Network
from megalite.planner.shapes import Matrix, Shapes

ACCUMULATE_BYTES, FUSED_ACCUMULATE_BYTES = 10, 8
"""To add a weight's bf16 gradient to its fp32 sum: read 2 + 4, write 4; in the product's kernel, read 4, write 4."""


def optimizer_bytes(num_states: int) -> int:
    """Return the bytes moved per updated element: the norm reads the gradient (4); the update, in one pass, reads
    gradient, master and states, and writes the latter two and the bf16 weights (2)."""
    return 4 + 4 * (2 + num_states) + 4 * (1 + num_states) + 2


@dataclass(frozen=True)
class PassTimes:
    """Seconds of the passes of a part of the model, exposed communication included."""

    forward: float
    backward: float
    backward_input: float
    """The half of a zero-bubble schedule that a pipeline waits for; `backward_weight` is the other."""
    backward_weight: float
    tensor_bytes: float
    """Sent by this rank to others of its tensor group, in a forward and a backward pass."""
    context_bytes: float = 0.0

    def __add__(self, other: PassTimes) -> PassTimes:
        return PassTimes(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def __mul__(self, count: int) -> PassTimes:
        return PassTimes(*(getattr(self, name) * count for name in self.__dataclass_fields__))


NOTHING = PassTimes(0.0, 0.0, 0.0, 0.0, 0.0)


class Costs:
    """Of one rank's shapes on given hardware. `products_add`: those of weight gradients add to the sum themselves."""

    def __init__(self, shapes: Shapes, kernels: Kernels, network: Network, products_add: bool):
        self.shapes, self.kernels, self.network = shapes, kernels, network
        self._product_add_bytes = FUSED_ACCUMULATE_BYTES if products_add else ACCUMULATE_BYTES
        self._whole = shapes.tokens * shapes.hidden * shapes.element
        """Bytes of the hidden states of all of this rank's tokens, uncut."""

    def layer(self, recompute: str) -> PassTimes:
        total = NOTHING
        for matrix in self.shapes.matrices:
            total += self._product(matrix)
        size = sum(matrix.rows * matrix.columns for matrix in self.shapes.matrices)
        total += self._attention() + self._elementwise() + self._accumulation(size, self._product_add_bytes)
        again = {"none": 0.0, "selective": self._activation()[0], "full": total.forward}[recompute]
        return total + PassTimes(0.0, again, again, 0.0, self._forward_tensor_bytes() if recompute == "full" else 0.0)

    def embedding(self) -> PassTimes:
        shapes, table = self.shapes, self.shapes.vocab * self.shapes.hidden
        # Masked twice where the vocabulary is cut; the gradient is a zeroed table that rows are added to.
        passes = 2 + (4 if shapes.tensor > 1 else 0)
        forward = self.kernels.memory(passes * self._whole, 4) + self._leave()
        if shapes.frozen:
            return PassTimes(forward, 0.0, 0.0, 0.0, self._sent(self._whole))
        backward = self.kernels.memory(passes * self._whole + table * shapes.element, 4) + self._gather_back()
        times = PassTimes(forward, backward, 0.0, backward, 2 * self._sent(self._whole))
        return times + self._accumulation(table, ACCUMULATE_BYTES)

    def head(self) -> PassTimes:
        """The norm reads and writes; its backward pass reads the gradient and what was kept and writes a gradient."""
        shapes, memory = self.shapes, self.kernels.memory
        logit_bytes = shapes.tokens * shapes.vocab * shapes.element / 2
        chunks = -(-shapes.tokens // (shapes.loss_chunk or shapes.tokens))
        loss_forward, loss_backward = (count * logit_bytes for count in self.kernels.software.loss_bytes)
        # Each rank's log-sum-exp, for the largest; then its share of the sum, and the label's logit.
        agree = sum(self.network.all_reduce(size * shapes.tokens, self.network.tensor) for size in (4.0, 8.0))
        forward = memory(loss_forward, 7 + chunks) + memory(2 * shapes.hidden_bytes, 1) + agree
        backward = memory(loss_backward, 2 + chunks) + memory(3 * shapes.hidden_bytes, 2)
        around = PassTimes(forward, backward, backward, 0.0, 0.0)
        elements = shapes.vocab * shapes.hidden
        if shapes.loss_chunk is not None:
            return around + self._chunked_product(shapes.loss_chunk, chunks)
        matrix = Matrix(shapes.vocab, shapes.hidden, column_parallel=True)
        return around + self._product(matrix) + self._accumulation(elements, self._product_add_bytes)

    def _chunked_product(self, chunk: int, chunks: int) -> PassTimes:
        """The head's, a chunk of tokens at a time: logits again in the backward pass, where none of it is put off, and
        nothing beside the messages."""
        shapes, product = self.shapes, self.kernels.product
        forward = chunks * product(chunk, shapes.vocab, shapes.hidden)
        gradients = product(chunk, shapes.hidden, shapes.vocab)
        added = 0.0
        if not shapes.frozen:
            gradients += product(shapes.vocab, shapes.hidden, chunk)
            added = self.kernels.memory(float(shapes.vocab * shapes.hidden * self._product_add_bytes), 1)
        backward = forward + chunks * (gradients + added)
        way_back = self._leave()  # of the input's gradient
        return PassTimes(
            forward + self._gather_back(), backward + way_back, backward + way_back, 0.0, 2 * self._sent(self._whole)
        )

    # --- parts of a layer -----------------------------------------------------------------------------------------

    def _product(self, matrix: Matrix) -> PassTimes:
        """A matrix product in all passes, with the collectives around it. A frozen matrix has no third."""
        shapes, product = self.shapes, self.kernels.product
        tokens, rows, columns = shapes.tokens, matrix.rows, matrix.columns
        forward, for_input, for_weight = (
            product(tokens, rows, columns), product(tokens, columns, rows),
            0.0 if shapes.frozen else product(rows, columns, tokens),
        )  # fmt: skip
        if shapes.tensor == 1:
            return PassTimes(forward, for_input + for_weight, for_input, for_weight, 0.0)
        # The input of a product is gathered again for its weight's gradient.
        times = 3 if matrix.column_parallel and not shapes.frozen else 2
        bytes_sent = times * self._sent(self._whole)
        if not shapes.sequence:
            message = self.network.all_reduce(self._whole, self.network.tensor)
            bytes_sent = 2 * self._sent(self._whole)
            if matrix.column_parallel:
                backward = for_input + max(message, for_weight)
                return PassTimes(forward, backward, for_input + message, for_weight, bytes_sent)
            return PassTimes(forward + message, for_input + for_weight, for_input, for_weight, bytes_sent)
        message = self.network.gather(self._whole, self.network.tensor)
        beside = self._beside if self.kernels.software.hides_tensor else lambda work: work + message
        copies = self._cut_copies(matrix.column_parallel)
        if matrix.column_parallel:
            backward = max(message, for_input) + max(message, for_weight)
            apart = PassTimes(beside(forward), backward, for_input + message, for_weight + message, bytes_sent)
            if shapes.frozen:
                apart = PassTimes(beside(forward), for_input + message, for_input + message, 0.0, bytes_sent)
        else:
            backward = beside(for_input) + for_weight
            apart = PassTimes(beside(forward), backward, beside(for_input), for_weight, bytes_sent)
        return apart + PassTimes(copies, copies, copies, 0.0, 0.0)

    def _beside(self, work: float) -> float:
        """A product in as many pieces as there are ranks, each waiting for, or followed by, its piece of the message:
        all but one piece of the shorter of the two is hidden."""
        message, pieces = self.network.gather(self._whole, self.network.tensor), self.shapes.tensor
        return max(work, message) + min(work, message) / pieces

    def _cut_copies(self, column_parallel: bool) -> float:
        """Pieces of a sequence are put together (needed for several sequences) or taken apart by copying."""
        if self.kernels.software.sequence_first:
            return 0.0
        if column_parallel and self.shapes.micro_batch_size == 1:
            return 0.0
        return self.kernels.memory(2.0 * self._whole, 1)

    def _attention(self) -> PassTimes:
        """Causal: on average half of the sequence is attended to. Two products forward, five backward (the scores are
        computed again). Keys and values travel the context ring beside the work on those before."""
        shapes = self.shapes
        operations = 2.0 * shapes.tokens * shapes.seq_length * shapes.q
        forward, backward = self.kernels.attention(operations), self.kernels.attention(2.5 * operations)
        if shapes.writes_scores:
            scores = shapes.tokens * shapes.seq_length * shapes.heads
            forward += self.kernels.memory(scores * 30.0, 8)
            backward += self.kernels.memory(scores * 40.0, 8)
        if shapes.context == 1:
            return PassTimes(forward, backward, backward, 0.0, 0.0)
        kv = 2.0 * shapes.tokens * shapes.kv
        steps = shapes.context - 1

        def around(work: float, num_bytes: float) -> float:
            """One block's work is hidden behind at a time, the last one's behind nothing."""
            step, block = self.network.ring_step(num_bytes), work / shapes.context
            return block + steps * max(step, block)

        forward = around(forward, kv * shapes.element)
        # Gradients travel beside them, in fp32, and a step further: home.
        backward = around(backward, kv * (shapes.element + 4)) + self.network.ring_step(kv * 4)
        sent = steps * kv * shapes.element * 2 + (steps + 1) * kv * 4
        return PassTimes(forward, backward, backward, 0.0, 0.0, sent)

    def _elementwise(self) -> PassTimes:
        """Norms, rotation, activation and residual sums: bytes read and written. A norm's backward pass reads the
        gradient and what was kept and writes a gradient; where the stream parts, two gradients are summed."""
        shapes = self.shapes
        hidden = shapes.tokens * shapes.norm_hidden * shapes.element
        heads = shapes.tokens * (shapes.q + shapes.kv) * shapes.element
        if self.kernels.software.norm_adds:
            # A norm (2, 3); the other with the addition before it, and in its backward pass the gradients' (4, 4); the
            # other addition (3, 0), and the gradients' (0, 3).
            forward, backward = 9 * hidden, 10 * hidden
        else:
            forward, backward = 2 * (2 + 3) * hidden, 2 * (3 + 3) * hidden
        kernels = 4
        if shapes.norms > 2:  # behind attention and MLP: 2 passes each, 3 back
            more = shapes.norms - 2
            forward, backward, kernels = forward + 2 * more * hidden, backward + 3 * more * hidden, kernels + more
        if shapes.rope:  # in place
            forward, backward, kernels = forward + 2 * heads, backward + 2 * heads, kernels + 1
        if shapes.head_norms:
            forward, backward, kernels = forward + 2 * heads, backward + 3 * heads, kernels + 2
        if shapes.hidden_dropout:  # keys, comparison, scaling, product; and a product
            forward, backward, kernels = forward + 2 * 12 * hidden, backward + 2 * 3 * hidden, kernels + 16
        memory, (activation, activation_back) = self.kernels.memory, self._activation()
        back = memory(backward, kernels) + activation_back
        return PassTimes(memory(forward, kernels) + activation, back, back, 0.0, 0.0)

    def _activation(self) -> tuple[float, float]:
        """(forward, backward): of silu(gate) · up, 3 passes over I and 5, of gelu 2 and 3, of gelu(gate), · up both."""
        shapes = self.shapes
        one = shapes.tokens * shapes.inner * shapes.element
        forward, backward = (3, 5) if shapes.gated else (2, 3)
        if shapes.gelu_gate:
            forward, backward = forward + 2, backward + 3
        return self.kernels.memory(forward * one, 1), self.kernels.memory(backward * one, 1)

    def _accumulation(self, elements: int, bytes_each: int) -> PassTimes:
        time = 0.0 if self.shapes.frozen else self.kernels.memory(float(elements * bytes_each), 1)
        return PassTimes(0.0, time, 0.0, time, 0.0)

    # --- messages -------------------------------------------------------------------------------------------------

    def _leave(self) -> float:
        """Out of a tensor-parallel region with nothing to hide behind."""
        if self.shapes.sequence:
            return self.network.gather(self._whole, self.network.tensor)
        return self.network.all_reduce(self._whole, self.network.tensor)

    def _gather_back(self) -> float:
        return self.network.gather(self._whole, self.network.tensor) if self.shapes.sequence else 0.0

    def _sent(self, num_bytes: float) -> float:
        return num_bytes * (self.shapes.tensor - 1) / self.shapes.tensor

    def _forward_tensor_bytes(self) -> float:
        products = len(self.shapes.matrices)
        return products * self._sent(self._whole) if self.shapes.tensor > 1 else 0.0
