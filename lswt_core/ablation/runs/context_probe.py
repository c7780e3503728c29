"""Probes a trained model for what it may see: a token's loss depends on earlier tokens of its own
row alone, as far back as its layers declare, and is the cross-entropy of its logits.

Token ids are drawn at random. Inputs are changed, labels never: a loss that must not depend on a
token has to stay as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lswt_core.ablation.certificate import Flaw
from lswt_core.decode.load_run import LoadedModel
from lswt_core.interfaces import Layer, Mixer
from lswt_core.model.decoder import Decoder

ROWS = 2  # the first row's tokens are changed, the second row's are not
MOST_SEGMENTS = 256  # of the text on which the reach of memories is probed
SCORED_TOKENS = 64  # whose loss is compared with the cross-entropy of their logits
# Two losses in nats are equal within this; by the type of the computation.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
CAUSALITY, CONTEXT, LOSS = "causality", "context", "loss"  # what a flaw is about


def probe_context(model: LoadedModel, device: torch.device) -> list[Flaw]:
    """Return what a model sees that it must not, or declares to see and does not."""
    with torch.no_grad():
        probe = ContextProbe(model, device)
        return [*probe.check_causality(), *probe.check_reach(), *probe.check_loss()]


class ContextProbe:
    """The probes of one model."""

    def __init__(self, model: LoadedModel, device: torch.device) -> None:
        self.model, self.device = model, device
        self.generator = torch.Generator().manual_seed(0)
        self.tolerance = TOLERANCES[model.precision.dtype]

    def draw(self, *shape: int) -> Tensor:
        """Return random token ids."""
        vocab_size = self.model.tokenizer.vocab_size
        return torch.randint(vocab_size, shape, generator=self.generator).to(self.device)

    def losses(self, inputs: Tensor, labels: Tensor, length: int) -> Tensor:
        """Return the losses [B, N] of a text [B, N] that is read in segments of a length."""
        decoder, state, losses = self.model.decoder, None, []
        segments = zip(inputs.split(length, 1), labels.split(length, 1), strict=True)
        for segment, wanted in segments:
            with self.model.precision.autocast(self.device):
                states, state = decoder(segment, state)
                nll = decoder.vocabulary.score(states, wanted).nll
            assert nll is not None
            losses.append(nll.float())
        return torch.cat(losses, 1)

    def differ(self, one: Tensor, other: Tensor) -> bool:
        """Whether losses differ by more than rounding, or are not numbers."""
        return not bool(((one - other).abs() <= self.tolerance).all())

    def check_causality(self) -> Iterator[Flaw]:
        """Change the tokens from some place on, in the second of two segments of one row."""
        length = self.model.seq_len
        inputs, labels = self.draw(ROWS, 2 * length), self.draw(ROWS, 2 * length)
        before = self.losses(inputs, labels, length)
        for place in sorted({1, length // 3, length // 2, length - 1} & set(range(length))):
            changed, first = inputs.clone(), length + place
            changed[0, first:] = self.draw(2 * length - first)
            after = self.losses(changed, labels, length)
            if self.differ(before[0, :first], after[0, :first]):
                yield Flaw(CAUSALITY, "the losses of tokens depend on later tokens")
                break
            if self.differ(before[1], after[1]):
                yield Flaw(CAUSALITY, "the losses of a row depend on the tokens of another")
                break
        if self.differ(before, self.losses(inputs, labels, length)):
            text = "the losses of a text change when it is read again: the model keeps something"
            yield Flaw(CAUSALITY, text)

    def check_reach(self) -> Iterator[Flaw]:
        """Change a segment that is further back than the layers' states reach in all (unless that
        takes more than MOST_SEGMENTS), and the one before the last.
        """
        decoder, length = self.model.decoder, self.segment_length()
        reach, segments = decoder.memory_length, reach_in_segments(decoder, length) + 2
        is_probed = not decoder.is_recurrent and segments <= MOST_SEGMENTS
        if is_probed and self.differ(*self.last_losses(segments, length, changed=0)):
            text = f"losses depend on tokens further back than its layers' {reach} tokens each"
            yield Flaw(CONTEXT, text)
        # a sliding window counts the token itself: one of a single token reaches nothing
        has_memory = decoder.is_recurrent or reach > 1
        if has_memory and torch.equal(*self.last_losses(3, length, changed=1)):
            yield Flaw(CONTEXT, "its layers declare a memory, but no loss depends on it")

    def last_losses(self, segments: int, length: int, changed: int) -> tuple[Tensor, Tensor]:
        """Return the losses of the last of several segments, and with another one changed."""
        shape = (ROWS, segments * length)
        inputs, labels = self.draw(*shape), self.draw(*shape)
        before = self.losses(inputs, labels, length)[:, -length:]
        inputs[:, changed * length : (changed + 1) * length] = self.draw(ROWS, length)
        return before, self.losses(inputs, labels, length)[:, -length:]

    def segment_length(self) -> int:
        """Return a length of segments that divides the memory's, so that one token too many is in
        another segment; the training sequence length where none does that is not too short.
        """
        reach, longest = self.model.decoder.memory_length, self.model.seq_len
        divisors = [n for n in range(1, min(reach, longest) + 1) if reach % n == 0]
        best = max(divisors, default=longest)
        return best if best * 8 >= min(reach, longest) else longest

    def check_loss(self) -> Iterator[Flaw]:
        """Compare losses with the cross-entropy of the logits."""
        count = min(SCORED_TOKENS, self.model.seq_len)
        inputs, labels = self.draw(ROWS, count), self.draw(ROWS, count)
        losses, head = self.losses(inputs, labels, count), self.model.decoder.vocabulary
        with self.model.precision.autocast(self.device):
            logits = head.logits(self.model.decoder(inputs)[0])
        expected = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), reduction="none"
        )
        # logits and the fused loss round differently
        worst = float((losses.flatten() - expected).abs().max())
        if not worst <= 10 * self.tolerance:
            text = f"{head.name} reports losses that are not the cross-entropy of its logits"
            yield Flaw(LOSS, text)


def reach_in_segments(decoder: Decoder, length: int) -> int:
    """Return how many segments of a length a loss depends on besides its own, at most: the layers'
    states together.
    """
    return sum(math.ceil(reach_of(layer, decoder) / length) for layer in decoder.layers())


def reach_of(layer: Layer, decoder: Decoder) -> int:
    """Return how many tokens back a layer sees, by its state or that of a layer below."""
    if isinstance(layer, Mixer) and layer.sees_past_of_others:
        return decoder.memory_length
    return layer.reach or 0
