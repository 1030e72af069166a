// Step 08, head widths 192 and 256.
#include "attention/forward/best.cuh"

namespace attention::forward::best {

void persistent_192(const Problem& p) { launch_width<Persistent08, 192>(p); }
void persistent_256(const Problem& p) { launch_width<Persistent08, 256>(p); }

}  // namespace attention::forward::best
