"""Rows of more than cutoff_len tokens: which of their tokens stay.

`structure` and `llamafactory` share the room of a conversation among its turns, and that of a turn
between prompt and response, by LLaMA-Factory's budgets. `llamafactory` then keeps the head of each,
so that a long prompt loses its end, the header of the response among it. `structure` keeps all that
is not content (headers, the response's prefix, end tokens) and cuts content: the longest first,
each from its end. What is content is found by rendering the conversation with marks in its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from typing import Literal, NamedTuple

from llmray.data.conversation import Conversation, Message, RowError
from llmray.data.templates import Renderer, Turn

Truncation = Literal["structure", "llamafactory", "error", "drop", "keep_start", "keep_end"]

_MARK = "\ue000{}\ue001"  # of the private use area, so that no template means anything by it
_MARKS = re.compile("\ue000([0-9]+)\ue001")


class Span(NamedTuple):
    """Tokens of a row that stay: where they are, whether of a response, and of which turn."""

    start: int
    stop: int
    is_target: bool
    turn: int


class Section(NamedTuple):
    """Tokens of a prompt or response that are all content, or all structure."""

    start: int
    stop: int
    is_content: bool


class TurnSections(NamedTuple):
    """The sections of a turn's prompt and of its response, in the order of the text."""

    source: tuple[Section, ...]
    target: tuple[Section, ...]


class TurnTexts(NamedTuple):
    """Texts of a turn's prompt and response: structure, content, structure, ... and so on."""

    source: list[str]
    target: list[str]


@dataclass(frozen=True)
class Dropped:
    """A row that is left out, since it has more tokens than `cutoff_len`."""

    num_tokens: int


def refused(num_tokens: int, cutoff_len: int) -> RowError:
    """What to say of a row over the limit with `truncation: error`."""
    return RowError(
        f"the row has {num_tokens} tokens. Required: at most cutoff_len={cutoff_len}. Shorten it, "
        "raise cutoff_len, or choose another truncation: structure cuts such rows, drop leaves "
        "them out."
    )


def budgets(source_len: int, target_len: int, room: int) -> tuple[int, int]:
    """How many tokens of a source and its target are kept in `room`: LLaMA-Factory's rule.

    A target below half the room is kept whole, else a source below half is; else both shrink in
    proportion.
    """
    if target_len * 2 < room:
        most = room
    elif source_len * 2 < room:
        most = room - source_len
    else:
        most = int(room * (target_len / (source_len + target_len)))
    target_kept = min(target_len, most)
    return min(source_len, max(room - target_kept, 0)), target_kept


