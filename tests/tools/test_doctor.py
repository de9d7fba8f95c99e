"""`minicai doctor`: one table of this machine, exit code 0 whatever is missing."""

import tomllib
from importlib.metadata import PackageNotFoundError, version

import torch

from minicai.tools import doctor
from tests.conftest import ROOT


def test_it_prints_one_table_and_ends_with_0(command, tmp_path):
    code, out, err = command("minicai/__main__.py", "doctor", f"--out={tmp_path / 'not' / 'yet'}")
    assert (code, err) == (0, "")
    rows = {line[:22].strip(): line[22:] for line in out.splitlines()}
    assert rows["torch"].startswith(torch.__version__) and f"at {tmp_path}" in rows["free disk"]
    assert {"GPU", "bf16 in hardware", "threads", "free memory"} <= rows.keys()
    assert doctor.OPTIONAL.keys() <= rows.keys() and rows["tests"] == f"pytest {version('pytest')}"
    assert all(len(line) <= 80 for line in out.splitlines() if str(tmp_path) not in line)


def test_what_is_not_installed_comes_with_the_line_that_installs_it(monkeypatch, capsys):
    def absent(package):
        if package in ("matplotlib", "wandb"):
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(doctor, "version", absent)
    doctor.main([])
    out = capsys.readouterr().out
    assert "plots in the report   not installed: pip install -e '.[report]'\n" in out
    assert "log = wandb           not installed: pip install wandb\n" in out


def test_every_extra_of_the_package_is_in_the_table():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        name: [p.split(">")[0].split("=")[0] for p in packages]
        for name, packages in project["optional-dependencies"].items()
    }
    named = {f"-e '.[{name}]'": packages for name, packages in extras.items()}
    for package, line in doctor.OPTIONAL.values():
        assert package in named.pop(line, [line])
    assert not named


def test_what_a_system_does_not_say_is_unknown(tmp_path):
    file = tmp_path / "cpuinfo"
    assert doctor.found(str(file), "bf16") == "unknown"
    file.write_text("flags: avx512_bf16\nMemAvailable:   12 kB\n")
    assert doctor.found(str(file), "bf16") == "yes" and doctor.found(str(file), "sve") == "no"
    assert doctor.found(str(file), r"MemAvailable: +(\d+)") == "12"


def test_a_gpu_is_named_with_its_memory_and_bf16(monkeypatch, capsys):
    monkeypatch.setattr(doctor.parallel, "setup", lambda: None)
    monkeypatch.setattr(doctor.parallel, "precision", lambda: "bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 << 30, 4 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    doctor.main([])
    out = capsys.readouterr().out
    assert "GPU                   A GPU, 3.0 GiB of 4.0 GiB free\n" in out
    assert "bf16 in hardware      yes\n" in out
