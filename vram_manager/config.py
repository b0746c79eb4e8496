"""Settings from the environment, one small class per part.

Every field's docstring gives its meaning, unit and the reason for its default; `.env.example` and the README's
table say the same, and a test keeps the three in step. A wrong value is one line that names the variable, the
value and what is allowed (`SettingsError`); an unknown name is a warning with the nearest known one.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from vram_manager.domain.event import EventType
from vram_manager.domain.size import MIB, Size, gib, parse_size
from vram_manager.errors import SettingsError
from vram_manager.policy.estimate import canonical
from vram_manager.policy.rules import Rules

Profile: TypeAlias = Literal["balanced", "chat", "image"]

_BY_PROFILE = (
    ("threshold", 75, 70, 85),
    ("unload", 85, 85, 92),
    ("grace", 30, 10, 120),
    ("empty_room", 600, 120, 3600),
    ("idle", 30, 15, 120),
    ("waiting_idle", 2, 2, 120),
    ("chat_turn", 10, 3, 20),
    ("image_turn", 10, 20, 3),
)
PROFILES: dict[Profile, dict[str, float]] = {
    "balanced": {name: value for name, value, _, _ in _BY_PROFILE},
    "chat": {name: value for name, _, value, _ in _BY_PROFILE},
    "image": {name: value for name, _, _, value in _BY_PROFILE},
}
"""What each profile sets. `waiting_idle` is how long ComfyUI must have been idle when a model fell to the CPU;
`chat_turn` and `image_turn` how long a call at a gateway waits before it is let in ahead of the other side."""


SOFT_FREE_BODY = {"unload_models": True, "free_memory": False}


def _json_object(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"must be a JSON object ({error})") from error
    if not isinstance(parsed, dict):
        raise ValueError("must be a JSON object")
    return parsed


def _can_be_asked(url: str) -> bool:
    try:
        parts = urlsplit(url)
        named = (parts.hostname or "").encode("idna")
        return url.isprintable() and parts.scheme in ("http", "https") and bool(named) and parts.port != 0
    except ValueError:  # a name that cannot be encoded among it
        return False


def without_secrets(url: str) -> str:
    """The URL as it may be shown: a name and password in it are not."""
    return re.sub(r"//[^/@]*@", "//", url)


def _url(value: object) -> object:
    if isinstance(value, str) and (stripped := value.strip().rstrip("/")):
        if not _can_be_asked(stripped):
            raise ValueError("must be an http:// or https:// URL, or empty for none")
        return stripped
    return "" if isinstance(value, str) else value


def _percent(value: object) -> object:
    return value.strip().removesuffix("%").strip() if isinstance(value, str) else value


def _blank_is_none(value: object) -> object:
    return None if isinstance(value, str) and not value.strip() else value


def _headers(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or not re.fullmatch(r"[\t\x20-\x7e]*", text):
            raise ValueError(f"the header {name!r} cannot be sent: names and values must be printable ASCII")
    return value


def _body(value: object) -> object:
    body = SOFT_FREE_BODY if isinstance(value, str) and not value.strip() else _json_object(value)
    if isinstance(body, dict) and not any(body.values()):
        raise ValueError("must set at least one of unload_models and free_memory: ComfyUI stores only true flags")
    return body


def _limit(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


Limit: TypeAlias = Annotated[Size, NoDecode, BeforeValidator(_limit)]
Mebibytes: TypeAlias = Annotated[int, Field(ge=1, le=2**20, strict=True)]
Url: TypeAlias = Annotated[str, BeforeValidator(_url)]
Headers: TypeAlias = Annotated[dict[str, str], NoDecode, BeforeValidator(_json_object), AfterValidator(_headers)]
Percent: TypeAlias = Annotated[Annotated[float, Field(gt=0, le=100)] | None, BeforeValidator(_percent)]
Seconds: TypeAlias = Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)]
MaybeSeconds: TypeAlias = Annotated[Seconds | None, BeforeValidator(_blank_is_none)]
Port: TypeAlias = Annotated[int, Field(ge=1, le=65535)]
MaybeText: TypeAlias = Annotated[str | None, BeforeValidator(_blank_is_none)]


def _names(value: object) -> object:
    """A comma list, without the empty ones."""
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


def _urls(value: object) -> object:
    """A comma list of URLs."""
    names = _names(value)
    return tuple(dict.fromkeys(_url(name) for name in names)) if isinstance(names, tuple) else names


Names: TypeAlias = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)]


class _Part(BaseSettings):
    """Compose files pass every variable through, so an empty one means unset."""

    model_config = SettingsConfigDict(
        case_sensitive=False, frozen=True, extra="ignore", use_attribute_docstrings=True, env_ignore_empty=True
    )


class _Server(_Part):
    """Here an empty URL is a value of its own: no such server."""

    model_config = SettingsConfigDict(env_ignore_empty=False)


KV_VALUE_BYTES = {"f16": 2.0, "q8_0": 1.0625, "q4_0": 0.5625}
"""Bytes of a value in a cache of that type: blocks of 32 with a scale of two bytes (ggml)."""


class OllamaSettings(_Server):
    """Where Ollama is."""

    ollama_url: Url = "http://localhost:11434"
    """Ollama's base URL; empty means there is no Ollama here."""
    ollama_headers: Headers = {}
    """JSON object of extra request headers, for an authenticating proxy in front of Ollama."""
    ollama_gpu: MaybeText = None
    """UUID or index of the GPU Ollama uses, where it cannot be told (several GPUs). Empty: worked out."""


