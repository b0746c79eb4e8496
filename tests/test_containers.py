"""The container files say what the code says: settings, dependencies, who runs it and with what rights."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from vram_manager import config

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker-compose.yaml"
ALIASES = {"VRAM_CHECK_DRY_RUN"}


def parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def service(path: Path = COMPOSE, name: str = "vram-manager") -> Any:
    return parsed(path)["services"][name]


def default(value: str) -> str:
    """What `${NAME:-default}` gives when nothing is set."""
    found = re.fullmatch(r"\$\{\w+:?-(.*)\}", value)
    assert found, value
    return found[1]


def instructions(stage: int = -1) -> list[tuple[str, str]]:
    """(instruction, arguments) of one stage of the Dockerfile, comments gone and continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    stages = re.split(r"^(?=FROM )", joined, flags=re.MULTILINE)
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in stages[stage].splitlines())]


def argument(instruction: str) -> str:
    found = [rest for word, rest in instructions() if word == instruction]
    assert len(found) == 1, f"{instruction}: {found}"
    return found[0]


def requirement_name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def locked(path: Path) -> dict[str, str]:
    """Each pinned line of a lock file by package, with the hashes that follow it."""
    entries = re.split(r"^(?=[a-z0-9])", path.read_text(), flags=re.MULTILINE)[1:]
    return {entry.partition("==")[0]: entry for entry in entries}


class _Reset(yaml.SafeLoader):
    """Knows Compose's word for "as if it were not there"."""


_Reset.add_constructor("!reset", lambda loader, node: "reset")


def test_without_nvidia_no_device_is_asked_for_and_nothing_else_changes() -> None:
    overlay = yaml.load((ROOT / "deploy" / "compose.no-nvidia.yaml").read_text(), _Reset)

    assert overlay == {"services": {"vram-manager": {"deploy": "reset"}}}
    assert list(service()["deploy"]) == ["resources"]
    assert list(service()["deploy"]["resources"]) == ["reservations"]


