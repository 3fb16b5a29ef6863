"""The same sweep file under W&B's own agent, against a stand-in for its service, and here: the same trials.

The agent's code is W&B's: it reads the command, expands it, writes the parameters and starts the processes. What it
asks of the service is answered by this file, so nothing here says how the real service answers.
"""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from vislearn.sweep_cli import main

pytest.importorskip("sweeps.params", reason="W&B's engine is not installed")
TOY = str(Path(__file__).with_name("toy_trial.py"))
PARAMETERS = {
    "x": {"values": [1, 2.5]}, "order": {"values": [None, "it's"]}, "data.forget.classes": {"value": [[0], 3]},
    "method": {"parameters": {"init_args": {"parameters": {"alpha": {"value": 1.0e-5}, "deep": {"value": True}}}}},
}  # fmt: skip
VARIABLES = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_DIR", "WANDB_API_KEY")


class Service:
    """Proposes the points of a grid, one after the other, with W&B's engine."""

    def __init__(self, config):
        self.config, self.runs, self.points = config, [], []

    def sweep_with_runs(self, api, sweep, specs, **_):
        return {"config": yaml.safe_dump(self.config), "runs": []}

    def register_agent(self, api, host, **_):
        return {"id": "agent"}

    def heartbeat(self, api, agent, metrics, running):
        import sweeps

        if running:
            return []
        run = sweeps.next_run(self.config, self.runs)
        if run is None:
            return [{"type": "exit"}]
        self.runs.append(run)
        self.points.append({name: entry["value"] for name, entry in run.config.items()})
        return [{"type": "run", "run_id": f"r{len(self.runs)}", "program": self.config["program"], "args": run.config}]


@pytest.fixture
def agent(monkeypatch):
    """W&B's agent, made to talk to a service of ours."""
    wandb = pytest.importorskip("wandb")
    from wandb import wandb_agent
    from wandb.apis.public import sweeps as api

    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # the agent sets some of them for good
        monkeypatch.delenv(name)

    def run(config):
        service = Service(config)
        monkeypatch.setattr(api, "_sweep_with_runs", service.sweep_with_runs)
        monkeypatch.setattr(api, "_register_agent", service.register_agent)
        monkeypatch.setattr(api, "_agent_heartbeat", service.heartbeat)
        monkeypatch.setattr(wandb, "Api", lambda *_, **__: None)
        monkeypatch.setattr(wandb, "teardown", lambda *_, **__: None)
        monkeypatch.setattr(wandb_agent.Agent, "POLL_INTERVAL", 0.02)
        wandb_agent.run_agent("theirs")
        return service.points

    return run


def test_the_agent_and_this_machine_run_the_same_trials(agent, tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("VISLEARN_METRICS_FILE", str(tmp_path / "unread.jsonl"))
    config = {
        "program": TOY, "command": ["${env}", sys.executable, "${program}", "${args_json_file}", "${envvar:HOME}"],
        "method": "grid", "parameters": PARAMETERS,
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config))
    ran = {}
    for name in ("theirs", "ours"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "theirs":
            points = agent(config)
        else:
            assert main([str(tmp_path / "sweep.yaml"), "--out", "o"]) == 0
        ran[name] = [json.loads(line) for line in (tmp_path / name / "ran.txt").read_text().splitlines()]
    assert ran["ours"] == ran["theirs"] == points
    assert len(points) == 4
    folder = tmp_path / "theirs" / "wandb" / "sweep-theirs"
    for number in range(1, 5):
        mine = tmp_path / "ours" / "o" / "trials" / f"{number:04d}"
        assert (mine / "parameters.yaml").read_bytes() == (folder / f"config-r{number}.yaml").read_bytes()
        assert (mine / "parameters.json").read_bytes() == (folder / f"config-r{number}.json").read_bytes()


def answering(service):
    """A handler that answers the queries of `wandb sweep` and `wandb agent` over HTTP."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            given, name = asked.get("variables") or {}, re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
            project = {"id": "P", "name": "p", "entity": {"id": "E", "name": "me"}}
            if name == "UpsertSweep":
                service.config = yaml.safe_load(given["config"])
            answers = {
                "Viewer": lambda: {"viewer": {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}",
                                              "teams": {"edges": []}}},
                "UpsertSweep": lambda: {"upsertSweep": {"sweep": {"name": "theirs", "project": project},
                                                        "configValidationWarnings": []}},
                "SweepWithRuns": lambda: {"project": {"sweep": {**service.sweep_with_runs(None, None, None),
                                                                "runs": {"edges": []}}}},
                "CreateAgent": lambda: {"createAgent": {"agent": {"id": "agent"}}},
                "Heartbeat": lambda: {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(
                    service.heartbeat(None, None, None, json.loads(given["runState"])))}},
            }  # fmt: skip
            service.asked.append(name)
            body = json.dumps({"data": answers[name]() if name in answers else {}}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


@pytest.mark.slow
def test_wandbs_two_commands_run_the_file(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    config = {"program": TOY, "command": ["${env}", sys.executable, "${program}", "${args_json_file}"],
              "method": "grid", "metric": {"name": "loss", "goal": "minimize"}, "parameters": PARAMETERS}  # fmt: skip
    Path("sweep.yaml").write_text(yaml.safe_dump(config))
    service = Service({})
    service.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), answering(service))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {
        "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "0" * 40, "HOME": str(tmp_path),
        "WANDB_ERROR_REPORTING": "false", "TOY_PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "VISLEARN_METRICS_FILE": str(tmp_path / "unread.jsonl"),
    }  # fmt: skip
    try:
        for argv in (["sweep", "--project", "p", "--entity", "me", "sweep.yaml"], ["agent", "me/p/theirs"]):
            done = subprocess.run(
                [sys.executable, "-m", "wandb", *argv], env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
    finally:
        server.shutdown()
    assert {"UpsertSweep", "SweepWithRuns", "CreateAgent", "Heartbeat"} <= set(service.asked)
    assert service.config["command"] == config["command"]
    theirs = [json.loads(line) for line in Path("ran.txt").read_text().splitlines()]
    Path("ran.txt").unlink()
    monkeypatch.setenv("TOY_PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    assert main(["sweep.yaml", "--out", "o"]) == 0
    assert theirs == [json.loads(line) for line in Path("ran.txt").read_text().splitlines()]
    assert len(theirs) == 4
