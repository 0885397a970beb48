"""Schedules of the configuration as Prefect's, each fault a sentence."""

import zoneinfo
from typing import TYPE_CHECKING, Any

from flows.errors import DeployError

if TYPE_CHECKING:
    from flows.configuration import Schedule

OWNERS = {"day_or": "cron", "anchor_date": "interval"}


def check_schedule(deployment: str, schedule: "Schedule") -> None:
    """Raise DeployError where it cannot be kept: no cron, no such time zone, nothing, two things or another's said."""
    prefect_schedule(deployment, schedule)


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
    settings = {name: getattr(schedule, name) for name in (given[0], "timezone", *names)}
    try:
        return kind(**{name: value for name, value in settings.items() if value is not None})
    except ValueError as error:
        expected = {
            "cron": "Expected five fields such as '0 2 * * *', at two every night",
            "interval": "Expected seconds above 0, or a time such as PT1H",
            "rrule": "Expected a rule as in iCalendar, such as 'FREQ=WEEKLY;BYDAY=MO'",
        }[given[0]]
        value = schedule.interval.total_seconds() if schedule.interval is not None else getattr(schedule, given[0])
        raise DeployError(f"Deployment {deployment}: {value!r} is no {given[0]}. {expected}.") from error
