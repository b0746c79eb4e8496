"""The book's own arithmetic: what was promised, and how much of it shows in the GPU's numbers by now.

`available = free - promised and not yet visible - margin`. Counting a promise off too late only makes others wait;
counting it off too early promises the same bytes twice. So every doubt here is decided for "not yet visible":

1. Where NVML tells what the holder's process has, that number counts.
2. Else what the owner says it has taken (`claimed`), or, a claim window after the grant, what appeared on the GPU
   meanwhile and belongs to nobody else.
3. Never more in all than what is in use on the GPU and accounted for by nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from vram_manager.domain.lease import Book, Estimate, Lease
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.share import Certainty
from vram_manager.domain.snapshot import Gpu, GpuMemory, Gpus, LoadedModel, ProcessMemory, Snapshot
from vram_manager.policy.accounting import (
    comfyui_gpu,
    comfyui_hold,
    gpus_read_at,
    gpus_seen,
    ollama_bytes,
    weights_may_hide,
)
from vram_manager.policy.plan import first_stage
from vram_manager.policy.rules import Rules

# A worker that neither claims nor can be seen has usually loaded by then: model files load at 1 GB/s and more.
CLAIM_WINDOW_SECONDS = 60.0

# Owners remembered as served, the latest: as many as may stand in line.
MAX_SERVED = 256

Families = Mapping[int, frozenset[int]]
"""The processes that descend from a lease's `pid`, itself included: its children hold memory in its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What can be told apart on one GPU now.

    `unaccounted_bytes` is in use and neither Ollama's nor a lease holder's own process; ComfyUI's is part of it,
    `torch_bytes` of that by its own word and `hold_bytes` for certain. `certain` is False while Ollama cannot be
    read: its models are then among the unaccounted.
    """

    unaccounted_bytes: int
    torch_bytes: int
    hold_bytes: int
    runs: int | None
    comfyui_may_hide: bool
    certain: bool

    @property
    def nobodys_bytes(self) -> int:
        """What neither Ollama, nor ComfyUI, nor a holder's process says it has."""
        return max(0, self.unaccounted_bytes - self.torch_bytes)


def outstanding(book: Book, snapshot: Snapshot | None = None) -> dict[str | None, int]:
    """What is promised and not yet visible, by GPU.

    While only ComfyUI tells of the memory, under a name of its own, all promises count on it, and in full: whose it
    is cannot be told then.
    """
    if snapshot is not None and _second_hand(snapshot):
        return {None: sum(lease.bytes for lease in book.leases.values())} if book.leases else {}
    sums: dict[str | None, int] = {}
    for lease in book.leases.values():
        if lease.outstanding_bytes:
            sums[lease.gpu] = sums.get(lease.gpu, 0) + lease.outstanding_bytes
    return sums


def put(book: Book, *leases: Lease) -> Book:
    """The book with these leases in their new state."""
    return replace(book, leases={**book.leases, **{lease.id: lease for lease in leases}})


def granted(book: Book, lease: Lease) -> Book:
    """The book with one lease more; its owner was served just now."""
    others = [(owner, at) for owner, at in book.served_at.items() if owner != lease.owner]
    served_at = {**dict(others[-MAX_SERVED + 1 :]), lease.owner: lease.granted_at}
    return replace(put(book, lease), served_at=served_at)


def ended(book: Book, lease_id: str) -> Book:
    """The book without that lease. What its owner keeps of it may not pass for what another lease will load.

    How much that is cannot be told, so all of it counts as left behind until the numbers fall below that.
    """
    gone = book.leases[lease_id]
    rest = {key: lease for key, lease in book.leases.items() if key != lease_id}
    for key, lease in rest.items():
        if lease.gpu != gone.gpu:
            continue
        if lease.pid is not None and lease.pid == gone.pid and lease.baseline_bytes is not None:
            rest[key] = replace(lease, baseline_bytes=lease.baseline_bytes + gone.bytes)
        elif lease.unaccounted_bytes is not None:
            rest[key] = replace(lease, left_bytes=lease.left_bytes + gone.bytes)
    return replace(book, leases=rest)


