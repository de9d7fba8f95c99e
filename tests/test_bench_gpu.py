"""bench/gpu.py: what becomes of parts that fail, hang or have no time, with invented parts."""

import json
import os
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.test_bench import file


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """gpu(flag, ...) runs bench/gpu.py with invented parts. Returns its exit code and its JSON."""
    module, written = file(ROOT / "bench" / "gpu.py"), tmp_path / "gpu.json"

    def machine(job):
        yield {"device": f"a {job.device}", "versions": {"torch": "2"}, "cpus": 1}

    def tests(job):
        yield {"passed": 3}
        raise ZeroDivisionError("in the middle")

    def resume(job):
        yield {"begun": True}
        if os.fork() == 0:
            time.sleep(60)
        time.sleep(60)

    def demo(job):
        os._exit(3)

    def setup(job):
        print("words of a library", job.size)
        yield {"size": job.size, "quick": job.quick}

    def demo_long(job):
        yield {"seen": list(json.loads(written.read_text())["parts"])}

    for part in (machine, tests, resume, demo, setup, demo_long):
        monkeypatch.setattr(module, part.__name__, part)
    limits = dict.fromkeys(("machine", "tests", "resume", "demo"), 20) | {"resume": 0.5}
    monkeypatch.setattr(module, "BEFORE", limits)
    monkeypatch.setattr(module, "EACH_SIZE", {"setup": 20})
    monkeypatch.setattr(module, "SLOWER", 1)
    monkeypatch.setattr(module, "prepare", lambda: None)

    def run(*flags):
        words = ["gpu.py", "--device=cpu", "--sizes=tiny,small", f"--json={written}", *flags]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            module.main()
        return end.value.code, json.loads(written.read_text()) if written.exists() else None

    run.module = module
    return run


def test_a_part_that_fails_or_hangs_is_reported_and_the_others_run(gpu, capsys):
    code, record = gpu()
    parts = record["parts"]
    assert code == 1 and record["quick"] is False and record["date"][:2] == "20"
    assert (record["device"], record["versions"]) == ("a cpu", {"torch": "2"})
    assert parts["tests"]["passed"] == 3
    assert "exit code 1" in parts["tests"]["error"] and "Traceback" in parts["tests"]["error"]
    assert "ZeroDivisionError: in the middle" in parts["tests"]["error"]
    assert parts["resume"]["begun"] and parts["resume"]["error"].startswith("time limit of ")
    assert 0.5 <= parts["resume"]["seconds"] < 10 and parts["demo"]["error"].startswith("exit code")
    for size in ("tiny", "small"):
        assert parts[f"setup {size}"].items() >= {"size": size, "quick": False}.items()
        assert "error" not in parts[f"setup {size}"]
    # the file is there after each part
    before = ["machine", "tests", "resume", "demo", "setup tiny", "setup small"]
    assert parts["demo_long"]["seen"] == before and [*parts] == [*before, "demo_long"]
    assert "7 parts, failed: tests, resume, demo" in capsys.readouterr().out


def test_parts_that_are_not_asked_for_do_not_run_and_those_without_time_say_so(gpu):
    code, record = gpu("--only=demo_long", "--quick")
    assert code == 0 and [*record["parts"]] == ["machine", "demo_long"] and record["quick"]
    code, record = gpu("--minutes=0")
    assert code == 1 and record["device"] == "cpu"
    said = [part["error"] for part in record["parts"].values()]
    assert said == ["not run: the 0 minutes are over"] * 7
    code, _ = gpu("--only=speed")
    assert "--only: there is no 'speed', only demo, demo_long, resume, tests" in code


def test_every_part_is_a_function_and_all_limits_are_shorter_than_a_command_may_be(monkeypatch):
    module = file(ROOT / "bench" / "gpu.py")
    rows = module.all_parts([], ["0.5b", "1.5b"])
    assert all(callable(getattr(module, name)) for name, _, _ in rows)
    assert all(limit < 480 for _, _, limit in rows) and len(rows) == 5 + 2 * len(module.EACH_SIZE)


@pytest.mark.slow
def test_all_parts_run_on_a_cpu(tmp_path):
    """As `bash bench/gpu.sh --device cpu --sizes tiny --quick` does."""
    path = tmp_path / "gpu.json"
    flags = f"--device=cpu --sizes=tiny --quick --minutes=60 --json={path}"
    os.system(f"PYTHON={sys.executable} bash {ROOT}/bench/gpu.sh {flags}")
    parts = json.loads(path.read_text())["parts"]
    assert {name: x["error"] for name, x in parts.items() if "error" in x} == {}
    assert all(parts["resume"][name]["same"] for name in ("sl", "rm", "ppo"))
    assert parts["resume"]["killed"] == ["sl", "rm", "ppo"]
