"""What only a GPU can show: correctness, speed, memory, and a killed run that resumes.

    bash bench/gpu.sh [--minutes 8] [--only sl,rm] [--sizes 0.5b,1.5b] [--json FILE]
    bash bench/gpu.sh --device cpu --sizes tiny --quick       the same parts, as small as they get

Each part is a process of its own with a time limit. A part that fails leaves its traceback in the
JSON file, with what it had found until then, and the next part runs. The file is written again
after each part, so nothing is lost where the whole is stopped. Parts, in order:

    machine     the device, versions, the rate of a bfloat16 product of 8192 x 8192
    tests       pytest -m gpu: the parity tests of the CPU, on the GPU (tests/test_gpu.py)
    resume      SL, reward model and PPO, each killed by SIGKILL and resumed: equal weights?
    demo        minicai demo --config configs/tiny-short.toml
    then for each size, with random weights in the shapes of works.py and bfloat16 products:
    setup       writes the models
    sl, rm      steps as a share of that rate, then with the layers compiled; memory and its plan
    generate    rollouts, and how often a decoding step waits for the GPU
    peers       the same by transformers: `generate`, and `generate_batch` (continuous batching)
    ppo         episodes per second; memory and its plan
    adapters    the same with adapters of rank 16 on one frozen model
    and, where time is left:
    demo_long   minicai demo --config configs/tiny.toml

The share of the rate counts the model's own arithmetic, as bench/run.py does. A rate is that of the
later half of the steps (PPO: of all rollouts but the first), so warming up and compiling are apart.
micro_tokens is the largest of MICRO_TOKENS whose `minicai plan` fits into 85 % of the memory.
"""

import argparse
import contextlib
import datetime
import functools
import io
import json
import multiprocessing
import os
import platform
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULT = "RESULT "  # begins a line of a part's output that is a JSON object
# By "fork" libraries are imported once for all parts. `prepare` sees whether a GPU allows it.
CONTEXT = multiprocessing.get_context("fork")
MICRO_TOKENS = (16384, 8192, 4096, 2048, 1024)
FEW = {"generate": 8, "labels": 4, "sl": 16, "rm": 8, "ppo": 8, "batch": 4}  # of --quick
BEFORE = {"machine": 60, "tests": 120, "resume": 90, "demo": 90}  # limits in seconds
EACH_SIZE = {"setup": 90, "sl": 90, "rm": 90, "generate": 60, "peers": 90}
EACH_SIZE |= {"ppo": 90, "adapters": 90}
SLOWER = 8  # times these limits on a CPU
AFTER = {"demo_long": 180}
DEMO_QUICK = ("--sl.limit=4", "--sl.helpful_limit=4", "--rm.limit=8", "--rm.preferences_limit=8")
DEMO_QUICK += ("--ppo.iterations=1", "--ppo.episodes=8")


@dataclass(frozen=True)
class Job:
    """What a part is given."""

    size: str  # of works.SHAPES; "" where the part has none
    device: str  # "cpu" or "cuda"
    folder: Path  # for all parts: models and what they tell each other
    quick: bool = False


# --- correctness ----------------------------------------------------------------------------------


