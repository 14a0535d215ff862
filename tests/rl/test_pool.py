"""The pool with handles that wait, die, hang, come back and answer nonsense; no Ray."""

import math
import threading
import time
from concurrent.futures import Future

import pytest
from pool_handles import QUICK, Fake, answers, length, scored, wait_for

from llmray.errors import RewardError
from llmray.rl.handles import HandleLost, InProcess
from llmray.rl.pool import Pool, PoolOptions


@pytest.fixture
def pool():
    made = []

    def make(*handles, on_evict=None, **options):
        told = {"on_evict": on_evict} if on_evict else {}
        made.append(Pool(handles, PoolOptions(**{**QUICK, **options}), **told))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_scores_come_in_the_order_of_the_answers(pool):
    fakes = [Fake("a", 1e-4), Fake("b"), Fake("c", 2e-4)]
    of = pool(*fakes)
    several = [of.submit(answers(n)) for n in (7, 0, 1, 12)]
    assert [f.result(300) for f in several] == [[float(i) for i in range(n)] for n in (7, 0, 1, 12)]
    assert of.counts.scored == 20
    assert all(fake.batches for fake in fakes)


@pytest.mark.parametrize("batching", ["arrival", "fixed"])
def test_batches_have_at_most_so_many_tokens_and_one_answer_at_least(pool, batching):
    fake = Fake()
    of = pool(fake, batching=batching)
    assert scored(of, answers(9)) == [float(i) for i in range(9)]
    assert max(map(len, fake.batches)) == 4  # 40 tokens
    fake.batches.clear()
    scored(of, answers(3, tokens=500))
    assert [len(batch) for batch in fake.batches] == [1, 1, 1]


def test_a_free_handle_takes_what_has_arrived_by_then(pool):
    fake = Fake(seconds=2e-3)
    of = pool(fake, slots=1)
    first = of.submit(answers(1))
    time.sleep(0.005)
    rest = [of.submit(answers(1)) for _ in range(4)]
    assert [f.result(300) for f in (first, *rest)] == [[0.0]] * 5
    assert [len(batch) for batch in fake.batches] == [1, 4]


def test_fixed_batches_do_not_depend_on_arrival(pool):
    def batches(pause):
        fakes = [Fake("a", 1e-4), Fake("b", pause)]
        of = pool(*fakes, batching="fixed", request_timeout_s=60)
        futures = []
        for size in (5, 3):
            futures.append(of.submit(answers(size)))
            time.sleep(pause * 10)
        for future in futures:
            future.result(300)
        return sorted([a.id for a in batch] for fake in fakes for batch in fake.batches)

    assert batches(0.0) == batches(2e-3)


@pytest.mark.parametrize("count", [2, 4, 64])
def test_several_handles_share_the_work(pool, count):
    """No handle takes much more than its share, and together they are sooner than one."""
    seconds = 0.01 if count == 64 else 0.05  # an answer
    fakes = [Fake(str(i), seconds / 10) for i in range(count)]
    of = pool(*fakes, request_timeout_s=60)
    started = time.perf_counter()
    scored(of, answers(8 * count))
    elapsed = time.perf_counter() - started
    assert elapsed < 8 * count * seconds  # the share below is what tells; a busy machine is late
    assert max(sum(map(len, fake.batches)) for fake in fakes) <= 12
    assert of.counts.busy_s > 0.8 * 8 * count * seconds


class Held(Fake):
    """A handle whose answers come when the test says so."""

    def call(self, method, *args):
        self.batches.append(args[0])
        self.held.append(Future())
        return self.held[-1]

    def answer(self):
        batch = self.batches[len(self.batches) - len(self.held)]
        self.held.pop(0).set_result([length(answer) for answer in batch])

    def sizes(self):
        return [len(batch) for batch in self.batches]


@pytest.mark.parametrize(
    ("load", "first", "second"), [(0, [1, 1, 21], [1, 1, 19]), (100, [1, 1, 16], [1, 1, 24])]
)
def test_a_free_handle_takes_its_share_of_what_waits(pool, load, first, second):
    one, other = Held("one"), Held("other")
    made = pool(one, other, batch_tokens=10_000, request_timeout_s=300)
    before = made.submit(answers(4))
    wait_for(lambda: len(one.held) + len(other.held) == 4)
    one.load = load  # of other callers
    waiting = made.submit(answers(40))
    wait_for(lambda: made._waiting.tokens == 400)
    one.answer()
    wait_for(lambda: one.sizes() == first)
    other.answer()
    wait_for(lambda: other.sizes() == second)
    for handle in (one, one, other, other):
        handle.answer()
    assert before.result(300) == [0.0, 1.0, 2.0, 3.0]
    assert waiting.result(300) == [float(i) for i in range(40)]


