"""What must hold in every world, however it came about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import TypeAlias

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.policy.model import Daemon, Post, World
from tests.policy.worlds import GIB, SOFT, UNLOAD
from vram_manager.domain.action import FreeComfyUI, LoadModel, UnloadModel
from vram_manager.domain.demand import Kind
from vram_manager.domain.event import EventType
from vram_manager.domain.reading import Missing, Seen
from vram_manager.domain.snapshot import Queue
from vram_manager.policy import Rules
from vram_manager.policy.accounting import gpus_seen
from vram_manager.policy.demands import fallback, met, on_cpu
from vram_manager.policy.plan import Target, comfyui_target

Act: TypeAlias = Callable[[Daemon], None]

# Short graces and idle times, so that a lot happens in a minute.
RULES = Rules(
    grace_seconds=3,
    empty_room_grace_seconds=8,
    empty_room_after_seconds=60,
    cooldown_seconds=15,
    comfyui_idle_seconds=4,
    settle_timeout_seconds=8,
)
ENDS = (EventType.FREED, EventType.FREE_UNCONFIRMED)

few = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
sizes = st.sampled_from([0.5, 2.0, 4.0, 8.0, 12.0, 20.0])
names = st.sampled_from(["a", "b"])


def chats(name: str, size: float) -> Act:
    return lambda daemon: daemon.world.chat(name, size)


def asks(name: str, size: float, seconds: float, num_gpu: int | None) -> Act:
    return lambda daemon: daemon.world.chat(name, size, seconds=seconds, num_gpu=num_gpu)


def loses_the_gpu(lost: bool) -> Act:
    return lambda daemon: setattr(daemon.world, "lost_gpu", lost)


def deletes(name: str) -> Act:
    return lambda daemon: daemon.deleted.add(name)


def leaves(name: str) -> Act:
    return lambda daemon: daemon.world.leave(name)


def renders(seconds: float, models: float, cache: float) -> Act:
    return lambda daemon: daemon.world.render(seconds, models, cache)


def others(size: float) -> Act:
    return lambda daemon: daemon.world.others(size)


def loses(sensor: str) -> Act:
    return lambda daemon: daemon.gone.add(sensor)


def finds(sensor: str) -> Act:
    return lambda daemon: daemon.gone.discard(sensor)


def wishes(action: FreeComfyUI | UnloadModel, force: bool) -> Act:
    return lambda daemon: daemon.wish(action, force=force)


sensors = st.sampled_from(["gpus", "ollama", "comfyui", "queue"])
traffic = st.one_of(
    st.builds(chats, names, sizes),
    st.builds(leaves, names),
    st.builds(renders, st.sampled_from([0.5, 2.0, 10.0, 40.0]), sizes, st.sampled_from([0.0, 0.0, 1.0, 4.0])),
    st.builds(others, sizes),
)
trouble = st.one_of(st.builds(loses, sensors), st.builds(finds, sensors), st.builds(finds, sensors))
wished = st.builds(
    wishes, st.sampled_from([SOFT, UNLOAD, UnloadModel(model="a"), UnloadModel(model="b")]), st.booleans()
)
requests = st.builds(asks, names, sizes, st.sampled_from([0.0, 2.0, 20.0]), st.sampled_from([None, None, None, 0]))
mishaps = st.one_of(st.builds(loses_the_gpu, st.booleans()), st.builds(deletes, names))
pauses = st.sampled_from([0.25, 1.0, 1.0, 3.0, 10.0, 30.0])
worlds = st.builds(
    World,
    dynamic=st.booleans(),
    highvram=st.booleans(),
    stubborn_gib=st.sampled_from([0.0, 0.0, 3.0]),
    others_gib=st.sampled_from([0.0, 0.0, 6.0, 12.0]),
)
shared_worlds = st.builds(World, gateway=st.booleans(), others_gib=st.sampled_from([0.0, 0.0, 6.0]))
honest_worlds = st.builds(World, highvram=st.booleans(), others_gib=st.sampled_from([0.0, 6.0]))


def days(*kinds: st.SearchStrategy[Act]) -> st.SearchStrategy[list[tuple[float, Act]]]:
    return st.lists(st.tuples(pauses, st.one_of(*kinds)), min_size=1, max_size=14)


def spend(
    day: list[tuple[float, Act]], world: World, rules: Rules = RULES, lost_flags: tuple[bool, ...] = ()
) -> Daemon:
    """A day of theirs, and half a minute after it."""
    daemon = Daemon(world, rules, lost_flags)
    daemon.live(1)
    for pause, act in day:
        act(daemon)
        daemon.live(pause)
    daemon.live(30)
    return daemon


def of_comfyui(daemon: Daemon) -> list[Post]:
    return [post for post in daemon.posts if isinstance(post.action, FreeComfyUI)]


def first_posts(daemon: Daemon) -> list[Post]:
    """What opens an episode without anybody having asked for it by hand."""
    return [
        post
        for post in of_comfyui(daemon)
        if not post.by_hand and not post.repost and not post.branch.startswith("6 escalate")
    ]


flags = st.lists(st.booleans(), max_size=6).map(tuple)


# -- safety


@few
@given(day=days(traffic, trouble, wished), world=worlds, lost=flags)
def test_nothing_is_ever_posted_under_a_running_or_waiting_prompt_but_by_force(day, world, lost) -> None:
    for post in of_comfyui(spend(day, world, lost_flags=lost)):
        assert isinstance(post.seen.queue, Seen)
        assert post.seen.queue.value.idle or post.action.forced
        # The one post without a second look is the second one: it may be as late as the queue's reading is old.
        assert not post.busy or post.action.forced or post.repost


@few
@given(day=days(traffic, trouble, wished), world=worlds, lost=flags)
def test_nothing_is_ever_posted_on_a_missing_reading(day, world, lost) -> None:
    for post in of_comfyui(spend(day, world, lost_flags=lost)):
        gpus = gpus_seen(post.seen)
        assert not isinstance(gpus, Missing)
        assert isinstance(post.seen.comfyui, Seen)
        assert isinstance(post.seen.queue, Seen)


@few
@given(day=days(traffic, trouble, wished), world=worlds, lost=flags)
def test_posts_keep_their_distances(day, world, lost) -> None:
    daemon = spend(day, world, lost_flags=lost)
    for earlier, later in pairwise(of_comfyui(daemon)):
        assert later.at - earlier.at >= RULES.post_spacing_seconds
    opening = {id(post) for post in first_posts(daemon)}
    for earlier, later in pairwise(of_comfyui(daemon)):
        if id(later) in opening:
            assert later.at - earlier.at >= RULES.cooldown_seconds


@few
@given(day=days(traffic, trouble, wished), world=worlds, lost=flags)
def test_no_action_is_posted_more_than_twice(day, world, lost) -> None:
    posts = of_comfyui(spend(day, world, lost_flags=lost))
    for earlier, later in pairwise(posts):
        assert not (earlier.repost and later.repost)
        assert not later.repost or later.action == earlier.action
    assert not posts or not posts[0].repost


@few
@given(day=days(traffic, trouble), world=worlds, lost=flags)
def test_no_second_episode_opens_before_comfyui_has_run_again(day, world, lost) -> None:
    daemon = spend(day, world, lost_flags=lost)
    for earlier, later in pairwise(first_posts(daemon)):
        assert isinstance(earlier.seen.queue, Seen)
        assert isinstance(later.seen.queue, Seen)
        assert later.seen.queue.value.runs > earlier.seen.queue.value.runs


@few
@given(day=days(traffic, trouble), world=worlds)
def test_a_dry_run_and_a_mere_monitor_never_act(day, world) -> None:
    for rules in (Rules(dry_run=True, grace_seconds=3), Rules(enabled=False, grace_seconds=3)):
        assert spend(day, world, rules).posts == []


# -- truth


@few
@given(day=days(traffic, trouble, wished), world=worlds, lost=flags)
def test_every_request_ends_in_one_verdict(day, world, lost) -> None:
    daemon = spend(day, world, lost_flags=lost)
    verdicts = [told for told in daemon.told if told.event.type in ENDS]
    requests = [post for post in daemon.posts if not post.repost and not isinstance(post.action, LoadModel)]
    under_way = daemon.watch.pending is not None
    assert len(verdicts) == len(requests) - under_way
    assert not under_way or daemon.world.now - requests[-1].at <= RULES.settle_timeout_seconds


@few
@given(day=days(traffic, trouble, wished), world=worlds, lost=flags)
def test_no_more_is_said_to_be_freed_than_anybody_released(day, world, lost) -> None:
    for told in spend(day, world, lost_flags=lost).told:
        if told.event.type in ENDS:
            assert 0 <= (told.event.freed_bytes or 0) / GIB <= told.released_gib + 0.01


@few
@given(day=days(traffic, trouble, wished), world=worlds, lost=flags)
def test_told_numbers_stay_within_their_bounds(day, world, lost) -> None:
    daemon = spend(day, world, lost_flags=lost)
    for told in daemon.told:
        for percent in (told.event.used_percent_before, told.event.used_percent_after):
            assert percent is None or 0 <= percent <= 100
        assert (told.event.took_seconds or 0) >= 0
    for _, decision in daemon.turns:
        assert decision.look_again_seconds is None or decision.look_again_seconds > 0
        assert all(demand.need_free_bytes >= 0 for demand in decision.watch.demands.values())
        assert decision.watch.fill_rate_bytes_per_second >= 0


# -- time


@few
@given(day=days(traffic, trouble, wished), dynamic=st.booleans(), lost=flags, offset=st.sampled_from([-500.0, 86400.0]))
def test_it_does_not_matter_what_time_it_is(day, dynamic, lost, offset) -> None:
    def lived(begin: float) -> list[tuple[float, str, str]]:
        world = World(dynamic=dynamic, now=begin, queue=Queue.first(0, begin))
        daemon = spend(day, world, lost_flags=lost)
        return [(seen.taken_at - begin, decision.branch, decision.reason) for seen, decision in daemon.turns]

    assert lived(0.0) == lived(offset)


# -- no trigger is lost


@few
@given(day=days(traffic, trouble), world=honest_worlds)
def test_what_could_be_answered_has_been_answered_once_comfyui_stayed_idle(day, world) -> None:
    daemon = spend(day, world)
    daemon.gone.clear()
    daemon.live(max([1.0, *(prompt.ends_at - world.now + 1 for prompt in world.prompts)]))
    bound = RULES.cooldown_seconds + RULES.comfyui_idle_seconds + RULES.grace_seconds + RULES.settle_timeout_seconds
    daemon.live(2 * bound)
    seen = daemon.look()
    gpus = gpus_seen(seen)
    assert not isinstance(gpus, Missing)
    assert daemon.decision is not None
    assert daemon.decision.branch.startswith(("3", "4"))
    target = comfyui_target(seen, gpus, RULES)
    assert isinstance(target, Target)
    held = target.held(seen, daemon.watch.lesson, UNLOAD.stage if world.highvram else SOFT.stage, RULES)
    # What is left there are node outputs that only the unload stage would take, or too little.
    left = held.bytes - round(world.cache_gib * GIB)
    for demand in daemon.watch.demands.values():
        fits = target.memory.free_bytes + left >= demand.need_free_bytes
        assert left < RULES.min_reclaim_bytes or (demand.kind is Kind.FALLBACK and not fits)


@few
@given(day=days(traffic), world=honest_worlds, size=sizes)
def test_a_chat_that_falls_to_the_cpu_gets_its_room_within_a_cooldown(day, world, size) -> None:
    daemon = spend(day, world)
    daemon.live(max([1.0, *(prompt.ends_at - world.now + 1 for prompt in world.prompts)]))
    world.render(1, 8.0, 0.0)
    daemon.live(3)
    world.chat("new", size)
    daemon.live(0.25)
    need_gib = (size - world.models["new"].size_vram_bytes / GIB) + 1.5
    assume(world.models["new"].size_vram_bytes / GIB < 0.98 * size)
    assume(world.free_gib < need_gib <= world.free_gib + world.models_gib)
    daemon.live(RULES.cooldown_seconds + RULES.comfyui_idle_seconds + RULES.settle_timeout_seconds + 2)
    assert world.models_gib == 0


# -- Ollama's models give way, are mended and come back


MENDS = replace(RULES, warm_back=True, repair_backoff_seconds=10, min_residency_seconds=3, max_frees_per_hour=8)
HOUR = 3600.0


def of_ollama(daemon: Daemon) -> list[Post]:
    """What we unloaded without anybody having asked for it by hand."""
    return [post for post in daemon.posts if isinstance(post.action, UnloadModel) and not post.by_hand]


def repairs(daemon: Daemon) -> list[Post]:
    return [post for post in of_ollama(daemon) if post.branch == "7 repair"]


@few
@given(day=days(traffic, requests, requests, trouble, mishaps), world=shared_worlds, lost=flags)
def test_we_only_unload_models_that_have_been_quiet_and_are_not_pinned(day, world, lost) -> None:
    for post in of_ollama(spend(day, world, replace(MENDS, pinned=frozenset({"a:latest"})), lost)):
        assert isinstance(post.seen.ollama, Seen)
        (model,) = (one for one in post.seen.ollama.value.models if one.name == post.action.target.split(":")[1])
        seconds = MENDS.unseen_idle_seconds if model.requests is None else MENDS.model_idle_seconds
        assert not model.requests
        assert model.active_at is not None
        assert post.at - model.active_at >= seconds
        assert model.name != "a" or post.branch == "7 repair"


@few
@given(day=days(traffic, requests, requests, trouble, mishaps), world=shared_worlds, lost=flags)
def test_no_hour_sees_more_swaps_than_its_budget(day, world, lost) -> None:
    daemon = spend(day, world, replace(MENDS, max_frees_per_hour=3, cooldown_seconds=2), lost)
    swaps = [post for post in daemon.posts if not post.repost and not isinstance(post.action, LoadModel)]
    for place, post in enumerate(swaps):
        assert place < 3 or post.branch.startswith("6 escalate")


@few
@given(day=days(traffic, requests, requests, trouble, mishaps), world=shared_worlds, lost=flags)
def test_a_model_is_repaired_no_more_often_than_an_hour_allows_and_never_two_at_once(day, world, lost) -> None:
    daemon = spend(day, world, MENDS, lost)
    for name in ("a", "b"):
        assert sum(post.action.target == f"ollama:{name}" for post in repairs(daemon)) <= MENDS.max_repairs_per_hour
    for before, (_, after) in zip(daemon.remembered, daemon.turns, strict=True):
        if after.branch == "7 repair":
            assert before.mending is None or after.events
        if after.watch.mending is not None and before.mending is not None and after.branch != "7 repair":
            assert after.watch.mending == before.mending


@few
@given(day=days(traffic, requests, requests, trouble, mishaps), world=shared_worlds, lost=flags)
def test_every_mending_ends(day, world, lost) -> None:
    daemon = spend(day, world, MENDS, lost)
    daemon.live(120)
    # The unload, the wait for room, one other swap meanwhile, the load and the look where it went.
    longest = 60 + 4 * MENDS.settle_timeout_seconds
    for seen, decision in daemon.turns:
        mending = decision.watch.mending
        assert mending is None or seen.taken_at - mending.began_at <= longest
    assert sum(isinstance(post.action, LoadModel) for post in daemon.posts) <= len(of_ollama(daemon))


@few
@given(day=days(traffic, requests, requests, trouble), world=shared_worlds, lost=flags)
def test_in_the_end_no_idle_model_is_on_the_cpu_that_would_fit_unless_it_was_meant_or_tried_often(
    day, world, lost
) -> None:
    rules = replace(MENDS, max_frees_per_hour=1000)
    daemon = spend(day, world, rules, lost)
    daemon.gone.clear()
    daemon.live(max([1.0, *(prompt.ends_at - world.now + 1 for prompt in world.prompts)]))
    daemon.live(max([1.0, *(until - world.now + 1 for until in world.busy.values())]))
    daemon.live(200)
    seen = daemon.look()
    gpus = gpus_seen(seen)
    assert not isinstance(gpus, Missing)
    assert isinstance(seen.ollama, Seen)
    assert daemon.watch.mending is None
    for model in seen.ollama.value.models:
        demand = fallback(model, seen.ollama.value, 0, world.now, rules)
        tried = len(daemon.watch.repairs_at.get(model.digest, ()))
        left_alone = demand.key in daemon.watch.meant or tried >= rules.max_repairs_per_hour
        assert not on_cpu(model) or left_alone or not met(demand, seen, gpus, rules)
