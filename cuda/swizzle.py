"""Draws who holds what on a Hopper, and reads descriptors: `python -m cuda.swizzle [--out DIR]`.

    python -m cuda.swizzle                                    the chapter's pictures, by the formulas of cuda/layouts.py
    python -m cuda.swizzle --descriptor 0x4000004000010080    the fields of a wgmma descriptor, and what they mean

Refused: a descriptor of more than 64 bits or with bits that mean nothing. Blackwell's tcgen05 has another format.
"""

from dataclasses import dataclass, field
from pathlib import Path

from common import cli
from cuda.layout_pictures import PICTURES
from cuda.layouts import ELEMENT, Descriptor


@dataclass(frozen=True, slots=True)
class Config:
    out: Path = field(default=Path("results/cuda"), metadata={"help": "folder for the pictures"})
    descriptor: str | None = field(default=None, metadata={"help": "64 bits to read instead of drawing, like 0x4000.."})


def parse_descriptor(text: str) -> Descriptor:
    """The descriptor in decimal, 0x or 0b digits. Raises ValueError that names the text or the bits that are wrong."""
    try:
        bits = int(text, 0)
    except ValueError:
        raise ValueError(f"descriptor {text!r}: expected a whole number such as 0x4000004000010080") from None
    return Descriptor.decode(bits)


def words(descriptor: Descriptor) -> str:
    """What a descriptor says, for a reader: its fields, and where they put an operand of either order."""
    d, bits = descriptor, descriptor.encode()
    swizzle = f"{d.swizzle} bytes" if d.swizzle else "none"
    if d.swizzle and not d.base_offset:
        swizzle += f", in patterns that begin at multiples of {8 * d.swizzle}"
    lines = [
        f"descriptor {bits:#018x}",
        f"  bits 13-0    {bits & 0x3FFF:#06x}  start address         {d.start} bytes ({d.start:#x}) in shared memory",
        f"  bits 29-16   {bits >> 16 & 0x3FFF:#06x}  leading offset (LBO)  {d.leading} bytes",
        f"  bits 45-32   {bits >> 32 & 0x3FFF:#06x}  stride offset (SBO)   {d.stride} bytes",
        f"  bits 51-49   {d.base_offset:#06x}  base offset           {d.base_offset}",
        f"  bits 63-62   {bits >> 62:#06x}  swizzle               {swizzle}",
        "",
        *_k_major(d),
        "",
        *_mn_major(d),
    ]
    return "\n".join(lines)


def _k_major(d: Descriptor) -> list[str]:
    if not d.swizzle:
        return [
            "as a K-major operand (A as M x K, B as N x K): blocks of 8 rows x 8 columns, 128 bytes each",
            f"  the next 8 columns of K   + {d.leading} bytes (LBO)",
            f"  the next 8 rows           + {d.stride} bytes (SBO)",
        ]
    columns, inside = d.swizzle // ELEMENT, d.start % d.swizzle  # `inside` an atom: a later step along K
    lines = [
        f"as a K-major operand (A as M x K, B as N x K): atoms of 8 rows x {columns} columns, {8 * d.swizzle} bytes",
        f"  the next row              + {d.swizzle} bytes",
        f"  the next 8 rows           + {d.stride} bytes (SBO{', dense' if d.stride == 8 * d.swizzle else ''})",
        "  leading offset            ignored",
    ]
    if d.swizzle > 32:
        lines.append("  the next 16 columns       + 32 bytes on the start address, which the swizzle then permutes")
    if inside and inside % 32 == 0:
        lines.append(f"  this start address        columns {inside // ELEMENT} to {inside // ELEMENT + 15} of its atom")
    return lines


def _mn_major(d: Descriptor) -> list[str]:
    if not d.swizzle:
        return [
            "as an MN-major operand (A as K x M, B as K x N): blocks of 8 k x 8 columns, 128 bytes each",
            f"  the next 8 k              + {d.leading} bytes (LBO)",
            f"  the next 8 columns        + {d.stride} bytes (SBO)",
        ]
    columns = d.swizzle // ELEMENT
    overlap = f": less than an atom, so for no more than {columns} columns" if d.leading < 8 * d.swizzle else ""
    return [
        f"as an MN-major operand (A as K x M, B as K x N): atoms of 8 k x {columns} columns, {8 * d.swizzle} bytes",
        f"  the next k                + {d.swizzle} bytes",
        f"  the next 8 k              + {d.stride} bytes (SBO{', dense' if d.stride == 8 * d.swizzle else ''})",
        f"  the next {columns} columns {'' if columns > 9 else ' '}      + {d.leading} bytes (LBO{overlap})",
        f"  the next 16 k             + {2 * d.stride} bytes on the start address",
    ]


def main() -> None:
    config = cli.parse(Config, prog="python -m cuda.swizzle", description=__doc__.splitlines()[0])
    if config.descriptor is not None:
        print(words(parse_descriptor(config.descriptor)))
        return
    for name, draw in PICTURES.items():
        draw(config.out / f"{name}.png")
        print(config.out / f"{name}.png")


if __name__ == "__main__":
    cli.run(main)
