"""Time of one layer, of the embedding and of the head on one rank, for one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from megalite.planner.kernels import Kernels
from megalite.planner.network import Network
from megalite.planner.shapes import Matrix, Shapes

ACCUMULATE_BYTES, FUSED_ACCUMULATE_BYTES = 10, 8
"""To add a weight's bf16 gradient to its fp32 sum: read 2 + 4, write 4; in the product's kernel, read 4, write 4."""

LOSS_BYTES, PARALLEL_LOSS_BYTES = 44, 52
"""Read and written per logit of bf16 by the passes of models/layers.py CrossEntropy (to fp32, log-softmax, gradients of
the gather and of the log-softmax, back to bf16), and by those of parallel/tensor.py _CrossEntropy."""

OPTIMIZER_BYTES = 34
"""Per stepped element: the norm reads the gradient (4); AdamW reads gradient, master and moments (16) and writes the
latter three (12); the cast to bf16 writes 2."""


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
    """Of one rank's shapes on given hardware."""

    def __init__(self, shapes: Shapes, kernels: Kernels, network: Network):
        self.shapes, self.kernels, self.network = shapes, kernels, network
        self._whole = shapes.tokens * shapes.hidden * shapes.element
        """Bytes of the hidden states of all of this rank's tokens, uncut."""

    def layer(self, recompute: str) -> PassTimes:
        total = NOTHING
        for matrix in self.shapes.matrices:
            total += self._product(matrix)
        total += (
            self._attention()
            + self._elementwise()
            + self._accumulation(sum(m.rows * m.columns for m in self.shapes.matrices))
        )
        again = {"none": 0.0, "selective": self._activation(), "full": total.forward}[recompute]
        return total + PassTimes(0.0, again, again, 0.0, self._forward_tensor_bytes() if recompute == "full" else 0.0)

    def embedding(self) -> PassTimes:
        shapes, table = self.shapes, self.shapes.vocab * self.shapes.hidden
        # Masked twice where the vocabulary is cut; the gradient is a zeroed table that rows are added to.
        passes = 2 + (4 if shapes.tensor > 1 else 0)
        forward = self.kernels.memory(passes * self._whole, 4) + self._leave()
        backward = self.kernels.memory(passes * self._whole + table * shapes.element, 4) + self._gather_back()
        return PassTimes(forward, backward, 0.0, backward, 2 * self._sent(self._whole)) + self._accumulation(table)

    def head(self) -> PassTimes:
        shapes = self.shapes
        logits = shapes.tokens * shapes.vocab
        loss = self.kernels.memory(
            logits * (PARALLEL_LOSS_BYTES if shapes.tensor > 1 else LOSS_BYTES) * shapes.element / 2, 12
        )
        norm = self.kernels.memory(2 * shapes.hidden_bytes, 1)
        agree = 2 * self.network.all_reduce(8.0 * shapes.tokens, self.network.tensor)
        # Of the passes over the logits, about three fifths are before the loss is known.
        forward, backward = 0.6 * loss + norm + agree, 0.4 * loss + 2 * norm
        around = PassTimes(forward, backward, backward, 0.0, 0.0)
        matrix = Matrix(shapes.vocab, shapes.hidden, column_parallel=True)
        return self._product(matrix) + around + self._accumulation(shapes.vocab * shapes.hidden)

    # --- parts of a layer -----------------------------------------------------------------------------------------

    def _product(self, matrix: Matrix) -> PassTimes:
        """A matrix product in all passes, with the collectives around it."""
        shapes, product = self.shapes, self.kernels.product
        tokens, rows, columns = shapes.tokens, matrix.rows, matrix.columns
        forward, for_input, for_weight = (
            product(tokens, rows, columns), product(tokens, columns, rows), product(rows, columns, tokens)
        )  # fmt: skip
        if shapes.tensor == 1:
            return PassTimes(forward, for_input + for_weight, for_input, for_weight, 0.0)
        bytes_sent = 3 * self._sent(self._whole) if matrix.column_parallel else 2 * self._sent(self._whole)
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
        if self.kernels.software.fused:
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
        if shapes.attention_dropout:
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
        """Norms, rotation, activation and residual sums: bytes read and written. Backward passes read the gradient and
        what was kept and write a gradient: twice the forward pass's bytes."""
        shapes = self.shapes
        hidden = shapes.tokens * shapes.norm_hidden * shapes.element
        heads = shapes.tokens * (shapes.q + shapes.kv) * shapes.element
        fused = self.kernels.software.fused
        moved = 2 * (2 + 3) * hidden  # two norms, two residual sums
        kernels = 4
        if shapes.rope:
            # Four halves multiplied, two pairs summed, joined: 9 passes of queries and keys; fused, 2.
            moved += (2 if fused else 9) * heads
            kernels += 2 if fused else 14
        if shapes.head_norms:
            moved += 2 * heads
            kernels += 2
        if shapes.hidden_dropout:
            moved += (0 if fused else 2 * 12) * hidden  # keys, comparison, scaling, product
            kernels += 0 if fused else 16
        forward = self.kernels.memory(moved, kernels) + self._activation()
        return PassTimes(forward, 2 * forward, 2 * forward, 0.0, 0.0)

    def _activation(self) -> float:
        """silu(gate) (2 passes over I) and its product with `up` (3), or fused 3; gelu 2."""
        shapes, fused = self.shapes, self.kernels.software.fused
        passes = (3 if fused else 5) if shapes.gated else 2
        return self.kernels.memory(passes * shapes.tokens * shapes.inner * shapes.element, 2)

    def _accumulation(self, elements: int) -> PassTimes:
        per_element = FUSED_ACCUMULATE_BYTES if self.kernels.software.fused else ACCUMULATE_BYTES
        time = self.kernels.memory(float(elements * per_element), 1)
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
