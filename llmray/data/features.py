"""What a row becomes in each stage: FEATURES holds a function from conversations to features.

`prompt` is what rows to evaluate on become where generated responses are judged.
Lengths are cut by LLaMA-Factory's budgets, turn by turn; targets are marked by place, never by the
id of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmray.data.conversation import Conversation, RowError
from llmray.data.encoding import Encoder
from llmray.data.templates import Renderer


@dataclass(frozen=True)
class FeatureOptions:
    """Arguments that decide about features.

    `text_prefix` and `text_suffix` are ids before and after each text of stage pt; `packing` says
    that its texts are later laid into full blocks, so that none is cut. `end_token` is the token
    that is learned at the end of responses where the text has none there (efficient_eos).
    """

    cutoff_len: int
    train_on_prompt: bool = False
    mask_history: bool = False
    packing: bool = False
    text_prefix: tuple[int, ...] = ()
    text_suffix: tuple[int, ...] = ()
    end_token: int | None = None


@dataclass(frozen=True)
class RowFeatures:
    """The tokens of a row; `targets` are pairs of ends of the runs of tokens that are learned.

    `cuts` are pairs too: before which token `cutoff_len` took tokens out, and how many. `instead`
    are pairs of a place and the token that is learned there instead of the one that stands there.
    """

    input_ids: np.ndarray  # (T,) int32
    targets: tuple[int, ...]
    cuts: tuple[int, ...] = ()
    instead: tuple[int, ...] = ()

    @property
    def is_truncated(self) -> bool:
        """Whether tokens were taken out."""
        return bool(self.cuts)

    @property
    def num_targets(self) -> int:
        """How many tokens are learned."""
        return sum(self.targets[1::2]) - sum(self.targets[::2])


Outcome = RowFeatures | RowError
Build = Callable[[Sequence[Conversation], Encoder, Renderer | None, FeatureOptions], list[Outcome]]


@dataclass(frozen=True)
class StageFeatures:
    """One stage: how its features are built, whether its rows need a response and a renderer."""

    build: Build
    needs_response: bool


def supervised(
    conversations: Sequence[Conversation],
    encoder: Encoder,
    renderer: Renderer | None,
    options: FeatureOptions,
) -> list[Outcome]:
    """Features of stage sft; a `RowError` for a conversation that the format cannot write."""
    assert renderer is not None
    parts: list[list[str]] = []
    outcomes: list[Outcome | None] = []
    for conversation in conversations:
        try:
            turns = renderer.turns(conversation)
        except RowError as error:
            outcomes.append(error)
            continue
        parts.append([part for turn in turns for part in (turn.source, turn.target)])
        outcomes.append(None)
    encoded = encoder.encode_parts(parts)
    rows = iter(
        _supervised_row(encoded.ids[first:last], borders, options)
        for first, last, borders in zip(
            encoded.bounds.tolist(), encoded.bounds[1:].tolist(), encoded.borders, strict=False
        )
    )
    return [next(rows) if outcome is None else outcome for outcome in outcomes]


def _supervised_row(ids: np.ndarray, borders: list[int], options: FeatureOptions) -> RowFeatures:
    starts = [0, *borders[:-1]]
    # (start, stop, whether it is a target), in the order of the text
    parts = [
        (start, stop, bool(number % 2))
        for number, (start, stop) in enumerate(zip(starts, borders, strict=True))
    ]
    room = options.cutoff_len - (options.end_token is not None)
    cuts: tuple[int, ...] = ()
    if len(ids) > room:
        parts = _within_budget(parts, room, last_first=options.mask_history)
        cuts = _cuts(parts, len(ids))
        ids = np.concatenate([ids[start:stop] for start, stop, _ in parts])
    row = RowFeatures(ids, _runs(parts, options), cuts)
    return row if options.end_token is None else _with_ends(row, parts, options)


def _cuts(parts: Sequence[tuple[int, int, bool]], total: int) -> tuple[int, ...]:
    """Pairs of a place in the kept tokens, and how many of `total` were taken out there."""
    cuts: list[int] = []
    at = place = 0
    for start, stop, _ in [*parts, (total, total, False)]:
        if start > at and cuts[-2:-1] == [place]:
            cuts[-1] += start - at
        elif start > at:
            cuts += [place, start - at]
        place, at = place + stop - start, stop
    return tuple(cuts)


def _runs(parts: Sequence[tuple[int, int, bool]], options: FeatureOptions) -> tuple[int, ...]:
    """Pairs of ends of what is learned, in the kept tokens; the first token never is."""
    runs: list[int] = []
    at = 0
    for number, (start, stop, is_target) in enumerate(parts):
        begin, at = max(at, 1), at + stop - start
        is_learned = is_target or options.train_on_prompt
        if options.mask_history and number < len(parts) - 2:
            is_learned = False
        if not is_learned or begin >= at:
            continue
        if runs and runs[-1] == begin:
            runs[-1] = at
        else:
            runs += [begin, at]
    return tuple(runs)


def _with_ends(
    row: RowFeatures, parts: Sequence[tuple[int, int, bool]], options: FeatureOptions
) -> RowFeatures:
    """A row with the end of each learned response learned: at the token that follows it.

    After the last response the end token stands in the row.
    """
    assert options.end_token is not None
    total = len(row.input_ids)
    is_target = np.zeros(total + 1, bool)
    for start, stop in zip(row.targets[::2], row.targets[1::2], strict=True):
        is_target[start:stop] = True
    places, at = [], 0
    for number, (start, stop, is_response) in enumerate(parts):
        at += stop - start
        is_last = number == len(parts) - 1
        if is_response and (is_last or not options.mask_history) and at > 0 and stop > start:
            is_target[at] = True
            places += [] if is_last else [at]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_target, [0]])))
    return RowFeatures(
        np.append(row.input_ids, np.int32(options.end_token)),
        tuple(edges.tolist()),
        row.cuts,
        tuple(number for place in places for number in (place, options.end_token)),
    )


def _within_budget(
    parts: Sequence[tuple[int, int, bool]], cutoff_len: int, last_first: bool
) -> list[tuple[int, int, bool]]:
    """The parts cut to `cutoff_len` tokens together, turn by turn while tokens remain."""
    turns = list(zip(parts[::2], parts[1::2], strict=True))
    kept: list[list[tuple[int, int, bool]]] = []
    used = 0
    for source, target in reversed(turns) if last_first else turns:
        if used >= cutoff_len:
            break
        source_len, target_len = budgets(
            source[1] - source[0], target[1] - target[0], cutoff_len - used
        )
        used += source_len + target_len
        kept.append(
            [
                (source[0], source[0] + source_len, False),
                (target[0], target[0] + target_len, True),
            ]
        )
    if last_first:
        kept.reverse()
    return [part for turn in kept for part in turn]


def budgets(source_len: int, target_len: int, room: int) -> tuple[int, int]:
    """How many tokens of a source and its target are kept in `room`: LLaMA-Factory's rule.

    A target below half the room is kept whole, else a source below half is; else both shrink in
    proportion. Each keeps its head.
    """
    if target_len * 2 < room:
        most = room
    elif source_len * 2 < room:
        most = room - source_len
    else:
        most = int(room * (target_len / (source_len + target_len)))
    target_kept = min(target_len, most)
    return min(source_len, max(room - target_kept, 0)), target_kept


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
        _prompted_row(prompt, response, options.cutoff_len)
        for prompt, response in zip(pieces[::2], pieces[1::2], strict=True)
    )
    return [next(rows) if outcome is None else outcome for outcome in outcomes]


def _prompted_row(prompt: np.ndarray, response: np.ndarray, cutoff_len: int) -> RowFeatures:
    cuts: tuple[int, ...] = ()
    if len(prompt) + len(response) > cutoff_len:
        prompt_len, response_len = budgets(len(prompt), len(response), cutoff_len)
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
    """Features of stage pt: each text with the end-of-text token, all of it learned."""
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
        cuts: tuple[int, ...] = ()
        if not options.packing and len(row) > options.cutoff_len:
            cuts = (options.cutoff_len, len(row) - options.cutoff_len)
            row = row[: options.cutoff_len]
        rows.append(RowFeatures(row, (1, len(row)) if len(row) > 1 else (), cuts))
    return rows


FEATURES: dict[str, StageFeatures] = {
    "pt": StageFeatures(texts, needs_response=False),
    "sft": StageFeatures(supervised, needs_response=True),
    "prompt": StageFeatures(prompts, needs_response=True),
}
