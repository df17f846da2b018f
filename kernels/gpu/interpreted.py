"""Whether kernels run in Triton's interpreter, which has neither inline assembly nor libdevice nor a right bf16 dot."""

import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
