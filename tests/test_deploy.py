"""What is shipped for Prometheus and Grafana fits the metrics there are, also by the tools' own judgement."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.api.conftest import Served
from tests.policy.desk import book, lease, request
from tests.test_metrics import Desk, Turn, entry, metrics
from vram_manager.domain.action import Stage
from vram_manager.domain.event import Event, EventType
from vram_manager.domain.lease import Ticket
from vram_manager.domain.reading import Seen
from vram_manager.domain.watch import Watch

ROOT = Path(__file__).parents[1]
PROMETHEUS = ROOT / "deploy/prometheus"
ALERTS = PROMETHEUS / "alerts.yaml"
BOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/vram-manager.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
VARIABLES = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
# Labels that Prometheus itself adds, and that of a histogram's buckets.
ADDED = {"instance", "job", "le"}

# What neither the dashboard nor an alert needs.
LEFT_OUT = {
    "gpu_memory_used_bytes": "with older drivers it includes the reserve: the ratio and the tenants tell it better",
}


def every_metric() -> str:
    """A page of /metrics on which every metric has a sample."""
    desk = Desk(book(lease(4, owner="tts", id="a"), line=(Ticket(request=request(2), since=0.0),)))
    page = metrics(Turn(watch=Watch(unreclaimable={"GPU-a": 1})), desk, nvml=Seen(None, 99.0))
    for kind in EventType:
        page.count(entry(Event(type=kind, target="comfyui", stage=Stage.SOFT, freed_bytes=1, took_seconds=1.0)))
    page.at_gateway("ollama", "held", 1.0)
    page.answered("admitted", 1.0)
    page.lease_ended(lease(4, peak_bytes=1))
    page.turned(0.001)
    return page.render().decode()


def labels_of() -> dict[str, set[str]]:
    """The labels of each metric, by the name that a query has for it."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(every_metric()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels.keys() - {"le"})
    return found


LABELS = labels_of()