def window(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """The parts of spans that lie between two places."""
    cut = (span._replace(start=max(span.start, start), stop=min(span.stop, stop)) for span in spans)
    return [span for span in cut if span.start < span.stop]


def cuts(spans: Sequence[Span], total: int) -> tuple[int, ...]:
    """Pairs of a place in the kept tokens, and how many of `total` were taken out there."""
    found: list[int] = []
    at = place = 0
    for start, stop in [*((span.start, span.stop) for span in spans), (total, total)]:
        if start > at and found[-2:-1] == [place]:
            found[-1] += start - at
        elif start > at:
            found += [place, start - at]
        place, at = place + stop - start, stop
    return tuple(found)


def heads(spans: Sequence[Span], cutoff_len: int, last_first: bool) -> list[Span]:
    """`llamafactory`: the heads of sources and targets, turn by turn while tokens remain.

    Args:
        spans: a source and its target in turns.
        cutoff_len: tokens to keep.
        last_first: whether the last turn gets its share first.
    """
    turns = list(zip(spans[::2], spans[1::2], strict=True))
    kept: list[tuple[Span, Span]] = []
    used = 0
    for source, target in reversed(turns) if last_first else turns:
        if used >= cutoff_len:
            break
        source_len, target_len = budgets(
            source.stop - source.start, target.stop - target.start, cutoff_len - used
        )
        used += source_len + target_len
        kept.append(
            (
                source._replace(stop=source.start + source_len),
                target._replace(stop=target.start + target_len),
            )
        )
    if last_first:
        kept.reverse()
    return list(chain.from_iterable(kept))


def structured(turns: Sequence[TurnSections], cutoff_len: int, last_first: bool) -> list[Span]:
    """`structure`: all structure and the heads of contents, turn by turn while one fits.

    A turn fits if its structure does, with one token of the response.

    Args:
        turns: sections of a conversation.
        cutoff_len: tokens to keep.
        last_first: whether the last turn gets its share first.
    """
    order = range(len(turns))
    kept: dict[int, list[Span]] = {}
    room = cutoff_len
    for number in reversed(order) if last_first else order:
        source, target = turns[number]
        shares = _shares(source, [target], room)
        if shares is None:
            break
        kept[number] = [
            *(Span(start, stop, False, number) for start, stop in _shortened(source, shares[0])),
            *(Span(start, stop, True, number) for start, stop in _shortened(target, shares[1])),
        ]
        room -= sum(span.stop - span.start for span in kept[number])
    return [span for number in sorted(kept) for span in kept[number]]


def structured_answers(
    past: Sequence[TurnSections],
    source: Sequence[Section],
    answers: Sequence[Sequence[Section]],
    cutoff_len: int,
) -> tuple[list[tuple[int, int]], list[list[tuple[int, int]]]] | None:
    """`structure` for a prompt and answers to it, each of which is a row with the prompt.

    The prompt is cut as for the longest answer, and all answers get the same room.

    Args:
        past: sections of the turns before.
        source: of the last prompt.
        answers: of each answer.
        cutoff_len: tokens to keep of the prompt and any of the answers.

    Returns: which tokens of the prompt stay, and which of each answer; None where nothing fits.
    """
    shares = _shares(source, answers, cutoff_len)
    if shares is None:
        return None
    kept = structured(past, cutoff_len - sum(shares), last_first=True)
    prompt = [(span.start, span.stop) for span in kept] + _shortened(source, shares[0])
    rooms = (min(_length(answer), shares[1]) for answer in answers)
    return prompt, [_shortened(*pair) for pair in zip(answers, rooms, strict=True)]


def _shares(
    source: Sequence[Section], targets: Sequence[Sequence[Section]], room: int
) -> tuple[int, int] | None:
    """How many tokens of a source and of its longest target stay; None where these do not fit."""
    source_len, target_len = _length(source), max(map(_length, targets))
    least_source = source_len - _length(source, content=True)
    least_target = max(_length(t) - max(_length(t, content=True) - 1, 0) for t in targets)
    if least_source + least_target > room:
        return None
    share, _ = budgets(source_len, target_len, room)
    share = min(max(share, least_source), room - least_target)
    target_kept = min(target_len, room - share)
    return min(source_len, room - target_kept), target_kept


def _length(sections: Sequence[Section], content: bool = False) -> int:
    return sum(s.stop - s.start for s in sections if s.is_content or not content)


def _shortened(sections: Sequence[Section], length: int) -> list[tuple[int, int]]:
    """Sections with their contents cut, so that `length` tokens stay; the longest first."""
    contents = [s.stop - s.start for s in sections if s.is_content]
    left = length - (_length(sections) - sum(contents))
    kept = {}
    for number, index in enumerate(sorted(range(len(contents)), key=lambda i: (contents[i], i))):
        kept[index] = min(contents[index], left // (len(contents) - number))
        left -= kept[index]
    sizes = iter(kept[index] for index in range(len(contents)))
    ends = ((s.start, s.start + next(sizes) if s.is_content else s.stop) for s in sections)
    return [(start, stop) for start, stop in ends if start < stop]


def outline(
    renderer: Renderer, conversation: Conversation, turns: Sequence[Turn]
) -> list[TurnTexts]:
    """The texts of turns cut where content begins and ends.

    Calls of tools, and the list of them, are structure: half of one is worth nothing.

    Args:
        renderer: that rendered the turns.
        conversation: what they were rendered from.
        turns: the turns.
    """
    contents: list[str] = []

    def mark(content: str) -> str:
        contents.append(content)
        return _MARK.format(len(contents) - 1)

    marked = replace(
        conversation,
        messages=tuple(_marked(message, mark) for message in conversation.messages),
        system=mark(conversation.system) if conversation.system else conversation.system,
    )
    try:
        drawn = renderer.turns(marked)
    except RowError:
        drawn = []
    if len(drawn) != len(turns):
        return [TurnTexts(["", turn.source, ""], ["", turn.target, ""]) for turn in turns]
    return [
        TurnTexts(
            _cut(turn.source, mark.source, contents), _cut(turn.target, mark.target, contents)
        )
        for turn, mark in zip(turns, drawn, strict=True)
    ]


def _marked(message: Message, mark: Callable[[str], str]) -> Message:
    """A message with marks for what it says; calls of tools stay."""
    if message.thought:
        message = replace(message, thought=mark(message.thought))
    if message.role == "function":
        return message
    if message.results:
        results = tuple(map(mark, message.results))
        return replace(message, content="\n".join(results), results=results)
    return replace(message, content=mark(message.content))


def _cut(text: str, drawn: str, contents: Sequence[str]) -> list[str]:
    """A text as structure and content in turns, by the same text with marks for contents."""
    parts = _MARKS.split(drawn)
    changes: tuple[Callable[[str], str], ...] = (str, str.strip)
    for change in changes:
        found = [change(contents[int(p)]) if i % 2 else p for i, p in enumerate(parts)]
        if "".join(found) == text:
            return found
    # the format changes what it writes: what is alike at both ends is structure
    head = _num_alike(text, parts[0])
    tail = _num_alike(reversed(text[head:]), reversed(parts[-1]))
    return [text[:head], text[head : len(text) - tail], text[len(text) - tail :]]


def _num_alike(one: Iterable[str], other: Iterable[str]) -> int:
    """How many characters are the same from the beginning of both."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def sections(
    turns: Sequence[TurnTexts], borders: Sequence[int], find: Callable[[list[str]], list[int]]
) -> list[TurnSections]:
    """The tokens of the texts of turns.

    A token that reaches over the border of content and structure is structure.

    Args:
        turns: from `outline`.
        borders: where sources and targets end, in tokens.
        find: gives the borders of parts of the whole text, of which those of even number take the
            tokens that reach over their ends.
    """
    sides = [side for turn in turns for side in turn]
    places = iter(find([text for side in sides for text in (*side, "")]))
    found = []
    at = 0
    for side, end in zip(sides, borders, strict=True):
        cut = []
        for number, place in zip(range(len(side)), places, strict=False):
            stop = end if number == len(side) - 1 else min(max(place, at), end)
            cut.append(Section(at, stop, is_content=bool(number % 2)))
            at = stop
        next(places)  # of the empty content that keeps the order of even and odd
        found.append(tuple(cut))
    return [TurnSections(*pair) for pair in zip(found[::2], found[1::2], strict=True)]
