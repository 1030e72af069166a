// The norm of all gradients together, and what clips them to a largest norm; the host waits for neither.
//
//   grad_norm    two launches: a sum of squares of each chunk, then the root of their sum and the clipping factor,
//                min(1, max_norm / (norm + 1e-6)) as torch has it. NaN and infinity pass through to both as there.
//   grad_scale   multiplies the gradients with a factor on the device; where that is 1 it touches nothing
//
// Sums are float32, in an order that depends on sizes and addresses modulo 16 alone, never on the schedule.
// Bytes: each gradient is read once; grad_scale reads and writes it. What is clipped by the optimiser's own factor
// (adamw.cu) needs no grad_scale.
#include "fused/multi_tensor.cuh"

namespace fused {
namespace {

using namespace training;
using native::Arguments, native::DataType, native::View;

// A row of the table.
struct Gradient {
  int64_t address, count, type;

  // Calls with(pointer) with the elements' type.
  template <class With>
  PTX_INLINE void visit(With with) const {
    if (type == type_f32) with(reinterpret_cast<float*>(address));
    else if (type == type_bf16) with(reinterpret_cast<__nv_bfloat16*>(address));
    else with(reinterpret_cast<__half*>(address));
  }
};

constexpr int threads_of_total = 1024;
constexpr int at_once = 4;  // loads of 16 bytes a thread starts before it uses the first

// A thread's part of a chunk: piece(pointer, 16 bytes) for its pieces, one(pointer) for what is left, or for all if the
// tensor does not start at a multiple of 16 bytes.
template <class T, class Piece, class One>
PTX_INLINE void for_pieces(T* x, int64_t count, int number, Piece piece, One one) {
  const int64_t first = int64_t(number) * chunk_elements;
  const int elements = int(min(count - first, int64_t(chunk_elements)));
  x += first;
  const int pieces = before_16(x) ? 0 : elements / width<T>;
#pragma unroll 1
  for (int begin = threadIdx.x; begin < pieces; begin += at_once * chunk_threads) {
    uint4 words[at_once];
#pragma unroll
    for (int j = 0; j < at_once; ++j)
      if (const int i = begin + j * chunk_threads; i < pieces) words[j] = reinterpret_cast<const uint4*>(x)[i];
#pragma unroll
    for (int j = 0; j < at_once; ++j)
      if (const int i = begin + j * chunk_threads; i < pieces) piece(x + i * width<T>, words[j]);
  }
#pragma unroll 1
  for (int i = pieces * width<T> + threadIdx.x; i < elements; i += chunk_threads) one(x + i);
}

__global__ void __launch_bounds__(chunk_threads) squares(const Gradient* gradients, const Chunk* chunks, float* sums) {
  __shared__ float each[chunk_threads / 32];
  const Chunk chunk = chunks[blockIdx.x];
  const Gradient t = gradients[chunk.tensor];
  float sum = 0.f;
  t.visit([&](auto* all) {
    using T = std::remove_pointer_t<decltype(all)>;
    for_pieces(
        all, t.count, chunk.number,
        [&](const T*, const uint4& words) {
          float x[width<T>];
          unpack<T>(words, x);
#pragma unroll
          for (int i = 0; i < width<T>; ++i) sum += x[i] * x[i];
        },
        [&](const T* x) { sum += float(*x) * float(*x); });
  });
  sum = block_sum(sum, each);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(threads_of_total)
    total(const float* sums, int count, float max_norm, float* norm, float* factor) {
  __shared__ float each[threads_of_total / 32];
  float sum = 0.f;
  for (int i = threadIdx.x; i < count; i += threads_of_total) sum += sums[i];
  sum = block_sum(sum, each);
  if (threadIdx.x != 0) return;
  const float root = sqrtf(sum), wanted = max_norm / (root + 1e-6f);
  *norm = root;
  *factor = wanted > 1.f ? 1.f : wanted;  // NaN stays
}

__global__ void __launch_bounds__(chunk_threads)
    scale(const Gradient* gradients, const Chunk* chunks, const float* factor_of_norm) {
  const float factor = *factor_of_norm;
  if (factor == 1.f) return;
  const Chunk chunk = chunks[blockIdx.x];
  const Gradient t = gradients[chunk.tensor];
  t.visit([&](auto* all) {
    using T = std::remove_pointer_t<decltype(all)>;
    for_pieces(
        all, t.count, chunk.number,
        [&](T* to, const uint4& words) {
          float x[width<T>];
          unpack<T>(words, x);
#pragma unroll
          for (int i = 0; i < width<T>; ++i) x[i] *= factor;
          *reinterpret_cast<uint4*>(to) = pack<T>(x);
        },
        [&](T* x) { *x = T(factor * float(*x)); });
  });
}

float* one_float(const View& x) {
  if (x.elements() != 1) x.refuse("shape " + x.shape() + ": expected one element");
  return x.expect_type({DataType::f32}).expect_writable().as<float>();
}

void run_norm(const Arguments& given) {
  const Tables tables = Tables::of(given, sizeof(Gradient) / sizeof(int64_t));
  const View& sums = given.array("sums").expect_type({DataType::f32}).expect_shape({int64_t(tables.count)});
  float* const norm = one_float(given.array("norm"));
  float* const factor = one_float(given.array("factor"));
  simt::launch(squares, simt::Launch{dim3(tables.count), dim3(chunk_threads), 0, 1, false, given.stream},
               reinterpret_cast<const Gradient*>(tables.tensors), tables.chunks, sums.expect_contiguous().as<float>());
  simt::launch(total, simt::Launch{dim3(1), dim3(threads_of_total), 0, 1, false, given.stream}, sums.as<const float>(),
               int(tables.count), float(given.number("max_norm")), norm, factor);
}

void run_scale(const Arguments& given) {
  const Tables tables = Tables::of(given, sizeof(Gradient) / sizeof(int64_t));
  simt::launch(scale, simt::Launch{dim3(tables.count), dim3(chunk_threads), 0, 1, false, given.stream},
               reinterpret_cast<const Gradient*>(tables.tensors), tables.chunks, one_float(given.array("factor")));
}

const native::Operation norm_operation("grad_norm", run_norm);
const native::Operation scale_operation("grad_scale", run_scale);

}  // namespace
}  // namespace fused
