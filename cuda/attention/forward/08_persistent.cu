// Step 08: blocks that stay, the longest tiles first, outputs through TMA. The kernel is in best.cuh. The softmax is as
// before: exponentials by the units for them, the output rescaled with every tile of keys. All head widths; here 128.
//
// Refused with std::invalid_argument: other head widths than 64, 96, 128, 192 and 256.
#include "attention/forward/best.cuh"

namespace attention::forward {

namespace best {
void persistent_128(const Problem& p) { launch_width<Persistent08, 128>(p); }
}  // namespace best

void persistent_08(const Problem& p) {
  switch (p.head_dim) {
    case 64: return best::persistent_64(p);
    case 96: return best::persistent_96(p);
    case 128: return best::persistent_128(p);
    case 192: return best::persistent_192(p);
    case 256: return best::persistent_256(p);
    default: best::refuse_width(p);
  }
}

}  // namespace attention::forward
