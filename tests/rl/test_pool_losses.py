"""The pool where handles are lost: who is charged with it, and how long they are waited for."""

import math
import threading
import time
from concurrent.futures import Future

import pytest
from pool_handles import QUICK, Fake, answers, length, scored, wait_for

from llmray.errors import RewardError
from llmray.rl.handles import HandleAway, HandleLost
from llmray.rl.merging import Merging
from llmray.rl.pool import Pool, PoolOptions

BAD = "13"


def has_bad(batch):
    return any(answer.response == BAD for answer in batch)


@pytest.fixture
def pool():
    made = []

    def make(*handles, on_evict=lambda handle, reason: None, **options):
        options = PoolOptions(**{**QUICK, "request_timeout_s": 60, **options})
        made.append(Pool(handles, options, on_evict=on_evict))
        return made[-1]

    yield make
    for each in made:
        each.close()


def masked(found):
    return [i for i, score in enumerate(found) if math.isnan(score)]


class Fails(Fake):
    """Raises an error over each batch with the bad answer, or over all while `is_away`."""

    def __init__(self, name="fails", error=HandleLost, is_away=False):
        super().__init__(name)
        self.error, self.is_away = error, is_away

    def work(self, batch, error):
        if self.is_away or has_bad(batch):
            raise self.error(f"{self.name} is gone")
        return super().work(batch, error)


class Dies:
    """Like an actor: one request after the other; the bad answer ends it with all that it has.

    What it has is told in the order of `told`; it is back at the next ping. Where it `hangs` it
    answers nothing until it is killed.
    """

    load, busy_s = 0, None

    def __init__(self, name, told=reversed, hangs=False):
        self.name, self.told, self.hangs = name, told, hangs
        self.held, self.alone = [], []
        self.lock = threading.Lock()

    def call(self, method, *args):
        future = Future()
        if method == "ping":
            future.set_result(None)
            return future
        with self.lock:
            self.held.append((args[0], future))
        threading.Timer(0.01, self.turn).start()
        return future

    def turn(self):
        with self.lock:
            if not self.held:
                return
            batch, future = self.held[0]
            if has_bad(batch) and self.hangs:
                return
            if has_bad(batch):
                self.alone.append(len(self.held) == 1)
                lost, self.held = list(self.told(self.held)), []
            else:
                lost = [self.held.pop(0)]
        for batch, future in lost:
            if has_bad(batch) or len(lost) > 1:
                future.set_exception(HandleLost("the actor died"))
            else:
                future.set_result([length(answer) for answer in batch])

    def kill(self):
        with self.lock:
            self.held = []


@pytest.mark.parametrize("batching", ["arrival", "fixed"])
def test_of_a_batch_that_a_handle_is_lost_over_only_the_answer_at_fault_has_no_score(
    pool, batching
):
    of = pool(Fails(), on_error="mask", batch_tokens=640, batching=batching)
    found = scored(of, answers(64))
    assert masked(found) == [13]
    assert found[14] == 14.0
    assert (of.counts.failed, of.counts.scored) == (1, 63)


def test_the_message_names_the_answer_that_handles_are_lost_over(pool):
    with pytest.raises(RewardError, match=r"answer run-0-0-13 got no score .*fails is gone"):
        scored(pool(Fails(), batch_tokens=640), answers(64))


@pytest.mark.parametrize("told", [list, reversed])
@pytest.mark.parametrize("count", [1, 2])
def test_what_an_actor_had_beside_the_answer_that_it_died_of_is_scored(pool, count, told):
    """At last the answer at fault is alone with an actor, and nothing else is lost with it."""
    actors = [Dies(str(i), told) for i in range(count)]
    of = pool(*actors, on_error="mask", batch_tokens=80)
    assert masked(scored(of, answers(64))) == [13]
    assert any(actor.alone[-1] for actor in actors if actor.alone)


def test_only_the_answer_that_handles_hang_over_has_no_score(pool):
    killed = []

    def kill(handle, reason):
        killed.append(reason)
        handle.kill()

    of = pool(
        *(Dies(str(i), hangs=True) for i in range(2)),
        **{"on_evict": kill, "on_error": "mask", "batch_tokens": 80, "request_timeout_s": 0.5},
    )
    assert masked(scored(of, answers(32))) == [13]
    assert set(killed) == {"hung"}