class ComfyUISettings(_Server):
    """Where ComfyUI is and how it is asked."""

    comfyui_url: Url = "http://localhost:8188"
    """ComfyUI's base URL; empty means there is no ComfyUI here."""
    comfyui_headers: Headers = {}
    """JSON object of extra request headers, for example a login extension's Bearer token."""
    comfyui_gpu: MaybeText = None
    """UUID or index of the GPU ComfyUI uses, where it cannot be told. Empty: worked out."""
    comfyui_idle_seconds: MaybeSeconds = None
    """How long ComfyUI must have been idle before a free with nobody waiting, seconds. By profile: 30 / 15 / 120; its
    own clean-up runs up to 10 s after a prompt."""
    comfyui_soft_free_body: Annotated[dict[str, bool], NoDecode, BeforeValidator(_body)] = SOFT_FREE_BODY
    """JSON body of the soft stage. The default releases the GPU and keeps node outputs; the pair often called soft,
    {"unload_models": false, "free_memory": true}, drops everything."""


class PolicySettings(_Part):
    """When memory is freed."""

    vram_profile: Profile = "balanced"
    """A named set of defaults: balanced, chat (Ollama first) or image (ComfyUI first)."""
    vram_check_interval: Annotated[float, Field(ge=0.25, le=3600)] = 5.0
    """Slowest beat of the loop, seconds; it beats faster while something settles or memory runs short."""
    vram_threshold: Percent = None
    """Percent used above which an idle ComfyUI is freed. By profile: 75 / 70 / 85."""
    vram_unload_threshold: Percent = None
    """Percent still used after a soft free above which the unload stage follows. By profile: 85 / 85 / 92."""
    vram_grace_seconds: MaybeSeconds = None
    """How long use must stay above the threshold with nobody waiting, seconds. By profile: 30 / 10 / 120, and
    600 / 120 / 3600 while Ollama has had no traffic for ten minutes; a value set here holds for both."""
    vram_free_cooldown: Seconds = 30.0
    """Seconds between two frees of one target. It delays a trigger and never loses it."""
    vram_settle_timeout: Annotated[float, Field(ge=1, le=600)] = 10.0
    """Seconds to wait for the proof that memory came back; an idle ComfyUI needs about one."""
    vram_min_reclaim_mb: Annotated[int, Field(ge=1, le=2**20)] = 256
    """MiB below which a free is not worth the reload it costs."""
    enable_vram_monitoring: bool = True
    """false: watch and answer, never free, and admit everything."""
    vram_dry_run: Annotated[bool, Field(validation_alias=AliasChoices("vram_dry_run", "vram_check_dry_run"))] = False
    """true: decide and tell, do nothing. VRAM_CHECK_DRY_RUN is the same."""

    @model_validator(mode="after")
    def _unload_not_below_threshold(self) -> PolicySettings:
        unload, threshold = self.unload_percent, self.threshold_percent
        if unload < threshold:
            raise ValueError(
                f"VRAM_UNLOAD_THRESHOLD={unload:g} is below VRAM_THRESHOLD={threshold:g}: it must be at least that"
            )
        return self

    @property
    def threshold_percent(self) -> float:
        return PROFILES[self.vram_profile]["threshold"] if self.vram_threshold is None else self.vram_threshold

    @property
    def unload_percent(self) -> float:
        # A threshold raised alone takes the profile's unload threshold along instead of contradicting it.
        by_profile = max(PROFILES[self.vram_profile]["unload"], self.threshold_percent)
        return by_profile if self.vram_unload_threshold is None else self.vram_unload_threshold


