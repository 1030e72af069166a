"""`use_bdlora` in PEFT's adapter_config.json: how many blocks, and which factor of which module is block-diagonal.

PEFT compares its patterns with whole names of modules and asks no more than that the name contains the pattern.
Refused: fields of other kinds, modules for which the patterns say anything else than ROW and COLUMN of lora/targets.py.
"""

from dataclasses import dataclass
from typing import Any, Self

from lora.targets import Place, kind_of

FIELDS = ("target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict")
PACKED = {"A": "A block-diagonal", "B": "B block-diagonal", "AB": "both factors block-diagonal", "": "none"}


@dataclass(frozen=True, slots=True)
class Blocks:
    """`match_strict` lets PEFT refuse modules that neither list names; such ones are refused here in any case."""

    count: int = 1
    in_A: tuple[str, ...] = ()  # parts of the names of modules
    in_B: tuple[str, ...] = ()

    @classmethod
    def read(cls, value: Any) -> Self:
        """From the value of `use_bdlora`; None and the like are one block. Raises ValueError with all that is wrong."""
        if value is None or value is False or value == {}:
            return cls()
        if not isinstance(value, dict):
            raise ValueError(f"use_bdlora {value!r}: expected an object with {', '.join(FIELDS)}")
        count, strict = value.get("nblocks", 1), value.get("match_strict", True)
        lists = [[] if (patterns := value.get(field)) is None else patterns for field in FIELDS[:2]]
        faults = [f"{field} {value[field]!r}: not supported" for field in value if field not in FIELDS]
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            faults.append(f"nblocks {count!r}: expected a whole number of at least 1")
        if not isinstance(strict, bool):
            faults.append(f"match_strict {strict!r}: expected true or false")
        for field, patterns in zip(FIELDS, lists, strict=False):
            if not (isinstance(patterns, list) and all(isinstance(pattern, str) for pattern in patterns)):
                faults.append(f"{field} {patterns!r}: expected a list of parts of module names")
        if faults:
            raise ValueError("; ".join(f"use_bdlora {fault}" for fault in faults))
        return cls(count, *map(tuple, lists))

    @classmethod
    def of_places(cls, count: int, places: list[Place]) -> Self:
        """What ROW and COLUMN say, in the last parts of the modules' names."""
        kinds = [sorted({kind_of(place.theirs) for place in places if place.row is row}) for row in (True, False)]
        return cls(count, *map(tuple, kinds))

    def written(self) -> dict[str, Any]:
        return dict(zip(FIELDS, (list(self.in_A), list(self.in_B), self.count, True), strict=True))

    def factor(self, module: str) -> str:
        """Which factor of the module, by its whole name, is block-diagonal: "A", "B", "AB" or ""."""
        lists = {"A": self.in_A, "B": self.in_B}
        return "".join(name for name, patterns in lists.items() if any(pattern in module for pattern in patterns))

    def faults(self, places: list[Place]) -> list[str]:
        """Where the patterns differ from ROW and COLUMN. A single block is a dense matrix, whatever they say."""
        wanted = (
            {} if self.count == 1 else {place.theirs: "A" if place.row else "B" for place in places if place.theirs}
        )
        return [
            f"{module}: use_bdlora makes {PACKED[found]}, expected {PACKED[factor]}"
            for module, factor in wanted.items()
            if (found := self.factor(module)) != factor
        ]