def test_who_is_away_is_waited_for_though_it_answers_pings(pool):
    """As a server is whose proxy takes connections while it starts: ten times it is lost."""
    away = Fails(error=HandleAway, is_away=True)
    of = pool(away, on_error="mask", timeout_s=300, probe_every_s=0.01)
    future = of.submit(answers(8))
    wait_for(lambda: of.counts.evicted >= 10)
    assert not future.done()
    away.is_away = False
    assert future.result(300) == [float(i) for i in range(8)]
    assert of.counts.failed == 0


def test_who_stays_away_though_it_answers_pings_is_gone_at_last(pool):
    of = pool(Fails("a", HandleAway, True), Fails("b", HandleAway, True), on_error="mask")
    started = time.perf_counter()
    with pytest.raises(RewardError, match=r"all 2 .* gone for 0\.6 s .*a is gone.*b is gone"):
        scored(of, answers(4))
    assert 0.5 < time.perf_counter() - started < 60
    assert of.counts.readmitted > 2


def test_an_answer_that_alone_finds_a_server_away_is_found_at_last(pool):
    """Others are scored meanwhile, so the server is not gone."""
    of = pool(Fails(error=HandleAway), on_error="mask", timeout_s=0.4)
    first = of.submit(answers(16))
    others = 0
    while not first.done():
        assert scored(of, answers(3)) == [0.0, 1.0, 2.0]
        others += 1
    assert masked(first.result(0)) == [13]
    assert others > 1


def test_the_wait_begins_anew_where_nobody_waited_in_between(pool):
    """All were gone when the first was given up, which is no part of the second one's wait."""
    of = pool(Fails(is_away=True), on_error="mask", timeout_s=0.5, max_attempts=2)
    assert masked(scored(of, answers(1))) == [0]
    time.sleep(0.6)
    assert masked(scored(of, answers(1))) == [0]


class Shared:
    """A handle of one `Merging` that several callers ask, as actors are asked."""

    load, busy_s = 0, None

    def __init__(self, name, merging):
        self.name, self.merging = name, merging
        self.is_deaf = False

    def call(self, method, *args):
        told = Future()
        if method == "ping":
            told.set_result(self.merging.quiet_s)
        elif not self.is_deaf:
            asked = self.merging.submit(args[0], self.name)
            asked.add_done_callback(lambda done: told.set_result(done.result().scores))
        return told


class Waits:
    def __init__(self, seconds):
        self.seconds, self.goes_on = seconds, threading.Event()

    def score(self, asked):
        if not self.goes_on.wait(self.seconds):
            assert self.seconds < 60, "a test that went on too long"
        return [length(answer) for answer in asked]


def test_who_is_busy_with_the_requests_of_others_does_not_hang(pool):
    """16 callers with 2 requests of 0.12 s each: the last ones have their turn after 3.8 s."""
    merging = Merging(Waits(0.12), None)
    pools = [
        pool(Shared(str(i), merging), request_timeout_s=1.0, batch_tokens=10) for i in range(16)
    ]
    asked = [of.submit(answers(2)) for of in pools]
    assert [future.result(300) for future in asked] == [[0.0, 1.0]] * 16
    assert sum(of.counts.evicted for of in pools) == 0
    merging.close()


def test_who_finishes_nothing_for_anyone_hangs(pool):
    served = Waits(600)
    merging, evicted = Merging(served, None), []
    handles = [Shared("one", merging), Shared("other", merging)]
    pools = [
        pool(h, request_timeout_s=0.4, on_evict=lambda *told: evicted.append(told)) for h in handles
    ]
    started = time.perf_counter()
    asked = [of.submit(answers(2)) for of in pools]
    wait_for(lambda: len(evicted) == 2)
    assert 0.35 < time.perf_counter() - started < 60
    assert {reason for _, reason in evicted} == {"hung"}
    served.goes_on.set()
    assert [future.result(300) for future in asked] == [[0.0, 1.0]] * 2
    merging.close()


def test_who_has_nothing_to_do_and_does_not_answer_hangs(pool):
    """What it was asked is lost: it will not come."""
    merging = Merging(Waits(0.0), None)
    of = pool(Shared("deaf", merging), request_timeout_s=0.4)
    assert scored(of, answers(1)) == [0.0]
    of._members[0].handle.is_deaf = True
    future = of.submit(answers(1))
    wait_for(lambda: of.counts.evicted)
    of._members[0].handle.is_deaf = False
    assert future.result(300) == [0.0]
    merging.close()
