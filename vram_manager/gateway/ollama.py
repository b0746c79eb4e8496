"""The gate in front of Ollama: a call whose model is not wholly on the GPU waits until there is room for it.

Ollama decides the split when it loads and never again, so the one moment to help is before the call arrives:

1. The model is wholly on the GPU -> the call passes at once, unless the model is about to leave, or somebody has
   waited too long for its room.
2. It is on the CPU, and will be repaired -> the call waits for that.
3. It is not loaded -> the call takes its place at the desk, like everybody who asks for memory; the promise it gets
   is kept until the model shows on the GPU. All who ask for one model wait together.
4. Whatever is not known - the body, the model, the GPU, Ollama's list - lets the call pass.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeAlias

from loguru import logger

from vram_manager.admissions import Answer, NoSuchLease, OtherRequest, Stopping, TooMany
from vram_manager.domain.action import FreeComfyUI, UnloadModel
from vram_manager.domain.decision import ManualFree
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.lease import Estimate, Lease, Priority, Request, Source
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.snapshot import LoadedModel, OllamaState, Snapshot
from vram_manager.gateway.calls import Call, Looked, look_at
from vram_manager.gateway.proxy import Head, Held, Passage, Reply
from vram_manager.gateway.waiting import Desk, Outcome, Waiter, for_ever
from vram_manager.policy.accounting import gpus_seen
from vram_manager.policy.demands import fallback_key, on_cpu
from vram_manager.policy.estimate import canonical
from vram_manager.policy.frozen import in_the_way
from vram_manager.policy.line import gives_way
from vram_manager.policy.repair import foreseen

UPSTREAM = "ollama"
# OLLAMA_LOAD_TIMEOUT: a load that stands still for 5 min is given up (envconfig/config.go).
LOAD_SECONDS = 330.0
# For the unloads that give Ollama a fresh view of the GPU: each takes 0.5-1.5 s.
FRESH_VIEW_SECONDS = 10.0
# Ollama gives a load up that stands still for 5 min; from a slow disk one may take longer than that in all.
STUCK_SECONDS = 600.0
# A timer that fires this soon may have fired before the call arrives; what is listed was read up to a second ago.
EXPIRES_SOON_SECONDS = 1.5
# Past its time for longer than that it is in use by somebody who does not come through here.
EXPIRED_SECONDS = 3.0
# What files tell of a model is 5-10 % off, and more where layers differ. Too much asked for costs less than too little.
UNMEASURED_SHARE = 0.2


class _Go(Enum):
    """The call passes, or takes its place at the desk."""

    PASS = "pass"
    ASK = "ask"
    ASK_AFRESH = "ask afresh"


_State: TypeAlias = _Go | str  # why it waits


@dataclass(slots=True, eq=False)
class _Model:
    """The calls of one model, by the name they use for it and the context they ask for."""

    name: str
    context: int | None
    """What Ollama makes of it: never more than the model was trained with."""
    under_way: int = 0
    held: int = 0
    ended_at: float | None = None
    kept_seconds: float | None = None
    """The last keep_alive that a call of it asked for."""
    leaves_at: float | None = None
    """When the model leaves by that, from the end of the last call on: newer than any list of Ollama's."""
    lease: str | None = None
    opening: asyncio.Task[Answer | None] | None = None
    waiting: int = 0
    loading_since: float | None = None
    """Since when a call of it has been under way without the model being listed."""
    stuck: bool = False
    gave_up_on: str | None = None
    """The placement on the CPU that a wait was in vain for: later calls do not wait for it again."""