class TestCompose:
    def test_every_setting_is_passed_through_and_nothing_else(self) -> None:
        assert set(service()["environment"]) == set(config.variables()) | ALIASES

    @pytest.mark.parametrize("name", sorted({*config.variables(), *ALIASES}))
    def test_a_setting_comes_from_the_variable_of_its_name(self, name: str) -> None:
        value = service()["environment"][name]

        # Empty means "no such server" for the URLs and "unset" for all others.
        operator = "-" if name in {"OLLAMA_URL", "COMFYUI_URL"} else ":-"
        assert re.fullmatch(rf"\$\{{{name}{operator}[^}}]*\}}", value)

    def test_with_nothing_set_the_defaults_hold_but_for_addresses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        passed = {name: default(value) for name, value in service()["environment"].items()}
        for name in passed:
            monkeypatch.delenv(name, raising=False)
        plain = config.load()
        for name, value in passed.items():
            monkeypatch.setenv(name, value)

        ours = config.load()

        assert ours.ollama == plain.ollama.model_copy(update={"ollama_url": "http://host.docker.internal:11434"})
        assert ours.comfyui == plain.comfyui.model_copy(update={"comfyui_url": "http://host.docker.internal:8188"})
        assert ours.policy == plain.policy
        assert ours.gpu == plain.gpu
        assert ours.admission == plain.admission
        assert ours.gateway == plain.gateway.model_copy(update={"gateway_host": "0.0.0.0"})
        assert ours.service == plain.service.model_copy(update={"vram_http_host": "0.0.0.0"})

    def test_the_second_name_of_dry_run_works_beside_an_empty_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VRAM_DRY_RUN", "")
        monkeypatch.setenv("VRAM_CHECK_DRY_RUN", "true")

        assert config.load().policy.vram_dry_run

    def test_the_container_has_no_more_rights_than_it_needs(self) -> None:
        ours = service()

        assert ours["read_only"] is True
        assert ours["cap_drop"] == ["ALL"]
        assert ours["security_opt"] == ["no-new-privileges:true"]
        assert not {"privileged", "cap_add", "user", "pid", "ipc", "devices"} & set(ours)

    def test_the_daemon_is_the_first_process_and_comes_back(self) -> None:
        assert service()["restart"] == "unless-stopped"
        assert not {"init", "entrypoint", "command", "depends_on"} & set(service())

    def test_it_asks_for_the_driver_library_of_every_gpu(self) -> None:
        (device,) = service()["deploy"]["resources"]["reservations"]["devices"]

        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu", "utility"]}

    def test_socket_and_state_are_volumes_where_the_daemon_writes(self) -> None:
        defaults = config.ServiceSettings.model_fields
        mounted = dict(volume.split(":") for volume in service()["volumes"])

        assert mounted == {
            "socket": str(defaults["vram_socket"].default.parent),
            "state": str(defaults["vram_state_dir"].default),
        }
        assert parsed(COMPOSE)["volumes"]["socket"] == {"name": "vram-manager-socket"}

    def test_the_ports_to_uncomment_are_those_that_are_to_be_listened_on(self) -> None:
        text = re.sub(r"^    # (?=ports:)", "    ", COMPOSE.read_text(), flags=re.MULTILINE)
        published = re.findall(r"^    #   (- 127\.0\.0\.1:(\d+):(\d+) # .*: (\w+)=(\d+))$", text, flags=re.MULTILINE)

        assert [(name, port) for _, _, _, name, port in published] == [
            ("VRAM_HTTP_PORT", "8480"),
            ("GATEWAY_OLLAMA_PORT", "11435"),
            ("GATEWAY_COMFYUI_PORT", "8189"),
        ]
        assert all(outside == inside == port for _, outside, inside, _, port in published)
        uncommented = yaml.safe_load(re.sub(r"^    #   (?=- 127)", "      ", text, flags=re.MULTILINE))
        ports = uncommented["services"]["vram-manager"]["ports"]
        assert ports == [f"127.0.0.1:{port}:{port}" for _, _, port, _, _ in published]

    def test_open_webui_of_the_stack_goes_through_the_gateway(self) -> None:
        url = service(name="open-webui")["environment"]["OLLAMA_BASE_URL"]
        head = COMPOSE.read_text().split("services:")[0]

        assert url == "http://vram-manager:${GATEWAY_OLLAMA_PORT:-11435}"
        assert re.search(r"GATEWAY_OLLAMA_PORT=11435 \\\n#     docker compose --profile stack up", head)

    def test_what_we_are_told_of_ollamas_settings_the_ollama_of_the_stack_is_told_too(self) -> None:
        told = {name for name in config.variables() if "Ollama's own variable" in config.variables()[name].description}

        assert set(service(name="ollama")["environment"]) == told

    def test_development_listens_on_the_ports_of_the_gateways_that_it_publishes(self) -> None:
        ours = service(ROOT / "compose.dev.yaml")
        inside = {published.rsplit(":", 1)[1] for published in ours["ports"]}

        assert inside == {ours["environment"][name] for name in ("GATEWAY_OLLAMA_PORT", "GATEWAY_COMFYUI_PORT")}
        assert ours["environment"]["GATEWAY_HOST"] == "0.0.0.0"

    def test_only_our_service_starts_unasked(self) -> None:
        services = parsed(COMPOSE)["services"]

        assert {name for name, body in services.items() if body.get("profiles") != ["stack"]} == {"vram-manager"}

    def test_the_overlay_adds_the_pid_namespace_and_nothing_else(self) -> None:
        overlay = parsed(ROOT / "deploy/compose.pid-host.yaml")

        assert overlay == {"services": {"vram-manager": {"pid": "host"}}}

    def test_development_mounts_the_source_read_only_and_needs_no_gpu(self) -> None:
        for body in parsed(ROOT / "compose.dev.yaml")["services"].values():
            assert ".:/src:ro" in body["volumes"]
            assert not {"build", "deploy", "runtime"} & set(body)

    @pytest.mark.parametrize(
        "files",
        [
            ["docker-compose.yaml"],
            ["docker-compose.yaml", "deploy/compose.pid-host.yaml"],
            ["compose.dev.yaml"],
        ],
        ids=" + ".join,
    )
    @pytest.mark.parametrize("profile", ["", "stack"])
    @pytest.mark.parametrize("example", [False, True], ids=["bare", "with the example file"])
    def test_compose_accepts_it(self, files: list[str], profile: str, example: bool) -> None:
        if (compose := shutil.which("docker-compose")) is None:
            pytest.skip("docker-compose is not installed")
        options = [option for file in files for option in ("-f", str(ROOT / file))]
        options += ["--profile", profile] if profile else []
        options += ["--env-file", str(ROOT / ".env.example")] if example else []

        done = subprocess.run([compose, *options, "config"], capture_output=True, text=True, check=False)

        assert done.returncode == 0, done.stderr
        assert "WARN" not in done.stderr


