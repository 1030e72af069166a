// Step 08, head widths 64 and 96.
#include "attention/forward/best.cuh"

namespace attention::forward::best {

void persistent_64(const Problem& p) { launch_width<Persistent08, 64>(p); }
void persistent_96(const Problem& p) { launch_width<Persistent08, 96>(p); }

}  // namespace attention::forward::best
