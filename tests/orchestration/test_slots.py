"""Why a group of workers ended, in words."""

from ray.exceptions import ActorDiedError, RayTaskError

from llmray.orchestration.plan import Placement
from llmray.orchestration.slots import Slot
from llmray.orchestration.trial_board import Look


def ended_by(error):
    slot = Slot(1, None, "/saves/sweep", Placement(1, {"CPU": 1.0}, "PACK"), {})
    slot._error = error
    return slot.loss(Look([], False, None, [], 0, 0.0, 0.0, [], None))


def test_a_controller_that_could_not_begin_says_why():
    reason = "ValueError: URI has empty scheme: './saves'"
    text = f"Traceback (most recent call last):\n  File x\n{reason}"
    raised = RayTaskError("TrainController.__init__", text, ValueError())
    loss = ended_by(ActorDiedError(raised))
    assert loss.text == reason
    assert not loss.may_mend
    assert "URI has empty scheme" in str(loss.as_error())


def test_a_controller_that_is_gone_may_come_again():
    loss = ended_by(ActorDiedError())
    assert "is gone" in loss.text
    assert loss.may_mend