def board_queries() -> dict[str, str]:
    """Every expression of the dashboard by where it stands; those of the variables too."""
    found = {f"{panel['title']} {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]}
    found |= {f"annotation {one['name']}": one["expr"] for one in BOARD["annotations"]["list"] if "expr" in one}
    for name, variable in VARIABLES.items():
        if told := re.fullmatch(r"label_values\((.+), \w+\)", variable.get("definition", "")):
            found[f"variable {name}"] = told[1]
    return found


QUERIES = {**board_queries(), **{f"alert {rule['alert']}": rule["expr"] for rule in RULES}}


def names_in(query: str) -> set[str]:
    return set(re.findall(r"\bvram_manager_\w+", query))


def known(query: str) -> set[str]:
    """The labels that the metrics of a query have."""
    return ADDED.union(*(LABELS.get(name, set()) for name in names_in(query)))


def left_by(query: str) -> set[str]:
    """The labels that a query's result has, as far as the outermost aggregation tells."""
    outermost = re.match(r"(?:sum|max|count|histogram_quantile\([\d.]+, sum) by \(([^)]*)\)", query)
    return set(outermost[1].split(", ")) - {"le"} if outermost else known(query)


@pytest.mark.parametrize("where", QUERIES)
def test_a_query_names_metrics_and_labels_that_exist(where: str) -> None:
    query = QUERIES[where]

    assert names_in(query) <= LABELS.keys()
    assert names_in(query) or query.startswith("up{")
    for name, selector in re.findall(r"\b(vram_manager_\w+)\{([^}]*)\}", query):
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", selector)) <= LABELS[name] | ADDED
    for labels in re.findall(r"\b(?:by|on|group_left|without|ignoring) \(([^)]*)\)", query):
        assert set(labels.split(", ")) <= known(query)


@pytest.mark.parametrize("where", [where for where in QUERIES if re.search(r"_bucket\b", QUERIES[where])])
def test_a_quantile_keeps_the_label_of_the_buckets(where: str) -> None:
    assert re.search(r"sum by \(le(?:, \w+)*\)", QUERIES[where])


def test_every_metric_is_shown_or_watched_or_there_is_a_reason_why_not() -> None:
    used = {name for query in QUERIES.values() for name in names_in(query)}
    families = set(re.findall(r"^# TYPE (\w+)", every_metric(), flags=re.MULTILINE))
    used = {re.sub(r"_(bucket|sum|count)$", "", name) if name not in families else name for name in used}

    assert {name.removeprefix("vram_manager_") for name in families - used} == LEFT_OUT.keys()


def test_events_that_are_asked_for_by_name_exist() -> None:
    selected = [types for query in QUERIES.values() for types in re.findall(r'type=~?"([^"]+)"', query)]

    assert len(selected) >= 6
    assert {name for types in selected for name in types.split("|")} <= set(EventType)


class TestAlerts:
    @pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
    def test_an_alert_says_what_is_wrong_how_much_and_what_to_do(self, rule: dict[str, Any]) -> None:
        told = rule["annotations"]

        assert rule["labels"].keys() == {"severity"}
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert told.keys() == {"summary", "description", "runbook"}
        assert re.search(r"\$value|\d", told["description"])
        assert len(told["runbook"]) > 40
        named = set(re.findall(r"\$labels\.(\w+)", " ".join(told.values())))
        assert named <= left_by(rule["expr"])
        assert named & {"instance", "node"}

    def test_every_alert_is_proven_to_fire(self) -> None:
        sick, *_ = yaml.safe_load((PROMETHEUS / "alerts_test.yaml").read_text())["tests"]
        last = sick["promql_expr_test"][-1]["exp_samples"]

        assert {re.search(r'alertname="(\w+)"', sample["labels"])[1] for sample in last} == {
            rule["alert"] for rule in RULES
        }

    def test_the_job_they_watch_is_the_one_that_is_scraped(self) -> None:
        (job,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]

        assert job["job_name"] in next(rule["expr"] for rule in RULES if rule["alert"] == "VramManagerDown")

    @pytest.mark.parametrize(
        "command", ["check config prometheus.yml", "check rules alerts.yaml", "test rules alerts_test.yaml"]
    )
    def test_promtool_agrees(self, command: str) -> None:
        done = subprocess.run(
            [promtool(), *command.split()], cwd=PROMETHEUS, capture_output=True, text=True, check=False
        )

        assert done.returncode == 0, done.stdout + done.stderr


class TestBoard:
    @pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
    def test_a_panel_says_what_it_shows_in_which_unit_and_from_the_chosen_source(self, panel: dict[str, Any]) -> None:
        assert len(panel["description"]) > 20
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["type"] in {"stat", "timeseries", "table", "state-timeline"}  # in every Grafana
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= left_by(target["expr"])

    def test_panels_lie_side_by_side_and_not_upon_each_other(self) -> None:
        taken: set[tuple[int, int]] = set()
        for panel in BOARD["panels"]:
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert at["x"] + at["w"] <= 24
            assert not cells & taken
            taken |= cells

    def test_ids_and_titles_are_there_once(self) -> None:
        assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
        assert len({panel["title"] for panel in PANELS}) == len(PANELS)

    def test_every_variable_that_is_used_is_declared_and_the_other_way_round(self) -> None:
        used = set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD))) - {"__all", "__rate_interval"}

        assert used == VARIABLES.keys() == {"datasource", "instance", "gpu"}

    def test_it_is_provisioned_where_the_overlay_puts_it(self) -> None:
        grafana = yaml.safe_load((ROOT / "deploy/compose.monitoring.yaml").read_text())["services"]["grafana"]
        mounted = dict(volume.split(":")[:2] for volume in grafana["volumes"])
        (provider,) = provisioned("dashboards/vram-manager.yaml")["providers"]
        (source,) = provisioned("datasources/prometheus.yaml")["datasources"]

        assert mounted["./deploy/grafana/vram-manager.json"] == f"{provider['options']['path']}/vram-manager.json"
        assert mounted["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
        assert source["url"] == "http://prometheus:9090"
        assert all((ROOT / path).exists() for path in mounted if path.startswith("./"))


def provisioned(path: str) -> Any:
    return yaml.safe_load((ROOT / "deploy/grafana/provisioning" / path).read_text())


class TestOverlay:
    overlay = yaml.safe_load((ROOT / "deploy/compose.monitoring.yaml").read_text())["services"]

    def test_nobody_outside_this_host_reaches_it(self) -> None:
        ports = [port for service in self.overlay.values() for port in service.get("ports", [])]

        assert len(ports) == 2
        assert all(port.startswith("127.0.0.1:") for port in ports)

    def test_what_is_scraped_is_the_port_that_the_daemon_gets(self) -> None:
        (job,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
        port = self.overlay["vram-manager"]["environment"]["VRAM_HTTP_PORT"]
        (target,) = job["static_configs"][0]["targets"]

        assert port == f"${{VRAM_HTTP_PORT:-{target.removeprefix('vram-manager:')}}}"

    def test_compose_accepts_it(self) -> None:
        if (compose := shutil.which("docker-compose")) is None:
            pytest.skip("docker-compose is not installed")
        files = ["-f", str(ROOT / "docker-compose.yaml"), "-f", str(ROOT / "deploy/compose.monitoring.yaml")]

        done = subprocess.run([compose, *files, "config"], capture_output=True, text=True, check=False)

        assert done.returncode == 0, done.stderr
        assert "WARN" not in done.stderr
        volumes = yaml.safe_load(done.stdout)["services"]["prometheus"]["volumes"]
        assert f"{PROMETHEUS}:/etc/prometheus:ro" in volumes


def promtool() -> str:
    if (found := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    return found


def test_promtool_finds_nothing_to_say_about_our_metrics() -> None:
    done = subprocess.run(
        [promtool(), "check", "metrics"], input=every_metric(), capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@contextlib.contextmanager
def prometheus(directory: Path, target: str) -> Iterator[str]:
    """A Prometheus with the shipped configuration, in a hurry, that scrapes `target`; its address."""
    if (binary := shutil.which("prometheus")) is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ALERTS)]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [
        binary,
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    with (directory / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@contextlib.asynccontextmanager
async def daemon(directory: Path) -> AsyncIterator[Served]:
    """One that turns, over fakes, and answers on TCP."""
    served = Served(directory)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(served.daemon.close)
        stack.push_async_callback(served.http.aclose)
        await stack.enter_async_context(served.daemon.listening())
        work = asyncio.create_task(served.daemon.run())
        stack.push_async_callback(asyncio.gather, work, return_exceptions=True)
        stack.callback(work.cancel)
        served.ollama.load("llama3.1:8b", gib=6, on_gpu=0.5)
        await served.turned()
        yield served


def as_grafana_asks(query: str) -> str:
    for name, value in {"$instance": ".*", "$gpu": "GPU-a", "$__rate_interval": "1m"}.items():
        query = query.replace(name, value)
    assert "$" not in query
    return query


@pytest.mark.asyncio
async def test_a_real_prometheus_can_answer_every_question_of_the_dashboard_and_of_the_alerts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for name, value in {"SOCKET": tmp_path / "run" / "s", "HTTP_PORT": port, "CHECK_INTERVAL": 0.25}.items():
        monkeypatch.setenv(f"VRAM_{name}", str(value))
    with prometheus(tmp_path, f"127.0.0.1:{port}") as address:
        async with (
            daemon(tmp_path / "state"),
            httpx.AsyncClient(base_url=address, trust_env=False, timeout=10) as http,
            asyncio.timeout(60),
        ):
            while True:
                # Not there yet, or there and still starting: what it says then is no JSON.
                with contextlib.suppress(httpx.TransportError, KeyError, json.JSONDecodeError):
                    scraped = (await http.get("/api/v1/query", params={"query": "up == 1"})).json()["data"]["result"]
                    groups = (await http.get("/api/v1/rules")).json()["data"]["groups"]
                    if scraped and all(rule["health"] != "unknown" for group in groups for rule in group["rules"]):
                        break
                await asyncio.sleep(0.1)
            answers = {
                where: (await http.get("/api/v1/query", params={"query": as_grafana_asks(query)})).json()
                for where, query in QUERIES.items()
            }
    assert {where: answer for where, answer in answers.items() if answer["status"] != "success"} == {}
    assert {rule["name"]: rule["health"] for group in groups for rule in group["rules"]} == {
        rule["alert"]: "ok" for rule in RULES
    }
    first_row = [panel["title"] for panel in PANELS if panel["type"] == "stat"]
    told = {title: answers[f"{title} A"]["data"]["result"][0]["value"][1] for title in first_row}
    assert told["Models on the CPU"] == "1"
    assert answers["Who has it: $gpu A"]["data"]["result"]
