"""What is found: a subject, whether it is ok, slow or broken, what is said of it, and the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from dbnet.core.files import words

OK, SLOW, BROKEN = "ok", "slow", "broken"


class Finding(NamedTuple):
    """One line.

    Attributes
    ----------
    subject, state
        What was looked at; ok, slow or broken.
    said
        What was found.
    fix
        What to do where it is not ok.
    """

    subject: str
    state: str
    said: str
    fix: str = ""


class Found(NamedTuple):
    """A finding, the hosts where it was made, and all that was said there in other words."""

    finding: Finding
    where: list[str]
    others: list[str]


def looked(subject: str, look: Callable[[], Finding | None]) -> Iterable[Finding]:
    """Yield what a look finds; where it fails itself, that it is broken."""
    try:
        found = look()
    except Exception as error:
        found = Finding(
            subject, BROKEN, f"{type(error).__name__}: {words(error)}", "report this with the text of dbnet doctor --report"
        )
    if found is not None:
        yield found


def together(lists: Sequence[tuple[str, Sequence[Finding]]]) -> list[Found]:
    """Put what several hosts have found into one line where it is of one kind; what is said is then the first one's."""
    order: dict[tuple[str, str, str], Found] = {}
    subjects = list(dict.fromkeys(finding.subject for _, found in lists for finding in found))
    for name, found in lists:
        for finding in found:
            one = order.setdefault((finding.subject, finding.state, finding.fix), Found(finding, [], []))
            one.where.append(name)
            if finding.said != one.finding.said:
                one.others.append(finding.said)
    return sorted(order.values(), key=lambda one: subjects.index(one.finding.subject))


def shown(found: Sequence[Found], everywhere: int) -> str:
    """Return lines: state, subject, what is said; where not all are meant, who; under what is not ok the fix."""
    width = max(len(one.finding.subject) for one in found)
    lines = []
    for (subject, state, said, fix), where, others in found:
        who = "" if len(where) >= everywhere else f"[{listed(where)}] "
        # Of several hosts the first one's numbers stand for all.
        like = f" ({where[0]}; {len(others)} more are alike)" if others else ""
        lines.append(f"  {state:<6}  {subject:<{width}}  {who}{said}{like}")
        if state != OK:
            lines.append(f"  {'':<6}  {'':<{width}}  -> {fix}")
    return "\n".join(lines)


def listed(names: Sequence[str]) -> str:
    """Return names in few words: n1, n2, n3 .. n9."""
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ... {names[-1]} ({len(names)})"


def summary(found: Sequence[Found]) -> str:
    """Return how many are not ok."""
    broken, slow = (sum(one.finding.state == state for one in found) for state in (BROKEN, SLOW))
    return f"{broken} broken, {slow} slow, {len(found) - broken - slow} ok." if broken or slow else f"All {len(found)} are ok."
