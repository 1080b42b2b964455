"""How far the server's gates have come with each sequence, and how many steps from now a position will be due. Pure.

One step takes a *block* of positions of each sequence that runs through all layers: mostly one position; several, each
a span of its own, where the server verifies guesses; a part of a prompt in one span. What the next blocks will be is
not known: as many positions as the latest one had are expected. Where guesses were wrong, the server goes back to a
position inside the block. Knows no experts and no plans.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from odmoe_node.recent import Recent
from odmoe_wire.messages import Span

MAX_REMEMBERED_SEQUENCES = 4096


@dataclass(frozen=True, slots=True)
class Block:
    """What a step takes of a sequence: positions `first`..`last` in `width` spans. The gates have spoken for all before
    `first`, and for the block up to and with `layer`."""

    first: int
    last: int
    layer: int
    width: int
    step: int

    def is_past(self, *, last: int, layer: int) -> bool:
        """Whether the gates have spoken for all positions up to `last` at the layer."""
        return last < self.first or (last <= self.last and layer <= self.layer)


class Progress:
    """Steps are counted as they are heard of; `step` is the latest one's number."""

    def __init__(self) -> None:
        self.step = 0
        self._spans: Sequence[Span] = ()  # of the latest step
        self._layer = -1  # that it has come to
        self._blocks: Recent[int, Block] = Recent(MAX_REMEMBERED_SEQUENCES)
        # Where sequences begin whose first block has not come yet, as far as anybody asked.
        self._begins: Recent[int, int] = Recent(MAX_REMEMBERED_SEQUENCES)

    def is_past(self, span: Span, layer: int) -> bool:
        """Whether the gates have spoken for a span at the layer."""
        block = self._blocks.get(span.sequence)
        return block is not None and block.is_past(last=last_of(span), layer=layer)

    def due(self, sequence: int, position: int) -> tuple[int, int]:
        """(the number of the step that will take the position, how many positions it takes before). The first one of a
        block is certain to be taken, those behind it are guesses."""
        block = self._blocks.get(sequence)
        if block is None:
            begins = self._begins.get(sequence)
            if begins is None or position < begins:
                self._begins.put(sequence, position)
                begins = position
            return self.step + 1 + position - begins, 0
        if position <= block.last:
            return block.step, max(0, position - block.first)
        blocks, before = divmod(position - block.last - 1, block.width)
        return self.step + 1 + blocks, before

    def pass_by(self, spans: Sequence[Span], layer: int) -> Mapping[int, Block]:
        """The gates of a step that takes these spans have spoken at the layer. Returns its block of each sequence."""
        if layer < self._layer or spans != self._spans:
            self.step += 1
        self._spans, self._layer = spans, layer
        return {
            sequence: self._move(sequence, _block(own, layer=layer, step=self.step))
            for sequence, own in _by_sequence(spans).items()
        }

    def roll_back(self, sequence: int, position: int) -> None:
        """What was forecast from the position on was for a wrong token. If that was a guess the latest block took, the
        server goes back to it; its first token is no guess."""
        block = self._blocks.get(sequence)
        if block is not None and block.first < position <= block.last:
            self._blocks.put(sequence, replace(block, last=position - 1))

    def forget(self, sequence: int) -> None:
        """The sequence is over."""
        self._blocks.discard(sequence)
        self._begins.discard(sequence)

    def clear(self) -> None:
        """Forget all: another server counts its sequences anew."""
        self._spans, self._layer = (), -1
        self._blocks.clear()
        self._begins.clear()

    def _move(self, sequence: int, block: Block) -> Block:
        """What is now known to be past, if it is news or not."""
        before = self._blocks.get(sequence)
        if before is not None and before.step == block.step:
            # Without what was rolled back meanwhile: this word may have been on its way.
            block = replace(before, layer=block.layer)
        elif before is not None and block.first < before.first:
            return block  # another part of the prompt is ahead of this one
        elif before is not None and block.first == before.first:
            block = replace(block, last=max(block.last, before.last), layer=max(block.layer, before.layer))
        self._begins.discard(sequence)
        self._blocks.put(sequence, block)
        return block


def last_of(span: Span) -> int:
    """The last position of a span."""
    return span.position + max(span.length, 1) - 1


def _by_sequence(spans: Iterable[Span]) -> dict[int, list[Span]]:
    found: dict[int, list[Span]] = {}
    for span in spans:
        found.setdefault(span.sequence, []).append(span)
    return found


def _block(spans: Sequence[Span], *, layer: int, step: int) -> Block:
    """Of the spans of one sequence."""
    return Block(
        first=min(span.position for span in spans),
        last=max(map(last_of, spans)),
        layer=layer,
        width=len(spans),
        step=step,
    )
