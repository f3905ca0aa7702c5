"""The result of one check, and of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

OK, WARNING, BROKEN, SKIPPED = "ok", "warning", "broken", "skipped"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Link:
    """One link of the chain.

    Attributes:
        id: stable name, for programs.
        title: name for people.
        state: ``ok``; ``warning``, a possible problem; ``broken``; ``skipped``, since a link
            that it needs is missing or broken.
        detail: the finding.
        remedy: the action to take; empty where nothing is wrong.
        seconds: duration of the check.
    """

    id: str
    title: str
    state: str
    detail: str
    remedy: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All links, in order."""

    links: Sequence[Link]

    @property
    def first_broken(self) -> Link | None:
        """The link to repair first; None if none is broken."""
        return next((link for link in self.links if link.state == BROKEN), None)

    @property
    def answer(self) -> str:
        """The broken link with its remedy, or the part of the chain that works, in words."""
        broken = self.first_broken
        warnings = [link for link in self.links if link.state == WARNING]
        if broken is not None:
            also = "".join(f" A possible cause: {link.detail}." for link in warnings)
            return (
                f"{broken.title} is the first broken link: {broken.detail}. {broken.remedy}{also}"
            )
        works = {link.id for link in self.links if link.state == OK}
        skipped = [link for link in self.links if link.state == SKIPPED]
        seen = "nothing is broken"
        if "serve" in works:
            seen = (
                "the whole chain works: the checkpoint was loaded, served and gave the right text"
            )
        elif "load" in works:
            seen = "the checkpoint loads through mlx-lm and generates"
        unchecked = f"; not checked: {', '.join(link.title for link in skipped)}" if skipped else ""
        why = f", since {skipped[0].detail}" if skipped else ""
        also = "".join(f" Note: {link.detail}. {link.remedy}" for link in warnings)
        return f"{seen[0].upper()}{seen[1:]}{unchecked}{why}.{also}"

    def as_json(self) -> dict[str, Any]:
        """Return plain data; ``schema`` is raised when a field changes its meaning."""
        broken = self.first_broken
        return {
            "schema": SCHEMA,
            "healthy": broken is None,
            "first_broken": None if broken is None else broken.id,
            "answer": self.answer,
            "links": [asdict(link) for link in self.links],
        }
