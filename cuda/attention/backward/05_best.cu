// Step 05: which kernel for which head width. See 05_best.cuh and 05_best_wide.cuh.
#include "attention/backward/05_best.cuh"

namespace attention::backward {

void best_05(const Backward& b) {
  for_type(b.forward, [&](auto type) {
    using T = decltype(type);
    switch (b.forward.head_dim) {
      case 64: return best::run_64<T>(b);
      case 96: return best::run_96<T>(b);
      case 128: return best::run_128<T>(b);
      case 192: return best::run_192<T>(b);
      case 256: return best::run_256<T>(b);
      default: refuse("head_dim " + std::to_string(b.forward.head_dim) + ": this step takes 64, 96, 128, 192 or 256");
    }
  });
}

}  // namespace attention::backward