def renewed(lease: Lease, now: float, ttl_seconds: float | None = None) -> Lease:
    """The lease with its whole time to live before it again."""
    ttl = lease.ttl_seconds if ttl_seconds is None else ttl_seconds
    return replace(lease, ttl_seconds=ttl, expires_at=now + ttl, restores=0)


def overdue(book: Book, now: float) -> tuple[Lease, ...]:
    """Leases whose time is over and that no open connection holds."""
    return tuple(lease for lease in book.leases.values() if not lease.holds and lease.expires_at <= now)


def account(book: Book, snapshot: Snapshot, families: Families, rules: Rules) -> Book:
    """The book with what is visible of each lease according to `snapshot`. A GPU not read changes nothing."""
    gpus = gpus_seen(snapshot)
    if isinstance(gpus, Missing) or gpus.second_hand or not book.leases:
        return book
    leases = dict(book.leases)
    if len(gpus.gpus) == 1 and isinstance(gpus.gpus[0].memory, GpuMemory):
        # Promised while no GPU could be told: it can only have been this one, and a share is a share of it.
        only, usable = gpus.gpus[0].uuid, gpus.gpus[0].memory.usable_bytes
        leases |= {
            key: replace(lease, gpu=only, bytes=lease.bytes or lease.estimate.size.on(usable))
            for key, lease in leases.items()
            if lease.gpu is None
        }
    for gpu in gpus.gpus:
        here = sorted((lease for lease in leases.values() if lease.gpu == gpu.uuid), key=lambda one: one.granted_at)
        if here and isinstance(gpu.memory, GpuMemory):
            leases |= {lease.id: lease for lease in _on(gpu, gpus, here, snapshot, families, rules)}
    return replace(book, leases=leases)


def _second_hand(snapshot: Snapshot) -> bool:
    gpus = gpus_seen(snapshot)
    return isinstance(gpus, Gpus) and gpus.second_hand


def sight(snapshot: Snapshot, gpus: Gpus, gpu: Gpu, processes_bytes: int, rules: Rules) -> Sight:
    """What can be told apart on `gpu`; `processes_bytes` is what holders' own processes have there."""
    assert isinstance(gpu.memory, GpuMemory)
    by_ollama = ollama_bytes(snapshot, gpus, gpu, rules)
    certain = not isinstance(by_ollama, Missing)
    known = by_ollama if isinstance(by_ollama, int) else 0
    torch = hold = 0
    hides = False
    if isinstance(snapshot.comfyui, Seen):
        comfyui = snapshot.comfyui.value
        hides = weights_may_hide(comfyui)
        if comfyui_gpu(comfyui, gpus, rules) is gpu:
            held = comfyui_hold(snapshot, comfyui, gpus, gpu, None, first_stage(comfyui), rules)
            torch = held.torch_bytes
            hold = torch if held.certainty is Certainty.PERHAPS else held.bytes
    return Sight(
        unaccounted_bytes=max(0, gpu.memory.taken_bytes - known - processes_bytes),
        torch_bytes=torch,
        hold_bytes=hold,
        runs=snapshot.queue.value.runs if isinstance(snapshot.queue, Seen) else None,
        comfyui_may_hide=hides,
        certain=certain,
    )


