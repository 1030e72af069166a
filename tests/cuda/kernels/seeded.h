// Kernels with mistakes built in, to test that the model finds them. Bug 0 is the correct kernel. Only for the CPU: on a
// GPU some of these would hang it.
#pragma once
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "simt/ptx.cuh"

namespace seeded {

struct Kernel {
  const char* name;
  std::vector<const char*> bugs;  // names; the first is "none"
  double (*run)(int bug);         // launches, and returns the largest error of the result; NaN where the result is NaN
};

const Kernel& tiled();
const Kernel& reduce();
const Kernel& handoff();
const Kernel& ampere();
const Kernel& scale();
const Kernel& hopper();
const Kernel& cluster();
const Kernel& staging();
const Kernel& attention();
const Kernel& turns();
const Kernel& misuse();

using bf16 = __nv_bfloat16;

// Registers buffers for the length of a launch: an access anywhere else is an error in the checked build.
class Buffers {
 public:
  ~Buffers() { simt::unregister_buffers(); }
  template <class T>
  T* add(std::vector<T>& buffer, const char* name) {
    simt::register_buffer(buffer.data(), buffer.size() * sizeof(T), name);
    return buffer.data();
  }
};

// Results before the launch: NaN. Behind every buffer is room that an access out of bounds does not destroy.
template <class T>
std::vector<T> unwritten(size_t count) {
  std::vector<T> values;
  values.reserve(count + 8192);
  values.resize(count, T(NAN));
  return values;
}

// Small integers: products and sums are exact in every format and order.
template <class T>
std::vector<T> integers(size_t count, unsigned seed) {
  std::vector<T> values = unwritten<T>(count);
  for (T& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = T(float(int(seed >> 24) % 7 - 3));
  }
  return values;
}

// NaN stays, whatever comes after it.
constexpr double larger(double worst, double error) { return worst != worst || error <= worst ? worst : error; }
static_assert(larger(1, 2) == 2 && larger(2, 1) == 2);
static_assert(larger(NAN, 0) != larger(NAN, 0) && larger(1, NAN) != larger(1, NAN));

// The largest difference of c (m x n) from a (m x k) b^T (n x k), or from a b where `b_rows_are_k`.
template <class T>
double product_error(const std::vector<T>& a, const std::vector<T>& b, const std::vector<float>& c, int m, int n, int k,
                     bool b_rows_are_k) {
  double worst = 0;
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int l = 0; l < k; ++l)
        sum += double(float(a[i * k + l])) * double(float(b_rows_are_k ? b[l * n + j] : b[j * k + l]));
      worst = larger(worst, std::fabs(double(c[i * n + j]) - sum));
    }
  return worst;
}

}  // namespace seeded
