"""Requests, leases and books with defaults, for the rules of admission."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.policy.worlds import CARD, GIB, gib
from vram_manager.domain.lease import Book, Estimate, Lease, Priority, Request, Source, Ticket, Verdict
from vram_manager.domain.size import Size, parse_size
from vram_manager.domain.snapshot import Snapshot
from vram_manager.policy import Rules
from vram_manager.policy.admission import judge
from vram_manager.policy.leases import outstanding

RULES = Rules()


def estimate(size: float | str = 8.0, **more: Any) -> Estimate:
    wanted = parse_size(size) if isinstance(size, str) else Size(bytes=gib(size))
    return Estimate(**{"size": wanted, "source": Source.REQUEST, **more})


def of_ollama(size: float = 8.0, digest: str = "sha-llama3.1:8b") -> Estimate:
    return estimate(size, source=Source.FILES, digest=digest, names=("llama3.1:8b",))


def request(size: float | str = 8.0, *, owner: str = "worker-1", margin_gib: float = 2.0, **more: Any) -> Request:
    about = more.pop("about", None) or estimate(size, names=more.pop("names", ()))
    values: dict[str, Any] = {"id": f"{owner}-{size}", "margin_bytes": gib(margin_gib), **more}
    return Request(owner=owner, estimate=about, **values)


def lease(size: float = 8.0, *, owner: str = "worker-1", gpu: str | None = CARD, at: float = 0.0, **more: Any) -> Lease:
    values: dict[str, Any] = {"id": f"lease-{owner}", "request_id": owner, "ttl_seconds": 60.0, **more}
    return Lease(
        owner=owner,
        gpu=gpu,
        bytes=gib(size),
        priority=values.pop("priority", Priority.NORMAL),
        estimate=values.pop("about", None) or estimate(size),
        granted_at=at,
        expires_at=values.pop("expires_at", at + 60.0),
        **values,
    )


def book(*leases: Lease, line: tuple[Ticket, ...] = (), served_at: dict[str, float] | None = None) -> Book:
    return Book(leases={one.id: one for one in leases}, line=line, served_at=served_at or {})


def with_leases(seen: Snapshot, held: Book) -> Snapshot:
    """The snapshot as the desk hands it to the rules."""
    return replace(seen, leased_bytes=outstanding(held))


def verdict(asked: Request, seen: Snapshot, held: Book | None = None, rules: Rules = RULES, **more: Any) -> Verdict:
    held = held or book()
    return judge(asked, with_leases(seen, held), held, rules, **more)


def as_gib(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else round(size_bytes / GIB, 1)