def test_the_less_loaded_handle_is_chosen(pool):
    slow, quick = Fake("slow", 5e-3), Fake("quick", 1e-5)
    of = pool(slow, quick, slots=1)
    scored(of, answers(20))
    assert sum(map(len, quick.batches)) > 2 * sum(map(len, slow.batches))


def test_ranks_prefer_different_handles():
    fakes = [Fake("a"), Fake("b"), Fake("c")]
    for rank, fake in enumerate(fakes):
        of = Pool(fakes, PoolOptions(), first=rank)
        scored(of, answers(1))
        of.close()
        assert len(fake.batches) == 1


def test_a_handle_that_dies_is_taken_out_and_others_take_over(pool):
    dying, other = Fake("dying", fails=[HandleLost("its node is gone")]), Fake("other")
    evicted = []
    of = pool(dying, other, on_evict=lambda handle, reason: evicted.append((handle.name, reason)))
    dying.is_dead = False
    assert scored(of, answers(12)) == [float(i) for i in range(12)]
    assert evicted == [("dying", "lost")]
    assert of.counts.retried >= 1
    assert of.counts.failed == 0


def test_a_handle_that_hangs_is_taken_out_and_let_back_in_when_it_answers(pool):
    hanging, other = Fake("hanging", fails=["hang"]), Fake("other")
    evicted = []

    def kill(handle, reason):
        evicted.append((handle.name, reason))

    of = pool(hanging, other, on_evict=kill)
    assert scored(of, answers(12)) == [float(i) for i in range(12)]
    assert evicted == [("hanging", "hung")]
    assert of.counts.readmitted == 0
    hanging.batches.clear()
    hanging.is_hung = False
    wait_for(lambda: of.counts.readmitted)
    assert of.counts.readmitted == 1
    scored(of, answers(12))
    assert hanging.batches
    hanging.held[0].set_result([99.0] * 12)  # too late: nobody waits for it
    assert scored(of, answers(3)) == [0.0, 1.0, 2.0]


def test_slow_handles_that_go_on_answering_do_not_hang(pool):
    of = pool(Fake(seconds=0.02), batch_tokens=10, request_timeout_s=0.6)  # 0.2 s each, 1.6 in all
    assert len(scored(of, answers(8))) == 8
    assert of.counts.evicted == 0


def test_when_all_are_gone_the_pool_waits_for_one_to_come_back(pool):
    fake = Fake()
    of = pool(fake)
    fake.is_dead = True
    future = of.submit(answers(4))
    wait_for(lambda: of.counts.evicted)
    assert not future.done()
    fake.is_dead = False
    assert future.result(300) == [0.0, 1.0, 2.0, 3.0]
    assert (of.counts.evicted, of.counts.readmitted) == (1, 1)


def test_when_all_stay_gone_the_run_fails_with_the_reason(pool):
    of = pool(Fake("a"), Fake("b"), on_error="mask")
    for member in of._members:
        member.handle.is_dead = True
    started = time.perf_counter()
    with pytest.raises(RewardError, match=r"all 2 reward models .* 0\.6 s .*a is dead.*_timeout_s"):
        scored(of, answers(4))
    assert 0.5 < time.perf_counter() - started < 60


def odd(answer):
    if answer.response == "5":
        raise ValueError("five is right out")
    return length(answer)


def test_an_answer_without_a_score_fails_the_run_by_default_and_is_named(pool):
    with pytest.raises(RewardError, match=r"answer run-0-0-5 .* five is right out.*reward_error"):
        scored(pool(Fake(score=odd)), answers(12))


@pytest.mark.parametrize(("how", "expected"), [("mask", math.nan), ("value", -1.0)])
def test_an_answer_without_a_score_is_masked_or_gets_a_value_and_is_counted(pool, how, expected):
    of = pool(Fake("a", score=odd), Fake("b", score=odd), on_error=how, error_value=-1.0)
    found = scored(of, answers(12))
    assert found[5] == pytest.approx(expected, nan_ok=True)
    assert found[:5] + found[6:] == [float(i) for i in (*range(5), *range(6, 12))]
    assert (of.counts.failed, of.counts.scored) == (1, 11)
    assert found.given == ({5} if how == "value" else set())


def test_an_answer_is_tried_on_another_handle(pool):
    of = pool(Fake("a", score=odd), Fake("b"))
    assert scored(of, answers(12)) == [float(i) for i in range(12)]
    assert of.counts.failed == 0