def at_grant(lease: Lease, book: Book, snapshot: Snapshot, families: Families, rules: Rules) -> Lease:
    """The lease with what was there before it: its process's memory, and what nobody accounted for."""
    gpus = gpus_seen(snapshot)
    gpu = None if isinstance(gpus, Missing) else next((one for one in gpus.gpus if one.uuid == lease.gpu), None)
    if isinstance(gpus, Missing) or gpu is None or not isinstance(gpu.memory, GpuMemory):
        return lease
    others = [one for one in book.leases.values() if one.gpu == lease.gpu]
    own = _process_bytes(gpu, lease.pid, families)
    if own is not None:
        shown = sum(one.visible_bytes for one in others if one.pid == lease.pid)
        lease = replace(lease, baseline_bytes=max(0, own - shown))
    now_there = sight(snapshot, gpus, gpu, _all_processes(gpu, others, families), rules)
    before = now_there.unaccounted_bytes if lease.for_comfyui else now_there.nobodys_bytes
    # What was promised to others who cannot be seen either will appear there too, and is not this lease's.
    coming = sum(one.outstanding_bytes for one in others if _process_bytes(gpu, one.pid, families) is None)
    return replace(lease, unaccounted_bytes=before + coming, runs_before=now_there.runs)


def loaded(estimate: Estimate, snapshot: Snapshot) -> str | None:
    """The model the estimate is about, if it is one of Ollama's and wholly on the GPU by now."""
    if not estimate.for_ollama or not isinstance(snapshot.ollama, Seen):
        return None
    models = snapshot.ollama.value.models
    return next((one.name for one in models if serves(one, estimate) and one.cpu_ratio == 0.0), None)


def serves(model: LoadedModel, estimate: Estimate) -> bool:
    """Whether a request of that kind is answered by `model` as it is: another context would load it anew."""
    same_context = estimate.context is None or model.context_length in (None, estimate.context)
    return model.digest == estimate.digest and same_context


def _on(
    gpu: Gpu, gpus: Gpus, here: Sequence[Lease], snapshot: Snapshot, families: Families, rules: Rules
) -> list[Lease]:
    """The leases of one GPU, oldest first."""
    seen = [
        lease
        for lease in here
        if lease.baseline_bytes is not None and _process_bytes(gpu, lease.pid, families) is not None
    ]
    shown = {lease.id for lease in seen}
    unseen = [lease for lease in here if lease.id not in shown]
    # Processes are listed more rarely than memory is read. What has moved since may have been theirs.
    let_go, taken = _moved_since_listed(gpu)
    held_by_processes = _all_processes(gpu, seen, families) + (taken if seen else 0)
    now_there = sight(snapshot, gpus, gpu, held_by_processes, rules)
    counted = _by_process(gpu, seen, families, let_go)
    read_at = gpus_read_at(snapshot, gpus)
    room = now_there.unaccounted_bytes
    if not now_there.certain:
        room = min(room, sum(lease.visible_bytes for lease in unseen))
    # First those who say what they have: it is no more to be taken for anybody else's.
    unseen.sort(key=lambda one: one.claimed_bytes is None)
    said = 0
    largest = max((lease for lease in unseen if lease.for_comfyui), key=lambda one: one.bytes, default=None)
    for held in unseen:
        if loaded(held.estimate, snapshot) is not None:
            # It shows in Ollama's own numbers.
            counted.append(replace(held, visible_bytes=held.bytes))
            continue
        if held.for_comfyui and held is not largest:
            # ComfyUI runs one prompt at a time and makes room for it itself: only the largest needs more.
            counted.append(replace(held, visible_bytes=held.bytes))
            continue
        there = now_there.unaccounted_bytes if held.for_comfyui else now_there.nobodys_bytes
        there = max(0, there - said)
        lease = replace(held, left_bytes=min(held.left_bytes, there))
        used = _used(lease, now_there, there, snapshot.taken_at)
        visible = min(lease.bytes, used or 0, room)
        if lease.claimed_at is not None and (read_at is None or read_at <= lease.claimed_at):
            # The claim is newer than the numbers: they do not show yet what it speaks of.
            visible = min(visible, lease.visible_bytes)
        room -= visible
        said += visible if lease.claimed_bytes is not None else 0
        # What ComfyUI held before it ran says nothing of what this prompt needs.
        before_it_ran = lease.for_comfyui and now_there.runs == lease.runs_before
        counted.append(_noted(lease, visible, None if before_it_ran else used))
    return counted


