"""The faults of `python -m tests.faults --faults`, and what a run may do under each of them.

A row is one fault in one place of the small run of tests.forked. A run does what it should when it
ends "identical" to an undisturbed one (after the same command again, where it was stopped),
"refused: SENTENCE" (exit code 2) or "said: SENTENCE" (exit code 1, or a warning). It does not when
it ends in a traceback, hangs, is "SILENT" about a result that differs, or has "LOST" what it had.

    killed       SIGKILL at an event of the disk; the same command again must be identical
    power cut    the same, and what was not synced is lost. Unsynced names survive nowhere (as POSIX
                 allows), everywhere (with empty files, as ext4 has it) or in half of the folders
    call fails   one system call ends with an error (or from then on all do); then it works again
    two owners   a second run of the same folder, while the first is stopped in the middle
    bit flipped  in a file of a checkpoint or an export, before it is read
    removed      a file or folder, while the run is at work or between a kill and its resume
    changed      an input, between a kill and its resume or after the end
    overwrite    a kill in the middle of --overwrite
"""

import errno
import hashlib
import importlib
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

from minicai.engine.terminal import table
from tests.conftest import tiny_model
from tests.disk import Disk, Power, failing
from tests.forked import STAGES, World, differences, end, kill, scratch, start

RIGHT = ("identical", "refused", "said")
ERRORS = {
    "open": (errno.EACCES, errno.EIO, errno.ENOENT, errno.EROFS),
    "read": (errno.EACCES, errno.EIO),
    "write": (errno.EIO, errno.ENOSPC),
    "fsync": (errno.EIO, errno.ENOSPC),
    "rename": (errno.EXDEV, errno.ENOENT, errno.EACCES, errno.EIO),
    "mkdir": (errno.EACCES, errno.ENOSPC, errno.EROFS),
    "remove": (errno.EACCES, errno.EIO),
}
LASTING = (errno.EROFS, errno.ENOSPC)  # the disk stays so
Row = tuple[str, str, Callable[[], str]]  # the kind of fault, its place, and what becomes of it


def spread(count: int, total: int) -> list[int]:
    """`count` numbers from 1 to `total`, evenly spaced."""
    return sorted({1 + round((k + 0.5) / count * (total - 1)) for k in range(count)})


def distinct(world: World) -> list[int]:
    """Numbers of the events of a run, of the many writes to one file the first only."""
    pairs = enumerate(pairwise([("", ""), *world.events]), 1)
    return [number for number, (before, event) in pairs if before != event]


def place(world: World, number: int) -> str:
    """An event in words."""
    kind, path = world.events[number - 1]
    return f"{kind} {path}"


def resumed(world: World) -> str:
    """The same command again; nothing but the results of an undisturbed run will do."""
    found = world.judge(world.again())
    return found if found == "identical" else f"LOST: then {found}"


# --- kills, power cuts, failing calls -------------------------------------------------------------


def killed(world: World, number: int) -> str:
    world.fresh()

    def work() -> None:
        Disk(world.out, kill, number)
        world.stages()

    ended = world.run(work)
    return resumed(world) if ended.code == -signal.SIGKILL else f"not killed: {ended}"


def power_cut(world: World, number: int, share: float) -> str:
    """number: of the event; 0 is after the last."""
    world.fresh()

    def work() -> None:
        def cut(*_) -> None:
            disk.cut(share, number)
            kill()

        disk = Power(world.out, cut, number)
        world.stages()
        cut()

    ended = world.run(work)
    if ended.code != -signal.SIGKILL:
        return f"not killed: {ended.errors}"
    begun = [path.split("/")[0] for _, path in world.events[: number or None]]
    safe = STAGES[: STAGES.index([name for name in begun if name][-1])] if number else STAGES
    for name in safe:  # it was finished: the run had gone on to the next stage
        lost = differences(world.out / name, world.whole / name)
        lost = [file for file in lost if (world.whole / name / file).exists()]
        if lost:  # but old checkpoints may have come back
            return f"LOST: {name}/{', '.join(lost)}"
    return resumed(world)


def call_fails(world: World, kind: str, error: int, number: int) -> str:
    world.fresh()

    def work() -> None:
        Disk(world.out, failing(error), number, (kind,), lasting=error in LASTING)
        world.stages()

    found = world.judge(world.run(work))
    left = found.startswith("SILENT") and all("checkpoints" in x for x in world.differences())
    if not left and not found.startswith(RIGHT):
        return found
    after = resumed(world)  # checkpoints that could not be removed are removed now
    return "identical" if left else found if after == "identical" else after