class GpuSettings(_Part):
    """How the GPU is read."""

    vram_check_timeout_seconds: Annotated[float, Field(gt=0, le=600)] = 5.0
    """Deadline of one NVML reading, seconds; a call that hangs longer makes the GPU unknown, never full or empty."""
    vram_gpu_sleep: bool = True
    """true: a GPU that the kernel may suspend (laptops with two GPUs) is let go while nobody uses it, and never woken
    to be read. false: it is held open."""


class AdmissionSettings(_Part):
    """What workers are promised, and when they are warned."""

    vram_fail_open: bool = True
    """true: admit with a warning when the GPU cannot be read. false: refuse then."""
    vram_safety_margin_mb: Annotated[int, Field(ge=0, le=2**20)] = 2048
    """MiB that must stay free beside what a request needs; a request may name its own."""
    vram_default_estimate_mb: Annotated[int, Field(ge=1, le=2**20)] = 8192
    """MiB a request counts as when neither it nor anything learned, listed or measured says how much it needs."""
    vram_estimates: Annotated[dict[str, Mebibytes], NoDecode, BeforeValidator(_json_object)] = {}
    """JSON object of model name pattern to MiB, for example {"ltx2-19b": 24576}: a pattern with * or ? must match the
    whole name, one without any part of it."""
    ollama_num_parallel: Annotated[int, Field(ge=1, le=64)] = 1
    """The same as Ollama's own variable, if that is set there: each slot of a model has its own KV cache. Only used
    until a model's need has been measured."""
    ollama_kv_cache_type: Literal["f16", "q8_0", "q4_0"] = "f16"
    """The same as Ollama's own variable, if that is set there. Only used until a model's need has been measured."""
    vram_soft_limit: Limit = Size(percent=90.0)
    """Use of a GPU above which its workers are warned: percent of it, or a size such as 11GB."""
    vram_hard_limit: Limit = Size(percent=95.0)
    """Use of a GPU above which its workers are told to stop before they allocate: percent of it, or a size."""
    vram_soft_limit_seconds: Seconds = 30.0
    """Seconds use must stay above the soft limit before it counts as a violation; 0: at the first check."""
    vram_leak_threshold_mb: Annotated[int, Field(ge=1, le=2**20)] = 100
    """MiB that what a tenant keeps may grow before it is called a leak: a worker between two generations, ComfyUI and
    Ollama when nothing of them is wanted."""
    vram_leak_generations: Annotated[int, Field(ge=10, le=10**6)] = 100
    """Generations over which that growth is measured, not counting the warm-up."""

    @model_validator(mode="after")
    def _hard_not_below_soft(self) -> AdmissionSettings:
        soft, hard = self.vram_soft_limit, self.vram_hard_limit
        # A percentage and a size can only be compared on a GPU.
        pairs = ((soft.bytes, hard.bytes), (soft.percent, hard.percent))
        if any(low is not None and high is not None and high < low for low, high in pairs):
            raise ValueError(f"VRAM_HARD_LIMIT={hard} is below VRAM_SOFT_LIMIT={soft}: it must be at least that")
        return self


