"""Numbers made smaller for the wire: as they are, as bfloat16, or as float8 (e4m3) with one scale for each 1024.

What encoding loses is kept and added to what is encoded next time under the same tag (error feedback; Seide et al.
2014, Karimireddy et al. 2019): the error of one step stays, that of the sum over steps does not grow. An encoded
message is a tensor of bytes, since gloo sends no float8. Integers and float64 are never compressed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SCALE_BLOCK = 1024  # numbers that share a scale: its 4 bytes are 0.4% of them
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
COMPRESS_FROM = 1024  # numbers; shorter tensors (a norm, a loss) are sent as they are


class Codec:
    """Sends numbers as they are. `dtype` is what is decoded, and reduced: float32 for 16-bit floats."""

    def __init__(self, sent: torch.dtype):
        self.sent = sent
        self.dtype = torch.float32 if sent.is_floating_point and sent.itemsize <= 2 else sent

    def nbytes(self, numel: int) -> int:
        return numel * self.sent.itemsize

    def encode(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Bytes. With a residual, x + residual is encoded, and the residual becomes what that lost."""
        if residual is None:
            return self._encode(x)
        wanted = residual.add_(x)  # in place: the residual is the sum until the loss is known
        encoded = self._encode(wanted)
        if wanted.numel():
            wanted.sub_(self.decode(encoded, wanted.numel())).nan_to_num_(0.0, 0.0, 0.0)  # one overflow is not kept
        return encoded

    def decode(self, encoded: Tensor, numel: int) -> Tensor:
        return encoded.view(self.sent).to(self.dtype)

    def _encode(self, x: Tensor) -> Tensor:
        return x.to(self.sent).view(torch.uint8)


class Float8(Codec):
    """[scales, float32][codes, e4m3]. A number that is not finite makes all of its block NaN, to be seen."""

    def __init__(self):
        super().__init__(torch.float8_e4m3fn)

    def nbytes(self, numel: int) -> int:
        return numel + 4 * self._blocks(numel)

    def decode(self, encoded: Tensor, numel: int) -> Tensor:
        blocks = self._blocks(numel)
        scales = encoded[: 4 * blocks].clone().view(torch.float32)  # a slice may lie at any byte
        codes = encoded[4 * blocks :].view(torch.float8_e4m3fn).float()
        return codes * self._spread(scales, numel)

    def _encode(self, x: Tensor) -> Tensor:
        x = x.float()
        rows = torch.nn.functional.pad(x, (0, -x.numel() % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
        tiny = torch.finfo(torch.float32).tiny
        scales = (rows.abs().amax(1) / LARGEST).clamp_min(tiny) if x.numel() else x.new_empty(0)
        codes = (x / self._spread(scales, x.numel())).to(torch.float8_e4m3fn)
        return torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)])

    def _blocks(self, numel: int) -> int:
        return -(-numel // SCALE_BLOCK)

    def _spread(self, scales: Tensor, numel: int) -> Tensor:
        return scales.repeat_interleave(SCALE_BLOCK)[:numel]


class BFloat16(Codec):
    def __init__(self):
        super().__init__(torch.bfloat16)


CODECS: dict[str, Callable[[], Codec]] = {"bf16": BFloat16, "fp8": Float8}


def can_compress(x: Tensor, op: str, tag: str) -> bool:
    """Sums and means of at least COMPRESS_FROM float32 or 16-bit numbers that have a tag to keep what is lost under."""
    return (
        x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and op != "max"
        and bool(tag)
        and x.numel() >= COMPRESS_FROM
    )


class Residuals:
    """What was lost so far of one tensor, by purpose; zeros at first and for another size."""

    def __init__(self):
        self._kept: dict[str, Tensor] = {}

    def get(self, purpose: str, like: Tensor) -> Tensor:
        kept = self._kept.get(purpose)
        if kept is None or kept.shape != like.shape or kept.device != like.device:
            kept = self._kept[purpose] = torch.zeros_like(like, dtype=torch.float32)
        return kept