def disk_rows(world: World, short: bool) -> Iterator[Row]:
    events = distinct(world)
    for k in spread(1 if short else 24, len(events)):
        number = events[k - 1]
        yield "killed", place(world, number), partial(killed, world, number)
    shares = ((0, "no"), (1, "all"), (0.5, "half of the"))
    for share, name in shares[: 1 if short else None]:
        places = [0] if short else [0, *(events[k - 1] for k in spread(8, len(events)))]
        for number in places:
            where = f"{place(world, number) if number else 'after the end'}, {name} names kept"
            yield "power cut", where, partial(power_cut, world, number, share)
    for kind, errors in ERRORS.items():
        happened = [path for event, path in world.events if event == kind]
        total = len(happened) or 20  # "read" is not listed
        for error in errors[:1] if short else errors:
            for number in spread(1 if short else 3, total):
                where = f"{kind} {happened[number - 1] if happened else f'number {number}'}"
                name = f"call fails, {errno.errorcode[error]}"
                yield name, where, partial(call_fails, world, kind, error, number)
        if short and kind == "write":
            return


# --- two owners -----------------------------------------------------------------------------------


def two_owners(world: World, file: str, number: int, *flags: str) -> str:
    world.fresh()

    def first() -> None:
        stop = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)  # noqa: E731
        Disk(world.out, stop, number, ("write",), file)
        world.stages()

    errors = world.folder / "first.txt"
    child = start(first, errors)
    os.waitpid(child, os.WUNTRACED)  # it has stopped itself in the middle
    second = world.again(*flags)
    os.kill(child, signal.SIGCONT)
    ended = end(child, errors)
    if ended.code or differences(world.out, world.whole):
        return f"LOST: the first run ended as {world.judge(ended)}, the second {second.said}"
    return f"{second.word}: {world.short(second.said)}" if second.code else "SILENT: two owners"


def owner_rows(world: World, short: bool) -> Iterator[Row]:
    for place, file, number, *flags in (
        ("in ppo's training", "ppo/metrics.jsonl", 2),
        ("in sl's data", "sl/revisions.jsonl", 1),
        ("in rm's labels", "rm/comparisons.jsonl", 2),
        ("--overwrite, in sl's training", "sl/metrics.jsonl", 2, "--overwrite"),
        ("--overwrite, in ppo's training", "ppo/metrics.jsonl", 2, "--overwrite"),
    )[: 1 if short else None]:
        yield "two owners", place, partial(two_owners, world, file, number, *flags)


# --- flipped bits, removed files, changed inputs --------------------------------------------------


def flip(path: Path, draw: random.Random) -> None:
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    where = draw.randrange(len(content))
    content[where] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def bit_flipped(world: World, stop: str, file: str, seed: int) -> str:
    world.stopped(stop)
    flip(world.out / file, random.Random(f"{file} {seed}"))
    return world.judge(world.again())


def bit_rows(world: World, short: bool) -> Iterator[Row]:
    for stop in ("ppo",) if short else ("sl", "rm", "ppo"):
        world.stopped(stop)
        files = [path for path in world.out.rglob("step_*/*") if path.is_file()]
        for name in STAGES[: STAGES.index(stop)]:
            files += [
                p for p in (world.out / name).iterdir() if p.suffix in (".json", ".safetensors")
            ]
        names = sorted(str(path.relative_to(world.out)) for path in files)
        if short:
            names = [n for n in names if n.endswith((".distcp", "sl/model.safetensors"))][-1:]
        for name in names:
            for seed in range(3 if name.endswith(".distcp") and not short else 1):
                where = f"{name}, resumed in {stop}"
                yield "bit flipped", where, partial(bit_flipped, world, stop, name, seed)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def removed_at_work(world: World, name: str, file: str, number: int) -> str:
    world.fresh()

    def work() -> None:
        Disk(world.out, lambda *_: remove(world.out / name), number, ("open",), file)
        world.stages()

    return world.judge(world.run(work))


def removed_before(world: World, stop: str, name: str) -> str:
    world.stopped(stop)
    remove(world.out / name)
    return world.judge(world.again())