class GatewaySettings(_Part):
    """The gateways, which hold a call until there is room for it, and who gives way to whom."""

    gateway_ollama_port: Port | None = None
    """TCP port of the gateway in front of Ollama: clients that use it instead of Ollama's own never fall to the CPU for
    want of room that could be made. Empty: off."""
    gateway_comfyui_port: Port | None = None
    """TCP port of the gateway in front of ComfyUI: a prompt waits there while Ollama's idle models make room. Empty:
    off."""
    gateway_host: str = "127.0.0.1"
    """Address both gateways listen on. They ask nobody for a password, as Ollama and ComfyUI do not."""
    gateway_max_wait: Annotated[float, Field(ge=1, le=3600)] = 60.0
    """Seconds a call is held at most."""
    gateway_on_timeout: Literal["forward", "refuse"] = "forward"
    """What happens then. forward: it goes on, and may run on the CPU. refuse: 503 with Retry-After."""
    ollama_evict: bool = True
    """true: idle Ollama models are unloaded for ComfyUI, for workers and for each other. A request is never aborted."""
    ollama_warm_back: bool = False
    """true: the last model unloaded for ComfyUI is loaded again once ComfyUI's queue has drained."""
    ollama_pinned: Names = ()
    """Comma list of models that are never unloaded."""
    vram_repair_fallback: bool = True
    """true: a model that fell to the CPU is unloaded and loaded again when it is idle and has room. Three times an
    hour at most; one that had room all the time is left where it is."""

    def in_words(self) -> list[str]:
        """These settings as sentences."""
        pinned = f"; never {', '.join(self.ollama_pinned)}" if self.ollama_pinned else ""
        gives_way = f"Ollama's idle models give way to others{pinned}" if self.ollama_evict else "Ollama's models stay"
        repair = "one that fell to the CPU is repaired" if self.vram_repair_fallback else "none is repaired"
        lines = [f"{gives_way}; {repair}" + ("; the last one comes back" if self.ollama_warm_back else "")]
        ports = {"Ollama": self.gateway_ollama_port, "ComfyUI": self.gateway_comfyui_port}
        where = [f"{name} on {self.gateway_host}:{port}" for name, port in ports.items() if port is not None]
        if where:
            after = "goes on" if self.gateway_on_timeout == "forward" else "is refused"
            longest = f"{self.gateway_max_wait:g} s at most"
            lines.append(f"Gateways: {' and '.join(where)}; a call waits for {longest}, then it {after}")
        return lines


EVENT_NAMES = tuple(str(kind) for kind in EventType)


def _event_names(value: object) -> object:
    names = _names(value)
    if names == ():
        raise ValueError(f"must name an event; these are: {', '.join(EVENT_NAMES)}")
    for name in names if isinstance(names, tuple) else ():
        if name not in EVENT_NAMES:
            raise ValueError(f"{name!r} is no event; these are: {', '.join(EVENT_NAMES)}")
    return names


class LookingSettings(_Part):
    """What is remembered, who is told, and what else is looked at."""

    ollama_nodes: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_urls)] = ()
    """Comma list of the base URLs of further Ollama servers, for the report, the page and the metrics."""
    vram_history_mb: Annotated[int, Field(ge=8, le=2**20)] = 128
    """MiB that the history in VRAM_STATE_DIR takes at most: samples of a day, minutes of a month, events; the oldest go
    first."""
    vram_webhook_url: Url = ""
    """URL that is told chosen events with a POST of JSON. Empty: nobody is."""
    vram_webhook_events: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_event_names)] = (
        "free_unconfirmed",
        "repair_failed",
        "ollama_stuck",
        "worker_dead",
        "hard_limit",
        "leak",
        "sensor_lost",
        "sensor_back",
    )
    """Comma list of the events it is told; their names are those of /v1/events."""
    vram_webhook_secret: str | None = None
    """Key of the HMAC-SHA256 in the header X-Vram-Manager-Signature, by which the receiver knows who sent it. Empty: no
    signature."""

    def in_words(self) -> list[str]:
        """These settings as sentences."""
        lines = []
        if self.ollama_nodes:
            lines.append(f"Further Ollama servers: {', '.join(map(without_secrets, self.ollama_nodes))}")
        if self.vram_webhook_url:
            lines.append(f"A webhook is told: {', '.join(self.vram_webhook_events)}")
        return lines


class ServiceSettings(_Part):
    """Socket, state, logs."""

    vram_socket: Path = Path("/run/vram-manager/vram.sock")
    """Unix socket of the API, mode 0660; the CLI and the client read it too."""
    vram_http_host: str = "127.0.0.1"
    """Address the same API listens on over TCP, when VRAM_HTTP_PORT is set."""
    vram_http_port: Port | None = None
    """TCP port of the same API, read-only without a token. Empty: off."""
    vram_api_token: str | None = None
    """Bearer token for calls that change things over TCP. Empty: such calls are refused there."""
    vram_state_dir: Path = Path("/var/lib/vram-manager")
    """Directory of the SQLite history. Not writable: history is kept in memory, said once."""
    vram_log_format: Literal["text", "json"] = "text"
    """text for people, json for machines."""
    vram_debug: bool = False
    """true: also log every decision."""
    vram_manager_container_name: str = "vram-manager"
    """Name of the container; used by the compose files only."""