class OllamaGate:
    """One for each daemon. Everything but `_opened` is immediate, so nothing is locked."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._rules = desk.cycle.rules
        self._models: dict[tuple[str, int | None], _Model] = {}

    # ---- the proxy's side

    def watch(self, head: Head) -> Held | None:
        looked = look_at(head.method, head.path, head.headers)
        if looked is None:
            self._desk.on_request(UPSTREAM, "passed", 0.0)
            return None
        return _HeldCall(self, head, looked)

    def unreachable(self, head: Head, why: str) -> Reply:
        self._desk.on_request(UPSTREAM, "unreachable", 0.0)
        return Reply(status=502, body=_error(head.path, 502, f"Ollama cannot be reached: {why}"))

    def unwatched(self, outcome: Outcome) -> Passage:
        """A call that loads nothing, or whose body could not be read."""
        return self._desk.told(UPSTREAM, outcome, 0.0)

    # ---- the cycle's side

    def served(self, ollama: OllamaState) -> OllamaState:
        """The models with what goes through here: requests under way and held, and when the last one ended."""
        if not self._models:
            return replace(ollama, models=tuple(replace(model, requests=0) for model in ollama.models))
        return replace(ollama, models=tuple(self._with_requests(model) for model in ollama.models))

    def seen(self, snapshot: Snapshot) -> None:
        """Promises whose model shows on the GPU by now, or that nobody waits for any more, are given back."""
        listed = snapshot.ollama.value.models if isinstance(snapshot.ollama, Seen) else ()
        read_at = snapshot.ollama.at if isinstance(snapshot.ollama, Seen) else float("-inf")
        for key, calls in list(self._models.items()):
            if calls.lease is not None:
                there = any(
                    self._serves(model, calls) and model.cpu_ratio == 0.0 and not self._expires_soon(model)
                    for model in listed
                )
                # A short call is over before its model was listed: what it loaded is there all the same.
                over = not (calls.under_way or calls.held) and read_at > (calls.ended_at or read_at)
                if there or over:
                    self._give_back(calls, "loaded" if there else "nobody asks for it any more")
            if isinstance(snapshot.ollama, Seen):
                self._note_stuck(calls, any(self._is(model, calls.name) for model in listed), snapshot.taken_at)
            if not (calls.under_way or calls.held or calls.lease) and not self._recent(calls, snapshot.taken_at):
                del self._models[key]

    def _note_stuck(self, calls: _Model, listed: bool, now: float) -> None:
        """Ollama lists what is loaded and answers with it, but a load does not end (Ollama issue 17408): told once."""
        if listed or not calls.under_way:
            calls.loading_since, calls.stuck = None, False
            return
        calls.loading_since = now if calls.loading_since is None else calls.loading_since
        waited = now - calls.loading_since
        if calls.stuck or waited < STUCK_SECONDS:
            return
        calls.stuck = True
        reason = (
            f"{calls.name} has not been loaded for {waited / 60:.0f} min although Ollama answers: its scheduler may "
            "hang; unload what is loaded (vram-manager free --ollama MODEL), else restart Ollama"
        )
        self._desk.tell(Event(type=EventType.OLLAMA_STUCK, target="ollama", reason=reason, models=(calls.name,)))

    def _recent(self, calls: _Model, now: float) -> bool:
        return calls.ended_at is not None and now - calls.ended_at < self._rules.comfyui_idle_seconds

    def _give_back(self, calls: _Model, why: str) -> None:
        lease, calls.lease = calls.lease, None
        if lease is not None:
            try:
                self._desk.admissions.release(lease, why)
            except NoSuchLease:
                logger.debug("{} had ended before {}", lease, why)

    def _with_requests(self, model: LoadedModel) -> LoadedModel:
        mine = [calls for calls in self._models.values() if self._is(model, calls.name)]
        ended = [calls.ended_at for calls in mine if calls.ended_at is not None]
        known = [at for at in (model.active_at, *ended) if at is not None]
        return replace(
            model,
            requests=sum(calls.under_way for calls in mine),
            held=sum(calls.held for calls in mine),
            active_at=max(known, default=None),
        )

    def _is(self, model: LoadedModel, name: str) -> bool:
        """Whether a call for `name` is about `model`."""
        return self._same(canonical(model.name), name)

    def _serves(self, model: LoadedModel, calls: _Model) -> bool:
        """Whether `model` answers such calls as it is: another context would load it anew."""
        return self._is(model, calls.name) and (calls.context is None or model.context_length in (None, calls.context))

    def _same(self, one: str, other: str) -> bool:
        """The same model: the same name, or another one of the same blob."""
        if one == other:
            return True
        blob = self._desk.estimates.blob(one)
        return blob is not None and blob == self._desk.estimates.blob(other)

    # ---- one call

    async def enter(self, call: Call, path: str) -> tuple[_Model, Passage | Reply]:
        """The call may go on, or is refused; until it has begun or is refused it counts as held."""
        desk = self._desk
        name = canonical(call.model)
        calls = self._models.setdefault((name, call.context), _Model(name, call.context))
        began = desk.clock.monotonic()
        if call.num_gpu == 0 or (state := self._look(call, calls)) is _Go.PASS:
            return calls, self._pass(call, calls, "passed", 0.0)
        calls.held += 1
        key = object()
        try:
            until = began + desk.max_wait_seconds
            in_time = await self._wait(call, calls, state, until, key)
        finally:
            calls.held -= 1
            # Whoever leaves or is refused may have been the last one for whom there is a promise.
            calls.ended_at = desk.clock.monotonic()
            desk.waiting.pop(key, None)
        waited = desk.clock.monotonic() - began
        if in_time:
            return calls, self._pass(call, calls, "held", waited)
        if desk.refuses:
            words = f"{call.model}: no room on the GPU within {waited:.0f} s; ask again later"
            return calls, desk.refusal(UPSTREAM, waited, _error(path, 503, words), None)
        logger.warning("{} waited {:.0f} s at the gateway and goes on without room on the GPU", call.model, waited)
        return calls, self._pass(call, calls, "timeout", waited)

    def _pass(self, call: Call, calls: _Model, outcome: Outcome, waited: float) -> Passage:
        calls.under_way += 1
        if call.keep_alive_seconds is not None:
            calls.kept_seconds = call.keep_alive_seconds
        return self._desk.told(UPSTREAM, outcome, waited)

    def over(self, calls: _Model) -> None:
        """A call that went on has ended, whatever the way."""
        calls.under_way -= 1
        calls.ended_at = self._desk.clock.monotonic()
        calls.leaves_at = None if calls.kept_seconds is None else calls.ended_at + calls.kept_seconds

    async def _wait(self, call: Call, calls: _Model, state: _State, until: float, key: object) -> bool:
        """Until the call may pass; False: `until` came first."""
        desk = self._desk
        since = desk.clock.monotonic()
        while state is not _Go.PASS:
            why = state if isinstance(state, str) else f"{call.model} waits for room"
            desk.waiting[key] = Waiter(upstream=UPSTREAM, what=call.model, since=since, why=why)
            if isinstance(state, str):
                if not await desk.next_turn(until):
                    self._given_up(calls)
                    return False
            elif not await self._learn_names(calls):
                answer = await self._opened(call, calls, until, afresh=state is _Go.ASK_AFRESH)
                return answer is not None or desk.clock.monotonic() < until
            state = self._look(call, calls)
        return True

    def _given_up(self, calls: _Model) -> None:
        """Later calls do not wait for the same in vain, unless nobody may be served by the CPU."""
        ollama = self._desk.observer.known().ollama
        if self._desk.refuses or not isinstance(ollama, Seen):
            return
        fallen = (model for model in ollama.value.models if self._is(model, calls.name) and on_cpu(model))
        calls.gave_up_on = next((fallback_key(model) for model in fallen), None)

    def _look(self, call: Call, calls: _Model) -> _State:
        """What is to be done with the call now."""
        desk, rules = self._desk, self._rules
        if desk.stopped or not rules.enabled or rules.dry_run or calls.lease is not None:
            return _Go.PASS
        if not desk.ready:
            return "the daemon has just started"
        snapshot = desk.observer.known()
        if not isinstance(snapshot.ollama, Seen) or isinstance(gpus_seen(snapshot), Missing):
            return _Go.PASS
        model = next((one for one in snapshot.ollama.value.models if self._is(one, calls.name)), None)
        if self._is_leaving(calls.name):
            return f"{call.model} is on its way off the GPU and back"
        if model is None:
            return _Go.ASK
        if on_cpu(model):
            key = fallback_key(model)
            if calls.gave_up_on == key or not foreseen(model, snapshot, desk.cycle.watch, rules):
                return _Go.PASS
            return f"{call.model} is on the CPU and is to be loaded again"
        if not self._serves(model, calls):
            return _Go.ASK
        if not model.requests and self._expires_soon(model):
            return _Go.ASK_AFRESH
        if not desk.admissions.book.line:
            return _Go.PASS
        return gives_way(model, desk.admissions.book, desk.admissions.snapshot(), rules) or _Go.PASS

    def _is_leaving(self, name: str) -> bool:
        """An unload or a load of ours is under way. One that only waits to be loaded again is left to who asks."""
        pending = self._desk.cycle.watch.pending
        if pending is None or isinstance(pending.action, FreeComfyUI):
            return False
        return self._same(canonical(pending.action.model), name)

    def _expires_soon(self, model: LoadedModel) -> bool:
        left = [] if model.expires_at is None else [(model.expires_at - self._desk.clock.utcnow()).total_seconds()]
        now = self._desk.clock.monotonic()
        mine = (calls.leaves_at for calls in self._models.values() if self._is(model, calls.name))
        left += [at - now for at in mine if at is not None]
        return any(-EXPIRED_SECONDS < seconds < EXPIRES_SOON_SECONDS for seconds in left)

    async def _opened(self, call: Call, calls: _Model, until: float, *, afresh: bool) -> Answer | None:
        """The desk's answer, which all who wait for this model share; None: not in time, or nothing can be said."""
        if calls.opening is None or calls.opening.done():
            calls.opening = asyncio.create_task(self._ask(call, calls, afresh=afresh), name="gateway ollama")
        opening = calls.opening
        calls.waiting += 1
        try:
            await asyncio.wait({opening}, timeout=max(0.0, until - self._desk.clock.monotonic()))
            return opening.result() if opening.done() and not opening.cancelled() else None
        finally:
            calls.waiting -= 1
            if not calls.waiting and not opening.done():
                opening.cancel()

    async def _ask(self, call: Call, calls: _Model, *, afresh: bool) -> Answer | None:
        desk = self._desk
        estimate = await desk.estimates.of(required=None, model=call.model, context=call.context, workflow=None)
        if estimate.digest is None:
            # Ollama has no such model, or does not say: it will answer for itself.
            return None
        calls.context = estimate.context
        request = Request(
            id=secrets.token_hex(8),
            owner=f"ollama:{calls.name}",
            estimate=estimate,
            margin_bytes=self._margin_bytes(estimate),
            priority=Priority.INTERACTIVE,
            wait_seconds=LOAD_SECONDS + desk.max_wait_seconds,
            ttl_seconds=LOAD_SECONDS,
            at_gateway=True,
            afresh=afresh,
        )
        try:
            answer = await desk.admissions.ask(request, for_ever)
        except asyncio.CancelledError:
            desk.withdraw(request)
            raise
        except (TooMany, OtherRequest, Stopping, LookupError) as problem:
            logger.debug("{} goes on without a promise: {}", call.model, problem)
            return None
        if answer.lease is not None:
            try:
                await self._with_a_fresh_view(calls, answer.lease)
            finally:
                # Also where the call is given up meanwhile: whoever ends the promise must know of it.
                calls.lease = answer.lease.id
        return answer

    async def _with_a_fresh_view(self, calls: _Model, lease: Lease) -> None:
        """What keeps Ollama from seeing the room that there is leaves first, if it is idle."""
        desk = self._desk
        until = desk.clock.monotonic() + FRESH_VIEW_SECONDS
        for name in in_the_way(lease.bytes, desk.observer.known(), self._rules):
            reason = f"{calls.name} is to be loaded, and Ollama's view of free memory is as old as {name}"
            wish = ManualFree(action=UnloadModel(model=name), force=True, reason=reason)
            # The free that made the room may not have settled yet.
            while desk.cycle.watch.pending is not None and await desk.next_turn(until):
                pass
            answer = await desk.cycle.free(wish)
            while answer.accepted and self._is_listed(name) and await desk.next_turn(until):
                pass

    def _is_listed(self, name: str) -> bool:
        ollama = self._desk.observer.known().ollama
        return isinstance(ollama, Seen) and any(model.name == name for model in ollama.value.models)

    def _margin_bytes(self, estimate: Estimate) -> int:
        measured = estimate.source in (Source.LEARNED, Source.TABLE)
        return self._rules.fit_margin_bytes + (0 if measured else int((estimate.size.bytes or 0) * UNMEASURED_SHARE))

    async def _learn_names(self, calls: _Model) -> bool:
        """Whether it is now known what models are made of that was not: the call may use another name for one."""
        ollama = self._desk.observer.known().ollama
        listed = ollama.value.models if isinstance(ollama, Seen) else ()
        names = {calls.name, *(canonical(model.name) for model in listed)}
        unknown = [name for name in names if self._desk.estimates.blob(name) is None]
        await self._desk.estimates.learn_blobs(unknown)
        return any(self._desk.estimates.blob(name) is not None for name in unknown)


