// Step 05 for head width 256. See 05_best_wide.cuh.
#include "attention/backward/05_best_wide.cuh"

namespace attention::backward::best {

template <class T>
void run_256(const Backward& b) {
  using S = WideShape<T, 256, 2, 240, 24>;
  run<S>(b, best_wide<S>);
}
template void run_256<__nv_bfloat16>(const Backward&);
template void run_256<__half>(const Backward&);

}  // namespace attention::backward::best