class Settings(_Part):
    """Everything, part by part."""

    ollama: OllamaSettings
    comfyui: ComfyUISettings
    policy: PolicySettings
    gpu: GpuSettings
    admission: AdmissionSettings
    gateway: GatewaySettings
    looking: LookingSettings
    service: ServiceSettings

    def rules(self) -> Rules:
        """The policy's own numbers."""
        policy, by_profile = self.policy, PROFILES[self.policy.vram_profile]
        grace, idle = policy.vram_grace_seconds, self.comfyui.comfyui_idle_seconds
        idle_seconds = by_profile["idle"] if idle is None else idle
        return Rules(
            threshold_percent=policy.threshold_percent,
            unload_threshold_percent=policy.unload_percent,
            grace_seconds=by_profile["grace"] if grace is None else grace,
            empty_room_grace_seconds=by_profile["empty_room"] if grace is None else grace,
            cooldown_seconds=policy.vram_free_cooldown,
            settle_timeout_seconds=policy.vram_settle_timeout,
            min_reclaim_bytes=policy.vram_min_reclaim_mb * MIB,
            comfyui_idle_seconds=idle_seconds,
            waiting_idle_seconds=min(idle_seconds, by_profile["waiting_idle"]),
            interval_seconds=policy.vram_check_interval,
            comfyui_gpu=self.comfyui.comfyui_gpu,
            ollama_gpu=self.ollama.ollama_gpu,
            fail_open=self.admission.vram_fail_open,
            safety_margin_bytes=self.admission.vram_safety_margin_mb * MIB,
            default_estimate_bytes=self.admission.vram_default_estimate_mb * MIB,
            estimates={name: size * MIB for name, size in self.admission.vram_estimates.items()},
            soft_limit=self.admission.vram_soft_limit,
            hard_limit=self.admission.vram_hard_limit,
            soft_limit_seconds=self.admission.vram_soft_limit_seconds,
            leak_threshold_bytes=self.admission.vram_leak_threshold_mb * MIB,
            leak_generations=self.admission.vram_leak_generations,
            ollama_parallel=self.admission.ollama_num_parallel,
            kv_value_bytes=KV_VALUE_BYTES[self.admission.ollama_kv_cache_type],
            evict=self.gateway.ollama_evict,
            warm_back=self.gateway.ollama_warm_back,
            pinned=frozenset(canonical(name) for name in self.gateway.ollama_pinned),
            repair=self.gateway.vram_repair_fallback,
            chat_turn_seconds=by_profile["chat_turn"],
            image_turn_seconds=by_profile["image_turn"],
            enabled=policy.enable_vram_monitoring,
            dry_run=policy.vram_dry_run,
        )

    def in_words(self) -> list[str]:
        """The effective settings as sentences, for the start of the log."""
        policy, rules = self.policy, self.rules()
        where = [
            f"Ollama at {without_secrets(self.ollama.ollama_url)}" if self.ollama.ollama_url else "no Ollama",
            f"ComfyUI at {without_secrets(self.comfyui.comfyui_url)}" if self.comfyui.comfyui_url else "no ComfyUI",
        ]
        lines = [
            f"Profile {policy.vram_profile}: {' and '.join(where)}",
            (
                f"Soft free above {rules.threshold_percent:g} % used for {rules.grace_seconds:g} s "
                f"({rules.empty_room_grace_seconds:g} s while nobody uses Ollama) once ComfyUI has been idle for "
                f"{rules.comfyui_idle_seconds:g} s; for a model on the CPU after {rules.waiting_idle_seconds:g} s"
            ),
            (
                f"Unload stage if still above {rules.unload_threshold_percent:g} %; at most one free in "
                f"{rules.cooldown_seconds:g} s, proof within {rules.settle_timeout_seconds:g} s"
            ),
        ]
        lines.append(
            f"Workers keep {gib(rules.safety_margin_bytes)} free; they are warned above {rules.soft_limit} used for "
            f"{rules.soft_limit_seconds:g} s and stopped above {rules.hard_limit}"
            + ("" if rules.fail_open else "; without a GPU reading nobody is admitted (VRAM_FAIL_OPEN=false)")
        )
        lines += self.gateway.in_words()
        lines += self.looking.in_words()
        if rules.dry_run:
            lines.append("DRY RUN: decisions are told, nothing is freed and nobody is refused")
        if not rules.enabled:
            lines.append("ENABLE_VRAM_MONITORING=false: nothing is ever freed and everybody is admitted")
        return lines


PARTS: tuple[type[_Part], ...] = (
    OllamaSettings,
    ComfyUISettings,
    PolicySettings,
    GpuSettings,
    AdmissionSettings,
    GatewaySettings,
    LookingSettings,
    ServiceSettings,
)


