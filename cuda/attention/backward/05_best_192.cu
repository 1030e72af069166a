// Step 05 for head width 192. See 05_best_wide.cuh.
#include "attention/backward/05_best_wide.cuh"

namespace attention::backward::best {

template <class T>
void run_192(const Backward& b) {
  using S = WideShape<T, 192, 3, 160, 32>;
  run<S>(b, best_wide<S>);
}
template void run_192<__nv_bfloat16>(const Backward&);
template void run_192<__half>(const Backward&);

}  // namespace attention::backward::best