def _moved_since_listed(gpu: Gpu) -> tuple[int, int]:
    """What was let go of and what was taken on `gpu`, net, since its processes were listed."""
    if gpu.listed_free_bytes is None or isinstance(gpu.memory, Missing):
        return 0, 0
    rise = gpu.memory.free_bytes - gpu.listed_free_bytes
    return max(0, rise), max(0, -rise)


def _by_process(gpu: Gpu, leases: Iterable[Lease], families: Families, let_go: int) -> list[Lease]:
    """Leases whose process NVML shows. Several of one process are filled in the order they were granted."""
    counted: list[Lease] = []
    by_pid: dict[int | None, list[Lease]] = {}
    for lease in leases:
        by_pid.setdefault(lease.pid, []).append(lease)
    for pid, own in by_pid.items():
        process_bytes = max(0, (_process_bytes(gpu, pid, families) or 0) - let_go)
        given = 0
        for place, lease in enumerate(own):
            # Below its baseline the process has let go of older memory; what comes next is new.
            baseline = min(lease.baseline_bytes or 0, process_bytes)
            rest = max(0, process_bytes - baseline - given)
            visible = min(lease.bytes, rest)
            given += visible
            used = rest if place == len(own) - 1 else visible
            counted.append(_noted(replace(lease, baseline_bytes=baseline), visible, used))
    return counted


def _noted(lease: Lease, visible: int, used: int | None) -> Lease:
    peak = lease.peak_bytes if used is None else max(lease.peak_bytes or 0, used)
    return replace(lease, visible_bytes=visible, used_bytes=used, peak_bytes=peak)


def _used(lease: Lease, now_there: Sight, there_bytes: int, now: float) -> int | None:
    """What an owner whose process cannot be seen holds, as far as it said so or it can be told; None: it cannot.

    `there_bytes` is in use, and nobody has said to whom it belongs.
    """
    if lease.claimed_bytes is not None:
        return lease.claimed_bytes
    ran = now_there.runs is not None and now_there.runs != lease.runs_before
    if lease.for_comfyui:
        appeared = there_bytes - lease.left_bytes - (lease.unaccounted_bytes or 0) if ran else 0
        # What it held before is no part of a prompt with other files, and stays as long as free memory suffices.
        held = 0 if lease.new_files else now_there.hold_bytes
        return max(0, held, 0 if lease.unaccounted_bytes is None else appeared)
    if lease.unaccounted_bytes is None or now - lease.granted_at < CLAIM_WINDOW_SECONDS:
        return None
    if ran and now_there.comfyui_may_hide:
        # ComfyUI has run, and weights that hide from its numbers would pass for this worker's.
        return lease.used_bytes
    return max(0, there_bytes - lease.left_bytes - lease.unaccounted_bytes)


def _process_bytes(gpu: Gpu, pid: int | None, families: Families) -> int | None:
    """What the holder's processes have on `gpu`; None where NVML does not tell."""
    if pid is None or isinstance(gpu.processes, Missing):
        return None
    return _sum(process for process in gpu.processes if process.pid in families.get(pid, frozenset({pid})))


def _all_processes(gpu: Gpu, leases: Iterable[Lease], families: Families) -> int:
    """What the processes of these leases have on `gpu`, each counted once."""
    if isinstance(gpu.processes, Missing):
        return 0
    pids = {member for lease in leases if lease.pid for member in families.get(lease.pid, frozenset({lease.pid}))}
    return _sum(process for process in gpu.processes if process.pid in pids) or 0


def _sum(processes: Iterable[ProcessMemory]) -> int | None:
    total = 0
    for process in processes:
        if isinstance(process.used_bytes, Missing):
            return None
        total += process.used_bytes
    return total
