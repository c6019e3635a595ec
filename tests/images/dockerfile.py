"""Reads Dockerfiles as far as the tests of this folder need it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction, with its continuation lines joined.

    Attributes:
        name: In upper case, such as RUN.
        value: Everything after it.
    """

    name: str
    value: str

    @property
    def words(self) -> list[str]:
        """The value's words that are not flags."""
        return [word for word in self.value.split() if not word.startswith("--")]

    @property
    def flags(self) -> dict[str, str]:
        """Flags such as ``--from=build``."""
        return dict(re.findall(r"(?:^|\s)--([a-z-]+)=(\S+)", self.value))


@dataclass
class Stage:
    """One stage.

    Attributes:
        base: What it starts from.
        name: After AS, or an empty string.
        instructions: All but FROM.
        flags: Of FROM.
    """

    base: str
    name: str
    flags: dict[str, str]
    instructions: list[Instruction] = field(default_factory=list)

    def values(self, name: str) -> list[str]:
        """The values of all instructions of that name."""
        return [instruction.value for instruction in self.instructions if instruction.name == name]


@dataclass
class Dockerfile:
    """A whole file.

    Attributes:
        text: As it is.
        args: Instructions before the first FROM.
        stages: In order.
    """

    text: str
    args: list[Instruction]
    stages: list[Stage]

    @classmethod
    def read(cls, path: Path) -> Dockerfile:
        """Reads a file."""
        text = path.read_text()
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        args: list[Instruction] = []
        stages: list[Stage] = []
        for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
            if not line.strip():
                continue
            name, _, value = line.strip().partition(" ")
            instruction = Instruction(name.upper(), value.strip())
            if instruction.name == "FROM":
                words = instruction.words
                stages.append(Stage(words[0], words[2] if len(words) == 3 else "", instruction.flags))
            elif stages:
                stages[-1].instructions.append(instruction)
            else:
                args.append(instruction)
        return cls(text, args, stages)

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def chain(self, stage: Stage) -> list[Stage]:
        """The stage and those it is built on, the last one first."""
        found = [stage]
        while base := next((other for other in self.stages if other.name == found[-1].base), None):
            found.append(base)
        return found
