"""Settings from the environment: a wrong one is one line that says what is allowed."""

from __future__ import annotations

import os

import pytest

from vram_manager import config
from vram_manager.config import Settings, load, unknown_names, variables
from vram_manager.errors import SettingsError


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of our variables is set outside."""
    for name in list(os.environ):
        if name.upper().startswith(("VRAM_", "OLLAMA_", "COMFYUI_", "GATEWAY_", "ENABLE_VRAM")):
            monkeypatch.delenv(name)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch):
    def with_environment(**variables: str) -> Settings:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return load()

    return with_environment


def test_defaults_are_those_that_the_interface_names(settings):
    made = settings()
    rules = made.rules()
    assert made.ollama.ollama_url == "http://localhost:11434"
    assert made.comfyui.comfyui_url == "http://localhost:8188"
    assert made.policy.vram_profile == "balanced"
    assert (rules.threshold_percent, rules.unload_threshold_percent) == (75, 85)
    assert (rules.interval_seconds, rules.cooldown_seconds, rules.settle_timeout_seconds) == (5, 30, 10)
    assert rules.min_reclaim_bytes == 256 * 2**20
    assert made.comfyui.comfyui_soft_free_body == {"unload_models": True, "free_memory": False}
    assert (rules.enabled, rules.dry_run) == (True, False)
    assert made.gpu.vram_check_timeout_seconds == 5
    assert str(made.service.vram_socket) == "/run/vram-manager/vram.sock"
    assert (made.service.vram_http_host, made.service.vram_http_port, made.service.vram_api_token) == (
        "127.0.0.1",
        None,
        None,
    )
    assert str(made.service.vram_state_dir) == "/var/lib/vram-manager"
    assert (made.service.vram_log_format, made.service.vram_debug) == ("text", False)
    gateway = made.gateway
    assert (gateway.gateway_ollama_port, gateway.gateway_comfyui_port, gateway.gateway_host) == (
        None,
        None,
        "127.0.0.1",
    )
    assert (gateway.gateway_max_wait, gateway.gateway_on_timeout) == (60, "forward")
    assert (rules.evict, rules.warm_back, rules.pinned, rules.repair) == (True, False, frozenset(), True)
    assert (rules.ollama_parallel, rules.kv_value_bytes) == (1, 2)


@pytest.mark.parametrize(
    ("profile", "threshold", "unload", "grace", "empty_room", "idle", "waiting_idle"),
    [
        ("balanced", 75, 85, 30, 600, 30, 2),
        ("chat", 70, 85, 10, 120, 15, 2),
        ("image", 85, 92, 120, 3600, 120, 120),
    ],
)
def test_a_profile_is_a_set_of_defaults(settings, profile, threshold, unload, grace, empty_room, idle, waiting_idle):
    rules = settings(VRAM_PROFILE=profile).rules()
    assert (rules.threshold_percent, rules.unload_threshold_percent) == (threshold, unload)
    assert (rules.grace_seconds, rules.empty_room_grace_seconds) == (grace, empty_room)
    assert (rules.comfyui_idle_seconds, rules.waiting_idle_seconds) == (idle, waiting_idle)


@pytest.mark.parametrize(("profile", "chat", "image"), [("balanced", 10, 10), ("chat", 3, 20), ("image", 20, 3)])
def test_a_profile_says_whose_turn_it_is_sooner(settings, profile: str, chat: float, image: float):
    rules = settings(VRAM_PROFILE=profile).rules()
    assert (rules.chat_turn_seconds, rules.image_turn_seconds) == (chat, image)


@pytest.mark.parametrize(
    ("written", "pinned"),
    [
        ("llama3.1:8b", {"llama3.1:8b"}),
        ("llama3.1, Qwen3:14b", {"llama3.1:latest", "qwen3:14b"}),
        (" nomic-embed-text ,, ", {"nomic-embed-text:latest"}),
        (",", set()),
    ],
)
def test_pinned_models_are_a_comma_list_of_names_as_ollama_compares_them(settings, written: str, pinned: set[str]):
    assert settings(OLLAMA_PINNED=written).rules().pinned == pinned


@pytest.mark.parametrize(("kind", "size"), [("f16", 2), ("q8_0", 34 / 32), ("q4_0", 18 / 32)])
def test_a_smaller_cache_type_makes_a_smaller_cache(settings, kind: str, size: float):
    assert settings(OLLAMA_KV_CACHE_TYPE=kind).rules().kv_value_bytes == size


def test_a_single_variable_overrides_its_profile_and_nothing_else(settings):
    rules = settings(VRAM_PROFILE="image", VRAM_THRESHOLD="60").rules()
    assert (rules.threshold_percent, rules.unload_threshold_percent, rules.grace_seconds) == (60, 92, 120)


def test_a_grace_that_is_set_holds_for_the_empty_room_too(settings):
    rules = settings(VRAM_GRACE_SECONDS="0").rules()
    assert (rules.grace_seconds, rules.empty_room_grace_seconds) == (0, 0)


def test_an_idle_time_that_is_set_bounds_the_wait_of_somebody_who_suffers(settings):
    rules = settings(COMFYUI_IDLE_SECONDS="1").rules()
    assert (rules.comfyui_idle_seconds, rules.waiting_idle_seconds) == (1, 1)


def test_a_threshold_raised_alone_takes_the_unload_threshold_along(settings):
    assert settings(VRAM_THRESHOLD="95").rules().unload_threshold_percent == 95


@pytest.mark.parametrize("value", ["75", "75.0", " 75 ", "75%", "75 %"])
def test_a_percentage_may_be_written_with_or_without_its_sign(settings, value: str):
    assert settings(VRAM_THRESHOLD=value).rules().threshold_percent == 75


@pytest.mark.parametrize(
    "name",
    [
        "VRAM_THRESHOLD",
        "VRAM_PROFILE",
        "VRAM_HTTP_PORT",
        "VRAM_API_TOKEN",
        "VRAM_SOCKET",
        "VRAM_STATE_DIR",
        "VRAM_GRACE_SECONDS",
        "VRAM_DEBUG",
        "VRAM_DRY_RUN",
        "OLLAMA_GPU",
        "COMFYUI_GPU",
        "OLLAMA_HEADERS",
        "COMFYUI_HEADERS",
        "COMFYUI_IDLE_SECONDS",
        "COMFYUI_SOFT_FREE_BODY",
        "VRAM_CHECK_INTERVAL",
        "ENABLE_VRAM_MONITORING",
        "OLLAMA_NUM_PARALLEL",
        "OLLAMA_KV_CACHE_TYPE",
        "GATEWAY_OLLAMA_PORT",
        "GATEWAY_COMFYUI_PORT",
        "GATEWAY_HOST",
        "GATEWAY_MAX_WAIT",
        "GATEWAY_ON_TIMEOUT",
        "OLLAMA_EVICT",
        "OLLAMA_WARM_BACK",
        "OLLAMA_PINNED",
        "VRAM_REPAIR_FALLBACK",
    ],
)
def test_an_empty_variable_is_an_unset_one(settings, name: str):
    """Compose files pass every variable through."""
    assert settings(**{name: ""}) == settings_without(name)


def settings_without(name: str) -> Settings:
    kept = os.environ.pop(name)
    try:
        return load()
    finally:
        os.environ[name] = kept


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_url_means_that_there_is_no_such_server(settings, value: str):
    made = settings(OLLAMA_URL=value, COMFYUI_URL=value)
    assert (made.ollama.ollama_url, made.comfyui.comfyui_url) == ("", "")


def test_a_url_loses_its_last_slash_and_keeps_its_prefix(settings):
    assert settings(COMFYUI_URL="https://box/comfy/").comfyui.comfyui_url == "https://box/comfy"


@pytest.mark.parametrize("name", ["VRAM_DRY_RUN", "VRAM_CHECK_DRY_RUN"])
def test_a_dry_run_has_two_names(settings, name: str):
    assert settings(**{name: "true"}).rules().dry_run


@pytest.mark.parametrize("yes", ["true", "1", "yes", "on", "TRUE"])
def test_switches_are_on_in_every_usual_way(settings, yes: str):
    assert settings(VRAM_DEBUG=yes).service.vram_debug


WRONG = [
    ("VRAM_PROFILE", "gaming", "'balanced', 'chat' or 'image'"),
    ("VRAM_THRESHOLD", "0", "greater than 0"),
    ("VRAM_THRESHOLD", "101", "less than or equal to 100"),
    ("VRAM_THRESHOLD", "much", "number"),
    ("VRAM_THRESHOLD", "nan", ""),
    ("VRAM_CHECK_INTERVAL", "0", "greater than or equal to 0.25"),
    ("VRAM_CHECK_INTERVAL", "inf", ""),
    ("VRAM_CHECK_INTERVAL", "nan", ""),
    ("VRAM_FREE_COOLDOWN", "-1", "greater than or equal to 0"),
    ("VRAM_FREE_COOLDOWN", "nan", ""),
    ("VRAM_GRACE_SECONDS", "soon", "number"),
    ("VRAM_SETTLE_TIMEOUT", "0", "greater than or equal to 1"),
    ("VRAM_MIN_RECLAIM_MB", "1.5", "integer"),
    ("VRAM_MIN_RECLAIM_MB", "0", "greater than or equal to 1"),
    ("VRAM_DEBUG", "perhaps", "boolean"),
    ("VRAM_DRY_RUN", "perhaps", "boolean"),
    ("VRAM_CHECK_DRY_RUN", "perhaps", "boolean"),
    ("ENABLE_VRAM_MONITORING", "perhaps", "boolean"),
    ("VRAM_LOG_FORMAT", "xml", "'text' or 'json'"),
    ("VRAM_HTTP_PORT", "0", "greater than or equal to 1"),
    ("VRAM_HTTP_PORT", "65536", "less than or equal to 65535"),
    ("VRAM_HTTP_PORT", "http", "integer"),
    ("VRAM_CHECK_TIMEOUT_SECONDS", "0", "greater than 0"),
    ("VRAM_CHECK_TIMEOUT_SECONDS", "nan", ""),
    ("OLLAMA_URL", "localhost:11434", "http:// or https:// URL"),
    ("OLLAMA_URL", "http://", "http:// or https:// URL"),
    ("OLLAMA_URL", "http://localhost:99999", "http:// or https:// URL"),
    ("COMFYUI_URL", "http://box:8188:8188", "http:// or https:// URL"),
    ("COMFYUI_URL", "http://[::1", "http:// or https:// URL"),
    ("COMFYUI_IDLE_SECONDS", "-3", "greater than or equal to 0"),
    ("COMFYUI_SOFT_FREE_BODY", "{}", "at least one"),
    ("COMFYUI_SOFT_FREE_BODY", '{"unload_models": false}', "at least one"),
    ("COMFYUI_SOFT_FREE_BODY", "[true]", "JSON object"),
    ("COMFYUI_SOFT_FREE_BODY", "{unload_models: true}", "JSON object"),
    ("OLLAMA_HEADERS", "Authorization: Bearer x", "JSON object"),
    ("OLLAMA_HEADERS", '["X"]', "JSON object"),
    ("OLLAMA_NUM_PARALLEL", "0", "greater than or equal to 1"),
    ("OLLAMA_KV_CACHE_TYPE", "f32", "'f16', 'q8_0' or 'q4_0'"),
    ("GATEWAY_OLLAMA_PORT", "0", "greater than or equal to 1"),
    ("GATEWAY_OLLAMA_PORT", "ollama", "integer"),
    ("GATEWAY_COMFYUI_PORT", "65536", "less than or equal to 65535"),
    ("GATEWAY_MAX_WAIT", "-1", "greater than or equal to 1"),
    ("GATEWAY_MAX_WAIT", "3601", "less than or equal to 3600"),
    ("GATEWAY_MAX_WAIT", "nan", ""),
    ("GATEWAY_ON_TIMEOUT", "reject", "'forward' or 'refuse'"),
    ("OLLAMA_EVICT", "perhaps", "boolean"),
    ("OLLAMA_WARM_BACK", "perhaps", "boolean"),
    ("VRAM_REPAIR_FALLBACK", "perhaps", "boolean"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG)
def test_a_wrong_value_is_one_line_naming_variable_value_and_what_is_allowed(settings, name, value, allowed):
    with pytest.raises(SettingsError) as caught:
        settings(**{name: value})
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(f"{name}={'(not shown)' if name.endswith('HEADERS') else value}")
    assert allowed in said


def test_every_wrong_variable_has_its_own_line(settings):
    with pytest.raises(SettingsError) as caught:
        settings(VRAM_THRESHOLD="x", OLLAMA_URL="y", VRAM_HTTP_PORT="z")
    lines = str(caught.value).splitlines()
    assert sorted(line.split("=")[0] for line in lines) == ["OLLAMA_URL", "VRAM_HTTP_PORT", "VRAM_THRESHOLD"]


def test_an_unload_threshold_below_the_threshold_names_both(settings):
    with pytest.raises(SettingsError, match=r"^VRAM_UNLOAD_THRESHOLD=50 is below VRAM_THRESHOLD=75"):
        settings(VRAM_UNLOAD_THRESHOLD="50")


def test_secrets_are_never_in_an_error(settings):
    for name, value in (
        ("OLLAMA_HEADERS", '{"Authorization": "Bearer s3cret"'),
        ("COMFYUI_HEADERS", '{"Authorization": ["s3cret"]}'),
    ):
        with pytest.raises(SettingsError) as caught:
            settings(**{name: value})
        assert "s3cret" not in str(caught.value)


def test_secrets_are_not_in_the_words_that_the_log_begins_with(settings):
    made = settings(
        VRAM_API_TOKEN="s3cret",
        OLLAMA_HEADERS='{"Authorization": "s3cret"}',
        OLLAMA_URL="http://me:s3cret@box:11434",
    )
    assert "s3cret" not in "\n".join(made.in_words())


def test_a_header_that_cannot_be_sent_is_a_wrong_setting(settings):
    with pytest.raises(SettingsError, match="OLLAMA_HEADERS"):
        settings(OLLAMA_HEADERS='{"X-Name": "ü€"}')


def test_the_words_at_the_start_say_what_holds(settings):
    words = "\n".join(settings(VRAM_PROFILE="chat", OLLAMA_URL="", VRAM_DRY_RUN="1").in_words())
    assert "Profile chat: no Ollama and ComfyUI at http://localhost:8188" in words
    assert "above 70 %" in words
    assert "DRY RUN" in words


def test_the_words_at_the_start_say_where_the_gateways_are_and_how_long_a_call_waits(settings):
    words = settings(GATEWAY_OLLAMA_PORT="11435", GATEWAY_MAX_WAIT="5", GATEWAY_ON_TIMEOUT="refuse").in_words()
    assert "Gateways: Ollama on 127.0.0.1:11435; a call waits for 5 s at most, then it is refused" in words
    both = settings(GATEWAY_COMFYUI_PORT="8189", GATEWAY_HOST="0.0.0.0", GATEWAY_ON_TIMEOUT="forward").in_words()
    assert any("Ollama on 0.0.0.0:11435 and ComfyUI on 0.0.0.0:8189" in line for line in both)


def test_without_a_gateway_the_words_at_the_start_name_none(settings):
    assert not any("Gateway" in line for line in settings().in_words())


def test_the_words_at_the_start_say_who_gives_way(settings):
    assert "Ollama's idle models give way to others; one that fell to the CPU is repaired" in settings().in_words()
    words = settings(OLLAMA_PINNED="a,b", OLLAMA_WARM_BACK="1", VRAM_REPAIR_FALLBACK="0").in_words()
    assert "Ollama's idle models give way to others; never a, b; none is repaired; the last one comes back" in words
    assert any(line.startswith("Ollama's models stay") for line in settings(OLLAMA_EVICT="false").in_words())


def test_monitoring_alone_is_said_at_the_start(settings):
    assert any("nothing is ever freed" in line for line in settings(ENABLE_VRAM_MONITORING="false").in_words())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("VRAM_TRESHOLD", "VRAM_TRESHOLD is not a setting; did you mean VRAM_THRESHOLD?"),
        ("VRAM_PROFIL", "VRAM_PROFIL is not a setting; did you mean VRAM_PROFILE?"),
        ("OLLAMA_ULR", "OLLAMA_ULR is not a setting; did you mean OLLAMA_URL?"),
        ("COMFYUI_IDLE_SECOND", "COMFYUI_IDLE_SECOND is not a setting; did you mean COMFYUI_IDLE_SECONDS?"),
        ("ENABLE_VRAM_MONITOR", "ENABLE_VRAM_MONITOR is not a setting; did you mean ENABLE_VRAM_MONITORING?"),
        ("GATEWAY_OLAMA_PORT", "GATEWAY_OLAMA_PORT is not a setting; did you mean GATEWAY_OLLAMA_PORT?"),
        ("OLLAMA_PINED", "OLLAMA_PINED is not a setting; did you mean OLLAMA_PINNED?"),
        ("VRAM_XYZZY_QWERTY", "VRAM_XYZZY_QWERTY is not a setting of this version and is ignored"),
    ],
)
def test_an_unknown_name_is_a_warning_with_the_nearest_known_one(name: str, words: str):
    assert unknown_names({name: "1"}) == [words]


@pytest.mark.parametrize("name", ["OLLAMA_HOST", "OLLAMA_KEEP_ALIVE", "OLLAMA_MODELS", "COMFYUI_PATH", "PATH", "HOME"])
def test_names_of_others_are_left_alone(name: str):
    assert unknown_names({name: "1"}) == []


def test_known_names_are_no_warning_in_any_case():
    known = dict.fromkeys(variables(), "1") | {name.lower(): "1" for name in variables()}
    assert unknown_names(known | {"VRAM_CHECK_DRY_RUN": "1"}) == []


def test_a_lower_case_name_works_and_is_named_in_its_error(settings):
    assert settings(vram_threshold="60").rules().threshold_percent == 60
    with pytest.raises(SettingsError, match=r"VRAM_THRESHOLD=many"):
        settings(vram_threshold="many")


def test_every_setting_says_what_it_means():
    assert [name for name, field in variables().items() if not field.description] == []
    assert config.PARTS


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://localhost:11435"),
        ("0.0.0.0", "http://127.0.0.1:11435"),
        ("::", "http://[::1]:11435"),
        ("192.0.2.7", "http://192.0.2.7:11435"),
    ],
)
def test_a_gateway_in_front_of_itself_is_a_wrong_setting(settings, host: str, url: str):
    with pytest.raises(
        SettingsError, match=r"^OLLAMA_URL=.* is the gateway's own address \(GATEWAY_OLLAMA_PORT=11435\)"
    ):
        settings(OLLAMA_URL=url, GATEWAY_OLLAMA_PORT="11435", GATEWAY_HOST=host)


def test_a_gateway_may_have_its_servers_port_on_another_address(settings):
    made = settings(OLLAMA_URL="http://localhost:11434", GATEWAY_OLLAMA_PORT="11434", GATEWAY_HOST="192.0.2.7")
    assert made.gateway.gateway_ollama_port == 11434


def test_a_gateway_in_front_of_the_other_one_is_a_wrong_setting(settings):
    with pytest.raises(SettingsError, match=r"^COMFYUI_URL=.* \(GATEWAY_OLLAMA_PORT=11435\)"):
        settings(COMFYUI_URL="http://localhost:11435", GATEWAY_OLLAMA_PORT="11435", GATEWAY_COMFYUI_PORT="8189")


def test_two_gateways_on_one_port_are_a_wrong_setting(settings):
    with pytest.raises(SettingsError, match=r"^GATEWAY_COMFYUI_PORT=8189: is GATEWAY_OLLAMA_PORT as well"):
        settings(GATEWAY_OLLAMA_PORT="8189", GATEWAY_COMFYUI_PORT="8189")


@pytest.mark.parametrize("value", [" , ,", ","])
def test_a_webhook_that_would_be_told_nothing_is_a_slip(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("VRAM_WEBHOOK_EVENTS", value)

    with pytest.raises(SettingsError, match="must name an event; these are: free_asked"):
        load()


def test_a_node_that_is_named_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_NODES", "http://a:11434, http://b:11434/,http://a:11434/")

    assert load().looking.ollama_nodes == ("http://a:11434", "http://b:11434")


@pytest.mark.parametrize("url", ["http://a\x07b:11434", "http://a..b", "http://[::1"])
def test_a_url_that_nobody_can_ask_is_one_line_at_the_start(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("OLLAMA_URL", url)

    with pytest.raises(SettingsError, match="must be an http:// or https:// URL"):
        load()


@pytest.mark.parametrize(
    "url",
    ["http://b\u00fccher.example:11434", "http://my_ollama:11434", "http://[::1]:11434", "https://user:pw@host/prefix"],
)
def test_a_url_that_can_be_asked_is_taken(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("OLLAMA_URL", url)

    assert load().ollama.ollama_url == url
