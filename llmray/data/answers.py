"""Features of answers that are compared or judged: a prompt, and one or two answers behind it.

A row holds the prompt once: `[prompt, chosen, rejected]` for a pair. What the answers do not share
of their prompts (a token that reaches over the border, a thought that a format writes before one
of them) stands before each of them, and is no target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from llmray.data import truncation
from llmray.data.conversation import Conversation, Message, RowError
from llmray.data.encoding import Encoder
from llmray.data.row_features import Equal, FeatureOptions, Outcome, RowFeatures
from llmray.data.templates import Renderer, Turn
from llmray.data.truncation import Dropped, Section, Span, TurnSections

PROMPT = 0  # the part of a row before its answers, which are parts 1, 2, ...


@dataclass(frozen=True)
class _Written:
    """A conversation as text and tokens; `learned` is where its last answer begins.

    `num_own` counts the tokens of the text itself: an end token may follow.
    """

    conversation: Conversation
    turns: list[Turn]
    ids: np.ndarray  # (T,) int32
    borders: list[int]
    num_own: int

    @property
    def learned(self) -> int:
        return self.borders[-2]


def pairwise(
    conversations: Sequence[Conversation],
    encoder: Encoder,
    renderer: Renderer | None,
    options: FeatureOptions,
) -> list[Outcome]:
    """Features of pairs, for stages rm and dpo: of conversations with `chosen` and one `rejected`.

    Pairs whose answers are the same tokens, cut or not, are `Equal`.
    """
    assert renderer is not None
    whole = [_answered(conversation) for conversation in conversations]
    written = iter(_write([one for pair in whole for one in pair], encoder, renderer, options))
    return [
        _outcome([next(written), next(written)], encoder, renderer, options) for _ in conversations
    ]


def judged(
    conversations: Sequence[Conversation],
    encoder: Encoder,
    renderer: Renderer | None,
    options: FeatureOptions,
) -> list[Outcome]:
    """Features of stage kto: of conversations whose last response is wanted or not."""
    assert renderer is not None
    outcomes = [
        _outcome([one], encoder, renderer, options)
        for one in _write(conversations, encoder, renderer, options)
    ]
    return [
        replace(outcome, is_wanted=conversation.is_wanted)
        if isinstance(outcome, RowFeatures)
        else outcome
        for outcome, conversation in zip(outcomes, conversations, strict=True)
    ]


def _answered(conversation: Conversation) -> tuple[Conversation, Conversation]:
    """The conversation with each of its answers."""
    assert conversation.chosen is not None
    [rejected] = conversation.rejected

    def ending(answer: Message) -> Conversation:
        messages = (*conversation.messages, answer)
        return replace(conversation, messages=messages, chosen=None, rejected=())

    return ending(conversation.chosen), ending(rejected)


def _write(
    conversations: Sequence[Conversation],
    encoder: Encoder,
    renderer: Renderer,
    options: FeatureOptions,
) -> Iterator[_Written | RowError]:
    turns: list[list[Turn] | RowError] = []
    for conversation in conversations:
        try:
            turns.append(renderer.turns(conversation))
        except RowError as error:
            turns.append(error)
    parts = [
        [part for turn in one for part in (turn.source, turn.target)]
        for one in turns
        if not isinstance(one, RowError)
    ]
    encoded = encoder.encode_parts(parts)
    bounds = encoded.bounds.tolist()
    end = [] if options.end_token is None else [options.end_token]
    number = 0
    for conversation, found in zip(conversations, turns, strict=True):
        if isinstance(found, RowError):
            yield found
            continue
        ids = encoded.ids[bounds[number] : bounds[number + 1]]
        closed = np.concatenate([ids, np.array(end, np.int32)])
        yield _Written(conversation, found, closed, encoded.borders[number], len(ids))
        number += 1


def _outcome(
    written: Sequence[_Written | RowError],
    encoder: Encoder,
    renderer: Renderer,
    options: FeatureOptions,
) -> Outcome:
    """The row of a prompt with its answers, each written after the prompt."""
    wholes = [one for one in written if isinstance(one, _Written)]
    if len(wholes) < len(written):
        return next(one for one in written if isinstance(one, RowError))
    shared = _num_shared(wholes)
    ids = np.concatenate([wholes[0].ids[:shared], *(one.ids[shared:] for one in wholes)])
    offsets = np.cumsum([0, *(len(one.ids) - shared for one in wholes)]).tolist()  # of answers
    spans = [Span(0, shared, False, PROMPT)]
    for part, (one, offset) in enumerate(zip(wholes, offsets, strict=False), start=1):
        spans += [
            Span(shared + offset, one.learned + offset, False, part),
            Span(one.learned + offset, len(one.ids) + offset, True, part),
        ]
    if max(len(one.ids) for one in wholes) > options.cutoff_len:

        def sections() -> list[list[TurnSections]]:
            return [_sections(one, encoder, renderer) for one in wholes]

        kept = _cut(spans, offsets[:-1], options, sections)
        if not isinstance(kept, list):
            return kept
        return _row(ids, kept, len(wholes))
    return _row(ids, spans, len(wholes))


def _num_shared(wholes: Sequence[_Written]) -> int:
    """How many tokens at the beginning are those of all prompts."""
    most = min(one.learned for one in wholes)
    first, last = wholes[0].ids[:most], wholes[-1].ids[:most]
    differing = np.flatnonzero(first != last)
    return int(differing[0]) if len(differing) else most


def _sections(one: _Written, encoder: Encoder, renderer: Renderer) -> list[TurnSections]:
    texts = truncation.outline(renderer, one.conversation, one.turns)
    ids = one.ids[: one.num_own]
    found = truncation.sections(texts, one.borders, partial(encoder.borders, ids=ids))
    if one.num_own == len(one.ids):
        return found
    *past, last = found
    end = Section(one.num_own, len(one.ids), is_content=False)
    return [*past, last._replace(target=(*last.target, end))]


def _cut(
    spans: list[Span],
    offsets: Sequence[int],
    options: FeatureOptions,
    sections: Callable[[], list[list[TurnSections]]],
) -> list[Span] | Dropped | RowError:
    """What stays of a row of which a sequence, the prompt with an answer, has too many tokens."""
    room, shared = options.cutoff_len, spans[0].stop
    lengths = _part_lengths(spans, len(offsets))
    longest = shared + max(lengths)
    match options.truncation:
        case "error":
            return truncation.refused(longest, room)
        case "drop":
            return Dropped(longest)
        case "structure":
            return _structured(spans, offsets, room, sections())
        case "llamafactory":
            prompt_len, answer_len = truncation.budgets(shared, max(lengths), room)
        case "keep_start":
            prompt_len, answer_len = min(shared, room), max(room - shared, 0)
        case "keep_end":
            over = longest - room
            return _heads_off(spans, lengths, min(over, shared), max(over - shared, 0))
    return _heads(spans, lengths, prompt_len, answer_len)


def _part_lengths(spans: Sequence[Span], count: int) -> list[int]:
    """Tokens of each answer."""
    return [sum(s.stop - s.start for s in spans if s.turn == part) for part in range(1, count + 1)]


def _heads(
    spans: Sequence[Span], lengths: Sequence[int], prompt_len: int, answer_len: int
) -> list[Span]:
    """The heads of the prompt and of each answer."""
    kept = truncation.window(spans[:1], 0, prompt_len)
    at = spans[0].stop
    for length in lengths:
        kept += truncation.window(spans[1:], at, at + min(length, answer_len))
        at += length
    return kept


def _heads_off(
    spans: Sequence[Span], lengths: Sequence[int], from_prompt: int, from_answers: int
) -> list[Span]:
    """All but the heads of the prompt and of each answer."""
    kept = truncation.window(spans[:1], from_prompt, spans[0].stop)
    at = spans[0].stop
    for length in lengths:
        kept += truncation.window(spans[1:], at + from_answers, at + length)
        at += length
    return kept


def _structured(
    spans: Sequence[Span],
    offsets: Sequence[int],
    room: int,
    sections: Sequence[Sequence[TurnSections]],
) -> list[Span]:
    """Structure kept, contents cut: the prompt as for the longest answer, answers to equal room."""
    shared = spans[0].stop
    *past, last = sections[0]
    if any(turns[-1].source[0].start > shared for turns in sections):
        # an answer changes how earlier turns are written: there is no structure that both share
        lengths = _part_lengths(spans, len(offsets))
        return _heads(spans, lengths, *truncation.budgets(shared, max(lengths), room))
    answers = []
    for offset, turns in zip(offsets, sections, strict=True):
        behind = _clipped(turns[-1].source, shared, None)
        unlike = [section._replace(is_content=False) for section in behind]
        moved = [*unlike, *turns[-1].target]
        answers.append([s._replace(start=s.start + offset, stop=s.stop + offset) for s in moved])
    found = truncation.structured_answers(past, _clipped(last.source, 0, shared), answers, room)
    if found is None:
        return [Span(0, 1, False, PROMPT)]  # it counts as one without a target
    prompt, kept = found
    made = [Span(start, stop, False, PROMPT) for start, stop in prompt]
    for part, pieces in enumerate(kept, start=1):
        own = [span for span in spans if span.turn == part]
        made += [cut for piece in pieces for cut in truncation.window(own, *piece)]
    return made


def _clipped(sections: Sequence[Section], start: int, stop: int | None) -> list[Section]:
    """The parts of sections between two places."""
    cut = [
        s._replace(start=max(s.start, start), stop=s.stop if stop is None else min(s.stop, stop))
        for s in sections
    ]
    return [section for section in cut if section.start < section.stop]


def _row(ids: np.ndarray, spans: Sequence[Span], num_answers: int) -> Outcome:
    """The row of the spans that stay; without targets where an answer has none left."""
    kept = np.concatenate([ids[:0], *(ids[span.start : span.stop] for span in spans)])
    lengths = [sum(s.stop - s.start for s in spans if s.turn == PROMPT)]
    lengths += _part_lengths(spans, num_answers)
    starts = np.cumsum(lengths[:-1]).tolist()
    answers = [kept[start : start + size] for start, size in zip(starts, lengths[1:], strict=True)]
    if num_answers == 2 and len(answers[0]) and np.array_equal(answers[0], answers[1]):
        return Equal()
    runs: list[int] = []
    at, learned = 0, set()
    for span in spans:
        first = at if span.turn == PROMPT else starts[span.turn - 1]
        # without a prompt the first token of an answer follows nothing
        begin, at = max(at, first + (starts[0] == 0)), at + span.stop - span.start
        if span.is_target and begin < at:
            learned.add(span.turn)
            runs += [begin, at]
    targets = tuple(runs) if len(learned) == num_answers else ()
    return RowFeatures(kept, targets, truncation.cuts(spans, len(ids)), (), tuple(starts))
