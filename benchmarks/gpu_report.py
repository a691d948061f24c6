"""What `moe_layer_gpu.py` found: on the screen, on disk as it comes, and as ratios beside the aims.

    attempt(what, call) -> result, or None where it failed, is known to lose the device, or time is up

A call that loses the device (an illegal address, or no answer in time) ends the process with exit code 75, as nothing
works in it afterwards. Whoever runs the benchmark again with `--resume` gets the rest, without that call.
"""

import gc
import json
import os
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOST = 75
"""Exit code (EX_TEMPFAIL): run again with --resume."""
Row = dict[str, Any]


class Report:
    """Findings, problems, and what time did not allow."""

    def __init__(self, folder: Path, seconds: float, resume: bool = False) -> None:
        self.folder, self.end_s = folder, time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / "result.json"
        if resume and known.exists():
            self.found: dict[str, Any] = json.loads(known.read_text())
            return
        self.found = {"bench": "moe_layer_gpu", "date": time.strftime("%Y-%m-%d"), **machine()}
        self.found |= {"problems": [], "left_out": [], "lost": [], "absent": {}, "blocks": {}, "rows": []}

    def say(self, text: str) -> None:
        print(text, flush=True)
        with (self.folder / "table.txt").open("a") as file:
            file.write(text + "\n")

    def keep(self, key: str, value: Any) -> None:
        self.found[key] = value
        aside = self.folder / "result.json.partial"
        aside.write_text(json.dumps(self.found, indent=1))
        aside.replace(self.folder / "result.json")

    def attempt(self, what: str, call: Callable[[], Any], limit_s: float = 90, part_of: str = "") -> Any:
        """The result, or None; says why. `part_of`: what is not tried again where this loses the device."""
        whole = part_of or what
        if whole in self.found["lost"]:
            return None
        if time.monotonic() > self.end_s:
            self.found["left_out"].append(what)
            return None
        watch = threading.Timer(limit_s, self.lose, [whole, f"no answer in {limit_s:.0f} s"])
        watch.daemon = True
        watch.start()
        try:
            return call()
        except Exception as error:
            said = (str(error).splitlines() or [""])[0]
            self.found["problems"].append(f"{what}: {type(error).__name__}: {said}")
            with (self.folder / "problems.txt").open("a") as file:
                file.write(f"{what}\n{traceback.format_exc()}\n")
            self.say(f"  {what}: failed, {type(error).__name__}: {said[:140]}")
            if not answers():
                self.lose(whole, said)
            return None
        finally:
            watch.cancel()
            gc.collect()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()

    def lose(self, what: str, why: str) -> None:
        """End this process, and say what ended it."""
        self.say(f"  {what}: the device is lost ({why})")
        self.keep("lost", [*self.found["lost"], what])
        os._exit(LOST)

    def row(self, shape: str, load: str, way: str) -> Row | None:
        """What was measured of a contestant."""
        return next((r for r in self.found["rows"] if (r["shape"], r["load"], r["way"]) == (shape, load, way)), None)


def answers() -> bool:
    """Whether the device still does."""
    try:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def machine() -> dict[str, str]:
    """Device and versions."""
    facts = {"torch": torch.__version__, "device": "cpu, Triton's interpreter: figures mean nothing"}
    if DEVICE == "cuda":
        facts["device"] = torch.cuda.get_device_name()
    for name in ("triton", "transformers"):
        try:
            facts[name] = __import__(name).__version__
        except ImportError:
            facts[name] = "absent"
    return facts


def ratio(over: float | None, under: float | None) -> float | None:
    """Rounded; None where one is missing."""
    return None if not over or not under else round(over / under, 3)


def aims_of(shape: str, report: Report) -> dict[str, float | None]:
    """The issue's aims for one shape."""

    def ms(way: str, load: str = "balanced", key: str = "forward_backward_ms") -> float | None:
        return (report.row(shape, load, way) or {}).get(key)

    def kept(way: str) -> float | None:
        memory = (report.row(shape, "balanced", way) or {}).get("memory_mib")
        return memory[0] if memory else None

    own, plain = ms("moestro triton"), "sort + grouped_mm + index_add"
    others = [ms(row["way"]) for row in report.found["rows"] if row["way"].startswith("transformers")]
    return {
        "forward, grouped_mm / ours (>= 1.5)": ratio(
            ms(plain, key="forward_ms"), ms("moestro triton", key="forward_ms")
        ),
        "transformers / ours (>= 1.3)": ratio(min((t for t in others if t), default=None), own),
        "torchtitan-style / ours (>= 1.15)": ratio(ms("torchtitan-style"), own),
        "dense / ours (>= 0.7, fine-grained 0.5)": ratio(ms("dense products"), own),
        "zipf / balanced (<= 1.1)": ratio(ms("moestro triton", "zipf"), own),
        "kept memory, ours / torchtitan-style (<= 0.7)": ratio(kept("moestro triton"), kept("torchtitan-style")),
    }


def verdicts(shapes: list[Any], report: Report) -> None:
    """The issue's aims, as ratios."""
    report.say("\naims, forward+backward unless said: ratios")
    found = {shape.name: aims_of(shape.name, report) for shape in shapes}
    for name, aims in found.items():
        report.say(f"  {name}: " + ", ".join(f"{aim} {value}" for aim, value in aims.items() if value))
    for lean in (shape for shape in shapes if shape.mean_k):
        rows = [report.row(name, "balanced", "moestro triton") for name in (lean.name, lean.full.name)]
        value = ratio(*((row or {}).get("forward_backward_ms") for row in rows))
        found["mean K"] = {f"{lean.mean_k:g} / {lean.slots} (<= 0.75)": value}
        report.say(f"  mean K {lean.mean_k:g} / K {lean.slots} (<= 0.75): {value}")
    report.keep("aims", found)
