// Step 09: step 08, and two ideas against what limits it, the softmax beside the products (best_softmax.cuh): a warp
// rescales its output only when one of its rows has a new maximum, and for head width 64 one exponential in eight is a
// polynomial on FMA units. Not yet measured. All head widths; here 128.
//
// Refused with std::invalid_argument: other head widths than 64, 96, 128, 192 and 256.
#include "attention/forward/best.cuh"

namespace attention::forward {

namespace best {
void best_128(const Problem& p) { launch_width<Best09, 128>(p); }
}  // namespace best

void best_09(const Problem& p) {
  switch (p.head_dim) {
    case 64: return best::best_64(p);
    case 96: return best::best_96(p);
    case 128: return best::best_128(p);
    case 192: return best::best_192(p);
    case 256: return best::best_256(p);
    default: best::refuse_width(p);
  }
}

}  // namespace attention::forward
