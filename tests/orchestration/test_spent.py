"""What a sweep says of its costs."""

from llmray.model.mapped import Load
from llmray.orchestration.spent import Spent, described_loads
from llmray.orchestration.trial_board import Look


def test_weights_that_are_mapped_count_once_on_a_node():
    loads = [Load("/m", 100 * 2**20, 100 * 2**20)] * 3 + [Load("/m", 50 * 2**20, 0)]
    assert described_loads("10.0.0.1", loads) == (
        "base weights on 10.0.0.1: 4 loads; 100 MiB mapped once and shared by them, 50 MiB copied "
        "by all together"
    )
    small = [Load("/m", 60_000, 60_000), Load("/m", 30_000, 0)]
    told = described_loads("10.0.0.1", small)
    assert "0.06 MiB mapped once and shared by them, 0.03 MiB copied" in told


def test_seconds_of_all_slots_are_added_up():
    spent = Spent()
    for busy, between, asked in ((30.0, 2.0, 4.0), (50.0, 2.0, 5.0)):
        spent.note(Look([], True, None, [], 1, busy, between, [], asked))
    assert list(spent.lines(3, [])) == [
        "data: 0 prepared set(s) for 3 trials, 0 rows tokenized for this",
        "workers: 2 group(s), ready after 5.0 s at most; 80.0 s in trials, 4.0 s between them "
        "(5.0 %)",
    ]