def machine(job: Job) -> Iterator[dict]:
    import torch
    import works

    found = {"device": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
    if job.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        found |= {"memory_gib": total / 2**30, "free_gib": free / 2**30}
    names = ("torch", "transformers", "tokenizers", "safetensors", "triton")
    yield found | {"versions": {"python": platform.python_version()} | works.versions(*names)}
    peak = works.peak_flops(job.device, 2 if job.quick else 40)
    (job.folder / "peak.json").write_text(json.dumps(peak))
    yield {"peak_tflops": peak / 1e12}


def tests(job: Job) -> Iterator[dict]:
    import pytest

    os.environ |= {"MINICAI_GPU_TESTS": job.device, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    os.chdir(ROOT)
    words = ["tests/test_gpu.py", "-o", "addopts=", "-m", "gpu", "-q", "--tb=short", "-rf"]
    words += ["-p", "no:cacheprovider", *(["-k", "losses or checkpoint"] if job.quick else [])]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = pytest.main(words)
    lines = said.getvalue().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield {"said": "".join(lines[-1:]), "failed": failed}
    if code:
        raise RuntimeError(said.getvalue()[-6000:])


def demo(job: Job, config: str = "configs/tiny-short.toml") -> Iterator[dict]:
    from minicai.__main__ import command

    out, began = job.folder / Path(config).stem, time.monotonic()
    words = ["demo", f"--config={ROOT / config}", f"--device={job.device}", f"--out={out}"]
    with patch.object(sys, "argv", ["minicai", *words, *(DEMO_QUICK if job.quick else ())]):
        try:
            command()
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"exit code {end.code}") from end
    summary = json.loads((out / "summary.json").read_text())
    names = ("device", "precision", "eval", "rm", "labels", "ppo", "seconds")
    yield {name: summary.get(name) for name in names} | {"wall_seconds": time.monotonic() - began}


def demo_long(job: Job) -> Iterator[dict]:
    yield from demo(job, "configs/tiny.toml")


# --- a killed run ---------------------------------------------------------------------------------

STAGES = ("sl", "rm", "ppo")


def stages(folder: Path, device: str, killed: str) -> None:
    """All three stages on given data, or their rest. `killed`: the stage that ends in step 4."""
    import random

    import torch
    import works

    import train_ppo
    import train_rm
    import train_sl
    from minicai.engine.stage import Stage

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    log = Stage.log

    def logged(stage: Stage, *arguments, **settings) -> None:
        log(stage, *arguments, **settings)
        if stage.name == killed and stage.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    rng = random.Random(0)
    rows = [tuple(works.text(rng, 12, 0.4, 24) for _ in range(3)) for _ in range(32)]
    sl = works.sl_settings(folder / "sl", [(prompt, better) for prompt, better, _ in rows])
    rm = works.rm_settings(folder / "rm", rows) | {"policy": f"{sl['out']}/sl"}
    folders = {"policy": rm["policy"], "reward": f"{rm['out']}/rm"}
    ppo = folders | {"out": str(folder / "ppo"), "missing_eos_penalty": 0.0}
    ppo |= {"prompts": sl["helpful_prompts"], "helpful_prompts": ""}
    common = {"model": str(ROOT / "minicai/tinyworld/base")}
    common |= {"constitution": str(ROOT / "configs/constitutions/tiny.toml")}
    common |= {"device": device, "save_every": 2, "max_new_tokens": 48}
    learning = common | {"batch_size": 8, "epochs": 1}
    rollouts = common | {"iterations": 5, "episodes": 8, "minibatches": 2, "epochs": 2}
    with patch.object(Stage, "log", logged):
        train_sl.main(train_sl.SLConfig(**sl, **learning))
        train_rm.main(train_rm.RMConfig(**rm, **learning))
        train_ppo.main(train_ppo.PPOConfig(**ppo, **rollouts))


def resume(job: Job) -> Iterator[dict]:
    from safetensors.torch import load_file

    def start(folder: Path, killed: str = "") -> int:
        process = CONTEXT.Process(target=stages, args=(folder, job.device, killed))
        process.start()
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"exit code {process.exitcode}; the traceback is above")
        return process.exitcode

    whole, torn = job.folder / "whole", job.folder / "torn"
    start(whole)
    yield {"killed": [name for name in STAGES if start(torn, name) == -signal.SIGKILL]}
    start(torn)
    for name in STAGES:
        file = Path(name) / name / "model.safetensors"
        one, other = (load_file(folder / file) for folder in (whole, torn))
        far = max((one[key] - other[key]).abs().max().item() for key in one)
        yield {name: {"same": one.keys() == other.keys() and far == 0, "largest_difference": far}}


# --- speed and memory -----------------------------------------------------------------------------


def load_work(job: Job, name: str):
    """A work of works.py, with the few items of --quick."""
    import works

    if job.quick:
        works.COUNTS[job.size] = FEW
    return works.load(name, job.size, job.folder / job.size, job.device)


def setup(job: Job) -> Iterator[dict]:
    import works

    with patch.object(works, "peak_flops", lambda device: 0.0):  # the part `machine` has it
        works.setup(job.size, job.folder / job.size, job.device)
    work = load_work(job, "ppo")
    yield {"weights_of_layers": work.body, "weights_of_head": work.head}


