"""What a row becomes in each stage: FEATURES holds a function from conversations to features.

`prompt` is what rows to evaluate on become where generated responses are judged; pairs and judged
answers are built by `answers`.
What is longer than cutoff_len is cut by `truncation`; targets are marked by place, never by the id
of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from llmray.data import answers, truncation
from llmray.data.conversation import Conversation, RowError
from llmray.data.encoding import Encoder
from llmray.data.row_features import FeatureOptions as FeatureOptions
from llmray.data.row_features import Outcome as Outcome
from llmray.data.row_features import RowFeatures as RowFeatures
from llmray.data.row_features import StageFeatures
from llmray.data.templates import Renderer, Turn
from llmray.data.truncation import Dropped, Span, TurnSections


def supervised(
    conversations: Sequence[Conversation],
    encoder: Encoder,
    renderer: Renderer | None,
    options: FeatureOptions,
) -> list[Outcome]:
    """Features of stage sft; a `RowError` for a conversation that the format cannot write."""
    assert renderer is not None
    rendered: list[tuple[Conversation, list[Turn]]] = []
    outcomes: list[Outcome | None] = []
    for conversation in conversations:
        try:
            rendered.append((conversation, renderer.turns(conversation)))
        except RowError as error:
            outcomes.append(error)
            continue
        outcomes.append(None)
    parts = [
        [part for turn in turns for part in (turn.source, turn.target)] for _, turns in rendered
    ]
    encoded = encoder.encode_parts(parts)
    bounds = encoded.bounds.tolist()

    def row(number: int) -> Outcome:
        ids, borders = encoded.ids[bounds[number] : bounds[number + 1]], encoded.borders[number]

        def sections() -> list[TurnSections]:
            conversation, turns = rendered[number]
            texts = truncation.outline(renderer, conversation, turns)
            return truncation.sections(texts, borders, partial(encoder.borders, ids=ids))

        return _supervised_row(ids, borders, options, sections)

    rows = map(row, range(len(rendered)))
    return [next(rows) if outcome is None else outcome for outcome in outcomes]


def _supervised_row(
    ids: np.ndarray,
    borders: list[int],
    options: FeatureOptions,
    sections: Callable[[], list[TurnSections]],
) -> Outcome:
    starts = [0, *borders[:-1]]
    spans = [
        Span(start, stop, bool(number % 2), number // 2)
        for number, (start, stop) in enumerate(zip(starts, borders, strict=True))
    ]
    last_turn = len(borders) // 2 - 1
    room = options.cutoff_len - (options.end_token is not None)
    cuts: tuple[int, ...] = ()
    if len(ids) > room:
        kept = _cut(spans, len(ids), room, options, sections)
        if not isinstance(kept, list):
            return kept
        if not kept:
            kept = [Span(0, 1, False, 0)]  # nothing can stay: it counts as one without a target
        spans, cuts = kept, truncation.cuts(kept, len(ids))
        ids = np.concatenate([ids[span.start : span.stop] for span in spans])
    row = RowFeatures(ids, _runs(spans, last_turn, options), cuts)
    return row if options.end_token is None else _with_ends(row, spans, last_turn, options)


def _cut(
    spans: list[Span],
    num_tokens: int,
    room: int,
    options: FeatureOptions,
    sections: Callable[[], list[TurnSections]],
) -> list[Span] | Dropped | RowError:
    """What stays of a row that has too many tokens."""
    match options.truncation:
        case "error":
            return truncation.refused(num_tokens, room)
        case "drop":
            return Dropped(num_tokens)
        case "structure":
            return truncation.structured(sections(), room, options.mask_history)
        case "llamafactory":
            return truncation.heads(spans, room, options.mask_history)
        case "keep_start":
            return truncation.window(spans, 0, room)
        case "keep_end":
            return truncation.window(spans, num_tokens - room, num_tokens)


def _runs(spans: Sequence[Span], last_turn: int, options: FeatureOptions) -> tuple[int, ...]:
    """Pairs of ends of what is learned, in the kept tokens; the first token never is."""
    runs: list[int] = []
    at = 0
    for start, stop, is_target, turn in spans:
        begin, at = max(at, 1), at + stop - start
        is_learned = is_target or options.train_on_prompt
        if options.mask_history and turn != last_turn:
            is_learned = False
        if not is_learned or begin >= at:
            continue
        if runs and runs[-1] == begin:
            runs[-1] = at
        else:
            runs += [begin, at]
    return tuple(runs)


def _with_ends(
    row: RowFeatures, spans: Sequence[Span], last_turn: int, options: FeatureOptions
) -> RowFeatures:
    """A row with the end of each learned response learned: at the token that follows it.

    After the last response that stays the end token stands in the row.
    """
    assert options.end_token is not None
    total = len(row.input_ids)
    is_target = np.zeros(total + 1, bool)
    for start, stop in zip(row.targets[::2], row.targets[1::2], strict=True):
        is_target[start:stop] = True
    places, at = [], 0
    for number, (start, stop, is_response, turn) in enumerate(spans):
        at += stop - start
        is_last = number == len(spans) - 1
        ends = is_last or not spans[number + 1].is_target
        is_learned = turn == last_turn or not options.mask_history
        if is_response and ends and is_learned and at > 0 and stop > start:
            is_target[at] = True
            places += [] if is_last else [at]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_target, [0]])))
    return RowFeatures(
        np.append(row.input_ids, np.int32(options.end_token)),
        tuple(edges.tolist()),
        row.cuts,
        tuple(number for place in places for number in (place, options.end_token)),
    )


def prompts(
    conversations: Sequence[Conversation],
    encoder: Encoder,
    renderer: Renderer | None,
    options: FeatureOptions,
) -> list[Outcome]:
    """What generation starts from, and the last response as the one target.

    Both are tokenized by themselves, as a prompt is that nobody has answered yet. A prompt that is
    too long keeps its end, where the response's header stands.
    """
    assert renderer is not None
    parts: list[str] = []
    outcomes: list[Outcome | None] = []
    for conversation in conversations:
        try:
            *said, _ = conversation.messages
            prompt = renderer.prompt(said, conversation.system, conversation.tools)
            parts += [prompt, renderer.turns(conversation)[-1].target]
        except RowError as error:
            outcomes.append(error)
        else:
            outcomes.append(None)
    ids, bounds = encoder.encode(parts)
    pieces = [ids[bounds[i] : bounds[i + 1]] for i in range(len(parts))]
    rows = iter(
        _prompted_row(prompt, response, options)
        for prompt, response in zip(pieces[::2], pieces[1::2], strict=True)
    )
    return [next(rows) if outcome is None else outcome for outcome in outcomes]


def _prompted_row(prompt: np.ndarray, response: np.ndarray, options: FeatureOptions) -> Outcome:
    cuts: tuple[int, ...] = ()
    num_tokens, cutoff_len = len(prompt) + len(response), options.cutoff_len
    if num_tokens > cutoff_len:
        if options.truncation == "error":
            return truncation.refused(num_tokens, cutoff_len)
        if options.truncation == "drop":
            return Dropped(num_tokens)
        prompt_len, response_len = truncation.budgets(len(prompt), len(response), cutoff_len)
        dropped = (len(prompt) - prompt_len, len(response) - response_len)
        places = (0, prompt_len + response_len)
        pairs = zip(places, dropped, strict=True)
        cuts = tuple(number for place, count in pairs if count for number in (place, count))
        prompt, response = prompt[len(prompt) - prompt_len :], response[:response_len]
    start, stop = max(1, len(prompt)), len(prompt) + len(response)
    return RowFeatures(
        np.concatenate([prompt, response]), (start, stop) if start < stop else (), cuts
    )


def texts(
    conversations: Sequence[Conversation],
    encoder: Encoder,
    renderer: Renderer | None,
    options: FeatureOptions,
) -> list[Outcome]:
    """Features of stage pt: each text with the end-of-text token, all of it learned.

    A text that is cut at its end is one that goes on: it has no end-of-text token.
    """
    wholes = [conversation.messages[-1].content for conversation in conversations]
    ids, bounds = encoder.encode(wholes)
    prefix = np.array(options.text_prefix, np.int32)
    suffix = np.array(options.text_suffix, np.int32)
    rows: list[Outcome] = []
    for number, whole in enumerate(wholes):
        if not whole.strip():
            rows.append(RowFeatures(ids[:0], ()))
            continue
        row = np.concatenate([prefix, ids[bounds[number] : bounds[number + 1]], suffix])
        rows.append(_text_row(row, options))
    return rows


def _text_row(row: np.ndarray, options: FeatureOptions) -> Outcome:
    cuts: tuple[int, ...] = ()
    over = 0 if options.packing else len(row) - options.cutoff_len
    if over > 0:
        match options.truncation:
            case "error":
                return truncation.refused(len(row), options.cutoff_len)
            case "drop":
                return Dropped(len(row))
            case "keep_end":
                row, cuts = row[over:], (0, over)
            case _:
                row, cuts = row[:-over], (options.cutoff_len, over)
    return RowFeatures(row, (1, len(row)) if len(row) > 1 else (), cuts)


def openings(
    conversations: Sequence[Conversation],
    encoder: Encoder,
    renderer: Renderer | None,
    options: FeatureOptions,
) -> list[Outcome]:
    """What responses are sampled to: prompts with the header of the response, nothing learned.

    A prompt that is too long keeps its end, where that header stands; its head with `llamafactory`
    and `keep_start`.
    """
    assert renderer is not None
    texts: list[str] = []
    outcomes: list[Outcome | None] = []
    for one in conversations:
        try:
            texts.append(renderer.prompt(one.messages, one.system, one.tools))
        except RowError as error:
            outcomes.append(error)
        else:
            outcomes.append(None)
    ids, bounds = encoder.encode(texts)
    rows = iter(
        _opening(ids[start:stop], options)
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    )
    return [next(rows) if outcome is None else outcome for outcome in outcomes]


def _opening(ids: np.ndarray, options: FeatureOptions) -> Outcome:
    over = len(ids) - options.cutoff_len
    if over <= 0:
        return RowFeatures(ids, (), is_prompt=True)
    match options.truncation:
        case "error":
            return truncation.refused(len(ids), options.cutoff_len)
        case "drop":
            return Dropped(len(ids))
        case "llamafactory" | "keep_start":
            return RowFeatures(ids[:-over], (), (options.cutoff_len, over), is_prompt=True)
        case _:
            return RowFeatures(ids[over:], (), (0, over), is_prompt=True)


FEATURES: dict[str, StageFeatures] = {
    "pt": StageFeatures(texts, "text"),
    "sft": StageFeatures(supervised, "responses"),
    "prompt": StageFeatures(prompts, "responses"),
    "pairwise": StageFeatures(answers.pairwise, "pair"),
    "kto": StageFeatures(answers.judged, "judged"),
    "opening": StageFeatures(openings, "prompt"),
}
# What each stage learns from; stages that learn from the same share their prepared data.
OF_STAGE = {
    "pt": "pt",
    "sft": "sft",
    "rm": "pairwise",
    "dpo": "pairwise",
    "kto": "kto",
    "ppo": "opening",
}
