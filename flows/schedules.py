"""Schedules of the configuration as Prefect's, each fault a sentence."""

import asyncio
import zoneinfo
from typing import TYPE_CHECKING, Any

from flows.errors import DeployError

if TYPE_CHECKING:
    from flows.configuration import Schedule

EXPECTED = {
    "cron": "Expected five fields such as '0 2 * * *', at two every night",
    "interval": "Expected seconds above 0, or a time such as PT1H",
    "rrule": "Expected a rule as in iCalendar, such as 'FREQ=WEEKLY;BYDAY=MO'",
}
OWNERS = {"day_or": "cron", "anchor_date": "interval"}


def check_schedule(deployment: str, schedule: "Schedule") -> None:
    """Raise DeployError where it cannot be kept: no cron, no such time zone, no date, nothing, two things said."""
    found = prefect_schedule(deployment, schedule)
    if not _dates(found):
        rule = schedule.cron or schedule.rrule
        raise DeployError(f"Deployment {deployment}: no day fits the schedule {rule!r}, so it would never run.")


def prefect_schedule(deployment: str, schedule: "Schedule") -> Any:
    """What Prefect calls a schedule. Raises DeployError as `check_schedule`."""
    from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule

    given = [name for name in ("cron", "interval", "rrule") if getattr(schedule, name) is not None]
    if len(given) != 1:
        raise DeployError(
            f"Deployment {deployment}: a schedule is one of cron, interval and rrule, and this one has "
            f"{' and '.join(given) or 'none'}."
        )
    if schedule.timezone is not None and schedule.timezone not in zoneinfo.available_timezones():
        raise DeployError(
            f"Deployment {deployment}: there is no time zone {schedule.timezone!r}. Expected a name such as "
            "Europe/Berlin or UTC."
        )
    kind = {"cron": CronSchedule, "interval": IntervalSchedule, "rrule": RRuleSchedule}[given[0]]
    names = [name for name, owner in OWNERS.items() if owner == given[0]]
    for name, owner in OWNERS.items():
        if owner != given[0] and getattr(schedule, name) is not None:
            raise DeployError(
                f"Deployment {deployment}: {name} belongs to a schedule with {owner}, and this one has {given[0]}. "
                "Leave it out."
            )
    # a sixth field would be seconds: one run after the other for a minute
    if schedule.cron is not None and not schedule.cron.startswith("@") and len(schedule.cron.split()) != 5:
        raise DeployError(f"Deployment {deployment}: {schedule.cron!r} is no cron. {EXPECTED['cron']}.")
    settings = {name: getattr(schedule, name) for name in (given[0], "timezone", *names)}
    try:
        return kind(**{name: value for name, value in settings.items() if value is not None})
    except ValueError as error:
        value = schedule.interval.total_seconds() if schedule.interval is not None else getattr(schedule, given[0])
        raise DeployError(f"Deployment {deployment}: {value!r} is no {given[0]}. {EXPECTED[given[0]]}.") from error


def _dates(schedule: Any) -> list[Any]:
    """The next one, as the server will find it; empty where there is none."""
    from prefect.server.schemas import schedules

    try:
        return asyncio.run(getattr(schedules, type(schedule).__name__)(**schedule.model_dump()).get_dates(1))
    except ValueError:  # how croniter says so
        return []