def removed_rows(world: World, short: bool) -> Iterator[Row]:
    at_work = [
        ("sl", "sl/metrics.jsonl", 2),
        ("", "ppo/metrics.jsonl", 2),
        ("ppo/metrics.jsonl", "ppo/checkpoints/step_000002.tmp/.metadata", 1),
        ("ppo/checkpoints", "ppo/metrics.jsonl", 2),
        ("ppo/config.toml", "ppo/metrics.jsonl", 2),
        ("ppo", "ppo/metrics.jsonl", 2),
        ("ppo", "ppo/export.tmp/config.json", 1),
        ("rm", "rm/comparisons.jsonl", 2),
        ("rm/pairs.jsonl", "rm/metrics.jsonl", 1),
        ("sl/revisions.jsonl", "sl/metrics.jsonl", 1),
        ("sl/revisions.jsonl", "sl/stage.json", 1),
        ("sl/model.safetensors", "rm/metrics.jsonl", 1),
    ]
    for name, file, number in at_work[: 1 if short else None]:
        what = f"{name or 'OUT'}, when {file} is opened"
        yield "removed", what, partial(removed_at_work, world, name, file, number)
    before = [
        ("ppo", "ppo/metrics.jsonl"),
        ("ppo", "ppo/episodes.jsonl"),
        ("ppo", "ppo/checkpoints"),
        ("ppo", "sl/model.safetensors"),
        ("ppo", "rm"),
        ("ppo", "sl/stage.json"),
        ("ppo", "sl/revisions.jsonl"),
        ("rm", "rm/comparisons.jsonl"),
        ("rm", "rm/pairs.jsonl"),
        ("rm", "sl/tokenizer.json"),
        ("sl", "sl/revisions.jsonl"),
        ("sl", "sl/config.toml"),
        ("end", "ppo/model.safetensors"),
        ("end", "ppo/episodes.jsonl"),
        ("end", "rm/stage.json"),
    ]
    for stop, name in before[: 1 if short else None]:
        where = f"{name}, before the run stopped in {stop} is resumed"
        yield "removed", where, partial(removed_before, world, stop, name)


def other_line(path: Path) -> None:
    """The first line of a data file comes last."""
    first, *lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, first]))


def turned_round(path: Path) -> None:
    """The preferred responses are the others."""
    text = path.read_text().replace('"chosen"', '"was"').replace('"rejected"', '"chosen"')
    path.write_text(text.replace('"was"', '"rejected"'))


def other_principle(path: Path) -> None:
    path.write_text(path.read_text().replace("Kinder?", "Ruder?").replace("Unkind?", "Rude?"))


def other_weights(path: Path) -> None:
    """Another model of the same shapes, with the old file's times."""
    scorer, times = "rm" in path.parts, os.stat(path)
    other = path.parent / "other"
    tiny_model(vocab=258, seed=7, scorer=scorer).save_pretrained(other)
    os.replace(other / "model.safetensors", path)
    shutil.rmtree(other)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def other_code(name: str, old: str, new: str) -> None:
    """Puts a changed copy of a module of minicai in its place, in this process."""
    module = importlib.import_module(f"minicai.{name}")
    source = Path(module.__file__).read_text()
    if old not in source:
        raise RuntimeError(f"{name} has no {old!r} to change")
    path = Path(f"changed_{name.rpartition('.')[2]}.py")
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(module.__name__, path.resolve())
    spec.loader.exec_module(module)
    module.__file__, module.__spec__ = str(path.resolve()), spec
    for stage in STAGES:
        sys.modules.pop(f"train_{stage}", None)


CHANGES = {  # input: how it changes, and the stops after which a stage reads it
    "red.jsonl": (other_line, ("data", "sl", "labels", "ppo", "end")),
    "helpful.txt": (other_line, ("data", "ppo", "end")),
    "human.jsonl": (turned_round, ("labels", "rm", "end")),
    "rules.toml": (other_principle, ("data", "labels", "end")),
    "model/model.safetensors": (other_weights, ("data", "labels", "end")),
    "out/sl/model.safetensors": (other_weights, ("labels", "ppo", "end")),
    "out/rm/model.safetensors": (other_weights, ("ppo", "end")),
}
CODE = (  # module, a change of its results, and after which stop a stage would use it
    ("losses", "-logprobs, 0.0", "logprobs, 0.0", "sl"),
    ("losses", "-logprobs, 0.0", "logprobs, 0.0", "end"),
    ("losses", "return logprobs - ref_logprobs", "return ref_logprobs - logprobs", "ppo"),
    ("prompts", '"user": "Human: "', '"user": "Person: "', "data"),
    ("prompts", '"user": "Human: "', '"user": "Person: "', "ppo"),
)