class TestDockerfile:
    def test_it_runs_as_a_numbered_user_that_is_not_root(self) -> None:
        user, group = argument("USER").split(":")

        assert int(user) > 0
        assert int(group) > 0

    def test_that_user_owns_what_the_daemon_writes(self) -> None:
        user, group = argument("USER").split(":")
        made = next(rest for word, rest in instructions() if word == "RUN" and "install -d" in rest)

        assert f"install -d -o {user} -g {group} -m 0755 /run/vram-manager /var/lib/vram-manager" in made

    def test_the_daemon_is_the_first_process(self) -> None:
        assert argument("ENTRYPOINT") == '["vram-manager"]'
        assert argument("CMD") == '["run"]'
        assert argument("STOPSIGNAL") == "SIGTERM"

    def test_its_health_is_asked_through_the_command(self) -> None:
        assert argument("HEALTHCHECK").endswith('CMD ["vram-manager", "health"]')

    def test_it_gets_the_driver_library_and_no_more(self) -> None:
        environment = dict(re.findall(r"(\S+)=(\S+)", argument("ENV")))

        assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"
        assert environment["NVIDIA_DRIVER_CAPABILITIES"] == "utility"
        assert environment["PYTHONUNBUFFERED"] == "1"

    def test_what_comes_from_outside_is_locked(self) -> None:
        installs = re.findall(r"pip \S+ \S+ install ([^&]+)", " ".join(rest for _, rest in instructions(1)))

        assert len(installs) == 3
        assert all("--require-hashes --only-binary=:all:" in i or "--no-deps --no-index" in i for i in installs)

    def test_the_build_sees_every_file_that_it_copies(self) -> None:
        let_in = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), flags=re.MULTILINE)
        copied = " ".join(rest for word, rest in instructions(1) if word == "COPY").split()

        assert {path for path in copied if not path.startswith(".")} == set(let_in)
        assert all((ROOT / path).exists() for path in let_in)


class TestLock:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    @pytest.mark.parametrize(
        ("file", "requirements"),
        [
            ("requirements.lock", project["project"]["dependencies"]),
            ("deploy/build.lock", project["build-system"]["requires"]),
        ],
    )
    def test_it_covers_every_requirement(self, file: str, requirements: list[str]) -> None:
        assert {requirement_name(requirement) for requirement in requirements} <= set(locked(ROOT / file))

    @pytest.mark.parametrize("file", ["requirements.lock", "deploy/build.lock"])
    def test_every_entry_has_hashes_and_the_file_names_no_place(self, file: str) -> None:
        text = (ROOT / file).read_text()

        assert all("--hash=sha256:" in entry for entry in locked(ROOT / file).values())
        assert not re.search(r"https?:|file:|@ |--index|--find-links|(?<![\w.])/", text)