def of_peak(job: Job, flops: float) -> float | None:
    """FLOP/s as a share of the machine's; None where the part `machine` has failed."""
    file = job.folder / "peak.json"
    return flops / json.loads(file.read_text()) if file.exists() else None


def planned_gib(cfg, name: str, work) -> float:
    """What `minicai plan` says of a stage on this work, without the process itself.

    The plan takes every response to be max_new_tokens long. For training that is the mean here.
    """
    import works

    from minicai.engine import config
    from minicai.tools import plan

    prompts = works.write(Path(cfg.out) / "planned.jsonl", [{"prompt": x[0]} for x in work.items])
    responses = [x if isinstance(x, int) else len(x.split()) for row in work.items for x in row[1:]]

    def phase(kind: str, new: int) -> float:
        changed = replace(cfg, prompts=prompts, max_new_tokens=new)
        with patch.object(config, "load", lambda *_: changed):
            parts = plan.planned(name, [], 1)[f"{name} {kind}"]
        return (parts["total"] - parts["process"]) / 2**30

    found = phase("training", round(fmean(responses)))
    return max(found, phase("policy", cfg.max_new_tokens)) if name == "ppo" else found


def compiled(load: Callable, device: str) -> Callable:
    """A function that loads a model, whose layers are then compiled one by one (all share code).

    On a CPU they are traced and not compiled.

    Attention stays as it is: it has other shapes in each batch.
    """
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    from minicai.engine import attention

    def load_model(*arguments, **settings):
        model = load(*arguments, **settings)
        apart = torch.compiler.disable(attention.attend)
        attention.AttentionInterface.register(attention.NAME, apart)
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.compile(dynamic=True, backend="eager" if device == "cpu" else "inductor")
        return model

    return load_model


@contextlib.contextmanager
def watched(work, facts: dict, load: str = "") -> Iterator[None]:
    """Inside it, a work of ours.py leaves in `facts` when each step ended, and its memory's plan.

    load: the name of the function that loads the model whose layers are compiled; "" for none.
    """
    import ours
    import torch
    import works

    from minicai.engine import hub
    from minicai.engine.stage import Stage

    log, run_stage = Stage.log, works.run_stage
    facts["ends"] = []

    def logged(stage: Stage, *arguments, **settings) -> None:
        log(stage, *arguments, **settings)
        facts["ends"].append(works.clock())

    def run_here(script, cfg, name: str, **exchanged):
        if work.device == "cuda":
            room = 0.85 * torch.cuda.mem_get_info()[1] / 2**30
            sizes = (replace(cfg, micro_tokens=size) for size in MICRO_TOKENS)
            fits = (one for one in sizes if planned_gib(one, name, work) <= room)
            cfg = next(fits, replace(cfg, micro_tokens=MICRO_TOKENS[-1]))
            torch.cuda.reset_peak_memory_stats()
        facts["planned_gib"] = planned_gib(cfg, name, work)
        facts["micro_tokens"] = cfg.micro_tokens
        if load:
            exchanged[load] = compiled(getattr(script, load), work.device)
        facts["began"] = works.clock()
        return run_stage(script, cfg, name, **exchanged)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(Stage, "log", logged))
        stack.enter_context(patch.object(ours, "run_stage", run_here))
        # Sums of several GiB of weights, of which none will change.
        stack.enter_context(patch.object(hub, "weights_sha256", lambda path: "not computed"))
        yield


def training(job: Job, name: str, load: str = "", **settings) -> dict:
    """Measures a work of ours.py that trains. load: as in `watched`."""
    import ours
    import works

    work, facts = load_work(job, name), {}
    with watched(work, facts, load):
        _, units, check, flops = getattr(ours, name)(work, **settings)
    ends = facts.pop("ends")
    first = 1 if name == "ppo" else len(ends) // 2  # steps that are not measured
    took, share = ends[-1] - ends[first - 1], (len(ends) - first) / len(ends)
    return {
        "per_second": units * share / took,
        "of_peak": of_peak(job, flops * share / took),
        "step_seconds": took / (len(ends) - first),
        "until_first_step_seconds": ends[0] - facts.pop("began"),
        "steps": len(ends),
        "batch": work.batch,
        "peak_gib": works.peak_memory_mb(job.device) / 1024,  # on a CPU, of the whole process
        **({} if name == "ppo" else {"losses": check[: len(ends)]}),
        **facts,
    }