def tree(folder: Path) -> str:
    """A digest of all names and contents below a folder, but for its locks."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix != ".lock"):
        digest.update(f"{path.relative_to(folder)} ".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def changed(world: World, stop: str, name: str, *flags: str) -> str:
    """A refusal must leave the output folder as it is."""
    world.stopped(stop)
    change = CHANGES[name][0]
    world.run(change, world.run_in / name)
    before = tree(world.out)
    ended = world.again(*flags)
    if ended.word == "refused" and tree(world.out) != before:
        return f"LOST: the refusal changed the folder ({ended.said})"
    if ended.code == 0 and not ended.said:
        if (world.out / "rm" / "accepted.jsonl").exists() or "--accept-changes" in flags:
            return "said: accepted.jsonl"
        return f"SILENT: {', '.join(world.differences()) or 'finished already'}"
    return world.judge(ended)


def changed_code(world: World, stop: str, old: str, new: str, module: str) -> str:
    world.stopped(stop)

    def work() -> None:
        other_code(module, old, new)
        world.stages()

    ended = world.run(work)
    silent = ended.code == 0 and not ended.said
    return f"SILENT: {', '.join(world.differences())}" if silent else world.judge(ended)


def changed_reward(world: World, finished: bool) -> str:
    """A reward function's file changes in the middle of PPO, or after it."""
    world.stopped("rm")
    world.again(names=("rm",))
    source, flag = world.run_in / "reward.py", "--reward_function=reward:length"
    source.write_text("def length(prompts, responses):\n    return [1.0] * len(prompts)\n")

    def work() -> None:
        if not finished:
            Disk(world.out, kill, 2, ("write",), "ppo/metrics.jsonl")
        world.stages(flag, names=("ppo",))

    ended = world.run(work)
    if ended.code not in (0, -signal.SIGKILL):
        return f"not run: {ended.errors}"
    source.write_text(source.read_text().replace("1.0", "2.0"))
    ended = world.again(flag, names=("ppo",))
    return f"{ended.word}: {world.short(ended.said)}".replace("silent", "SILENT")


def changed_rows(world: World, short: bool) -> Iterator[Row]:
    for name, (_, stops) in CHANGES.items():
        for stop in stops:
            if not short or (name, stop) == ("red.jsonl", "ppo"):
                what = f"{name}, after the end" if stop == "end" else f"{name}, stopped in {stop}"
                yield "changed", what, partial(changed, world, stop, name)
    if short:
        return
    accept = partial(changed, world, "ppo", "out/rm/model.safetensors", "--accept-changes")
    yield "changed", "out/rm/model.safetensors, --accept-changes", accept
    for module, old, new, stop in CODE:
        where = f"{module}.py, {'after the end' if stop == 'end' else f'stopped in {stop}'}"
        yield "changed", where, partial(changed_code, world, stop, old, new, module)
    yield "changed", "reward.py, stopped in ppo", partial(changed_reward, world, False)
    yield "changed", "reward.py, after the end", partial(changed_reward, world, True)


# --- --overwrite ----------------------------------------------------------------------------------


def overwritten(world: World, stop: str, number: int) -> str:
    """--overwrite with another seed is killed; then the same command, without and with it."""
    world.stopped(stop)
    if not (world.folder / "seed_1").exists():
        world.fresh()
        world.again("--seed=1")
        shutil.copytree(world.out, world.folder / "seed_1")
        world.stopped(stop)

    def work() -> None:
        Disk(world.out, kill, number)
        world.stages("--seed=1", "--overwrite")

    ended = world.run(work)
    if ended.code != -signal.SIGKILL:
        return f"not killed: {ended.errors}"
    for flags in (["--seed=1"], ["--seed=1", "--overwrite"]):
        ended = world.again(*flags)
        differing = differences(world.out, world.folder / "seed_1")
        if ended.code == 0:
            return f"LOST: {', '.join(differing)}" if differing else "identical"
        if ended.word != "refused":
            return f"{ended.word}: {world.short(ended.said)}"
    return f"LOST: {world.short(ended.said)}"


def overwrite_rows(world: World, short: bool) -> Iterator[Row]:
    stops = [("end", number) for number in (4, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12)]
    stops += [("ppo", 12), ("sl", 3), ("sl", 8), ("data", 2), ("data", 5)]
    for stop, number in stops[: 1 if short else None]:
        where = f"killed at event {number}, over a run stopped at {stop}"
        yield "overwrite", where, partial(overwritten, world, stop, number)


# --- the table ------------------------------------------------------------------------------------

FAMILIES = (disk_rows, owner_rows, bit_rows, removed_rows, changed_rows, overwrite_rows)


def campaign(options) -> int:
    """Prints the table. Returns how many rows did what they should not.

    options.short: some twenty rows. options.only: a pattern of the rows.
    """
    counts, lines, wrong = {}, [], 0
    with scratch() as folder:
        world = World(folder)
        for family in FAMILIES:
            for kind, where, run in family(world, options.short):
                if not re.search(options.only, f"{kind}: {where}"):
                    continue
                found = run()
                word = found.split(":")[0]
                good = word in RIGHT
                wrong += not good
                lines.append([f"{kind}: {where}", found])
                counts.setdefault(kind.split(",")[0], []).append(word if good else "WRONG")
                print(f"{kind}: {where}\n    {found}", flush=True)
    names = [*RIGHT, "WRONG"]
    rows = [[kind, *(str(words.count(name)) for name in names)] for kind, words in counts.items()]
    print(f"\n{table(['fault', *names], rows)}\n\n{len(lines) - wrong} of {len(lines)} rows right")
    return wrong
