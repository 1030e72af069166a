// Step 05 for head width 128. See 05_best.cuh.
#include "attention/backward/05_best.cuh"

namespace attention::backward::best {

template <class T>
void run_128(const Backward& b) {
  using S = Shape<T, 128, 64>;
  run<S>(b, best<S>);
}
template void run_128<__nv_bfloat16>(const Backward&);
template void run_128<__half>(const Backward&);

}  // namespace attention::backward::best