def sl(job: Job) -> Iterator[dict]:
    yield {"plain": training(job, "sl")}
    yield {"compiled": training(job, "sl", load="load_policy")}


def rm(job: Job) -> Iterator[dict]:
    yield {"plain": training(job, "rm")}
    yield {"compiled": training(job, "rm", load="load_scorer")}


def ppo(job: Job) -> Iterator[dict]:
    yield training(job, "ppo")


def adapters(job: Job) -> Iterator[dict]:
    from minicai.engine import hub, parallel
    from minicai.engine.adapters import save
    from minicai.engine.config import Lora
    from minicai.engine.load import load_scorer

    parallel.setup(job.device)
    folder = job.folder / job.size
    with patch.object(hub, "weights_sha256", lambda path: "not computed"):
        reward = load_scorer(str(folder / "policy"), seed=0, lora=Lora(16, 32.0))
        save(folder / "scorer" / "adapter", reward, reward.numbers())
    del reward
    found = training(job, "ppo", lora_rank=16)
    del found["of_peak"]  # it would count gradients of frozen weights
    yield found


def generate(job: Job) -> Iterator[dict]:
    import ours
    import works

    work = load_work(job, "generate")
    seconds, tokens, _, flops = ours.generate(work)
    yield {"per_second": tokens / seconds, "of_peak": of_peak(job, flops / seconds)}
    yield {"peak_gib": works.peak_memory_mb(job.device) / 1024}
    yield decoding_steps(work)


def decoding_steps(work, new: int = 16) -> dict:
    """Seconds of a decoding step, and on a GPU how often it waits and how many kernels it starts.

    A wait is what torch's sync debug mode warns of: the host waits for the GPU's work so far.
    """
    import warnings

    import ours
    import torch
    import works

    model = ours.load_policy(work.policy)
    prompts = [model.tokenizer(p)["input_ids"] for p, _ in work.items[: work.batch]]
    seeds, passes = [(k,) for k in range(len(prompts))], []
    model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    how = ours.Sampling(new, 1.0, work.batch)
    decode = functools.partial(ours.sample, model, prompts, seeds, how, ends=set())
    decode()
    passes.clear()
    began = works.clock()
    decode()
    found = {"step_seconds": (works.clock() - began) / len(passes)}
    if work.device == "cpu":
        return found
    passes.clear()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        decode()
    torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(one.message) for one in said)
    found["waits_per_step"] = waits / len(passes)
    passes.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        decode()
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_time > 0]
    busy = sum(event.device_time for event in kernels) / 1e6 / len(passes)
    found["kernels_per_step"] = len(kernels) / len(passes)
    return found | {"busy_share": busy / found["step_seconds"]}


def peers(job: Job) -> Iterator[dict]:
    import decoding

    work = load_work(job, "generate")
    for name in ("generate", "generate_batch"):
        seconds, tokens, *_ = getattr(decoding, name)(work)
        yield {name: {"per_second": tokens / seconds}}


# --- the parts, one after the other ---------------------------------------------------------------


def prepare() -> None:
    """Imports what parts need. What fails here fails again in each part, and is said there."""
    sys.path[:0] = [str(HERE), str(ROOT)]
    with contextlib.suppress(Exception):
        import minicai  # isort: skip (before torch)
        import ours  # noqa: F401

        import minicai.tools.plan  # noqa: F401


def use_gpu() -> None:
    import torch

    torch.cuda.init()


def child(part: Callable, job: Job, out: Path, err: Path) -> None:
    """A part, in a process of its own. Each of its findings is a line of `out`."""
    os.setsid()
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1) for number in (1, 2))  # noqa: SIM115
    prepare()  # where it was not copied from a process that has done so
    for found in part(job):
        print("\n" + RESULT + json.dumps(found), flush=True)