_PART_NAMES = ("ollama", "comfyui", "policy", "gpu", "admission", "gateway", "looking", "service")


def variables() -> dict[str, Any]:
    """Every variable by its environment name, with its pydantic field, in the order of the parts."""
    return {name.upper(): field for part in PARTS for name, field in part.model_fields.items()}


_DRY_RUN_ALIAS = "VRAM_CHECK_DRY_RUN"


def defaults(**parts: dict[str, Any]) -> Settings:
    """The defaults but for what is given by part, whatever the environment says. Nothing is checked."""
    by_name = zip(_PART_NAMES, PARTS, strict=True)
    made: dict[str, Any] = {name: part.model_construct(**parts.get(name, {})) for name, part in by_name}
    return Settings.model_construct(**made)


def load() -> Settings:
    """The settings from the environment. Raises SettingsError with one line per wrong variable."""
    problems: list[str] = []
    parts: dict[str, Any] = {}
    for key, part in zip(_PART_NAMES, PARTS, strict=True):
        try:
            parts[key] = part()
        except ValidationError as error:
            problems += [_problem(item) for item in error.errors(include_url=False)]
    if not problems:
        problems = _circles(parts)
    if problems:
        raise SettingsError("\n".join(problems))
    return Settings(**parts)


def _circles(parts: Mapping[str, Any]) -> list[str]:
    """A gateway in front of itself would ask itself for ever."""
    gateway = parts["gateway"]
    ports = {"OLLAMA": gateway.gateway_ollama_port, "COMFYUI": gateway.gateway_comfyui_port}
    urls = {"OLLAMA": parts["ollama"].ollama_url, "COMFYUI": parts["comfyui"].comfyui_url}
    problems = [
        f"{of}_URL={without_secrets(url)}: is the gateway's own address (GATEWAY_{name}_PORT={port}); it must be the "
        "server's behind it"
        for of, url in urls.items()
        for name, port in ports.items()
        if url and port is not None and _leads_to(url, gateway.gateway_host, port)
    ]
    if None not in ports.values() and len(set(ports.values())) == 1:
        problems.append(f"GATEWAY_COMFYUI_PORT={ports['COMFYUI']}: is GATEWAY_OLLAMA_PORT as well; choose another")
    return problems


_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def _leads_to(url: str, host: str, port: int) -> bool:
    """Whether `url` is what listens on `host`, `port` here. Another address with the same port is another server."""
    split = urlsplit(url)
    name = split.hostname
    if (split.port or (443 if split.scheme == "https" else 80)) != port:
        return False
    return name == host or (name in _LOOPBACK and host in (*_LOOPBACK, "0.0.0.0", "::"))


def _problem(item: Any) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    if not item["loc"]:
        return message
    name = str(item["loc"][0]).upper()
    if name == "VRAM_DRY_RUN" and name not in os.environ and _DRY_RUN_ALIAS in os.environ:
        name = _DRY_RUN_ALIAS
    inside = "".join(f"[{place!r}]" for place in item["loc"][1:])
    value = os.environ.get(name, os.environ.get(name.lower(), item.get("input")))
    if name.endswith(("_HEADERS", "_TOKEN", "_SECRET")):
        value = "(not shown)"
    return f"{name}={without_secrets(str(value))}{inside and ' ' + inside}: {message[:1].lower()}{message[1:]}"


# Ollama's and ComfyUI's own variables share these prefixes, so only a near miss of ours is worth a word there.
_OURS_ALONE = ("VRAM_", "GATEWAY_")
_SHARED = ("OLLAMA_", "COMFYUI_", "ENABLE_VRAM")
# Where Ollama keeps its models: near to OLLAMA_NODES, and none of ours.
_THEIRS = ("OLLAMA_MODELS",)


def unknown_names(environment: Mapping[str, str]) -> list[str]:
    """A warning for each variable that looks like one of ours and is none, with the nearest known name."""
    known = [*variables(), _DRY_RUN_ALIAS]
    warnings = []
    for name in sorted(environment):
        upper = name.upper()
        if upper in (*known, *_THEIRS) or not upper.startswith(_OURS_ALONE + _SHARED):
            continue
        near = difflib.get_close_matches(upper, known, n=1, cutoff=0.6 if upper.startswith(_OURS_ALONE) else 0.85)
        if near:
            warnings.append(f"{name} is not a setting; did you mean {near[0]}?")
        elif upper.startswith(_OURS_ALONE):
            warnings.append(f"{name} is not a setting of this version and is ignored")
    return warnings
