"""Cycles of whole calls under LLVM's models of CPUs, from the blocks of instructions that an emulator executed.

Each block is given to llvm-mca as if it followed upon itself, in the steady state, and its cycles are multiplied by its
executions. That is exact for inner loops and kind to straight code; every access hits the first-level cache and every
branch is foreseen. The same holds for whoever's code it is, so that figures of one model can be set beside each other.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["CPUS", "COVERED", "Model", "read_blocks"]

CPUS = ("neoverse-n2", "neoverse-v1", "neoverse-v2")
COVERED = 0.97  # of a region's instructions; what the rare blocks cost per instruction is taken to be the same

Block = tuple[str, ...]  # instructions, as hexadecimal words

_REGION = re.compile(r"^\[\d+\] Code Region - b(\d+)$", re.MULTILINE)
_CYCLES = re.compile(r"^Total Cycles:\s+(\d+)$", re.MULTILINE)
_FEW, _MANY = 10, 40


def read_blocks(path: Path) -> dict[int, Counter[Block]]:
    """Executions of every block by region, from the file that the plugin (blocks.c) wrote."""
    regions: dict[int, Counter[Block]] = {}
    with path.open() as lines:
        for line in lines:
            region, executions, *words = line.split()
            regions.setdefault(int(region), Counter())[tuple(words)] += int(executions)
    return regions


def hottest(blocks: Mapping[Block, int], share: float = COVERED) -> list[Block]:
    """The blocks that make most of the instructions executed, as few as hold the share."""
    total = sum(len(block) * executions for block, executions in blocks.items())
    chosen, covered = [], 0
    for block, executions in sorted(blocks.items(), key=lambda item: -len(item[0]) * item[1]):
        if covered >= share * total:
            break
        chosen.append(block)
        covered += len(block) * executions
    return chosen


class Model:
    """llvm-mca for one CPU after another; remembers what it has been asked.

    Args:
        mca: command of llvm-mca.
        mc: command of llvm-mc of the same release, which disassembles.
    """

    def __init__(self, mca: str, mc: str) -> None:
        self._mca = mca
        self._mc = mc
        self._text: dict[str, str] = {}
        self._cycles: dict[tuple[str, Block], float] = {}

    def cycles(self, blocks: Mapping[Block, int], cpu: str) -> float:
        """Modelled cycles of a region.

        Args:
            blocks: executions of each of its blocks.
            cpu: as LLVM calls it.

        Raises:
            RuntimeError: llvm-mca or llvm-mc failed, or knows none of the instructions.
        """
        chosen = hottest(blocks)
        self._disassemble({word for block in chosen for word in block})
        self._simulate([block for block in chosen if (cpu, block) not in self._cycles], cpu)
        instructions = sum(len(block) * executions for block, executions in blocks.items())
        covered = sum(len(block) * blocks[block] for block in chosen)
        if not covered:
            raise RuntimeError("no blocks to model: did the markers run?")
        return sum(self._cycles[cpu, block] * blocks[block] for block in chosen) * instructions / covered

    def _disassemble(self, words: Iterable[str]) -> None:
        """Fills in the text of instructions."""
        unknown = sorted(set(words) - self._text.keys())
        if not unknown:
            return
        # Little endian, one instruction a line. What llvm-mc does not know it leaves out, and warns with the line.
        source = "\n".join(" ".join(f"0x{word[i : i + 2]}" for i in (6, 4, 2, 0)) for word in unknown)
        command = [self._mc, "-triple=aarch64", "-mattr=+all", "-disassemble"]
        done = subprocess.run(command, input=source, capture_output=True, text=True)
        wrong = {int(line) - 1 for line in re.findall(r"^<stdin>:(\d+):\d+: warning:", done.stderr, re.MULTILINE)}
        texts = [line.strip() for line in done.stdout.splitlines() if line.strip() and not line.startswith("\t.")]
        known = [word for index, word in enumerate(unknown) if index not in wrong]
        if done.returncode != 0 or len(texts) != len(known):
            raise RuntimeError(
                f"{self._mc} gave {len(texts)} of {len(known)} instructions, exit code {done.returncode}: "
                f"{done.stderr[-500:]}"
            )
        self._text.update(dict.fromkeys(unknown, "nop"))
        self._text.update(zip(known, (text.replace("\t", " ") for text in texts), strict=True))

    def _simulate(self, blocks: list[Block], cpu: str) -> None:
        """Fills in cycles of one execution."""
        if not blocks:
            return
        found: list[dict[int, int]] = []
        for iterations in (_FEW, _MANY):
            source = "".join(
                f"# LLVM-MCA-BEGIN b{index}\n" + "\n".join(map(self._shown, block)) + "\n# LLVM-MCA-END\n"
                for index, block in enumerate(blocks)
            )
            command = [self._mca, "-mtriple=aarch64", f"-mcpu={cpu}", "-mattr=+all", f"-iterations={iterations}"]
            command += ["-skip-unsupported-instructions=any"] if self._skips() else []
            command += ["-instruction-info=0", "-resource-pressure=0", "-"]
            done = subprocess.run(command, input=source, capture_output=True, text=True)
            if "no assembly instructions found" in done.stderr:
                break  # not one of them in the model
            names = [int(name) for name in _REGION.findall(done.stdout)]
            cycles = [int(count) for count in _CYCLES.findall(done.stdout)]
            if done.returncode != 0 or len(names) != len(cycles) or not names:
                raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr[-500:]}")
            found.append(dict(zip(names, cycles, strict=True)))
        for index, block in enumerate(blocks):
            if len(found) == 2 and index in found[0] and index in found[1]:
                self._cycles[cpu, block] = (found[1][index] - found[0][index]) / (_MANY - _FEW)
            else:  # Nothing in it that the model knows: one cycle an instruction.
                self._cycles[cpu, block] = float(len(block))

    def _skips(self) -> bool:
        """Whether this llvm-mca can leave out what its model does not know (LLVM 19 and newer)."""
        if not hasattr(self, "_can_skip"):
            text = subprocess.run([self._mca, "--help"], capture_output=True, text=True).stdout
            self._can_skip = "skip-unsupported-instructions" in text
        return self._can_skip

    def _shown(self, word: str) -> str:
        return self._text[word]
