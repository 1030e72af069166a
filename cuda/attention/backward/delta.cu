// What the steps of the backward ladder run first. delta_i = do_i . o_i in float32 stands for the sum over all keys of
// p_ij dp_ij, which a block that has only some keys could not form. A gradient of lse adds p_ij d_lse_i to ds_ij: delta
// takes that in. Reads two tensors once, as fast as memory is. And the zeros that the sums of dq start with.
// Refuses: nothing that operations.cpp lets through.
#include "attention/backward/common.cuh"

namespace attention::backward {
namespace {

constexpr int threads = 256, lanes = 8;  // of a row: 8 lanes read 128 bytes, a row of 64 elements

template <class T>
__global__ void __launch_bounds__(threads)
    delta(Rows<const T> o, Rows<const T> d_o, const float* lse, const float* d_lse, float* to, int64_t to_batch,
          int64_t to_head, int rows, int head_dim) {
  const int b = blockIdx.z, head = blockIdx.y, row = blockIdx.x * (threads / lanes) + threadIdx.x / lanes;
  const int lane = threadIdx.x % lanes;
  float sum = 0.f;
  if (row < rows) {
    for (int column = 8 * lane; column < head_dim; column += 8 * lanes) {
      struct alignas(16) Chunk {
        T x[8];
      };
      const Chunk x = *reinterpret_cast<const Chunk*>(o.at(b, row, head) + column);
      const Chunk y = *reinterpret_cast<const Chunk*>(d_o.at(b, row, head) + column);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += float(x.x[i]) * float(y.x[i]);
    }
  }
#pragma unroll
  for (int step = 1; step < lanes; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  if (row >= rows || lane != 0) return;
  const int64_t at = b * to_batch + head * to_head + row;
  if (d_lse && lse[at] != -INFINITY) sum -= d_lse[at];  // a row that sees nothing: 0 * NaN would be NaN
  to[at] = sum;
}

__global__ void __launch_bounds__(threads)
    clear(float4* sums, int64_t sums_count, int32_t* turns, int64_t turns_count) {
  const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (i < sums_count) sums[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  if (i < turns_count) turns[i] = 0;
}

}  // namespace

void compute_delta(const Backward& x) {
  const Problem& p = x.forward;
  // Packed sequences lie one after the other in o, do, lse and delta alike: one long sequence here.
  const int batch = p.starts_q ? 1 : p.batch, rows = p.starts_q ? p.total_queries : p.queries;
  simt::Launch shape{grid_of(divide_up(rows, threads / lanes), p.heads, batch), dim3(threads)};
  shape.stream = p.stream;
  for_type(p, [&](auto zero) {
    using T = decltype(zero);
    simt::launch(delta<T>, shape, Rows<const T>::of(p.o), Rows<const T>::of(x.d_o), static_cast<const float*>(p.lse),
                 x.d_lse, x.delta, p.lse_batch, p.lse_head, rows, p.head_dim);
  });
}

void clear_sums(const Backward& x) {
  const Problem& p = x.forward;
  const int64_t rows = p.heads * sum_rows(p.total_queries, p.batch), count = rows * p.head_dim / 4;
  simt::Launch shape{dim3(unsigned((count + threads - 1) / threads)), dim3(threads)};
  shape.stream = p.stream;
  simt::launch(clear, shape, reinterpret_cast<float4*>(x.dq_sum), count, x.turns, rows / sum_tile);
}

}  // namespace attention::backward