class _HeldCall:
    """One call on its way through the gate."""

    def __init__(self, gate: OllamaGate, head: Head, looked: Looked) -> None:
        self._gate = gate
        self._head = head
        self._looked = looked
        self._calls: _Model | None = None
        self.look = looked.feed

    async def may_pass(self) -> Passage | Reply:
        call = self._looked.call()
        if call is None or call.unloads:
            return self._gate.unwatched("passed" if call else "unread")
        calls, verdict = await self._gate.enter(call, self._head.path)
        if isinstance(verdict, Passage):
            self._calls = calls
        return verdict

    def answered(self, status: int) -> None:
        """Nothing hangs on it: Ollama's list tells what became of a load."""

    def over(self) -> None:
        if self._calls is not None:
            self._gate.over(self._calls)
            self._calls = None


def _error(path: str, status: int, words: str) -> bytes:
    """An error as Ollama words it for the API that `path` belongs to (openai.NewError, anthropic.NewError)."""
    if path == "/v1/messages":
        kind = "overloaded_error" if status == 503 else "api_error"
        body: dict[str, object] = {"type": "error", "error": {"type": kind, "message": words}, "request_id": ""}
    elif path.startswith("/v1/"):
        body = {"error": {"message": words, "type": "api_error", "param": None, "code": None}}
    else:
        body = {"error": words}
    return json.dumps(body).encode()