@pytest.mark.parametrize(
    ("score", "told"),
    [
        (lambda batch: [math.nan] * len(batch), "gave the score nan"),
        (lambda batch: [math.inf] * len(batch), "gave the score inf"),
        (lambda batch: [0.0] * (len(batch) + 1), "gave 2 scores for 1 answers"),
        (lambda batch: ["1.0"] * len(batch), "gave '1.0' where a number"),
        (lambda batch: None, "gave a NoneType where a list"),
    ],
)
def test_nonsense_is_no_score(pool, score, told):
    class Odd(Fake):
        def work(self, batch, error):
            return score(batch)

    with pytest.raises(RewardError, match=told):
        scored(pool(Odd()), answers(3))


def test_a_request_that_kills_every_handle_does_not_kill_them_forever(pool):
    class Fragile(Fake):
        def work(self, batch, error):
            if any(answer.response == "2" for answer in batch):
                raise HandleLost("out of memory")
            return super().work(batch, error)

    of = pool(*(Fragile(str(i)) for i in range(3)), batch_tokens=10, on_error="mask")
    found = scored(of, answers(6))
    assert [i for i, score in enumerate(found) if math.isnan(score)] == [2]
    assert of.counts.evicted == 3


def test_one_failed_submission_leaves_the_others_alone(pool):
    of = pool(Fake(seconds=1e-4, score=odd))
    good, bad, late = (of.submit(answers(n)) for n in (4, 8, 5))
    assert good.result(300) == [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(RewardError):
        bad.result(300)
    assert late.result(300) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_batch_of_two_submissions_of_which_one_fails_still_scores_the_other(pool):
    first = Fake(seconds=1e-3, score=odd)
    of = pool(first, slots=1, max_attempts=1)
    futures = [of.submit(answers(n)) for n in (1, 2, 6, 3)]
    with pytest.raises(RewardError, match="five is right out"):
        futures[2].result(300)
    assert [futures[i].result(300) for i in (0, 1, 3)] == [[0.0], [0.0, 1.0], [0.0, 1.0, 2.0]]


def test_a_closed_pool_leaves_nothing_waiting_and_no_thread():
    of = Pool([Fake(fails=["hang"])], PoolOptions())
    future = of.submit(answers(2))
    time.sleep(0.05)
    of.close()
    with pytest.raises(RewardError, match="closed"):
        future.result(60)
    assert not of._thread.is_alive()


def test_a_pool_needs_a_handle():
    with pytest.raises(ValueError, match="needs a handle"):
        Pool([], PoolOptions())


def test_an_object_of_this_process_behind_a_handle():
    class Served:
        def score(self, asked):
            self.thread = threading.current_thread()
            return [length(answer) for answer in asked]

    served = Served()
    handle = InProcess("own", served)
    of = Pool([handle], PoolOptions())
    assert scored(of, answers(3)) == [0.0, 1.0, 2.0]
    assert served.thread is not threading.current_thread()
    assert handle.call("ping").result(60) is None
    of.close()
    handle.close()


def test_what_others_have_sent_counts_as_load(pool):
    fakes = [Fake("a"), Fake("b")]
    fakes[0].load = 1000
    assert scored(pool(*fakes, batch_tokens=10), answers(2)) == [0.0, 1.0]
    assert [len(fake.batches) for fake in fakes] == [0, 2]


def test_a_handle_may_say_how_long_it_was_busy(pool):
    fake = Fake("a")
    fake.busy_s = 0.0
    of = pool(fake)
    for total in (2.5, 4.0):
        fake.busy_s = total
        scored(of, answers(1))
        assert of.counts.busy_s == total


def test_who_has_its_share_waits_for_those_who_are_about_to_be_free(pool):
    """None gets more than its share because it was the first to have a free slot again."""
    one, other = Held("one"), Held("other")
    made = pool(one, other, batch_tokens=10_000, request_timeout_s=300)
    before = made.submit(answers(4))
    wait_for(lambda: len(one.held) + len(other.held) == 4)
    waiting = made.submit(answers(40))
    wait_for(lambda: made._waiting.tokens == 400)
    one.answer()
    wait_for(lambda: len(one.batches) == 3)
    one.answer()  # a slot is free again, the share of the other is what still waits
    wait_for(lambda: made.counts.scored == 2)
    other.answer()
    wait_for(lambda: len(other.batches) == 3)
    assert (one.sizes(), other.sizes()) == ([1, 1, 21], [1, 1, 19])
    for handle in (one, other, other):
        handle.answer()
    assert len(before.result(300) + waiting.result(300)) == 44
