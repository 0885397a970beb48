"""What the server does by itself for runs that cannot speak any more, since their machine or worker is gone.

A run sends a heartbeat every half a minute. After 90 seconds without one it is Crashed, which frees its slots, be it
that it has sent none at all since it was Running. So is one that was taken 100 seconds ago and that has not begun: the
worker, or `serve`, was killed before the run's process could speak. The webhook, where there is one, is called: nobody
else is left to call it. A run inside of another one goes with it and is not told of.

Only processes have to begin so soon. A container may wait for a node, and its own worker watches over that.
"""

from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.automations import Automation, EventTrigger, Posture
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, SendNotification

from flows.notify import BLOCK, webhook_block
from flows.states import GATED, SKIPPED
from flows.version import SERVED, TAG, WITHIN

ZOMBIES, SPEAKER = "bitsmith: runs without a heartbeat", "bitsmith: webhook for runs without a heartbeat"
STILLBORN, SERVED_STILLBORN = "bitsmith: runs that did not begin", "bitsmith: served runs that did not begin"
SILENCE, TO_BEGIN = timedelta(seconds=90), timedelta(seconds=100)
MESSAGE = "No heartbeat"

_OURS = {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}
_OURS_AND_WITHIN: dict[str, Any] = {
    "prefect.resource.id": [f"prefect.tag.{TAG}", f"prefect.tag.{WITHIN}"],
    "prefect.resource.role": "tag",
}
_SERVED = {"prefect.resource.id": f"prefect.tag.{SERVED}", "prefect.resource.role": "tag"}
_IN_PROCESS = {"prefect.resource.role": "work-pool", "prefect.work-pool.type": "process"}
_ALIVE = {"prefect.flow-run.heartbeat", "prefect.flow-run.Running"}
_TAKEN = {"prefect.flow-run.Pending", "prefect.flow-run.Submitting"}
_STATES = ("Completed", "Failed", "Crashed", "Cancelling", "Cancelled", "AwaitingRetry", "Paused", "Suspended")
_BEFORE = ("Scheduled", "Late", "AwaitingConcurrencySlot")
_ENDS = {f"prefect.flow-run.{name}" for name in (*_STATES, SKIPPED, GATED)}
_SAID = f"{MESSAGE} for {{}} seconds: its worker, or the machine, is gone. The next run goes on from what is finished."
_PAYLOAD = """{"text": {{ (flow.name ~ " " ~ flow_run.name ~ ": Crashed. " ~ flow_run.state.message) | tojson }},
"flow": {{ flow.name | tojson }}, "run": {{ flow_run.name | tojson }}, "state": {{ flow_run.state.name | tojson }},
"message": {{ flow_run.state.message | tojson }}, "url": {{ flow_run | ui_url | tojson }}}"""


def make_automations(webhook: str | None, silence: timedelta = SILENCE, to_begin: timedelta = TO_BEGIN) -> list[str]:
    """Make them, or bring them up to date; their names.

    Args:
        webhook: URL, which is kept as a secret of the server; None leaves the one that it has, if any.
        silence: without heartbeats, 10 s at least.
        to_begin: from when a worker or `serve` takes a run, 10 s at least.
    """
    spoken = _silent(_ALIVE, _ALIVE | _ENDS, [_OURS_AND_WITHIN], silence)
    _keep(Automation(name=ZOMBIES, trigger=spoken, actions=[_crash(silence)]))
    begun = {f"prefect.flow-run.{name}" for name in _BEFORE} | _ALIVE | _ENDS
    for name, place in ((STILLBORN, _IN_PROCESS), (SERVED_STILLBORN, _SERVED)):
        unspoken = _silent(_TAKEN, _TAKEN | begun, [_OURS, place], to_begin)
        _keep(Automation(name=name, trigger=unspoken, actions=[_crash(to_begin)]))
    if (block := _block(webhook)) is None:
        return [ZOMBIES, STILLBORN, SERVED_STILLBORN]
    _keep(
        Automation(
            name=SPEAKER,
            trigger=EventTrigger(
                expect={"prefect.flow-run.Crashed"},
                match={"prefect.resource.id": "prefect.flow-run.*", "prefect.state-message": f"{MESSAGE}*"},  # type: ignore[arg-type]
                match_related=_OURS,  # type: ignore[arg-type]
                posture=Posture.Reactive,
                threshold=1,
            ),
            actions=[SendNotification(block_document_id=block, subject="", body=_PAYLOAD)],
        )
    )
    return [ZOMBIES, STILLBORN, SERVED_STILLBORN, SPEAKER]


def _silent(after: set[str], expect: set[str], related: list[dict[str, Any]], silence: timedelta) -> EventTrigger:
    return EventTrigger(
        after=after,
        expect=expect,
        match={"prefect.resource.id": "prefect.flow-run.*"},  # type: ignore[arg-type]
        match_related=related,  # type: ignore[arg-type]
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=silence,
    )


def _crash(silence: timedelta) -> ChangeFlowRunState:
    said = _SAID.format(round(silence.total_seconds()))
    return ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=said, force=False)


def _keep(wanted: Automation) -> None:
    try:
        found: Any = Automation.read(name=wanted.name)
        wanted.id = found.id
    except ValueError:
        wanted.create()
    else:
        wanted.update()


def _block(url: str | None) -> UUID | None:
    if url:
        found: Any = webhook_block(url).save(BLOCK, overwrite=True)
        return UUID(str(found))
    try:
        return CustomWebhookNotificationBlock.load(BLOCK)._block_document_id  # type: ignore[union-attr]
    except ValueError:
        return None
