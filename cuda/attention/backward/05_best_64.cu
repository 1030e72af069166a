// Step 05 for head width 64: 128 queries a step. See 05_best.cuh.
#include "attention/backward/05_best.cuh"

namespace attention::backward::best {

template <class T>
void run_64(const Backward& b) {
  using S = Shape<T, 64, 128>;
  run<S>(b, best<S>);
}
template void run_64<__nv_bfloat16>(const Backward&);
template void run_64<__half>(const Backward&);

}  // namespace attention::backward::best
