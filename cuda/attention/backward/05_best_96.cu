// Step 05 for head width 96. The second box of each tile is half empty. See 05_best.cuh.
#include "attention/backward/05_best.cuh"

namespace attention::backward::best {

template <class T>
void run_96(const Backward& b) {
  using S = Shape<T, 96, 64>;
  run<S>(b, best<S>);
}
template void run_96<__nv_bfloat16>(const Backward&);
template void run_96<__half>(const Backward&);

}  // namespace attention::backward::best