def run_part(part: Callable, job: Job, limit: float) -> dict:
    """What a part has found in its own process, "seconds", and "error" where it failed."""
    began, error, found = time.monotonic(), "", {}
    out, err = (job.folder / f"{part.__name__}{job.size}.{kind}" for kind in ("out", "err"))
    process = CONTEXT.Process(target=child, args=(part, job, out, err))
    process.start()
    process.join(limit)
    if process.exitcode is None:
        error = f"time limit of {limit:.0f} s"
    elif process.exitcode:
        error = f"exit code {process.exitcode}"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
    process.kill()
    process.join()
    lines, said = ([*file.open()] if file.exists() else [] for file in (out, err))
    for line in lines:
        if line.startswith(RESULT):
            found |= json.loads(line[len(RESULT) :])
    found["seconds"] = round(time.monotonic() - began, 1)
    return found | {"error": f"{error}\n{''.join(said)[-6000:]}"} if error else found


def short(value) -> str:
    """The numbers of a part in a line."""
    text = json.dumps(value)
    return re.sub(r"\d+\.\d{3,}(e-?\d+)?", lambda found: f"{float(found[0]):.4g}", text)


def all_parts(only: list[str], sizes: list[str]) -> list[tuple[str, str, float]]:
    """(name, size, limit in seconds) of the parts to run; `machine` and `setup` always do."""
    rows = [(name, "", limit) for name, limit in BEFORE.items()]
    rows += [(name, size, limit) for size in sizes for name, limit in EACH_SIZE.items()]
    rows += [(name, "", limit) for name, limit in AFTER.items()]
    named = {name for name, _, _ in rows if name not in ("machine", "setup")}
    if wrong := [name for name in only if name not in named]:
        raise SystemExit(f"--only: there is no {wrong[0]!r}, only {', '.join(sorted(named))}")
    sized = not only or any(name in EACH_SIZE for name in only)
    always = {"machine"} | ({"setup"} if sized else set())
    return [row for row in rows if not only or row[0] in {*only, *always}]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="of all parts together")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--sizes", default="0.5b,1.5b", help="some of works.SHAPES")
    parser.add_argument("--only", default="", help="parts to run, with those they need")
    parser.add_argument("--quick", action="store_true", help="a few items of each work")
    parser.add_argument("--json", type=Path, help="results/gpu.json, or out/gpu-cpu.json")
    args = parser.parse_args()
    rows = all_parts([x for x in args.only.split(",") if x], args.sizes.split(","))
    if args.quick and not args.only:
        rows = [row for row in rows if row[0] != "demo_long"]
    file = args.json or ROOT / ("out/gpu-cpu.json" if args.device == "cpu" else "results/gpu.json")
    prepare()
    if args.device == "cuda":
        probe = CONTEXT.Process(target=use_gpu)
        probe.start()
        probe.join()
        if probe.exitcode:  # a library has used the GPU, which no copy of this process can then
            globals()["CONTEXT"] = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="minicai-gpu-") as folder:
        parts = run_all(rows, args, file, Path(folder))
    failed = [name for name, found in parts.items() if "error" in found]
    print(f"{file}: {len(parts)} parts, failed: {', '.join(failed) or 'none'}")
    sys.exit(1 if failed else 0)


def run_all(rows: list[tuple], args: argparse.Namespace, file: Path, folder: Path) -> dict:
    """Runs the parts, and writes the file after each of them. Returns {part and size: findings}."""
    file.parent.mkdir(parents=True, exist_ok=True)
    began, parts = time.monotonic(), {}
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": args.device,
        "quick": args.quick,
        "seconds": 0.0,
        "parts": parts,
    }
    slower = SLOWER if args.device == "cpu" else 1
    for name, size, limit in rows:
        left = 60 * args.minutes - (time.monotonic() - began)
        job = Job(size, args.device, folder, args.quick)
        label = f"{name} {size}".strip()
        if left < 10:
            parts[label] = {"error": f"not run: the {args.minutes:g} minutes are over"}
        else:
            print(f"{label} ...", file=sys.stderr, flush=True)
            parts[label] = run_part(globals()[name], job, min(limit * slower, left))
        record["seconds"] = round(time.monotonic() - began, 1)
        if name == "machine":
            record |= {key: x for key, x in parts[label].items() if key in ("device", "versions")}
        written = file.with_suffix(".tmp")
        written.write_text(json.dumps(record, indent=1) + "\n")
        written.replace(file)
        print(f"{label}: {short(parts[label])[:600]}", flush=True)
    return parts


if __name__ == "__main__":
    main()
